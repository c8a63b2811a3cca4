"""Determinant of the Jacobian of ``x + u(x)``."""

import torch
from torch import Tensor

from fastreg import _check, _ext


def jacobian_determinant(
    u: Tensor,  # (N, nd, *spatial)
) -> Tensor:  # (N, 1, *spatial)
    """Determinant of the Jacobian of ``x + u(x)``: 1 without motion, <= 0 where it folds.

    ``det(I + du/dx)``, central differences inside, one-sided at the faces, 0 along an axis of one voxel.
    Gradient: ``dL/du_c = sum_j D_j^T (g cofactor_cj)`` with D_j the difference along j.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), fp64 / fp32 / fp16 / bf16.

    Returns:
        Tensor: (N, 1, *spatial), fp32 (fp64 for fp64). Differentiable (once) in u.

    Raises:
        TypeError: u is not floating.
        ValueError: its shape does not fit.

    Notes:
        Deterministic.

    Example:
        >>> u = torch.zeros(1, 2, 2, 3)
        >>> u[:, 1] = torch.tensor([0.0, 0.5, 1.0])  # x stretches by a half
        >>> fastreg.jacobian_determinant(u)[0, 0]
        tensor([[1.5000, 1.5000, 1.5000],
                [1.5000, 1.5000, 1.5000]])
    """
    _check.floating("jacobian_determinant", u=u)
    _check.displacement("jacobian_determinant", "u", u)
    return torch.ops.fastreg.jacobian_determinant(u)


def _derivative(f, axis):
    """Central differences, one-sided at the faces; 0 along an axis of one voxel."""
    n = f.shape[axis]
    if n < 2:
        return torch.zeros_like(f)
    inside = (f.narrow(axis, 2, n - 2) - f.narrow(axis, 0, n - 2)) / 2 if n > 2 else f.narrow(axis, 0, 0)
    first, last = (f.narrow(axis, i + 1, 1) - f.narrow(axis, i, 1) for i in (0, n - 2))
    return torch.cat([first, inside, last], axis)


def jacobian_determinant_ref(u):
    nd, u = u.dim() - 2, u.to(_ext.arithmetic(u))
    m = [[_derivative(u[:, c], k + 1) + (c == k) for k in range(nd)] for c in range(nd)]
    if nd == 2:
        det = m[0][0] * m[1][1] - m[1][0] * m[0][1]
    else:
        det = sum(m[c][0] * (m[c - 2][1] * m[c - 1][2] - m[c - 1][1] * m[c - 2][2]) for c in range(3))
    return det.unsqueeze(1)


def jacobian_determinant_bwd_ref(grad, u):
    return _ext.grad_of(jacobian_determinant_ref, (u,), grad)[0]


def _fake(u):
    return u.new_empty((u.shape[0], 1, *u.shape[2:]), dtype=_ext.arithmetic(u))


_ext.define("jacobian_determinant(Tensor u) -> Tensor", jacobian_determinant_ref, _fake)
_ext.define(
    "jacobian_determinant_bwd(Tensor grad, Tensor u) -> Tensor",
    jacobian_determinant_bwd_ref,
    lambda grad, u: torch.empty_like(u, memory_format=torch.contiguous_format),
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return torch.ops.fastreg.jacobian_determinant_bwd(grad, *ctx.saved_tensors)


_ext.autograd("jacobian_determinant", _setup, _backward)
_ext.once_differentiable("jacobian_determinant_bwd")
_ext.batched("jacobian_determinant", "jacobian_determinant_bwd")
