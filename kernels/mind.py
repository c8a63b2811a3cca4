"""MIND and its loss: patch distances march along z, in slabs, through a scratch of a few planes; descriptors are never stored.

A tensor of a kernel is (channels, voxels of a tile): one voxel a thread, its channels in registers, and what depends on the
channel alone folds into constants. (The x index is clamped, not only masked: were its contiguity known, the compiler would
load four voxels a thread and spread channels over warps.) 2D is a volume of one row a plane: the march goes along y.

Stages: squares windowed along x -> windows along y and z, and what each voxel does with its distances -> transposed windows
of their adjoints along z and y -> the same along x, and the gradient of the image. Between two stages stand as many planes as
the later one reads behind the earlier: slab by slab, every plane is made once. Windows are sums of their samples, never
subtractive; gradients are gathers: results do not depend on the order of programs.

At 256^3, fp32, ssc, radius 2, gradient to moved, in volumes of 67 MB (22 us at 3 TB/s):
  squares x4   write 12; 31 words from L1 and 260 operations a voxel
  voxels  x4   read 12: variance of each image, then the comparison of both, which writes the adjoints of 12 distances
  windows      read 12, write 12
  image        read 12, in 24 places of 5 samples from L1
  floor by bytes: 144 volumes, 3.2 ms; by arithmetic: 2,900 operations a voxel at 33 T/s, 1.5 ms; by L1: 650 words, 1.5 ms.
Memory beyond results: the scratch, the most of 3 images' worth, SCRATCH_BYTES and 8 planes a step.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from fastreg.kernels.launch import blocks, launch
from fastreg.ops.mind import channels, patch_weights

SCRATCH_BYTES = 2**27
_LEAST_PLANES = 8
_MARCH = tl.constexpr(16)  # planes a program walks: reads 2 radius more
_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32}
# Codes of the samples that channels compare: 0 the voxel, 1 -z, 2 +z, 3 -y, 4 +y, 5 -x, 6 +x; three bits a channel.


@triton.jit
def _tile(first, last, H, W, TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr):
    """Planes (of first ... last - 1), rows and columns of the voxels of a tile, clamped, and which lie inside."""
    columns = (W + TX - 1) // TX
    v = tl.arange(0, TZ * TY * TX)
    z = first + v // (TY * TX)
    y = (tl.program_id(0) // columns) * TY + v // TX % TY
    x = (tl.program_id(0) % columns) * TX + v % TX
    inside = (z < last) & (y < H) & (x < W)
    return tl.minimum(z, last - 1), tl.minimum(y, H - 1), tl.minimum(x, W - 1), inside


@triton.jit
def _codes(CODES: tl.constexpr, K: tl.constexpr):
    k = tl.arange(0, K)[:, None]
    return ((CODES >> (3 * k.to(tl.int64))) & 7).to(tl.int32)


@triton.jit(do_not_specialize=["begin", "end", "slots"])
def _squares_kernel(
    image, out, weights, C, D, H, W, step_z, step_y, step_x, slots, begin, end,
    FIRST: tl.constexpr, SECOND: tl.constexpr, USED: tl.constexpr, NC: tl.constexpr, RX: tl.constexpr,
    A: tl.constexpr, K: tl.constexpr, TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
):  # fmt: skip
    """Squared differences of the channels, windowed along x: planes of the image -> (N, slots, H, W / TX, NC, TX).

    A program is a tile of one plane; of TZ planes where these are small. Each sample is loaded once for all channels that compare it.
    """
    z, y, x, inside = _tile(begin + tl.program_id(1) * TZ, end, H, W, TZ, TY, TX)
    n = tl.program_id(2).to(tl.int64)
    first, second = _codes(FIRST, K), _codes(SECOND, K)
    row = tl.cast(W, tl.int64)
    plane = row * H
    # Rows of the samples along z and y; samples along x share the voxel's.
    here = z * plane + y * row
    z_down, z_up = (
        tl.maximum(z - step_z, 0) * plane + y * row,
        tl.minimum(z + step_z, D - 1) * plane + y * row,
    )
    y_down, y_up = (
        z * plane + tl.maximum(y - step_y, 0) * row,
        z * plane + tl.minimum(y + step_y, H - 1) * row,
    )
    windowed = tl.full((K, TZ * TY * TX), 0, A)
    for t in range(-RX, RX + 1):
        column = tl.minimum(tl.maximum(x + t, 0), W - 1)
        squares = tl.full((K, TZ * TY * TX), 0, A)
        for c in range(C):
            source = image + (n * C + c) * D * plane
            a = tl.full((K, TZ * TY * TX), 0, A)
            b = tl.full((K, TZ * TY * TX), 0, A)
            for s in tl.static_range(7):
                if (USED >> s) & 1:
                    if s == 0:
                        at = here + column
                    elif s == 1:
                        at = z_down + column
                    elif s == 2:
                        at = z_up + column
                    elif s == 3:
                        at = y_down + column
                    elif s == 4:
                        at = y_up + column
                    elif s == 5:
                        at = here + tl.maximum(column - step_x, 0)
                    else:
                        at = here + tl.minimum(column + step_x, W - 1)
                    sample = tl.load(source + at).to(A)[None, :]
                    a = tl.where(first == s, sample, a)
                    b = tl.where(second == s, sample, b)
            squares += (a - b) * (a - b)
        if RX == 0:
            windowed = squares
        else:
            windowed += tl.load(weights + (t + RX)) * squares
    k = tl.arange(0, K)[:, None]
    row_size = tl.cast((W + TX - 1) // TX * (NC * TX), tl.int64)
    at = ((n * slots + z % slots) * H + y) * row_size + x // TX * (NC * TX) + x % TX
    tl.store(out + at[None, :] + k * TX, windowed, mask=inside[None, :] & (k < NC))


@triton.jit
def _plane(
    source, weights, n, z, y, x, D, H, W, slots,
    NC: tl.constexpr, RY: tl.constexpr, ADJOINT: tl.constexpr, A: tl.constexpr,
    K: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
):  # fmt: skip
    """Channels of a tile of plane z, windowed along y. Rows and planes outside repeat the border's; ADJOINT: are 0."""
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
def _window(f0, f1, f2, f3, f4, weights, z, D, R: tl.constexpr, ADJOINT: tl.constexpr):
    """Window along z at plane z of planes z - 2 ... z + 2, of which R = 1 uses f1, f2, f3. ADJOINT: see _plane."""
    z += tl.full((), 0, tl.int32)
    low, high = (z == 0).to(tl.int32), (z == D - 1).to(tl.int32)
    if not ADJOINT:
        low, high = low * 0, high * 0
    # Those of the last R + 1, R, ... samples of a patch stand behind its weights.
    centre = tl.load(weights + (R + (R + 1) * tl.maximum(low, high)))
    d = centre * f2
    w1 = tl.load(weights + (R - 1 + high * (R + 3)))
    w3 = tl.load(weights + (R + 1 + low * (R + 1)))
    d += w1 * f1 + w3 * f3
    if R == 2:
        w0 = tl.load(weights + (R - 2 + high * (R + 5)))
        w4 = tl.load(weights + (R + 2 + low * (R + 1)))
        d += w0 * f0 + w4 * f4
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


