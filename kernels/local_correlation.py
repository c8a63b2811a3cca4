"""Local correlation in Triton: forward, both gathers of the backward, and the statistics of ``normalize``.

2D images (H, W) run as volumes (H, 1, W), so the axis that a thread holds in registers is never the contiguous one. A
displaced moving is warped once into a scratch map (1 volume): on the fly every offset would fetch and blend its 8 corners.
"""
# ruff: noqa: RUF005 (Triton does not read `(*a, b)`)

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastreg.kernels.launch import blocks, launch
from fastreg.ops.local_correlation import EPSILON, _arithmetic, _factor

_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def _normalization(s_ptr, n, NORMALIZE: tl.constexpr, A: tl.constexpr, OWN: tl.constexpr):
    """x becomes ((x - high) - low) * inverse: about the shared mean, or about that of one map (OWN: 0 fixed, 1 moving)."""
    high, low, inverse = 0.0, 0.0, 1.0
    if NORMALIZE:
        s_ptr += 4 * n
        if OWN < 0:
            mean = (tl.load(s_ptr) + tl.load(s_ptr + 2)) / 2
        else:
            mean = tl.load(s_ptr + 2 * OWN)
        deviation = (tl.load(s_ptr + 1) + tl.load(s_ptr + 3)) / 2 + _EPSILON
        high = mean.to(A)
        low = (mean - high.to(tl.float64)).to(A)
        inverse = (1 / deviation).to(A)
    return high, low, inverse


