"""Images of several numbers a voxel, and series of volumes: what `read_image`, of scalars alone, refuses."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastreg._files import InputError, Name

from ._geometry import Geometry
from ._images import geometry_of, read, write
from ._reading import Reading, Warn, ignore
from ._sitk import sitk


@dataclass(frozen=True)
class Volumes:
    """Volumes on one grid, (T, *spatial, C) in the file's dtype; T and C are 1 for an image of scalars.

    series: (step, start) of the axis of a series of volumes, in the header's unit; None: one volume.
    """

    array: np.ndarray
    geometry: Geometry
    series: tuple[float, float] | None = None

    @property
    def channels(self) -> int:
        return int(self.array.shape[-1])

    @property
    def is_colour(self) -> bool:
        """RGB or RGBA."""
        return self.array.dtype == np.uint8 and self.channels in (3, 4)

    def __iter__(self) -> Iterator[np.ndarray]:
        """(C, *spatial) of one volume after the other; a copy but for scalars."""
        for volume in self.array:
            yield np.ascontiguousarray(np.moveaxis(volume, -1, 0))


def _volume_of(image: Any, path: Name) -> tuple[Geometry, tuple[float, float] | None]:
    """The grid of a volume, and the axis of the series; an image of 4 axes is a series of 3D ones."""
    nd = image.GetDimension()
    if nd in (2, 3):
        return geometry_of(image, path), None
    if nd != 4:
        raise InputError(f"{path}: must be a 2D or 3D image or a series of 3D ones, got {nd} dimensions")
    direction = np.reshape(image.GetDirection(), (4, 4))
    if np.abs(direction[3, :3]).max() > 1e-6 or np.abs(direction[:3, 3]).max() > 1e-6:
        raise InputError(f"{path}: the volumes of its series are shifted against each other")
    first = sitk().Extract(image, [*image.GetSize()[:3], 0], [0] * 4)
    step, start = float(image.GetSpacing()[3]), float(image.GetOrigin()[3])
    return geometry_of(first, path), (step, start)


def read_volumes(path: Name, reading: Reading = Reading(), warn: Warn = ignore) -> Volumes:
    """Reads an image of one or several numbers a voxel, or a series of 3D ones (4D): any file SimpleITK reads.

    Vectors that turn with the patient are not turned: warn(message) says so of 6 components, as of tensors, and of nd.
    Returns:
        Volumes.
    Raises:
        InputError: as read_image, but for 4D and several numbers a voxel.
        ImportError: no SimpleITK.
    """
    image, bad = read(path, reading, warn)
    geometry, series = _volume_of(image, path)
    n_components = image.GetNumberOfComponentsPerPixel()
    array = sitk().GetArrayViewFromImage(image)
    if np.iscomplexobj(array):
        raise InputError(
            f"{path}: must have real values, got complex ones: save magnitude, or real and imaginary part, as images of their own"
        )
    if array.dtype.kind == "f":
        bad = bad or sum(part.size - np.count_nonzero(np.isfinite(part)) for part in array)
    if bad:
        raise InputError(f"{path}: must be finite, got NaN or infinity in {bad} of {array.size} voxels")
    if array.dtype.kind == "f" and n_components in (geometry.nd, 6, 9):
        warn(
            f"{path}: its {n_components} components are moved, not rotated: wrong for displacements, directions, tensors (colours may be)"
        )
    array = np.array(array).reshape(-1, *geometry.shape, n_components)
    return Volumes(array, geometry, series)


def volume_geometry(path: Name, reading: Reading = Reading(), warn: Warn = ignore) -> Geometry:
    """The grid of an image's volumes, whatever they hold. InputError, ImportError: as read_volumes."""
    return _volume_of(read(path, reading, warn)[0], path)[0]


def write_volumes(path: Name, volumes: Volumes) -> None:
    """Writes what read_volumes reads; the extension of path is the format. OSError when that fails."""
    array, grid = volumes.array, volumes.geometry
    if volumes.series is None:
        array = array[0]
    else:
        step, start = volumes.series
        direction = np.eye(4)
        direction[:3, :3] = np.reshape(grid.direction, (3, 3))
        sizes = (*grid.size, len(array)), (*grid.spacing, step), (*grid.origin, start)
        grid = Geometry(*sizes, tuple(float(v) for v in direction.ravel()))
    several = volumes.channels > 1
    write(path, sitk().GetImageFromArray(array if several else array[..., 0], isVector=several), grid)
