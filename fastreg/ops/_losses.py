"""What the similarity losses share: their images, their reductions and the frame of their ops.

A loss op returns one sum per sample and, from the same pass, the gradients of that sum where they are needed; its map
op returns the loss of each voxel, (N, 1, *spatial). The mean is taken outside.
"""

import itertools
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from fastreg import _check, _ext

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = get_args(Reduction)


def images(op, fixed, moved, mask, reduction):
    """Checked: the images in the wider dtype of both, and the mask."""
    _check.floating(op, fixed=fixed, moved=moved, mask=mask)
    _check.image(op, "fixed", fixed)
    _check.same_shape(op, "moved", moved, "fixed", fixed)
    _check.choice(op, "reduction", reduction, REDUCTIONS)
    dtype = torch.promote_types(fixed.dtype, moved.dtype)
    fixed, moved = fixed.to(dtype), moved.to(dtype)
    return fixed, moved, _check.mask(op, mask, fixed)


# PyTorch adds fewer numbers than this in one order, more in one that depends on the number of threads.
_PIECE = 2**14


def added(x, dtype):
    """Sums over the last axis in `dtype`: of pieces, then of their sums, so with one result whatever the number of threads."""
    while x.shape[-1] >= 2 * _PIECE:
        x = F.pad(x, (0, -x.shape[-1] % _PIECE)).unflatten(-1, (-1, _PIECE)).sum(-1, dtype=dtype)
    return x.sum(-1, dtype=dtype)


def mean_of(total, image, mask):
    """Mean over voxels, channels and batch of ``image``, weighted by the mask; an all-zero mask gives 0."""
    if mask is None:
        return total / image.numel() if image.numel() else total * float("nan")
    # Weights below 0 count as 0 in the kernels too; a NaN among them stays a NaN.
    weight = added(mask.clamp_min(0).flatten(), total.dtype) * image.shape[1]
    return torch.where(weight == 0, 0, total / weight.masked_fill(weight == 0, 1))


def with_unit_gradients(total, fixed, moved, needs):
    """What a loss op returns, by its reference: ``total(fixed, moved)`` and its gradients in arithmetic dtype."""
    loss, dtype = total(fixed, moved), _ext.arithmetic(fixed)
    grads = (loss, loss)
    if any(needs):
        grads = _ext.grad_of(total, (fixed.to(dtype), moved.to(dtype)), torch.ones_like(loss))
    return loss, *_ext.only_needed(grads, needs)


def fake(fixed, moved, *options_and_needs):
    dtype = _ext.arithmetic(fixed)
    return fixed.new_empty(fixed.shape[0], dtype=dtype), *(
        fixed.new_empty(fixed.shape if need else 0, dtype=dtype) for need in options_and_needs[-2:]
    )


def map_fake(fixed, *options):
    return fixed.new_empty((fixed.shape[0], 1, *fixed.shape[2:]), dtype=_ext.arithmetic(fixed))


def map_bwd_fake(grad, fixed, moved, *options_and_needs):
    return _ext.empty_where_needed((fixed, moved), options_and_needs[-2:])


def autograd(name):
    """Autograd of a loss op (fixed, moved, ..., need_fixed, need_moved) -> (sums, unit gradients): backward scales them."""

    def setup(ctx, inputs, output):
        ctx.dtypes, ctx.needs = (inputs[0].dtype, inputs[1].dtype), inputs[-2:]
        ctx.save_for_backward(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, *grads_of_units):
        if any(g is not None for g in grads_of_units):
            raise RuntimeError(f"fastreg::{name}: double backward is not supported")
        grads = [None] * len(ctx.needs_input_grad)
        for i, unit in enumerate(ctx.saved_tensors):
            if ctx.needs_input_grad[i] and grad is not None:
                if not ctx.needs[i]:
                    raise RuntimeError(
                        f"fastreg::{name}: call it with need_fixed / need_moved set for what requires a gradient"
                    )
                grads[i] = (unit * grad.view(-1, *[1] * (unit.dim() - 1))).to(ctx.dtypes[i])
        return tuple(grads)

    _ext.autograd(name, setup, backward)


def backward_by(name, backward_name):
    """Autograd of an op (fixed, moved, more tensors or None, *options) by its backward op (grad, the same, needs)."""
    bwd = getattr(torch.ops.fastreg, backward_name)

    def setup(ctx, inputs, output):
        tensors = list(itertools.takewhile(lambda t: t is None or isinstance(t, torch.Tensor), inputs))
        ctx.options = inputs[len(tensors) :]
        ctx.save_for_backward(*tensors)

    def backward(ctx, grad):
        needs = ctx.needs_input_grad[:2]
        grads = bwd(grad, *ctx.saved_tensors, *ctx.options, *needs)
        return *_ext.none_unless_needed(grads, needs), *[None] * (len(ctx.needs_input_grad) - 2)

    _ext.autograd(name, setup, backward)
