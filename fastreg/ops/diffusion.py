"""Diffusion regulariser of a displacement."""

import torch

from fastreg import _check, _ext
from fastreg.ops import _differences

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
    nd, values = u.dim() - 2, u.to(_ext.arithmetic(u))
    total = values.new_zeros(u.shape[0])
    for k in range(nd):
        if u.shape[k + 2] < 2:
            continue
        ratio = _differences.components(values, [s / spacing[k] for s in spacing])
        difference = values.diff(dim=k + 2) * ratio
        penalty = difference.square() if norm == "l2" else difference.abs()
        total = total + penalty.flatten(1).mean(1) / nd
    return total


def diffusion_bwd_ref(grad, u, norm, spacing):
    return _ext.grad_of(lambda t: diffusion_ref(t, norm, spacing), (u,), grad)[0]


_differences.register("diffusion", "str norm, float[] spacing", diffusion_ref, diffusion_bwd_ref)
