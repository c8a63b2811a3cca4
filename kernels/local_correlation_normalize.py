"""``normalize`` of local correlation: statistics of the maps, their use, and the gradient through them."""

import triton
import triton.language as tl

from fastreg.ops.local_correlation import EPSILON

_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def normalization(s_ptr, n, NORMALIZE: tl.constexpr, A: tl.constexpr, OWN: tl.constexpr):
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


# Mean and summed squared deviations of PER consecutive numbers, in fp64 about the first of them: equal numbers stay at 0
# exactly. A program: one such piece of a sample of `count` numbers. Bytes: reads a map.
@triton.jit
def local_correlation_moments_kernel(x_ptr, out_ptr, count, pieces, PER: tl.constexpr, BLOCK: tl.constexpr):
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
def local_correlation_merge_kernel(
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


# dL/dx from the gradient g to the normalised x: g / deviation + constant + slope * x', with x' the normalised x about its own
# map's mean, since about the shared one the last two would cancel where the means lie apart. A deviation of 0 has derivative 0.
# A thread: some voxels of a sample. Bytes: reads 2 maps, writes 1; `out` may be `g`.
@triton.jit
def local_correlation_through_kernel(
    g_ptr, x_ptr, s_ptr, totals_ptr, out_ptr, count, n_blocks,
    MAP: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    # As one so small that its slope lies beyond the arithmetic type: an infinite one would meet zeros.
    steep = slope.to(A)
    still = still | ((steep - steep != 0) & (slope == slope))
    slope = tl.where(still, 0.0, slope)
    high, low, inverse = normalization(s_ptr, 0, True, A, MAP)
    mask = i < count
    x = (tl.load(x_ptr + n * count + i, mask=mask, other=0.0).to(A) - high - low) * inverse
    g = tl.load(g_ptr + n * count + i, mask=mask, other=0.0).to(A)
    value = g * (1 / unit).to(A) + constant.to(A) + x * slope.to(A)
    tl.store(out_ptr + n * count + i, value.to(out_ptr.dtype.element_ty), mask=mask)
