"""What `fastreg.register` learns of a pair while it registers it: the weight of the regularisation, and how far intensities say the same.

Both are read off the field that a level starts from, and so cost next to nothing.

Weight. Regularisation is the prior of a Gaussian motion: its weight is the variance of the noise over that of the strain. The coarse
levels, at the least weight, show both: the insides of one person who breathes are strained by a tenth of what lies between two persons;
and where next to nothing is left unexplained nothing is to be smoothed away, however small the motion. Counted where the image shows
structure, since around it the field is only filled in.

Intensities. Local correlation takes a faint edge for as much as a strong one, and sees only what is within its window. Where the
aligned images have the same intensities, their difference knows more. It knows nothing where they do not, so its share of the
similarity grows with the share of fixed's variance that the moved image explains. Beside walls that slide far it costs accuracy: a strong
edge outweighs the faint ones that tell where its neighbour went. So it has none after a discrete start.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import _descent

PresetName = Literal["default", "fast"]
# Over the defaults of `register`; what is given explicitly stands.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"iterations": (50, 50, 20, 0), "search_range": 0.0},
}

# The weight is the first over the strain (mean of squares), at most the second times noise over strain, and between the last two.
_STRAIN, _NOISE = 0.02, 0.4
LEAST, _FLOOR, _MOST = 1.5, 1.0, 8.0  # of levels before it is known; between these after
OTHER = 2.0  # where neither is known: of other similarities
_ADDED = 3.0  # with LCC of what is added to a discrete start, which bears the strain
# Of the default width of the Gaussian on updates, at a weight of 1 and less; it grows with the root of the weight, as the length does
# over which the penalty smooths. Not where a pyramid is too short to find a weight: with a
# weight of 1 and this width seven hippocampi gained .006 Dice and seven others lost as much.
_NARROW = 0.7
# From which explained variance the intensities count, from which fully, and that share then.
_SOME, _SAME, _SHARE = 0.85, 0.95, 0.33


def _along(image: Tensor, axis: int) -> Tensor:
    """Forward differences along a spatial axis, over the voxels that have a next one along all axes; an axis of one has none."""
    nd = image.ndim - 2
    for a in range(nd):
        if a != axis and image.shape[a + 2] > 1:
            image = image.narrow(a + 2, 0, image.shape[a + 2] - 1)
    return image.diff(dim=axis + 2)


def strain(field: Tensor, spacing: Sequence[float], image: Tensor) -> float:
    """Mean squared strain of a field (1, nd, *grid) in voxels of `spacing` mm, weighted by the gradients of an image (1, C, *any)."""
    grid = field.shape[2:]
    axes = [a for a, n in enumerate(grid) if n > 1]
    if not axes:
        return 0.0
    size = field.new_tensor(spacing).view(1, -1, *[1] * len(grid))
    image = _descent.resized(image, tuple(grid))

    def slopes(x: Tensor) -> Tensor:
        """The sum of their squares, over channels and axes."""
        return torch.stack([(_along(x, a) / spacing[a]).square().sum(1) for a in axes]).sum(0)

    squares, edges = slopes(field * size), slopes(image).sqrt()
    edges = edges + 1e-6 * edges.max() + torch.finfo(edges.dtype).tiny
    return float((squares * edges).sum() / edges.sum()) / len(grid) ** 2


def _parts(similarity: Any) -> list[tuple[float, int, int, _descent.Similarity]]:
    """Share, first channel, last channel + 1 and similarity of each run of channels."""
    return getattr(similarity, "runs", None) or [(1.0, 0, similarity.fixed.shape[1], similarity)]


def _moved(
    level: _descent.Level, field: Tensor
) -> Iterator[tuple[float, _descent.Similarity, Tensor, Tensor | None]]:
    """Share of each channel, similarity, moved image and its weights, of each run of channels."""
    u = level.motion(field)
    weights = _descent.moved_weights(level.weights, u, level.affine)
    for share, begin, end, one in _parts(level.similarity):
        moved = _descent.warped(level.moving[:, begin:end], u, level.affine)
        yield share / (end - begin), one, moved, weights


def explained(level: _descent.Level, field: Tensor) -> float:
    """The share of fixed's variance that the moved image explains; at most 1, and below 0 where it explains nothing."""
    left = variance = 0.0
    with torch.no_grad():
        for share, one, moved, weights in _moved(level, field):
            fixed, mask = one.fixed, one.masked(weights)
            count = torch.ones_like(fixed[:, :1]) if mask is None else mask
            axes = tuple(range(2, fixed.ndim))
            mean = (fixed * count).sum(axes, keepdim=True) / count.sum().clamp(min=1e-12)
            left += share * float(((fixed - moved).square() * count).sum())
            variance += share * float(((fixed - mean).square() * count).sum())
    return 1 - left / variance if variance > 0 else 0.0


