"""Windows of MIND's squares along y and z, in a march along z, and what is done with them at each voxel."""

import triton
import triton.language as tl

from fastreg.kernels.mind_squares import SIZES, place_of_program, voxels_of_tile

MARCH = tl.constexpr(16)  # planes a program walks: reads 2 radius more


@triton.jit
def _plane(
    source, weights, here, z, D, H, W, slots,
    NC: tl.constexpr, RY: tl.constexpr, ADJOINT: tl.constexpr, A: tl.constexpr,
    K: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
):  # fmt: skip
    """Channels of a tile of plane z, windowed along y. Rows and planes outside repeat the border's; ADJOINT: are 0."""
    n, y, x = here
    row_size = tl.cast((W + TX - 1) // TX * (NC * TX), tl.int64)
    inner = tl.minimum(tl.maximum(z, 0), D - 1)
    source += (n * slots + inner % slots) * H * row_size
    k = tl.arange(0, K)[:, None]
    column = x // TX * (NC * TX) + x % TX
    keep = (k < NC) & (tl.full((TY * TX,), 0, tl.int32) == ((z - inner) if ADJOINT else 0))[None, :]
    d = tl.full((K, TY * TX), 0, A)
    for t in tl.range(-RY, RY + 1, loop_unroll_factor=2 * RY + 1 if RY <= 2 else 1):
        row = tl.minimum(tl.maximum(y + t, 0), H - 1)
        at = source + (row * row_size + column)[None, :] + k * TX
        if RY == 0:
            d = tl.load(at, mask=keep, other=0)
        elif ADJOINT:
            # A row at a face gathers what windows beyond it took of its value.
            at_face = ((y == 0) & (y + t >= y)) | ((y == H - 1) & (y + t <= y))
            tail = tl.load(weights + (2 * RY + 1 + tl.maximum(t, -t)))
            w = tl.where(at_face, tail, tl.load(weights + (t + RY)))
            d += w[None, :] * tl.load(at, mask=keep & (row == y + t)[None, :], other=0)
        else:
            d += tl.load(weights + (t + RY)) * tl.load(at, mask=keep, other=0)
    return d


@triton.jit
def _window(planes, weights, z, D, R: tl.constexpr, ADJOINT: tl.constexpr):
    """Window along z at plane z; planes: the last five, of which R = 1 reads three. ADJOINT: see _plane."""
    z += tl.full((), 0, tl.int32)
    low, high = (z == 0).to(tl.int32), (z == D - 1).to(tl.int32)
    if not ADJOINT:
        low, high = low * 0, high * 0
    # Those of the last R + 1, R, ... samples of a patch stand behind its weights.
    centre = tl.load(weights + (R + (R + 1) * tl.maximum(low, high)))
    d = centre * planes[4 - R]
    w1 = tl.load(weights + (R - 1 + high * (R + 3)))
    w3 = tl.load(weights + (R + 1 + low * (R + 1)))
    d += w1 * planes[3 - R] + w3 * planes[5 - R]
    if R == 2:
        w0 = tl.load(weights + (R - 2 + high * (R + 5)))
        w4 = tl.load(weights + (R + 2 + low * (R + 1)))
        d += w0 * planes[0] + w4 * planes[4]
    return d


@triton.jit
def _describe(
    d, valid, mean, NC: tl.constexpr, SIX: tl.constexpr, TINY: tl.constexpr, A: tl.constexpr
):  # fmt: skip
    """Descriptor, and what its way back needs: D - min D, 1 / V, the same or 0 where V is at its floor, 1 inside the bounds."""
    least = tl.min(tl.where(valid, d, float("inf")), 0)[None, :]
    x = tl.where(valid, d - least, 0.0)
    raw = tl.sum(d if SIX else x, 0)[None, :] * (1.0 / NC)
    tiny = tl.full((), TINY, tl.float64)
    lower, upper = mean * 1e-3, mean * 1e3
    lower = tl.where(lower < tiny, tiny, lower).to(A)
    upper = tl.where(upper < tiny, tiny, upper).to(A)
    # The order of the comparisons passes NaN bounds on.
    v = tl.where(raw > lower, raw, lower)
    v = tl.where(v > upper, upper, v)
    inverse = 1.0 / v
    back = tl.where(v <= tiny.to(A), 0.0, inverse)
    inside = ((raw >= lower) & (raw <= upper)).to(A)
    return tl.exp(-x * inverse), x, inverse, back, inside


@triton.jit
def _adjoint(
    g, e, x, inverse, back, inside, valid, NC: tl.constexpr, SIX: tl.constexpr, A: tl.constexpr
):  # fmt: skip
    """From d loss / d descriptor to d loss / d D. Channels that tie for the minimum share what returns through it."""
    h = tl.where(valid, -g * e * back, 0.0)
    to_variance = -tl.sum(h * x, 0)[None, :] * (inverse * inside)
    total = tl.sum(h, 0)[None, :]
    least = valid & (x == 0)
    ties = tl.sum(least.to(A), 0)[None, :]
    to_least = (total if SIX else total + to_variance) / ties
    return h + to_variance * (1.0 / NC) - tl.where(least, to_least, 0.0)


@triton.jit(do_not_specialize=[*SIZES, "first_segment", "slots_in", "slots_out"])
def march_kernel(
    fixed, moved, fixed_mean, moved_mean, weight, upstream, out, partial, to_fixed, to_moved, weights,
    D, H, W, slots_in, slots_out, begin, end, first_segment, n_segments,
    TASK: tl.constexpr, NC: tl.constexpr, RZ: tl.constexpr, RY: tl.constexpr, SIX: tl.constexpr,
    MASKED: tl.constexpr, L1: tl.constexpr, TINY: tl.constexpr, A: tl.constexpr, K: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr,
):  # fmt: skip
    """Windows along y and z of planes begin ... end - 1, and what is done with them at each voxel.

    fixed, moved: squares windowed along x, in slots_in planes each, of one image or of two. TASK:
      rows, columns      to_fixed = the windows ("columns": transposed, in which case `fixed` holds adjoints)
      variance           partial = sums of V
      describe           out = descriptors
      describe_bwd       to_fixed = adjoint of the distances, of `upstream`, the gradient of the descriptors
      compare            partial, out = sum and map of the error; to_fixed, to_moved = adjoints of the distances of each
    A program walks a tile of TY x TX voxels along z, up to 16 planes; the last 2 RZ planes stay in registers (RZ <= 2), so that a
    plane is read once, each row by the 2 RY + 1 rows near it, from L1. RZ > 2: each window is summed anew.
    """
    TRANSPOSED: tl.constexpr = TASK == "columns"
    n, segment, tile, tiles = place_of_program(end - begin, H, W, MARCH, TY, TX)
    first = begin + segment * MARCH
    last = tl.minimum(first + MARCH, end)
    _, y, x, inside = voxels_of_tile(tile, first, last, H, W, 1, TY, TX)
    k = tl.arange(0, K)[:, None]
    valid = (k < NC) & (y >= 0)[None, :]
    row = tl.cast(W, tl.int64)
    plane = row * H
    row_size = tl.cast((W + TX - 1) // TX * (NC * TX), tl.int64)
    at_scratch = y * row_size + x // TX * (NC * TX) + x % TX
    stored = inside[None, :] & (k < NC)
    here = (n, y, x)
    zero = tl.full((K, TY * TX), 0, A)
    # Each by its name: carried as tuples they took half as many registers again (185, not 128).
    f0, f1, f2, f3 = zero, zero, zero, zero
    m0, m1, m2, m3 = zero, zero, zero, zero
    if RZ == 1 or RZ == 2:
        for t in range(1 - 2 * RZ, 1):
            z = first + t + RZ - 1
            f0, f1, f2 = f1, f2, f3
            f3 = _plane(fixed, weights, here, z, D, H, W, slots_in, NC, RY, TRANSPOSED, A, K, TY, TX)
            if TASK == "compare":
                m0, m1, m2 = m1, m2, m3
                m3 = _plane(moved, weights, here, z, D, H, W, slots_in, NC, RY, False, A, K, TY, TX)
    sums = tl.full((TY * TX,), 0, A)
    for z in range(first, last):
        if RZ == 1 or RZ == 2:
            f4 = _plane(fixed, weights, here, z + RZ, D, H, W, slots_in, NC, RY, TRANSPOSED, A, K, TY, TX)
            d = _window((f0, f1, f2, f3, f4), weights, z, D, RZ, TRANSPOSED)
            f0, f1, f2, f3 = f1, f2, f3, f4
            if TASK == "compare":
                m4 = _plane(moved, weights, here, z + RZ, D, H, W, slots_in, NC, RY, False, A, K, TY, TX)
                dm = _window((m0, m1, m2, m3, m4), weights, z, D, RZ, False)
                m0, m1, m2, m3 = m1, m2, m3, m4
        else:
            d, dm = zero, zero
            for t in range(-RZ, RZ + 1):
                w = tl.load(weights + (t + RZ))
                if TRANSPOSED:
                    at_face = ((z == 0) & (t >= 0)) | ((z == D - 1) & (t <= 0))
                    w = tl.load(weights + tl.where(at_face, 2 * RZ + 1 + tl.maximum(t, -t), RZ + t))
                plane_f = _plane(
                    fixed, weights, here, z + t, D, H, W, slots_in, NC, RY, TRANSPOSED, A, K, TY, TX
                )
                d += plane_f if RZ == 0 else w * plane_f
                if TASK == "compare":
                    plane_m = _plane(
                        moved, weights, here, z + t, D, H, W, slots_in, NC, RY, False, A, K, TY, TX
                    )
                    dm += plane_m if RZ == 0 else w * plane_m

        target = (n * slots_out + z % slots_out) * H * row_size + at_scratch[None, :] + k * TX
        if TASK == "rows" or TASK == "columns":
            tl.store(to_fixed + target, d, mask=stored)
        elif TASK == "variance":
            least = tl.min(tl.where(valid, d, float("inf")), 0)[None, :]
            sums += tl.sum(d if SIX else tl.where(valid, d - least, 0.0), 0) * (1.0 / NC)
        else:
            e, by, inverse, back, bounded = _describe(d, valid, tl.load(fixed_mean + n), NC, SIX, TINY, A)
            of_channel = ((n * NC + k) * D + z) * plane + (y * row + x)[None, :]
            if TASK == "describe":
                tl.store(out + of_channel, e, mask=stored)
            elif TASK == "describe_bwd":
                g = tl.load(upstream + of_channel, mask=stored, other=0).to(A)
                g = _adjoint(g, e, by, inverse, back, bounded, valid, NC, SIX, A)
                tl.store(to_fixed + target, g, mask=stored)
            else:
                em, by_m, inverse_m, back_m, bounded_m = _describe(
                    dm, valid, tl.load(moved_mean + n), NC, SIX, TINY, A
                )
                g = em - e
                of_voxel = (n * D + z) * plane + y * row + x
                w = tl.full((TY * TX,), 1.0, A)
                if weight is not None:
                    w = tl.load(weight + of_voxel)
                    if MASKED:
                        w = tl.where(w < 0, 0.0, w)
                if L1:
                    sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g))
                    error = tl.sum(tl.where(valid, g * sign, 0.0), 0)
                    g = w[None, :] * sign
                else:
                    error = tl.sum(tl.where(valid, g * g, 0.0), 0)
                    g = 2.0 * w[None, :] * g
                # A hidden voxel does not count even where it is NaN.
                sums += tl.where(w == 0, 0.0, w * error)
                g = tl.where(w[None, :] == 0, 0.0, g)
                if out is not None:
                    tl.store(out + of_voxel, error * (1.0 / NC), mask=inside)
                if to_moved is not None:
                    a = _adjoint(g, em, by_m, inverse_m, back_m, bounded_m, valid, NC, SIX, A)
                    tl.store(to_moved + target, a, mask=stored)
                if to_fixed is not None:
                    a = _adjoint(-g, e, by, inverse, back, bounded, valid, NC, SIX, A)
                    tl.store(to_fixed + target, a, mask=stored)
    if partial is not None:
        total = tl.sum(tl.where(inside, sums, 0.0), 0)
        segment += n * n_segments + first_segment
        tl.store(partial + segment * tiles + tile, total)
