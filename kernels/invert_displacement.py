"""invert_displacement in Triton: Newton's method at each point, and the adjoint of one step; csrc/common/invert_displacement.h says
the rules.

A program has BLOCK points that follow each other along x and iterates until all of them are done. u is read as it is stored,
planar: packing it would be a kernel more, and a step after the first finds its corners in L1 and L2.
"""

import math

import torch
import triton
import triton.language as tl

from fastreg.kernels.launch import TYPES, arithmetic_of, blocks, contiguous, launch
from fastreg.kernels.warp_sampling import _split, corners, store

BLOCK, WARPS = 128, 4
DEGENERATE = tl.constexpr(1e-3)
SIZES = "in_d in_h in_w out_h out_w count n_blocks iterations".split()


@triton.jit
def _times(weight, value):
    """What has no weight passes nothing on that is not finite."""
    return tl.where(weight != 0, weight * value, 0.0)


@triton.jit
def _between(near, far, fraction):
    return _times(1 - fraction, near) + _times(fraction, far)


@triton.jit
def _line(source, offset, has, off_x, has_x, A: tl.constexpr):
    low = tl.load(source + (offset + off_x[0]), mask=has & has_x[0], other=0).to(A)
    high = tl.load(source + (offset + off_x[1]), mask=has & has_x[1], other=0).to(A)
    return low, high


@triton.jit
def _plane(source, off_z, has_z, off_y, has_y, off_x, has_x, f_y, f_x, A: tl.constexpr):
    """Of four corners: the value between them, its slopes along y and x, and the corners."""
    a0, b0 = _line(source, off_z + off_y[0], has_z & has_y[0], off_x, has_x, A)
    a1, b1 = _line(source, off_z + off_y[1], has_z & has_y[1], off_x, has_x, A)
    value = _between(_between(a0, b0, f_x), _between(a1, b1, f_x), f_y)
    slopes = (_between(a1 - a0, b1 - b0, f_x), _between(b0 - a0, b1 - a1, f_y))
    return value, slopes, (a0, b0, a1, b1)


@triton.jit
def _component(source, off, has, f, ND: tl.constexpr, A: tl.constexpr):
    """A component of u, and its slopes along z, y and x."""
    f_z, f_y, f_x = f
    value, slopes, near = _plane(source, off[0][0], has[0][0], off[1], has[1], off[2], has[2], f_y, f_x, A)
    d_z, d_y, d_x = tl.zeros_like(value), slopes[0], slopes[1]
    if ND == 3:
        far_value, far_slopes, far = _plane(
            source, off[0][1], has[0][1], off[1], has[1], off[2], has[2], f_y, f_x, A
        )
        low = _between(far[0] - near[0], far[1] - near[1], f_x)
        high = _between(far[2] - near[2], far[3] - near[3], f_x)
        d_z = _between(low, high, f_y)
        value = _between(value, far_value, f_z)
        d_y = _between(d_y, far_slopes[0], f_z)
        d_x = _between(d_x, far_slopes[1], f_z)
    return value, d_z, d_y, d_x


