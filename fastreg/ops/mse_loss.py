"""Mean squared difference: ``sum(m (f - w)^2) / sum(m)`` over voxels, channels and batch, m = 1 without a
mask.

Gradient: ``2 m (w - f) / sum(m)`` for w, its negative for f. What is masked out (m <= 0) counts as 0 even
where it is not finite; a NaN weight makes the loss NaN. The ops return one sum per sample, or the map; the mean is taken outside.
"""

import torch

from fastreg import _ext
from fastreg.ops import _check, _reduce

REDUCTIONS = ("mean", "sum", "none")


def mse_loss(fixed, moved, *, mask=None, reduction="mean"):
    """Mean squared difference of two images, weighted by a mask.

    Args:
        fixed, moved (Tensor): (N, C, D, H, W) or (N, C, H, W), fp64 / fp32 / fp16 / bf16.
        mask (Tensor, optional): (N, 1, *spatial), >= 0: weights of the voxels. No gradient.
        reduction (str): "mean" over voxels, channels and batch (weighted), "sum", or "none": the squared
            difference averaged over channels, times the mask.

    Returns:
        Tensor: scalar, or (N, 1, *spatial) for "none"; fp32 (fp64 for fp64). Differentiable (once) in fixed
        and moved. An all-zero mask gives 0 with gradient 0; the mean over an empty batch is NaN, as in torch.

    Raises:
        TypeError: a tensor is not floating. ValueError: shapes, devices, a mask that requires a gradient, a
        bad reduction.

    Notes:
        One pass forward and one backward, nothing kept but the inputs; blocks of terms summed in fp64. Deterministic, whatever
        the thread count.
    """
    _check.floating("mse_loss", fixed=fixed, moved=moved, mask=mask)
    _check.image("mse_loss", "fixed", fixed)
    _check.same_shape("mse_loss", "moved", moved, "fixed", fixed)
    _check.choice("mse_loss", "reduction", reduction, REDUCTIONS)
    _check.mask("mse_loss", mask, fixed)
    if fixed.dtype != moved.dtype:
        dtype = torch.promote_types(fixed.dtype, moved.dtype)
        fixed, moved = fixed.to(dtype), moved.to(dtype)
    if reduction == "none":
        return torch.ops.fastreg.mse_map(fixed, moved, mask)
    total = torch.ops.fastreg.mse_loss(fixed, moved, mask).sum()
    return total if reduction == "sum" else _reduce.mean_of(total, fixed, mask)


def _arithmetic(dtype):
    return torch.promote_types(dtype, torch.float32)


def _squares(fixed, moved, mask):
    dtype = _arithmetic(fixed.dtype)
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
    return tuple(
        g if need else g.new_zeros(0) for g, need in zip(grads, (need_fixed, need_moved), strict=True)
    )


def _loss_fake(fixed, moved, mask):
    return fixed.new_empty(fixed.shape[0], dtype=_arithmetic(fixed.dtype))


def _map_fake(fixed, moved, mask):
    return fixed.new_empty((fixed.shape[0], 1, *fixed.shape[2:]), dtype=_arithmetic(fixed.dtype))


def _bwd_fake(grad, fixed, moved, mask, need_fixed, need_moved):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)
        for t, need in ((fixed, need_fixed), (moved, need_moved))
    )


_ext.define("mse_loss(Tensor fixed, Tensor moved, Tensor? mask) -> Tensor", mse_loss_ref, _loss_fake)
_ext.define("mse_map(Tensor fixed, Tensor moved, Tensor? mask) -> Tensor", mse_map_ref, _map_fake)
_ext.define(
    "mse_loss_bwd(Tensor grad, Tensor fixed, Tensor moved, Tensor? mask, bool need_fixed, bool need_moved)"
    " -> (Tensor, Tensor)",
    mse_loss_bwd_ref,
    _bwd_fake,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    need = ctx.needs_input_grad[:2]
    grads = torch.ops.fastreg.mse_loss_bwd(grad, *ctx.saved_tensors, *need)
    return *(g if n else None for g, n in zip(grads, need, strict=True)), None


_ext.autograd("mse_loss", _setup, _backward)
_ext.autograd("mse_map", _setup, _backward)
_ext.once_differentiable("mse_loss_bwd")
_ext.batched("mse_loss", "mse_map", "mse_loss_bwd")
