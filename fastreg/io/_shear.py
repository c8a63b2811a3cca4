"""Grids whose axes are not at right angles: how far off, and put right. ITK's images, and so our outputs, have none."""

import numpy as np
import torch

from fastreg._files import InputError, Name

from ._geometry import Geometry
from ._reading import Reading, Warn
from ._resample import resample

STRAIGHT = 0.1  # degrees: what may be a rounded direction


def shear(grid: Geometry) -> float:
    """Degrees that two of its axes are off a right angle, at most."""
    axes = np.reshape(grid.direction, (grid.nd, grid.nd))
    return float(np.degrees(np.arcsin(np.clip(np.abs(np.triu(axes.T @ axes, 1)).max(), 0, 1))))


def upright(grid: Geometry) -> Geometry:
    """The grid with the nearest axes that are at right angles; its first voxel stays."""
    u, _, v = np.linalg.svd(np.reshape(grid.direction, (grid.nd, grid.nd)))
    return Geometry(grid.size, grid.spacing, grid.origin, tuple((u @ v).ravel().tolist()))


def straightened(array: np.ndarray, grid: Geometry, nearest: bool = False) -> tuple[np.ndarray, Geometry]:
    """(fp32, its grid; nearest: its own dtype): linear interpolation on the grid of right angles that keeps the rows and the planes, and holds all of it."""
    first, second, _ = grid.matrix[:, ::-1].T
    row = first / np.linalg.norm(first)
    column = second - (second @ row) * row
    column /= np.linalg.norm(column)
    normal = np.cross(row, column) * np.sign(np.linalg.det(grid.matrix[:, ::-1]))
    axes = np.column_stack([row, column, normal])
    spacing = np.diag(axes.T @ grid.matrix[:, ::-1])
    loose = Geometry(grid.size, tuple(spacing), grid.origin, tuple(axes.ravel()))
    ends = np.stack(np.meshgrid(*[(0, n - 1) for n in grid.shape], indexing="ij"), -1).reshape(-1, 3)
    ends = loose.to_index(grid.to_physical(ends))
    low = np.floor(ends.min(0) + 1e-6)
    size = (np.ceil(ends.max(0) - 1e-6) - low + 1).astype(int)[::-1]
    onto = Geometry(
        tuple(size.tolist()), loose.spacing, tuple(loose.to_physical(low).tolist()), loose.direction
    )
    values = torch.from_numpy(np.array(array, dtype=np.float64 if nearest else np.float32, order="C"))[
        None, None
    ]
    mode = "nearest" if nearest else "linear"
    moved = resample(values, grid, onto, mode=mode, outside=float(array.min()))[0][0, 0].numpy()
    return moved.astype(array.dtype) if nearest else moved, onto


def made_straight(
    array: np.ndarray,
    grid: Geometry,
    path: Name,
    reading: Reading,
    warn: Warn,
    what: str = "its sform is sheared",
    rough: float = 0.0,
    nearest: bool = False,
) -> tuple[np.ndarray, Geometry]:
    """An array (z, y, x) and its grid, with axes at right angles. what: is to be said; rough: radians of no account; nearest: it
    holds labels. InputError where reading wants none of it.
    """
    straight, angle = upright(grid), shear(grid)
    off = grid.apart(straight)
    if off <= 1e-3 * min(grid.spacing) or angle <= np.degrees(rough):
        return array, straight
    if angle <= STRAIGHT:
        warn(
            f"{path}: {what} by {angle:.2g} degrees, which is left out: its corners are read up to {off:.2g} mm off"
        )
        return array, straight
    said = f"{path}: {what} by {angle:.3g} degrees"
    if grid.nd != 3 or array.ndim != 3:
        several = "is 2D" if grid.nd != 3 else "has several values a voxel"
        raise InputError(f"{said}, and {several}: it cannot be put on a straight grid")
    if reading.tilt == "refuse":
        raise InputError(f"{said}, and outputs cannot be: --tilt resample puts it on a straight grid")
    return straightened(array, grid, nearest)
