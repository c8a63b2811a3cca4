"""The displacement of a grid of B-spline control points."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops import _linear

ORDERS = (1, 2, 3)


def bspline_displacement(
    coefficients: Tensor,  # (N, nd, *control)
    spacing: int | Sequence[int],
    shape: Sequence[int],
    order: int = 3,
) -> Tensor:  # (N, nd, *shape)
    """The displacement of a grid of B-spline control points.

    ``u(p) = sum_k c_k prod_i b(p_i / s_i - k_i + (order - 1) / 2)``, b the centred cardinal B-spline. Control point k of an
    axis sits at voxel ``(k - (order - 1) / 2) s``: the polynomial pieces begin at the voxels 0, s, 2s, ... in every order, and
    the ``ceil(n / s) + order`` control points of an axis of n voxels are exactly those that reach it. Equal coefficients
    give a constant field up to the border.
    Linear: the backward is the transposed matrix of each axis, and the backward of that is the forward again.
    Rueckert et al. 1999.

    Args:
        coefficients (Tensor): (N, nd, *control) in voxels of the field, channels in axis order (z, y, x),
            fp64 / fp32 / fp16 / bf16; ``ceil(n / spacing) + order`` control points along an axis of n voxels
            (``fastreg.ops.bspline_displacement.control_shape(shape, spacing, order)``).
        spacing (int or sequence of int): voxels between control points, one or one per axis, >= 1.
        shape (sequence of int): spatial shape of the field.
        order (int): 1 (linear), 2 (quadratic) or 3 (cubic).

    Returns:
        Tensor: (N, nd, *shape), dtype of coefficients. Differentiable (any number of times) in coefficients.

    Raises:
        TypeError: coefficients is not floating; spacing, shape or order are not integers.
        ValueError: shapes or values do not fit.

    Notes:
        A coefficient reaches the voxels less than (order + 1) / 2 spacings away and no others. Deterministic.

    Example:
        >>> coefficients = torch.zeros(1, 2, 4, 5)  # (1 or 4 voxels) / 4 + 3 control points
        >>> coefficients[:, 1, :, 2] = 6.0  # all along y
        >>> fastreg.bspline_displacement(coefficients, 4, (1, 8))[0, 1]
        tensor([[1.0000, 1.8906, 2.8750, 3.6719, 4.0000, 3.6719, 2.8750, 1.8906]])
    """
    _check.floating("bspline_displacement", coefficients=coefficients)
    nd = _check.displacement("bspline_displacement", "coefficients", coefficients)
    shape = _check.sizes("bspline_displacement", "shape", shape, nd, 1)
    spacing = _check.sizes("bspline_displacement", "spacing", spacing, nd, 1, one_for_all=True)
    if isinstance(order, bool) or not isinstance(order, int) or order not in ORDERS:
        _check.fail("bspline_displacement", "order", "be 1, 2 or 3", repr(order))
    control = control_shape(shape, spacing, order)
    if tuple(coefficients.shape[2:]) != control:
        rule = f"have ceil(n / spacing) + {order} control points per axis, {control} for the shape {tuple(shape)}"
        _check.fail("bspline_displacement", "coefficients", rule, tuple(coefficients.shape))
    return torch.ops.fastreg.bspline_displacement(coefficients, spacing, shape, order)


def control_shape(shape, spacing, order=3):
    """Control points per axis: ``ceil(n / spacing) + order``; spacing is an int or one per axis."""
    spacing = spacing if isinstance(spacing, (tuple, list)) else [spacing] * len(shape)
    return tuple(-(-n // s) + order for n, s in zip(shape, spacing, strict=True))


def basis(f, order):
    """Weights of control points i ... i + order at the fraction f in [0, 1) of piece i."""
    if order == 1:
        return 1 - f, f
    if order == 2:
        return (1 - f) ** 2 / 2, (1 + 2 * f * (1 - f)) / 2, f**2 / 2
    return (1 - f) ** 3 / 6, (4 + f**2 * (3 * f - 6)) / 6, (1 + 3 * f * (1 + f * (1 - f))) / 6, f**3 / 6


def bspline_displacement_ref(coefficients, spacing, shape, order):
    nd = coefficients.dim() - 2
    out = coefficients.to(_ext.arithmetic(coefficients))
    for k in range(nd):
        voxel = torch.arange(shape[k], device=out.device)
        fraction = (voxel % spacing[k]).double() / spacing[k]
        axis = 0.0
        for i, weight in enumerate(basis(fraction, order)):
            weight = _linear.along(weight.to(out.dtype), k, nd)
            value = out.index_select(k + 2, voxel // spacing[k] + i)
            # A control point of weight 0 must not pass on what is not finite.
            axis = axis + torch.where(weight == 0, 0, weight * value)
        out = axis
    return out.to(coefficients.dtype)


def bspline_displacement_bwd_ref(grad, spacing, size, order):
    coefficients = grad.new_zeros((*grad.shape[:2], *size))
    return _ext.grad_of(
        lambda c: bspline_displacement_ref(c, spacing, grad.shape[2:], order), (coefficients,), grad
    )[0]


def _fake(tensor, spacing, size, order):
    return tensor.new_empty((*tensor.shape[:2], *size))


_ext.define(
    "bspline_displacement(Tensor coefficients, int[] spacing, SymInt[] shape, int order) -> Tensor",
    bspline_displacement_ref,
    _fake,
)
_ext.define(
    "bspline_displacement_bwd(Tensor grad, int[] spacing, SymInt[] size, int order) -> Tensor",
    bspline_displacement_bwd_ref,
    _fake,
)


def _setup(ctx, inputs, output):
    tensor, spacing, _, order = inputs
    ctx.arguments = (spacing, tensor.shape[2:], order)


_linear.autograd("bspline_displacement", _setup)
_ext.batched("bspline_displacement", "bspline_displacement_bwd")
