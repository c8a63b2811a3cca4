"""Composition of displacements."""

import torch
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops.warp import PADDINGS, Padding, warp_ref


def compose(
    u: Tensor,  # (N, nd, *spatial)
    v: Tensor,  # (N, nd, *spatial)
    *,
    padding: Padding = "border",
) -> Tensor:  # (N, nd, *spatial)
    """Composes two displacements: ``out(x) = v(x) + u(x + v(x))``, what warping by u and then by v amounts to.

    ``warp(warp(I, u), v) == warp(I, compose(u, v))`` up to interpolation. Gradient: to u the image gradient of warp, to v
    ``g`` plus its displacement gradient.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), fp64 / fp32 / fp16 / bf16.
        v (Tensor): same shape, any of the four dtypes.
        padding (str): what u is outside: "border" (nearest voxel), "zeros" or "reflection" (about the outermost voxel
            centres).

    Returns:
        Tensor: (N, nd, *spatial), the wider dtype of u and v. Differentiable (twice) in u and v.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes, devices or padding do not fit.

    Notes:
        One pass, computed in fp32 (fp64 where one of them is). A NaN of v makes its voxel NaN and no other.
        Deterministic on CPU.

    Example:
        >>> u = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(1, 2, 1, 4)
        >>> v = torch.zeros(1, 2, 1, 4).index_fill(1, torch.tensor(1), 0.5)  # half a voxel along x
        >>> fastreg.compose(u, v)[0, 1]
        tensor([[1.0000, 2.0000, 3.0000, 3.5000]])
    """
    _check.floating("compose", u=u, v=v)
    _check.displacement("compose", "u", u)
    _check.same_shape("compose", "v", v, "u", u)
    _check.choice("compose", "padding", padding, PADDINGS)
    return torch.ops.fastreg.compose(u, v, padding)


def compose_ref(u, v, padding):
    dtype = torch.promote_types(u.dtype, v.dtype)
    u, v = (t.to(_ext.arithmetic(u, v)) for t in (u, v))
    return (v + warp_ref(u, v, None, "linear", padding)).to(dtype)


def compose_bwd_ref(grad, u, v, padding, need_u, need_v):
    grads = _ext.grad_of(lambda *fields: compose_ref(*fields, padding), (u, v), grad)
    return _ext.only_needed(grads, (need_u, need_v))


def _fake(u, v, padding):
    return u.new_empty(u.shape, dtype=torch.promote_types(u.dtype, v.dtype))


def _bwd_fake(grad, u, v, padding, need_u, need_v):
    return _ext.empty_where_needed((u, v), (need_u, need_v))


_ext.define("compose(Tensor u, Tensor v, str padding) -> Tensor", compose_ref, _fake)
_ext.define(
    "compose_bwd(Tensor grad, Tensor u, Tensor v, str padding, bool need_u, bool need_v) -> (Tensor, Tensor)",
    compose_bwd_ref,
    _bwd_fake,
)


def _setup(ctx, inputs, output):
    *tensors, ctx.padding = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    needs = ctx.needs_input_grad[:2]
    grads = torch.ops.fastreg.compose_bwd(grad, *ctx.saved_tensors, ctx.padding, *needs)
    return *_ext.none_unless_needed(grads, needs), None


def _setup_bwd(ctx, inputs, output):
    *tensors, ctx.padding, need_u, need_v = inputs
    ctx.needs = (need_u, need_v)
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward_bwd(ctx, *directions):
    grad, *fields = ctx.saved_tensors
    directions = _ext.none_unless_needed(directions, ctx.needs)
    grads = _ext.second_grad_of(lambda u, v: compose_ref(u, v, ctx.padding), fields, grad, directions)
    return *grads, None, None, None


_ext.autograd("compose", _setup, _backward)
_ext.autograd("compose_bwd", _setup_bwd, _backward_bwd)
_ext.batched("compose", "compose_bwd")
