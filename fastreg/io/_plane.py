"""One slice in space: an image of 3 axes, one of which has one voxel. It is registered in 2D, and stays where it is."""

from dataclasses import dataclass

import numpy as np
import torch

from fastreg._files import InputError, Name

from ._geometry import Geometry
from ._reading import Warn


@dataclass(frozen=True)
class Plane:
    """Where a 2D grid lies that is one slice in space.

    whole: the slice, in 3D. origin (3,), axes (3, 2): of the plane, in space. step (3,), mm: to the slice that it is registered
    with.
    """

    whole: Geometry
    origin: np.ndarray
    axes: np.ndarray
    step: np.ndarray

    def vectors(self, flat: np.ndarray) -> np.ndarray:
        """(rows, columns, 2) mm in the plane -> (*whole.shape, 3) mm in space, that lead to the other slice."""
        return (flat @ self.axes.T + self.step).reshape(*self.whole.shape, 3)

    def points(self, flat: np.ndarray) -> np.ndarray:
        """(..., 2) mm in the plane -> (..., 3) mm in space."""
        return np.asarray(self.origin + flat @ self.axes.T)

    def flat_displacement(self, u: torch.Tensor) -> torch.Tensor:
        """(1, 3, *whole.shape), in voxels of whole -> (1, 2, rows, columns): what it does in the plane."""
        axis = 2 - (thin_axis(self.whole) or 0)  # of z, y, x
        return u[:, [k for k in range(3) if k != axis]].squeeze(2 + axis)

    def flat_map(self, matrix: np.ndarray) -> np.ndarray:
        """Of a map (3, 4) of mm in space what it does in the plane: (2, 3)."""
        shift = matrix[:, :-1] @ self.origin + matrix[:, -1] - self.origin
        return np.asarray(self.axes.T @ np.column_stack([matrix[:, :-1] @ self.axes, shift]))

    def map(self, flat: np.ndarray) -> np.ndarray:
        """A map (2, 3) of mm in the plane -> (3, 4) of mm in space, that leads to the other slice."""
        linear = self.axes @ (flat[:, :-1] - np.eye(2)) @ self.axes.T
        shift = self.axes @ flat[:, -1] + self.step - linear @ self.origin
        return np.concatenate([np.eye(3) + linear, shift[:, None]], 1)


def thin_axis(grid: Geometry) -> int | None:
    """The axis (of x, y, z) along which a 3D grid has one voxel; None: it is no slice."""
    return grid.size.index(1) if grid.nd == 3 and grid.size.count(1) == 1 else None


def kind_of(grid: Geometry) -> str:
    return f"{grid.nd}D" if thin_axis(grid) is None else "one slice in 3D"


def in_plane(fixed: Geometry, moving: Geometry, path: Name, warn: Warn) -> tuple[Geometry, Geometry]:
    """The 2D grids, with their Plane, of two slices: mm from the fixed one's first voxel, along its own axes.

    InputError: the moving one, of path, is turned out of the fixed one's plane by more than half its thickness.
    """
    thin = thin_axis(fixed) or 0
    frame = np.delete(np.reshape(fixed.direction, (3, 3)), thin, axis=1)
    normal = np.cross(*frame.T)
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in moving.shape], indexing="ij"), -1)
    depths = (moving.to_physical(corners) - fixed.origin) @ normal
    depth, off = float(depths.mean()), float(np.abs(depths - depths.mean()).max())
    thick = moving.spacing[thin_axis(moving) or 0]
    if off > thick / 2:
        raise InputError(
            f"{path}: both must be slices of one plane, but one is turned against the other: by {off:.3g} mm at a corner, "
            f"more than half of its thickness of {thick:g} mm"
        )
    if abs(depth) > thick / 2:
        warn(
            f"{path}: its slice lies {abs(depth):.3g} mm off that of the fixed image; the displacement leads there"
        )
    grids = []
    for whole, step in ((fixed, depth * normal), (moving, -depth * normal)):
        thin = thin_axis(whole) or 0
        direction = frame.T @ np.delete(np.reshape(whole.direction, (3, 3)), thin, axis=1)
        origin = frame.T @ np.subtract(whole.origin, fixed.origin)
        size, spacing = (tuple(np.delete(np.asarray(v), thin).tolist()) for v in (whole.size, whole.spacing))
        plane = Plane(whole, np.asarray(fixed.origin), frame, step)
        grids.append(
            Geometry(size, spacing, tuple(origin.tolist()), tuple(direction.ravel().tolist()), plane=plane)
        )
    return grids[0], grids[1]


def points_in_plane(points: np.ndarray, grid: Geometry, path: Name) -> np.ndarray:
    """(P, 3) mm in a slice -> (P, 2) mm in the plane. InputError: more than half a slice off."""
    assert grid.plane is not None
    whole = grid.plane.whole
    thin = thin_axis(whole) or 0
    off = np.abs(whole.to_index(points)[:, 2 - thin])
    worst = int(off.argmax())
    if off[worst] > 0.5 + 1e-6:
        thick = whole.spacing[thin]
        raise InputError(
            f"{path}: landmark {worst + 1} lies {off[worst] * thick:.3g} mm off the slice, which is {thick:g} mm thick"
        )
    return np.asarray((points - grid.plane.origin) @ grid.plane.axes)
