"""What each cell of a fixed image costs at each offset in a moving one: mean squared differences (a discrete search)."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops import _losses

_CHUNK = 2**22  # differences that the backward of the reference holds at a time


def cost_volume(
    fixed: Tensor,  # (N, C, *spatial)
    moving: Tensor,  # (N, C, *spatial)
    cell: int | Sequence[int],
    radius: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    mask: Tensor | None = None,  # (N, 1, *spatial)
) -> Tensor:  # (N, *cells, prod(2 radius + 1))
    """Costs of moving each cell of fixed by each offset of a cube: mean squared differences of the features.

    The image is cut into cells of ``cell`` voxels from its first voxel on. For each, and for all offsets d with
    |d_k| <= radius_k in lexicographic (z, y, x) order, last axis fastest:
    ``cost(cell, d) = sum_p m(p) sum_c (fixed_c(p) - moving_c(p + d))^2 / (C sum_p m(p))`` over the cell's voxels p, m = 1
    without a mask. moving goes on beyond its border with the nearest value. The argmin over d is the block matching of the
    cells; a regularised choice begins with these costs (Heinrich et al. 2013).
    Gradients: ``d fixed_c(p) = 2 m(p) / (C M) sum_d g(cell, d) (fixed_c(p) - moving_c(p + d))`` with M = sum of m over the
    cell; moving receives the negative of each term where it was read.

    Args:
        fixed, moving (Tensor): (N, C, D, H, W) or (N, C, H, W), fp64 / fp32 / fp16 / bf16; mixed dtypes are promoted.
        cell (int or sequence): edge of a cell in voxels, >= 1, as radius and stride below 2^15; one or one per axis. Where an
            axis is no multiple of it, the last cell averages the voxels that it has.
        radius (int or sequence): largest offset in voxels, >= 0, one or one per axis; may exceed the image.
        stride (int or sequence): of a cell's voxels, every how many-th along each axis counts, from its first on.
        mask (Tensor, optional): (N, 1, *spatial), >= 0, or bool: weights of the voxels of fixed. No gradient. A cell without
            weight costs 0 at all offsets, so that its neighbours decide.

    Returns:
        Tensor: (N, *cells, prod(2 radius + 1)) with ceil(size / cell) cells an axis, fp32 (fp64 for fp64): the costs of a
        cell lie in one piece, as a search over its offsets reads them. Differentiable (once) in fixed and moving.

    Raises:
        TypeError: a tensor is not floating, cell, radius or stride is not whole.
        ValueError: shapes, devices, a mask that requires a gradient, cell, radius or stride.

    Notes:
        The same bits on CPU whatever the thread count. A NaN in fixed reaches its cell, one in moving what reads it, none
        what the mask leaves out (m <= 0); a NaN weight makes its cell NaN.
        CPU: no copy of an image; a thread holds the costs of one cell and what its voxels reach of one channel,
        (8 + 2 radius)^nd values at most. The backward holds that twice, and for halves an fp32 gradient of moving. On a GPU
        it runs through the offsets with a few images in memory.

    Example:
        >>> fixed, moving = torch.zeros(2, 1, 1, 2, 6)
        >>> fixed[..., 1], moving[..., 2] = 1, 1  # found one voxel to the right
        >>> fastreg.cost_volume(fixed, moving, (2, 3), (0, 1))[0, 0]
        tensor([[0.3333, 0.6667, 0.0000],
                [0.3333, 0.0000, 0.0000]])
    """
    op = "cost_volume"
    _check.floating(op, fixed=fixed, moving=moving, mask=mask)
    nd = _check.image(op, "fixed", fixed)
    _check.same_shape(op, "moving", moving, "fixed", fixed)
    cell = _check.whole_per_axis(op, "cell", cell, nd, minimum=1)
    radius = _check.whole_per_axis(op, "radius", radius, nd)
    stride = _check.whole_per_axis(op, "stride", stride, nd, minimum=1)
    dtype = torch.promote_types(fixed.dtype, moving.dtype)
    fixed, moving = fixed.to(dtype), moving.to(dtype)
    mask = _check.mask(op, mask, fixed)
    try:
        return torch.ops.fastreg.cost_volume(fixed, moving, mask, cell, radius, stride)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "alloc" not in str(error) and "overflow" not in str(error):
            raise
    shape = _shape(fixed, cell, radius)
    size = math.prod(shape) * _ext.arithmetic(fixed).itemsize / 1e9
    _check.fail(op, "radius", "leave a result that fits into memory", f"{radius}: {shape}, {size:.0f} GB")


def _cells(fixed, cell):
    return tuple((n + c - 1) // c for n, c in zip(fixed.shape[2:], cell, strict=True))


def _shape(fixed, cell, radius):
    return (fixed.shape[0], *_cells(fixed, cell), math.prod(2 * r + 1 for r in radius))


def _offsets(radius):
    return list(itertools.product(*(range(-r, r + 1) for r in radius)))


def _taken(x, index):
    for k, at in enumerate(index):
        x = x.index_select(2 + k, at)
    return x


def _costs(fixed, moving, mask, cell, stride, offsets):
    """At these offsets, (N, *cells, offsets)."""
    dtype, device, cells = _ext.arithmetic(fixed), fixed.device, _cells(fixed, cell)
    at = []  # along each axis, the voxels that count
    for n, c, s in zip(fixed.shape[2:], cell, stride, strict=True):
        voxels = torch.arange(n, device=device)
        at.append(voxels[voxels % c % s == 0])

    def per_cell(x):
        for k, (voxels, c) in enumerate(zip(at, cell, strict=True)):
            shape = (*x.shape[: 2 + k], cells[k], *x.shape[3 + k :])
            x = x.new_zeros(shape).index_add(2 + k, voxels // c, x)
        return x[:, 0]

    f, m = _taken(fixed, at).to(dtype), moving.to(dtype)
    weight = (
        fixed.new_ones((len(fixed), 1, *fixed.shape[2:]), dtype=dtype) if mask is None else mask.to(dtype)
    )
    weight = _taken(weight, at)
    total = per_cell(weight.clamp_min(0)) * fixed.shape[1]
    for k, (voxels, c) in enumerate(zip(at, cell, strict=True)):
        total = total.index_select(1 + k, voxels // c)
    total = total[:, None]
    # Shares, which a total of any size leaves finite, on the way back too.
    share = torch.where(total == 0, 0, weight.clamp_min(0) / torch.where(total == 0, 1, total))
    costs = []
    for offset in offsets:
        read = [(v + o).clamp(0, max(n - 1, 0)) for v, o, n in zip(at, offset, fixed.shape[2:], strict=True)]
        difference = f - _taken(m, read)
        if mask is not None:
            difference = torch.where(weight <= 0, 0, difference)
        costs.append(per_cell(share * difference.square().sum(1, keepdim=True)))
    return torch.stack(costs, -1)


def cost_volume_ref(fixed, moving, mask, cell, radius, stride):
    _fake(
        fixed, moving, mask, cell, radius, stride
    )  # where no memory holds it, before the first of many offsets
    return _costs(fixed, moving, mask, cell, stride, _offsets(radius))


def _fake(fixed, moving, mask, cell, radius, stride):
    return fixed.new_empty(_shape(fixed, cell, radius), dtype=_ext.arithmetic(fixed))


def cost_volume_bwd_ref(grad, fixed, moving, mask, cell, radius, stride, need_fixed, need_moving):
    """A few offsets at a time: all of them would hold an image each."""
    dtype, offsets = _ext.arithmetic(fixed), _offsets(radius)
    inputs = fixed.to(dtype), moving.to(dtype)
    grads = [torch.zeros_like(t) for t in inputs]
    step = max(1, _CHUNK // max(fixed.numel(), 1))
    for k in range(0, len(offsets), step):
        part = offsets[k : k + step]

        def costs(f, m, part=part):
            return _costs(f, m, mask, cell, stride, part)

        for total, g in zip(grads, _ext.grad_of(costs, inputs, grad[..., k : k + step]), strict=True):
            total += g
    return _ext.only_needed([g.to(fixed.dtype) for g in grads], (need_fixed, need_moving))


_OPTIONS = "Tensor? mask, int[] cell, int[] radius, int[] stride"
_ext.define(
    f"cost_volume(Tensor fixed, Tensor moving, {_OPTIONS}) -> Tensor",
    cost_volume_ref,
    _fake,
)
_ext.define(
    f"cost_volume_bwd(Tensor grad, Tensor fixed, Tensor moving, {_OPTIONS}, bool need_fixed, bool need_moving)"
    " -> (Tensor, Tensor)",
    cost_volume_bwd_ref,
    _losses.map_bwd_fake,
)
_losses.backward_by("cost_volume", "cost_volume_bwd")
_ext.once_differentiable("cost_volume_bwd")
_ext.batched("cost_volume", "cost_volume_bwd")
