"""Label maps as something to register by: the soft Dice of each label that both images have, on the grid of the displacement."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _channels, _check, _descent, _terms
from . import ops as _fused

_EPS = 1e-6  # of a share of the grid, below which a label is not there


class Labels:
    """A term, as _terms.py says: 1 - soft Dice, in the mean over labels. A small label counts as much as a large one.

    fixed, moving: (1, L, *grid) how much of each voxel a label takes, on a grid that is twice as coarse as the image's: a boundary
    lies between its voxels as exactly as shares tell, and 30 labels cost what 4 images do. full, spacing: of the image, mm.
    """

    def __init__(
        self, fixed: Tensor, moving: Tensor, full: Sequence[int], spacing: Sequence[float], weight: float
    ):
        self.fixed, self.moving, self.full, self.spacing, self.weight = fixed, moving, full, spacing, weight
        self.size = _descent.spacing_of(fixed.shape[2:], full, spacing)

    def _like(self, fixed: Tensor, moving: Tensor) -> "Labels":
        return Labels(fixed, moving, self.full, self.spacing, self.weight)

    @property
    def back(self) -> "Labels":
        """Of the images exchanged."""
        return self._like(self.moving, self.fixed)

    def at(self, shape: tuple[int, ...]) -> "Labels":
        """For a level of `shape` voxels."""
        grid = _descent.grid_shape(shape, _descent.spacing_of(shape, self.full, self.spacing))
        return self._like(*(_descent.resized(maps, grid) for maps in (self.fixed, self.moving)))

    def laid(self, half: Tensor, back: Tensor) -> "Labels":
        """Of both images laid half of the way, (nd, nd + 1) in mm: moving by half, fixed by back."""

        def one(maps: Tensor, matrix: Tensor) -> Tensor:
            voxels = _descent.affine_in_voxels(matrix, self.size).to(maps)
            return _fused.warp(maps, None, affine=voxels, padding="border")

        return self._like(one(self.fixed, back), one(self.moving, half))

    def __call__(self, u: Tensor | None, spacing: Sequence[float], matrix: Tensor | None = None) -> Tensor:
        affine = None if matrix is None else _descent.affine_in_voxels(matrix, self.size).to(self.moving)
        if u is not None:  # then the affine part is not what is sought
            u = _fused.resize_displacement(u, tuple(self.fixed.shape[2:]))
        by = affine if u is None else u
        assert by is not None

        def part(first: int) -> Callable[[Tensor], Tensor]:
            few = slice(first, first + _descent.HELD)

            def apart(by: Tensor) -> Tensor:
                how = (None, by) if u is None else (by, affine)
                fixed, moved = self.fixed[:, few], _descent.warped(self.moving[:, few], *how)
                axes = tuple(range(2, fixed.ndim))
                both = (fixed * moved).mean(axes)
                each = fixed.square().mean(axes) + moved.square().mean(axes)
                return (1 - 2 * both / (each + _EPS)).sum()

            return apart

        n = self.fixed.shape[1]
        total = _channels.in_turn(by, [part(first) for first in range(0, n, _descent.HELD)])
        return self.weight * total / n


def labels_of(
    labels: Any, weight: Any, like: Tensor, spacing: Sequence[float], laid: Callable[[Tensor], Tensor] | None
) -> tuple[Labels, ...]:
    """What `register` was given, checked. like: the fixed image; laid: of a start, or None."""
    op = "register"
    (weight,) = _check.per_axis(op, "label_weight", weight, 1)
    if labels is None:
        if weight != 1:
            _check.fail(op, "labels", "be given with label_weight", None)
        return ()
    pair = _terms.pair_of("labels", labels, "fixed and moving label maps")
    shape = (1, 1, *like.shape[2:])
    for name, given in zip(("the fixed labels", "the moving labels"), pair, strict=True):
        _check.tensor(op, name, given)
        if given.is_floating_point() or given.is_complex():
            _check.fail(op, name, "be integer or bool", given.dtype, TypeError)
        if given.shape != shape:
            _check.fail(op, name, f"have shape {shape}", tuple(given.shape))
        _check.same_device(op, name, given, "fixed", like)
    fixed, moving = (given.detach().long() for given in pair)
    mine, others = (set(given.unique().tolist()) - {0} for given in (fixed, moving))
    shared = sorted(mine & others)
    if not shared:
        got = f"{len(mine)} and {len(others)} others"
        _check.fail(op, "labels", "have one in both images that is not 0", got)
    full = tuple(like.shape[2:])
    grid = _descent.grid_shape(full, spacing)

    def maps(image: Tensor, lay: Callable[[Tensor], Tensor] | None) -> Tensor:
        parts = []
        for label in shared:
            one = (image == label).float()
            parts.append(_descent.resized(one if lay is None else lay(one), grid))
        return torch.cat(parts, 1)

    return (Labels(maps(fixed, None), maps(moving, laid), full, spacing, weight),) if weight > 0 else ()
