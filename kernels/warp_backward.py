"""Both gradients of a warp."""

import triton
import triton.language as tl

from fastreg.kernels.warp_sampling import SIZES, corners, matrix_of, place, positions, store, tile_of_program
from fastreg.kernels.warp_scatter import add, power_of_two, scale_exponent


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
@triton.jit(do_not_specialize=[*SIZES, "words_apart"])
def warp_bwd_kernel(
    grad, image, u, affine, grad_image, fixed, largest, grad_u, grad_affine,
    channels, in_d, in_h, in_w, out_d, out_h, out_w, steps, n_slow, n_rows, n_lanes,
    image_n, image_c, u_n, u_c, u_v, words_apart, log_count,
    ND: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, NEAREST: tl.constexpr, COMPOSE: tl.constexpr, WIDE: tl.constexpr,
    WORDS: tl.constexpr, A: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    n, slow, rows, lanes = tile_of_program(n_slow, n_rows, n_lanes)
    matrix = matrix_of(affine, n, ND)
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
            scale = power_of_two(scale_exponent(largest, n, log_count))
    ONE: tl.constexpr = 1 if NEAREST else 2
    DEEP: tl.constexpr = ONE if ND == 3 else 1
    lane = tl.arange(0, LANES)[None, :] + tl.zeros([DEPTH * ROWS, LANES], tl.int32)
    before, after = tl.maximum(lane - 1, 0), tl.minimum(lane + 1, LANES - 1)
    if grad_affine is not None:
        zero = tl.zeros([DEPTH * ROWS, LANES], tl.float64)
        plain_z, plain_y, plain_x, march_z, march_y, march_x = zero, zero, zero, zero, zero, zero
    for step in range(steps):
        z, y, x, inside = place(slow * steps + step, rows, lanes, out_d, out_h, out_w, ND, DEPTH, ROWS, LANES)
        at = (z.to(tl.int64) * out_h + y if WIDE else z * out_h + y) * out_w + x
        cell, fraction, nan, capped = positions(
            u, affine, matrix, u_c, at * u_v, z, y, x, inside, ND, NEAREST, A
        )
        active = inside & (nan == 0)
        # In voxels: the image may be strided, its gradient is not.
        line = in_w.to(tl.int64) if WIDE else in_w
        off_z, has_z, _ = corners(cell[0], fraction[0], in_d, line * in_h, active, PADDING, WIDE)
        off_y, has_y, _ = corners(cell[1], fraction[1], in_h, line, active, PADDING, WIDE)
        off_x, has_x, _ = corners(cell[2], fraction[2], in_w, 1, active, PADDING, WIDE)
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
                            add(total, words, words_apart, at_high, high, has_high, scale, log_count, WORDS)
                        offset, has = offset + off_x[0], has & has_x[0]
                        add(total, words, words_apart, offset, low, has, scale, log_count, WORDS)
        if GATHER:
            # Where u is capped, and beyond the border, what is read is constant.
            du_z = tl.where(capped[0] | (off_z[0] == off_z[1]), 0.0, du_z)
            du_y = tl.where(capped[1] | (off_y[0] == off_y[1]), 0.0, du_y)
            du_x = tl.where(capped[2] | (off_x[0] == off_x[1]), 0.0, du_x)
            if COMPOSE:
                du_y += tl.load(grad + (ND - 2) * n_out + at, mask=inside, other=0).to(A)
                du_x += tl.load(grad + (ND - 1) * n_out + at, mask=inside, other=0).to(A)
                if ND == 3:
                    du_z += tl.load(grad + at, mask=inside, other=0).to(A)
            if grad_u is not None:
                target = grad_u + n * ND * n_out
                store(target + (ND - 2) * n_out + at, du_y, inside)
                store(target + (ND - 1) * n_out + at, du_x, inside)
                if ND == 3:
                    store(target + at, du_z, inside)
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
        z, y, x, inside = place(slow * steps, rows, lanes, out_d, out_h, out_w, ND, DEPTH, ROWS, LANES)
        share = grad_affine + tl.program_id(0).to(tl.int64) * (ND * (ND + 1))
        _store_row(share + (ND - 2) * (ND + 1), plain_y, march_y, y, x, ND)
        _store_row(share + (ND - 1) * (ND + 1), plain_x, march_x, y, x, ND)
        if ND == 3:
            _store_row(share, plain_z, march_z, y, x, ND)
