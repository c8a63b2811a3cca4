"""What the regularisers share: finite differences of a displacement, one number per sample.

With a spacing s, component i is multiplied by s_i and each derivative along j divided by s_j. An axis too
short for a difference (one voxel; for second derivatives one or two) contributes 0 and is not cropped; it
still counts in diffusion's and the anisotropic average.
Gradient: each voxel collects the differences it is part of; an absolute value or root has slope 0 at 0.
"""

import torch

from fastreg import _ext


def components(u, factors):
    """One number per component, shaped to multiply u."""
    return torch.stack([u.new_full((), f) for f in factors]).view(-1, *[1] * (u.dim() - 2))


def cropped(u, axes, shift, low, high):
    """u moved by ``shift[axis]`` voxels, on the grid without `low` voxels before and `high` after its axes."""
    for k in axes:
        u = u.narrow(k + 2, low + shift.get(k, 0), u.shape[k + 2] - low - high)
    return u


def _fake(u, *options):
    return u.new_empty(u.shape[0], dtype=_ext.arithmetic(u))


def _bwd_fake(grad, u, *options):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    u, *ctx.options = inputs
    ctx.save_for_backward(u)


def register(name, options, reference, bwd_reference):
    """`options` is the rest of the schema after u."""
    _ext.define(f"{name}(Tensor u, {options}) -> Tensor", reference, _fake)
    _ext.define(f"{name}_bwd(Tensor grad, Tensor u, {options}) -> Tensor", bwd_reference, _bwd_fake)
    bwd = getattr(torch.ops.fastreg, f"{name}_bwd")

    def backward(ctx, grad):
        return bwd(grad, *ctx.saved_tensors, *ctx.options), *[None] * len(ctx.options)

    _ext.autograd(name, _setup, backward)
    _ext.once_differentiable(f"{name}_bwd")
    _ext.batched(name, f"{name}_bwd")
