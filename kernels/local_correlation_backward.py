"""Both gathers of local correlation's backward."""
# ruff: noqa: RUF005 (Triton does not read `(*a, b)`)

import triton
import triton.language as tl

from fastreg.kernels.local_correlation_normalize import normalization


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
def local_correlation_bwd_kernel(
    g_ptr, m_ptr, own_ptr, s_ptr, out_ptr, sums_ptr, C, D, H, W, V, TD, TH, TW, TV, n_channels, n_blocks, n_tiles,
    RZ: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, FACTOR: tl.constexpr, MOVING: tl.constexpr,
    NORMALIZE: tl.constexpr, BORDER: tl.constexpr, A: tl.constexpr, TZ: tl.constexpr, KZ: tl.constexpr, CB: tl.constexpr,
    FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    high, low, inverse = normalization(s_ptr, n, NORMALIZE, A, -1)

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
