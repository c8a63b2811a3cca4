"""Warp in Triton: ``out(p) = image(A [p, 1] + u(p))`` and its gradients; the rules are those of csrc/common/warp.h.

A program owns a tile of ROWS x LANES voxels of the output grid, one voxel a thread, and marches over `steps` of them along
z (2D: y). Rows of a tile lie along x within a warp, so loads coalesce and a thread can hand what it scatters to its
neighbour. Positions, corners and weights are computed once per voxel; the loop over channels is inside.
"""

import math

import torch
import triton
import triton.language as tl

from fastreg.kernels.launch import blocks, launch

FARTHEST = tl.constexpr(2.0**29)  # |u| is capped here, where an int32 still holds p + u
# Voxels of a tile along z, y and x (2D: y and x). Those along x fill a warp, so that neighbours exchange by shuffles; a tile has
# as many voxels as a program has threads, so that every tensor has one layout. AMD's waves have 64 threads.
_TILE = (1, 8, 32)
_WARPS = 4 if torch.version.hip else 8
# Steps of a march, and the programs below which it is shortened to fill the device.
_STEPS, _ENOUGH = 8, 4096
_WIDE_FROM = 2**31
_CHUNK = 1024

_SIZES = (
    "channels in_d in_h in_w out_d out_h out_w steps n_slow n_rows n_lanes image_n image_c u_n u_c u_v out_n out_c out_v log_count"
).split()


@triton.jit
def _split(u, NEAREST: tl.constexpr, A: tl.constexpr):
    """Whole voxels and the fraction in [0, 1) of a displacement without NaN."""
    u = tl.where(u > FARTHEST, FARTHEST, u)
    u = tl.where(u < -FARTHEST, -FARTHEST, u)
    down = tl.floor(u)
    rest = u - down
    if NEAREST:
        half = down * 0.5
        carry = (rest > 0.5) | ((rest == 0.5) & (half != tl.floor(half)))
        fraction = tl.zeros_like(rest).to(A)
    else:
        # A tiny negative u has a fraction that rounds to 1.
        rest = rest.to(A)
        carry = rest >= 1.0
        fraction = tl.where(carry, 0.0, rest)
    return down.to(tl.int32) + carry.to(tl.int32), fraction


@triton.jit
def _corner(index, size, PADDING: tl.constexpr):
    """The index that a corner reads, anything where it does not exist, and whether it does."""
    exists = (index >= 0) & (index < size)
    if PADDING != "zeros":
        exists = exists | True
        if PADDING == "reflection":
            period = tl.maximum(2 * (size - 1), 1)
            index = tl.abs(index) % period
            index = tl.where(index < size, index, period - index)
        index = tl.minimum(tl.maximum(index, 0), size - 1)
    return index, exists


@triton.jit
def _axis(whole, fraction, size, stride, active, PADDING: tl.constexpr, WIDE: tl.constexpr):
    """Offsets, existence and weights (0 where absent) of the two corners along an axis; nearest leaves out the upper one."""
    low, has_low = _corner(whole, size, PADDING)
    high, has_high = _corner(whole + 1, size, PADDING)
    if WIDE:
        low, high = low.to(tl.int64), high.to(tl.int64)
    has_low = has_low & active
    has_high = has_high & active
    weights = (tl.where(has_low, 1 - fraction, 0.0), tl.where(has_high, fraction, 0.0))
    return (low * stride, high * stride), (has_low, has_high), weights


