"""A discrete start for `register`: what the descent cannot reach, an organ that slides 20 to 40 mm along a wall.

There the objective itself prefers the wrong field from the coarsest level on: the similarity is equal, and the strain at the wall decides.
So displacements are searched, not descended to, and what was found is exempt from the penalty. Two candidates are made and joined:

descent   the coarse levels, up to the third finest, which cost next to nothing
search    MIND of both images on a grid of isotropic units; cells of 16, 12, 10 and 8 mm (of 2 mm units), each over all offsets of a cube,
          `cost_volume`; the best together along a minimum spanning tree of the cells, `_tree.min_marginals`, which ties neighbours of
          like intensity and so lets a wall go; in both directions, each made the inverse of the other. From the second level on the
          moving *image* is warped, and its MIND taken anew.
joined    each place takes the search's unless the descent's is clearly more like the fixed image there (MIND again). The search is the
          better judge of large motion, the descent of what is finely structured; each alone lost where the other is good.

The finest level then begins at the joined field, penalises the difference to it alone, and does not warp in advance: with two
interpolations small motion lost. The levels between are left out; they gained nothing and would pull the field back.

Not used: of images too small for such motion, whose structures are smaller than the cells (hippocampi, a cord: Dice lost up to .09), and of
voxels so coarse that the cells are (a thorax of 5 mm: 1.7 mm instead of 1.35 in the lungs, though the chest wall gains);
for a velocity, which cannot tear and is to stay invertible; before a matrix alone.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check, _descent, _tree, ops

RANGE = 40.0  # mm
_SMALLEST = 100.0  # mm of the image's longest side, below which nothing slides that far
_COARSEST = 4.3  # mm of the finest spacing, beyond which cells would be 26 mm and more
_UNIT, _FINEST = 2.0, 1.5  # mm at least; of the finest spacing
# (units a feature, features a cell, radius in features, every k-th voxel of a cell); before these a level of (2, 4, r, 2).
_LEVELS = ((2, 3, 3, 1), (1, 5, 3, 2), (1, 4, 2, 2))
_FIRST, _LARGEST = (
    0.6,
    10,
)  # of the range: how far the first level looks; its radius, beyond which features grow instead
_ALPHA = 0.005  # of squared differences of neighbours' displacements, features; .002 to .02 are as good
_SMOOTH, _ROUNDS = 0.5, 5  # cells; of making both directions inverse
_JOIN = 2.0  # units: over which places are compared; 4 took the search's field into lungs, a wall away
_CLEARLY = 0.9  # the share of the search's dissimilarity below which the descent's is taken
ASKED = "asked for"
_AS_GOOD = "the descent's field is as good everywhere"
# It has found what the descent could not where it moves so many mm otherwise, in so much of the image, and makes it so much more alike
# there. Less the descent refines better, from the level before the finest (brains and a lung CT: 0.2 % of the image; sliding: 1.5 to 50 %).
# The first of the search's levels knows it already: there brains and lungs have 0.2 to 0.6 % that far, what slides 9 % and more.
_FAR, _LEAST_SHARE, _LEAST_GAIN = 8.0, 0.01, 0.08

_POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}
_LINEAR = {2: "bilinear", 3: "trilinear"}


@dataclass
class Start:
    """field: (1, nd, *units), voxels of that grid, or None where it is not used; record: what was done, for the report."""

    field: Tensor | None
    record: dict[str, Any]


def range_of(
    search_range: Any,
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    transform: str,
    symmetric: bool,
    iterations: Sequence[int],
) -> tuple[float, str]:
    """(mm to search, why), of the arguments of `register`; 0: nothing is searched."""
    longest = max((n - 1) * s for n, s in zip(shape, spacing, strict=True))
    without = None if transform in ("dense", "bspline") else f"transform {transform!r}"
    without = "symmetric" if symmetric else without if any(iterations) else "no iterations"
    if search_range is None:
        if without is not None:
            return 0.0, without
        if longest < _SMALLEST:
            return 0.0, f"the longest side of the image, {longest:.3g} mm, is under {_SMALLEST:g} mm"
        finest = min(s for n, s in zip(shape, spacing, strict=True) if n > 1)
        if finest > _COARSEST:
            return 0.0, f"voxels of {finest:.3g} mm are over {_COARSEST:g} mm"
        return RANGE, "automatic"
    (search_range,) = _check.per_axis("register", "search_range", search_range, 1)
    if search_range > longest:
        wanted = f"be at most the longest side of the image, {longest:g} mm"
        _check.fail("register", "search_range", wanted, f"{search_range:g}")
    if search_range > 0 and without is not None:
        _check.fail("register", "search_range", f"be 0 or left out with {without}", f"{search_range:g}")
    return search_range, ASKED if search_range > 0 else "search_range is 0"


def _pooled(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return _POOL[x.dim() - 2](x, size, ceil_mode=True, count_include_pad=False) if max(size) > 1 else x


def _steps(shape: tuple[int, ...], unit: int, cell: int, radius: int) -> tuple[tuple[int, ...], ...]:
    """(units a feature, features a cell, radius) of each axis: a short one is not searched further than a quarter of it."""
    units = tuple(min(unit, n) for n in shape)
    cells = tuple(max(1, min(cell, n // u)) for n, u in zip(shape, units, strict=True))
    return units, cells, tuple(min(radius, n // (4 * u)) for n, u in zip(shape, units, strict=True))


class _Side:
    """One image, where the field that moves the other onto it is sought; all on the grid of units.

    image (1, C, *shape), mask (1, 1, *shape) or None, u (1, nd, *shape): the field so far.
    """

    def __init__(self, image: Tensor, mask: Tensor | None) -> None:
        self.image, self.mask = image, mask
        self.features = _features(image)
        self.u = image.new_zeros(1, image.dim() - 2, *image.shape[2:])
        self.cost = math.nan  # of the displacements that the last level took

    def search(
        self,
        other: "_Side",
        units: tuple[int, ...],
        cell: tuple[int, ...],
        radius: tuple[int, ...],
        stride: int,
    ) -> Tensor:
        """The best displacement of each cell, all of the motion, (1, nd, *cells) in cells."""
        moved = other.moved_by(self.u) if self.u.any() else (other.features, other.mask)
        fixed, moving = (_pooled(x, units) for x in (self.features, moved[0]))
        mask = None if self.mask is None else _pooled(self.mask, units)
        cost = ops.cost_volume(fixed, moving, cell, radius, stride=stride, mask=mask)
        if moved[1] is not None:
            # what is not known of the moving image costs as much as the cell does on average
            unknown = (1 - _pooled(moved[1], units)).clamp(min=0).sqrt()
            share = ops.cost_volume(
                torch.zeros_like(unknown), unknown, cell, radius, stride=stride, mask=mask
            )
            cost = torch.lerp(cost, cost.mean(-1, keepdim=True), share.clamp(max=1))
        whole = tuple(u * c for u, c in zip(units, cell, strict=True))
        size = self.u.new_tensor(units).view(1, -1, *[1] * len(units))
        before = _pooled(self.u, whole) / size
        order, parent = _tree.spanning_tree(_pooled(self.image.mean(1, keepdim=True), whole)[0, 0])
        before_cells = before[0].flatten(1).T
        cost = cost[0].flatten(0, -2)
        best = _tree.min_marginals(cost, before_cells, order, parent, radius, _ALPHA).argmin(1)
        self.cost = float(cost.gather(1, best[:, None]).mean())
        offsets = torch.cartesian_prod(*(torch.arange(-r, r + 1, device=best.device) for r in radius))
        increment = offsets.to(self.u)[best].T.reshape(before.shape)
        return (before + increment) / self.u.new_tensor(cell).view_as(size)

    def moved_by(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """(features of the image after u, its mask there)."""
        moved = ops.warp(self.image, u, padding="border")
        return _features(moved), _descent.moved_weights(self.mask, u, None)


def _features(image: Tensor) -> Tensor:
    return ops.mind(image, radius=1, dilation=2)


def _spread(field: Tensor, whole: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """A field of cells, in cells, on the grid of units, in units."""
    nd = len(shape)
    scaled = field * field.new_tensor(whole).view(1, -1, *[1] * nd)
    large = F.interpolate(scaled, scale_factor=whole, mode=_LINEAR[nd], align_corners=False)
    for axis, n in enumerate(shape):
        large = large.narrow(2 + axis, 0, n)
    return large


def _searched(
    sides: tuple[_Side, _Side],
    reach: float,
    far: Callable[[Tensor], Tensor] | None,
    report: Callable[[int, int, float], object] | None,
) -> bool:
    """Leaves in both sides the fields that were found; false where the first level says that they will not be used.

    reach: units, of all levels together at least. far: says of each place whether a field is far from the descent's; None: all are used.
    """
    shape = tuple(sides[0].image.shape[2:])
    coarse = max(2, math.ceil(_FIRST * reach / _LARGEST))
    levels = (coarse, 4, max(1, math.ceil(_FIRST * reach / coarse)), 2), *_LEVELS
    for number, (unit, cell, most, stride) in enumerate(levels):
        units, cells, radius = _steps(shape, unit, cell, most)
        a, b = sides
        fields = [one.search(two, units, cells, radius, stride) for one, two in ((a, b), (b, a))]
        fields = [ops.smooth(v, _SMOOTH) for v in fields]
        for _ in range(_ROUNDS):
            v, w = fields
            fields = [(v - ops.warp(w, v, padding="border")) / 2, (w - ops.warp(v, w, padding="border")) / 2]
        whole = tuple(u * c for u, c in zip(units, cells, strict=True))
        for side, field in zip(sides, fields, strict=True):
            side.u = _spread(field, whole, shape)
        if report is not None:
            report(number, len(levels), a.cost)
        if number == 0 and far is not None and float(far(a.u).float().mean()) < _LEAST_SHARE:
            return False
    return True


def start(
    images: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    spacing: tuple[float, ...],
    descended: Tensor,
    matrix: Tensor | None,
    search: tuple[float, str],
    shares: Sequence[float] | None = None,
    progress: Callable[[int, int, float], object] | None = None,
) -> Start:
    """Where the finest level begins.

    Args: images: rescaled fixed and moving, their weights or None, at full size. descended: field, (1, nd, *any), that the coarse
    levels of the descent found, after the affine part `matrix`, (nd, nd + 1) in mm, or None. search: of `range_of`. shares: of _channels.
    """
    began = time.perf_counter()
    reach, why = search
    full = tuple(images[0].shape[2:])
    unit = max(_UNIT, _FINEST * min(s for s, n in zip(spacing, full, strict=True) if n > 1))
    shape = tuple(round((n - 1) * s / unit) + 1 for n, s in zip(full, spacing, strict=True))
    fixed, moving = (_descent.resized(x, shape) for x in images[:2])
    if shares is not None:  # MIND adds squares of the channels
        weight = fixed.new_tensor(shares).mul(len(shares)).sqrt().view(1, -1, *[1] * len(shape))
        fixed, moving = weight * fixed, weight * moving
    mask, moving_mask = (None if x is None else _descent.resized(x, shape) for x in images[2:])
    linear = back = None
    if matrix is not None:
        affine = _descent.affine_in_voxels(matrix, _descent.spacing_of(shape, full, spacing)).to(moving)
        moving_mask = _descent.moved_weights(moving_mask, None, affine)
        moving, linear = ops.warp(moving, None, affine=affine, padding="border"), affine[0, :, :-1]
        back = torch.linalg.inv(linear)
    sides = _Side(fixed, mask), _Side(moving, moving_mask)
    descended = _turned(ops.resize_displacement(descended, shape), back)

    def moved(u: Tensor) -> Tensor:
        return (u - descended).norm(dim=1, keepdim=True) * unit

    asked, takes = why == ASKED, None
    record: dict[str, Any] = {"used": False, "why": _AS_GOOD, "range_mm": reach, "unit_mm": unit}
    if _searched(sides, reach / unit, None if asked else lambda u: moved(u) > _FAR, progress):
        searched = sides[0].u
        takes, found, before = _joined(sides, searched, descended)
        far = (moved(searched) > _FAR) & (takes > 0.5)
        gain = 1 - float((found * far).sum()) / max(float((before * far).sum()), 1e-12)
        far_share = float(far.float().mean())
        if asked or (far_share >= _LEAST_SHARE and gain >= _LEAST_GAIN):
            record.update(used=True, why=why)
        record |= {"share": float(takes.mean()), "far_share": far_share, "far_gain": gain}
        record["moved_mm"] = float((takes * moved(searched)).mean())
    record["seconds"] = time.perf_counter() - began
    if takes is None or not record["used"]:
        return Start(None, record)
    return Start(_turned(torch.lerp(descended, searched, takes), linear), record)


def _turned(u: Tensor, linear: Tensor | None) -> Tensor:
    return u if linear is None else torch.einsum("ij,nj...->ni...", linear, u)


def _joined(sides: tuple[_Side, _Side], searched: Tensor, descended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The share of `searched` in the joined field, (1, 1, *shape), in [0, 1]; how unlike the images are after it, and after `descended`."""
    fixed, moving = sides

    def unlike(u: Tensor) -> Tensor:
        features, known = moving.moved_by(u)
        distance = (fixed.features - features).square_().mean(1, keepdim=True)
        weights = [w for w in (fixed.mask, known) if w is not None]
        if not weights:
            return ops.smooth(distance, _JOIN)
        weight = math.prod(weights, start=torch.ones_like(distance))
        return ops.smooth(distance * weight, _JOIN) / ops.smooth(weight, _JOIN).clamp(min=1e-6)

    found, before = unlike(searched), unlike(descended)
    return ops.smooth((_CLEARLY * found <= before).float(), _JOIN / 2), found, before
