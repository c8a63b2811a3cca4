"""Regularisers of a displacement.

diffusion: per axis the mean over components and voxels of the squared ("l2") or absolute ("l1") forward
difference, averaged over axes (Balakrishnan et al. 2019, eq. 9).
total_variation: absolute forward differences summed over components and axes, mean over voxels, divided by
the number of axes; isotropic: per voxel and component the root of the sum over axes of squared forward
differences, mean over the voxels that have a difference along each axis and over components (R2N2's code
takes backward differences: the same number of the flipped displacement).
bending_energy: per voxel and component the sum of squared second derivatives, mixed ones twice, mean over
components and the voxels that have both neighbours along each axis (Rueckert et al. 1999, eq. 4). Central
differences: ``u(p + e) - 2 u(p) + u(p - e)``, mixed ones ``(u(++) - u(+-) - u(-+) + u(--)) / 4``.

With a spacing s, component i is multiplied by s_i and each derivative along j divided by s_j. An axis too
short for a difference (one voxel; for second derivatives one or two) contributes 0 and is not cropped; it
still counts in diffusion's and the anisotropic average.
Gradient: each voxel collects the differences it is part of; an absolute value or root has slope 0 at 0.
"""

import itertools
import math

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


def total_variation(u, *, isotropic=False, spacing=None):
    """Total variation: mean over voxels of the absolute forward differences, divided by the number of axes.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), fp64 / fp32 / fp16 / bf16.
        isotropic (bool): the root of the sum over axes of squared differences per voxel and component, mean
            over components and over the grid without the last voxel of each axis.
        spacing (number or sequence, optional): voxel size, one or one per axis: makes the derivatives mm over
            mm.

    Returns:
        Tensor: scalar, fp32 (fp64 for fp64); NaN for an empty batch. Differentiable (once) in u.

    Raises:
        TypeError: u is not floating, isotropic not a bool. ValueError: shape or spacing do not fit.

    Notes:
        Slope 0 where a difference (isotropic: each of a voxel's differences) is 0. One pass forward and one
        backward, nothing kept but u. Deterministic, whatever the thread count.
    """
    _check.floating("total_variation", u=u)
    nd = _check.displacement("total_variation", "u", u)
    if not isinstance(isotropic, bool):
        _check.fail("total_variation", "isotropic", "be a bool", repr(isotropic), TypeError)
    spacing = _check.per_axis(
        "total_variation", "spacing", 1.0 if spacing is None else spacing, nd, strict=True
    )
    return torch.ops.fastreg.total_variation(u, isotropic, spacing).mean()


def bending_energy(u, *, spacing=None):
    """Bending energy: mean of the squared second derivatives, mixed ones twice, central differences.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), fp64 / fp32 / fp16 / bf16.
        spacing (number or sequence, optional): voxel size, one or one per axis: makes the derivatives mm over
            mm^2.

    Returns:
        Tensor: scalar, fp32 (fp64 for fp64); NaN for an empty batch. Differentiable (once) in u.

    Raises:
        TypeError: u is not floating. ValueError: shape or spacing do not fit.

    Notes:
        Mean over components and the voxels inside the faces; an axis of one or two voxels has no second
        derivative: it contributes 0 and has no faces. One pass forward and one backward, nothing kept but u.
        Deterministic, whatever the thread count.
    """
    _check.floating("bending_energy", u=u)
    nd = _check.displacement("bending_energy", "u", u)
    spacing = _check.per_axis(
        "bending_energy", "spacing", 1.0 if spacing is None else spacing, nd, strict=True
    )
    return torch.ops.fastreg.bending_energy(u, spacing).mean()


def _components(u, factors):
    """One number per component, shaped to multiply u."""
    return torch.stack([u.new_full((), f) for f in factors]).view(-1, *[1] * (u.dim() - 2))


def diffusion_ref(u, norm, spacing):
    """Per sample, (N,)."""
    nd, values = u.dim() - 2, u.to(torch.promote_types(u.dtype, torch.float32))
    total = values.new_zeros(u.shape[0])
    for k in range(nd):
        if u.shape[k + 2] < 2:
            continue
        ratio = _components(values, [s / spacing[k] for s in spacing])
        difference = values.diff(dim=k + 2) * ratio
        penalty = difference.square() if norm == "l2" else difference.abs()
        total = total + penalty.flatten(1).mean(1) / nd
    return total