@triton.jit
def _matrix_row(affine, n, axis: tl.constexpr, ND: tl.constexpr):
    """Row of a sample's matrix less the identity, (z, y, x, 1) in fp64; NaN where any entry of the matrix is not finite."""
    SIZE: tl.constexpr = ND * (ND + 1)
    at = affine + n * SIZE
    entries = tl.arange(0, 16)
    all_entries = tl.load(at + entries, mask=entries < SIZE, other=0).to(tl.float64)
    broken = tl.sum(all_entries - all_entries, 0)
    at += axis * (ND + 1)
    row_z = broken
    if ND == 3:
        row_z = tl.load(at).to(tl.float64) - (1 if axis == 0 else 0)
    row_y = tl.load(at + ND - 2).to(tl.float64) - (1 if axis == ND - 2 else 0)
    row_x = tl.load(at + ND - 1).to(tl.float64) - (1 if axis == ND - 1 else 0)
    return row_z, row_y, row_x, tl.load(at + ND).to(tl.float64) + broken


@triton.jit
def _displacement(u, matrix, axis: tl.constexpr, u_c, at, z, y, x, active, A: tl.constexpr):
    """Displacement along an axis; with a matrix in fp64, so that what it adds keeps its digits across a volume."""
    if matrix is None:
        value = tl.load(u + axis * u_c.to(tl.int64) + at, mask=active, other=0).to(A)
    else:
        value = matrix[3] + matrix[1] * y.to(tl.float64) + matrix[2] * x.to(tl.float64)
        value += matrix[0] * z.to(tl.float64)
        if u is not None:
            value += tl.load(u + axis * u_c.to(tl.int64) + at, mask=active, other=0).to(tl.float64)
    return value


