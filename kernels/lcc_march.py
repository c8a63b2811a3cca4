# ruff: noqa: RUF005 (Triton does not unpack into tuples)
"""LCC over windows of at most MOST_RADIUS to each side, in fp32: two marches through registers, three launches a slab.

  moments    a program marches along y through a tile of 32 rows: a row's sums along x by direct loads (L1), its sums along y
             in registers. Writes 5 maps (with a mask 6: the weight).
  windows    marches along z through 32 planes and the halo of the adjoints: sums along z in registers, LCC, its sum, and the
             adjoint maps already summed along z in registers. Writes 3 maps (both gradients 5). No LCC map is written.
  gradient   marches along y as the first: adjoint maps along x by direct loads, along y in registers, and the gradient.

Sums in registers are filters in transposed form: state[j] is what the window j voxels ahead holds so far, so a new row costs one
multiply-add a state and the states move on as they are written. Nothing is subtracted, so a NaN stays in its windows.
Shift: sums are about the shift of the 32 x 32 x 32 tile of their centre; what is read from another tile is moved over:
S1 + n d, S2 + d (S1 + S1'), no larger than if it had been summed about this tile's shift. Means in the adjoint maps likewise.
Memory layout: scratch maps (maps, n c, slots, H, W), plane z in slot z % slots: 5 rings of a slab of 64 planes and 4 radius,
3 maps of a slab. A lane owns one column; the 256 lanes of a program are 32 voxels along x in 8 planes.
Bytes, window 9, one gradient, in volumes: 2 + 5 out; 7.5 in (halo of 16 planes to 32) + 3 out; 3 + 2 in, 1 out: 23.5, so 0.53 ms at
3 TB/s for 256^3. Arithmetic: some 250 + 250 + 330 instructions a voxel: 14 G, 0.5 ms at the 28 G/ms an H100 issues.
Memory beyond inputs, outputs and gradients: 5 (64 + 4 radius) + 3 * 64 planes (both: + 2 * 64): 2.3 volumes (2.8) at 256^3.
"""

import torch
import triton
import triton.language as tl

from fastreg.kernels.launch import blocks, launch, power_of_two
from fastreg.kernels.lcc_shift import TILE, shift_of_tiles
from fastreg.kernels.lcc_terms import CHANGING, SLAB, window_terms

MOST_RADIUS = 5  # above it the states do not fit the registers
BLOCK = 256  # a column a thread
WARP = 64 if torch.version.hip else 32


@triton.jit
def _weights(taps, RADIUS: tl.constexpr):
    weights = (tl.load(taps),)
    for k in tl.static_range(1, RADIUS + 1):
        weights = weights + (tl.load(taps + k),)
    return weights


@triton.jit
def _rest(zero, COUNT: tl.constexpr, RADIUS: tl.constexpr):
    """State of COUNT sums over no rows."""
    state = (zero,)
    for _ in tl.static_range(1, COUNT * (2 * RADIUS if RADIUS > 0 else 1)):
        state = state + (zero,)
    return state


@triton.jit
def _push(state, values, weights, COUNT: tl.constexpr, RADIUS: tl.constexpr):
    """(*sums of the windows that the COUNT values complete, *new state): the windows' centre lies RADIUS rows behind."""
    if RADIUS == 0:
        sums = (weights[0] * values[0],)
        for i in tl.static_range(1, COUNT):
            sums = sums + (weights[0] * values[i],)
        return sums + state
    else:
        edge = (weights[RADIUS] * values[0],)
        for i in tl.static_range(1, COUNT):
            edge = edge + (weights[RADIUS] * values[i],)
        sums = (state[0] + edge[0],)
        for i in tl.static_range(1, COUNT):
            sums = sums + (state[i] + edge[i],)
        for j in tl.static_range(1, 2 * RADIUS):
            for i in tl.static_range(COUNT):
                sums = sums + (
                    state[j * COUNT + i] + weights[RADIUS - j if j < RADIUS else j - RADIUS] * values[i],
                )
        return sums + edge


@triton.jit
def _wanted(e, a, p, b, q, WANT_FIXED: tl.constexpr, WANT_MOVED: tl.constexpr):
    """The adjoint maps of the gradients that are asked for."""
    if WANT_FIXED and WANT_MOVED:
        return e, a, p, b, q
    elif WANT_FIXED:
        return e, a, p
    else:
        return e, b, q


