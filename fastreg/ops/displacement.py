"""Displacement fields: resampling, Gaussian smoothing, Jacobian determinant.

resize_displacement: linear resampling of every component; component i times the factor of its axis, (o_i - 1)
/ (i_i - 1) with align_corners and o_i / i_i without, so that it stays in voxels of its own grid. No
anti-aliasing.
smooth: sampled Gaussian ``exp(-x^2 / 2 s^2)`` normalised to sum 1, radius ``ceil(truncate s)``, axis by axis.
Both are linear: the backward is the transposed matrix of each axis, and the backward of that is the forward
again.
jacobian_determinant: ``det(I + du/dx)``, central differences inside, one-sided at the faces, 0 along an axis
of one voxel.
Gradient: ``dL/du_c = sum_j D_j^T (g cofactor_cj)`` with D_j the difference along j.
"""

import math
import operator

import torch
import torch.nn.functional as F

from fastreg import _ext
from fastreg.ops import _check
from fastreg.ops.warp import PADDINGS


def resize_displacement(u, size, *, align_corners=True, scale="exact"):
    """Resamples a displacement to another grid (linear) and rescales it to that grid's voxels.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), fp64 / fp32 / fp16 / bf16.
        size (sequence of int): the new spatial shape.
        align_corners (bool): corner voxels keep their centres (True) or their outer faces (False).
        scale (str, number or sequence): "exact": component i times (o_i - 1) / (i_i - 1) with align_corners,
            o_i / i_i without; or a factor, or one per axis. An axis of one voxel has no extent under
            align_corners: exact factor 1.

    Returns:
        Tensor: (N, nd, *size), dtype of u. Differentiable (any number of times) in u.

    Raises:
        TypeError: u is not floating, size or scale are not numbers. ValueError: shapes or values do not fit.

    Notes:
        Positions are exact ratios of integers: resizing to the same size is exactly the identity.
        Deterministic.
    """
    _check.floating("resize_displacement", u=u)
    nd = _check.displacement("resize_displacement", "u", u)
    if 0 in u.shape[2:]:
        _check.fail("resize_displacement", "u", "not have an empty axis", tuple(u.shape))
    try:
        size = [s if isinstance(s, (int, torch.SymInt)) else operator.index(s) for s in size]
    except TypeError:
        _check.fail("resize_displacement", "size", f"be {nd} integers", repr(size), TypeError)
    if len(size) != nd or not all(s >= 1 for s in size):
        _check.fail("resize_displacement", "size", f"be {nd} integers >= 1", tuple(size))
    if isinstance(scale, str):
        _check.choice("resize_displacement", "scale", scale, ("exact",))
        factors = None
    else:
        factors = _check.per_axis(
            "resize_displacement", "scale", scale, nd, minimum=float("-inf"), strict=True
        )
    return torch.ops.fastreg.resize_displacement(
        u, size, _check.flag("resize_displacement", "align_corners", align_corners), factors
    )


def smooth(u, sigma, *, padding="border", truncate=4.0):
    """Gaussian smoothing of a displacement or image, each channel by itself.

    Args:
        u (Tensor): (N, C, D, H, W) or (N, C, H, W), fp64 / fp32 / fp16 / bf16.
        sigma (number or sequence): standard deviation in voxels, one or one per axis; 0 leaves an axis as it
            is.
        padding (str): what lies outside: "zeros", "border" (nearest voxel) or "reflection" (about the
            outermost voxel centres).
        truncate (number): the kernel ends at ceil(truncate * sigma) voxels.

    Returns:
        Tensor: shape and dtype of u. Differentiable (any number of times) in u.

    Raises:
        TypeError: u is not floating. ValueError: shape, sigma, padding or truncate do not fit.

    Notes:
        A NaN reaches the voxels whose kernel holds it and no others. Deterministic.
    """
    _check.floating("smooth", u=u)
    nd = _check.image("smooth", "u", u)
    sigma = _check.per_axis("smooth", "sigma", sigma, nd)
    _check.choice("smooth", "padding", padding, PADDINGS)
    truncate = _check.per_axis("smooth", "truncate", truncate, 1, strict=True)[0]
    if max(sigma) * truncate > MAX_RADIUS:
        _check.fail("smooth", "sigma", f"have truncate * sigma <= {MAX_RADIUS}", max(sigma) * truncate)
    return torch.ops.fastreg.smooth(u, sigma, padding, truncate)


