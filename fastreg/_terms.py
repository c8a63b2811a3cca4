"""What `fastreg.register` minimises beside the similarity and the regularisation: landmarks here, label maps in _labels.py.

A term is called with the motion that the affine part is not in, u (1, nd, *any grid) in voxels of its own grid or None, with that
grid's spacing, and with the affine part, (nd, nd + 1) in mm, or None; fixed points p go to A p + u(p). It returns a scalar in
units of a similarity, of which 1 is about all that can be gained; so it scales with neither the voxels nor the size of the image.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check

# Of the image's longest side: landmarks that far apart, in the mean of squares, cost as much as all of a similarity.
_FAR = 0.1
# A pair further apart than 3 times the median, and than this share of the longest side, is let go of: its pull falls as 1 / distance.
_OUTLIER = 3.0
_NEVER = 0.05


class Landmarks:
    """Mean over pairs of their squared distance, as Cauchy's log(1 + d^2), which a wrong pair can not bend far."""

    def __init__(
        self, fixed: Tensor, moving: Tensor, full: Sequence[int], spacing: Sequence[float], weight: float
    ):
        """fixed, moving: (K, nd) voxels of the full grid; full, spacing: its shape, mm."""
        self.full, self.spacing, self.size = full, spacing, fixed.new_tensor(spacing)
        last = fixed.new_tensor([max(n - 1, 1) for n in full])
        self.fixed, self.moving = fixed * self.size, moving * self.size  # mm
        # as grid_sample takes them, (x, y, z) in [-1, 1], whatever the grid that is sampled
        self.places = (2 * fixed / last - 1).flip(-1).view(1, -1, *[1] * (len(full) - 1), len(full))
        self.longest = max(s * max(n - 1, 1) for s, n in zip(spacing, full, strict=True))
        self.weight = weight

    @property
    def back(self) -> "Landmarks":
        """Of the images exchanged."""
        return Landmarks(
            self.moving / self.size, self.fixed / self.size, self.full, self.spacing, self.weight
        )

    def at(self, shape: tuple[int, ...]) -> "Landmarks":
        """For a level of `shape` voxels: points have no grid."""
        return self

    def laid(self, half: Tensor, back: Tensor) -> "Landmarks":
        """Of both images laid half of the way: what is in fixed goes to half, what is in moving back, (nd, nd + 1) in mm."""
        fixed, moving = (
            (p @ m[:, :-1].T.to(p) + m[:, -1].to(p)) / self.size
            for p, m in ((self.fixed, half), (self.moving, back))
        )
        return Landmarks(fixed, moving, self.full, self.spacing, self.weight)

    def apart(self, u: Tensor | None, spacing: Sequence[float], matrix: Tensor | None) -> Tensor:
        """(K, nd), mm: where the fixed points go, from the moving ones."""
        to = self.fixed
        if matrix is not None:
            matrix = matrix.to(to)
            to = to @ matrix[:, :-1].T + matrix[:, -1]
        if u is not None:
            here = F.grid_sample(u, self.places, align_corners=True, padding_mode="border")
            to = to + here.reshape(u.shape[1], -1).T * to.new_tensor(spacing)
        return to - self.moving

    def __call__(self, u: Tensor | None, spacing: Sequence[float], matrix: Tensor | None = None) -> Tensor:
        squared = self.apart(u, spacing, matrix).square().sum(1)
        with torch.no_grad():
            limit = squared.median().mul(_OUTLIER**2).clamp(min=(_NEVER * self.longest) ** 2)
        return self.weight * (limit * torch.log1p(squared / limit)).mean() / (_FAR * self.longest) ** 2


def pair_of(name: str, given: Any, what: str) -> tuple[Any, Any]:
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        got = f"{len(given)} of them" if isinstance(given, (tuple, list)) else type(given).__name__
        _check.fail("register", name, f"be a pair, {what}", got, TypeError)
    return given[0], given[1]


def landmarks_of(
    points: Any, weight: Any, like: Tensor, spacing: Sequence[float], back: Any = None
) -> tuple[Landmarks, ...]:
    """What `register` was given, checked. like: the fixed image; back: of a start, moving points to where it finds them, or None."""
    op = "register"
    (weight,) = _check.per_axis(op, "landmark_weight", weight, 1)
    if points is None:
        if weight != 1:
            _check.fail(op, "landmarks", "be given with landmark_weight", None)
        return ()
    full = tuple(like.shape[2:])
    points = pair_of("landmarks", points, "fixed and moving points")
    both = []
    for name, given in zip(("the fixed landmarks", "the moving landmarks"), points, strict=True):
        _check.tensor(op, name, given)
        p = given.detach()
        if p.is_complex() or p.layout != torch.strided:
            _check.fail(
                op, name, "be dense and real", p.layout if p.layout != torch.strided else p.dtype, TypeError
            )
        if p.ndim != 2 or p.shape[1] != len(full) or len(p) == 0:
            _check.fail(op, name, f"have shape (K, {len(full)}), K at least 1", tuple(p.shape))
        _check.same_device(op, name, p, "fixed", like)
        if not p.isfinite().all():
            _check.fail(op, name, "be finite", "NaN or infinite values")
        both.append(p.double())
    fixed, moving = both
    if len(fixed) != len(moving):
        _check.fail(op, "landmarks", "be as many in moving as in fixed", f"{len(fixed)} and {len(moving)}")
    last = fixed.new_tensor(full) - 1
    # a moving image may go on beyond the grid; one of the grid's own size away it is other numbers that were given
    for name, p, beyond in (("fixed", fixed, fixed.new_tensor(0.5)), ("moving", moving, last + 1)):
        outside = int(((p < -beyond) | (p > last + beyond)).any(1).sum())
        if outside:
            what = f"lie in the image of {full} voxels"
            _check.fail(op, f"the {name} landmarks", what, f"{outside} of {len(p)} outside")
    if back is not None:
        moving = back(moving)
    return (Landmarks(fixed.float(), moving.float(), full, spacing, weight),) if weight > 0 else ()
