"""Regularisers of a displacement: forward differences along each axis, the last one of an axis left out.

diffusion: per axis the mean over components and voxels of the squared ("l2") or absolute ("l1") difference,
averaged over axes (Balakrishnan et al. 2019, eq. 9). With a spacing s, component i is multiplied by s_i and
the derivative along j divided by s_j. An axis of one voxel has no differences and contributes 0; it still
counts in the average.
Gradient: each voxel collects the two differences it is part of along each axis; "l1" has slope 0 at 0.
"""

import torch

from fastreg import _ext
from fastreg.ops import _check

NORMS = ("l1", "l2")


def diffusion(u, *, norm="l2", spacing=None):
    """Diffusion regulariser: mean over axes of the mean squared (or absolute) forward difference.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), fp64 / fp32 / fp16 / bf16.
        norm (str): "l2" or "l1".
        spacing (number or sequence, optional): voxel size, one or one per axis: makes the derivatives mm over
            mm.

    Returns:
        Tensor: scalar, fp32 (fp64 for fp64); NaN for an empty batch. Differentiable (once) in u.

    Raises:
        TypeError: u is not floating. ValueError: shape, norm or spacing do not fit.

    Notes:
        One pass forward and one backward, nothing kept but u. Deterministic, whatever the thread count.
    """
    _check.floating("diffusion", u=u)
    nd = _check.displacement("diffusion", "u", u)
    _check.choice("diffusion", "norm", norm, NORMS)
    spacing = _check.per_axis("diffusion", "spacing", 1.0 if spacing is None else spacing, nd, strict=True)
    return torch.ops.fastreg.diffusion(u, norm, spacing).mean()


def diffusion_ref(u, norm, spacing):
    """Per sample, (N,)."""
    nd, values = u.dim() - 2, u.to(torch.promote_types(u.dtype, torch.float32))
    total = values.new_zeros(u.shape[0])
    for k in range(nd):
        if u.shape[k + 2] < 2:
            continue
        ratio = torch.stack([values.new_full((), s / spacing[k]) for s in spacing]).view(-1, *[1] * nd)
        difference = values.diff(dim=k + 2) * ratio
        penalty = difference.square() if norm == "l2" else difference.abs()
        total = total + penalty.flatten(1).mean(1) / nd
    return total


def _diffusion_fake(u, norm, spacing):
    return u.new_empty(u.shape[0], dtype=torch.promote_types(u.dtype, torch.float32))


def diffusion_bwd_ref(grad, u, norm, spacing):
    return _ext.grad_of(lambda t: diffusion_ref(t, norm, spacing), (u,), grad)[0]


def _diffusion_bwd_fake(grad, u, norm, spacing):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


_ext.define("diffusion(Tensor u, str norm, float[] spacing) -> Tensor", diffusion_ref, _diffusion_fake)
_ext.define(
    "diffusion_bwd(Tensor grad, Tensor u, str norm, float[] spacing) -> Tensor",
    diffusion_bwd_ref,
    _diffusion_bwd_fake,
)


def _setup(ctx, inputs, output):
    u, ctx.norm, ctx.spacing = inputs
    ctx.save_for_backward(u)


def _backward(ctx, grad):
    return torch.ops.fastreg.diffusion_bwd(grad, *ctx.saved_tensors, ctx.norm, ctx.spacing), None, None


_ext.autograd("diffusion", _setup, _backward)
_ext.once_differentiable("diffusion_bwd")
_ext.batched("diffusion", "diffusion_bwd")
