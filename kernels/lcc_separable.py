"""LCC over windows of any size and weights: fp64 sums, one axis at a time. What lcc_march.py does not do, this does.

Work split: per slab of 32 planes, all channels at once, six kinds of launches: moments of the images summed along x, along y,
along z with the statistics; their adjoint maps along x, along y, along z with the gradient. A program owns a block of 1024 (along
z 512) voxels and walks the taps of one axis; neighbours' loads meet in L1 along x and y, in L1 and L2 along z.
Memory layout: scratch maps (maps, n c, slots, H, W) of fp64, plane z in slot z % slots: the maps that are summed along z are
kept as rings of a slab and 2 radius planes, so no plane is computed twice.
Sums are fp64: one shift per channel resolves deviations of 5e-7 of the distance to it, as on the CPU, and lets windows cross
tiles of voxels freely, which fp32 sums about the shift of a tile could not.
Bytes (fp32 images, one gradient): read 2 images, 5 maps to and fro along x and y, 5 in and 3 out along z, 3 to and fro twice,
3 and 2 images in, 1 gradient out: about 82 volumes of 4 bytes, 1.8 ms at 3 TB/s for 256^3.
Arithmetic: 24 fp64 multiply-adds a tap and voxel: window 21 at 256^3: 8.5 G, 0.5 ms at the 17 G/ms of an H100.
Memory beyond inputs, outputs and gradients: (16 slab + 16 radius) planes of fp64 (both gradients: 20 and 20).
"""

import torch
import triton
import triton.language as tl

from fastreg.kernels.launch import blocks, launch, power_of_two
from fastreg.kernels.lcc_shift import shift_of_images
from fastreg.kernels.lcc_terms import CHANGING, SLAB, window_terms


