"""Mean squared difference of two images."""

import torch
from torch import Tensor

from fastreg import _ext
from fastreg.ops import _losses


def mse_loss(
    fixed: Tensor,  # (N, C, *spatial)
    moved: Tensor,  # (N, C, *spatial)
    *,
    mask: Tensor | None = None,  # (N, 1, *spatial)
    reduction: _losses.Reduction = "mean",
) -> Tensor:  # () or (N, 1, *spatial)
    """Mean squared difference of two images, weighted by a mask.

    ``sum(m (f - w)^2) / sum(m)`` over voxels, channels and batch, m = 1 without a mask. Gradient: ``2 m (w - f) / sum(m)`` for
    w, its negative for f. What is masked out (m <= 0) counts as 0 even where it is not finite; a NaN weight makes the loss
    NaN.

    Args:
        fixed, moved (Tensor): (N, C, D, H, W) or (N, C, H, W), fp64 / fp32 / fp16 / bf16; mixed dtypes are promoted.
        mask (Tensor, optional): (N, 1, *spatial), >= 0, or bool: weights of the voxels. No gradient.
        reduction (str): "mean" over voxels, channels and batch (weighted), "sum", or "none": the squared
            difference averaged over channels, times the mask.

    Returns:
        Tensor: scalar, or (N, 1, *spatial) for "none"; fp32 (fp64 for fp64). Differentiable (once) in fixed
        and moved. An all-zero mask gives 0 with gradient 0; the mean over an empty batch is NaN, as in torch.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes, devices, a mask that requires a gradient, a bad reduction.

    Notes:
        One pass forward and one backward, nothing kept but the inputs; blocks of terms summed in fp64. Deterministic, whatever
        the thread count.

    Example:
        >>> fixed, moved = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 1.0], [1.0, 3.0]]]])
        >>> fastreg.mse_loss(fixed, moved)
        tensor(3.)
        >>> fastreg.mse_loss(fixed, moved, mask=moved < 2)
        tensor(1.)
    """
    fixed, moved, mask = _losses.images("mse_loss", fixed, moved, mask, reduction)
    if reduction == "none":
        return torch.ops.fastreg.mse_map(fixed, moved, mask)
    total = torch.ops.fastreg.mse_loss(fixed, moved, mask).sum()
    return total if reduction == "sum" else _losses.mean_of(total, fixed, mask)


def _squares(fixed, moved, mask):
    dtype = _ext.arithmetic(fixed)
    difference = fixed.to(dtype) - moved.to(dtype)
    if mask is None:
        return difference.square()
    return mask.to(dtype).clamp_min(0) * torch.where(mask <= 0, 0, difference).square()


def mse_loss_ref(fixed, moved, mask):
    """Per sample, (N,)."""
    return _squares(fixed, moved, mask).flatten(1).sum(1)


def mse_map_ref(fixed, moved, mask):
    """Averaged over channels, (N, 1, *spatial)."""
    return _squares(fixed, moved, mask).mean(1, keepdim=True)


def mse_loss_bwd_ref(grad, fixed, moved, mask, need_fixed, need_moved):
    """Backward of both: grad is (N,) or (N, 1, *spatial)."""
    function = mse_loss_ref if grad.dim() == 1 else mse_map_ref
    grads = _ext.grad_of(lambda f, m: function(f, m, mask), (fixed, moved), grad)
    return _ext.only_needed(grads, (need_fixed, need_moved))


def _loss_fake(fixed, moved, mask):
    return fixed.new_empty(fixed.shape[0], dtype=_ext.arithmetic(fixed))


_ext.define("mse_loss(Tensor fixed, Tensor moved, Tensor? mask) -> Tensor", mse_loss_ref, _loss_fake)
_ext.define("mse_map(Tensor fixed, Tensor moved, Tensor? mask) -> Tensor", mse_map_ref, _losses.map_fake)
_ext.define(
    "mse_loss_bwd(Tensor grad, Tensor fixed, Tensor moved, Tensor? mask, bool need_fixed, bool need_moved)"
    " -> (Tensor, Tensor)",
    mse_loss_bwd_ref,
    _losses.map_bwd_fake,
)


for _name in ("mse_loss", "mse_map"):
    _losses.backward_by(_name, "mse_loss_bwd")
_ext.once_differentiable("mse_loss_bwd")
_ext.batched("mse_loss", "mse_map", "mse_loss_bwd")
