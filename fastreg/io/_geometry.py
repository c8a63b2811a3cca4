"""Where a voxel grid lies in physical space."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from ._plane import Plane


@dataclass(frozen=True)
class Geometry:
    """Where a voxel grid lies: point = origin + direction @ (spacing * index), in ITK's order (x, y, z)."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    # of a 2D grid that is one slice in space
    plane: "Plane | None" = field(default=None, compare=False, repr=False, kw_only=True)

    @classmethod
    def of(cls, shape: Sequence[int], spacing: Sequence[float]) -> "Geometry":
        """The grid of an array: shape and spacing (mm) in (z, y, x), origin 0, axes along the patient's."""
        nd = len(shape)
        eye = tuple(float(v) for v in np.eye(nd).ravel())
        return cls(tuple(shape)[::-1], tuple(float(s) for s in spacing)[::-1], (0.0,) * nd, eye)

    @property
    def nd(self) -> int:
        return len(self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        """(z, y, x)."""
        return self.size[::-1]

    @property
    def spacing_zyx(self) -> tuple[float, ...]:
        """mm, (z, y, x)."""
        return self.spacing[::-1]

    @property
    def matrix(self) -> np.ndarray:
        """(nd, nd): turns a step in voxels (z, y, x) into mm (x, y, z)."""
        direction = np.asarray(self.direction, dtype=np.float64).reshape(self.nd, self.nd)
        return (direction * np.asarray(self.spacing))[:, ::-1].copy()

    def to_physical(self, index: ArrayLike) -> np.ndarray:
        """(..., nd) voxels (z, y, x) -> (..., nd) mm (x, y, z)."""
        return np.asarray(index, dtype=np.float64) @ self.matrix.T + np.asarray(self.origin)

    def to_index(self, points: ArrayLike) -> np.ndarray:
        """(..., nd) mm (x, y, z) -> (..., nd) voxels (z, y, x)."""
        return (np.asarray(points, dtype=np.float64) - self.origin) @ np.linalg.inv(self.matrix).T

    def slab(self, start: int, stop: int) -> "Geometry":
        """The part of the grid from index start to stop along the first axis of (z, y, x)."""
        origin = np.asarray(self.origin) + start * self.matrix[:, 0]
        size = (*self.size[:-1], stop - start)
        return Geometry(size, self.spacing, tuple(float(v) for v in origin), self.direction)

    def rolled(self, by: int) -> "Geometry":
        """The same place, with the axes (x, y, z) in another order: the last `by` of them first."""
        direction = np.roll(np.reshape(self.direction, (self.nd, self.nd)), by, axis=1)
        size, spacing = (tuple(np.roll(np.asarray(v), by).tolist()) for v in (self.size, self.spacing))
        return Geometry(size, spacing, self.origin, tuple(direction.ravel().tolist()))

    def before(self, matrix: np.ndarray) -> "Geometry":
        """The grid that an affine map, (nd, nd + 1) in mm, takes to this one: an image on this grid, sampled through the map."""
        back = np.linalg.inv(matrix[:, :-1])
        direction = back @ np.asarray(self.direction).reshape(self.nd, self.nd)
        origin = back @ (np.asarray(self.origin) - matrix[:, -1])
        return Geometry(self.size, self.spacing, tuple(origin.tolist()), tuple(direction.ravel().tolist()))

    def map_to_index(self, matrix: np.ndarray) -> np.ndarray:
        """An affine map of points, (nd, nd + 1) in mm (x, y, z), as one of voxels (z, y, x)."""
        m, o, back = self.matrix, np.asarray(self.origin), np.linalg.inv(self.matrix)
        linear, shift = matrix[:, :-1], matrix[:, -1]
        moved = back @ (linear @ o + shift - o)
        return np.concatenate([back @ linear @ m, moved[:, None]], 1)

    def map_to_physical(self, matrix: np.ndarray) -> np.ndarray:
        """An affine map of voxels (z, y, x), (nd, nd + 1), as one of points in mm (x, y, z)."""
        m, o = self.matrix, np.asarray(self.origin)
        linear = m @ matrix[:, :-1] @ np.linalg.inv(m)
        return np.concatenate([linear, (m @ matrix[:, -1] + o - linear @ o)[:, None]], 1)

    @property
    def centre(self) -> np.ndarray:
        """mm, (x, y, z)."""
        return self.to_physical((np.asarray(self.shape) - 1) / 2)

    def in_space(self, points: np.ndarray) -> np.ndarray:
        """(..., nd) mm (x, y, z); of a slice in space (..., 3)."""
        return points if self.plane is None else self.plane.points(points)

    def contains(self, index: np.ndarray) -> np.ndarray:
        """(..., nd) voxels (z, y, x) -> bool: inside the image, half a voxel around its centres included."""
        return np.all((index >= -0.5) & (index <= np.asarray(self.shape) - 0.5), axis=-1)

    def apart(self, other: "Geometry") -> float:
        """mm between the two at the corner where they are farthest apart; both have one size."""
        corners = np.stack(np.meshgrid(*[(0, n - 1) for n in self.shape], indexing="ij"), -1)
        away = self.to_physical(corners) - other.to_physical(corners)
        return float(np.linalg.norm(away, axis=-1).max())

    def matches(self, other: "Geometry") -> bool:
        """Whether both are one grid, up to what file formats round away (a thousandth of a voxel)."""
        return self.size == other.size and self.apart(other) <= 1e-3 * min(self.spacing)

    def difference(self, other: "Geometry") -> str:
        """How this grid differs from another one, by how much, and what it looks like where that is known."""
        if self.size != other.size:
            swapped = ", its axes are in another order" if sorted(self.size) == sorted(other.size) else ""
            return f"{self} against {other}{swapped}"
        text = f"it is {self.apart(other):.3g} mm off at the corner where it is farthest"
        if self.nd == 3 and self._turned((-1, -1, 1)).matches(other):
            return text + "; x and y have the other sign (RAS for LPS)"
        for axis in range(self.nd):
            if self._flipped(axis).matches(other):
                return text + f"; its {'xyz'[axis]} axis runs the other way"
        if np.any(other.origin) and not np.any(self.origin):
            return text + "; its origin is 0, as of a file that has lost its place"
        if not np.allclose(self.spacing, other.spacing, rtol=1e-3):
            return text + f"; {self} against {other}"
        if np.allclose(self.direction, other.direction, atol=1e-4):
            shift = ", ".join(f"{v:.4g}" for v in np.subtract(self.origin, other.origin))
            return text + f"; its origin is shifted by {shift} mm"
        return text + "; its axes have another direction"

    def _turned(self, signs: tuple[int, ...]) -> "Geometry":
        """With the signs of physical axes changed."""
        direction = np.reshape(self.direction, (self.nd, self.nd)) * np.reshape(signs, (-1, 1))
        origin = np.multiply(self.origin, signs)
        return Geometry(self.size, self.spacing, tuple(origin.tolist()), tuple(direction.ravel().tolist()))

    def _flipped(self, axis: int) -> "Geometry":
        """The same place, with one axis (x, y, z) counted from its other end."""
        index = np.zeros(self.nd)
        index[self.nd - 1 - axis] = self.size[axis] - 1
        direction = np.reshape(self.direction, (self.nd, self.nd)).copy()
        direction[:, axis] *= -1
        origin = tuple(self.to_physical(index).tolist())
        return Geometry(self.size, self.spacing, origin, tuple(direction.ravel().tolist()))

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.size))} voxels of {' x '.join(f'{s:g}' for s in self.spacing)} mm"
