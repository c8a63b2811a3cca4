"""Transforms one after another: where a point of the fixed image lies in the moving one. mm, LPS, (x, y, z), fp64."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from fastreg._files import InputError
from fastreg.io import Geometry
from fastreg.io._reading import Warn, ignore
from fastreg.io._sitk import sitk

# Of what interpolation makes of 0 and 1: more than its rounding.
SOME = 1e-6


@dataclass(frozen=True)
class Field:
    """Displacements on a grid; NaN: not defined there. given: (*spatial, nd) fp64, mm; or a Tensor (1, nd, *spatial), fp32, voxels."""

    given: np.ndarray | torch.Tensor
    geometry: Geometry

    @functools.cached_property
    def vectors(self) -> np.ndarray:
        """(*spatial, nd) fp64, mm."""
        if isinstance(self.given, np.ndarray):
            return self.given
        return self.given[0].double().movedim(0, -1).numpy() @ self.geometry.matrix.T

    @property
    def voxels(self) -> torch.Tensor:
        """(1, nd, *spatial) fp32, voxels."""
        if isinstance(self.given, torch.Tensor):
            return self.given
        return _voxels(self.given, self.geometry)

    def _taken(self, index: np.ndarray) -> np.ndarray:
        """(P, nd) whole voxels -> (P, nd) fp64, mm."""
        at = tuple(index.T)
        if isinstance(self.given, np.ndarray):
            return self.given[at].astype(np.float64)
        return self.given[0].numpy()[(slice(None), *at)].T.astype(np.float64) @ self.geometry.matrix.T

    def at(self, points: np.ndarray, *, border: bool = False) -> np.ndarray:
        """(P, nd) mm -> (P, nd) displacements, linear, fp64; beyond the grid 0, as in ITK, or with border those of the nearest point."""
        shape = np.asarray(self.geometry.shape)
        index = self.geometry.to_index(points)
        inside = np.all((index >= -0.5) & (index < shape - 0.5), axis=-1, keepdims=True)
        index = np.clip(index, 0, shape - 1)
        lower = np.clip(np.floor(index).astype(int), 0, np.maximum(shape - 2, 0))  # one slice: 0
        fraction = index - lower
        out = np.zeros_like(index)
        for corner in np.ndindex(*[2] * len(shape)):
            weight = np.where(np.array(corner) == 1, fraction, 1 - fraction).prod(-1)[:, None]
            value = self._taken(np.minimum(lower + corner, shape - 1))
            # What carries no weight but rounding is not read: NaN reaches no further than the voxels beside it.
            out += np.where(weight > SOME, weight * value, 0)
        return out if border else np.where(inside, out, 0)


def _voxels(vectors: np.ndarray, grid: Geometry) -> torch.Tensor:
    u = np.ascontiguousarray(np.moveaxis(vectors @ np.linalg.inv(grid.matrix).T, -1, 0), dtype=np.float32)
    return torch.from_numpy(u)[None]


@dataclass(frozen=True)
class Step:
    """A transform of a chain: a field, or one of SimpleITK. what: in words."""

    what: str
    path: str
    field: Field | None = None
    other: Any = None

    @property
    def nd(self) -> int:
        return self.other.GetDimension() if self.field is None else self.field.geometry.nd

    @functools.cached_property
    def transform(self) -> Any:
        """Of SimpleITK, which moves nothing where a field is not defined, nor beyond it."""
        if self.field is None:
            return self.other
        vectors = np.nan_to_num(self.field.vectors.astype(np.float64), nan=0.0)
        image = _on(sitk().GetImageFromArray(vectors, isVector=True), self.field.geometry)
        return sitk().DisplacementFieldTransform(image)

    @functools.cached_property
    def undefined(self) -> Any:
        """An image that is 1 where the field is not defined; None: it is defined everywhere."""
        if self.field is None or not (bad := np.isnan(self.field.vectors).any(-1)).any():
            return None
        return _on(sitk().GetImageFromArray(bad.astype(np.float32)), self.field.geometry)


def _on(image: Any, geometry: Geometry) -> Any:
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    return image


@dataclass(frozen=True)
class Chain:
    """Steps in the order in which they move a point; like: the grid of the result, None: the first step's."""

    steps: tuple[Step, ...]
    like: Geometry | None = None

    @property
    def what(self) -> str:
        """What was recognised, in words."""
        return ", then ".join(step.what for step in self.steps)

    @property
    def geometry(self) -> Geometry:
        """The grid of the result."""
        if self.like is not None:
            return self.like
        first = self.steps[0]
        if first.field is None:
            raise InputError(
                f"{first.path}: {first.what} comes first and has no grid: --like FIXED names an image that has the result's"
            )
        return first.field.geometry

    def _until(self, k: int) -> Any:
        """SimpleITK's transform of the first k steps."""
        composite = sitk().CompositeTransform(self.geometry.nd)
        for step in reversed(self.steps[:k]):  # it applies the last one first
            composite.AddTransform(step.transform)
        return composite

    def _sampled(self, image: Any, k: int, how: int) -> np.ndarray:
        """An image on the result's grid as the first k steps lead there; 0 beyond it."""
        grid = self.geometry
        place = grid.size, self._until(k), how, grid.origin, grid.spacing, grid.direction
        return np.asarray(sitk().GetArrayFromImage(sitk().Resample(image, *place, 0.0)))

    def _on_its_own(self) -> bool:
        """Whether the first field lies on the grid of the result."""
        first = self.steps[0].field
        return first is not None and first.geometry.matches(self.geometry)

    def vectors(self, warn: Warn = ignore) -> np.ndarray:
        """Displacements (*spatial, nd) fp64 on the result's grid; NaN: not defined. InputError where a field does not reach it."""
        grid, own = self.geometry, self._on_its_own()
        for k, step in enumerate(self.steps):
            if step.field is not None and not (own and k == 0):
                self._require_reach(k, step, warn)
        if own and all(step.field is None and step.other.IsLinear() for step in self.steps[1:]):
            return self._then_matrices()
        place = grid.size, grid.origin, grid.spacing, grid.direction
        image = sitk().TransformToDisplacementField(
            self._until(len(self.steps)), sitk().sitkVectorFloat64, *place
        )
        vectors = np.array(sitk().GetArrayViewFromImage(image))
        for k, step in enumerate(self.steps):
            if step.undefined is not None:
                vectors[self._sampled(step.undefined, k, sitk().sitkLinear) > SOME] = np.nan
        return vectors

    def _then_matrices(self) -> np.ndarray:
        """As vectors, of a field on its own grid and matrices after it: without interpolation."""
        field, grid = self.steps[0].field, self.geometry
        assert field is not None
        offset = np.zeros(grid.nd)
        matrix = np.eye(grid.nd)
        for step in self.steps[1:]:
            images = [np.asarray(step.other.TransformPoint(p)) for p in [*matrix.T.tolist(), offset.tolist()]]
            start = np.asarray(step.other.TransformPoint([0.0] * grid.nd))
            matrix, offset = np.stack(images[:-1], 1) - start[:, None], images[-1]
        out = np.empty((*grid.shape, grid.nd))
        index = np.stack(np.meshgrid(*map(np.arange, (1, *grid.shape[1:])), indexing="ij"), -1)[0]
        for k in range(grid.shape[0]):  # positions of all at once would outweigh everything else
            index[..., 0] = k
            p = grid.to_physical(index)
            out[k] = (p + field.vectors[k]) @ matrix.T + offset - p
        return out

    def _require_reach(self, k: int, step: Step, warn: Warn) -> None:
        assert step.field is not None
        ones = np.ones(step.field.geometry.shape, np.uint8)
        image = _on(sitk().GetImageFromArray(ones), step.field.geometry)
        share = float(self._sampled(image, k, sitk().sitkNearestNeighbor).mean())
        if share == 0:
            raise InputError(
                f"{step.path}: {step.what} does not reach the image: no voxel of the result leads into its grid"
            )
        if share < 0.95:
            warn(
                f"{step.path}: {100 * (1 - share):.0f} % of the result lies beyond its grid and is not moved by it"
            )

    @property
    def matrix(self) -> np.ndarray | None:
        """(nd, nd + 1), mm (x, y, z), where every step is linear; else None."""
        if any(step.field is not None or not step.other.IsLinear() for step in self.steps):
            return None
        shift, *columns = self.map(np.eye(self.steps[0].nd + 1, self.steps[0].nd, -1))
        return np.stack([*(column - shift for column in columns), shift], 1)

    def displacement(self, warn: Warn = ignore) -> tuple[torch.Tensor, Geometry]:
        """(u (1, nd, *spatial) fp32 in voxels, NaN: not defined; its grid)."""
        field = self.steps[0].field
        if len(self.steps) == 1 and field is not None and self._on_its_own():
            return field.voxels, self.geometry
        return _voxels(self.vectors(warn), self.geometry), self.geometry

    def map(self, points: ArrayLike) -> np.ndarray:
        """(P, nd) mm in the fixed image -> mm in the moving one; NaN where a field is not defined.

        Beyond the grid of a field that comes first a point is moved as the nearest one on it; further fields move
        nothing beyond theirs, as in ITK.
        """
        out = np.array(points, dtype=np.float64)
        for k, step in enumerate(self.steps):
            known = np.isfinite(out).all(-1)
            if step.field is not None:
                out[known] += step.field.at(out[known], border=k == 0)
            else:
                out[known] = [step.transform.TransformPoint(p) for p in out[known].tolist()]
        return out


def landing(u: torch.Tensor, geometry: Geometry, moving: Geometry) -> float:
    """Of the voxels of a field, the share that leads into the moving image."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in geometry.shape], indexing="ij"), -1)
    target = geometry.to_physical(index + u[0].double().movedim(0, -1).numpy())
    return float(moving.contains(moving.to_index(target)).mean())


def require_landing(share: float, field: str, moving: str, warn: Warn) -> None:
    """InputError where no voxel of a field leads into the moving image, a warning where most do not. share: of those that do."""
    if share == 0:
        raise InputError(f"{field}: leads nowhere into {moving}")
    if share < 0.5:
        warn(
            f"{field}: only {100 * share:.2g} % of the result lie inside {moving}: are these its transforms, and in ANTs' order (the warp before the affine)?"
        )
