"""Bending energy of a displacement."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops import _differences


def bending_energy(
    u: Tensor,  # (N, nd, *spatial)
    *,
    spacing: float | Sequence[float] | None = None,
) -> Tensor:  # ()
    """Bending energy: mean of the squared second derivatives, mixed ones twice, central differences.

    Per voxel and component the sum of squared second derivatives, mixed ones twice, mean over components and the voxels that
    have both neighbours along each axis (Rueckert et al. 1999, eq. 4): ``u(p + e) - 2 u(p) + u(p - e)``, mixed ones
    ``(u(++) - u(+-) - u(-+) + u(--)) / 4``. With a spacing s, component i is multiplied by s_i and each derivative along j
    divided by s_j. An affine map bends nothing.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), fp64 / fp32 / fp16 / bf16.
        spacing (number or sequence, optional): voxel size, one or one per axis: makes the derivatives mm over
            mm^2.

    Returns:
        Tensor: scalar, fp32 (fp64 for fp64); NaN for an empty batch. Differentiable (once) in u.

    Raises:
        TypeError: u is not floating.
        ValueError: shape or spacing do not fit.

    Notes:
        Mean over components and the voxels inside the faces; an axis of one or two voxels has no second
        derivative: it contributes 0 and has no faces. One pass forward and one backward, nothing kept but u.
        Deterministic, whatever the thread count.

    Example:
        >>> x = torch.arange(5.0)
        >>> u = torch.stack([torch.zeros(5, 5), x.square().expand(5, 5)])[None]  # x bends by 2 everywhere
        >>> fastreg.bending_energy(u)  # 2^2, mean over two components
        tensor(2.)
    """
    _check.floating("bending_energy", u=u)
    nd = _check.displacement("bending_energy", "u", u)
    spacing = _check.per_axis(
        "bending_energy", "spacing", 1.0 if spacing is None else spacing, nd, strict=True
    )
    return torch.ops.fastreg.bending_energy(u, spacing).mean()


def bending_energy_ref(u, spacing):
    """Per sample, (N,)."""
    nd, values = u.dim() - 2, u.to(_ext.arithmetic(u))
    axes = [k for k in range(nd) if u.shape[k + 2] > 2]

    def at(shift):
        return _differences.cropped(values, axes, shift, 1, 1)

    energy = torch.zeros_like(at({}))
    for j, k in itertools.combinations_with_replacement(axes, 2):
        ratio = _differences.components(values, [s / (spacing[j] * spacing[k]) for s in spacing])
        # Differences of neighbours are nearly exact; sums of large values would not be.
        if j == k:
            energy = energy + (((at({k: 1}) - at({})) - (at({}) - at({k: -1}))) * ratio).square()
        else:
            mixed = (at({j: 1, k: 1}) - at({j: 1, k: -1})) - (at({j: -1, k: 1}) - at({j: -1, k: -1}))
            energy = energy + 2 * (mixed / 4 * ratio).square()
    return energy.flatten(1).mean(1)


def bending_energy_bwd_ref(grad, u, spacing):
    return _ext.grad_of(lambda t: bending_energy_ref(t, spacing), (u,), grad)[0]


_differences.register("bending_energy", "float[] spacing", bending_energy_ref, bending_energy_bwd_ref)
