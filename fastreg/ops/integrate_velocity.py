"""The exponential of a stationary velocity field."""

import torch
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops.compose import compose_ref
from fastreg.ops.warp import PADDINGS, Padding

MAX_STEPS = 64


def integrate_velocity(
    v: Tensor,  # (N, nd, *spatial)
    steps: int = 7,
    *,
    padding: Padding = "border",
    checkpoint: bool = False,
) -> Tensor:  # (N, nd, *spatial)
    """Integrates a stationary velocity field over unit time by scaling and squaring.

    ``u_0 = v / 2^steps``, ``u_{s+1} = compose(u_s, u_s)`` (Arsigny et al. 2006). Gradient: from the last step to the first,
    ``g <- g + both gradients of compose``.

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
        TypeError: v is not floating, steps not an int.
        ValueError: shape, steps or padding do not fit.

    Notes:
        Computed in fp32 (fp64 for fp64): halves are rounded once, at the end. Deterministic on CPU.

    Example:
        >>> v = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(1, 2, 1, 4) * torch.tensor([0.0, -0.5]).view(1, 2, 1, 1)
        >>> fastreg.integrate_velocity(v)[0, 1]  # nearly x exp(-1/2) - x; no voxel overtakes another
        tensor([[ 0.0000, -0.3941, -0.7881, -1.1822]])
        >>> fastreg.jacobian_determinant(fastreg.integrate_velocity(v)).min() > 0
        tensor(True)
    """
    _check.floating("integrate_velocity", v=v)
    _check.displacement("integrate_velocity", "v", v)
    steps = _check.whole("integrate_velocity", "steps", steps, 0, MAX_STEPS)
    _check.choice("integrate_velocity", "padding", padding, PADDINGS)
    keep = not _check.flag("integrate_velocity", "checkpoint", checkpoint) and _check.needs_grad(v)
    return torch.ops.fastreg.integrate_velocity(v, steps, padding, keep)[0]


def _width(v):
    """Components of a kept field: those of a voxel lie side by side, in 3D with a zero for the fourth."""
    return 2 if v.shape[1] == 2 else 4


def _integrate(v, steps, padding):
    fields = [v.to(_ext.arithmetic(v)) / 2.0**steps]
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


def _fake(v, steps, padding, keep):
    shape = (v.shape[0], max(steps - 1, 0) if keep else 0, *v.shape[2:], _width(v))
    return v.new_empty(v.shape), v.new_empty(shape, dtype=_ext.arithmetic(v))


def _bwd_fake(grad, v, fields, steps, padding):
    return v.new_empty(v.shape)


_ext.define(
    "integrate_velocity(Tensor v, int steps, str padding, bool keep) -> (Tensor, Tensor)",
    integrate_velocity_ref,
    _fake,
)
_ext.define(
    "integrate_velocity_bwd(Tensor grad, Tensor v, Tensor fields, int steps, str padding) -> Tensor",
    integrate_velocity_bwd_ref,
    _bwd_fake,
)


def _setup(ctx, inputs, output):
    v, ctx.steps, ctx.padding, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(v, output[1])


def _backward(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    args = (*ctx.saved_tensors, ctx.steps, ctx.padding)
    return torch.ops.fastreg.integrate_velocity_bwd(grad, *args), None, None, None


_ext.autograd("integrate_velocity", _setup, _backward)
_ext.once_differentiable("integrate_velocity_bwd")
_ext.batched("integrate_velocity", "integrate_velocity_bwd")
