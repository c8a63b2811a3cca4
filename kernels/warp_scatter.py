"""Sums of a warp's image gradient: fp32 or fp64 atomics, or fixed point, whose sums do not depend on their order."""

import triton
import triton.language as tl


@triton.jit
def power_of_two(exponent):
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def scale_exponent(largest, n, log_count):
    """Of the scale of fixed point: what 2^log_count gradients of a sample, at most 2^-52 `largest` as bits, sum to fits 62 bits."""
    exponent = ((tl.load(largest + n) >> 52) & 0x7FF) - 1023
    return tl.minimum(tl.maximum(61 - log_count - exponent, -1022), 1022)


@triton.jit
def add(total, fixed, words_apart, offset, value, has, scale, log_count, WORDS: tl.constexpr):
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
            low = ((scaled - high) * power_of_two(59 - log_count)).to(tl.int64)
            tl.atomic_add(fixed + offset, high.to(tl.int64), mask=has & finite, sem="relaxed")
            tl.atomic_add(fixed + (words_apart + offset), low, mask=has & finite, sem="relaxed")
        # A NaN or infinity in a float total that is otherwise finite gives the same in any order.
        tl.atomic_add(total + offset, value, mask=has & (finite == 0), sem="relaxed")


@triton.jit(do_not_specialize=["n_each", "n_chunks"])
def largest_kernel(grad, largest, n_each, n_chunks, BLOCK: tl.constexpr):
    """The largest finite |grad| of each sample, as the bits of an fp64, which are ordered as it is."""
    n = (tl.program_id(0) // n_chunks).to(tl.int64)
    at = (tl.program_id(0) % n_chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.abs(tl.load(grad + n * n_each + at, mask=at < n_each, other=0).to(tl.float64))
    g = tl.where(g - g == 0, g, 0.0)
    tl.atomic_max(largest + n, tl.max(g, 0).to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit(do_not_specialize=["n_each", "n_chunks", "words_apart", "log_count"])
def from_fixed_kernel(
    fixed, largest, total, n_each, n_chunks, words_apart, log_count, WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    """total += fixed, which is as add leaves it."""
    n = (tl.program_id(0) // n_chunks).to(tl.int64)
    at = (tl.program_id(0) % n_chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_each
    at += n * n_each
    value = tl.load(fixed + at, mask=inside, other=0).to(tl.float64)
    if WORDS == 2:
        low = tl.load(fixed + words_apart + at, mask=inside, other=0).to(tl.float64)
        value += low * power_of_two(log_count - 59)
    value *= power_of_two(-scale_exponent(largest, n, log_count))
    value += tl.load(total + at, mask=inside, other=0).to(tl.float64)
    tl.store(total + at, value.to(total.dtype.element_ty), mask=inside)
