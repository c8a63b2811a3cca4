"""Resampling of a displacement to another grid."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops import _linear


def resize_displacement(
    u: Tensor,  # (N, nd, *spatial)
    size: Sequence[int],
    *,
    align_corners: bool = True,
    scale: Literal["exact"] | float | Sequence[float] = "exact",
) -> Tensor:  # (N, nd, *size)
    """Resamples a displacement to another grid, linearly, and rescales it to that grid's voxels.

    Component i is multiplied by the factor of its axis, ``(o_i - 1) / (i_i - 1)`` with align_corners and ``o_i / i_i``
    without, so that it stays in voxels of its own grid. No anti-aliasing.
    Linear: the backward is the transposed matrix of each axis, and the backward of that is the forward again.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), fp64 / fp32 / fp16 / bf16.
        size (sequence of int): the new spatial shape.
        align_corners (bool): corner voxels keep their centres (True) or their outer faces (False).
        scale (str, number or sequence): "exact": component i times (o_i - 1) / (i_i - 1) with align_corners,
            o_i / i_i without; or a factor, or one per axis. An axis of one voxel has no extent under
            align_corners: exact factor 1.

    Returns:
        Tensor: (N, nd, *size), dtype of u. Differentiable (any number of times) in u.

    Raises:
        TypeError: u is not floating, size or scale are not numbers.
        ValueError: shapes or values do not fit.

    Notes:
        Positions are exact ratios of integers: resizing to the same size is exactly the identity.
        Deterministic.

    Example:
        >>> u = torch.tensor([0.0, 1.0, 2.0]).expand(1, 2, 3, 3)
        >>> fastreg.resize_displacement(u, (3, 5))[0, :, 0]  # twice as many voxels along x: x moves twice as many
        tensor([[0.0000, 0.5000, 1.0000, 1.5000, 2.0000],
                [0.0000, 1.0000, 2.0000, 3.0000, 4.0000]])
    """
    _check.floating("resize_displacement", u=u)
    nd = _check.displacement("resize_displacement", "u", u)
    if 0 in u.shape[2:]:
        _check.fail("resize_displacement", "u", "not have an empty axis", tuple(u.shape))
    size = _check.sizes("resize_displacement", "size", size, nd, 1)
    if isinstance(scale, str):
        _check.choice("resize_displacement", "scale", scale, ("exact",))
        factors = None
    else:
        factors = _check.per_axis(
            "resize_displacement", "scale", scale, nd, minimum=float("-inf"), strict=True
        )
    return torch.ops.fastreg.resize_displacement(
        u, size, _check.flag("resize_displacement", "align_corners", align_corners), factors
    )


def resize_displacement_ref(u, size, align_corners, scale):
    nd, out = u.dim() - 2, u.to(_ext.arithmetic(u))
    factors = []
    for k in range(nd):
        n, o = u.shape[k + 2], size[k]
        position = torch.arange(o, device=u.device)
        position = (position * (n - 1)) if align_corners else ((2 * position + 1) * n - o).clamp_min(0)
        unit = max(o - 1, 1) if align_corners else 2 * o
        lower = (position // unit).clamp_max(n - 1)
        fraction = ((position - lower * unit).double() / unit).masked_fill(lower == n - 1, 0)
        fraction = _linear.along(fraction.to(out.dtype), k, nd)
        a, b = (out.index_select(k + 2, i) for i in (lower, (lower + 1).clamp_max(n - 1)))
        # A voxel of weight 0 must not pass on what is not finite.
        out = torch.where(fraction == 0, a, (1 - fraction) * a + fraction * b)
        factors.append(
            scale[k] if scale else ((o - 1) / (n - 1) if n > 1 else 1.0) if align_corners else o / n
        )
    factor = torch.stack([out.new_full((), f) for f in factors])
    return (out * factor.view(-1, *[1] * nd)).to(u.dtype)


def resize_displacement_bwd_ref(grad, size, align_corners, scale):
    u = grad.new_zeros((*grad.shape[:2], *size))
    return _ext.grad_of(
        lambda t: resize_displacement_ref(t, grad.shape[2:], align_corners, scale), (u,), grad
    )[0]


def _fake(u, size, align_corners, scale):
    return u.new_empty((*u.shape[:2], *size))


_OPTIONS = "SymInt[] size, bool align_corners, float[]? scale"
_ext.define(f"resize_displacement(Tensor u, {_OPTIONS}) -> Tensor", resize_displacement_ref, _fake)
_ext.define(f"resize_displacement_bwd(Tensor grad, {_OPTIONS}) -> Tensor", resize_displacement_bwd_ref, _fake)


def _setup(ctx, inputs, output):
    ctx.arguments = (inputs[0].shape[2:], *inputs[2:])


_linear.autograd("resize_displacement", _setup)
_ext.batched("resize_displacement", "resize_displacement_bwd")
