"""Forward of local correlation."""
# ruff: noqa: RUF005 (Triton does not read `(*a, b)`)

import triton
import triton.language as tl

from fastreg.kernels.local_correlation_normalize import normalization


# A program: BLOCK voxels of a plane (a thread each), TZ planes, and of the offsets KZ along z, one along y, KX along x. Their
# TZ * KZ * KX sums over the channels stay in registers; a channel costs TZ + (TZ + KZ - 1) * KX coalesced loads, of which the
# KX shifted ones hit L1. Neighbouring programs take the other offsets of the same voxels: these reads hit L2.
# Bytes: reads 2C volumes, writes the offsets, streaming. Arithmetic: C products and sums an offset and voxel, 0.44 loads each
# (TZ 4, radius 2). C = 32, 64^3: 0.20 GB, 66 us; 1.05 G multiply-adds, 31 us; 0.46 G loads of L1, 64 us; L2 0.5 GB, 91 us;
# 2.3 instructions a multiply-add, 85 us. Memory beyond the result: the warped moving, where displaced.
@triton.jit
def local_correlation_fwd_kernel(
    f_ptr, m_ptr, s_ptr, out_ptr, C, D, H, W, V, n_blocks, n_tiles,
    RZ: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, FACTOR: tl.constexpr, NORMALIZE: tl.constexpr,
    BORDER: tl.constexpr, A: tl.constexpr, TZ: tl.constexpr, KZ: tl.constexpr, KX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    high, low, inverse = normalization(s_ptr, n, NORMALIZE, A, -1)

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