@triton.jit
def _linearised(
    u, whole, rest, v, in_d, in_h, in_w, active,
    ND: tl.constexpr, PADDING: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """u at the position whole + rest + v, components z, y, x (2D: z is 0), each with its slopes."""
    s_z, s_y, s_x = rest[0] + v[0], rest[1] + v[1], rest[2] + v[2]
    nan = (s_z != s_z) | (s_y != s_y) | (s_x != s_x)
    w_z, f_z = _split(tl.where(nan, 0.0, s_z), False, A)
    w_y, f_y = _split(tl.where(nan, 0.0, s_y), False, A)
    w_x, f_x = _split(tl.where(nan, 0.0, s_x), False, A)
    line = in_w.to(tl.int64) if WIDE else in_w
    here = active & (nan == 0)
    off_z, has_z, _ = corners(w_z + whole[0], f_z, in_d, line * in_h, here, PADDING, WIDE)
    off_y, has_y, _ = corners(w_y + whole[1], f_y, in_h, line, here, PADDING, WIDE)
    off_x, has_x, _ = corners(w_x + whole[2], f_x, in_w, 1, here, PADDING, WIDE)
    off, has, f = (off_z, off_y, off_x), (has_z, has_y, has_x), (f_z, f_y, f_x)
    volume = in_d.to(tl.int64) * in_h * in_w
    y = _component(u + (ND - 2) * volume, off, has, f, ND, A)
    x = _component(u + (ND - 1) * volume, off, has, f, ND, A)
    zero = tl.zeros_like(f_x)
    z = (zero, zero, zero, zero)
    if ND == 3:
        z = _component(u, off, has, f, ND, A)
    bad = tl.where(nan, float("nan"), 0.0).to(A)
    return z[0] + bad, y[0] + bad, x[0] + bad, z, y, x


@triton.jit
def _adjugate(z, y, x):
    """Rows of the adjugate of I + J and the determinant; z, y, x: components with their slopes (2D: those of z are 0)."""
    # Columns.
    a0, a1, a2 = z[1] + 1, y[1], x[1]
    b0, b1, b2 = z[2], y[2] + 1, x[2]
    c0, c1, c2 = z[3], y[3], x[3] + 1
    row_z = (b1 * c2 - b2 * c1, b2 * c0 - b0 * c2, b0 * c1 - b1 * c0)
    row_y = (c1 * a2 - c2 * a1, c2 * a0 - c0 * a2, c0 * a1 - c1 * a0)
    row_x = (a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0)
    return row_z, row_y, row_x, a0 * row_z[0] + a1 * row_z[1] + a2 * row_z[2]


@triton.jit
def _where(pick, a, b):
    return tl.where(pick, a[0], b[0]), tl.where(pick, a[1], b[1]), tl.where(pick, a[2], b[2])


@triton.jit
def _points(points, n, at, out_h, out_w, count, active, ND: tl.constexpr, A: tl.constexpr):
    """Whole voxels and rest of the points of a block."""
    x, y, z = (
        (at % out_w).to(tl.int32),
        ((at // out_w) % out_h).to(tl.int32),
        (at // out_w // out_h).to(tl.int32),
    )
    zero = tl.zeros([at.shape[0]], A)
    if points is None:
        return (z, y, x), (zero, zero, zero)
    else:
        first = points + n * ND * count + at
        p_y = tl.load(first + (ND - 2) * count, mask=active, other=0).to(A)
        p_x = tl.load(first + (ND - 1) * count, mask=active, other=0).to(A)
        p_z = zero
        if ND == 3:
            p_z = tl.load(first, mask=active, other=0).to(A)
        # A NaN stays in the rest.
        w_z, f_z = _split(tl.where(p_z == p_z, p_z, 0.0), False, A)
        w_y, f_y = _split(tl.where(p_y == p_y, p_y, 0.0), False, A)
        w_x, f_x = _split(tl.where(p_x == p_x, p_x, 0.0), False, A)
        rest = (
            tl.where(p_z == p_z, f_z, p_z),
            tl.where(p_y == p_y, f_y, p_y),
            tl.where(p_x == p_x, f_x, p_x),
        )
        return (w_z, w_y, w_x), rest


@triton.jit
def _block(n_blocks, count, BLOCK: tl.constexpr):
    """Sample, index of the points in it, and which there are."""
    program = tl.program_id(0)
    at = (program % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return (program // n_blocks).to(tl.int64), at, at < count


@triton.jit
def _store3(out, n, at, count, value, active, ND: tl.constexpr):
    first = out + n * ND * count + at
    store(first + (ND - 2) * count, value[1], active)
    store(first + (ND - 1) * count, value[2], active)
    if ND == 3:
        store(first, value[0], active)


# Bytes: u read, v written: at 256^3 in fp32 400 MB, 0.13 ms at 3 TB/s; 24 loads of 4 bytes a step, of which a warp's
# share lines: about 60 lines, 0.14 ms of L1 a step. Arithmetic: about 350 instructions a step, 3 steps of a smooth field, 0.6 ms
# at 28.7 T a second, so bound by them. Memory: v alone.
@triton.jit(do_not_specialize=SIZES)
def invert_kernel(
    u, points, out, in_d, in_h, in_w, out_h, out_w, count, n_blocks, iterations,
    ND: tl.constexpr, PADDING: tl.constexpr, WIDE: tl.constexpr, GOOD: tl.constexpr, A: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n, at, there = _block(n_blocks, count, BLOCK)
    whole, rest = _points(points, n, at, out_h, out_w, count, there, ND, A)
    u += n * ND * (in_d.to(tl.int64) * in_h * in_w)
    zero = tl.zeros([BLOCK], A)
    nan, infinite = zero + float("nan"), zero + float("inf")
    guess, base, step, v = (zero, zero, zero), (zero, zero, zero), (zero, zero, zero), (nan, nan, nan)
    share, fall, least = zero + 1, infinite, infinite
    active, taken = there, 0
    while (taken <= iterations) & (tl.max(active.to(tl.int32), 0) > 0):
        u_z, u_y, u_x, z, y, x = _linearised(
            u, whole, rest, guess, in_d, in_h, in_w, active, ND, PADDING, WIDE, A
        )
        r = (u_z + guess[0], u_y + guess[1], u_x + guess[2])
        size_z, size_y, size_x = tl.abs(r[0]), tl.abs(r[1]), tl.abs(r[2])
        largest = tl.where((size_y > size_z) | (size_y != size_y), size_y, size_z)
        largest = tl.where((size_x > largest) | (size_x != size_x), size_x, largest)
        row_z, row_y, row_x, determinant = _adjugate(z, y, x)
        regular = tl.abs(determinant) >= DEGENERATE
        scale = 1 / tl.where(regular, determinant, 1.0)
        newton = (
            (row_z[0] * r[0] + row_z[1] * r[1] + row_z[2] * r[2]) * scale,
            (row_y[0] * r[0] + row_y[1] * r[1] + row_y[2] * r[2]) * scale,
            (row_x[0] * r[0] + row_x[1] * r[1] + row_x[2] * r[2]) * scale,
        )
        falls = largest < fall
        done = falls & (largest <= GOOD)
        better = active & falls & (largest < least)
        halve = (falls == 0) & (share > 0.125)
        again = (falls == 0) & (share <= 0.125)
        finite = largest < float("inf")
        dead = (halve & (least == float("inf"))) | (again & (finite == 0))
        half = (r[0] * 0.5, r[1] * 0.5, r[2] * 0.5)
        step = _where(falls, _where(regular, newton, r), _where(again, half, step))
        end = (guess[0] - step[0], guess[1] - step[1], guess[2] - step[2])
        v = _where(better, _where(done & regular, end, guess), v)
        least = tl.where(better, largest, least)
        active = active & (done == 0) & (dead == 0)
        base = _where(falls | again, guess, base)
        fall = tl.where(falls, largest, tl.where(again, infinite, fall))
        share = tl.where(halve, share * 0.5, 1.0)
        guess = (base[0] - share * step[0], base[1] - share * step[1], base[2] - share * step[2])
        taken += 1
    _store3(out, n, at, count, v, there, ND)


# Bytes: u, v and grad read, one field written: at 256^3 in fp32 800 MB, 0.27 ms at 3 TB/s. Arithmetic: 380 instructions,
# 0.22 ms. Memory: the result alone.
@triton.jit(do_not_specialize=SIZES)
def invert_adjoint_kernel(
    grad, v, u, points, out, in_d, in_h, in_w, out_h, out_w, count, n_blocks,
    ND: tl.constexpr, PADDING: tl.constexpr, WIDE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, at, there = _block(n_blocks, count, BLOCK)
    whole, rest = _points(points, n, at, out_h, out_w, count, there, ND, A)
    u += n * ND * (in_d.to(tl.int64) * in_h * in_w)
    zero = tl.zeros([BLOCK], A)
    first = n * ND * count + at
    v_y = tl.load(v + first + (ND - 2) * count, mask=there, other=0).to(A)
    v_x = tl.load(v + first + (ND - 1) * count, mask=there, other=0).to(A)
    g_y = tl.load(grad + first + (ND - 2) * count, mask=there, other=0).to(A)
    g_x = tl.load(grad + first + (ND - 1) * count, mask=there, other=0).to(A)
    v_z, g_z = zero, zero
    if ND == 3:
        v_z = tl.load(v + first, mask=there, other=0).to(A)
        g_z = tl.load(grad + first, mask=there, other=0).to(A)
    u_z, _, _, z, y, x = _linearised(
        u, whole, rest, (v_z, v_y, v_x), in_d, in_h, in_w, there, ND, PADDING, WIDE, A
    )
    row_z, row_y, row_x, d = _adjugate(z, y, x)
    d = tl.where(tl.abs(d) < DEGENERATE, tl.where(d < 0, -DEGENERATE, DEGENERATE), d)
    scale = -1 / d + (u_z - u_z)
    q = (
        (g_z * row_z[0] + g_y * row_y[0] + g_x * row_x[0]) * scale,
        (g_z * row_z[1] + g_y * row_y[1] + g_x * row_x[1]) * scale,
        (g_z * row_z[2] + g_y * row_y[2] + g_x * row_x[2]) * scale,
    )
    _store3(out, n, at, count, q, there, ND)


class _Call:
    def __init__(self, op, u, points, padding):
        nd = u.dim() - 2
        if nd not in (2, 3) or u.shape[1] != nd:
            raise ValueError(f"fastreg::{op}: u must have shape (N, nd, *spatial)")
        if points is not None and (points.dim() != u.dim() or points.shape[:2] != u.shape[:2]):
            raise ValueError(f"fastreg::{op}: points must have shape (N, nd, *spatial)")
        self.arithmetic = arithmetic_of(u, points)
        self.u, self.points = contiguous(u, points)
        self.shape = (u if points is None else points).shape
        size, out = u.shape[2:], self.shape[2:]
        if max(*size, *out) >= 2**29:
            raise ValueError(f"fastreg::{op}: an axis must be shorter than 2^29")
        if math.prod(self.shape) and not math.prod(size):
            raise ValueError(f"fastreg::{op}: u must not have an empty spatial axis")
        self.count = math.prod(out)
        self.sizes = (*[1] * (3 - nd), *size, *out[-2:], self.count, blocks(self.count, BLOCK))
        self.options = {
            "ND": nd,
            "PADDING": padding,
            "WIDE": math.prod(size) >= 2**31,
            "A": TYPES[self.arithmetic],
            "BLOCK": BLOCK,
            "num_warps": WARPS,
            "num_stages": 1,
        }

    def start(self, kernel, before, after, **options):
        out = torch.empty(self.shape, dtype=self.arithmetic, device=self.u.device)
        if out.numel():
            grid = (self.shape[0] * blocks(self.count, BLOCK),)
            arguments = (*before, self.u, self.points, out, *self.sizes, *after)
            launch(kernel, grid, *arguments, **self.options, **options)
        return out


def invert_displacement(u, points, padding, iterations):
    call = _Call("invert_displacement", u, points, padding)
    good = 1e-6 if call.arithmetic == torch.float64 else 1e-3
    return call.start(invert_kernel, (), (iterations,), GOOD=good)


def invert_displacement_adjoint(grad, v, u, points, padding):
    call = _Call("invert_displacement_adjoint", u, points, padding)
    if not grad.shape == v.shape == call.shape:
        raise ValueError(
            "fastreg::invert_displacement_adjoint: grad and v must have the shape of what is returned"
        )
    grad, v = contiguous(grad, v)
    return call.start(invert_adjoint_kernel, (grad, v), ())
