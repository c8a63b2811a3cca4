"""The displacement that has given derivatives along its axes."""

import torch
from torch import Tensor

from fastreg import _check, _ext


def integrate_gradients(
    phi: Tensor,  # (N, nd, *spatial)
) -> Tensor:  # (N, nd, *spatial)
    """The displacement from the derivative of each coordinate along its own axis: cumulative sums of ``phi - 1``.

    ``u_i(p) = sum over q <= p along axis i of (phi_i(q) - 1)``: phi = 1 everywhere is exactly the identity, and phi >= 0
    keeps the voxels of each line in order.
    Gradient: ``dL/dphi_i(q) = sum over p >= q along axis i of g_i(p)``, the same sums from the other end.

    Args:
        phi (Tensor): (N, nd, *spatial), channels in axis order (z, y, x), fp64 / fp32 / fp16 / bf16.
            phi_i is the derivative along axis i of the i-th coordinate of ``x + u(x)``.

    Returns:
        Tensor: u, shape and dtype of phi, in voxels. Differentiable (any number of times) in phi.

    Raises:
        TypeError: phi is not floating.
        ValueError: its shape does not fit.

    Notes:
        Sums in fp64, rounded once per voxel. A NaN reaches the voxels after it on its line. Deterministic.

    Example:
        >>> phi = torch.ones(1, 2, 1, 4)
        >>> phi[:, 1, :, 2] = 1.5  # x stretches at the third voxel
        >>> fastreg.integrate_gradients(phi)[0, 1]
        tensor([[0.0000, 0.0000, 0.5000, 0.5000]])
    """
    _check.floating("integrate_gradients", phi=phi)
    _check.displacement("integrate_gradients", "phi", phi)
    return torch.ops.fastreg.integrate_gradients(phi)


def integrate_gradients_ref(phi):
    return _sums(phi.double() - 1, False).to(phi.dtype)


def integrate_gradients_bwd_ref(grad, reverse):
    return _sums(grad.double(), reverse).to(grad.dtype)


def _sums(values, reverse):
    out = []
    for k, component in enumerate(values.unbind(1), 1):
        out.append(component.flip(k).cumsum(k).flip(k) if reverse else component.cumsum(k))
    return torch.stack(out, 1)


def _fake(phi):
    return torch.empty_like(phi, memory_format=torch.contiguous_format)


_ext.define("integrate_gradients(Tensor phi) -> Tensor", integrate_gradients_ref, _fake)
# reverse: the sums over p >= q, the transpose of the op; without it those over q <= p, its linear part.
_ext.define(
    "integrate_gradients_bwd(Tensor grad, bool reverse) -> Tensor",
    integrate_gradients_bwd_ref,
    lambda grad, reverse: _fake(grad),
)


def _setup_bwd(ctx, inputs, output):
    ctx.reverse = inputs[1]


_ext.autograd(
    "integrate_gradients",
    lambda ctx, inputs, output: None,
    lambda ctx, grad: torch.ops.fastreg.integrate_gradients_bwd(grad, True),
)
_ext.autograd(
    "integrate_gradients_bwd",
    _setup_bwd,
    lambda ctx, grad: (torch.ops.fastreg.integrate_gradients_bwd(grad, not ctx.reverse), None),
)
_ext.batched("integrate_gradients", "integrate_gradients_bwd")
