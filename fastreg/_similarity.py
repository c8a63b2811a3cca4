"""Which similarity suits a pair of images, decided before anything is optimised: after an LCC descent every pair looks consistent.

Local correlation (LCC) is squared, and so suits one contrast and an inverted one alike. It fails where bright means bright in one
tissue and dark in another, as in T1 and T2: there it prefers wrong places to the right one. That shows in the signs of the correlations
in windows: those of bright windows, or of dark ones, differ from the others'.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _channels, _descent, ops

SimilarityName = Literal["auto", "lcc", "mind", "mi", "mse"]
SIMILARITIES = get_args(SimilarityName)

# docs/settings.md says what came of it.
LEAST = 0.1
_VOXELS = 1_000_000  # levels beyond this size add nothing
_WINDOW, _STRIDE = 9, 2
_FLAT = 0.03  # standard deviation, of the image's range, of a window that shows nothing
_CLEAR = 0.5  # correlation from which a sign counts
_GROUPS = 4  # of windows, from dark to bright
_FEWEST = 8  # windows with a sign that a group must have
_ENOUGH = 100  # that a level must have, or the next finer one decides


@dataclass(frozen=True)
class Choice:
    """consistency: at most 1; the least excess, over groups of windows of like brightness, of those that correlate with the prevailing
    sign over those with the other. NaN: too few windows have any. None: nothing was looked at."""

    taken: str
    consistency: float | None = None

    @property
    def unlike(self) -> bool:
        return self.consistency is not None and self.consistency < LEAST

    @property
    def why(self) -> str:
        if self.consistency is None:
            return "asked for"
        if math.isnan(self.consistency):
            return "too few windows of the two images correlate to tell"
        if self.unlike:
            return (
                f"bright and dark parts correlate with different signs (consistency {self.consistency:.2f})"
            )
        return f"bright and dark parts correlate with one sign (consistency {self.consistency:.2f})"


def choose(
    asked: str,
    fixed: Tensor,  # (1, C, *spatial), rescaled
    moving: Tensor,
    mask: Tensor | None,  # weights of the one, (1, 1, *spatial)
    moving_mask: Tensor | None,  # and of the other
    shapes: Sequence[tuple[int, ...]],  # of the levels, coarse to fine
    shares: Sequence[float] | None = None,  # of the channels; None: alike
) -> Choice:
    """What is asked for, and for "auto" LCC or MIND. Costs some box filters on images of at most a million voxels."""
    if asked in ("mind", "mi"):
        return Choice(asked)
    with torch.no_grad():
        consistency = _consistency(fixed, moving, mask, moving_mask, shapes, shares)
    taken = ("mind" if consistency < LEAST else "lcc") if asked == "auto" else asked
    return Choice(taken, consistency)


def window_of(nd: int, finest: bool = False) -> int:
    """Side of LCC's windows, voxels, where none is given; finest: of several levels. What is left to find there is small, and so are
    the windows that tell most of it; a square of few pixels says less than a cube of few voxels."""
    return 9 if nd == 2 else 3 if finest else 5


def fits(
    asked: str,
    window: int | None,
    fixed: Tensor,  # (1, C, *spatial)
    moving: Tensor,
    u: Tensor,  # (1, nd, *spatial)
    mask: Tensor | None,
    moving_mask: Tensor | None,
    shapes: Sequence[tuple[int, ...]],
    shares: Sequence[float] | None = None,  # of the channels; None: alike
) -> tuple[float, float]:
    """What a similarity makes of a pair before and after u, at the finest level of at most a million voxels; less is better."""
    shape = ([s for s in shapes if math.prod(s) <= _VOXELS] or shapes[:1])[-1]
    masks = [None if m is None else _descent.resized(m.float(), shape) for m in (mask, moving_mask)]
    a, b = (
        _descent.resized(_descent.rescaled(_descent.within(i, m), m), shape)
        for i, m in ((fixed, mask), (moving, moving_mask))
    )
    # as that level was compared
    window = window or window_of(len(shape), len(shapes) > 1 and shape == tuple(fixed.shape[2:]))
    compare = _channels.similarity(asked, a, masks[0], window, shares)

    def made(u: Tensor) -> float:
        weights = _descent.moved_weights(masks[1], u, None)
        return float(compare.compare(b, lambda few, u: _descent.warped(few, u, None), u, weights=weights))

    with torch.no_grad():
        u = ops.resize_displacement(u, shape)
        return made(torch.zeros_like(u)), made(u)


def _consistency(
    fixed: Tensor,
    moving: Tensor,
    mask: Tensor | None,
    moving_mask: Tensor | None,
    shapes: Sequence[tuple[int, ...]],
    shares: Sequence[float] | None,
) -> float:
    """Of all channels, in proportion to their shares and to the windows with a sign."""
    found = math.nan
    shares = shares or [1.0] * fixed.shape[1]
    shapes = [s for s in shapes if math.prod(s) <= _VOXELS] or shapes[:1]
    # The second finest: small motion is within its windows. At the finest one signs are lost over a few voxels.
    for shape in shapes[-2:]:
        masks = [_descent.resized(m, shape) for m in (mask, moving_mask) if m is not None]
        weights = math.prod(masks[1:], start=masks[0]) if masks else None
        channels = zip(fixed.split(1, 1), moving.split(1, 1), strict=True)
        measured = [
            _signs(_descent.resized(a, shape), _descent.resized(b, shape), weights) for a, b in channels
        ]
        clear = sum(n for _, n in measured)
        if clear:
            counts = [share * n for share, (_, n) in zip(shares, measured, strict=True)]
            found = sum(c * least for c, (least, _) in zip(counts, measured, strict=True)) / sum(counts)
        if clear >= _ENOUGH:
            break
    return found


def _signs(fixed: Tensor, moving: Tensor, weights: Tensor | None) -> tuple[float, int]:
    """(consistency, windows with a sign) of one channel; where too few windows have one (0, 0)."""
    images = [fixed - 0.5, moving - 0.5]  # about the middle of the range, for fp32's sake
    products = [*images, images[0].square(), images[1].square(), images[0] * images[1]]
    if weights is not None:
        weight = _windows(weights)
        products = [_windows(p * weights) / weight.clamp(min=1e-6) for p in products]
        seen = weight > 0.25
    else:
        products = [_windows(p) for p in products]
        seen = torch.ones_like(products[0], dtype=torch.bool)
    a, b, aa, bb, ab = products
    v, w = (aa - a * a).clamp(min=0), (bb - b * b).clamp(min=0)
    shown = seen & (v > _FLAT**2) & (w > _FLAT**2)
    r = ((ab - a * b) / (v * w).sqrt())[shown]
    signs = r.sign() * (r.abs() > _CLEAR)
    prevailing = 1.0 if signs.sum() >= 0 else -1.0
    excess = []
    for brightness in (a[shown], b[shown]):
        groups = [signs[group] for group in brightness.argsort().chunk(_GROUPS)]
        excess += [prevailing * float(s.sum() / n) for s in groups if (n := s.count_nonzero()) >= _FEWEST]
    if not excess:
        return 0.0, 0
    return min(excess), int(signs.count_nonzero())


def _windows(image: Tensor) -> Tensor:
    """Means over windows, every second one along each axis."""
    pool = F.avg_pool3d if image.ndim == 5 else F.avg_pool2d
    nd = image.ndim - 2
    for axis, n in enumerate(image.shape[2:]):
        one = [1] * nd
        size, stride = [*one], [*one]
        size[axis], stride[axis] = min(_WINDOW, n), _STRIDE
        image = pool(image, size, stride)
    return image