# A program: BLOCK voxels of a plane (a thread each), TZ planes, and of the offsets KZ along z, one along y, KX along x. Their
# TZ * KZ * KX sums over the channels stay in registers; a channel costs TZ + (TZ + KZ - 1) * KX coalesced loads, of which the
# KX shifted ones hit L1. Neighbouring programs take the other offsets of the same voxels: these reads hit L2.
# Bytes: reads 2C volumes, writes the offsets, streaming. Arithmetic: C products and sums an offset and voxel, 0.44 loads each
# (TZ 4, radius 2). C = 32, 64^3: 0.20 GB, 66 us; 1.05 G multiply-adds, 31 us; 0.46 G loads of L1, 64 us; L2 0.5 GB, 91 us;
# 2.3 instructions a multiply-add, 85 us. Memory beyond the result: the warped moving, where displaced.
@triton.jit
def _local_correlation_fwd_kernel(
    f_ptr,
    m_ptr,
    s_ptr,
    out_ptr,
    C,
    D,
    H,
    W,
    V,
    n_blocks,
    n_tiles,
    RZ: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    FACTOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BORDER: tl.constexpr,
    A: tl.constexpr,
    TZ: tl.constexpr,
    KZ: tl.constexpr,
    KX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    NZ: tl.constexpr = 2 * RZ + 1
    NY: tl.constexpr = 2 * RY + 1
    NX: tl.constexpr = 2 * RX + 1
    CZ: tl.constexpr = (NZ + KZ - 1) // KZ
    CX: tl.constexpr = (NX + KX - 1) // KX
    plane = H * W
    pid = tl.program_id(0)
    first_x, oy, first_z = pid % CX * KX, pid // CX % NY, pid // (CX * NY) % CZ * KZ
    pid = pid // (CX * NY * CZ)
    z0, n = pid // n_blocks % n_tiles * TZ, (pid // n_blocks // n_tiles).to(tl.int64)
    p = pid % n_blocks * BLOCK + tl.arange(0, BLOCK)
    lane = p < plane
    q = tl.minimum(p, plane - 1)
    y, x = q // W + (oy - RY), q % W + (first_x - RX)
    z = z0 + 0 * p  # a block, to meet masks
    high, low, inverse = _normalization(s_ptr, n, NORMALIZE, A, -1)

    # Planes beyond the image are read as the nearest one: with padding "zeros" their sums, f * 0, are put in at the end, so
    # that the masks of a channel's loads are the KX of a row.
    own, starts, at, masks = (), (), (), ()
    for t in tl.static_range(TZ):
        own = own + (tl.minimum(z0 + t, D - 1).to(tl.int64) * plane,)
    for s in tl.static_range(TZ + KZ - 1):
        depth = tl.minimum(tl.maximum(z0 + first_z - RZ + s, 0), D - 1)
        starts = starts + (depth.to(tl.int64) * plane,)
    for k in tl.static_range(KX):
        if BORDER:
            row, column = tl.minimum(tl.maximum(y, 0), H - 1), tl.minimum(tl.maximum(x + k, 0), W - 1)
            at, masks = at + (row * W + column,), masks + (lane,)
        else:
            at = at + (y * W + x + k,)
            masks = masks + ((y >= 0) & (y < H) & (x + k >= 0) & (x + k < W),)
    sums, outside, zero = (), (), tl.full((BLOCK,), 0, A)
    for _ in tl.static_range(TZ * KZ * KX):
        sums = sums + (zero,)
    for _ in tl.static_range(TZ):
        outside = outside + (zero,)
    f_ptr += n * C * V
    m_ptr += n * C * V
    for _ in range(C):
        f, m, more, more_outside = (), (), (), ()
        for t in tl.static_range(TZ):
            value = tl.load(f_ptr + own[t] + q).to(A)
            if NORMALIZE:
                value = (value - high - low) * inverse
            f, more_outside = f + (value,), more_outside + (outside[t] + value * 0,)
        for s in tl.static_range(TZ + KZ - 1):
            for k in tl.static_range(KX):
                # From the first one on where it can be: a constant further on costs no address.
                m_at = m_ptr + starts[s] + at[k] if BORDER else m_ptr + starts[s] + at[0] + k
                value = tl.load(m_at, mask=masks[k], other=0.0).to(A)
                if NORMALIZE:
                    value = tl.where(masks[k], (value - high - low) * inverse, 0.0)
                m = m + (value,)
        for t in tl.static_range(TZ):
            for j in tl.static_range(KZ):
                for k in tl.static_range(KX):
                    more = more + (sums[(t * KZ + j) * KX + k] + f[t] * m[(t + j) * KX + k],)
        sums, outside = more, more_outside
        f_ptr += V
        m_ptr += V

    for t in tl.static_range(TZ):
        for j in tl.static_range(KZ):
            depth = z + first_z - RZ + (t + j)
            for k in tl.static_range(KX):
                value = sums[(t * KZ + j) * KX + k] * FACTOR
                if not BORDER:
                    value = tl.where((depth >= 0) & (depth < D), value, outside[t])
                mask = lane & (z + t < D)
                if NZ % KZ != 0:
                    mask = mask & (first_z + j + 0 * p < NZ)
                if NX % KX != 0:
                    mask = mask & (first_x + k + 0 * p < NX)
                o = n * (NZ * NY * NX) + ((first_z + j) * NY + oy) * NX + first_x + k
                to = out_ptr + o * V + own[t] + p
                tl.store(to, value.to(out_ptr.dtype.element_ty), mask=mask, cache_modifier=".cs")


# Gradient to fixed, or (MOVING) to the moving map: for each voxel p the sum over o of g times the other map m,
#   fixed:  g(p, o) m(p + o),   moving:  g(p - o, o) m(p - o).
# With padding "border" the moving map is that of (TD, TH, TW): extended by the radius, to be folded onto its faces.
# A program: BLOCK voxels of a plane (a thread each), TZ planes and CB channels, whose sums stay in registers over all offsets.
# KZ offsets along z at a time take TZ + KZ - 1 loads of each channel and TZ * KZ of g, for TZ * KZ * CB products.
# Bytes: reads the offsets and C volumes, writes C; g again, from L2, for every further CB channels. Arithmetic: C products and
# sums an offset and voxel, 0.46 loads each (TZ 4, KZ 5, CB 16). C = 32, 64^3: 0.20 GB, 66 us; 1.05 G multiply-adds, 31 us;
# 0.48 G loads of L1, 67 us; L2 0.6 GB, 110 us; 2.6 instructions a multiply-add, 95 us. Memory beyond the result: the warped
# moving; halves normalised, fp32 of a map; padding "border", the extended map in arithmetic type.
# Normalised, of fixed: also three sums a program, of the gradient to the normalised fixed, of it times the normalised fixed,
# and of the gradient to the normalised moving, which is that of a channel of ones times the sum of fixed.
@triton.jit
def _local_correlation_bwd_kernel(
    g_ptr,
    m_ptr,
    own_ptr,
    s_ptr,
    out_ptr,
    sums_ptr,
    C,
    D,
    H,
    W,
    V,
    TD,
    TH,
    TW,
    TV,
    n_channels,
    n_blocks,
    n_tiles,
    RZ: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    FACTOR: tl.constexpr,
    MOVING: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BORDER: tl.constexpr,
    A: tl.constexpr,
    TZ: tl.constexpr,
    KZ: tl.constexpr,
    CB: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    NZ: tl.constexpr = 2 * RZ + 1
    NY: tl.constexpr = 2 * RY + 1
    NX: tl.constexpr = 2 * RX + 1
    EXTENDED: tl.constexpr = MOVING and BORDER
    CLAMPED: tl.constexpr = BORDER and not MOVING
    SUMS: tl.constexpr = NORMALIZE and not MOVING
    plane, target_plane = H * W, TH * TW
    pid = tl.program_id(0)
    c0 = pid % n_channels * CB
    c = c0 + tl.arange(0, CB)
    pid = pid // n_channels
    z0, n = pid // n_blocks % n_tiles * TZ, (pid // n_blocks // n_tiles).to(tl.int64)
    p = pid % n_blocks * BLOCK + tl.arange(0, BLOCK)
    lane, channel = p < target_plane, (c < C)[:, None]
    y, x, z, z_block = p // TW, p % TW, z0, z0 + 0 * p  # the block meets masks
    if EXTENDED:
        y, x, z, z_block = y - RY, x - RX, z - RZ, z_block - RZ
    high, low, inverse = _normalization(s_ptr, n, NORMALIZE, A, -1)

    channels = tl.arange(0, CB)[:, None] * tl.full((), V, tl.int64)
    m_ptr += (n * C + c0) * V
    g_ptr += n * (NZ * NY * NX) * V
    sums, ones = (), ()
    zeros, zero = tl.full((CB, BLOCK), 0, A), tl.full((BLOCK,), 0, A)
    own, own_masks = (), ()
    for t in tl.static_range(TZ):
        sums, ones = sums + (zeros,), ones + (zero,)
        own, own_masks = (
            own + ((z0 + t).to(tl.int64) * target_plane + p,),
            own_masks + (lane & (z0 + t + 0 * p < TD),),
        )
    for first_z in range(0, NZ, KZ):
        # m lies at z + first + s, where s = t + j: j is the offset along z, from the far end where it is subtracted.
        first = RZ - first_z - (KZ - 1) if MOVING else first_z - RZ
        starts, in_plane = (), ()
        for i in tl.static_range(TZ + KZ - 1):
            depth = z + first + i
            inside = lane if CLAMPED else lane & (z_block + first + i >= 0) & (z_block + first + i < D)
            starts = starts + (tl.minimum(tl.maximum(depth, 0), D - 1).to(tl.int64) * plane,)
            in_plane = in_plane + (inside,)
        for oy in range(NY):
            for ox in range(NX):
                if MOVING:
                    y_m, x_m = y - (oy - RY), x - (ox - RX)
                else:
                    y_m, x_m = y + (oy - RY), x + (ox - RX)
                if CLAMPED:
                    y_m = tl.minimum(tl.maximum(y_m, 0), H - 1)
                    x_m = tl.minimum(tl.maximum(x_m, 0), W - 1)
                in_row = (y_m >= 0) & (y_m < H) & (x_m >= 0) & (x_m < W)
                at = y_m * W + x_m
                g = ()
                for t in tl.static_range(TZ):
                    for j in tl.static_range(KZ):
                        oz = first_z + (KZ - 1 - j if MOVING else j)
                        g_o = g_ptr + tl.cast((oz * NY + oy) * NX + ox, tl.int64) * V
                        g_o += starts[t + j] + at if MOVING else own[t]
                        mask = in_row & in_plane[t + j] if MOVING else own_masks[t]
                        if NZ % KZ != 0:
                            mask = mask & (oz + 0 * p < NZ)
                        g = g + (tl.load(g_o, mask=mask, other=0.0).to(A),)
                for s in tl.static_range(TZ + KZ - 1):
                    exists = in_row & in_plane[s]
                    mask = exists[None, :] if FULL else channel & exists[None, :]
                    # In this order: a pointer per channel and plane, kept through the loops, would not fit the registers.
                    m_at = m_ptr + (starts[s] + at)
                    m = tl.load(m_at[None, :] + channels, mask=mask, other=0.0).to(A)
                    if NORMALIZE:
                        m = tl.where(mask, (m - high - low) * inverse, 0.0)
                    more, more_ones = (), ()
                    for t in tl.static_range(TZ):
                        more_t, ones_t = sums[t], ones[t]
                        if s - t >= 0 and s - t < KZ:
                            g_t = g[t * KZ + s - t]
                            product = g_t[None, :] * m
                            if NZ % KZ != 0:
                                # An offset beyond the radius must not pass on what is not finite.
                                j = KZ - 1 - (s - t) if MOVING else s - t
                                product = tl.where((first_z + j + 0 * p < NZ)[None, :], product, 0.0)
                            more_t += product
                            if SUMS:
                                ones_t += tl.where(exists, g_t, 0.0)
                        more, more_ones = more + (more_t,), more_ones + (ones_t,)
                    sums, ones = more, more_ones

    totals = (
        tl.full((BLOCK,), 0, tl.float64),
        tl.full((BLOCK,), 0, tl.float64),
        tl.full((BLOCK,), 0, tl.float64),
    )
    for t in tl.static_range(TZ):
        value = sums[t] * FACTOR
        at = (n * C + c)[:, None] * TV + own[t][None, :]
        mask = channel & own_masks[t][None, :]
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=mask)
        if SUMS:
            x_own = (tl.load(own_ptr + at, mask=mask, other=0.0).to(A) - high - low) * inverse
            x_own = tl.where(mask, x_own, 0.0).to(tl.float64)
            grads = tl.where(mask, value, 0.0).to(tl.float64)
            to_ones = (ones[t] * FACTOR).to(tl.float64)
            totals = (
                totals[0] + tl.sum(grads, 0),
                totals[1] + tl.sum(grads * x_own, 0),
                totals[2] + tl.sum(x_own, 0) * to_ones,
            )
    if SUMS:
        sums_ptr += 3 * tl.program_id(0).to(tl.int64)
        for i in tl.static_range(3):
            tl.store(sums_ptr + i, tl.sum(totals[i], 0))


# dL/dx from the gradient g to the normalised x: g / deviation + constant + slope * x', with x' the normalised x about its own
# map's mean, since about the shared one the last two would cancel where the means lie apart. A deviation of 0 has derivative 0.
# A thread: some voxels of a sample. Bytes: reads 2 maps, writes 1; `out` may be `g`.
@triton.jit
def _local_correlation_through_kernel(
    g_ptr,
    x_ptr,
    s_ptr,
    totals_ptr,
    out_ptr,
    count,
    n_blocks,
    MAP: tl.constexpr,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    n, i = (pid // n_blocks).to(tl.int64), (pid % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    many = tl.full((), count, tl.float64)
    s_ptr += 4 * n
    totals_ptr += 3 * n
    deviation = tl.load(s_ptr + 2 * MAP + 1)
    unit = (tl.load(s_ptr + 1) + tl.load(s_ptr + 3)) / 2 + _EPSILON
    constant = -(tl.load(totals_ptr) + tl.load(totals_ptr + 2)) / (2 * unit * many)
    # Both maps meet in the same products: their sums of x^ dL/dx^ are equal, and the halving of the deviations undoes the 2.
    still = deviation == 0
    slope = -tl.load(totals_ptr + 1) / (tl.where(still, 1.0, deviation) * tl.maximum(many - 1, 1.0))
    slope = tl.where(still, 0.0, slope)
    high, low, inverse = _normalization(s_ptr, 0, True, A, MAP)
    mask = i < count
    x = (tl.load(x_ptr + n * count + i, mask=mask, other=0.0).to(A) - high - low) * inverse
    g = tl.load(g_ptr + n * count + i, mask=mask, other=0.0).to(A)
    value = g * (1 / unit).to(A) + constant.to(A) + x * slope.to(A)
    tl.store(out_ptr + n * count + i, value.to(out_ptr.dtype.element_ty), mask=mask)


# Mean and summed squared deviations of PER consecutive numbers, in fp64 about the first of them: equal numbers stay at 0
# exactly. A program: one such piece of a sample of `count` numbers. Bytes: reads a map.
@triton.jit
def _local_correlation_moments_kernel(x_ptr, out_ptr, count, pieces, PER: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    n, start = (pid // pieces).to(tl.int64), (pid % pieces).to(tl.int64) * PER
    x_ptr += n * count + start
    length = tl.minimum(count - start, PER).to(tl.int32)
    shift = tl.load(x_ptr).to(tl.float64)
    total, squares = tl.full((BLOCK,), 0, tl.float64), tl.full((BLOCK,), 0, tl.float64)
    for i in range(0, length, BLOCK):
        at = i + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < length, other=0.0).to(tl.float64)
        d = tl.where(at < length, x - shift, 0.0)
        total += d
        squares += d * d
    total = tl.sum(total, 0)
    mean = total / length
    squares = tl.sum(squares, 0) - total * mean
    tl.store(out_ptr + 2 * pid, shift + mean)
    tl.store(out_ptr + 2 * pid + 1, tl.where(squares < 0, 0.0, squares))


# Mean and deviation of a sample of a map from those of its pieces. A program: a sample.
@triton.jit
def _local_correlation_merge_kernel(
    moments_ptr, s_ptr, count, pieces, MAP: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr
):
    n, i = tl.program_id(0), tl.arange(0, BLOCK)
    moments_ptr += 2 * n * pieces
    many = tl.full((), count, tl.float64)
    lengths = tl.where(i < pieces, tl.minimum(count - i.to(tl.int64) * PER, PER), 0).to(tl.float64)
    first = tl.load(moments_ptr)
    means = tl.load(moments_ptr + 2 * i, mask=i < pieces, other=0.0)
    squares = tl.load(moments_ptr + 2 * i + 1, mask=i < pieces, other=0.0)
    mean = first + tl.sum(tl.where(i < pieces, means - first, 0.0) * lengths, 0) / many
    apart = tl.where(i < pieces, means - mean, 0.0)
    squares = tl.sum(squares + lengths * apart * apart, 0)
    deviation = tl.sqrt(squares / tl.maximum(many - 1, 1.0))
    tl.store(s_ptr + 4 * n + 2 * MAP, mean)
    tl.store(s_ptr + 4 * n + 2 * MAP + 1, deviation)


class _Call(NamedTuple):
    """What the kernels of a call share."""

    fixed: torch.Tensor
    moved: torch.Tensor
    size: tuple  # a 2D image is a volume of one row a plane
    radius: tuple
    dtype: torch.dtype  # of the arithmetic
    factor: float

    @property
    def arithmetic(self):
        return tl.float64 if self.dtype == torch.float64 else tl.float32

    @property
    def planes(self):
        """That a thread holds: what its registers allow."""
        return min(2 if self.dtype == torch.float64 else 4, triton.next_power_of_2(self.size[0]))


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
    dtype = torch.promote_types(_arithmetic(fixed, displacement), moving.dtype)
    if displacement is not None and fixed.numel():
        moving = torch.ops.fastreg.warp(moving.to(dtype), displacement, None, "linear", "zeros")
    return _Call(fixed.contiguous(), moving.contiguous(), size, radius, dtype, _factor(scale, fixed.shape[1]))


def _even(n, most):
    """n in equal pieces of at most `most`: the size of a piece."""
    return triton.cdiv(n, triton.cdiv(n, most))


def _lanes(n):
    """Voxels of a block of at most 128, and its warps: a voxel a thread."""
    block = min(128, max(32, triton.next_power_of_2(n)))
    return block, block // 32


def _statistics(call):
    n, count = call.fixed.shape[0], call.fixed[0].numel()
    statistics = call.fixed.new_empty((n, 4), dtype=torch.float64)
    per = max(4096, triton.next_power_of_2(triton.cdiv(count, 1024)))
    pieces = triton.cdiv(count, per)
    moments = statistics.new_empty((n, pieces, 2))
    for i, x in enumerate((call.fixed, call.moved)):
        launch(
            _local_correlation_moments_kernel, (n * pieces,), x, moments, count, pieces, PER=per, BLOCK=1024
        )
        launch(
            _local_correlation_merge_kernel,
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
        _local_correlation_fwd_kernel,
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
        RZ=call.radius[0],
        RY=call.radius[1],
        RX=call.radius[2],
        FACTOR=call.factor,
        NORMALIZE=normalize,
        BORDER=padding == "border",
        A=call.arithmetic,
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
    channels_at_once = min(most, triton.next_power_of_2(channels))
    planes = min(call.planes, triton.next_power_of_2(size[0]))
    block, warps = _lanes(size[1] * size[2])
    tiles = blocks(channels, channels_at_once), blocks(size[1] * size[2], block), blocks(size[0], planes)
    programs = math.prod(tiles)  # of a sample
    sums = statistics.new_empty((call.fixed.shape[0], programs, 3)) if need_sums else None
    launch(
        _local_correlation_bwd_kernel,
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
        RZ=call.radius[0],
        RY=call.radius[1],
        RX=call.radius[2],
        FACTOR=call.factor,
        MOVING=moving,
        NORMALIZE=statistics is not None,
        BORDER=border,
        A=call.arithmetic,
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
        _local_correlation_through_kernel,
        (blocks(count, 1024) * x.shape[0],),
        gradient,
        x,
        statistics,
        totals,
        out,
        count,
        blocks(count, 1024),
        MAP=i,
        A=call.arithmetic,
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
