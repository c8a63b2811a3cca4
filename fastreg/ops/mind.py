"""MIND: what an image looks like around each voxel, as distances between its patches; comparable across modalities.

Channel k compares the patches at two offsets (a, b) of a voxel p, in units of ``dilation``:
``D_k(p) = sum_q w(q) S_k(p + q)``, ``S_k(p) = sum_c (I_c(p + dilation a) - I_c(p + dilation b))^2``, with weights w of
(2 radius + 1)^nd samples that sum to 1; the image is replicated at the border for the offsets, S for the patch.
``descriptor = exp(-(D - min D) / V)``: the minimum and V are over channels, V of D - min D ("ssc") or of D ("six"), and V is
kept within [1e-3, 1e3] of its mean over the sample, and above the smallest normal number.
Gradient: through D, the minimum (shared evenly by channels that tie) and V, not through the bounds of V. The losses keep no
descriptors: ops return one sum per sample and, computed in the same call, the gradient of that sum.
Heinrich et al. 2012 ("six": MIND) and 2013 ("ssc": MIND-SSC).
"""

import math
from numbers import Integral

import torch

from fastreg import _ext
from fastreg.ops import _check, _reduce

NEIGHBOURHOODS = ("ssc", "six")
PATCHES = ("box", "gaussian")
NORMS = ("l2", "l1")
REDUCTIONS = ("mean", "sum", "none")
_SSC = {
    3: "+z-y +y-z -y-z +y+z -y-x +y+x -x-z +z+x +y-x +x-y +z-x +x-z",
    2: "-y-x +x-y +y-x +x+y",
}
_SIX = {3: "-z +z -y +y -x +x", 2: "-y +y -x +x"}


def channels(neighbourhood, nd):
    """Offsets (a, b) of each channel, in steps of `dilation` along (z, y, x) or (y, x)."""

    def offset(text):
        axis = "zyx"[3 - nd :].find(text[1:])
        return tuple((1 if text[0] == "+" else -1) * (k == axis) for k in range(nd))

    if neighbourhood == "six":
        return [((0,) * nd, offset(c)) for c in _SIX[nd].split()]
    return [(offset(c[:2]), offset(c[2:])) for c in _SSC[nd].split()]


MAX_RADIUS = 16


def patch_weights(radius, patch, sigma):
    """Weights of a patch along one axis; they sum to 1."""
    weights = [
        math.exp(-0.5 * (k / sigma) * (k / sigma)) if patch == "gaussian" else 1.0
        for k in range(-radius, radius + 1)
    ]
    return [w / math.fsum(weights) for w in weights]


def mind(image, *, radius=2, dilation=2, neighbourhood="ssc", patch="box", sigma=0.5):
    """MIND descriptors of an image.

    Args:
        image (Tensor): (N, C, D, H, W) or (N, C, H, W), fp64 / fp32 / fp16 / bf16; distances are summed over C.
        radius (int): a patch has 2 radius + 1 voxels an axis; 0 compares voxels. At most the longest axis, or 16.
        dilation (int): length of the offsets in voxels.
        neighbourhood (str): "ssc": pairs of neighbours of a voxel, "six": the voxel and each neighbour.
        patch (str): "box", or "gaussian" with standard deviation `sigma` in voxels, cut at `radius`.
        sigma (float): > 0; unused with "box".

    Returns:
        Tensor: (N, channels, *spatial) in (0, 1], dtype of image. In order of (z, y, x) steps, "ssc": 12 channels +z-y +y-z
        -y-z +y+z -y-x +y+x -x-z +z+x +y-x +x-y +z-x +x-z (2D: 4, -y-x +x-y +y-x +x+y), "six": -z +z -y +y -x +x (2D: -y +y
        -x +x). Differentiable (once) in image.

    Raises:
        TypeError: not floating. ValueError: shapes, a radius out of range, a dilation below 1, a bad option.

    Notes:
        Borders: the image is replicated for the offsets, the squared differences for the patch. Halves are computed in fp32.
        V is bounded by its mean over each sample, so a NaN or an infinity makes all descriptors of its sample NaN, and no
        other sample's. A constant image gives 1 with gradient 0. Squares that overflow the arithmetic type count as infinite.
    """
    _check.floating("mind", image=image)
    options = _options("mind", image, "image", radius, dilation, neighbourhood, patch, sigma)
    return torch.ops.fastreg.mind(image, *options)


