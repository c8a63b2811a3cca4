"""Local correlation of two feature maps (cost volume)."""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops.warp import warp_ref

Scale = Literal["mean", "sum", "sqrt"]
SCALES = get_args(Scale)
Padding = Literal["zeros", "border"]
PADDINGS = get_args(Padding)
EPSILON = 1e-6


def local_correlation(
    fixed: Tensor,  # (N, C, *spatial)
    moving: Tensor,  # (N, C, *spatial)
    radius: int | Sequence[int] = 2,
    *,
    displacement: Tensor | None = None,  # (N, nd, *spatial)
    normalize: bool = False,
    scale: Scale = "mean",
    padding: Padding = "zeros",
) -> Tensor:  # (N, prod(2 radius + 1), *spatial)
    """Correlates each voxel of fixed with the (2 radius + 1)^nd neighbours of the same voxel in moving (cost volume).

    ``out(x, o) = scale * sum_c fixed_c(x) moving_c(x + o)`` for all o with |o_k| <= radius_k, in lexicographic (z, y, x)
    order, last axis fastest. With a displacement, moving is warped first and then shifted: ``M~(x + o)`` with
    ``M~ = warp(moving, displacement)``, as in PWC-Net (Sun et al. 2018) and the Recursive Refinement Network (He et al.
    2021). ``normalize`` (RRN): per sample, mean and unbiased deviation over (C, *spatial) of each map, averaged over the two
    maps; both become ``(x - mu) / (sigma + 1e-6)``. A sample that lies outside moving counts as 0 before the normalisation,
    an offset that leads outside the map reads 0 (or the border value) after it.
    Gradients, all gathers: ``d fixed(x, c) = scale sum_o g(x, o) M(x + o, c)``,
    ``d M(q, c) = scale sum_o g(q - o, o) fixed(q - o, c)``.

    Args:
        fixed, moving (Tensor): (N, C, D, H, W) or (N, C, H, W), fp64 / fp32 / fp16 / bf16; mixed dtypes are promoted.
        radius (int or sequence): in voxels, >= 0, one or one per axis; may exceed the image.
        displacement (Tensor, optional): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), any of the four
            dtypes: moving is warped by it (zeros outside) as it is read.
        normalize (bool): both maps become ``(x - mu) / (sigma + 1e-6)``, statistics per sample, averaged over the two maps.
        scale (str): factor of the sum over channels: "mean" 1 / C, "sum" 1, "sqrt" 1 / sqrt(C).
        padding (str): what an offset beyond the image reads: "zeros" or "border" (nearest voxel).

    Returns:
        Tensor: (N, prod(2 radius + 1), *spatial), dtype of the images. Differentiable (once) in fixed, moving and
        displacement, through the statistics too.

    Raises:
        TypeError: a tensor is not floating, radius is not whole.
        ValueError: shapes, devices, radius, scale or padding.

    Notes:
        Deterministic on CPU whatever the thread count. A deviation of 0 has derivative 0, so constant maps have finite
        gradients. A NaN reaches the outputs that read it; with ``normalize``, its sample.
        CPU: no shifted, normalised or warped copy of a map; extra memory per thread is some 2 radius + 1 planes of moving,
        at most a few MB. The backward holds the gradient of the warped moving (and halves: what they are rounded from).

    Example:
        >>> fixed = torch.tensor([[[[0.0, 1.0, 0.0, 0.0]]]])
        >>> moving = torch.tensor([[[[0.0, 0.0, 1.0, 0.0]]]])
        >>> fastreg.local_correlation(fixed, moving, (0, 1))[0, :, 0]  # found one voxel to the right
        tensor([[0., 0., 0., 0.],
                [0., 0., 0., 0.],
                [0., 1., 0., 0.]])
    """
    op = "local_correlation"
    given = {} if displacement is None else {"displacement": displacement}
    _check.floating(op, fixed=fixed, moving=moving, **given)
    nd = _check.image(op, "fixed", fixed)
    _check.same_shape(op, "moving", moving, "fixed", fixed)
    if displacement is not None:
        _check.displacement(op, "displacement", displacement, fixed.shape[2:], fixed.shape[0])
    radius = _check.whole_per_axis(op, "radius", radius, nd)
    _check.choice(op, "scale", scale, SCALES)
    _check.choice(op, "padding", padding, PADDINGS)
    dtype = torch.promote_types(fixed.dtype, moving.dtype)
    normalize = _check.flag(op, "normalize", normalize)
    arguments = (fixed.to(dtype), moving.to(dtype), radius, displacement, normalize, scale, padding)
    try:
        return torch.ops.fastreg.local_correlation(*arguments)[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "alloc" not in str(error):
            raise
    shape = (fixed.shape[0], math.prod(2 * r + 1 for r in radius), *fixed.shape[2:])
    size = math.prod(shape) * dtype.itemsize / 1e9
    _check.fail(op, "radius", "leave a result that fits into memory", f"{radius}: {shape}, {size:.0f} GB")


def _mean_and_deviation(x):
    """Per sample over (C, *spatial), (N, 1, ...). The shift makes constant maps exactly constant; derivative 0 at deviation 0."""
    flat = x.flatten(1)
    shift = flat[:, :1].detach()
    mean = (flat - shift).mean(1, keepdim=True)
    variance = (flat - shift - mean).square().sum(1, keepdim=True) / max(flat.shape[1] - 1, 1)
    positive = variance.detach() != 0
    deviation = torch.where(positive, torch.where(positive, variance, 1).sqrt(), 0)
    return [s.view(-1, *[1] * (x.dim() - 1)) for s in (mean + shift, deviation)]


def _pad(x, radius, padding):
    if padding == "zeros" or x.numel() == 0:
        return F.pad(x, [r for r in reversed(radius) for _ in range(2)])
    for k, r in enumerate(radius):
        n = x.shape[2 + k]
        x = x.index_select(2 + k, torch.arange(-r, n + r, device=x.device).clamp(0, n - 1))
    return x


def _factor(scale, channels):
    channels = max(channels, 1)
    return {"mean": 1 / channels, "sum": 1.0, "sqrt": 1 / math.sqrt(channels)}[scale]


def _warped(moving, displacement):
    return warp_ref(moving.to(_ext.arithmetic(moving, displacement)), displacement, None, "linear", "zeros")


def local_correlation_ref(fixed, moving, radius, displacement, normalize, scale, padding):
    """The map and, with ``normalize``, the statistics: (N, 4) of mean and deviation of fixed, then of moving, fp64."""
    dtype = _ext.arithmetic(fixed, displacement, moving)
    f, m = fixed.contiguous().to(dtype), moving.contiguous().to(dtype)
    statistics = fixed.new_zeros(0, dtype=torch.float64)
    if displacement is not None:
        m = _warped(m, displacement)
    if normalize and fixed.numel() == 0:
        statistics = fixed.new_zeros((fixed.shape[0], 4), dtype=torch.float64)
    elif normalize:
        (mean_f, deviation_f), (mean_m, deviation_m) = _mean_and_deviation(f), _mean_and_deviation(m)
        mu, sigma = (mean_f + mean_m) / 2, (deviation_f + deviation_m) / 2
        f, m = (f - mu) / (sigma + EPSILON), (m - mu) / (sigma + EPSILON)
        statistics = torch.cat([s.flatten(1) for s in (mean_f, deviation_f, mean_m, deviation_m)], 1)
        statistics = statistics.detach().double()
    m, factor = _pad(m, radius, padding), _factor(scale, fixed.shape[1])
    out = []
    for offset in itertools.product(*[range(2 * r + 1) for r in radius]):
        shifted = m
        for k, o in enumerate(offset):
            shifted = shifted.narrow(2 + k, o, fixed.shape[2 + k])
        out.append((f * shifted).sum(1) * factor)
    return torch.stack(out, 1).to(fixed.dtype), statistics


def _fake(fixed, moving, radius, displacement, normalize, scale, padding):
    out = fixed.new_empty((fixed.shape[0], math.prod(2 * r + 1 for r in radius), *fixed.shape[2:]))
    return out, fixed.new_empty((fixed.shape[0], 4) if normalize else 0, dtype=torch.float64)


def local_correlation_bwd_ref(
    grad, fixed, moving, statistics, radius, displacement, normalize, scale, padding, *needs
):
    """Gradients to fixed and to the moving map as it is correlated: warped, in arithmetic dtype, where displaced."""
    if displacement is not None:
        moving = _warped(moving, displacement)

    def correlate(f, m):
        return local_correlation_ref(f, m, radius, None, normalize, scale, padding)[0].to(grad.dtype)

    grads = _ext.grad_of(correlate, (fixed, moving), grad)
    return _ext.only_needed(grads, needs)


def _bwd_fake(grad, fixed, moving, statistics, radius, displacement, normalize, scale, padding, *needs):
    dtypes = (fixed.dtype, moving.dtype if displacement is None else _ext.arithmetic(moving, displacement))
    return tuple(
        fixed.new_empty(fixed.shape if need else 0, dtype=dtype)
        for need, dtype in zip(needs, dtypes, strict=True)
    )


_OPTIONS = "int[] radius, Tensor? displacement, bool normalize, str scale, str padding"
_ext.define(
    f"local_correlation(Tensor fixed, Tensor moving, {_OPTIONS}) -> (Tensor, Tensor)",
    local_correlation_ref,
    _fake,
)
_ext.define(
    f"local_correlation_bwd(Tensor grad, Tensor fixed, Tensor moving, Tensor statistics, {_OPTIONS},"
    " bool need_fixed, bool need_moved) -> (Tensor, Tensor)",
    local_correlation_bwd_ref,
    _bwd_fake,
)


def _setup(ctx, inputs, output):
    fixed, moving, ctx.radius, displacement, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(fixed, moving, displacement, output[1])


def _backward(ctx, grad, _):
    fixed, moving, displacement, statistics = ctx.saved_tensors
    need_fixed, need_moving, _, need_u = ctx.needs_input_grad[:4]
    grad_fixed, grad_moving = torch.ops.fastreg.local_correlation_bwd(
        grad,
        fixed,
        moving,
        statistics,
        ctx.radius,
        displacement,
        *ctx.options,
        need_fixed,
        need_moving or need_u,
    )
    grad_u = None
    if need_moving or need_u:
        if displacement is not None:
            grad_moving, grad_u, _ = torch.ops.fastreg.warp_bwd(
                grad_moving,
                moving.to(grad_moving.dtype),
                displacement,
                None,
                "linear",
                "zeros",
                need_moving,
                need_u,
                False,
            )
        grad_moving = grad_moving.to(moving.dtype)
    grads = _ext.none_unless_needed(
        (grad_fixed, grad_moving, None, grad_u), (need_fixed, need_moving, False, need_u)
    )
    return *grads, None, None, None


_ext.autograd("local_correlation", _setup, _backward)
_ext.once_differentiable("local_correlation_bwd")
_ext.batched("local_correlation", "local_correlation_bwd")