def jacobian_determinant(u):
    """Determinant of the Jacobian of ``x + u(x)``: 1 without motion, <= 0 where it folds.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), fp64 / fp32 / fp16 / bf16.

    Returns:
        Tensor: (N, 1, *spatial), fp32 (fp64 for fp64). Differentiable (once) in u.

    Raises:
        TypeError: u is not floating. ValueError: its shape does not fit.

    Notes:
        Central differences inside, one-sided at the faces, 0 along an axis of one voxel. Deterministic.
    """
    _check.floating("jacobian_determinant", u=u)
    _check.displacement("jacobian_determinant", "u", u)
    return torch.ops.fastreg.jacobian_determinant(u)


MAX_RADIUS = 2**16


def _arithmetic(u):
    return u.to(torch.promote_types(u.dtype, torch.float32))


def _along(values, axis, nd):
    return values.view([-1 if k == axis else 1 for k in range(nd)])


def resize_displacement_ref(u, size, align_corners, scale):
    nd, out = u.dim() - 2, _arithmetic(u)
    factors = []
    for k in range(nd):
        n, o = u.shape[k + 2], size[k]
        position = torch.arange(o, device=u.device)
        position = (position * (n - 1)) if align_corners else ((2 * position + 1) * n - o).clamp_min(0)
        unit = max(o - 1, 1) if align_corners else 2 * o
        lower = (position // unit).clamp_max(n - 1)
        fraction = ((position - lower * unit).double() / unit).masked_fill(lower == n - 1, 0)
        fraction = _along(fraction.to(out.dtype), k, nd)
        a, b = (out.index_select(k + 2, i) for i in (lower, (lower + 1).clamp_max(n - 1)))
        # A voxel of weight 0 must not pass on what is not finite.
        out = torch.where(fraction == 0, a, (1 - fraction) * a + fraction * b)
        factors.append(
            scale[k] if scale else ((o - 1) / (n - 1) if n > 1 else 1.0) if align_corners else o / n
        )
    factor = torch.stack([out.new_full((), f) for f in factors])
    return (out * factor.view(-1, *[1] * nd)).to(u.dtype)


def resize_displacement_bwd_ref(grad, size, align_corners, scale):
    u = grad.new_zeros((*grad.shape[:2], *size))
    return _ext.grad_of(
        lambda t: resize_displacement_ref(t, grad.shape[2:], align_corners, scale), (u,), grad
    )[0]


def smooth_ref(u, sigma, padding, truncate):
    nd, out = u.dim() - 2, _arithmetic(u)
    for k, s in enumerate(sigma):
        n, radius = u.shape[k + 2], math.ceil(truncate * s)
        if radius == 0 or n == 0:
            continue
        weight = [math.exp(-0.5 * (x / s) ** 2) for x in range(-radius, radius + 1)]
        if padding == "zeros":
            wide = F.pad(out, [0, 0] * (nd - 1 - k) + [radius, radius])
        else:
            index = torch.arange(-radius, n + radius, device=u.device)
            if padding == "reflection" and n > 1:
                index = index.abs() % (2 * (n - 1))
                index = torch.where(index < n, index, 2 * (n - 1) - index)
            wide = out.index_select(k + 2, index.clamp(0, n - 1))
        out = sum(w / math.fsum(weight) * wide.narrow(k + 2, x, n) for x, w in enumerate(weight))
    return out.to(u.dtype, copy=True)


def smooth_bwd_ref(grad, sigma, padding, truncate):
    return _ext.grad_of(lambda t: smooth_ref(t, sigma, padding, truncate), (torch.zeros_like(grad),), grad)[0]


def _derivative(f, axis):
    """Central differences, one-sided at the faces; 0 along an axis of one voxel."""
    n = f.shape[axis]
    if n < 2:
        return torch.zeros_like(f)
    inside = (f.narrow(axis, 2, n - 2) - f.narrow(axis, 0, n - 2)) / 2 if n > 2 else f.narrow(axis, 0, 0)
    first, last = (f.narrow(axis, i + 1, 1) - f.narrow(axis, i, 1) for i in (0, n - 2))
    return torch.cat([first, inside, last], axis)


def jacobian_determinant_ref(u):
    nd, u = u.dim() - 2, _arithmetic(u)
    m = [[_derivative(u[:, c], k + 1) + (c == k) for k in range(nd)] for c in range(nd)]
    if nd == 2:
        det = m[0][0] * m[1][1] - m[1][0] * m[0][1]
    else:
        det = sum(m[c][0] * (m[c - 2][1] * m[c - 1][2] - m[c - 1][1] * m[c - 2][2]) for c in range(3))
    return det.unsqueeze(1)


def jacobian_determinant_bwd_ref(grad, u):
    return _ext.grad_of(jacobian_determinant_ref, (u,), grad)[0]


def _resize_fake(u, size, align_corners, scale):
    return u.new_empty((*u.shape[:2], *size))


def _smooth_fake(u, sigma, padding, truncate):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def _jacobian_fake(u):
    return u.new_empty((u.shape[0], 1, *u.shape[2:]), dtype=torch.promote_types(u.dtype, torch.float32))


_ext.define(
    "resize_displacement(Tensor u, SymInt[] size, bool align_corners, float[]? scale) -> Tensor",
    resize_displacement_ref,
    _resize_fake,
)
_ext.define(
    "resize_displacement_bwd(Tensor grad, SymInt[] size, bool align_corners, float[]? scale) -> Tensor",
    resize_displacement_bwd_ref,
    _resize_fake,
)
_ext.define(
    "smooth(Tensor u, float[] sigma, str padding, float truncate) -> Tensor", smooth_ref, _smooth_fake
)
_ext.define(
    "smooth_bwd(Tensor grad, float[] sigma, str padding, float truncate) -> Tensor",
    smooth_bwd_ref,
    _smooth_fake,
)

_ext.define("jacobian_determinant(Tensor u) -> Tensor", jacobian_determinant_ref, _jacobian_fake)
_ext.define(
    "jacobian_determinant_bwd(Tensor grad, Tensor u) -> Tensor",
    jacobian_determinant_bwd_ref,
    lambda grad, u: torch.empty_like(u, memory_format=torch.contiguous_format),
)


def _linear(name, setup, transpose, arguments):
    """Autograd of a linear op: its transpose at the same arguments."""

    def backward(ctx, grad):
        return getattr(torch.ops.fastreg, transpose)(grad, *ctx.arguments), *[None] * arguments

    _ext.autograd(name, setup, backward)


def _setup_resize(ctx, inputs, output):
    ctx.arguments = (inputs[0].shape[2:], *inputs[2:])


def _setup_smooth(ctx, inputs, output):
    ctx.arguments = inputs[1:]


for _name, _setup in (("resize_displacement", _setup_resize), ("smooth", _setup_smooth)):
    _linear(_name, _setup, f"{_name}_bwd", 3)
    _linear(f"{_name}_bwd", _setup, _name, 3)


def _setup_jacobian(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_jacobian(ctx, grad):
    return torch.ops.fastreg.jacobian_determinant_bwd(grad, *ctx.saved_tensors)


_ext.autograd("jacobian_determinant", _setup_jacobian, _backward_jacobian)
_ext.once_differentiable("jacobian_determinant_bwd")
for _name in ("resize_displacement", "smooth", "jacobian_determinant"):
    _ext.batched(_name, f"{_name}_bwd")
