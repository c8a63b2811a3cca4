"""Total variation of a displacement."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops import _differences


def total_variation(
    u: Tensor,  # (N, nd, *spatial)
    *,
    isotropic: bool = False,
    spacing: float | Sequence[float] | None = None,
) -> Tensor:  # ()
    """Total variation: mean over voxels of the absolute forward differences, divided by the number of axes.

    Absolute forward differences summed over components and axes, mean over voxels, divided by the number of axes. Isotropic:
    per voxel and component the root of the sum over axes of squared forward differences, mean over the voxels that have a
    difference along each axis and over components (R2N2's code takes backward differences: the same number of the flipped
    displacement). With a spacing s, component i is multiplied by s_i and each derivative along j divided by s_j. An axis of
    one voxel contributes 0 and is not cropped; it still counts in the anisotropic average.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), fp64 / fp32 / fp16 / bf16.
        isotropic (bool): the root of the sum over axes of squared differences per voxel and component, mean
            over components and over the grid without the last voxel of each axis.
        spacing (number or sequence, optional): voxel size, one or one per axis: makes the derivatives mm over
            mm.

    Returns:
        Tensor: scalar, fp32 (fp64 for fp64); NaN for an empty batch. Differentiable (once) in u.

    Raises:
        TypeError: u is not floating, isotropic not a bool.
        ValueError: shape or spacing do not fit.

    Notes:
        Slope 0 where a difference (isotropic: each of a voxel's differences) is 0. One pass forward and one
        backward, nothing kept but u. Deterministic, whatever the thread count.

    Example:
        >>> u = torch.zeros(1, 2, 4, 4)
        >>> u[:, :, :, 2:] = 1.0  # a step along x, in 4 of 16 voxels of both components
        >>> fastreg.total_variation(u)
        tensor(0.2500)
    """
    _check.floating("total_variation", u=u)
    nd = _check.displacement("total_variation", "u", u)
    _check.flag("total_variation", "isotropic", isotropic)
    spacing = _check.per_axis(
        "total_variation", "spacing", 1.0 if spacing is None else spacing, nd, strict=True
    )
    return torch.ops.fastreg.total_variation(u, isotropic, spacing).mean()


def total_variation_ref(u, isotropic, spacing):
    """Per sample, (N,)."""
    nd, values = u.dim() - 2, u.to(_ext.arithmetic(u))
    axes = [k for k in range(nd) if u.shape[k + 2] > 1]
    total, square = values.new_zeros(u.shape[0]), 0
    for k in axes:
        ratio = _differences.components(values, [s / spacing[k] for s in spacing])
        if isotropic:
            difference = _differences.cropped(values, axes, {k: 1}, 0, 1) - _differences.cropped(
                values, axes, {}, 0, 1
            )
            square = square + (difference * ratio).square()
        else:
            total = total + (values.diff(dim=k + 2) * ratio).abs().flatten(1).sum(1)
    if not isotropic or not axes:
        return total / (nd * math.prod(u.shape[2:]))
    flat = square == 0
    return torch.where(flat, 0, torch.where(flat, 1, square).sqrt()).flatten(1).mean(1)


def total_variation_bwd_ref(grad, u, isotropic, spacing):
    return _ext.grad_of(lambda t: total_variation_ref(t, isotropic, spacing), (u,), grad)[0]


_differences.register(
    "total_variation", "bool isotropic, float[] spacing", total_variation_ref, total_variation_bwd_ref
)
