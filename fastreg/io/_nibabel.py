"""Images that SimpleITK does not read and nibabel does, where it is installed."""

from pathlib import Path
from typing import Any

import numpy as np

from fastreg._files import InputError, Name
from fastreg._refusals import Missing

from ._integrity import require_streams
from ._nifti import opened


def read_foreign(path: Path, kind: str, shown: Name) -> tuple[np.ndarray, np.ndarray]:
    """(array (z, y, x), affine (3, 4): voxel (x, y, z) -> mm, RAS): of a NIfTI-1, NIfTI-2 or MGH file, packed or not.

    InputError: damaged, 4D, several values a voxel. Missing: no nibabel.
    """
    try:
        import nibabel
    except ImportError as error:
        raise Missing("nibabel", f"{shown}: reading {kind}") from error
    cls: Any = {
        "NIfTI-1": nibabel.Nifti1Image,
        "NIfTI-2": nibabel.Nifti2Image,
        "FreeSurfer MGH": nibabel.MGHImage,
    }[kind]
    try:
        if path.name.lower().endswith((".nii", ".gz", ".mgh", ".mgz")):
            with opened(path) as stream:
                image = cls.from_bytes(stream.read())
        else:
            require_streams(path)  # nibabel stops before a checksum
            image = nibabel.load(path)
        shape = tuple(image.shape)
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        array = np.asarray(image.dataobj).reshape(shape, order="F")
    except (OSError, EOFError, ValueError, TypeError, nibabel.filebasedimages.ImageFileError) as error:
        raise InputError(f"{shown}: is {kind}, but damaged or cut short") from error
    if array.dtype.names is not None:
        raise InputError(f"{shown}: must have one value a voxel, got {len(array.dtype.names)} (colour)")
    if len(shape) not in (2, 3):
        raise InputError(
            f"{shown}: must be a 2D or 3D image, got {len(shape)} dimensions ({'x'.join(map(str, shape))})"
        )
    affine = np.asarray(image.affine, dtype=np.float64)[:3]
    return np.ascontiguousarray(array.T.astype(array.dtype.newbyteorder("="))), affine
