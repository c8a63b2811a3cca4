"""The displacement that is a sum of Gaussian-shaped motions (R2N2)."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fastreg import _check, _ext

SigmaIs = Literal["std", "var"]
SIGMA_IS = get_args(SigmaIs)


def gaussian_displacement(
    params: Tensor,  # (N, T, 7)
    shape: Sequence[int],
    *,
    sigma_is: SigmaIs = "std",
) -> Tensor:  # (N, 2, H, W)
    """2D displacement field that is a sum of T Gaussian-shaped motions.

    ``u(p) = sum_t v_t exp(-d^T Sigma_t^-1 d / 2)``, ``d = p - (x_t, y_t)``, ``Sigma = R(alpha) diag(sx^2, sy^2) R(alpha)^T``
    (``sigma_is="std"``; "var": ``diag(sx, sy)``) with ``R = [[cos, -sin], [sin, cos]]`` on (x, y). p runs over [-1, 1] with
    voxel centres at the ends (an axis of one voxel lies at 0). The sum, times (size - 1) / 2, is in voxels. Gradients go to
    all seven parameters. Sandkuehler et al. 2019, eq. 5 (their variances are "var", their code's are "std").

    Args:
        params (Tensor): (N, T, 7): centre x, y, extents sx, sy along the rotated axes, angle alpha in radians
            (from x towards y), motion vx, vy; all but the angle in units where the grid spans [-1, 1].
            fp64 / fp32 / fp16 / bf16.
        shape (sequence of int): H, W of the field.
        sigma_is (str): "std": sx, sy are standard deviations; "var": variances.

    Returns:
        Tensor: (N, 2, H, W) in voxels, channels (y, x), dtype of params. Differentiable (once) in params.

    Raises:
        TypeError: params is not floating, shape holds no integers.
        ValueError: shapes or values do not fit.

    Notes:
        sx and sy must be > 0. They are data, which no op reads back to check: a Gaussian of any other extent,
        or of a NaN parameter, makes the field of its sample NaN. One pass over all T Gaussians, nothing kept
        but params. Deterministic, whatever the thread count.

    Example:
        >>> params = torch.tensor([[[0.0, 0.0, 0.5, 0.5, 0.0, 1.0, 0.0]]])  # in the middle, along x
        >>> fastreg.gaussian_displacement(params, (3, 5))[0, 1]
        tensor([[0.0366, 0.1642, 0.2707, 0.1642, 0.0366],
                [0.2707, 1.2131, 2.0000, 1.2131, 0.2707],
                [0.0366, 0.1642, 0.2707, 0.1642, 0.0366]])
    """
    _check.floating("gaussian_displacement", params=params)
    if params.dim() != 3 or params.shape[2] != 7:
        _check.fail("gaussian_displacement", "params", "have shape (N, T, 7)", tuple(params.shape))
    shape = _check.sizes("gaussian_displacement", "shape", shape, 2, 1)
    _check.choice("gaussian_displacement", "sigma_is", sigma_is, SIGMA_IS)
    return torch.ops.fastreg.gaussian_displacement(params, shape, sigma_is)


def _coordinates(n, like):
    return (2 * torch.arange(n, device=like.device) - (n - 1)).to(like.dtype) / max(n - 1, 1)


def gaussian_displacement_ref(params, shape, sigma_is):
    values = params.to(_ext.arithmetic(params))
    x, y, sx, sy, alpha, vx, vy = (p[..., None, None] for p in values.unbind(-1))
    dx = _coordinates(shape[1], values) - x  # (N, T, 1, W)
    dy = _coordinates(shape[0], values)[:, None] - y  # (N, T, H, 1)
    cos, sin = alpha.cos(), alpha.sin()

    def squared(distance, extent):
        extent = extent * torch.where(extent > 0, 1.0, torch.nan)
        return (distance / extent).square() if sigma_is == "std" else distance.square() / extent

    weight = torch.exp(-0.5 * (squared(cos * dx + sin * dy, sx) + squared(cos * dy - sin * dx, sy)))
    components = [v * weight * ((n - 1) / 2) for v, n in zip((vy, vx), shape, strict=True)]
    return torch.stack([c.sum(1) for c in components], 1).to(params.dtype)


def gaussian_displacement_bwd_ref(grad, params, sigma_is):
    shape = grad.shape[2:]
    return _ext.grad_of(lambda p: gaussian_displacement_ref(p, shape, sigma_is), (params,), grad)[0]


def _fake(params, shape, sigma_is):
    return params.new_empty((params.shape[0], 2, *shape))


_ext.define(
    "gaussian_displacement(Tensor params, SymInt[] shape, str sigma_is) -> Tensor",
    gaussian_displacement_ref,
    _fake,
)
_ext.define(
    "gaussian_displacement_bwd(Tensor grad, Tensor params, str sigma_is) -> Tensor",
    gaussian_displacement_bwd_ref,
    lambda grad, params, sigma_is: torch.empty_like(params, memory_format=torch.contiguous_format),
)


def _setup(ctx, inputs, output):
    params, _, ctx.sigma_is = inputs
    ctx.save_for_backward(params)


def _backward(ctx, grad):
    return torch.ops.fastreg.gaussian_displacement_bwd(grad, *ctx.saved_tensors, ctx.sigma_is), None, None


_ext.autograd("gaussian_displacement", _setup, _backward)
_ext.once_differentiable("gaussian_displacement_bwd")
_ext.batched("gaussian_displacement", "gaussian_displacement_bwd")
