"""Composition of displacements and the exponential of a velocity field.

compose: ``out(x) = v(x) + u(x + v(x))``, so that ``warp(warp(I, u), v) == warp(I, compose(u, v))`` up to interpolation.
Gradient: to u the image gradient of warp, to v ``g`` plus its displacement gradient.
integrate_velocity: scaling and squaring (Arsigny et al. 2006): ``u_0 = v / 2^steps``, ``u_{s+1} = compose(u_s, u_s)``.
Gradient: from the last step to the first, ``g <- g + both gradients of compose``.
"""

from numbers import Integral

import torch

from fastreg import _ext
from fastreg.ops import _check
from fastreg.ops.warp import PADDINGS, warp_ref

MAX_STEPS = 64


def compose(u, v, *, padding="border"):
    """Composes two displacements: ``out(x) = v(x) + u(x + v(x))``, what warping by u and then by v amounts to.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), fp64 / fp32 / fp16 / bf16.
        v (Tensor): same shape, any of the four dtypes.
        padding (str): what u is outside: "border" (nearest voxel), "zeros" or "reflection" (about the outermost voxel
            centres).

    Returns:
        Tensor: (N, nd, *spatial), the wider dtype of u and v. Differentiable (twice) in u and v.

    Raises:
        TypeError: a tensor is not floating. ValueError: shapes, devices or padding do not fit.

    Notes:
        One pass, computed in fp32 (fp64 where one of them is). A NaN of v makes its voxel NaN and no other.
        Deterministic on CPU.
    """
    _check.floating("compose", u=u, v=v)
    _check.displacement("compose", "u", u)
    _check.same_shape("compose", "v", v, "u", u)
    _check.choice("compose", "padding", padding, PADDINGS)
    return torch.ops.fastreg.compose(u, v, padding)


def integrate_velocity(v, steps=7, *, padding="border", checkpoint=False):
    """Integrates a stationary velocity field over unit time by scaling and squaring.

    Args:
        v (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), fp64 / fp32 / fp16 / bf16.
        steps (int): squarings, 0 to 64; v / 2^steps should be below half a voxel. 0 gives v.
        padding (str): what the displacement is outside: "border" (nearest voxel), "zeros" or "reflection" (about the
            outermost voxel centres).
        checkpoint (bool): keep v alone for the backward, which computes the intermediate fields once more and holds
            about 2 sqrt(steps) of them; otherwise steps - 1 fields are kept. Results and gradients are the same bits.

    Returns:
        Tensor: (N, nd, *spatial), the displacement ``exp(v)``, dtype of v. Differentiable (once) in v.

    Raises:
        TypeError: v is not floating, steps not an int. ValueError: shape, steps or padding do not fit.

    Notes:
        Computed in fp32 (fp64 for fp64): halves are rounded once, at the end. Deterministic on CPU.
    """
    _check.floating("integrate_velocity", v=v)
    _check.displacement("integrate_velocity", "v", v)
    if isinstance(steps, bool) or not isinstance(steps, Integral):
        _check.fail("integrate_velocity", "steps", "be an int", repr(steps), TypeError)
    if not 0 <= steps <= MAX_STEPS:
        _check.fail("integrate_velocity", "steps", f"be from 0 to {MAX_STEPS}", steps)
    _check.choice("integrate_velocity", "padding", padding, PADDINGS)
    keep = not _check.flag("integrate_velocity", "checkpoint", checkpoint) and _check.needs_grad(v)
    return torch.ops.fastreg.integrate_velocity(v, int(steps), padding, keep)[0]


def compose_ref(u, v, padding):
    dtype = torch.promote_types(u.dtype, v.dtype)
    u, v = (t.to(torch.promote_types(dtype, torch.float32)) for t in (u, v))
    return (v + warp_ref(u, v, None, "linear", padding)).to(dtype)


def compose_bwd_ref(grad, u, v, padding, need_u, need_v):
    grads = _ext.grad_of(lambda *fields: compose_ref(*fields, padding), (u, v), grad)
    return tuple(
        g if need else t.new_zeros(0) for g, t, need in zip(grads, (u, v), (need_u, need_v), strict=True)
    )


