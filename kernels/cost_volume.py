"""cost_volume in Triton: a program per cell and block of offsets, which marches through the cell's samples, channel by channel.

Samples come one at a time, so that fixed and its weight are scalars, and an offset is a lane: moving is read where it lies,
neighbouring lanes beside each other, from L1 after the first sample of a cell. Sums of a row of a cell, of costs and of weights, are
added to those before: fp32 keeps its digits. Bytes: as in csrc/cuda/cost_volume.cuh; a load from L1 each difference is the limit.
The backward is the reference's, on the GPU.
"""

import math

import torch
import triton
import triton.language as tl

from fastreg.kernels.launch import TYPES, arithmetic_of, blocks, contiguous, launch, power_of_two

MOST = 1024  # offsets of a program
SIZES = "C D H W cells_z cells_y cells_x offsets".split()


@triton.jit(do_not_specialize=SIZES)
def cost_kernel(
    fixed, moving, mask, out, C, D, H, W, cells_z, cells_y, cells_x, offsets,
    CZ: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr, RZ: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(offsets, BLOCK)
    cell = (tl.program_id(0) // tiles).to(tl.int64)
    o = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    x0, rest = cell % cells_x * CX, cell // cells_x
    y0, rest = rest % cells_y * CY, rest // cells_y
    z0, n = rest % cells_z * CZ, rest // cells_z
    z1, y1, x1 = tl.minimum(z0 + CZ, D), tl.minimum(y0 + CY, H), tl.minimum(x0 + CX, W)
    dx = o % (2 * RX + 1) - RX
    dy = o // (2 * RX + 1) % (2 * RY + 1) - RY
    dz = o // ((2 * RX + 1) * (2 * RY + 1)) - RZ
    there = o < offsets
    volume = D.to(tl.int64) * H * W
    total = tl.zeros((BLOCK,), A)
    weights = tl.zeros((1,), A)
    for c in range(C):
        image = (n * C + c) * volume
        for z in range(z0, z1, SZ):
            pz = tl.minimum(tl.maximum(z + dz, 0), D - 1).to(tl.int64) * H
            for y in range(y0, y1, SY):
                row = image + (pz + tl.minimum(tl.maximum(y + dy, 0), H - 1)) * W
                of_row = tl.zeros((BLOCK,), A)
                weights_of_row = tl.zeros((1,), A)
                for x in range(x0, x1, SX):
                    voxel = (z * H + y) * W + x
                    f = tl.load(fixed + image + voxel).to(A)
                    m = tl.load(
                        moving + row + tl.minimum(tl.maximum(x + dx, 0), W - 1), mask=there, other=0
                    ).to(A)
                    d = f - m
                    if MASKED:
                        w = tl.load(mask + n * volume + voxel)
                        of_row += tl.where(w <= 0, 0.0, w * (d * d))
                        weights_of_row += tl.where(w <= 0, 0.0, w)
                    else:
                        of_row += d * d
                        weights_of_row += 1.0
                total += of_row
                weights += weights_of_row
    # The weights were added for each channel.
    weight = tl.sum(weights, 0)
    tl.store(out + cell * offsets + o, tl.where(weight == 0, 0.0, total / weight), mask=there)


def cost_volume(fixed, moving, mask, cell, radius, stride):
    fixed, moving, mask = contiguous(fixed, moving, mask)
    dtype, nd = arithmetic_of(fixed), fixed.dim() - 2
    cells = [-(-n // c) for n, c in zip(fixed.shape[2:], cell, strict=True)]
    offsets = math.prod(2 * r + 1 for r in radius)
    out = torch.empty((len(fixed), *cells, offsets), dtype=dtype, device=fixed.device)
    if fixed.numel() == 0:
        return out.zero_()
    if mask is not None:
        mask = mask.to(dtype)
    flat = 3 - nd

    def axes(numbers, missing):
        return [missing] * flat + list(numbers)

    block = power_of_two(offsets, MOST)
    names = [f"{what}{axis}" for what in "CRS" for axis in "ZYX"]
    constants = dict(zip(names, [*axes(cell, 1), *axes(radius, 0), *axes(stride, 1)], strict=True))
    launch(
        cost_kernel, (len(fixed) * math.prod(cells) * blocks(offsets, block),), fixed, moving, mask, out, fixed.shape[1],
        *axes(fixed.shape[2:], 1), *axes(cells, 1), offsets, MASKED=mask is not None, BLOCK=block, A=TYPES[dtype],
        num_warps=max(1, min(8, block // 128)), **constants,
    )  # fmt: skip
    return out
