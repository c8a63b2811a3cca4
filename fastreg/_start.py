"""Where a registration begins: how the moving image is laid on the fixed one before anything is optimised.

A start is an affine map or a displacement of fixed points to moving ones. Both images are looked at in 32 voxels along the fixed
image's longest side, and a start is judged where they then overlap: by how much their intensities know of each other (mutual
information, which any contrast has) and by how well their textures fit (squared local correlation), the geometric mean of both.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from . import _affine, _check, _descent, _inverse, io, ops
from .io import Geometry

CHOICES = ("auto", "none", "centres", "masses", "search")

_VOXELS = 32  # along the longest side of the fixed image
_TURNED_VOXELS = 20  # the same, where many rotations are compared
# Of 30 real pairs that lie well, as they are and cut to parts, none scored more than 1.15 times as much elsewhere; moved by a tenth of
# their size and more all scored at least 1.36 times as much where they belong. Of 285 real pairs as they lie none is moved.
_CLEARLY, _AT_LEAST = 1.25, 0.06
_BACKGROUND = 0.15  # of the range of intensities: what differs less from the border's has no mass
_LEAST_OVERLAP = 0.02  # of the smaller image
_BINS, _WINDOW = 16, 5
_FINALISTS, _APART = 6, 35.0  # rotations that are refined, degrees between them
_ITERATIONS = 80


@dataclass(frozen=True)
class Start:
    """A map of fixed to moving points.

    taken: one of CHOICES, or what gave it. grid: of the fixed image. matrix: (nd, nd + 1), mm, (x, y, z); or displacement: (1, nd,
    *grid.shape), voxels of grid. scores: of what was compared.
    """

    taken: str
    grid: Geometry
    matrix: np.ndarray | None = None
    displacement: Tensor | None = None
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def voxels(self) -> Tensor:
        """The matrix, (1, nd, nd + 1) fp64, voxels of the fixed grid."""
        assert self.matrix is not None
        return torch.from_numpy(self.grid.map_to_index(self.matrix))[None]

    @property
    def moves(self) -> float:
        """mm: the centre of the fixed image, or the mean of a displacement."""
        if self.displacement is not None:
            u = self.displacement[0].flatten(1).double().cpu().numpy()
            return float(np.linalg.norm(self.grid.matrix @ u, axis=0).mean())
        assert self.matrix is not None
        centre = self.grid.centre
        return float(np.linalg.norm(self.matrix[:, :-1] @ centre + self.matrix[:, -1] - centre))

    @property
    def turns(self) -> float:
        """Degrees, of the rotation in it."""
        if self.matrix is None:
            return 0.0
        u, _, v = np.linalg.svd(self.matrix[:, :-1])
        return _angle(u @ v)

    def __str__(self) -> str:
        names = {"centres": "centres aligned", "masses": "masses aligned", "search": "searched"}
        turned = f"turned by {self.turns:.1f} degrees, " if self.turns > 0.05 else ""
        return f"{names.get(self.taken, self.taken)}, {turned}{self.moves:.1f} mm"

    def of_image(self, grid: Geometry) -> tuple[Geometry, Tensor | None]:
        """(Geometry, displacement): what `io.resample` takes of a moving image on `grid` to lay it on the fixed one."""
        return (grid, self.displacement) if self.matrix is None else (grid.before(self.matrix), None)

    def after(self, affine: Tensor | None) -> Tensor | None:
        """The start of an affine map, (1, nd, nd + 1) in voxels or None: p -> start(affine p). None where the start is no matrix."""
        if self.matrix is None:
            return None
        s = self.voxels
        if affine is None:
            return s
        linear = s[..., :-1] @ affine[..., :-1].to(s)
        shift = s[..., :-1] @ affine[..., -1:].to(s) + s[..., -1:]
        return torch.cat([linear, shift], -1)

    def then(self, u: Tensor) -> Tensor:
        """All of the motion where u, (1, nd, *shape), was found after the start: p -> start(p + u(p)) - p."""
        if self.displacement is not None:
            return ops.compose(self.displacement.to(u), u)
        s, shape = self.voxels.to(u.device), u.shape[2:]
        linear = s[0, :, :-1].to(u)
        if not torch.equal(linear, torch.eye(len(linear)).to(u)):
            u = torch.einsum("ij,nj...->ni...", linear, u)
        return u + ops.affine_displacement(s, shape).to(u)

    def back(self, points: Tensor) -> Tensor:
        """What lies at `points` (K, nd), voxels of the fixed grid, before the start: where that is after it."""
        if self.displacement is None:
            s = self.voxels[0].to(points)
            return torch.linalg.solve(s[:, :-1], (points - s[:, -1]).T).T
        at = points.T.reshape(1, points.shape[1], -1, *[1] * (points.shape[1] - 1))
        return points + _inverse.Inverse(self.displacement.to(points))(at).reshape(points.shape[1], -1).T

    def laid(self, image: Tensor, padding: Literal["zeros", "border"] = "border") -> Tensor:
        """An image on the grid of the fixed one, moved."""
        u = None if self.displacement is None else self.displacement.to(image)
        affine = None if self.matrix is None else self.voxels.to(image)
        return ops.warp(image, u, affine=affine, padding=padding)

    def resampled(
        self, moving: Tensor, mask: Tensor | None, moving_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """For images on the fixed grid: moving and its weights laid on the fixed image, whose own end where moving does."""

        laid = self.laid
        inside = laid(torch.ones_like(moving[:, :1], dtype=torch.float32), "zeros") > 0.499
        if not inside.any():
            _check.fail("register", "start", "lead into the moving image", "one that leads nowhere into it")
        if not inside.all():
            mask = inside.float() if mask is None else mask * inside
        moving_mask = None if moving_mask is None else laid(moving_mask, "border")
        return laid(moving.float(), "border"), mask, moving_mask


def of(
    start: Any, images: tuple[Tensor, Tensor, Tensor | None, Tensor | None], spacing: tuple[float, ...]
) -> Start | None:
    """What `register` was given, for images (fixed, moving, their weights) on one grid; None: as they lie."""
    if start is None or (isinstance(start, str) and start == "none"):
        return None
    grid = Geometry.of(tuple(images[0].shape[2:]), spacing)
    if isinstance(start, str):
        _check.choice("register", "start", start, CHOICES)
        return find(start, grid, grid, *images)
    _check.floating("register", start=start)
    _check.same_device("register", "start", start, "fixed", images[0])
    start = start.detach()
    if not start.isfinite().all():
        _check.fail("register", "start", "be finite", "NaN or infinite values")
    if start.ndim == 3:
        _check.affine("register", "start", start, grid.nd, 1)
        matrix = start[0].double().cpu().numpy()
        if abs(np.linalg.det(matrix[:, :-1])) < 1e-9:
            _check.fail("register", "start", "be invertible", "a determinant of 0")
        return Start("given", grid, grid.map_to_physical(matrix))
    shape = (1, grid.nd, *grid.shape)
    if start.shape != shape:
        _check.fail(
            "register", "start", f"have shape {(1, grid.nd, grid.nd + 1)} or {shape}", tuple(start.shape)
        )
    return Start("given", grid, displacement=start.float())


def _shift(by: np.ndarray) -> np.ndarray:
    return np.concatenate([np.eye(len(by)), by[:, None]], 1)


def find(
    how: str,
    fixed_grid: Geometry,
    moving_grid: Geometry,
    fixed: Tensor,
    moving: Tensor,
    mask: Tensor | None = None,
    moving_mask: Tensor | None = None,
) -> Start | None:
    """The start that `how`, of CHOICES, asks for; None: as the images lie.

    Args: images (1, C, *its grid's shape), finite, and their weights, (1, 1, *shape), or None.
    """
    if how == "none":
        return None
    centres = _shift(moving_grid.centre - fixed_grid.centre)
    if how == "centres":
        return Start(how, fixed_grid, centres)
    voxels = _TURNED_VOXELS if how == "search" else _VOXELS
    views = _Views(fixed_grid, moving_grid, (fixed, mask), (moving, moving_mask), voxels)
    masses = _shift(views.moving.mass - views.fixed.mass)
    if how == "masses":
        return Start(how, fixed_grid, masses)
    starts = {"none": _shift(np.zeros(fixed_grid.nd)), "centres": centres, "masses": masses}
    compared = {name: views.compare(matrix) for name, matrix in starts.items()}
    scores = {name: score for name, (_, score) in compared.items()}
    if how == "search":
        found = _search(views, list(starts.values()))
        return Start(how, fixed_grid, found, scores={**scores, how: views.compare(found)[1]})
    taken = max(("centres", "masses"), key=lambda name: scores[name])
    clearly = max(_CLEARLY * scores["none"], scores["none"] + _AT_LEAST)
    if compared["none"][0] >= _LEAST_OVERLAP and scores[taken] <= clearly:
        return None
    return Start(taken, fixed_grid, starts[taken], scores=scores)


def plain(start: Start | None) -> dict[str, Any]:
    """For a report."""
    if start is None:
        return {"taken": "none", "mm": 0.0}
    matrix = None if start.matrix is None else start.matrix.tolist()
    found = {"taken": start.taken, "mm": start.moves, "degrees": start.turns, "matrix_lps_mm": matrix}
    return {**found, "scores": start.scores} if start.scores else found


# Looking at both images coarsely


@dataclass(frozen=True)
class _View:
    image: Tensor  # (1, 1, *grid.shape), in [0, 1]
    known: Tensor  # bool
    grid: Geometry

    @classmethod
    def of(cls, image: Tensor, mask: Tensor | None, grid: Geometry, step: float) -> "_View":
        """In voxels of about `step` mm, never finer than its own."""
        extents = [(n - 1) * s for n, s in zip(grid.shape, grid.spacing_zyx, strict=True)]
        shape = tuple(min(n, max(2, round(e / step) + 1)) for n, e in zip(grid.shape, extents, strict=True))
        spacing = [
            e / (n - 1) if n > 1 else s for e, n, s in zip(extents, shape, grid.spacing_zyx, strict=True)
        ]
        image = _descent.rescaled(image, mask).clamp(0, 1).mean(1, keepdim=True)
        coarse = _descent.resized(image, shape).cpu()
        known = torch.ones_like(coarse, dtype=torch.bool)
        if mask is not None:
            known = _descent.resized((mask > 0).float(), shape).cpu() > 0.5
        return cls(coarse, known, Geometry(shape[::-1], tuple(spacing[::-1]), grid.origin, grid.direction))

    @property
    def mass(self) -> np.ndarray:
        """The centre of what stands out of the background, mm; background: what the outermost voxels show in the median."""
        image = self.image[0, 0].numpy()
        rim = [image.take([0, -1], axis) for axis, n in enumerate(image.shape) if n > 2]
        weight = np.abs(image - np.median(np.concatenate([r.ravel() for r in rim] or [image.ravel()])))
        weight = np.where((weight > _BACKGROUND) & self.known[0, 0].numpy(), weight, 0)
        if not weight.any():
            return self.grid.centre
        index = [
            (np.indices(weight.shape)[axis] * weight).sum() / weight.sum() for axis in range(weight.ndim)
        ]
        return self.grid.to_physical(index)

    @property
    def volume(self) -> float:
        return abs(float(np.linalg.det(self.grid.matrix))) * self.image.numel()


class _Views:
    """Both images at one coarse voxel size."""

    def __init__(
        self,
        fixed_grid: Geometry,
        moving_grid: Geometry,
        fixed: tuple[Tensor, Tensor | None],
        moving: tuple[Tensor, Tensor | None],
        voxels: int,
    ) -> None:
        longest = max((n - 1) * s for n, s in zip(fixed_grid.size, fixed_grid.spacing, strict=True))
        step = max(longest, min(fixed_grid.spacing)) / voxels
        self.fixed = _View.of(*fixed, fixed_grid, step)
        self.moving = _View.of(*moving, moving_grid, step)

    def laid(self, matrix: np.ndarray) -> tuple[Tensor, Tensor]:
        """(the moving image on the fixed grid, where both count)."""
        grid = self.moving.grid.before(matrix)
        image, inside = io.resample(self.moving.image, grid, self.fixed.grid, outside=None)
        inside = inside & self.fixed.known
        if not self.moving.known.all():
            known = io.resample(self.moving.known.float(), grid, self.fixed.grid, outside=0.0)[0]
            inside = inside & (known > 0.5)
        return image, inside

    def compare(self, matrix: np.ndarray, texture: bool = True) -> tuple[float, float]:
        """(overlap, share of the smaller image; how well the images agree there, in [0, 1])."""
        moved, inside = self.laid(matrix)
        n = int(inside.sum())
        one = self.fixed.volume / self.fixed.image.numel()
        overlap = n * one / min(self.fixed.volume, self.moving.volume)
        if n < 2 * _BINS or overlap < _LEAST_OVERLAP:
            return overlap, 0.0
        known = _information(self.fixed.image[inside], moved[inside])
        if not texture:
            return overlap, known
        lcc = _descent.Similarity("lcc", self.fixed.image, inside.float(), _WINDOW)(moved)
        return overlap, math.sqrt(max(known, 0.0) * max(-float(lcc), 0.0))


def _information(a: Tensor, b: Tensor) -> float:
    """Of two samples in [0, 1]: their mutual information as the correlation of Gaussians that have it."""
    a, b = ((x * _BINS).long().clamp(0, _BINS - 1) for x in (a, b))
    joint = torch.bincount(a * _BINS + b, minlength=_BINS**2).double().view(_BINS, _BINS) / len(a)
    alone = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    there = joint > 0
    bits = float((joint[there] * (joint[there] / alone[there]).log()).sum())
    # what bins hold by chance (Miller and Madow)
    free = int(there.sum()) - int((joint.sum(1) > 0).sum()) - int((joint.sum(0) > 0).sum()) + 1
    return math.sqrt(-math.expm1(-2 * max(bits - free / (2 * len(a)), 0.0)))


# Rotations


def _angle(rotation: np.ndarray) -> float:
    cosine = rotation[0, 0] if len(rotation) == 2 else (np.trace(rotation) - 1) / 2
    return math.degrees(math.acos(min(max(float(cosine), -1.0), 1.0)))


def _rotations(nd: int) -> Iterator[np.ndarray]:
    """That leave no rotation further than some 26 degrees away (2D: 7.5), the identity first."""
    if nd == 2:
        for k in range(24):
            c, s = math.cos(math.pi * k / 12), math.sin(math.pi * k / 12)
            yield np.array([[c, -s], [s, c]])
        return
    turns = [np.eye(3)]
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 0, 2)):
        for signs in np.ndindex(2, 2, 2):
            turn = np.zeros((3, 3))
            turn[range(3), order] = 1 - 2 * np.array(signs)
            if np.linalg.det(turn) > 0 and not np.array_equal(turn, turns[0]):
                turns.append(turn)
    steps = np.radians(sorted((-30, 0, 30), key=abs))
    for turn in turns:
        for x in steps:
            for y in steps:
                for z in steps:
                    skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
                    yield turn @ torch.linalg.matrix_exp(skew).numpy()


def _search(views: _Views, starts: list[np.ndarray]) -> np.ndarray:
    """The best of all rotations about the masses and of `starts`, each refined as a rigid motion."""
    here, there = views.fixed.mass, views.moving.mass
    turned = []
    for turn in _rotations(views.fixed.grid.nd):
        matrix = np.concatenate([turn, (there - turn @ here)[:, None]], 1)
        overlap, known = views.compare(matrix, texture=False)
        turned.append((known * min(1.0, 4 * overlap), matrix))
    turned.sort(key=lambda one: -one[0])
    finalists: list[np.ndarray] = []
    for _, matrix in turned:
        if all(_angle(matrix[:, :-1].T @ other[:, :-1]) > _APART for other in finalists):
            finalists.append(matrix)
        if len(finalists) == _FINALISTS:
            break
    refined = [_refined(views, matrix) for matrix in (*starts, *finalists)]
    return max(refined, key=lambda matrix: views.compare(matrix)[1])


def _refined(views: _Views, matrix: np.ndarray) -> np.ndarray:
    """matrix after the rigid motion that fits best, as the coarse images show it."""
    moved, inside = views.laid(matrix)
    if not inside.any():
        return matrix
    grid = views.fixed.grid
    similarity = _descent.Similarity("lcc", views.fixed.image, inside.float(), _WINDOW)
    fit = _affine.AffineFit(grid.shape, grid.spacing_zyx, rigid=True)
    with torch.enable_grad():
        fit.descend([_affine.Side(moved, None, similarity)], grid.spacing_zyx, _ITERATIONS, 0.2, None)
    found = _descent.affine_in_voxels(fit.matrix(fit.motion), grid.spacing_zyx)[0].numpy()
    here = grid.map_to_physical(found)
    return np.concatenate([matrix[:, :-1] @ here[:, :-1], matrix[:, :-1] @ here[:, -1:] + matrix[:, -1:]], 1)