@triton.jit(do_not_specialize=["begin", "end", "first_segment", "slots_in", "slots_out"])
def _march_kernel(
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
    n = tl.program_id(2).to(tl.int64)
    first = begin + tl.program_id(1) * _MARCH
    last = tl.minimum(first + _MARCH, end)
    _, y, x, inside = _tile(first, last, H, W, 1, TY, TX)
    k = tl.arange(0, K)[:, None]
    valid = (k < NC) & (y >= 0)[None, :]
    row = tl.cast(W, tl.int64)
    plane = row * H
    row_size = tl.cast((W + TX - 1) // TX * (NC * TX), tl.int64)
    at_scratch = y * row_size + x // TX * (NC * TX) + x % TX
    stored = inside[None, :] & (k < NC)
    f3 = tl.full((K, TY * TX), 0, A)
    f0, f1, f2 = f3, f3, f3
    m0, m1, m2, m3 = f3, f3, f3, f3
    if RZ == 1 or RZ == 2:
        for t in range(1 - 2 * RZ, 1):
            f0, f1, f2 = f1, f2, f3
            f3 = _plane(
                fixed,
                weights,
                n,
                first + t + RZ - 1,
                y,
                x,
                D,
                H,
                W,
                slots_in,
                NC,
                RY,
                TRANSPOSED,
                A,
                K,
                TY,
                TX,
            )
            if TASK == "compare":
                m0, m1, m2 = m1, m2, m3
                m3 = _plane(
                    moved,
                    weights,
                    n,
                    first + t + RZ - 1,
                    y,
                    x,
                    D,
                    H,
                    W,
                    slots_in,
                    NC,
                    RY,
                    False,
                    A,
                    K,
                    TY,
                    TX,
                )
    sums = tl.full((TY * TX,), 0, A)
    for z in range(first, last):
        if RZ == 1 or RZ == 2:
            f4 = _plane(fixed, weights, n, z + RZ, y, x, D, H, W, slots_in, NC, RY, TRANSPOSED, A, K, TY, TX)
            if RZ == 2:
                d = _window(f0, f1, f2, f3, f4, weights, z, D, RZ, TRANSPOSED)
            else:
                d = _window(f1, f2, f3, f4, f4, weights, z, D, RZ, TRANSPOSED)
            f0, f1, f2, f3 = f1, f2, f3, f4
            if TASK == "compare":
                m4 = _plane(moved, weights, n, z + RZ, y, x, D, H, W, slots_in, NC, RY, False, A, K, TY, TX)
                if RZ == 2:
                    dm = _window(m0, m1, m2, m3, m4, weights, z, D, RZ, False)
                else:
                    dm = _window(m1, m2, m3, m4, m4, weights, z, D, RZ, False)
                m0, m1, m2, m3 = m1, m2, m3, m4
        else:
            d = tl.full((K, TY * TX), 0, A)
            dm = tl.full((K, TY * TX), 0, A)
            for t in range(-RZ, RZ + 1):
                w = tl.load(weights + (t + RZ))
                if TRANSPOSED:
                    at_face = ((z == 0) & (t >= 0)) | ((z == D - 1) & (t <= 0))
                    w = tl.load(weights + tl.where(at_face, 2 * RZ + 1 + tl.maximum(t, -t), RZ + t))
                plane_f = _plane(
                    fixed, weights, n, z + t, y, x, D, H, W, slots_in, NC, RY, TRANSPOSED, A, K, TY, TX
                )
                d += plane_f if RZ == 0 else w * plane_f
                if TASK == "compare":
                    plane_m = _plane(
                        moved, weights, n, z + t, y, x, D, H, W, slots_in, NC, RY, False, A, K, TY, TX
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
        segment = n * n_segments + first_segment + tl.program_id(1)
        tl.store(partial + segment * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit(do_not_specialize=["begin", "end", "slots"])
def _image_kernel(
    adjoint, image, grad, weights, C, D, H, W, step_z, step_y, step_x, slots, begin, end,
    FIRST: tl.constexpr, SECOND: tl.constexpr, NC: tl.constexpr, RX: tl.constexpr,
    A: tl.constexpr, K: tl.constexpr, TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
):  # fmt: skip
    """Gradient of the image from the adjoints of its squares, yet to be windowed along x, (N, slots, H, W / TX, NC, TX).

    A program is a tile as that of the squares, of one image channel. A voxel p gathers from the two voxels q of each MIND channel whose
    first or second sample it is, q = p - offset. A voxel at a face is also the sample of the voxels q nearer to that face than
    the offset is long: only tiles at faces take these steps.
    """
    z, y, x, inside = _tile(begin + tl.program_id(1) * TZ, end, H, W, TZ, TY, TX)
    nc = tl.program_id(2).to(tl.int64)
    n = nc // C
    k = tl.arange(0, K)[:, None]
    row = tl.cast(W, tl.int64)
    plane = row * H
    z, y, x = z[None, :], y[None, :], x[None, :]
    row_size = tl.cast((W + TX - 1) // TX * (NC * TX), tl.int64)
    image += nc * D * plane
    here = tl.load(image + z * plane + y * row + x).to(A)
    faces = tl.max(((z == 0) | (z == D - 1)).to(tl.int32) * step_z)
    faces = tl.maximum(faces, tl.max(((y == 0) | (y == H - 1)).to(tl.int32) * step_y))
    faces = tl.maximum(faces, tl.max(((x == 0) | (x == W - 1)).to(tl.int32) * step_x))
    total = tl.full((K, TZ * TY * TX), 0, A)
    for side in tl.static_range(2):
        mine = _codes(FIRST if side == 0 else SECOND, K)
        other = _codes(SECOND if side == 0 else FIRST, K)
        sz = (mine == 2).to(tl.int32) - (mine == 1).to(tl.int32)
        sy = (mine == 4).to(tl.int32) - (mine == 3).to(tl.int32)
        sx = (mine == 6).to(tl.int32) - (mine == 5).to(tl.int32)
        other_z = step_z * ((other == 2).to(tl.int32) - (other == 1).to(tl.int32))
        other_y = step_y * ((other == 4).to(tl.int32) - (other == 3).to(tl.int32))
        other_x = step_x * ((other == 6).to(tl.int32) - (other == 5).to(tl.int32))
        # How far, in steps m, p stands for the voxels beyond its face.
        reach = tl.where(((sz < 0) & (z == 0)) | ((sz > 0) & (z == D - 1)), step_z, 0)
        reach = tl.where(((sy < 0) & (y == 0)) | ((sy > 0) & (y == H - 1)), step_y, reach)
        reach = tl.where(((sx < 0) & (x == 0)) | ((sx > 0) & (x == W - 1)), step_x, reach)
        for m in range(0, faces + 1):
            qz, qy, qx = z - sz * (step_z - m), y - sy * (step_y - m), x - sx * (step_x - m)
            keep = (reach >= m) & (k < NC)
            keep = keep & (qz >= 0) & (qz < D) & (qy >= 0) & (qy < H) & (qx >= 0) & (qx < W)
            oz = tl.minimum(tl.maximum(qz + other_z, 0), D - 1)
            oy = tl.minimum(tl.maximum(qy + other_y, 0), H - 1)
            ox = tl.minimum(tl.maximum(qx + other_x, 0), W - 1)
            partner = tl.load(image + oz * plane + oy * row + ox, mask=keep, other=0).to(A)
            slot = tl.maximum(qz, 0) % slots
            source = adjoint + ((n * slots + slot) * H + qy) * row_size + k * TX
            g = tl.full((K, TZ * TY * TX), 0, A)
            for t in tl.range(-RX, RX + 1, loop_unroll_factor=2 * RX + 1 if RX <= 2 else 1):
                near = qx + t
                column = near // TX * (NC * TX) + near % TX
                sample = tl.load(source + column, mask=keep & (near >= 0) & (near < W), other=0)
                if RX > 0:
                    at_face = ((qx == 0) & (near >= qx)) | ((qx == W - 1) & (near <= qx))
                    tail = tl.load(weights + (2 * RX + 1 + tl.maximum(t, -t)))
                    sample *= tl.where(at_face, tail, tl.load(weights + (t + RX)))
                g += sample
            total += tl.where(keep, g * (here - partner), 0.0)
    result = 2.0 * tl.sum(total, 0)[None, :]
    tl.store(grad + (nc * D + z) * plane + y * row + x, result, mask=inside[None, :])


@functools.cache
def _weights(radius, patch, sigma, dtype, device):
    """The 2 radius + 1 weights of a patch, then the sums of the last radius + 1, radius, ... of them. Kept for good: a CUDA graph reads them at each replay, and cannot capture the copy to the device."""
    weights = patch_weights(radius, patch, sigma)
    tails = [math.fsum(weights[radius + t :]) for t in range(radius + 1)]
    return torch.tensor(weights + tails, dtype=dtype, device="cpu").to(device)


def _power_of_two(n, most):
    return min(most, triton.next_power_of_2(max(n, 1)))


class _Mind:
    """What the kernels must know of images of one shape and of the options."""

    def __init__(self, image, radius, dilation, neighbourhood, patch, sigma):
        self.shape, nd = image.shape, image.dim() - 2
        spatial = (*image.shape[2:], 1)[:3] if nd == 3 else (image.shape[2], 1, image.shape[3])
        self.N, self.C, (self.D, self.H, self.W) = *image.shape[:2], spatial
        self.dtype = torch.promote_types(image.dtype, torch.float32)
        self.image = image
        pairs = channels(neighbourhood, nd)
        axes = (0, 1, 2) if nd == 3 else (0, 2)

        def code(offset):
            return sum(2 * axis + 1 + (o > 0) for axis, o in zip(axes, offset, strict=True) if o)

        codes = [[code(pair[side]) for pair in pairs] for side in (0, 1)]
        self.pairs = {
            name: sum(c << 3 * k for k, c in enumerate(of_side))
            for name, of_side in zip(("FIRST", "SECOND"), codes, strict=True)
        }
        self.used = sum(1 << c for c in {*codes[0], *codes[1]})
        self.NC = len(pairs)
        # Longer offsets end at the border all the same; windows of one sample do nothing.
        self.steps = [min(dilation, n - 1) for n in spatial]
        self.radii = [radius if n > 1 else 0 for n in spatial]
        self.weights = _weights(radius, patch, sigma, self.dtype, image.device)
        TX = _power_of_two(self.W, 32 if self.H > 1 else 256)
        TY = _power_of_two(self.H, 256 // TX)
        self.tiles = blocks(self.W, TX) * blocks(self.H, TY)
        self.a_plane = self.N * self.H * blocks(self.W, TX) * TX * self.NC
        self.tile = {
            "NC": self.NC, "A": _TYPES[self.dtype], "K": triton.next_power_of_2(self.NC), "TY": TY, "TX": TX,
        }  # fmt: skip
        self.TZ = 256 // (TY * TX)
        self.march_warps = max(1, TY * TX // 32)
        self.march = {
            "SIX": neighbourhood == "six", "TINY": torch.finfo(self.dtype).tiny,
        }  # fmt: skip

    def schedule(self, stages, buffers):
        """Ranges of planes of each stage at each step, and planes that the scratch behind each stage holds.

        stages: planes that a stage reads ahead of those it makes; buffers: how many scratches are behind it.
        """
        a_plane = self.a_plane * self.dtype.itemsize
        budget = max(SCRATCH_BYTES, 3 * self.image.numel() * self.dtype.itemsize)
        kept = sum(n * (stages[i] + stages[i + 1]) for i, n in enumerate(buffers) if n)
        step = max(_LEAST_PLANES, (budget // a_plane - kept) // max(sum(buffers), 1))
        fronts, steps = [0] * len(stages), []
        while fronts[-1] < self.D:
            after, made = [], min(self.D, fronts[0] + step)
            for ahead in stages:
                made = made if made == self.D else max(0, made - ahead)
                after.append(made)
            steps.append(list(zip(fronts, after, strict=True)))
            fronts = after
        slots = [
            max(s[i][1] - max(0, s[i + 1][0] - stages[i + 1]) for s in steps) if n else 1
            for i, n in enumerate(buffers)
        ]
        return steps, slots

    def run(
        self, task, images, means=(None, None), weight=None, upstream=None, out=None, grads=(None, None),
        masked=False, l1=False,
    ):  # fmt: skip
        """One task over all planes: (N,) sums in fp64 of what it adds up, if it does."""
        rz, ry, _ = self.radii
        # Beyond radius 2 windows along y are passes of their own.
        wide = ry > 2
        wanted = [i for i, g in enumerate(grads) if g is not None]
        stages = ["squares", *["rows"] * wide, "voxels"]
        if wanted:
            stages += [*["rows back"] * wide, "columns back", "image"]
        ahead = {"voxels": rz, "columns back": rz, "image": self.steps[0]}
        behind = [len(images if s in ("squares", "rows") else wanted) for s in stages[:-1]]
        behind.append(0)
        steps, slots = self.schedule([ahead.get(s, 0) for s in stages], behind)
        scratch = [
            {
                i: self.weights.new_empty(slots[j] * self.a_plane)
                for i in (range(len(images)) if s in ("squares", "rows") else wanted)
            }
            for j, s in enumerate(stages)
        ]
        adds = task in ("variance", "compare")
        march = _MARCH.value
        at = stages.index("voxels")
        n_segments = sum(blocks(s[at][1] - s[at][0], march) for s in steps)
        partial = (
            self.weights.new_empty(self.N, n_segments, self.tiles, dtype=torch.float64) if adds else None
        )
        segment = 0
        for ranges in steps:
            for j, stage in enumerate(stages):
                begin, end = ranges[j]
                if begin == end:
                    continue
                before = scratch[j - 1] if j else None
                if stage == "squares":
                    for i, image in enumerate(images):
                        self.squares(image, scratch[j][i], slots[j], begin, end)
                elif stage == "image":
                    for i in wanted:
                        self.gather(before[i], images[i], grads[i], slots[j - 1], begin, end)
                elif stage == "voxels":
                    two = before.get(1)
                    grid = (self.tiles, blocks(end - begin, march), self.N)
                    launch(
                        _march_kernel, grid, before[0], two, *means, weight, upstream, out, partial,
                        scratch[j].get(0), scratch[j].get(1), self.weights, self.D, self.H, self.W,
                        slots[j - 1], slots[j], begin, end, segment, n_segments,
                        TASK=task, RZ=rz, RY=0 if wide else ry, MASKED=masked, L1=l1, num_warps=self.march_warps, **self.march, **self.tile,
                    )  # fmt: skip
                    segment += grid[1]
                else:
                    windows = {
                        "rows": (0, ry, "rows"),
                        "rows back": (0, ry, "columns"),
                        "columns back": (rz, 0 if wide else ry, "columns"),
                    }[stage]
                    for i, source in before.items():
                        self.windows(source, scratch[j][i], slots[j - 1], slots[j], begin, end, *windows)
        return partial.sum((1, 2)) if adds else None

    def squares(self, image, out, slots, begin, end):
        launch(
            _squares_kernel, (self.tiles, blocks(end - begin, self.TZ), self.N), image, out, self.weights, self.C, self.D, self.H, self.W,
            *self.steps, slots, begin, end, USED=self.used, RX=self.radii[2], TZ=self.TZ, num_warps=8, **self.pairs, **self.tile,
        )  # fmt: skip

    def windows(self, source, out, slots_in, slots_out, begin, end, rz, ry, task):
        launch(
            _march_kernel, (self.tiles, blocks(end - begin, _MARCH.value), self.N), source, *[None] * 7, out, None,
            self.weights, self.D, self.H, self.W, slots_in, slots_out, begin, end, 0, 0,
            TASK=task, RZ=rz, RY=ry, MASKED=False, L1=False, num_warps=self.march_warps, **self.march, **self.tile,
        )  # fmt: skip

    def gather(self, adjoint, image, grad, slots, begin, end):
        launch(
            _image_kernel, (self.tiles, blocks(end - begin, self.TZ), self.N * self.C), adjoint, image, grad, self.weights,
            self.C, self.D, self.H, self.W, *self.steps, slots, begin, end, RX=self.radii[2], TZ=self.TZ, num_warps=8,
            **self.pairs, **self.tile,
        )  # fmt: skip

    def mean_variance(self, image):
        mean = self.run("variance", (image,)) / (self.D * self.H * self.W)
        return torch.where(mean.isfinite(), mean, float("nan"))


def mind_mean_variance(image, *options):
    image = image.contiguous()
    if image.numel() == 0:
        return image.new_zeros(image.shape[0], dtype=torch.float64)
    return _Mind(image, *options).mean_variance(image)


def mind(image, *options):
    image = image.contiguous()
    out = image.new_empty((image.shape[0], len(channels(options[2], image.dim() - 2)), *image.shape[2:]))
    if image.numel():
        op = _Mind(image, *options)
        op.run("describe", (image,), (op.mean_variance(image), None), out=out)
    return out


def mind_bwd(grad, image, *options):
    image = image.contiguous()
    out = torch.empty_like(image)
    if image.numel():
        op = _Mind(image, *options)
        mean = op.mean_variance(image)
        op.run("describe_bwd", (image,), (mean, None), upstream=grad.contiguous(), grads=(out, None))
    return out


def _compare(fixed, moved, fixed_variance, options, norm, **arguments):
    op = _Mind(fixed, *options)
    if fixed_variance is None:
        fixed_variance = op.mean_variance(fixed)
    means = fixed_variance.double().contiguous(), op.mean_variance(moved)
    return op.run("compare", (fixed, moved), means, l1=norm == "l1", **arguments)


def mind_loss(fixed, moved, fixed_variance, mask, *options_and_needs):
    *options, norm, need_fixed, need_moved = options_and_needs
    fixed, moved = fixed.contiguous(), moved.contiguous()
    dtype = torch.promote_types(fixed.dtype, torch.float32)
    grads = [
        torch.empty_like(t, dtype=dtype) if need else None
        for t, need in ((fixed, need_fixed), (moved, need_moved))
    ]
    if fixed.numel():
        if mask is not None:
            mask = mask.to(dtype).contiguous()
        total = _compare(
            fixed, moved, fixed_variance, options, norm, weight=mask, masked=True, grads=grads
        ).to(dtype)
    else:
        total = fixed.new_zeros(fixed.shape[0], dtype=dtype)
    return total, *(fixed.new_empty(0, dtype=dtype) if g is None else g for g in grads)


def mind_map(fixed, moved, fixed_variance, *options_and_norm):
    *options, norm = options_and_norm
    fixed, moved = fixed.contiguous(), moved.contiguous()
    dtype = torch.promote_types(fixed.dtype, torch.float32)
    out = fixed.new_empty((fixed.shape[0], 1, *fixed.shape[2:]), dtype=dtype)
    if fixed.numel():
        _compare(fixed, moved, fixed_variance, options, norm, out=out)
    return out


def mind_map_bwd(grad, fixed, moved, fixed_variance, *options_and_needs):
    *options, norm, need_fixed, need_moved = options_and_needs
    fixed, moved = fixed.contiguous(), moved.contiguous()
    grads = [torch.empty_like(t) if need else None for t, need in ((fixed, need_fixed), (moved, need_moved))]
    if fixed.numel() and (need_fixed or need_moved):
        weight = grad.contiguous() / len(channels(options[2], fixed.dim() - 2))
        _compare(fixed, moved, fixed_variance, options, norm, weight=weight, grads=grads)
    return tuple(t.new_empty(0) if g is None else g for g, t in zip(grads, (fixed, moved), strict=True))