def mind_loss(
    fixed, moved, *, radius=2, dilation=2, neighbourhood="ssc", patch="box", sigma=0.5, norm="l2", mask=None,
    reduction="mean",
):  # fmt: skip
    """Mean squared (or absolute) difference of the MIND descriptors of two images, which are never stored.

    Args:
        fixed, moved (Tensor): (N, C, D, H, W) or (N, C, H, W), fp64 / fp32 / fp16 / bf16; mixed dtypes are promoted.
        radius, dilation, neighbourhood, patch, sigma: of the descriptors, see fastreg.mind.
        norm (str): "l2" squared, "l1" absolute differences.
        mask (Tensor, optional): (N, 1, *spatial), >= 0: weights of the voxels in the average. No gradient. It does not enter
            the descriptors: these see the image outside, and so does the mean of V that bounds V.
        reduction (str): "mean" over voxels, channels and batch (weighted by the mask), "sum", or "none": the difference
            averaged over channels, times the mask.

    Returns:
        Tensor: scalar, or (N, 1, *spatial) for "none"; fp32 (fp64 for fp64 inputs). Differentiable (once) in fixed and moved.

    Raises:
        TypeError: not floating. ValueError: shapes, devices, a mask that requires a gradient, a bad option.

    Notes:
        Constant images and all-zero masks give 0 with gradient 0. A NaN or an infinity makes its sample NaN, no other.
        Where two channels tie for the minimum within rounding, the gradient depends on which is less: it has a kink there.
        CPU: deterministic, whatever the thread count; some MB a thread beside the gradients. fastreg.nn.MINDLoss(...).prepare(fixed) computes what only depends on fixed
        once, for many calls.
    """
    options = {
        "radius": radius, "dilation": dilation, "neighbourhood": neighbourhood, "patch": patch, "sigma": sigma,
    }  # fmt: skip
    return mind_loss_prepared(fixed, None, moved, **options, norm=norm, mask=mask, reduction=reduction)


def check_mind_loss(norm="l2", reduction="mean"):
    _check.choice("mind_loss", "norm", norm, NORMS)
    _check.choice("mind_loss", "reduction", reduction, REDUCTIONS)


def prepare_mind(fixed, *, radius=2, dilation=2, neighbourhood="ssc", patch="box", sigma=0.5):
    """Mean of V of each sample, (N,) in fp64: what mind_loss must know of an image before it meets a voxel."""
    _check.floating("mind_loss", fixed=fixed)
    options = _options("mind_loss", fixed, "fixed", radius, dilation, neighbourhood, patch, sigma)
    return torch.ops.fastreg.mind_mean_variance(fixed, *options)


def mind_loss_prepared(
    fixed, fixed_variance, moved, *, radius=2, dilation=2, neighbourhood="ssc", patch="box", sigma=0.5,
    norm="l2", mask=None, reduction="mean",
):  # fmt: skip
    """mind_loss with the result of prepare_mind(fixed) or None."""
    _check.floating("mind_loss", fixed=fixed, moved=moved, mask=mask)
    options = _options("mind_loss", fixed, "fixed", radius, dilation, neighbourhood, patch, sigma)
    _check.same_shape("mind_loss", "moved", moved, "fixed", fixed)
    check_mind_loss(norm, reduction)
    _check.mask("mind_loss", mask, fixed)
    if fixed.dtype != moved.dtype:
        dtype = torch.promote_types(fixed.dtype, moved.dtype)
        fixed, moved = fixed.to(dtype), moved.to(dtype)
    if reduction == "none":
        error = torch.ops.fastreg.mind_map(fixed, moved, fixed_variance, *options, norm)
        return error if mask is None else _weighted(error, mask)
    need = (_check.needs_grad(fixed), _check.needs_grad(moved))
    total = torch.ops.fastreg.mind_loss(fixed, moved, fixed_variance, mask, *options, norm, *need)[0].sum()
    if reduction == "sum":
        return total
    n_channels = len(channels(neighbourhood, fixed.dim() - 2))
    return _reduce.mean_of(total, fixed[:, :1].expand(-1, n_channels, *fixed.shape[2:]), mask)