@triton.jit
def _lanes(planes, z_first, H, W, n_x, BLOCK: tl.constexpr, BLOCK_X: tl.constexpr):
    """Lanes over planes and x, and a tile of rows: channel, z, x, first row, end."""
    n_y, n_z = tl.cdiv(H, TILE), tl.cdiv(planes, BLOCK // BLOCK_X)
    lane = tl.arange(0, BLOCK)
    pid = tl.program_id(0)
    x = pid % n_x * BLOCK_X + lane % BLOCK_X
    y = (pid // n_x % n_y).to(tl.int64) * TILE
    z = pid // n_x // n_y % n_z * (BLOCK // BLOCK_X) + lane // BLOCK_X
    nc = (pid // n_x // n_y // n_z).to(tl.int64)
    return nc, z_first + z.to(tl.int64), x, y, tl.minimum(y + TILE, H), (z < planes) & (x < W)


@triton.jit(do_not_specialize=CHANGING)
def _moments_kernel(
    fixed, moved, mask, shift, taps_y, taps_x, target, channels, C, z_first, planes, slots, D, H, W, n_x,
    RADIUS_Y: tl.constexpr, RADIUS_X: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Sums along x and y of f, m, f^2, m^2, fm and, with a mask, its weight."""
    nc, z, x, y0, y1, inside = _lanes(planes, z_first, H, W, n_x, BLOCK, BLOCK_X)
    tiles_z, tiles_y, tiles_x = tl.cdiv(D, TILE), tl.cdiv(H, TILE), tl.cdiv(W, TILE)
    tile = ((nc * tiles_z + z // TILE) * tiles_y + y0 // TILE) * tiles_x + x // TILE
    tiles = tl.cast(channels, tl.int64) * tiles_z * tiles_y * tiles_x
    cf, cm = tl.load(shift + tile, mask=inside, other=0), tl.load(shift + tiles + tile, mask=inside, other=0)
    image, masked = (nc * D + z) * H * W + x, (nc // C * D + z) * H * W + x
    out = target + (nc * slots + z % slots) * H * W + x
    step = tl.cast(channels, tl.int64) * slots * H * W
    weights_y, weights_x = _weights(taps_y, RADIUS_Y), _weights(taps_x, RADIUS_X)
    zero, spread = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int64)
    MAPS: tl.constexpr = 6 if HAS_MASK else 5
    state = _rest(zero, MAPS, RADIUS_Y)
    for i in range(0, y1 - y0 + 2 * RADIUS_Y):
        row = y0 + i - RADIUS_Y
        # Spread, as the interpreter loses the type of a scalar's comparisons.
        rows = row + spread
        row_inside = inside & (rows >= 0) & (rows < H)
        s1, t1, s2, t2, st, n = zero, zero, zero, zero, zero, zero
        for k in tl.static_range(-RADIUS_X, RADIUS_X + 1):
            here = row_inside & (x + k >= 0) & (x + k < W)
            if HAS_MASK:
                sample = tl.load(mask + masked + (row * W + k), mask=here, other=0)
                here = here & (sample != 0)
            f = tl.load(fixed + image + (row * W + k), mask=here, other=0).to(tl.float32)
            m = tl.load(moved + image + (row * W + k), mask=here, other=0).to(tl.float32)
            f, m = tl.where(here, f - cf, 0), tl.where(here, m - cm, 0)
            weight = weights_x[k if k >= 0 else -k]
            if HAS_MASK:
                weight = weight * sample
                n += weight
            kf, km = weight * f, weight * m
            s1 += kf
            t1 += km
            s2 += kf * f
            t2 += km * m
            st += kf * m
        if HAS_MASK:
            values = (s1, t1, s2, t2, st, n)
        else:
            values = (s1, t1, s2, t2, st)
        state = _push(state, values, weights_y, MAPS, RADIUS_Y)
        at = out + (row - RADIUS_Y) * W
        done = inside & (rows >= y0 + RADIUS_Y)
        for j in tl.static_range(MAPS):
            tl.store(at + j * step, state[j], mask=done)
        state = state[MAPS:]


@triton.jit(do_not_specialize=CHANGING)
def _windows_kernel(
    source, target, mask, upstream, shift, taps_z, edge_z, edge_y, edge_x, rule, value_map, sums, channels, C, z_first, z_end,
    slots, slots_out, D, H, W, n_v, TAU: tl.constexpr, VALID: tl.constexpr, SQUARED: tl.constexpr, DENOMINATOR: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_UPSTREAM: tl.constexpr, WANT_MAP: tl.constexpr, WANT_FIXED: tl.constexpr,
    WANT_MOVED: tl.constexpr, RADIUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums along z, LCC, and the sums along z of the adjoint maps e, a, a mean, b, b mean that are wanted."""
    WANT: tl.constexpr = WANT_FIXED or WANT_MOVED
    HALO: tl.constexpr = RADIUS if WANT else 0
    n_z = tl.cdiv(z_end - z_first, TILE)
    pid = tl.program_id(0)
    v = (pid % n_v).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z0 = z_first + (pid // n_v % n_z).to(tl.int64) * TILE
    z1 = tl.minimum(z0 + TILE, z_end)
    nc = (pid // n_v // n_z).to(tl.int64)
    plane = tl.cast(H, tl.int64) * W
    inside = v < plane
    y, x = v // W, v % W
    tiles_z, tiles_y, tiles_x = tl.cdiv(D, TILE), tl.cdiv(H, TILE), tl.cdiv(W, TILE)
    tile = shift + (nc * tiles_z * tiles_y + y // TILE) * tiles_x + x // TILE
    tiles, per_z = tl.cast(channels, tl.int64) * tiles_z * tiles_y * tiles_x, tiles_y * tiles_x
    at = tile + z0 // TILE * per_z
    cf, cm = tl.load(at, mask=inside, other=0), tl.load(at + tiles, mask=inside, other=0)
    in_y, out_y = tl.load(edge_y + y, mask=inside, other=0), tl.load(edge_y + H + y, mask=inside, other=0)
    in_x, out_x = tl.load(edge_x + x), tl.load(edge_x + W + x)
    weights = _weights(taps_z, RADIUS)
    from_map = source + nc * slots * plane + v
    step = tl.cast(channels, tl.int64) * slots * plane
    out = target + nc * slots_out * plane + v
    step_out = tl.cast(channels, tl.int64) * slots_out * plane
    image, masked = nc * D * plane + v, nc // C * D * plane + v
    zero, spread = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int64)
    MAPS: tl.constexpr = 6 if HAS_MASK else 5
    ADJOINTS: tl.constexpr = 5 if WANT_FIXED and WANT_MOVED else 3 if WANT else 1
    state, adjoint = _rest(zero, MAPS, RADIUS), _rest(zero, ADJOINTS, RADIUS)
    loss = zero
    for i in range(0, z1 - z0 + 2 * (RADIUS + HALO)):
        z_in = z0 + i - (RADIUS + HALO)
        planes = z_in + spread
        here = inside & (planes >= 0) & (planes < D)
        at = from_map + z_in % slots * plane
        s1 = tl.load(at, mask=here, other=0)
        t1 = tl.load(at + step, mask=here, other=0)
        s2 = tl.load(at + 2 * step, mask=here, other=0)
        t2 = tl.load(at + 3 * step, mask=here, other=0)
        st = tl.load(at + 4 * step, mask=here, other=0)
        if HAS_MASK:
            n = tl.load(at + 5 * step, mask=here, other=0)
        else:
            n = tl.where(here, in_y * in_x, 0)
        at = tile + z_in // TILE * per_z
        df = tl.load(at, mask=here, other=0) - cf
        dm = tl.load(at + tiles, mask=here, other=0) - cm
        f, m = s1 + n * df, t1 + n * dm
        st += df * t1 + dm * f
        s2 += df * (s1 + f)
        t2 += dm * (t1 + m)
        if HAS_MASK:
            values = (f, m, s2, t2, st, n)
        else:
            values = (f, m, s2, t2, st)
        state = _push(state, values, weights, MAPS, RADIUS)
        z = z_in - RADIUS
        planes -= RADIUS
        real = inside & (planes >= tl.maximum(z0 - HALO, 0)) & (planes < D)
        edge = edge_z + tl.minimum(tl.maximum(z, 0), D - 1)
        in_z, out_z = tl.load(edge), tl.load(edge + D)
        if HAS_MASK:
            n = state[5]
            weight = tl.load(mask + masked + z * plane, mask=real, other=0)
        else:
            n = in_z * in_y * in_x
            weight = zero + 1
        if HAS_UPSTREAM:
            g = -tl.load(upstream + masked + z * plane, mask=real, other=0) / C
        else:
            g = -weight
        value, e, a, p, b, q = window_terms(
            state[0], state[1], state[2], state[3], state[4], n, in_z, out_z, in_y, out_y, out_x, cf, cm, g, rule, TAU, VALID,
            SQUARED, DENOMINATOR,
        )  # fmt: skip
        state = state[MAPS:]
        own = real & (planes >= z0) & (planes < z1)
        if WANT_MAP:
            tl.store(value_map + image + z * plane, -value / C, mask=own)
        else:
            loss += tl.where(own & (weight != 0), weight * value, 0)
        if WANT:
            e, a, p = tl.where(real, e, 0), tl.where(real, a, 0), tl.where(real, p, 0)
            b, q = tl.where(real, b, 0), tl.where(real, q, 0)
            passed = _wanted(e, a, p, b, q, WANT_FIXED, WANT_MOVED)
            adjoint = _push(adjoint, passed, weights, ADJOINTS, RADIUS)
            at = out + (z - RADIUS) % slots_out * plane
            done = inside & (planes >= z0 + RADIUS)
            for j in tl.static_range(ADJOINTS):
                tl.store(at + j * step_out, adjoint[j], mask=done)
            adjoint = adjoint[ADJOINTS:]
    if not WANT_MAP:
        tl.store(sums + pid, -tl.sum(loss))


@triton.jit(do_not_specialize=CHANGING)
def _gradient_kernel(
    source, fixed, moved, mask, shift, taps_y, taps_x, grad_fixed, grad_moved, channels, C, z_first, planes, slots, D, H, W, n_x,
    WANT_FIXED: tl.constexpr, WANT_MOVED: tl.constexpr, RADIUS_Y: tl.constexpr, RADIUS_X: tl.constexpr,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Sums along x and y of the adjoint maps, and own * a + other * e - mean."""
    nc, z, x, y0, y1, inside = _lanes(planes, z_first, H, W, n_x, BLOCK, BLOCK_X)
    tiles_z, tiles_y, tiles_x = tl.cdiv(D, TILE), tl.cdiv(H, TILE), tl.cdiv(W, TILE)
    tile = shift + (nc * tiles_z + z // TILE) * tiles_y * tiles_x
    tiles = tl.cast(channels, tl.int64) * tiles_z * tiles_y * tiles_x
    at = tile + y0 // TILE * tiles_x + x // TILE
    cf, cm = tl.load(at, mask=inside, other=0), tl.load(at + tiles, mask=inside, other=0)
    image, masked = (nc * D + z) * H * W + x, (nc // C * D + z) * H * W + x
    from_map = source + (nc * slots + z % slots) * H * W + x
    step = tl.cast(channels, tl.int64) * slots * H * W
    weights_y, weights_x = _weights(taps_y, RADIUS_Y), _weights(taps_x, RADIUS_X)
    zero, spread = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int64)
    ADJOINTS: tl.constexpr = 5 if WANT_FIXED and WANT_MOVED else 3
    state = _rest(zero, ADJOINTS, RADIUS_Y)
    for i in range(0, y1 - y0 + 2 * RADIUS_Y):
        row = y0 + i - RADIUS_Y
        # Spread, as the interpreter loses the type of a scalar's comparisons.
        rows = row + spread
        row_inside = inside & (rows >= 0) & (rows < H)
        e, a, p, b, q = zero, zero, zero, zero, zero
        for k in tl.static_range(-RADIUS_X, RADIUS_X + 1):
            here = row_inside & (x + k >= 0) & (x + k < W)
            at = tile + row // TILE * tiles_x + (x + k) // TILE
            df, dm = tl.load(at, mask=here, other=0) - cf, tl.load(at + tiles, mask=here, other=0) - cm
            at = from_map + (row * W + k)
            weight = weights_x[k if k >= 0 else -k]
            ke = weight * tl.load(at, mask=here, other=0)
            e += ke
            if WANT_FIXED:
                ka = weight * tl.load(at + step, mask=here, other=0)
                a += ka
                p += weight * tl.load(at + 2 * step, mask=here, other=0) + ka * df + ke * dm
                at += 2 * step
            if WANT_MOVED:
                kb = weight * tl.load(at + step, mask=here, other=0)
                b += kb
                q += weight * tl.load(at + 2 * step, mask=here, other=0) + kb * dm + ke * df
        values = _wanted(e, a, p, b, q, WANT_FIXED, WANT_MOVED)
        state = _push(state, values, weights_y, ADJOINTS, RADIUS_Y)
        y = row - RADIUS_Y
        done = inside & (rows >= y0 + RADIUS_Y)
        f = tl.load(fixed + image + y * W, mask=done, other=0).to(tl.float32) - cf
        m = tl.load(moved + image + y * W, mask=done, other=0).to(tl.float32) - cm
        # A sample that is not finite must not meet a window that passes 0 to it; the others carry the NaN.
        f, m = tl.where(f - f == 0, f, 0), tl.where(m - m == 0, m, 0)
        if HAS_MASK:
            sample = tl.load(mask + masked + y * W, mask=done, other=0)
        if WANT_FIXED:
            result = f * state[1] + m * state[0] - state[2]
            if HAS_MASK:
                result = tl.where(sample == 0, 0, sample * result)
            tl.store(grad_fixed + image + y * W, result, mask=done)
        if WANT_MOVED:
            result = m * state[ADJOINTS - 2] + f * state[0] - state[ADJOINTS - 1]
            if HAS_MASK:
                result = tl.where(sample == 0, 0, sample * result)
            tl.store(grad_moved + image + y * W, result, mask=done)
        state = state[ADJOINTS:]


def march(p):
    """LCC sums per sample, or the map, and the gradients of a `fastreg.kernels.lcc_loss.Problem`."""
    D, H, W = p.size
    channels, (radius, radius_y, radius_x) = p.n * p.c, p.windows.radius
    new = dict(dtype=torch.float32, device=p.fixed.device)
    tile = TILE.value
    flags = dict(HAS_MASK=p.mask is not None)
    shift = shift_of_tiles(p, torch.float32)
    n_adjoints = {0: 0, 1: 3, 2: 5}[len(p.wanted)]
    reach = 2 * radius if p.wanted else radius
    slab = min(SLAB[torch.float32], D)
    ring = min(slab + 2 * reach, D)
    moments = torch.empty(5 + (p.mask is not None), channels, ring, H, W, **new)
    adjoints = torch.empty(n_adjoints, channels, slab, H, W, **new)
    block_x = power_of_two(W, tile)
    n_x, n_v = blocks(W, block_x), blocks(H * W, BLOCK)
    flags |= dict(BLOCK=BLOCK, num_warps=BLOCK // WARP)
    lanes = dict(RADIUS_Y=radius_y, RADIUS_X=radius_x, BLOCK_X=block_x)
    slabs, done = [], 0

    def grid(planes):
        return (channels * blocks(planes, BLOCK // block_x) * blocks(H, tile) * n_x,)

    for z in range(0, D, slab):
        end = min(z + slab, D)
        ready = min(end + reach, D)
        if done < ready:
            launch(
                _moments_kernel, grid(ready - done), p.fixed, p.moved, p.mask, shift, *p.windows.taps[1:], moments, channels, p.c,
                done, ready - done, ring, D, H, W, n_x, **lanes, **flags,
            )  # fmt: skip
        done = ready
        n_z = blocks(end - z, tile)
        sums = torch.empty(p.n, p.c * n_z * n_v, **new)
        slabs.append(sums)
        launch(
            _windows_kernel, (channels * n_z * n_v,), moments, adjoints, p.mask, p.upstream, shift, p.windows.taps[0],
            *p.windows.edges, p.windows.rule, p.map, sums, channels, p.c, z, end, ring, slab, D, H, W, n_v,
            RADIUS=radius, **p.options, **flags,
        )  # fmt: skip
        if p.wanted:
            launch(
                _gradient_kernel, grid(end - z), adjoints, p.fixed, p.moved, p.mask, shift, *p.windows.taps[1:], p.wanted.get(0),
                p.wanted.get(1), channels, p.c, z, end - z, slab, D, H, W, n_x, WANT_FIXED=0 in p.wanted,
                WANT_MOVED=1 in p.wanted, **lanes, **flags,
            )  # fmt: skip
    return torch.cat(slabs, 1).sum(1, dtype=torch.float64)
