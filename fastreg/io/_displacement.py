"""Displacement fields of ITK."""

from pathlib import Path

import numpy as np
import torch

from fastreg._files import InputError, Name, replacing, require_utf8, reserve

from ._geometry import Geometry
from ._images import geometry_of, read, write
from ._reading import Reading, Warn, ignore
from ._sitk import silent_stderr, sitk

IMAGES = (".nii.gz", ".nii", ".mha", ".nrrd")
# ITK reads a NIfTI file of vectors with one voxel along z as 2D. One along x it reads as it is: a slice is written so, and says it.
NOTES, ROLLED = "ITK_FileNotes", "one slice: its axes are z, x, y"


def read_vectors(
    path: Name, reading: Reading = Reading(), warn: Warn = ignore
) -> tuple[np.ndarray, Geometry]:
    """((*spatial, nd) fp64 mm, LPS, (x, y, z); its grid) of an ITK displacement field."""
    image, bad = read(path, reading, warn)
    nd = image.GetDimension()
    if nd not in (2, 3) or image.GetNumberOfComponentsPerPixel() != nd:
        raise InputError(
            f"{path}: must be a displacement field, a vector of 2 or 3 numbers at each pixel of a 2D or voxel of a 3D grid"
        )
    tags = {k: image.GetMetaData(k).strip() for k in image.GetMetaDataKeys()}
    if (name := tags.get("intent_name", "")).startswith("NREG"):
        raise InputError(
            f"{path}: is NiftyReg's ({name}), not an ITK displacement field: read it with fastreg convert"
        )
    if image.GetPixelID() not in (sitk().sitkVectorFloat32, sitk().sitkVectorFloat64):
        raise InputError(
            f"{path}: a displacement field must hold floating-point numbers, got {image.GetPixelIDTypeAsString()}: a colour image?"
        )
    if any("color" in v.lower() for k, v in tags.items() if k.startswith("NRRD_kinds")):
        raise InputError(f"{path}: is a colour image, not a displacement field")
    geometry = geometry_of(image, path)
    vectors = np.asarray(sitk().GetArrayFromImage(image), dtype=np.float64)
    if tags.get(NOTES) == ROLLED:
        vectors, geometry = np.moveaxis(vectors, 2, 0), geometry.rolled(-1)
    if bad or not np.isfinite(vectors).all():
        raise InputError(f"{path}: must be finite, got NaN or infinity")
    return vectors, geometry


def read_displacement(
    path: Name, reading: Reading = Reading(), warn: Warn = ignore
) -> tuple[torch.Tensor, Geometry]:
    """Reads an ITK displacement field (x, y, z), mm, LPS, as write_displacement writes it; fastreg.convert reads others.

    Returns:
        (Tensor, Geometry): (1, nd, *spatial) fp32, in voxels (z, y, x) of its grid.
    Raises:
        InputError: as read_image, and where a voxel does not hold one floating-point number an axis, or the file says that it
            is another tool's.
    """
    vectors, geometry = read_vectors(path, reading, warn)
    voxels = vectors @ np.linalg.inv(geometry.matrix).T
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(voxels, -1, 0), dtype=np.float32))[
        None
    ], geometry


def write_displacement(path: Name, u: torch.Tensor, geometry: Geometry) -> None:
    """Writes u (1, nd, *spatial), in voxels of geometry, as an ITK displacement field: (x, y, z), mm, fp32.

    ITK's DisplacementFieldTransform of the file maps a fixed point to the moving point it corresponds to. .h5 is that transform
    itself, which ReadTransform reads (fp64); other suffixes: .nii.gz, .nii, .mha, .nrrd. InputError for others, for NaN and infinity.
    """
    name = Path(path).name.lower()
    if not name.endswith((*IMAGES, ".h5")):
        raise InputError(f"{path}: a displacement field must be written as {', '.join(IMAGES)} or .h5")
    if not bool(torch.isfinite(u).all()):
        raise InputError(f"{path}: a displacement field must be finite, got NaN or infinity")
    voxels = u[0].detach().cpu().double().movedim(0, -1).numpy()
    vectors = voxels @ geometry.matrix.T
    if geometry.plane is not None:
        vectors, geometry = geometry.plane.vectors(vectors), geometry.plane.whole
    rolled = geometry.nd == 3 and geometry.size[2] == 1 and name.endswith((".nii", ".nii.gz"))
    if rolled:
        vectors, geometry = np.moveaxis(vectors, 0, 2), geometry.rolled(1)
    if not name.endswith(".h5"):
        image = sitk().GetImageFromArray(vectors.astype(np.float32), isVector=True)
        if rolled:
            image.SetMetaData(NOTES, ROLLED)
        write(path, image, geometry)
        return
    require_utf8(path)
    image = sitk().GetImageFromArray(vectors, isVector=True)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    transform = sitk().DisplacementFieldTransform(image)
    with replacing(path) as temporary:
        try:
            reserve(temporary, vectors.nbytes + (1 << 16))
            with silent_stderr():
                sitk().WriteTransform(transform, str(temporary))
        except RuntimeError as error:
            raise OSError(f"{path}: cannot be written as a transform") from error
