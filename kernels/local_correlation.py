"""Local correlation in Triton: forward, both gathers of the backward, and the statistics of ``normalize``.

2D images (H, W) run as volumes (H, 1, W), so the axis that a thread holds in registers is never the contiguous one. A
displaced moving is warped once into a scratch map (1 volume): on the fly every offset would fetch and blend its 8 corners.
"""

import math
from typing import NamedTuple

import torch
import triton

from fastreg.kernels.launch import TYPES, arithmetic_of, blocks, launch, power_of_two
from fastreg.kernels.local_correlation_backward import local_correlation_bwd_kernel
from fastreg.kernels.local_correlation_forward import local_correlation_fwd_kernel
from fastreg.kernels.local_correlation_normalize import (
    local_correlation_merge_kernel,
    local_correlation_moments_kernel,
    local_correlation_through_kernel,
)
from fastreg.ops.local_correlation import _factor


class _Call(NamedTuple):
    """What the kernels of a call share."""

    fixed: torch.Tensor
    moved: torch.Tensor
    size: tuple  # a 2D image is a volume of one row a plane
    radius: tuple
    dtype: torch.dtype  # of the arithmetic
    factor: float

    @property
    def constants(self):
        return dict(
            zip(("RZ", "RY", "RX"), self.radius, strict=True), FACTOR=self.factor, A=TYPES[self.dtype]
        )

    @property
    def planes(self):
        """That a thread holds: what its registers allow."""
        return power_of_two(self.size[0], 2 if self.dtype == torch.float64 else 4)


def _call(op, fixed, moving, radius, displacement, scale):
    nd = fixed.dim() - 2
    if fixed.shape != moving.shape or nd not in (2, 3) or len(radius) != nd or min(radius) < 0:
        raise ValueError(
            f"fastreg::{op}: fixed and moving must have one shape with a radius for each of 2 or 3 axes, "
            f"got {tuple(fixed.shape)}, {tuple(moving.shape)} and {radius}"
        )
    size, radius = tuple(fixed.shape[2:]), tuple(radius)
    if nd == 2:
        size, radius = (size[0], 1, size[1]), (radius[0], 0, radius[1])
    if math.prod(s + 2 * r for s, r in zip(size[1:], radius[1:], strict=True)) >= 2**31:
        raise ValueError(f"fastreg::{op}: a plane must be smaller than 2^31 voxels, got {tuple(fixed.shape)}")
    dtype = arithmetic_of(fixed, moving, displacement)
    if displacement is not None and fixed.numel():
        moving = torch.ops.fastreg.warp(moving.to(dtype), displacement, None, "linear", "zeros")
    return _Call(fixed.contiguous(), moving.contiguous(), size, radius, dtype, _factor(scale, fixed.shape[1]))


def _even(n, most):
    """n in equal pieces of at most `most`: the size of a piece."""
    return blocks(n, blocks(n, most))


def _lanes(n):
    """Voxels of a block of at most 128, and its warps: a voxel a thread."""
    block = max(32, power_of_two(n, 128))
    return block, block // 32


def _statistics(call):
    n, count = call.fixed.shape[0], call.fixed[0].numel()
    statistics = call.fixed.new_empty((n, 4), dtype=torch.float64)
    per = max(4096, triton.next_power_of_2(blocks(count, 1024)))
    pieces = blocks(count, per)
    moments = statistics.new_empty((n, pieces, 2))
    for i, x in enumerate((call.fixed, call.moved)):
        launch(
            local_correlation_moments_kernel, (n * pieces,), x, moments, count, pieces, PER=per, BLOCK=1024
        )
        launch(
            local_correlation_merge_kernel,
            (n,),
            moments,
            statistics,
            count,
            pieces,
            MAP=i,
            PER=per,
            BLOCK=triton.next_power_of_2(pieces),
        )
    return statistics


def local_correlation(fixed, moving, radius, displacement, normalize, scale, padding):
    call = _call("local_correlation", fixed, moving, radius, displacement, scale)
    (nz, ny, nx), (depth, height, width) = (2 * r + 1 for r in call.radius), call.size
    shape = (fixed.shape[0], nz * ny * nx, *fixed.shape[2:])
    if fixed.numel() == 0:
        return fixed.new_zeros(shape), fixed.new_zeros(
            (fixed.shape[0], 4) if normalize else 0, dtype=torch.float64
        )
    statistics = _statistics(call) if normalize else fixed.new_empty(0, dtype=torch.float64)
    out = fixed.new_empty(shape)
    kz, kx = _even(nz, 5), _even(nx, 5)
    block, warps = _lanes(height * width)
    n_blocks, n_tiles = blocks(height * width, block), blocks(depth, call.planes)
    launch(
        local_correlation_fwd_kernel,
        (blocks(nz, kz) * ny * blocks(nx, kx) * n_blocks * n_tiles * fixed.shape[0],),
        call.fixed,
        call.moved,
        statistics if normalize else None,
        out,
        fixed.shape[1],
        *call.size,
        math.prod(call.size),
        n_blocks,
        n_tiles,
        **call.constants,
        NORMALIZE=normalize,
        BORDER=padding == "border",
        TZ=call.planes,
        KZ=kz,
        KX=kx,
        BLOCK=block,
        num_warps=warps,
    )
    return out, statistics


