"""Warping of an image by a displacement, an affine map or both.

Positions are split into the voxel index and the floor of ``(A - I) [p, 1] + u`` (integers) and what is left of it, so
``u = 0`` is exactly the identity and accuracy does not depend on the size of the volume; with a matrix the sum is taken
in fp64.
"""

import itertools
from typing import Literal, get_args

import torch
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops import _linear
from fastreg.ops.affine_displacement import affine_displacement_ref

Padding = Literal["zeros", "border", "reflection"]
PADDINGS = get_args(Padding)
Mode = Literal["linear", "nearest"]
MODES = get_args(Mode)


def warp(
    image: Tensor,  # (N, C, *spatial)
    displacement: Tensor | None,  # (N, nd, *spatial)
    *,
    affine: Tensor | None = None,  # (N, nd, nd + 1)
    mode: Mode = "linear",
    padding: Padding = "zeros",
) -> Tensor:  # (N, C, *spatial)
    """Warps an image by a displacement: ``out(p) = image(p + displacement(p))``, or ``image(affine [p, 1] + ...)``.

    Linear or nearest, voxel centres on integers (align_corners=True); zero displacement is exactly the identity.
    Gradient: ``dL/du_k = sum_c g_c d image_c / dx_k`` (one-sided at integer positions: towards larger indices),
    ``dL/dA = sum_p dL/du(p) [p, 1]^T``, ``dL/dimage`` the transpose of the interpolation (STN: Jaderberg et al. 2015, eq.
    5-7, in voxel units).

    Args:
        image (Tensor): (N, C, D, H, W) or (N, C, H, W), fp64 / fp32 / fp16 / bf16; with mode "nearest" also labels, of
            any integer dtype but uint64, or bool.
        displacement (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), any of the four dtypes; it is
            never cast down. A NaN makes its voxel NaN (a label: 0) and no other; beyond the image means outside. None with
            an affine: zero.
        affine (Tensor, optional): (N, nd, nd + 1), any of the four dtypes: voxels (z, y, x, 1) to voxels (z, y, x),
            origin at index 0. Any finite matrix, a singular one too: the image is only pulled through it. A sample
            whose matrix is not finite is NaN.
        mode (str): "linear", or "nearest" (ties of the displacement to even; no gradient to displacement and affine).
        padding (str): what lies outside: "zeros", "border" (nearest voxel) or "reflection" (about the outermost voxel centres).

    Returns:
        Tensor: (N, C, *spatial), dtype of image. Differentiable (twice) in image, displacement and affine; labels have no
        gradient.

    Raises:
        TypeError: a tensor is not floating, labels with mode "linear".
        ValueError: shapes, devices, mode or padding do not fit.

    Notes:
        No grid of positions is built. Deterministic on CPU: the image gradient sums its contributions in one fixed order
        whatever the thread count, that of the affine row by row. On a GPU it is scattered with fp32 atomics, whose last
        bits differ from run to run; under ``torch.use_deterministic_algorithms(True)`` in 64-bit fixed point, relative to the
        largest |gradient| of the sample: one smaller by 2^62 over the number of voxels (3e11 at 256^3) is lost.
        Labels pass through floating numbers, int64 up to 2^53 exactly.

    Example:
        >>> image = torch.tensor([[[[0.0, 1.0, 2.0, 3.0]]]])
        >>> u = torch.zeros(1, 2, 1, 4)
        >>> u[:, 1] = 0.5  # every voxel takes what lies half a voxel to its right
        >>> fastreg.warp(image, u)[0, 0]
        tensor([[0.5000, 1.5000, 2.5000, 1.5000]])
        >>> fastreg.warp(image, u, padding="border")[0, 0]
        tensor([[0.5000, 1.5000, 2.5000, 3.0000]])
        >>> fastreg.warp(image.to(torch.uint8), 2 * u, mode="nearest")[0, 0]
        tensor([[1, 2, 3, 0]], dtype=torch.uint8)
    """
    if isinstance(image, Tensor) and image.dtype in _check.WHOLE:
        if mode == "nearest":
            return _warp_labels(image, displacement, affine, padding)
        hint = 'pass image.float(), or labels with mode="nearest"'
        _check.fail("warp", "image", "be fp64, fp32, fp16 or bf16", f"{image.dtype}: {hint}", TypeError)
    tensors = {"image": image, "displacement": displacement, "affine": affine}
    optional = {"affine"} if affine is None else {"displacement"}
    _check.floating("warp", **{k: t for k, t in tensors.items() if t is not None or k not in optional})
    nd = _check.image("warp", "image", image)
    if displacement is not None:
        if image.shape[0] == 1 and displacement.shape[1:2] == (nd,) and displacement.shape[0] > 1:
            n = displacement.shape[0]
            hint = f"pass image.expand({n}, *image.shape[1:])"
            _check.fail("warp", "image", f"have the N = {n} of displacement", f"{tuple(image.shape)}: {hint}")
        _check.displacement("warp", "displacement", displacement, image.shape[2:], image.shape[0])
    if affine is not None:
        _check.affine("warp", "affine", affine, nd, image.shape[0])
    _check.choice("warp", "mode", mode, MODES)
    _check.choice("warp", "padding", padding, PADDINGS)
    return torch.ops.fastreg.warp(image, displacement, affine, mode, padding)


def _warp_labels(labels, displacement, affine, padding):
    """As numbers, which nearest neighbours do not change; a NaN of the displacement is label 0."""
    given = [t.detach() if isinstance(t, Tensor) else t for t in (displacement, affine)]
    moved = warp(
        labels.to(_check.WHOLE[labels.dtype]), given[0], affine=given[1], mode="nearest", padding=padding
    )
    return moved.nan_to_num_(0.0).to(labels.dtype)


