"""Scans: any file SimpleITK reads."""

import errno
import zlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastreg._files import InputError, Name, probe, replacing, require_regular, require_utf8

from . import _integrity
from ._dicom import is_dicom, parted, read_dicom
from ._geometry import Geometry
from ._nifti import not_finite
from ._reading import Reading, Warn, ignore
from ._sitk import heard, silent_stderr, sitk


def read(path: Name, reading: Reading = Reading(), warn: Warn = ignore) -> tuple[Any, int]:
    """(SimpleITK image, how many values are not finite that it reads as 0)."""
    itk = sitk()
    require_utf8(path)
    file, which = parted(path)
    if not file.exists():
        raise InputError(f"{file}: no such file")
    if file.name.lower().endswith((".nia", ".nia.gz")):
        # ITK reads its NaN as 0 and we cannot tell
        raise InputError(f"{file}: text NIfTI is not supported; save it as .nii.gz")
    if file.is_dir():
        return read_dicom(path, reading, warn), 0
    require_regular(file)
    if is_dicom(file):
        return read_dicom(path, reading, warn), 0
    if which is not None:
        raise InputError(f"{path}: no such file")
    try:
        _integrity.check(file)
        with heard(file, warn):
            image = itk.ReadImage(str(file))
        bad = not_finite(file, image)
    except (RuntimeError, EOFError, OSError, zlib.error) as error:
        if "memory" in str(error) or "bad_alloc" in str(error):
            raise InputError(f"{file}: not enough memory for an image of this size") from error
        raise InputError(f"{file}: not an image SimpleITK can read, or damaged") from error
    return image, bad


def geometry_of(image: Any, path: Name) -> Geometry:
    """The grid of a SimpleITK image, which must be one that can be interpolated on."""
    geometry = Geometry(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    flat = [axis for axis, n in zip("xyz", geometry.size, strict=False) if n < 2]
    if flat:
        also = "; save it as a 2D image" if geometry.nd == 3 and len(flat) == 1 else ""
        axes = " and ".join(flat)
        raise InputError(f"{path}: must have at least 2 voxels an axis, got 1 along {axes}{also}")
    numbers = np.concatenate([geometry.spacing, geometry.origin, geometry.direction])
    usable = np.isfinite(numbers).all() and min(geometry.spacing) > 0
    if not (usable and np.linalg.cond(geometry.matrix) < 1e6):
        raise InputError(f"{path}: its spacing, origin or direction is not usable")
    return geometry


def read_image(path: Name, reading: Reading = Reading(), warn: Warn = ignore) -> tuple[np.ndarray, Geometry]:
    """Reads a scalar 2D or 3D image: any file SimpleITK reads, or a folder with one DICOM series.

    reading: what is chosen where a file can be understood in two ways. warn(message): what may not be meant.
    Returns:
        (ndarray, Geometry): the array in (z, y, x), in the file's dtype.
    Raises:
        InputError: missing, damaged, 4D, one slice only, several values a voxel, not finite.
        ImportError: no SimpleITK.
    """
    itk = sitk()
    image, bad = read(path, reading, warn)
    nd, n_components = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if nd not in (2, 3):
        raise InputError(f"{path}: must be a 2D or 3D image, got {nd} dimensions")
    if n_components != 1:
        raise InputError(f"{path}: must have one value a voxel, got {n_components}")
    geometry = geometry_of(image, path)
    array = itk.GetArrayFromImage(image)
    if np.iscomplexobj(array):
        raise InputError(f"{path}: must have real values, got complex ones")
    bad = bad or array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise InputError(f"{path}: must be finite, got NaN or infinity in {bad} of {array.size} voxels")
    return array, geometry


def write(path: Name, image: Any, geometry: Geometry) -> None:
    require_utf8(path)
    itk = sitk()
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    with replacing(path) as temporary:
        try:
            with silent_stderr():
                itk.WriteImage(image, str(temporary), useCompression=True)
            _integrity.require_written(temporary, image)
        except (RuntimeError, EOFError, OSError, zlib.error) as error:
            probe(temporary)
            raise OSError(errno.EIO, "cannot be written as an image", str(temporary)) from error


def write_image(path: Name, array: ArrayLike, geometry: Geometry) -> None:
    """Writes an array (z, y, x) on its grid; the extension of path is the format. OSError when that fails."""
    array = np.asarray(array)
    known = {np.dtype(np.float16): np.float32, np.dtype(bool): np.uint8}  # what files cannot hold
    array = np.ascontiguousarray(array, dtype=known.get(array.dtype))
    write(path, sitk().GetImageFromArray(array), geometry)
