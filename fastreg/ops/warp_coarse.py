"""Warping of an image by a displacement given on a coarser grid, which is never held on the image's."""

import torch
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops.resize_displacement import resize_displacement_ref
from fastreg.ops.warp import PADDINGS, Padding, warp_ref


def warp_coarse(
    image: Tensor,  # (N, C, *spatial)
    displacement: Tensor,  # (N, nd, *grid)
    *,
    affine: Tensor | None = None,  # (N, nd, nd + 1)
    padding: Padding = "zeros",
) -> Tensor:  # (N, C, *spatial)
    """``warp(image, resize_displacement(displacement, image.shape[2:]), affine=affine, padding=padding)`` in one pass.

    The displacement is interpolated row by row where the image is read, and its gradient brought to the grid
    row by row: six volumes less are written and read, three each way. For free-form deformations of any grid.

    Args:
        image (Tensor): (N, C, D, H, W) or (N, C, H, W), fp64 / fp32 / fp16 / bf16.
        displacement (Tensor): (N, nd, *grid) in voxels of its grid, whose corner voxels are those of the image; channels
            in axis order (z, y, x), any of the four dtypes. It is interpolated in fp32 at least.
        affine (Tensor, optional): (N, nd, nd + 1), as ``warp`` has it: voxels of the image to voxels of the image.
        padding (str): what lies outside the image: "zeros", "border" or "reflection".

    Returns:
        Tensor: (N, C, *spatial), dtype of image. Differentiable (twice) in image, displacement and affine.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes, devices or padding do not fit.

    Notes:
        CPU: no displacement of the image's size, forward or backward; bits independent of the number of threads. Where
        the image or the affine require a gradient too the backward is that of the two ops, as all of it is on a GPU.

    Example:
        >>> image = torch.arange(5.0).expand(1, 1, 5, 5)
        >>> u = torch.zeros(1, 2, 3, 3)  # a voxel of its grid is two of the image
        >>> u[:, 1] = 0.25
        >>> fastreg.warp_coarse(image, u, padding="border")[0, 0, 0]
        tensor([0.5000, 1.5000, 2.5000, 3.5000, 4.0000])
    """
    op = "warp_coarse"
    tensors = {"image": image, "displacement": displacement, "affine": affine}
    _check.floating(op, **{k: t for k, t in tensors.items() if t is not None or k != "affine"})
    nd = _check.image(op, "image", image)
    if displacement.dim() != image.dim():
        shape = f"have shape (N, {nd}, {_check.AXES[nd]})"
        _check.fail(op, "displacement", shape, tuple(displacement.shape))
    _check.displacement(op, "displacement", displacement, None, image.shape[0])
    if 0 in displacement.shape[2:]:
        _check.fail(op, "displacement", "not have an empty axis", tuple(displacement.shape))
    if affine is not None:
        _check.affine(op, "affine", affine, nd, image.shape[0])
    _check.choice(op, "padding", padding, PADDINGS)
    return torch.ops.fastreg.warp_coarse(image, displacement, affine, padding)


def _fine(image, displacement):
    """The displacement on the image's grid, not rounded to halves on the way."""
    u = displacement.to(_ext.arithmetic(image, displacement))
    return torch.ops.fastreg.resize_displacement(u, image.shape[2:], True, None)


def warp_coarse_ref(image, displacement, affine, padding):
    """The two ops, which have kernels of their own."""
    return torch.ops.fastreg.warp(image, _fine(image, displacement), affine, "linear", padding)


def warp_coarse_bwd_ref(grad, image, displacement, affine, padding):
    u = _fine(image, displacement)
    needs = (False, True, False)
    du = torch.ops.fastreg.warp_bwd(grad, image, u, affine, "linear", padding, *needs)[1]
    du = torch.ops.fastreg.resize_displacement_bwd(du, displacement.shape[2:], True, None)
    return du.to(displacement.dtype)


_ext.define(
    "warp_coarse(Tensor image, Tensor displacement, Tensor? affine, str padding) -> Tensor",
    warp_coarse_ref,
    lambda image, displacement, affine, padding: torch.empty_like(
        image, memory_format=torch.contiguous_format
    ),
)
_ext.define(
    "warp_coarse_bwd(Tensor grad, Tensor image, Tensor displacement, Tensor? affine, str padding) -> Tensor",
    warp_coarse_bwd_ref,
    lambda grad, image, displacement, affine, padding: torch.empty_like(
        displacement, memory_format=torch.contiguous_format
    ),
)


def _setup(ctx, inputs, output):
    *tensors, ctx.padding = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    image, displacement, affine = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if needs == (False, True, False):
        return (
            None,
            torch.ops.fastreg.warp_coarse_bwd(grad, image, displacement, affine, ctx.padding),
            None,
            None,
        )
    u = _fine(image, displacement)
    grads = torch.ops.fastreg.warp_bwd(grad, image, u, affine, "linear", ctx.padding, *needs)
    to_image, to_u, to_affine = _ext.none_unless_needed(grads, needs)
    if to_u is not None:
        to_u = torch.ops.fastreg.resize_displacement_bwd(to_u, displacement.shape[2:], True, None)
        to_u = to_u.to(displacement.dtype)
    return to_image, to_u, to_affine, None


def _setup_bwd(ctx, inputs, output):
    *tensors, ctx.padding = inputs
    ctx.save_for_backward(*tensors)


def _backward_bwd(ctx, direction):
    """Rare enough not to deserve a kernel."""
    grad, image, displacement, affine = ctx.saved_tensors

    def function(image, displacement, *given):
        u = displacement.to(_ext.arithmetic(image, displacement))
        u = resize_displacement_ref(u, image.shape[2:], True, None)
        return warp_ref(image, u, given[0] if given else None, "linear", ctx.padding)

    given = [] if affine is None else [affine]
    directions = [None, direction, *[None] * len(given)]
    grads = _ext.second_grad_of(function, (image, displacement, *given), grad, directions)
    return (*grads, *[None] * (4 - len(grads)), None)


_ext.autograd("warp_coarse", _setup, _backward)
_ext.autograd("warp_coarse_bwd", _setup_bwd, _backward_bwd)
_ext.batched("warp_coarse", "warp_coarse_bwd")