def noise(level: _descent.Level, field: Tensor) -> float:
    """The share of fixed's variance in windows that the moved image does not explain, over the windows that have any; of LCC."""
    found = most = 0.0
    with torch.no_grad():
        for share, one, moved, weights in _moved(level, field):
            share *= moved.shape[1]
            found -= share * float(one(moved, weights=weights))
            most -= share * float(one(one.fixed, weights=weights))
    return 1 - found / most if most > 0 else 0.0


class Adaptive:
    """Of one registration: called with each level before it descends, coarse to fine."""

    def __init__(
        self,
        regularization: float | None,
        plan: Sequence[int],
        similarity: str,
        intensities: bool,
        width: bool,
    ) -> None:
        """regularization: given, or None: to be found. plan: iterations of the levels. similarity: of the levels. intensities: whether they
        may join LCC. width: whether that of the Gaussian on updates follows the weight."""
        self.lcc = similarity == "lcc"
        self.intensities = intensities and self.lcc
        self.width = width and len(plan) > 2
        self.given = regularization is not None
        self.weight = (LEAST if self.lcc else OTHER) if regularization is None else regularization
        # of the two finest levels, by what at least two before found: the coarsest alone sees too little of the strain
        self.known = [
            not self.given and self.lcc and n >= len(plan) - 2 and sum(k > 0 for k in plan[:n]) >= 2
            for n in range(len(plan))
        ]
        self.strain: float | None = None
        self.noise: float | None = None

    def __call__(self, level: _descent.Level, number: int) -> dict[str, Any]:
        """Sets what the level is to minimise; returns what a record says of it."""
        field = level.transform.base
        # (level, where it starts) of each direction that is compared
        sides = [(level, field)] if level.back is None else [(level, field), (level.back, -field)]
        if level.exempt is not None and not self.given:
            self.weight = _ADDED if self.lcc else OTHER
        elif self.known[number] and self.strain is None:
            images = [one.fixed for side, _ in sides for *_, one in _parts(side.similarity)]
            self.strain = strain(field, level.transform.spacing, torch.cat(images, 1))
            self.noise = max(sum(noise(*side) for side in sides) / len(sides), 0.0)
            found = min(_STRAIN, _NOISE * self.noise) / max(self.strain, 1e-12)
            self.weight = min(max(found, _FLOOR), _MOST)
        level.regularization = self.weight
        if self.width and isinstance(level.transform, _descent.Dense):
            narrow = min(_NARROW * max(self.weight, 1.0) ** 0.5, 1.0)
            level.transform.sigma = tuple(narrow * s for s in level.transform.sigma)
        share = 0.0
        if self.intensities and level.exempt is None:
            known = sum(explained(*side) for side in sides) / len(sides)
            share = _SHARE * min(max((known - _SOME) / (_SAME - _SOME), 0.0), 1.0)
            for side, _ in sides:
                for *_, one in _parts(side.similarity):
                    one.intensities = share
        return {
            "regularization": self.weight,
            "strain": self.strain,
            "noise": self.noise,
            "intensities": share,
        }
