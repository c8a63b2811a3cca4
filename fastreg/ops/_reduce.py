"""Reductions shared by the losses, whose ops return one sum per sample."""

import torch


def mean_of(total, image, mask):
    """Mean over voxels, channels and batch of ``image``, weighted by the mask; an all-zero mask gives 0."""
    if mask is None:
        return total / image.numel() if image.numel() else total * float("nan")
    # Weights below 0 count as 0 in the kernels too; a NaN among them stays a NaN.
    weight = mask.clamp_min(0).sum(dtype=total.dtype) * image.shape[1]
    return torch.where(weight == 0, 0, total / weight.masked_fill(weight == 0, 1))