def _compose_fake(u, v, padding):
    return u.new_empty(u.shape, dtype=torch.promote_types(u.dtype, v.dtype))


def _compose_bwd_fake(grad, u, v, padding, need_u, need_v):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)
        for t, need in ((u, need_u), (v, need_v))
    )


_ext.define("compose(Tensor u, Tensor v, str padding) -> Tensor", compose_ref, _compose_fake)
_ext.define(
    "compose_bwd(Tensor grad, Tensor u, Tensor v, str padding, bool need_u, bool need_v) -> (Tensor, Tensor)",
    compose_bwd_ref,
    _compose_bwd_fake,
)


def _compose_setup(ctx, inputs, output):
    *tensors, ctx.padding = inputs
    ctx.save_for_backward(*tensors)


def _compose_backward(ctx, grad):
    needs = ctx.needs_input_grad[:2]
    grads = torch.ops.fastreg.compose_bwd(grad, *ctx.saved_tensors, ctx.padding, *needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


def _compose_setup_bwd(ctx, inputs, output):
    *tensors, ctx.padding, need_u, need_v = inputs
    ctx.needs = (need_u, need_v)
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _compose_backward_bwd(ctx, *directions):
    grad, *fields = ctx.saved_tensors
    directions = [d if need else None for d, need in zip(directions, ctx.needs, strict=True)]
    grads = _ext.second_grad_of(lambda u, v: compose_ref(u, v, ctx.padding), fields, grad, directions)
    return *grads, None, None, None


def _width(v):
    """Components of a kept field: those of a voxel lie side by side, in 3D with a zero for the fourth."""
    return 2 if v.shape[1] == 2 else 4


def _integrate(v, steps, padding):
    fields = [v.to(torch.promote_types(v.dtype, torch.float32)) / 2.0**steps]
    for _ in range(steps):
        fields.append(compose_ref(fields[-1], fields[-1], padding))
    return fields


def integrate_velocity_ref(v, steps, padding, keep):
    fields = _integrate(v, steps, padding)
    kept = fields[1:-1] if keep else []
    shape = (v.shape[0], len(kept), *v.shape[2:], _width(v))
    packed = torch.zeros(shape, dtype=fields[0].dtype, device=v.device)
    for k, field in enumerate(kept):
        packed[:, k, ..., : v.shape[1]] = field.movedim(1, -1)
    return fields[-1].to(v.dtype, copy=True), packed


def integrate_velocity_bwd_ref(grad, v, fields, steps, padding):
    return _ext.grad_of(lambda t: _integrate(t, steps, padding)[-1].to(v.dtype), (v,), grad)[0]


def _integrate_fake(v, steps, padding, keep):
    shape = (v.shape[0], max(steps - 1, 0) if keep else 0, *v.shape[2:], _width(v))
    return v.new_empty(v.shape), v.new_empty(shape, dtype=torch.promote_types(v.dtype, torch.float32))


def _integrate_bwd_fake(grad, v, fields, steps, padding):
    return v.new_empty(v.shape)


_ext.define(
    "integrate_velocity(Tensor v, int steps, str padding, bool keep) -> (Tensor, Tensor)",
    integrate_velocity_ref,
    _integrate_fake,
)
_ext.define(
    "integrate_velocity_bwd(Tensor grad, Tensor v, Tensor fields, int steps, str padding) -> Tensor",
    integrate_velocity_bwd_ref,
    _integrate_bwd_fake,
)


def _integrate_setup(ctx, inputs, output):
    v, ctx.steps, ctx.padding, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(v, output[1])


def _integrate_backward(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    args = (*ctx.saved_tensors, ctx.steps, ctx.padding)
    return torch.ops.fastreg.integrate_velocity_bwd(grad, *args), None, None, None


_ext.autograd("compose", _compose_setup, _compose_backward)
_ext.autograd("compose_bwd", _compose_setup_bwd, _compose_backward_bwd)
_ext.autograd("integrate_velocity", _integrate_setup, _integrate_backward)
_ext.once_differentiable("integrate_velocity_bwd")
_ext.batched("compose", "compose_bwd", "integrate_velocity", "integrate_velocity_bwd")
