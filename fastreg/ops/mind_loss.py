"""Difference of the MIND descriptors of two images.

The ops return one sum per sample and, computed in the same call, the gradient of that sum; or the map.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops import _losses
from fastreg.ops.mind import Neighbourhood, Patch, channels, checked_options, descriptors, seen_or_finite

Norm = Literal["l2", "l1"]
NORMS = get_args(Norm)


def mind_loss(
    fixed: Tensor,  # (N, C, *spatial)
    moved: Tensor,  # (N, C, *spatial)
    *,
    radius: int = 2,
    dilation: int = 2,
    neighbourhood: Neighbourhood = "ssc",
    patch: Patch = "box",
    sigma: float = 0.5,
    norm: Norm = "l2",
    mask: Tensor | None = None,  # (N, 1, *spatial)
    reduction: _losses.Reduction = "mean",
) -> Tensor:  # () or (N, 1, *spatial)
    """Mean squared (or absolute) difference of the MIND descriptors of two images, which are never stored.

    ``sum(m |mind(f) - mind(w)|^k) / sum(m)`` over voxels, channels and batch, k = 2 ("l2") or 1 ("l1"), m = 1 without a mask;
    the descriptors are those of :func:`fastreg.mind`. Heinrich et al. 2012 and 2013.

    Args:
        fixed, moved (Tensor): (N, C, D, H, W) or (N, C, H, W), fp64 / fp32 / fp16 / bf16; mixed dtypes are promoted.
        radius, dilation (int): of the descriptors, see fastreg.mind.
        neighbourhood, patch (str): of the descriptors, see fastreg.mind.
        sigma (float): of the descriptors, see fastreg.mind.
        norm (str): "l2" squared, "l1" absolute differences.
        mask (Tensor, optional): (N, 1, *spatial), >= 0, or bool: weights of the voxels in the average. No gradient. It does
            not enter the descriptors: these see the image outside, and so does the mean of V that bounds V. What is not
            finite and read by the descriptor of no voxel whose weight is above 0 counts as 0. A NaN weight makes the loss
            ("none": its voxel) NaN.
        reduction (str): "mean" over voxels, channels and batch (weighted by the mask), "sum", or "none": the difference
            averaged over channels, times the mask.

    Returns:
        Tensor: scalar, or (N, 1, *spatial) for "none"; fp32 (fp64 for fp64 inputs). Differentiable (once) in fixed and moved.

    Raises:
        TypeError: not floating.
        ValueError: shapes, devices, a mask that requires a gradient, a bad option.

    Notes:
        Constant images and all-zero masks give 0 with gradient 0. A NaN or an infinity that counts makes its sample NaN, no
        other: without a mask any, with one what the descriptors of voxels of weight above 0 read.
        Where two channels tie for the minimum within rounding, the gradient depends on which is less: it has a kink there.
        CPU: deterministic, whatever the thread count; some MB a thread beside the gradients.
        ``fastreg.nn.MINDLoss(...).prepare(fixed)`` computes what only depends on fixed once, for many calls.

    Example:
        >>> fixed = torch.arange(64.0).view(1, 1, 8, 8).sin()
        >>> fastreg.mind_loss(fixed, 7 - 3 * fixed) < 1e-9  # a contrast turned around is the same picture
        tensor(True)
        >>> fastreg.mind_loss(fixed, fixed.roll(1, -1)) > 0.05
        tensor(True)
    """
    options = {
        "radius": radius, "dilation": dilation, "neighbourhood": neighbourhood, "patch": patch, "sigma": sigma,
    }  # fmt: skip
    return mind_loss_prepared(fixed, None, moved, **options, norm=norm, mask=mask, reduction=reduction)


def check_mind_loss(norm="l2", reduction="mean"):
    _check.choice("mind_loss", "norm", norm, NORMS)
    _check.choice("mind_loss", "reduction", reduction, _losses.REDUCTIONS)


def prepare_mind(fixed, mask=None, *, radius=2, dilation=2, neighbourhood="ssc", patch="box", sigma=0.5):
    """Mean of V of each sample, (N,) in fp64: what mind_loss must know of an image before it meets a voxel."""
    _check.floating("mind_loss", fixed=fixed, mask=mask)
    options = checked_options("mind_loss", fixed, "fixed", radius, dilation, neighbourhood, patch, sigma)
    return torch.ops.fastreg.mind_mean_variance(fixed, _check.mask("mind_loss", mask, fixed), *options)


def mind_loss_prepared(
    fixed, fixed_variance, moved, *, radius=2, dilation=2, neighbourhood="ssc", patch="box", sigma=0.5,
    norm="l2", mask=None, reduction="mean",
):  # fmt: skip
    """mind_loss with the result of prepare_mind(fixed) or None."""
    fixed, moved, mask = _losses.images("mind_loss", fixed, moved, mask, reduction)
    options = checked_options("mind_loss", fixed, "fixed", radius, dilation, neighbourhood, patch, sigma)
    _check.choice("mind_loss", "norm", norm, NORMS)
    if reduction == "none":
        error = torch.ops.fastreg.mind_map(fixed, moved, fixed_variance, mask, *options, norm)
        return error if mask is None else _weighted(error, mask)
    need = (_check.needs_grad(fixed), _check.needs_grad(moved))
    total = torch.ops.fastreg.mind_loss(fixed, moved, fixed_variance, mask, *options, norm, *need)[0].sum()
    if reduction == "sum":
        return total
    n_channels = len(channels(neighbourhood, fixed.dim() - 2))
    return _losses.mean_of(total, fixed[:, :1].expand(-1, n_channels, *fixed.shape[2:]), mask)


def _weighted(error, mask):
    """mask * error, 0 where the mask is not above 0, whatever the error; a NaN of the mask stays."""
    mask = mask.to(error.dtype)
    return torch.where(mask > 0, mask * error, torch.where(mask.isnan(), mask, 0))


def mind_map_ref(fixed, moved, fixed_variance, mask, *options_and_norm):
    """Difference averaged over channels, (N, 1, *spatial). The mask does not weigh it: see `seen_or_finite`."""
    *options, norm = options_and_norm
    fixed, moved = (seen_or_finite(t, mask, *options) for t in (fixed, moved))
    difference = descriptors(fixed, fixed_variance, *options) - descriptors(moved, None, *options)
    return (difference.square() if norm == "l2" else difference.abs()).mean(1, keepdim=True)


def mind_loss_ref(fixed, moved, fixed_variance, mask, *options_and_needs):
    """Per sample the sum of mask * difference over voxels and channels, and its gradients in arithmetic dtype where asked for."""
    *options, need_fixed, need_moved = options_and_needs
    n_channels = len(channels(options[2], fixed.dim() - 2))

    def total(f, m):
        error = mind_map_ref(f, m, fixed_variance, mask, *options)
        if mask is not None:
            error = _weighted(error, mask)
        return n_channels * error.flatten(1).sum(1)

    return _losses.with_unit_gradients(total, fixed, moved, (need_fixed, need_moved))


def mind_map_bwd_ref(grad, fixed, moved, fixed_variance, mask, *options_and_needs):
    *options, need_fixed, need_moved = options_and_needs
    grads = _ext.grad_of(
        lambda f, m: mind_map_ref(f, m, fixed_variance, mask, *options), (fixed, moved), grad
    )
    return _ext.only_needed(grads, (need_fixed, need_moved))


_OPTIONS = "int radius, int dilation, str neighbourhood, str patch, float sigma, str norm"
_IMAGES = "Tensor fixed, Tensor moved, Tensor? fixed_variance, Tensor? mask"
_NEEDS = "bool need_fixed, bool need_moved"
_ext.define(
    f"mind_loss({_IMAGES}, {_OPTIONS}, {_NEEDS}) -> (Tensor, Tensor, Tensor)",
    mind_loss_ref,
    _losses.fake,
)
_ext.define(f"mind_map({_IMAGES}, {_OPTIONS}) -> Tensor", mind_map_ref, _losses.map_fake)
_ext.define(
    f"mind_map_bwd(Tensor grad, {_IMAGES}, {_OPTIONS}, {_NEEDS}) -> (Tensor, Tensor)",
    mind_map_bwd_ref,
    _losses.map_bwd_fake,
)
_losses.autograd("mind_loss")
_losses.backward_by("mind_map", "mind_map_bwd")
_ext.once_differentiable("mind_map_bwd")
_ext.batched("mind_loss", "mind_map", "mind_map_bwd")
