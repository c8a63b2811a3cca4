"""FSL: warps of fnirt and convertwarp."""

from pathlib import Path

import numpy as np

from fastreg._files import InputError
from fastreg.io import Geometry

from ._chain import Field, Step
from ._format import Format, Source, Target
from ._nifti import positions, read_vectors, write_vectors


def _scaled(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """(m, t): m @ index (z, y, x) + t is FSL's mm (x, y, z): x from the other end where the axes are right-handed."""
    m = np.diag(geometry.spacing)[:, ::-1].copy()
    t = np.zeros(3)
    # LPS and RAS differ by two signs: the determinant is the same.
    if np.linalg.det(geometry.matrix[:, ::-1]) > 0:
        m[0] *= -1
        t[0] = (geometry.size[0] - 1) * geometry.spacing[0]
    return m, t


def _to_fsl(geometry: Geometry, points: np.ndarray) -> np.ndarray:
    m, t = _scaled(geometry)
    return geometry.to_index(points) @ m.T + t


def _from_fsl(geometry: Geometry, points: np.ndarray) -> np.ndarray:
    m, t = _scaled(geometry)
    return geometry.to_physical((points - t) @ np.linalg.inv(m).T)


def _spread(array: np.ndarray) -> float:
    return float(array.std(axis=(0, 1, 2)).sum())


def _require_3d(path: Path, moving: Geometry) -> None:
    if moving.nd != 3:
        raise InputError(f"{path}: an FSL warp is of 3D images, and the moving one is {moving.nd}D")


def read(source: Source) -> list[Step]:
    array, grid = read_vectors(source, 4, "an FSL warp", "a 3D grid of 3 numbers (X, Y, Z, 3)")
    moving = source.needs("moving", "an FSL warp counts from the corner of the moving image")
    _require_3d(source.path, moving)
    start = positions(grid)
    here = _to_fsl(grid, start)
    # FSL's own rule: positions spread over the image, displacements do not.
    absolute = _spread(array) > _spread(array - here)
    vectors = _from_fsl(moving, array if absolute else array + here) - start
    kind = "absolute" if absolute else "relative"
    return [Step(f"FSL {kind} warp (scaled mm), {_size(grid)}", str(source.path), Field(vectors, grid))]


def _size(grid: Geometry) -> str:
    return "x".join(map(str, grid.size))


def write(target: Target) -> None:
    if target.moving is None:
        raise InputError(
            f"{target.path}: an FSL warp counts from the corner of the moving image: give --moving MOVING"
        )
    _require_3d(target.path, target.moving)
    start = positions(target.geometry)
    relative = _to_fsl(target.moving, start + target.vectors) - _to_fsl(target.geometry, start)
    write_vectors(target, relative, axes=4, code=2006)


FORMAT = Format(
    "fsl",
    "FSL fnirt, convertwarp, applywarp",
    ".nii.gz .nii",
    "NIfTI 4D, intent 2006",
    "displacements (or positions: FSL's rule tells) in mm from the image's corner, x from its right",
    read,
    write,
    needs="--moving",
    written="displacements in mm from the image's corner, x from its right",
    suffixes=(".nii.gz", ".nii"),
)
