"""Warp: ``out(p) = image(p + u(p))``, linear or nearest, voxel centres on integers (align_corners=True).

Positions are split into the voxel index and ``floor(u)`` (integers) and ``u - floor(u)``, so ``u = 0`` is exactly the
identity and accuracy does not depend on the size of the volume. Gradient: ``dL/du_k = sum_c g_c d image_c / dx_k`` (one-sided
at integer positions: towards larger indices), ``dL/dimage`` the transpose of the interpolation (STN: Jaderberg et al. 2015,
eq. 5-7, in voxel units). Both, and the double backward, exist.
"""

import itertools

import torch

from fastreg import _ext
from fastreg.ops import _check

PADDINGS = ("zeros", "border", "reflection")
MODES = ("linear", "nearest")


def warp(image, displacement, *, mode="linear", padding="zeros"):
    """Warps an image by a displacement: ``out(p) = image(p + displacement(p))``.

    Args:
        image (Tensor): (N, C, D, H, W) or (N, C, H, W), fp64 / fp32 / fp16 / bf16.
        displacement (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), any of the four dtypes; it is
            never cast down. A NaN makes its voxel NaN and no other; beyond the image means outside.
        mode (str): "linear", or "nearest" (ties of the displacement to even; no gradient to the displacement).
        padding (str): what lies outside: "zeros", "border" (nearest voxel) or "reflection" (about the outermost voxel centres).

    Returns:
        Tensor: (N, C, *spatial), dtype of image. Differentiable (twice) in image and displacement.

    Raises:
        TypeError: a tensor is not floating. ValueError: shapes, devices, mode or padding do not fit.

    Notes:
        Deterministic on CPU: the image gradient sums its contributions in one fixed order whatever the thread count.
    """
    _check.floating("warp", image=image, displacement=displacement)
    _check.image("warp", "image", image)
    _check.displacement("warp", "displacement", displacement, image.shape[2:], image.shape[0])
    _check.choice("warp", "mode", mode, MODES)
    _check.choice("warp", "padding", padding, PADDINGS)
    return torch.ops.fastreg.warp(image, displacement, mode, padding)


def _corner_index(index, n, padding):
    """Index each corner reads and whether it exists."""
    if padding == "zeros":
        return index.clamp(0, n - 1), (index >= 0) & (index < n)
    if padding == "reflection" and n > 1:
        index = index.abs() % (2 * (n - 1))
        index = torch.where(index < n, index, 2 * (n - 1) - index)
    return index.clamp(0, n - 1), torch.ones_like(index, dtype=torch.bool)


def warp_ref(image, displacement, mode, padding):
    dtype = torch.promote_types(torch.promote_types(image.dtype, displacement.dtype), torch.float32)
    u = displacement.to(dtype)
    if mode == "nearest":
        u = u.detach().round()
    nd, size = u.shape[1], image.shape[2:]
    out_shape = (*image.shape[:2], *u.shape[2:])
    nan = u.isnan().any(1, keepdim=True)
    u = u.masked_fill(nan, 0).clamp(-(2.0**29), 2.0**29)
    whole = u.detach().floor()
    fraction = u - whole
    carry = fraction.detach() >= 1
    fraction, whole = torch.where(carry, fraction - fraction.detach(), fraction), whole + carry
    corners = []
    for k in range(nd):
        steps = torch.arange(u.shape[2 + k], device=u.device).view([-1 if j == k else 1 for j in range(nd)])
        lower = whole[:, k].long() + steps
        corners.append([(*_corner_index(lower + up, size[k], padding), fraction[:, k], up) for up in (0, 1)])
    flat = image.to(dtype).flatten(2)
    out = flat.new_zeros(out_shape)
    if flat.shape[2] == 0:
        return out.to(image.dtype)
    for combination in itertools.product(*corners):
        index, weight, exists = 0, 1, True
        for k, (i, present, f, up) in enumerate(combination):
            index, exists = index * size[k] + i, exists & present
            weight = weight * (f if up else 1 - f)
        value = flat.gather(2, index.flatten(1)[:, None].expand(-1, flat.shape[1], -1)).view(out_shape)
        # A corner of weight 0 must not pass on what is not finite.
        keep = exists[:, None] & ((weight.detach() != 0)[:, None] | value.detach().isfinite())
        out = out + weight[:, None] * torch.where(keep, value, 0)
    return out.masked_fill(nan, float("nan")).to(image.dtype)


def _warp_fake(image, displacement, mode, padding):
    return image.new_empty((*image.shape[:2], *displacement.shape[2:]))


def warp_bwd_ref(grad, image, displacement, mode, padding, need_image, need_displacement):
    grads = _ext.grad_of(lambda i, u: warp_ref(i, u, mode, padding), (image, displacement), grad)
    return tuple(
        g if need else g.new_zeros(0) for g, need in zip(grads, (need_image, need_displacement), strict=True)
    )


def _warp_bwd_fake(grad, image, displacement, mode, padding, need_image, need_displacement):
    return (
        torch.empty_like(image, memory_format=torch.contiguous_format) if need_image else image.new_empty(0),
        torch.empty_like(displacement, memory_format=torch.contiguous_format)
        if need_displacement
        else displacement.new_empty(0),
    )


_ext.define("warp(Tensor image, Tensor displacement, str mode, str padding) -> Tensor", warp_ref, _warp_fake)
_ext.define(
    "warp_bwd(Tensor grad, Tensor image, Tensor displacement, str mode, str padding, bool need_image, bool need_displacement)"
    " -> (Tensor, Tensor)",
    warp_bwd_ref,
    _warp_bwd_fake,
)


def _setup(ctx, inputs, output):
    image, displacement, ctx.mode, ctx.padding = inputs
    ctx.save_for_backward(image, displacement)


def _backward(ctx, grad):
    image, displacement = ctx.saved_tensors
    need_image, need_displacement = ctx.needs_input_grad[:2]
    grad_image, grad_u = torch.ops.fastreg.warp_bwd(
        grad, image, displacement, ctx.mode, ctx.padding, need_image, need_displacement
    )
    return grad_image if need_image else None, grad_u if need_displacement else None, None, None


def _setup_bwd(ctx, inputs, output):
    grad, image, displacement, ctx.mode, ctx.padding, ctx.need_image, ctx.need_displacement = inputs
    ctx.save_for_backward(grad, image, displacement)
    ctx.set_materialize_grads(False)


def _backward_bwd(ctx, grad_grad_image, grad_grad_u):
    """Double backward by differentiating the reference twice: rare enough not to deserve a kernel."""
    inputs = ctx.saved_tensors

    def first_gradients(grad, image, displacement):
        _, vjp = torch.func.vjp(lambda i, u: warp_ref(i, u, ctx.mode, ctx.padding), image, displacement)
        return vjp(grad)

    outputs, vjp = torch.func.vjp(first_gradients, *inputs)
    directions = tuple(
        torch.zeros_like(o) if g is None or not need else g.to(o.dtype)
        for o, g, need in zip(
            outputs, (grad_grad_image, grad_grad_u), (ctx.need_image, ctx.need_displacement), strict=True
        )
    )
    return (*vjp(directions), None, None, None, None)


_ext.autograd("warp", _setup, _backward)
_ext.autograd("warp_bwd", _setup_bwd, _backward_bwd)
_ext.batched("warp", "warp_bwd")