def _options(op, image, name, radius, dilation, neighbourhood, patch, sigma):
    _check.image(op, name, image)
    if image.shape[1] == 0:
        _check.fail(op, name, "have at least one channel", tuple(image.shape))
    for option, value, least in (("radius", radius, 0), ("dilation", dilation, 1)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            _check.fail(op, option, "be an int", repr(value), TypeError)
        if not least <= value < 2**31:
            _check.fail(op, option, f"be at least {least}", value)
    longest = max(MAX_RADIUS, *image.shape[2:])
    if radius > longest:
        _check.fail(op, "radius", f"be at most the longest axis or {MAX_RADIUS}", radius)
    _check.choice(op, "neighbourhood", neighbourhood, NEIGHBOURHOODS)
    _check.choice(op, "patch", patch, PATCHES)
    (sigma,) = _check.per_axis(op, "sigma", sigma, 1, strict=True)
    return int(radius), int(dilation), neighbourhood, patch, sigma


def _arithmetic(t):
    return torch.promote_types(t.dtype, torch.float32)


def _weighted(error, mask):
    """mask * error, 0 where the mask is not above 0, whatever the error; a NaN of the mask stays."""
    mask = mask.to(error.dtype)
    return torch.where(mask > 0, mask * error, torch.where(mask.isnan(), mask, 0))


def _shift(x, axis, step):
    """x(p + step along a spatial axis), replicated at the border."""
    n = x.shape[axis + 2]
    return x.index_select(axis + 2, (torch.arange(n, device=x.device) + step).clamp(0, max(n - 1, 0)))


def _distances(image, radius, dilation, neighbourhood, patch, sigma):
    """D, (N, channels, *spatial)."""
    nd = image.dim() - 2
    image = image.to(_arithmetic(image)).contiguous()

    def at(offset):
        x = image
        for axis, step in enumerate(offset):
            x = _shift(x, axis, dilation * step) if step else x
        return x

    squares = [(at(a) - at(b)).square().sum(1, keepdim=True) for a, b in channels(neighbourhood, nd)]
    d = torch.cat(squares, 1)
    for axis in range(nd):
        weights = patch_weights(radius, patch, sigma)
        d = sum(w * _shift(d, axis, k - radius) for k, w in enumerate(weights))
    return d


def _variance(d, neighbourhood):
    """D - min D and V, not yet bounded."""
    x = d - d.amin(1, keepdim=True)
    return x, (x if neighbourhood == "ssc" else d).mean(1, keepdim=True)


def _mean_variance(v):
    mean = v.detach().double().flatten(1).mean(1)
    return torch.where(mean.isfinite(), mean, float("nan"))


def _descriptors(image, mean_variance, radius, dilation, neighbourhood, patch, sigma):
    """In arithmetic dtype."""
    d = _distances(image, radius, dilation, neighbourhood, patch, sigma)
    x, v = _variance(d, neighbourhood)
    mean = _mean_variance(v) if mean_variance is None else mean_variance
    mean, tiny = mean.view(-1, *[1] * (v.dim() - 1)), torch.finfo(v.dtype).tiny
    v = v.clamp(*((factor * mean).clamp_min(tiny).to(v.dtype) for factor in (1e-3, 1e3)))
    # Of an image that is constant to the last bit, V is at its floor: its reciprocal must not meet a zero on the way back.
    flat = v <= tiny
    x, v = torch.where(flat, x.detach(), x), torch.where(flat, v.detach(), v)
    return torch.exp(-x / v)


def mind_ref(image, *options):
    return _descriptors(image, None, *options).to(image.dtype)


def mind_mean_variance_ref(image, *options):
    """(N,) in fp64; NaN where it is not finite."""
    return _mean_variance(_variance(_distances(image, *options), options[2])[1])


def mind_map_ref(fixed, moved, fixed_variance, *options_and_norm):
    """Difference averaged over channels, (N, 1, *spatial)."""
    *options, norm = options_and_norm
    difference = _descriptors(fixed, fixed_variance, *options) - _descriptors(moved, None, *options)
    return (difference.square() if norm == "l2" else difference.abs()).mean(1, keepdim=True)


def mind_loss_ref(fixed, moved, fixed_variance, mask, *options_and_needs):
    """Per sample the sum of mask * difference over voxels and channels, and its gradients in arithmetic dtype where asked for."""
    *options, need_fixed, need_moved = options_and_needs
    dtype = _arithmetic(fixed)
    n_channels = len(channels(options[2], fixed.dim() - 2))

    def total(f, m):
        error = mind_map_ref(f, m, fixed_variance, *options)
        if mask is not None:
            error = _weighted(error, mask)
        return n_channels * error.flatten(1).sum(1)

    loss = total(fixed, moved)
    empty = fixed.new_zeros(0, dtype=dtype)
    if not (need_fixed or need_moved):
        return loss, empty, empty.clone()
    grads = _ext.grad_of(total, (fixed.to(dtype), moved.to(dtype)), torch.ones_like(loss))
    return loss, *(
        g if need else empty.clone() for g, need in zip(grads, (need_fixed, need_moved), strict=True)
    )


def mind_bwd_ref(grad, image, *options):
    return _ext.grad_of(lambda x: mind_ref(x, *options), (image,), grad)[0]


def mind_map_bwd_ref(grad, fixed, moved, fixed_variance, *options_and_needs):
    *options, need_fixed, need_moved = options_and_needs
    grads = _ext.grad_of(lambda f, m: mind_map_ref(f, m, fixed_variance, *options), (fixed, moved), grad)
    return tuple(
        g if need else g.new_zeros(0) for g, need in zip(grads, (need_fixed, need_moved), strict=True)
    )


def _mind_fake(image, radius, dilation, neighbourhood, *options):
    n_channels = len(channels(neighbourhood, image.dim() - 2))
    return image.new_empty((image.shape[0], n_channels, *image.shape[2:]))


def _bwd_fake(grad, image, *options):
    return torch.empty_like(image, memory_format=torch.contiguous_format)


def _mean_variance_fake(image, *options):
    return image.new_empty(image.shape[0], dtype=torch.float64)


def _map_fake(fixed, moved, fixed_variance, *options):
    return fixed.new_empty((fixed.shape[0], 1, *fixed.shape[2:]), dtype=_arithmetic(fixed))


def _map_bwd_fake(grad, fixed, moved, fixed_variance, *options_and_needs):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)
        for t, need in zip((fixed, moved), options_and_needs[-2:], strict=True)
    )


