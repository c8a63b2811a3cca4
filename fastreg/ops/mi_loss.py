"""Mutual information of two images.

The op returns the joint histogram of each sample, (N, bins, bins) in fp64, of the weights' sums; what follows from it is
arithmetic on few numbers, which autograd differentiates. Nothing is kept for the backward but the images.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops import _losses

Kernel = Literal["gaussian", "bspline"]
KERNELS = get_args(Kernel)
EPSILON = 1e-7
MAX_BINS = 1024
SMALLEST = 1e-300  # a smaller range counts as a single value
CHUNK = 2**15  # values whose weights for all bins the reference holds at a time


def mi_loss(
    fixed: Tensor,  # (N, C, *spatial)
    moved: Tensor,  # (N, C, *spatial)
    *,
    bins: int = 32,
    kernel: Kernel = "gaussian",
    mask: Tensor | None = None,  # (N, 1, *spatial)
    reduction: _losses.Reduction = "mean",
) -> Tensor:  # () or (N,)
    """Negative mutual information of the intensities of two images, by Parzen windows: for images of different kinds.

    ``MI = sum_ab p_ab log((p_ab + e) / (q_ab + e) + e)``, e = 1e-7, of each sample: p the mean over voxels and channels
    (weighted by the mask) of the outer product of the weights that the two images give to ``bins`` bins, q the outer product
    of p's marginals. Gradient, with w the weights of fixed and v of moved at a voxel:
    ``dL/dfixed = sum_ab dL/dp_ab w'_a v_b / (number of voxels)``, and the same of moved.
    Wells et al. 1996, Mattes et al. 2003; "gaussian": the number of MONAI's GlobalMutualInformationLoss.

    Args:
        fixed, moved (Tensor): (N, C, D, H, W) or (N, C, H, W), fp64 / fp32 / fp16 / bf16; mixed dtypes are promoted.
        bins (int): of each image, 2 (bspline: 6) to 1024.
        kernel (str): "gaussian": intensities in [0, 1], bins centred on b / (bins - 1), weights
            ``exp(-(x - c_b)^2 / 2 s^2)`` normalised over b, s = 0.5 / (bins - 1); values outside are clamped and have no
            gradient. "bspline": cubic B-splines on the range of each image and sample (where the mask is), two bins beyond
            each end; the range counts as constant in the gradient.
        mask (Tensor, optional): (N, 1, *spatial), >= 0, or bool: weights of the voxels. No gradient.
        reduction (str): "mean" over samples, "sum", or "none": one number a sample.

    Returns:
        Tensor: scalar, or (N,) for "none"; fp32 (fp64 for fp64 inputs). Differentiable (once) in fixed and moved. An all-zero
        mask and constant images give a finite loss with gradient 0.

    Raises:
        TypeError: a tensor is not floating, bins not an int.
        ValueError: shapes, devices, a mask that requires a gradient, a bad option.

    Notes:
        A NaN (bspline: an infinity too) makes its sample NaN, no other; what is masked out does not count, whatever it is.
        CPU: computed in fp64, one pass forward and one backward, deterministic whatever the thread count; beside the
        gradients some MB of histograms, where a matrix product over all bins keeps 2 bins numbers a voxel. Elsewhere the
        reference, which holds those of 32768 voxels.

    Example:
        >>> fixed = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
        >>> inverted, other = 1 - fixed, fixed.roll(20).transpose(2, 3)
        >>> fastreg.mi_loss(fixed, inverted, bins=8) < fastreg.mi_loss(fixed, other, bins=8)  # each tells the other's value
        tensor(True)
        >>> fastreg.mi_loss(fixed, inverted, bins=8)
        tensor(-1.0502)
    """
    fixed, moved, mask = _losses.images("mi_loss", fixed, moved, mask, reduction)
    _check.choice("mi_loss", "kernel", kernel, KERNELS)
    bins = _check.whole("mi_loss", "bins", bins, 2 if kernel == "gaussian" else 6, MAX_BINS)
    ranges = torch.stack([_range(image.detach(), mask, kernel) for image in (fixed, moved)], 1)
    sums = torch.ops.fastreg.mi_loss(fixed, moved, mask, ranges, bins, kernel)
    if mask is None:
        weight = sums.new_full((fixed.shape[0],), fixed[:1].numel())
    else:
        weight = _losses.added(mask.clamp_min(0).flatten(1), sums.dtype) * fixed.shape[1]
    p = sums / weight.masked_fill(weight == 0, 1)[:, None, None]
    q = p.sum(2, keepdim=True) * p.sum(1, keepdim=True)
    terms = p * ((p + EPSILON) / (q + EPSILON) + EPSILON).log()
    information = _losses.added(terms.flatten(1), terms.dtype)
    loss = -information.to(_ext.arithmetic(fixed))
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def _range(image, mask, kernel):
    """(N, 2): the intensities between which the bins lie, fp64."""
    n = image.shape[0]
    if kernel == "gaussian" or image.numel() == 0:
        return torch.arange(2, dtype=torch.float64, device=image.device).expand(n, 2)
    low = high = image
    if mask is not None:
        low, high = (torch.where(mask > 0, image, end) for end in (torch.inf, -torch.inf))
    return torch.stack([low.flatten(1).amin(1), high.flatten(1).amax(1)], 1).double()


def _windows(x, low, high, bins, kernel):
    """Weights of each value, (values, bins), and their derivatives."""
    margin = 2 if kernel == "bspline" else 0
    span, centres = high - low, torch.arange(bins, dtype=x.dtype, device=x.device)
    per_unit = torch.where(span > SMALLEST, (bins - 1 - 2 * margin) / span, 0 * span)
    # Not by clamp, which a range that is not a number makes one.
    inside = torch.where(x < low, low, torch.where(x > high, high, x))
    d = (margin + (inside - low) * per_unit)[:, None] - centres
    if kernel == "gaussian":
        weight = torch.exp(-2 * d.square())
        weight = weight / weight.sum(1, keepdim=True)
        slope = 4 * weight * ((weight * d).sum(1, keepdim=True) - d)
    else:
        a, rest = d.abs(), (2 - d.abs()).clamp_min(0)
        weight = torch.where(a < 1, (4 + a.square() * (3 * a - 6)) / 6, rest**3 / 6)
        slope = d.sign() * torch.where(a < 1, a * (1.5 * a - 2), -rest.square() / 2)
    return weight, slope * torch.where((x < low) | (x > high), 0, per_unit)[:, None]


def _chunks(fixed, moved, mask, ranges, bins, kernel):
    """Of CHUNK values at a time: sample, slice, weights of the voxels, windows of fixed and moved. All fp64; 0 what is masked out."""
    f, m = fixed.flatten(1), moved.flatten(1)
    w = None if mask is None else mask.expand_as(fixed).flatten(1)
    for n in range(fixed.shape[0]):
        for start in range(0, f.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            weight = torch.ones_like(f[n, part], dtype=torch.float64) if w is None else w[n, part].double()
            counted = ~(weight <= 0)[:, None]
            windows = [
                [torch.where(counted, t, 0) for t in _windows(image[n, part].double(), *ends, bins, kernel)]
                for image, ends in ((f, ranges[n, 0]), (m, ranges[n, 1]))
            ]
            yield n, part, torch.where(counted, weight[:, None], 0), *windows


def mi_loss_ref(fixed, moved, mask, ranges, bins, kernel):
    """Sums over voxels of the outer products of the weights, (N, bins, bins), fp64."""
    sums = fixed.new_zeros((fixed.shape[0], bins, bins), dtype=torch.float64)
    for n, _, weight, (f, _), (m, _) in _chunks(fixed, moved, mask, ranges, bins, kernel):
        sums[n] += (weight * f).T @ m
    return sums


def mi_loss_bwd_ref(grad, fixed, moved, mask, ranges, bins, kernel, need_fixed, need_moved):
    grads, grad = (
        [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (fixed, moved)],
        grad.double(),
    )
    flat = [g.flatten(1) for g in grads]
    for n, part, weight, (f, slope_f), (m, slope_m) in _chunks(fixed, moved, mask, ranges, bins, kernel):
        # 0 times a gradient that is not a number, where nothing is counted.
        counted = weight[:, 0] != 0
        flat[0][n, part] = torch.where(counted, (weight * (slope_f @ grad[n]) * m).sum(1), 0).to(fixed.dtype)
        flat[1][n, part] = torch.where(counted, (weight * (f @ grad[n]) * slope_m).sum(1), 0).to(moved.dtype)
    return _ext.only_needed(grads, (need_fixed, need_moved))


def _fake(fixed, moved, mask, ranges, bins, kernel):
    return fixed.new_empty((fixed.shape[0], bins, bins), dtype=torch.float64)


_INPUTS = "Tensor fixed, Tensor moved, Tensor? mask, Tensor ranges, int bins, str kernel"
_ext.define(f"mi_loss({_INPUTS}) -> Tensor", mi_loss_ref, _fake)
_ext.define(
    f"mi_loss_bwd(Tensor grad, {_INPUTS}, bool need_fixed, bool need_moved) -> (Tensor, Tensor)",
    mi_loss_bwd_ref,
    _losses.map_bwd_fake,
)


def _setup(ctx, inputs, output):
    *tensors, ctx.bins, ctx.kernel = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    needs = ctx.needs_input_grad[:2]
    grads = torch.ops.fastreg.mi_loss_bwd(grad, *ctx.saved_tensors, ctx.bins, ctx.kernel, *needs)
    return *_ext.none_unless_needed(grads, needs), None, None, None, None


_ext.autograd("mi_loss", _setup, _backward)
_ext.once_differentiable("mi_loss_bwd")
_ext.batched("mi_loss", "mi_loss_bwd")
