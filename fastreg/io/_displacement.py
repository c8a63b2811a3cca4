"""Displacement fields of ITK."""

import numpy as np
import torch

from fastreg._files import InputError, Name

from ._geometry import Geometry
from ._images import geometry_of, read, write
from ._reading import Reading, Warn, ignore
from ._sitk import sitk


def read_displacement(
    path: Name, reading: Reading = Reading(), warn: Warn = ignore
) -> tuple[torch.Tensor, Geometry]:
    """Reads an ITK displacement field (x, y, z), mm, LPS, as write_displacement writes it.

    Returns:
        (Tensor, Geometry): (1, nd, *spatial) fp32, in voxels (z, y, x) of its grid.
    Raises:
        InputError: as read_image, and where a voxel does not hold one number an axis.
    """
    image, bad = read(path, reading, warn)
    nd = image.GetDimension()
    if nd not in (2, 3) or image.GetNumberOfComponentsPerPixel() != nd:
        raise InputError(
            f"{path}: must be a displacement field, a vector of 2 or 3 numbers at each pixel of a 2D or voxel of a 3D grid"
        )
    geometry = geometry_of(image, path)
    vectors = np.asarray(sitk().GetArrayFromImage(image), dtype=np.float64)
    if bad or not np.isfinite(vectors).all():
        raise InputError(f"{path}: must be finite, got NaN or infinity")
    voxels = vectors @ np.linalg.inv(geometry.matrix).T
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(voxels, -1, 0), dtype=np.float32))[
        None
    ], geometry


def write_displacement(path: Name, u: torch.Tensor, geometry: Geometry) -> None:
    """Writes u (1, nd, *spatial), in voxels of geometry, as an ITK displacement field: (x, y, z), mm, fp32.

    ITK's DisplacementFieldTransform of the file maps a fixed point to the moving point it corresponds to.
    """
    voxels = u[0].detach().cpu().double().movedim(0, -1).numpy()
    vectors = (voxels @ geometry.matrix.T).astype(np.float32)
    write(path, sitk().GetImageFromArray(vectors, isVector=True), geometry)