def _loss_fake(fixed, moved, fixed_variance, mask, *options_and_needs):
    dtype = _arithmetic(fixed)
    return fixed.new_empty(fixed.shape[0], dtype=dtype), *(
        fixed.new_empty(fixed.shape if need else 0, dtype=dtype) for need in options_and_needs[-2:]
    )


_OPTIONS = "int radius, int dilation, str neighbourhood, str patch, float sigma"
_IMAGES = "Tensor fixed, Tensor moved, Tensor? fixed_variance"
_NEEDS = "bool need_fixed, bool need_moved"
_ext.define(f"mind(Tensor image, {_OPTIONS}) -> Tensor", mind_ref, _mind_fake)
_ext.define(f"mind_bwd(Tensor grad, Tensor image, {_OPTIONS}) -> Tensor", mind_bwd_ref, _bwd_fake)
_ext.define(
    f"mind_mean_variance(Tensor image, {_OPTIONS}) -> Tensor", mind_mean_variance_ref, _mean_variance_fake
)
_ext.define(
    f"mind_loss({_IMAGES}, Tensor? mask, {_OPTIONS}, str norm, {_NEEDS}) -> (Tensor, Tensor, Tensor)",
    mind_loss_ref,
    _loss_fake,
)
_ext.define(f"mind_map({_IMAGES}, {_OPTIONS}, str norm) -> Tensor", mind_map_ref, _map_fake)
_ext.define(
    f"mind_map_bwd(Tensor grad, {_IMAGES}, {_OPTIONS}, str norm, {_NEEDS}) -> (Tensor, Tensor)",
    mind_map_bwd_ref,
    _map_bwd_fake,
)


def _setup(ctx, inputs, output):
    image, *ctx.options = inputs
    ctx.save_for_backward(image)


def _backward(ctx, grad):
    return torch.ops.fastreg.mind_bwd(grad, *ctx.saved_tensors, *ctx.options), *[None] * 5


def _map_setup(ctx, inputs, output):
    fixed, moved, fixed_variance, *ctx.options = inputs
    ctx.save_for_backward(fixed, moved, fixed_variance)


def _map_backward(ctx, grad):
    need = ctx.needs_input_grad[:2]
    grads = torch.ops.fastreg.mind_map_bwd(grad, *ctx.saved_tensors, *ctx.options, *need)
    return (*(g if n else None for g, n in zip(grads, need, strict=True)), *[None] * 7)


_ext.autograd("mind", _setup, _backward)
_ext.unit_gradients("mind_loss")
_ext.autograd("mind_map", _map_setup, _map_backward)
_ext.autograd("mind_mean_variance", lambda ctx, inputs, output: None, lambda ctx, grad: (None,) * 6)
_ext.once_differentiable("mind_bwd", "mind_map_bwd")
_ext.batched("mind", "mind_bwd", "mind_mean_variance", "mind_loss", "mind_map", "mind_map_bwd")
