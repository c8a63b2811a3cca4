"""Where the voxels of a warp read, and its forward. Positions: a displacement's whole voxels as int32, its fraction apart."""

import triton
import triton.language as tl

FARTHEST = tl.constexpr(2.0**29)  # |u| is capped here, where an int32 still holds p + u
# Sizes and strides: kernels that know them as constants would be many.
SIZES = (
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
def corners(whole, fraction, size, stride, active, PADDING: tl.constexpr, WIDE: tl.constexpr):
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
def matrix_of(affine, n, ND: tl.constexpr):
    """Rows z, y and x of a sample's matrix, unless affine is None."""
    if affine is None:
        return 0.0, 0.0, 0.0
    else:
        y, x = _matrix_row(affine, n, ND - 2, ND), _matrix_row(affine, n, ND - 1, ND)
        z = y
        if ND == 3:
            z = _matrix_row(affine, n, 0, ND)
        return z, y, x


@triton.jit
def _displacement(
    u, affine, matrix, row: tl.constexpr, axis: tl.constexpr, u_c, at, z, y, x, active, A: tl.constexpr
):
    """Displacement along an axis; with a matrix in fp64, so that what it adds keeps its digits across a volume."""
    if affine is None:
        value = tl.load(u + axis * u_c.to(tl.int64) + at, mask=active, other=0).to(A)
    else:
        value = matrix[row][3] + matrix[row][1] * y.to(tl.float64) + matrix[row][2] * x.to(tl.float64)
        value += matrix[row][0] * z.to(tl.float64)
        if u is not None:
            value += tl.load(u + axis * u_c.to(tl.int64) + at, mask=active, other=0).to(tl.float64)
    return value


@triton.jit
def store(pointers, value, mask):
    # The interpreter does not round fp64 to bf16.
    if pointers.dtype.element_ty == tl.bfloat16:
        value = value.to(tl.float32)
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def tile_of_program(n_slow, n_rows, n_lanes):
    """Sample and the tile's place along the march, rows and lanes."""
    tile = tl.program_id(0)
    lanes = tile % n_lanes
    tile = tile // n_lanes
    rows = tile % n_rows
    tile = tile // n_rows
    return (tile // n_slow).to(tl.int64), tile % n_slow, rows, lanes


@triton.jit
def place(
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
def positions(
    u, affine, matrix, u_c, at, z, y, x, inside, ND: tl.constexpr, NEAREST: tl.constexpr, A: tl.constexpr
):
    """Cell and fraction per axis (z, y, x), which voxels have a position (no NaN), and along which axes it is capped."""
    u_y = _displacement(u, affine, matrix, 1, ND - 2, u_c, at, z, y, x, inside, A)
    u_x = _displacement(u, affine, matrix, 2, ND - 1, u_c, at, z, y, x, inside, A)
    nan = (u_y != u_y) | (u_x != u_x)
    u_z = u_y
    if ND == 3:
        u_z = _displacement(u, affine, matrix, 0, 0, u_c, at, z, y, x, inside, A)
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
@triton.jit(do_not_specialize=SIZES)
def warp_fwd_kernel(
    image, u, affine, out, channels, in_d, in_h, in_w, out_d, out_h, out_w, steps, n_slow, n_rows, n_lanes,
    image_n, image_c, u_n, u_c, u_v, out_n, out_c, out_v,
    ND: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, NEAREST: tl.constexpr, COMPOSE: tl.constexpr, PAD: tl.constexpr,
    WIDE: tl.constexpr, A: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    n, slow, rows, lanes = tile_of_program(n_slow, n_rows, n_lanes)
    matrix = matrix_of(affine, n, ND)
    image += n * image_n
    out += n * out_n
    if u is not None:
        u += n * u_n
    ONE: tl.constexpr = 1 if NEAREST else 2
    DEEP: tl.constexpr = ONE if ND == 3 else 1
    for step in range(steps):
        z, y, x, inside = place(slow * steps + step, rows, lanes, out_d, out_h, out_w, ND, DEPTH, ROWS, LANES)
        at = (z.to(tl.int64) * out_h + y if WIDE else z * out_h + y) * out_w + x
        cell, fraction, nan, _ = positions(u, affine, matrix, u_c, at * u_v, z, y, x, inside, ND, NEAREST, A)
        line = in_w.to(tl.int64) if WIDE else in_w
        off_z, _, w_z = corners(cell[0], fraction[0], in_d, line * in_h * STRIDE, inside, PADDING, WIDE)
        off_y, _, w_y = corners(cell[1], fraction[1], in_h, line * STRIDE, inside, PADDING, WIDE)
        off_x, _, w_x = corners(cell[2], fraction[2], in_w, STRIDE, inside, PADDING, WIDE)
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
            store(out + c * out_c.to(tl.int64) + at * out_v, value, inside)
        if PAD:
            zero = tl.zeros([DEPTH * ROWS, LANES], A).to(out.dtype.element_ty)
            tl.store(out + channels * out_c.to(tl.int64) + at * out_v, zero, mask=inside)
