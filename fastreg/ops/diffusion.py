"""Diffusion regulariser of a displacement."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops import _differences

Norm = Literal["l1", "l2"]
NORMS = get_args(Norm)


def diffusion(
    u: Tensor,  # (N, nd, *spatial)
    *,
    norm: Norm = "l2",
    spacing: float | Sequence[float] | None = None,
) -> Tensor:  # ()
    """Diffusion regulariser: mean over axes of the mean squared (or absolute) forward difference.

    Per axis the mean over components and voxels of ``(u(p + e) - u(p))^2`` ("l2") or ``|u(p + e) - u(p)|`` ("l1"), averaged
    over axes (Balakrishnan et al. 2019, eq. 9). With a spacing s, component i is multiplied by s_i and each derivative
    along j divided by s_j. An axis of one voxel contributes 0; it still counts in the average.
    Gradient: each voxel collects the differences it is part of; an absolute value has slope 0 at 0.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), fp64 / fp32 / fp16 / bf16.
        norm (str): "l2" or "l1".
        spacing (number or sequence, optional): voxel size, one or one per axis: makes the derivatives mm over
            mm.

    Returns:
        Tensor: scalar, fp32 (fp64 for fp64); NaN for an empty batch. Differentiable (once) in u.

    Raises:
        TypeError: u is not floating.
        ValueError: shape, norm or spacing do not fit.

    Notes:
        One pass forward and one backward, nothing kept but u. Deterministic, whatever the thread count.

    Example:
        >>> u = torch.zeros(1, 2, 4, 4)
        >>> u[:, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0])  # one of two components changes along one of two axes
        >>> fastreg.diffusion(u)
        tensor(0.2500)
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
