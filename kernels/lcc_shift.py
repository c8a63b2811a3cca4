"""What sums of fixed and moved are shifted by, per image or per tile of TILE^3 voxels: the mean of 8 x 8 x 8 of its samples.

Samples that are masked out or not finite do not count. Where that leaves none of the 512, all are asked.
"""

import math

import torch
import triton
import triton.language as tl

from fastreg.kernels.launch import blocks, launch

TILE = tl.constexpr(32)  # voxels an axis that share a shift
_SAMPLES = tl.constexpr(8)  # of a tile's axis, from which its shift is taken
_BLOCK = 1024
_PARTS = tl.constexpr(256)  # of an image at most, of at least _PER_PART voxels
_PER_PART = 8192


@triton.jit
def _finite(fixed, moved, mask, image, masked, at, inside, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr):
    """Fixed, moved and 1 where both are finite and unmasked, 0 elsewhere."""
    f = tl.load(fixed + image + at, mask=inside, other=0).to(DTYPE)
    m = tl.load(moved + image + at, mask=inside, other=0).to(DTYPE)
    keep = inside & (f - f == 0) & (m - m == 0)
    if HAS_MASK:
        keep = keep & (tl.load(mask + masked + at, mask=inside, other=0) != 0)
    return tl.where(keep, f, 0), tl.where(keep, m, 0), tl.where(keep, 1, 0).to(DTYPE)