def _cropped(u, axes, shift, low, high):
    """u moved by ``shift[axis]`` voxels, on the grid without `low` voxels before and `high` after its axes."""
    for k in axes:
        u = u.narrow(k + 2, low + shift.get(k, 0), u.shape[k + 2] - low - high)
    return u


def total_variation_ref(u, isotropic, spacing):
    """Per sample, (N,)."""
    nd, values = u.dim() - 2, u.to(torch.promote_types(u.dtype, torch.float32))
    axes = [k for k in range(nd) if u.shape[k + 2] > 1]
    total, square = values.new_zeros(u.shape[0]), 0
    for k in axes:
        ratio = _components(values, [s / spacing[k] for s in spacing])
        if isotropic:
            difference = _cropped(values, axes, {k: 1}, 0, 1) - _cropped(values, axes, {}, 0, 1)
            square = square + (difference * ratio).square()
        else:
            total = total + (values.diff(dim=k + 2) * ratio).abs().flatten(1).sum(1)
    if not isotropic or not axes:
        return total / (nd * math.prod(u.shape[2:]))
    flat = square == 0
    return torch.where(flat, 0, torch.where(flat, 1, square).sqrt()).flatten(1).mean(1)


def bending_energy_ref(u, spacing):
    """Per sample, (N,)."""
    nd, values = u.dim() - 2, u.to(torch.promote_types(u.dtype, torch.float32))
    axes = [k for k in range(nd) if u.shape[k + 2] > 2]

    def at(shift):
        return _cropped(values, axes, shift, 1, 1)

    energy = torch.zeros_like(at({}))
    for j, k in itertools.combinations_with_replacement(axes, 2):
        ratio = _components(values, [s / (spacing[j] * spacing[k]) for s in spacing])
        # Differences of neighbours are nearly exact; sums of large values would not be.
        if j == k:
            energy = energy + (((at({k: 1}) - at({})) - (at({}) - at({k: -1}))) * ratio).square()
        else:
            mixed = (at({j: 1, k: 1}) - at({j: 1, k: -1})) - (at({j: -1, k: 1}) - at({j: -1, k: -1}))
            energy = energy + 2 * (mixed / 4 * ratio).square()
    return energy.flatten(1).mean(1)


def diffusion_bwd_ref(grad, u, norm, spacing):
    return _ext.grad_of(lambda t: diffusion_ref(t, norm, spacing), (u,), grad)[0]


def total_variation_bwd_ref(grad, u, isotropic, spacing):
    return _ext.grad_of(lambda t: total_variation_ref(t, isotropic, spacing), (u,), grad)[0]


def bending_energy_bwd_ref(grad, u, spacing):
    return _ext.grad_of(lambda t: bending_energy_ref(t, spacing), (u,), grad)[0]


def _fake(u, *options):
    return u.new_empty(u.shape[0], dtype=torch.promote_types(u.dtype, torch.float32))


def _bwd_fake(grad, u, *options):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    u, *ctx.options = inputs
    ctx.save_for_backward(u)


def _register(name, options, reference, bwd_reference):
    """`options` is the rest of the schema after u."""
    _ext.define(f"{name}(Tensor u, {options}) -> Tensor", reference, _fake)
    _ext.define(f"{name}_bwd(Tensor grad, Tensor u, {options}) -> Tensor", bwd_reference, _bwd_fake)
    bwd = getattr(torch.ops.fastreg, f"{name}_bwd")

    def backward(ctx, grad):
        return bwd(grad, *ctx.saved_tensors, *ctx.options), *[None] * len(ctx.options)

    _ext.autograd(name, _setup, backward)
    _ext.once_differentiable(f"{name}_bwd")
    _ext.batched(name, f"{name}_bwd")


_register("diffusion", "str norm, float[] spacing", diffusion_ref, diffusion_bwd_ref)
_register("total_variation", "bool isotropic, float[] spacing", total_variation_ref, total_variation_bwd_ref)
_register("bending_energy", "float[] spacing", bending_energy_ref, bending_energy_bwd_ref)