def _corner_index(index, n, padding):
    """Index each corner reads and whether it exists."""
    if padding == "zeros":
        return index.clamp(0, n - 1), (index >= 0) & (index < n)
    if padding == "reflection" and n > 1:
        index = index.abs() % (2 * (n - 1))
        index = torch.where(index < n, index, 2 * (n - 1) - index)
    return index.clamp(0, n - 1), torch.ones_like(index, dtype=torch.bool)


def warp_ref(image, displacement, affine, mode, padding):
    dtype = _ext.arithmetic(image, displacement)
    if affine is None:
        u = displacement.to(dtype)
        nan = u.isnan().any(1, keepdim=True)
    else:
        shape = (image if displacement is None else displacement).shape[2:]
        u = affine_displacement_ref(affine.double(), shape, True)
        if displacement is not None:
            u = u + displacement.double()
        broken = ~affine.isfinite().flatten(1).all(1)
        nan = u.isnan().any(1, keepdim=True) | broken.view(-1, *[1] * (u.dim() - 1))
    if mode == "nearest":
        u = u.detach().round()
    nd, size = u.shape[1], image.shape[2:]
    out_shape = (*image.shape[:2], *u.shape[2:])
    u = u.masked_fill(nan, 0).clamp(-(2.0**29), 2.0**29)
    whole = u.detach().floor()
    fraction = (u - whole).to(dtype)
    carry = fraction.detach() >= 1
    fraction, whole = torch.where(carry, fraction - fraction.detach(), fraction), whole + carry
    corners = []
    for k in range(nd):
        steps = _linear.along(torch.arange(u.shape[2 + k], device=u.device), k, nd)
        lower = whole[:, k].long() + steps
        ends = [_corner_index(lower + up, size[k], padding) for up in (0, 1)]
        # Beyond the border nothing changes along the axis: not even by what its terms round to.
        constant = (ends[0][0] == ends[1][0]) & (ends[0][1] == ends[1][1])
        f = torch.where(constant, fraction[:, k].detach(), fraction[:, k])
        corners.append([(*end, f, up) for up, end in enumerate(ends)])
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


def _warp_fake(image, displacement, affine, mode, padding):
    return image.new_empty((*image.shape[:2], *(image if displacement is None else displacement).shape[2:]))


def _of_tensors(displacement, affine, mode, padding):
    """warp_ref as a function of the tensors there are, and those beside the image."""
    given = [t for t in (displacement, affine) if t is not None]

    def function(image, *tensors):
        u = tensors[0] if displacement is not None else None
        return warp_ref(image, u, tensors[-1] if affine is not None else None, mode, padding)

    return function, given


def _of_inputs(values, displacement, affine):
    """Values of (image, *given) spread over (image, displacement, affine); None where an input is."""
    image, *given = values
    given = iter(given)
    return [image, *(next(given) if t is not None else None for t in (displacement, affine))]


def warp_bwd_ref(
    grad, image, displacement, affine, mode, padding, need_image, need_displacement, need_affine
):
    function, given = _of_tensors(displacement, affine, mode, padding)
    grads = _of_inputs(_ext.grad_of(function, (image, *given), grad), displacement, affine)
    needs = (need_image, need_displacement, need_affine)
    return _ext.only_needed(grads, needs, grad)


def _warp_bwd_fake(
    grad, image, displacement, affine, mode, padding, need_image, need_displacement, need_affine
):
    inputs, needs = (image, displacement, affine), (need_image, need_displacement, need_affine)
    return _ext.empty_where_needed(inputs, needs, grad)


_ext.define(
    "warp(Tensor image, Tensor? displacement, Tensor? affine, str mode, str padding) -> Tensor",
    warp_ref,
    _warp_fake,
)
_ext.define(
    "warp_bwd(Tensor grad, Tensor image, Tensor? displacement, Tensor? affine, str mode, str padding, bool need_image,"
    " bool need_displacement, bool need_affine) -> (Tensor, Tensor, Tensor)",
    warp_bwd_ref,
    _warp_bwd_fake,
)


def _setup(ctx, inputs, output):
    *tensors, ctx.mode, ctx.padding = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    needs = ctx.needs_input_grad[:3]
    grads = torch.ops.fastreg.warp_bwd(grad, *ctx.saved_tensors, ctx.mode, ctx.padding, *needs)
    return *_ext.none_unless_needed(grads, needs), None, None


def _setup_bwd(ctx, inputs, output):
    *tensors, ctx.mode, ctx.padding, need_image, need_displacement, need_affine = inputs
    ctx.needs = (need_image, need_displacement, need_affine)
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward_bwd(ctx, *directions):
    """Rare enough not to deserve a kernel."""
    grad, image, displacement, affine = ctx.saved_tensors
    function, given = _of_tensors(displacement, affine, ctx.mode, ctx.padding)
    directions = _ext.none_unless_needed(directions, ctx.needs)
    present = [d for d, t in zip(directions, (image, displacement, affine), strict=True) if t is not None]
    grad_grad, *grads = _ext.second_grad_of(function, (image, *given), grad, present)
    return (grad_grad, *_of_inputs(grads, displacement, affine), *[None] * 5)


_ext.autograd("warp", _setup, _backward)
_ext.autograd("warp_bwd", _setup_bwd, _backward_bwd)
_ext.batched("warp", "warp_bwd")