@triton.jit
def _few(
    fixed, moved, mask, image, masked, z0, y0, x0, D, H, W, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Sums over 8 x 8 x 8 samples of the tile that begins at (z0, y0, x0), and how many count."""
    nz, ny, nx = tl.minimum(D - z0, TILE), tl.minimum(H - y0, TILE), tl.minimum(W - x0, TILE)
    i = tl.arange(0, _SAMPLES * _SAMPLES * _SAMPLES)
    z = z0 + i // (_SAMPLES * _SAMPLES) * nz // _SAMPLES
    y = y0 + i // _SAMPLES % _SAMPLES * ny // _SAMPLES
    x = x0 + i % _SAMPLES * nx // _SAMPLES
    at = (z.to(tl.int64) * H + y) * W + x
    f, m, count = _finite(fixed, moved, mask, image, masked, at, i >= 0, HAS_MASK, DTYPE)
    return tl.sum(f), tl.sum(m), tl.sum(count)


@triton.jit
def _few_amid(fixed, moved, mask, nc, C, D, H, W, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr):
    """As _few, of the tile amid image nc."""
    z0, y0, x0 = (
        tl.maximum(D // 2 - TILE // 2, 0),
        tl.maximum(H // 2 - TILE // 2, 0),
        tl.maximum(W // 2 - TILE // 2, 0),
    )
    volume = tl.cast(D, tl.int64) * H * W
    return _few(fixed, moved, mask, nc * volume, nc // C * volume, z0, y0, x0, D, H, W, HAS_MASK, DTYPE)


@triton.jit(do_not_specialize=["n_parts"])
def _parts_kernel(
    fixed, moved, mask, parts, C, D, H, W, n_parts, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """parts (n c, n_parts, 3): sums over all of an image, which its middle leaves without a shift; of other images, nothing."""
    dtype = parts.dtype.element_ty
    nc = (tl.program_id(0) // n_parts).to(tl.int64)
    part = tl.program_id(0) % n_parts
    _, _, count = _few_amid(fixed, moved, mask, nc, C, D, H, W, HAS_MASK, dtype)
    if count == 0:
        volume = tl.cast(D, tl.int64) * H * W
        fs = tl.zeros([BLOCK], dtype)
        ms, counts = fs, fs
        for start in range(part * BLOCK, volume, n_parts * BLOCK):
            j = start + tl.arange(0, BLOCK).to(tl.int64)
            more = _finite(fixed, moved, mask, nc * volume, nc // C * volume, j, j < volume, HAS_MASK, dtype)
            fs, ms, counts = fs + more[0], ms + more[1], counts + more[2]
        out = parts + 3 * tl.program_id(0).to(tl.int64)
        tl.store(out, tl.sum(fs))
        tl.store(out + 1, tl.sum(ms))
        tl.store(out + 2, tl.sum(counts))


@triton.jit(do_not_specialize=["n_parts"])
def _image_kernel(fixed, moved, mask, parts, shift, C, D, H, W, n_parts, HAS_MASK: tl.constexpr):
    """shift (2, n c), one program each."""
    nc = tl.program_id(0).to(tl.int64)
    f, m, count = _few_amid(fixed, moved, mask, nc, C, D, H, W, HAS_MASK, shift.dtype.element_ty)
    if count == 0:
        i = tl.arange(0, _PARTS)
        of_part = parts + 3 * (nc * n_parts + i)
        f = tl.sum(tl.load(of_part, mask=i < n_parts, other=0))
        m = tl.sum(tl.load(of_part + 1, mask=i < n_parts, other=0))
        count = tl.sum(tl.load(of_part + 2, mask=i < n_parts, other=0))
    tl.store(shift + nc, f / tl.maximum(count, 1))
    tl.store(shift + tl.num_programs(0) + nc, m / tl.maximum(count, 1))


@triton.jit
def _tile_kernel(
    fixed, moved, mask, fallback, shift, C, D, H, W, tiles_z, tiles_y, tiles_x, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """shift (2, n c, tiles), one program each. Where no sample of a tile counts: fallback (2, n c), if any, or 0.

    Bytes: with stride 4 along the lines, 1/16 of the sectors of both images.
    """
    dtype = shift.dtype.element_ty
    tiles = tiles_z * tiles_y * tiles_x
    channels = tl.num_programs(0) // tiles
    tile, nc = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    z0, y0, x0 = (
        tile // (tiles_y * tiles_x) * TILE,
        tile // tiles_x % tiles_y * TILE,
        tile % tiles_x * TILE,
    )
    volume = tl.cast(D, tl.int64) * H * W
    image, masked = nc * volume, nc // C * volume
    f, m, count = _few(fixed, moved, mask, image, masked, z0, y0, x0, D, H, W, HAS_MASK, dtype)
    if count == 0:
        ny, nx = tl.minimum(H - y0, TILE), tl.minimum(W - x0, TILE)
        inside = tl.minimum(D - z0, TILE) * ny * nx
        fs = tl.zeros([BLOCK], dtype)
        ms, counts = fs, fs
        for start in range(0, inside, BLOCK):
            j = start + tl.arange(0, BLOCK)
            at = ((z0 + j // (ny * nx)).to(tl.int64) * H + y0 + j // nx % ny) * W + x0 + j % nx
            more = _finite(fixed, moved, mask, image, masked, at, j < inside, HAS_MASK, dtype)
            fs, ms, counts = fs + more[0], ms + more[1], counts + more[2]
        f, m, count = tl.sum(fs), tl.sum(ms), tl.sum(counts)
    f, m = f / tl.maximum(count, 1), m / tl.maximum(count, 1)
    if fallback is not None:
        f = tl.where(count > 0, f, tl.load(fallback + nc))
        m = tl.where(count > 0, m, tl.load(fallback + channels + nc))
    tl.store(shift + nc * tiles + tile, f)
    tl.store(shift + (channels + nc) * tiles + tile, m)


def shift_of_images(p, dtype):
    """(2, n c) of a `fastreg.kernels.lcc_loss.Problem`. Two launches, of which the first does nothing for most images."""
    channels = p.n * p.c
    n_parts = min(_PARTS.value, blocks(math.prod(p.size), _PER_PART))
    parts = torch.empty(channels, n_parts, 3, dtype=dtype, device=p.fixed.device)
    shift = parts.new_empty(2, channels)
    sizes, flag = (p.c, *p.size, n_parts), dict(HAS_MASK=p.mask is not None)
    launch(
        _parts_kernel, (channels * n_parts,), p.fixed, p.moved, p.mask, parts, *sizes, BLOCK=_BLOCK, **flag
    )
    launch(_image_kernel, (channels,), p.fixed, p.moved, p.mask, parts, shift, *sizes, **flag)
    return shift


def shift_of_tiles(p, dtype):
    """(2, n c, *tiles) of a `fastreg.kernels.lcc_loss.Problem`."""
    tiles = [blocks(n, TILE.value) for n in p.size]
    # A tile whose samples are all masked out still has windows.
    fallback = None if p.mask is None else shift_of_images(p, dtype)
    shift = torch.empty(2, p.n * p.c, *tiles, dtype=dtype, device=p.fixed.device)
    launch(
        _tile_kernel, (p.n * p.c * math.prod(tiles),), p.fixed, p.moved, p.mask, fallback, shift, p.c, *p.size, *tiles,
        HAS_MASK=p.mask is not None, BLOCK=_BLOCK,
    )  # fmt: skip
    return shift