def _gather(call, grad, statistics, out, size, moving, border):
    """Gradient to one of the maps into `out`, of `size`; where normalised, the three sums of the gradient to fixed, (N, 3)."""
    channels = call.fixed.shape[1]
    need_sums = statistics is not None and not moving
    # Twice as many would spill where numbers or what is summed beside them take more registers.
    most = 8 if need_sums or call.dtype == torch.float64 else 16
    channels_at_once = power_of_two(channels, most)
    planes = power_of_two(size[0], call.planes)
    block, warps = _lanes(size[1] * size[2])
    tiles = blocks(channels, channels_at_once), blocks(size[1] * size[2], block), blocks(size[0], planes)
    programs = math.prod(tiles)  # of a sample
    sums = statistics.new_empty((call.fixed.shape[0], programs, 3)) if need_sums else None
    launch(
        local_correlation_bwd_kernel,
        (programs * call.fixed.shape[0],),
        grad,
        call.fixed if moving else call.moved,
        call.fixed if need_sums else None,
        statistics,
        out,
        sums,
        channels,
        *call.size,
        math.prod(call.size),
        *size,
        math.prod(size),
        *tiles,
        **call.constants,
        MOVING=moving,
        NORMALIZE=statistics is not None,
        BORDER=border,
        TZ=planes,
        KZ=_even(2 * call.radius[0] + 1, 5),
        CB=channels_at_once,
        FULL=channels % channels_at_once == 0,
        BLOCK=block,
        num_warps=warps,
    )
    return sums.sum(1) if need_sums else None


def _fold(extended, radius, size):
    """What lies beyond the faces is added to them."""
    for axis, (r, n) in enumerate(zip(radius, size, strict=True), 2):
        if r:
            before, inside, behind = extended.split((r, n, r), axis)
            inside.narrow(axis, 0, 1).add_(before.sum(axis, keepdim=True))
            inside.narrow(axis, n - 1, 1).add_(behind.sum(axis, keepdim=True))
            extended = inside
    return extended


def _through(call, x, gradient, statistics, totals, out, i):
    count = x[0].numel()
    launch(
        local_correlation_through_kernel,
        (blocks(count, 1024) * x.shape[0],),
        gradient,
        x,
        statistics,
        totals,
        out,
        count,
        blocks(count, 1024),
        MAP=i,
        A=TYPES[call.dtype],
        BLOCK=1024,
    )


def local_correlation_bwd(
    grad,
    fixed,
    moving,
    statistics,
    radius,
    displacement,
    normalize,
    scale,
    padding,
    need_fixed,
    need_moved,
):
    op = "local_correlation_bwd"
    call = _call(op, fixed, moving, radius, displacement, scale)
    shape = (fixed.shape[0], math.prod(2 * r + 1 for r in radius), *fixed.shape[2:])
    if grad.shape != shape or (normalize and statistics.shape != (fixed.shape[0], 4)):
        raise ValueError(
            f"fastreg::{op}: grad must have shape {shape} and statistics (N, 4), "
            f"got {tuple(grad.shape)} and {tuple(statistics.shape)}"
        )
    border = padding == "border"
    dtypes = fixed.dtype, moving.dtype if displacement is None else call.dtype
    results = [
        fixed.new_empty(fixed.shape if need else 0, dtype=dtype)
        for need, dtype in zip((need_fixed, need_moved), dtypes, strict=True)
    ]
    if fixed.numel() == 0 or not (need_fixed or need_moved):
        return tuple(r.zero_() for r in results)
    grad = grad.contiguous()
    statistics = statistics.double().contiguous() if normalize else None

    def scratch(result, need):
        """Where a gradient is gathered: rounded once, after the normalisation."""
        exact = need and (not normalize or result.dtype == call.dtype)
        return result if exact else fixed.new_empty(fixed.shape, dtype=call.dtype)

    totals = None
    if need_fixed or normalize:
        gathered = scratch(results[0], need_fixed)
        totals = _gather(call, grad, statistics, gathered, call.size, False, border)
        if normalize and need_fixed:
            _through(call, call.fixed, gathered, statistics, totals, results[0], 0)
        del gathered
    if not normalize:
        call = call._replace(moved=None)  # gives a warped one back before the next scratch is made
    if need_moved and border:
        size = tuple(s + 2 * r for s, r in zip(call.size, call.radius, strict=True))
        extended = fixed.new_empty((*fixed.shape[:2], *size), dtype=call.dtype)
        _gather(call, grad, statistics, extended, size, True, True)
        gathered = _fold(extended, call.radius, call.size).reshape(fixed.shape)
        if not normalize:
            results[1].copy_(gathered)
    elif need_moved:
        gathered = scratch(results[1], True)
        _gather(call, grad, statistics, gathered, call.size, True, False)
    if need_moved and normalize:
        _through(call, call.moved, gathered.contiguous(), statistics, totals, results[1], 1)
    return tuple(results)