@triton.jit
def _rows(outer, z_first, planes, H, W, n_x, BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr):
    """A block of rows of the planes [z_first, z_first + planes) of `outer` volumes: outer index, z, y (columns) and x (a row)."""
    row = (tl.program_id(0) // n_x).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    x = tl.program_id(0) % n_x * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
    y = row % H
    z = z_first + row // H % planes
    o = row // H // planes
    return o, z, y, x, (o < outer) & (x < W)


@triton.jit(do_not_specialize=CHANGING)
def _moments_x_kernel(
    fixed, moved, mask, shift, taps, target, channels, C, z_first, planes, slots, D, H, W, n_x, RADIUS, HAS_MASK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Sums along x of f, m, f^2, m^2, fm and, with a mask, its weight."""
    nc, z, y, x, inside = _rows(channels, z_first, planes, H, W, n_x, BLOCK_R, BLOCK_X)
    image, masked = ((nc * D + z) * H + y) * W + x, ((nc // C * D + z) * H + y) * W + x
    cf = tl.load(shift + nc, mask=nc < channels, other=0)
    cm = tl.load(shift + channels + nc, mask=nc < channels, other=0)
    s1 = tl.zeros([BLOCK_R, BLOCK_X], tl.float64)
    t1, s2, t2, st, n = s1, s1, s1, s1, s1
    for k in range(-RADIUS, RADIUS + 1):
        here = inside & (x + k >= 0) & (x + k < W)
        weight = tl.load(taps + tl.maximum(k, -k))
        if HAS_MASK:
            sample = tl.load(mask + masked + k, mask=here, other=0).to(tl.float64)
            here = here & (sample != 0)
            weight = weight * sample
            n += weight
        f = tl.where(here, tl.load(fixed + image + k, mask=here, other=0).to(tl.float64) - cf, 0)
        m = tl.where(here, tl.load(moved + image + k, mask=here, other=0).to(tl.float64) - cm, 0)
        s1 += weight * f
        t1 += weight * m
        s2 += weight * f * f
        t2 += weight * m * m
        st += weight * f * m
    at = ((nc * slots + z % slots) * H + y) * W + x
    step = tl.cast(channels, tl.int64) * slots * H * W
    tl.store(target + at, s1, mask=inside)
    tl.store(target + step + at, t1, mask=inside)
    tl.store(target + 2 * step + at, s2, mask=inside)
    tl.store(target + 3 * step + at, t2, mask=inside)
    tl.store(target + 4 * step + at, st, mask=inside)
    if HAS_MASK:
        tl.store(target + 5 * step + at, n, mask=inside)


@triton.jit(do_not_specialize=CHANGING)
def _sum_kernel(
    source, target, taps, outer, z_first, planes, slots_in, slots_out, H, W, n_x, RADIUS, ALONG_Y: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Sums of every map along x or y; `outer` counts maps and channels."""
    o, z, y, x, inside = _rows(outer, z_first, planes, H, W, n_x, BLOCK_R, BLOCK_X)
    at = ((o * slots_in + z % slots_in) * H + y) * W + x
    total = tl.zeros([BLOCK_R, BLOCK_X], tl.float64)
    for k in range(-RADIUS, RADIUS + 1):
        if ALONG_Y:
            value = tl.load(source + at + k * W, mask=inside & (y + k >= 0) & (y + k < H), other=0)
        else:
            value = tl.load(source + at + k, mask=inside & (x + k >= 0) & (x + k < W), other=0)
        total += tl.load(taps + tl.maximum(k, -k)) * value
    tl.store(target + ((o * slots_out + z % slots_out) * H + y) * W + x, total, mask=inside)


@triton.jit
def _columns(planes, z_first, plane, n_v, BLOCK_Z: tl.constexpr, BLOCK_V: tl.constexpr):
    """A block of voxels of the planes from z_first on of a channel: channel, z (a column), position in the plane (a row)."""
    n_z = tl.cdiv(planes, BLOCK_Z)
    nc = (tl.program_id(0) // n_v // n_z).to(tl.int64)
    z = tl.program_id(0) // n_v % n_z * BLOCK_Z + tl.arange(0, BLOCK_Z)[:, None]
    v = (tl.program_id(0) % n_v).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    return nc, z_first + z, v, (z < planes) & (v < plane)


@triton.jit(do_not_specialize=CHANGING)
def _windows_z_kernel(
    source, target, mask, upstream, shift, taps, edge_z, edge_y, edge_x, rule, value_map, sums, channels, C, z_first, planes, slots,
    slots_out, D, H, W, n_v, RADIUS, TAU: tl.constexpr, VALID: tl.constexpr, SQUARED: tl.constexpr, DENOMINATOR: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_UPSTREAM: tl.constexpr, WANT_MAP: tl.constexpr, WANT_FIXED: tl.constexpr,
    WANT_MOVED: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Sums along z, the LCC of each window, its sum over the block, and the adjoint maps e, a, a mean, b, b mean as asked for."""
    nc, z, v, inside = _columns(planes, z_first, H * W, n_v, BLOCK_Z, BLOCK_V)
    y, x, plane = v // W, v % W, tl.cast(H, tl.int64) * W
    step = tl.cast(channels, tl.int64) * slots * plane
    s1 = tl.zeros([BLOCK_Z, BLOCK_V], tl.float64)
    t1, s2, t2, st, n = s1, s1, s1, s1, s1
    for k in range(-RADIUS, RADIUS + 1):
        here = inside & (z + k >= 0) & (z + k < D)
        at = source + (nc * slots + (z + k) % slots) * plane + v
        weight = tl.load(taps + tl.maximum(k, -k))
        s1 += weight * tl.load(at, mask=here, other=0)
        t1 += weight * tl.load(at + step, mask=here, other=0)
        s2 += weight * tl.load(at + 2 * step, mask=here, other=0)
        t2 += weight * tl.load(at + 3 * step, mask=here, other=0)
        st += weight * tl.load(at + 4 * step, mask=here, other=0)
        if HAS_MASK:
            n += weight * tl.load(at + 5 * step, mask=here, other=0)
    in_z, out_z = tl.load(edge_z + z, mask=z < D, other=0), tl.load(edge_z + D + z, mask=z < D, other=0)
    in_y, out_y = tl.load(edge_y + y, mask=y < H, other=0), tl.load(edge_y + H + y, mask=y < H, other=0)
    in_x, out_x = tl.load(edge_x + x), tl.load(edge_x + W + x)
    if not HAS_MASK:
        n = in_z * in_y * in_x
    at = z * plane + v
    sample = (nc // C) * D * plane + at
    weight = tl.full([BLOCK_Z, BLOCK_V], 1, tl.float64)
    if HAS_MASK:
        weight = tl.load(mask + sample, mask=inside, other=0).to(tl.float64)
    if HAS_UPSTREAM:
        g = -tl.load(upstream + sample, mask=inside, other=0).to(tl.float64) / C
    else:
        g = -weight
    cf, cm = tl.load(shift + nc), tl.load(shift + channels + nc)
    value, e, a, f_mean, b, m_mean = window_terms(
        s1, t1, s2, t2, st, n, in_z, out_z, in_y, out_y, out_x, cf, cm, g, rule, TAU, VALID, SQUARED, DENOMINATOR
    )  # fmt: skip
    if WANT_MAP:
        tl.store(value_map + nc * D * plane + at, -value / C, mask=inside)
    else:
        tl.store(sums + tl.program_id(0), -tl.sum(tl.where(inside & (weight != 0), weight * value, 0)))
    out = target + (nc * slots_out + z % slots_out) * plane + v
    step = tl.cast(channels, tl.int64) * slots_out * plane
    if WANT_FIXED or WANT_MOVED:
        tl.store(out, e, mask=inside)
    if WANT_FIXED:
        tl.store(out + step, a, mask=inside)
        tl.store(out + 2 * step, f_mean, mask=inside)
        out += 2 * step
    if WANT_MOVED:
        tl.store(out + step, b, mask=inside)
        tl.store(out + 2 * step, m_mean, mask=inside)


@triton.jit(do_not_specialize=CHANGING)
def _gradient_z_kernel(
    source, own, other, mask, shift_own, shift_other, taps, grad, first_map, channels, C, z_first, planes, slots, D, H, W, n_v,
    RADIUS, HAS_MASK: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Adjoint maps summed along z, and the gradient of one image: own * a + other * e - mean."""
    nc, z, v, inside = _columns(planes, z_first, H * W, n_v, BLOCK_Z, BLOCK_V)
    plane = tl.cast(H, tl.int64) * W
    step = tl.cast(channels, tl.int64) * slots * plane
    e = tl.zeros([BLOCK_Z, BLOCK_V], tl.float64)
    a, mean = e, e
    for k in range(-RADIUS, RADIUS + 1):
        here = inside & (z + k >= 0) & (z + k < D)
        at = source + (nc * slots + (z + k) % slots) * plane + v
        weight = tl.load(taps + tl.maximum(k, -k))
        e += weight * tl.load(at, mask=here, other=0)
        a += weight * tl.load(at + first_map * step, mask=here, other=0)
        mean += weight * tl.load(at + (first_map + 1) * step, mask=here, other=0)
    at = (nc * D + z) * plane + v
    f = tl.load(own + at, mask=inside, other=0).to(tl.float64) - tl.load(shift_own + nc)
    m = tl.load(other + at, mask=inside, other=0).to(tl.float64) - tl.load(shift_other + nc)
    # A sample that is not finite must not meet a window that passes 0 to it; the others carry the NaN.
    f, m = tl.where(f - f == 0, f, 0), tl.where(m - m == 0, m, 0)
    result = f * a + m * e - mean
    if HAS_MASK:
        sample = (nc // C * D + z) * plane + v
        weight = tl.load(mask + sample, mask=inside, other=0).to(tl.float64)
        result = tl.where(weight == 0, 0, weight * result)
    tl.store(grad + at, result, mask=inside)


def separable(p):
    """LCC sums per channel and block, or the map, and the gradients of a `fastreg.kernels.lcc_loss.Problem`."""
    D, H, W = p.size
    channels, radius = p.n * p.c, p.windows.radius
    new = dict(dtype=torch.float64, device=p.fixed.device)
    shift = shift_of_images(p, torch.float64)
    n_moments, n_adjoints = 5 + (p.mask is not None), {0: 0, 1: 3, 2: 5}[len(p.wanted)]
    halo = radius[0] if p.wanted else 0
    slab = min(SLAB[torch.float64], D)
    ring = min(SLAB[torch.float64] + 2 * radius[0], D)
    rows = torch.empty(n_moments, channels, slab, H, W, **new)  # what x leaves to y; then the adjoint maps
    moments = torch.empty(n_moments, channels, ring, H, W, **new)
    adjoint_rows = torch.empty(n_adjoints, channels, slab, H, W, **new)
    adjoints = torch.empty(n_adjoints, channels, ring, H, W, **new)
    block_x, block_v = power_of_two(W, 128), power_of_two(H * W, 128)
    block_r, n_x, n_v = 1024 // block_x, blocks(W, block_x), blocks(H * W, block_v)
    blocks_of_sums, flags = [], dict(HAS_MASK=p.mask is not None)

    def pieces(begin, end):
        for first in range(begin, end, slab):
            yield first, min(slab, end - first)

    def plane_blocks(outer, planes):
        size = power_of_two(outer * planes * H, block_r)
        return (blocks(outer * planes * H, size) * n_x,), dict(BLOCK_R=size, BLOCK_X=block_x)

    def column_blocks(planes):
        size = power_of_two(planes, 512 // block_v)
        return (channels * blocks(planes, size) * n_v,), dict(BLOCK_Z=size, BLOCK_V=block_v)

    def total(source, target, first, planes, axis):
        maps = len(target) * channels
        grid, block = plane_blocks(maps, planes)
        launch(
            _sum_kernel, grid, source, target, p.windows.taps[axis], maps, first, planes, source.shape[2], target.shape[2],
            H, W, n_x, radius[axis], ALONG_Y=axis == 1, **block,
        )  # fmt: skip

    done, windowed = 0, 0
    for z in range(0, D, slab):
        end = min(z + slab, D)
        reach = min(end + halo + radius[0], D)
        for first, planes in pieces(done, reach):
            grid, block = plane_blocks(channels, planes)
            launch(
                _moments_x_kernel, grid, p.fixed, p.moved, p.mask, shift, p.windows.taps[2], rows, channels, p.c, first, planes,
                slab, D, H, W, n_x, radius[2], **flags, **block,
            )  # fmt: skip
            total(rows, moments, first, planes, 1)
        done, reach = reach, min(end + halo, D)
        for first, planes in pieces(windowed, reach):
            grid, block = column_blocks(planes)
            sums = torch.empty(p.n, grid[0] // p.n, **new)
            launch(
                _windows_z_kernel, grid, moments, rows, p.mask, p.upstream, shift, p.windows.taps[0], *p.windows.edges,
                p.windows.rule, p.map, sums, channels, p.c, first, planes, ring, slab, D, H, W, n_v, radius[0],
                **p.options, **flags, **block,
            )  # fmt: skip
            blocks_of_sums.append(sums)
            if p.wanted:
                total(rows[:n_adjoints], adjoint_rows, first, planes, 2)
                total(adjoint_rows, adjoints, first, planes, 1)
        windowed = reach
        grid, block = column_blocks(end - z)
        for i, (image, grad) in enumerate(p.wanted.items()):
            own, other = (p.fixed, p.moved)[:: 1 if image == 0 else -1]
            launch(
                _gradient_z_kernel, grid, adjoints, own, other, p.mask, shift[image], shift[1 - image], p.windows.taps[0], grad,
                1 + 2 * i, channels, p.c, z, end - z, ring, D, H, W, n_v, radius[0], **flags, **block,
            )  # fmt: skip
    return torch.cat(blocks_of_sums, 1).sum(1)
