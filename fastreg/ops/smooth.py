"""Gaussian smoothing of displacements and images."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops import _linear
from fastreg.ops.warp import PADDINGS, Padding

MAX_RADIUS = 2**16


def smooth(
    u: Tensor,  # (N, C, *spatial)
    sigma: float | Sequence[float],
    *,
    padding: Padding = "border",
    truncate: float = 4.0,
) -> Tensor:  # (N, C, *spatial)
    """Gaussian smoothing of a displacement or image, each channel by itself.

    The sampled Gaussian ``exp(-x^2 / 2 sigma^2)`` normalised to sum 1, radius ``ceil(truncate sigma)``, axis by axis.
    Linear: the backward is the transposed matrix of each axis, and the backward of that is the forward again.

    Args:
        u (Tensor): (N, C, D, H, W) or (N, C, H, W), fp64 / fp32 / fp16 / bf16.
        sigma (number or sequence): standard deviation in voxels, one or one per axis; 0 leaves an axis as it
            is.
        padding (str): what lies outside: "zeros", "border" (nearest voxel) or "reflection" (about the
            outermost voxel centres).
        truncate (number): the kernel ends at ceil(truncate * sigma) voxels.

    Returns:
        Tensor: shape and dtype of u. Differentiable (any number of times) in u.

    Raises:
        TypeError: u is not floating.
        ValueError: shape, sigma, padding or truncate do not fit.

    Notes:
        A NaN reaches the voxels whose kernel holds it and no others. Deterministic.

    Example:
        >>> u = torch.zeros(1, 1, 1, 7)
        >>> u[..., 3] = 1.0
        >>> fastreg.smooth(u, (0.0, 1.0))[0, 0]
        tensor([[0.0044, 0.0540, 0.2420, 0.3989, 0.2420, 0.0540, 0.0044]])
    """
    _check.floating("smooth", u=u)
    nd = _check.image("smooth", "u", u)
    sigma = _check.per_axis("smooth", "sigma", sigma, nd)
    _check.choice("smooth", "padding", padding, PADDINGS)
    truncate = _check.per_axis("smooth", "truncate", truncate, 1, strict=True)[0]
    if max(sigma) * truncate > MAX_RADIUS:
        _check.fail("smooth", "sigma", f"have truncate * sigma <= {MAX_RADIUS}", max(sigma) * truncate)
    return torch.ops.fastreg.smooth(u, sigma, padding, truncate)


def smooth_ref(u, sigma, padding, truncate):
    nd, out = u.dim() - 2, u.to(_ext.arithmetic(u))
    for k, s in enumerate(sigma):
        n, radius = u.shape[k + 2], math.ceil(truncate * s)
        if radius == 0 or n == 0:
            continue
        weight = [math.exp(-0.5 * (x / s) ** 2) for x in range(-radius, radius + 1)]
        if padding == "zeros":
            wide = F.pad(out, [0, 0] * (nd - 1 - k) + [radius, radius])
        else:
            index = torch.arange(-radius, n + radius, device=u.device)
            if padding == "reflection" and n > 1:
                index = index.abs() % (2 * (n - 1))
                index = torch.where(index < n, index, 2 * (n - 1) - index)
            wide = out.index_select(k + 2, index.clamp(0, n - 1))
        out = sum(w / math.fsum(weight) * wide.narrow(k + 2, x, n) for x, w in enumerate(weight))
    return out.to(u.dtype, copy=True)


def smooth_bwd_ref(grad, sigma, padding, truncate):
    return _ext.grad_of(lambda t: smooth_ref(t, sigma, padding, truncate), (torch.zeros_like(grad),), grad)[0]


def _fake(u, sigma, padding, truncate):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


_OPTIONS = "float[] sigma, str padding, float truncate"
_ext.define(f"smooth(Tensor u, {_OPTIONS}) -> Tensor", smooth_ref, _fake)
_ext.define(f"smooth_bwd(Tensor grad, {_OPTIONS}) -> Tensor", smooth_bwd_ref, _fake)


def _setup(ctx, inputs, output):
    ctx.arguments = inputs[1:]


_linear.autograd("smooth", _setup)
_ext.batched("smooth", "smooth_bwd")