@triton.jit
def _store(pointers, value, mask):
    # The interpreter does not round fp64 to bf16.
    if pointers.dtype.element_ty == tl.bfloat16:
        value = value.to(tl.float32)
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _tile(n_slow, n_rows, n_lanes):
    """Sample and the tile's place along the march, rows and lanes."""
    tile = tl.program_id(0)
    lanes = tile % n_lanes
    tile = tile // n_lanes
    rows = tile % n_rows
    tile = tile // n_rows
    return (tile // n_slow).to(tl.int64), tile % n_slow, rows, lanes


@triton.jit
def _place(
    march, rows, lanes, out_d, out_h, out_w,
    ND: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Coordinates of a tile's voxels at one step of its march, and which of them exist."""
    row = tl.arange(0, DEPTH * ROWS)[:, None] + tl.zeros([DEPTH * ROWS, LANES], tl.int32)
    x = lanes * LANES + tl.arange(0, LANES)[None, :] + tl.zeros_like(row)
    if ND == 3:
        y = rows * ROWS + row % ROWS
        z = march * DEPTH + row // ROWS
    else:
        y = march * (DEPTH * ROWS) + row
        z = tl.zeros_like(x)
    return z, y, x, (z < out_d) & (y < out_h) & (x < out_w)


@triton.jit
def _positions(
    u, m_z, m_y, m_x, u_c, at, z, y, x, inside, ND: tl.constexpr, NEAREST: tl.constexpr, A: tl.constexpr
):
    """Cell and fraction per axis (z, y, x), which voxels have a position (no NaN), and along which axes it is capped."""
    u_y = _displacement(u, m_y, ND - 2, u_c, at, z, y, x, inside, A)
    u_x = _displacement(u, m_x, ND - 1, u_c, at, z, y, x, inside, A)
    nan = (u_y != u_y) | (u_x != u_x)
    u_z = u_y
    if ND == 3:
        u_z = _displacement(u, m_z, 0, u_c, at, z, y, x, inside, A)
        nan = nan | (u_z != u_z)
    else:
        u_z = tl.zeros_like(u_y)
    u_z = tl.where(nan, 0.0, u_z)
    u_y = tl.where(nan, 0.0, u_y)
    u_x = tl.where(nan, 0.0, u_x)
    whole_z, fraction_z = _split(u_z, NEAREST, A)
    whole_y, fraction_y = _split(u_y, NEAREST, A)
    whole_x, fraction_x = _split(u_x, NEAREST, A)
    capped = (tl.abs(u_z) >= FARTHEST, tl.abs(u_y) >= FARTHEST, tl.abs(u_x) >= FARTHEST)
    return (whole_z + z, whole_y + y, whole_x + x), (fraction_z, fraction_y, fraction_x), nan, capped


# Bytes: reads nd + C volumes, writes C; at 256^3 in fp32 and C = 1 335 MB, 0.11 ms at 3 TB/s. Arithmetic: about 330
# instructions a voxel, 0.19 ms at 28.7 T a second, so bound by them. Nothing is kept beyond inputs and output.
@triton.jit(do_not_specialize=_SIZES)
def _warp_fwd_kernel(
    image, u, affine, out, channels, in_d, in_h, in_w, out_d, out_h, out_w, steps, n_slow, n_rows, n_lanes,
    image_n, image_c, u_n, u_c, u_v, out_n, out_c, out_v,
    ND: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, NEAREST: tl.constexpr, COMPOSE: tl.constexpr, PAD: tl.constexpr,
    WIDE: tl.constexpr, A: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    n, slow, rows, lanes = _tile(n_slow, n_rows, n_lanes)
    m_z, m_y, m_x = None, None, None
    if affine is not None:
        m_y = _matrix_row(affine, n, ND - 2, ND)
        m_x = _matrix_row(affine, n, ND - 1, ND)
        if ND == 3:
            m_z = _matrix_row(affine, n, 0, ND)
    image += n * image_n
    out += n * out_n
    if u is not None:
        u += n * u_n
    ONE: tl.constexpr = 1 if NEAREST else 2
    DEEP: tl.constexpr = ONE if ND == 3 else 1
    for step in range(steps):
        z, y, x, inside = _place(
            slow * steps + step, rows, lanes, out_d, out_h, out_w, ND, DEPTH, ROWS, LANES
        )
        at = (z.to(tl.int64) * out_h + y if WIDE else z * out_h + y) * out_w + x
        cell, fraction, nan, _ = _positions(u, m_z, m_y, m_x, u_c, at * u_v, z, y, x, inside, ND, NEAREST, A)
        line = in_w.to(tl.int64) if WIDE else in_w
        off_z, _, w_z = _axis(cell[0], fraction[0], in_d, line * in_h * STRIDE, inside, PADDING, WIDE)
        off_y, _, w_y = _axis(cell[1], fraction[1], in_h, line * STRIDE, inside, PADDING, WIDE)
        off_x, _, w_x = _axis(cell[2], fraction[2], in_w, STRIDE, inside, PADDING, WIDE)
        for c in range(channels):
            source = image + c * image_c.to(tl.int64)
            value = tl.zeros([DEPTH * ROWS, LANES], A)
            for i in tl.static_range(DEEP):
                for j in tl.static_range(ONE):
                    for k in tl.static_range(ONE):
                        weight = w_y[j] * w_x[k]
                        if ND == 3:
                            weight = w_z[i] * weight
                        # A corner of weight 0 must not pass on what is not finite: it is not read.
                        corner = tl.load(source + (off_z[i] + off_y[j] + off_x[k]), mask=weight != 0, other=0)
                        value += weight * corner.to(A)
            value = tl.where(nan, float("nan"), value)
            if COMPOSE:
                value += tl.load(u + c * u_c.to(tl.int64) + at * u_v, mask=inside, other=0).to(A)
            _store(out + c * out_c.to(tl.int64) + at * out_v, value, inside)
        if PAD:
            zero = tl.zeros([DEPTH * ROWS, LANES], A).to(out.dtype.element_ty)
            tl.store(out + channels * out_c.to(tl.int64) + at * out_v, zero, mask=inside)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _exponent(largest, n, log_count):
    """Of the scale of fixed point: what 2^log_count gradients of a sample, at most 2^-52 `largest` as bits, sum to fits 62 bits."""
    exponent = ((tl.load(largest + n) >> 52) & 0x7FF) - 1023
    return tl.minimum(tl.maximum(61 - log_count - exponent, -1022), 1022)


@triton.jit
def _add(total, fixed, words_apart, offset, value, has, scale, log_count, WORDS: tl.constexpr):
    """total[offset] += value; where WORDS, in fixed point, whose sums do not depend on their order."""
    has = has & (value != 0)
    if WORDS == 0:
        tl.atomic_add(total + offset, value, mask=has, sem="relaxed")
    else:
        finite = value - value == 0
        scaled = tl.where(finite, value, 0.0).to(tl.float64) * scale
        if WORDS == 1:
            tl.atomic_add(
                fixed + offset, tl.floor(scaled + 0.5).to(tl.int64), mask=has & finite, sem="relaxed"
            )
        else:
            high = tl.floor(scaled)
            low = ((scaled - high) * _power_of_two(59 - log_count)).to(tl.int64)
            tl.atomic_add(fixed + offset, high.to(tl.int64), mask=has & finite, sem="relaxed")
            tl.atomic_add(fixed + (words_apart + offset), low, mask=has & finite, sem="relaxed")
        # A NaN or infinity in a float total that is otherwise finite gives the same in any order.
        tl.atomic_add(total + offset, value, mask=has & (finite == 0), sem="relaxed")


@triton.jit
def _halves(share, fraction):
    """Of the lower and the upper corner. A weight of 0 must not turn an infinite share into NaN."""
    return share * (1 - fraction), tl.where(fraction != 0, share * fraction, 0.0)


@triton.jit
def _pair(source, offset, off_x, stride, has, has_x, fraction, A: tl.constexpr):
    """Slope and interpolated value between two corners along x; absent ones are 0."""
    low = tl.load(source + (offset + off_x[0]) * stride, mask=has & has_x[0], other=0).to(A)
    high = tl.load(source + (offset + off_x[1]) * stride, mask=has & has_x[1], other=0).to(A)
    return high - low, low + fraction * (high - low)


@triton.jit
def _store_row(grad_affine, sum, march, other, x, ND: tl.constexpr):
    """Row of a tile's share of the gradient to a matrix: sums over voxels of g (z, y, x, 1), those of `march` included."""
    tl.store(grad_affine, tl.sum(march))
    if ND == 3:
        tl.store(grad_affine + 1, tl.sum(sum * other.to(tl.float64)))
    tl.store(grad_affine + (ND - 1), tl.sum(sum * x.to(tl.float64)))
    tl.store(grad_affine + ND, tl.sum(sum))


# Both gradients in one pass. To the position: du_k = sum_c g_c (the interpolant of channel c differentiated along k). To the
# image: g times its weights, added by atomics where that is not 0. A voxel whose cell follows that of its neighbour along
# x takes over what the neighbour would add to the corners that they share, so a smooth displacement costs 2^(nd-1)
# atomics a voxel and channel instead of 2^nd.
# Bytes: reads nd + 2C volumes, writes nd + C, clears C and reads C once more for the atomics; at 256^3 in fp32 and C = 1
# 670 MB, 0.22 ms at 3 TB/s, beside 67 M atomics in L2, about 0.15 ms. Arithmetic: about 600 instructions a voxel,
# 0.35 ms at 28.7 T a second, so bound by them. Memory beyond inputs and gradients: a volume of the image in fp32 for halves, two of the image in
# its arithmetic type for bit-reproducible sums, and 12 numbers a program for a matrix.
@triton.jit(do_not_specialize=[*_SIZES, "words_apart"])
def _warp_bwd_kernel(
    grad, image, u, affine, grad_image, fixed, largest, grad_u, grad_affine,
    channels, in_d, in_h, in_w, out_d, out_h, out_w, steps, n_slow, n_rows, n_lanes,
    image_n, image_c, u_n, u_c, u_v, words_apart, log_count,
    ND: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, NEAREST: tl.constexpr, COMPOSE: tl.constexpr, WIDE: tl.constexpr,
    WORDS: tl.constexpr, A: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    n, slow, rows, lanes = _tile(n_slow, n_rows, n_lanes)
    m_z, m_y, m_x = None, None, None
    if affine is not None:
        m_y = _matrix_row(affine, n, ND - 2, ND)
        m_x = _matrix_row(affine, n, ND - 1, ND)
        if ND == 3:
            m_z = _matrix_row(affine, n, 0, ND)
    if u is not None:
        u += n * u_n
    n_in = in_d.to(tl.int64) * in_h * in_w
    n_out = out_d.to(tl.int64) * out_h * out_w
    image += n * image_n
    grad += n * channels * n_out
    GATHER: tl.constexpr = grad_u is not None or grad_affine is not None
    SCATTER: tl.constexpr = grad_image is not None
    scale = 0.0
    if SCATTER:
        grad_image += n * channels * n_in
        if WORDS > 0:
            fixed += n * channels * n_in
            scale = _power_of_two(_exponent(largest, n, log_count))
    ONE: tl.constexpr = 1 if NEAREST else 2
    DEEP: tl.constexpr = ONE if ND == 3 else 1
    lane = tl.arange(0, LANES)[None, :] + tl.zeros([DEPTH * ROWS, LANES], tl.int32)
    before, after = tl.maximum(lane - 1, 0), tl.minimum(lane + 1, LANES - 1)
    if grad_affine is not None:
        zero = tl.zeros([DEPTH * ROWS, LANES], tl.float64)
        plain_z, plain_y, plain_x, march_z, march_y, march_x = zero, zero, zero, zero, zero, zero
    for step in range(steps):
        z, y, x, inside = _place(
            slow * steps + step, rows, lanes, out_d, out_h, out_w, ND, DEPTH, ROWS, LANES
        )
        at = (z.to(tl.int64) * out_h + y if WIDE else z * out_h + y) * out_w + x
        cell, fraction, nan, capped = _positions(
            u, m_z, m_y, m_x, u_c, at * u_v, z, y, x, inside, ND, NEAREST, A
        )
        active = inside & (nan == 0)
        # In voxels: the image may be strided, its gradient is not.
        line = in_w.to(tl.int64) if WIDE else in_w
        off_z, has_z, _ = _axis(cell[0], fraction[0], in_d, line * in_h, active, PADDING, WIDE)
        off_y, has_y, _ = _axis(cell[1], fraction[1], in_h, line, active, PADDING, WIDE)
        off_x, has_x, _ = _axis(cell[2], fraction[2], in_w, 1, active, PADDING, WIDE)
        f_z, f_y, f_x = fraction
        if SCATTER and not NEAREST:
            follows = active & (lane > 0) & (cell[2] == tl.gather(cell[2], before, 1) + 1)
            follows &= cell[1] == tl.gather(cell[1], before, 1)
            if ND == 3:
                follows &= cell[0] == tl.gather(cell[0], before, 1)
            followed = (lane < LANES - 1) & (tl.gather(follows.to(tl.int32), after, 1) != 0)
        du_z = tl.zeros([DEPTH * ROWS, LANES], A)
        du_y, du_x = du_z, du_z
        for c in range(channels):
            g = tl.load(grad + c * n_out + at, mask=active, other=0).to(A)
            if GATHER:
                source = image + c * image_c.to(tl.int64)
                d0, e0 = _pair(source, off_z[0] + off_y[0], off_x, STRIDE, has_z[0] & has_y[0], has_x, f_x, A)
                d1, e1 = _pair(source, off_z[0] + off_y[1], off_x, STRIDE, has_z[0] & has_y[1], has_x, f_x, A)
                d_x, d_y = d0 + f_y * (d1 - d0), e1 - e0
                if ND == 3:
                    near = e0 + f_y * d_y
                    d2, e2 = _pair(
                        source, off_z[1] + off_y[0], off_x, STRIDE, has_z[1] & has_y[0], has_x, f_x, A
                    )
                    d3, e3 = _pair(
                        source, off_z[1] + off_y[1], off_x, STRIDE, has_z[1] & has_y[1], has_x, f_x, A
                    )
                    du_z += g * (e2 + f_y * (e3 - e2) - near)
                    d_x += f_z * (d2 + f_y * (d3 - d2) - d_x)
                    d_y += f_z * (e3 - e2 - d_y)
                du_y += g * d_y
                du_x += g * d_x
            if SCATTER:
                total = grad_image + c * n_in
                words = fixed
                if WORDS > 0:
                    words = fixed + c * n_in
                planes = _halves(g, f_z)
                for i in tl.static_range(DEEP):
                    lines = _halves(planes[i] if ND == 3 else g, f_y)
                    for j in tl.static_range(ONE):
                        low, high = _halves(lines[j], f_x)
                        offset, has = off_z[i] + off_y[j], has_z[i] & has_y[j]
                        if not NEAREST:
                            low += tl.where(follows, tl.gather(high, before, 1), 0.0)
                            high = tl.where(followed, 0.0, high)
                            at_high, has_high = offset + off_x[1], has & has_x[1]
                            _add(total, words, words_apart, at_high, high, has_high, scale, log_count, WORDS)
                        offset, has = offset + off_x[0], has & has_x[0]
                        _add(total, words, words_apart, offset, low, has, scale, log_count, WORDS)
        if GATHER:
            # Where u is capped it is constant.
            du_y, du_x = tl.where(capped[1], 0.0, du_y), tl.where(capped[2], 0.0, du_x)
            du_z = tl.where(capped[0], 0.0, du_z)
            if COMPOSE:
                du_y += tl.load(grad + (ND - 2) * n_out + at, mask=inside, other=0).to(A)
                du_x += tl.load(grad + (ND - 1) * n_out + at, mask=inside, other=0).to(A)
                if ND == 3:
                    du_z += tl.load(grad + at, mask=inside, other=0).to(A)
            if grad_u is not None:
                target = grad_u + n * ND * n_out
                _store(target + (ND - 2) * n_out + at, du_y, inside)
                _store(target + (ND - 1) * n_out + at, du_x, inside)
                if ND == 3:
                    _store(target + at, du_z, inside)
            if grad_affine is not None:
                along = (z if ND == 3 else y).to(tl.float64)
                plain_y += du_y.to(tl.float64)
                plain_x += du_x.to(tl.float64)
                march_y += du_y.to(tl.float64) * along
                march_x += du_x.to(tl.float64) * along
                if ND == 3:
                    plain_z += du_z.to(tl.float64)
                    march_z += du_z.to(tl.float64) * along
    if grad_affine is not None:
        z, y, x, inside = _place(slow * steps, rows, lanes, out_d, out_h, out_w, ND, DEPTH, ROWS, LANES)
        share = grad_affine + tl.program_id(0).to(tl.int64) * (ND * (ND + 1))
        _store_row(share + (ND - 2) * (ND + 1), plain_y, march_y, y, x, ND)
        _store_row(share + (ND - 1) * (ND + 1), plain_x, march_x, y, x, ND)
        if ND == 3:
            _store_row(share, plain_z, march_z, y, x, ND)


@triton.jit(do_not_specialize=["n_each", "n_chunks"])
def _largest_kernel(grad, largest, n_each, n_chunks, BLOCK: tl.constexpr):
    """The largest finite |grad| of each sample, as the bits of an fp64, which are ordered as it is."""
    n = (tl.program_id(0) // n_chunks).to(tl.int64)
    at = (tl.program_id(0) % n_chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.abs(tl.load(grad + n * n_each + at, mask=at < n_each, other=0).to(tl.float64))
    g = tl.where(g - g == 0, g, 0.0)
    tl.atomic_max(largest + n, tl.max(g, 0).to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit(do_not_specialize=["n_each", "n_chunks", "words_apart", "log_count"])
def _from_fixed_kernel(
    fixed, largest, total, n_each, n_chunks, words_apart, log_count, WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    """total += fixed, which is as _add leaves it."""
    n = (tl.program_id(0) // n_chunks).to(tl.int64)
    at = (tl.program_id(0) % n_chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_each
    at += n * n_each
    value = tl.load(fixed + at, mask=inside, other=0).to(tl.float64)
    if WORDS == 2:
        low = tl.load(fixed + words_apart + at, mask=inside, other=0).to(tl.float64)
        value += low * _power_of_two(log_count - 59)
    value *= _power_of_two(-_exponent(largest, n, log_count))
    value += tl.load(total + at, mask=inside, other=0).to(tl.float64)
    tl.store(total + at, value.to(total.dtype.element_ty), mask=inside)


_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def arithmetic_of(*tensors):
    return (
        torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    )


def _strides(t):
    """Of (N, C, *spatial), contiguous or with the channels of a voxel side by side: along samples, channels and voxels."""
    n_voxels = math.prod(t.shape[2:])
    if t.is_contiguous():
        return t.shape[1] * n_voxels, n_voxels, 1
    return t.stride(0), t.stride(1), t.stride(-1)


class Call:
    """The tensors of a call and what its launches have in common. What is not a field of integrate_velocity is contiguous."""

    def __init__(self, image, u, affine, mode, padding, compose=False):
        nd = image.dim() - 2
        spatial = (image if u is None else u).shape[2:]
        sizes = [*[1] * (3 - nd), *image.shape[2:], *[1] * (3 - nd), *spatial]
        if max(sizes) >= 2**29:
            raise ValueError("fastreg::warp: an axis must be shorter than 2^29")
        self.image, self.u, self.affine = image, u, affine
        self.n_in, self.n_out = math.prod(image.shape[2:]), math.prod(spatial)
        d, h, w = sizes[3:]
        depth, rows, lanes = _TILE
        n_lanes = blocks(w, lanes)
        n_march, n_rows = (blocks(d, depth), blocks(h, rows)) if nd == 3 else (blocks(h, depth * rows), 1)
        steps = min(_STEPS, n_march, max(1, image.shape[0] * n_march * n_rows * n_lanes // _ENOUGH))
        march = (steps, blocks(n_march, steps), n_rows, n_lanes)
        self.tiles = (image.shape[0], math.prod(march[1:]))
        self.grid = (math.prod(self.tiles),)
        *image_strides, image_stride = _strides(image)
        u_strides = (0, 0, 0) if u is None else _strides(u)
        self.arguments = (image.shape[1], *sizes, *march, *image_strides, *u_strides)
        furthest = max(self.n_in * image_stride, self.n_out * u_strides[2], self.n_out)
        self.options = {
            "ND": nd,
            "STRIDE": image_stride,
            "PADDING": padding,
            "NEAREST": mode == "nearest",
            "COMPOSE": compose,
            "WIDE": furthest >= _WIDE_FROM,
            "DEPTH": depth,
            "ROWS": rows,
            "LANES": lanes,
            "num_warps": _WARPS,
            "num_stages": 1,
        }

    def forward(self, out, arithmetic, pad=False):
        strides = _strides(out)
        wide = self.options["WIDE"] or self.n_out * strides[2] >= _WIDE_FROM
        arguments = (self.image, self.u, self.affine, out, *self.arguments, *strides)
        options = self.options | {"WIDE": wide, "PAD": pad, "A": _TYPES[arithmetic]}
        launch(_warp_fwd_kernel, self.grid, *arguments, **options)

    def backward(self, grad, arithmetic, grad_image=None, grad_u=None, grad_affine=None):
        """Adds to grad_image, which is of the arithmetic type, and fills the others."""
        words, fixed, largest = 0, None, None
        # No voxel sums more than all gradients of its sample: the weights of each add up to 1.
        log_count = max(self.n_out - 1, 1).bit_length()
        n_each, n_words = self.image.shape[1] * self.n_in, self.image.numel()
        if grad_image is not None and torch.are_deterministic_algorithms_enabled():
            words = 1 if arithmetic == torch.float32 else 2
            fixed = torch.zeros((words, n_words), dtype=torch.int64, device=grad.device)
            largest = torch.zeros(grad.shape[0], dtype=torch.int64, device=grad.device)
            n_grad = grad[0].numel()
            n_chunks = blocks(n_grad, _CHUNK)
            arguments = (grad, largest, n_grad, n_chunks)
            launch(_largest_kernel, (grad.shape[0] * n_chunks,), *arguments, BLOCK=_CHUNK)
        arguments = (grad, self.image, self.u, self.affine, grad_image, fixed, largest, grad_u, grad_affine)
        options = self.options | {"WORDS": words, "A": _TYPES[arithmetic]}
        launch(_warp_bwd_kernel, self.grid, *arguments, *self.arguments, n_words, log_count, **options)
        if words:
            n_chunks = blocks(n_each, _CHUNK)
            arguments = (fixed, largest, grad_image, n_each, n_chunks, n_words, log_count)
            launch(_from_fixed_kernel, (grad.shape[0] * n_chunks,), *arguments, WORDS=words, BLOCK=_CHUNK)


def contiguous(*tensors):
    return (t if t is None else t.contiguous() for t in tensors)


def check(op, image, u, affine):
    """What the kernels would read beyond; the public function says what is wrong."""
    n, nd = image.shape[0], image.dim() - 2
    if (
        nd not in (2, 3)
        or (u is None and affine is None)
        or (u is not None and (u.dim() != nd + 2 or u.shape[:2] != (n, nd)))
        or (affine is not None and affine.shape != (n, nd, nd + 1))
    ):
        raise ValueError(f"fastreg::{op}: the shapes of image, displacement and affine do not fit")


def warp(image, displacement, affine, mode, padding):
    check("warp", image, displacement, affine)
    image, u, affine = contiguous(image, displacement, affine)
    out = image.new_empty((*image.shape[:2], *(image if u is None else u).shape[2:]))
    if out.numel() == 0 or image.numel() == 0:
        return out.zero_()
    Call(image, u, affine, mode, padding).forward(out, arithmetic_of(image, u))
    return out


def warp_bwd(grad, image, displacement, affine, mode, padding, need_image, need_displacement, need_affine):
    check("warp_bwd", image, displacement, affine)
    grad, image, u, affine = contiguous(grad, image, displacement, affine)
    if grad.shape != (*image.shape[:2], *(image if u is None else u).shape[2:]):
        raise ValueError("fastreg::warp_bwd: grad must have the shape of the output")
    if (need_displacement and u is None) or (need_affine and affine is None):
        raise ValueError("fastreg::warp_bwd: a gradient must be to a tensor that is given")
    arithmetic = arithmetic_of(image, u)
    grad_image = torch.zeros_like(image, dtype=arithmetic) if need_image else None
    gather = mode == "linear" and grad.numel() > 0 and image.numel() > 0
    grad_u = (torch.empty_like if gather else torch.zeros_like)(u) if need_displacement else None
    grad_affine = torch.zeros_like(affine) if need_affine else None
    if grad.numel() and image.numel() and (need_image or (gather and (need_displacement or need_affine))):
        call = Call(image, u, affine, mode, padding)
        shares = None
        if gather and need_affine:
            shares = torch.empty((*call.tiles, *affine.shape[1:]), dtype=torch.float64, device=grad.device)
        call.backward(grad, arithmetic, grad_image, grad_u if gather else None, shares)
        if shares is not None:
            grad_affine = shares.sum(1).to(affine.dtype)
    if need_image:
        grad_image = grad_image.to(image.dtype)
    return tuple(grad.new_zeros(0) if g is None else g for g in (grad_image, grad_u, grad_affine))
