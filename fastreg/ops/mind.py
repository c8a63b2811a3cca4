"""MIND descriptors of an image."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fastreg import _check, _ext

Neighbourhood = Literal["ssc", "six"]
NEIGHBOURHOODS = get_args(Neighbourhood)
Patch = Literal["box", "gaussian"]
PATCHES = get_args(Patch)
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


def mind(
    image: Tensor,  # (N, C, *spatial)
    *,
    radius: int = 2,
    dilation: int = 2,
    neighbourhood: Neighbourhood = "ssc",
    patch: Patch = "box",
    sigma: float = 0.5,
) -> Tensor:  # (N, channels, *spatial)
    """What an image looks like around each voxel, as distances between its patches; comparable across modalities.

    Channel k compares the patches at two offsets (a, b) of a voxel p, in units of ``dilation``:
    ``D_k(p) = sum_q w(q) S_k(p + q)``, ``S_k(p) = sum_c (I_c(p + dilation a) - I_c(p + dilation b))^2``, with weights w of
    (2 radius + 1)^nd samples that sum to 1; the image is replicated at the border for the offsets, S for the patch.
    ``descriptor = exp(-(D - min D) / V)``: the minimum and V are over channels, V of D - min D ("ssc") or of D ("six"), and V is
    kept within [1e-3, 1e3] of its mean over the sample, and above the smallest normal number.
    Gradient: through D, the minimum (shared evenly by channels that tie) and V, not through the bounds of V.
    Heinrich et al. 2012 ("six": MIND) and 2013 ("ssc": MIND-SSC).

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
        TypeError: not floating.
        ValueError: shapes, a radius out of range, a dilation below 1, a bad option.

    Notes:
        Halves are computed in fp32. V is bounded by its mean over each sample, so a NaN or an infinity makes all descriptors of
        its sample NaN, and no other sample's. A constant image gives 1 with gradient 0. Squares that overflow the arithmetic
        type count as infinite.

    Example:
        >>> image = torch.zeros(1, 1, 5, 5)
        >>> image[..., 3:] = 1.0  # an edge to the right of the middle
        >>> fastreg.mind(image, radius=0, dilation=1, neighbourhood="six")[0, :, 2, 2]  # as above, below and left, not right
        tensor([1.0000, 1.0000, 1.0000, 0.0183])
    """
    _check.floating("mind", image=image)
    options = checked_options("mind", image, "image", radius, dilation, neighbourhood, patch, sigma)
    return torch.ops.fastreg.mind(image, *options)


def checked_options(op, image, name, radius, dilation, neighbourhood, patch, sigma):
    _check.image(op, name, image)
    if image.shape[1] == 0:
        _check.fail(op, name, "have at least one channel", tuple(image.shape))
    radius, dilation = _check.whole(op, "radius", radius, 0), _check.whole(op, "dilation", dilation, 1)
    longest = max(MAX_RADIUS, *image.shape[2:])
    if radius > longest:
        _check.fail(op, "radius", f"be at most the longest axis or {MAX_RADIUS}", radius)
    _check.choice(op, "neighbourhood", neighbourhood, NEIGHBOURHOODS)
    _check.choice(op, "patch", patch, PATCHES)
    (sigma,) = _check.per_axis(op, "sigma", sigma, 1, strict=True)
    return radius, dilation, neighbourhood, patch, sigma


def _shift(x, axis, step):
    """x(p + step along a spatial axis), replicated at the border."""
    n = x.shape[axis + 2]
    return x.index_select(axis + 2, (torch.arange(n, device=x.device) + step).clamp(0, max(n - 1, 0)))


def _distances(image, radius, dilation, neighbourhood, patch, sigma):
    """D, (N, channels, *spatial)."""
    nd = image.dim() - 2
    image = image.to(_ext.arithmetic(image)).contiguous()

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


def _any_within(seen, axis, begin, end):
    """Whether anything is seen from begin to end along an axis, of each pair of them."""
    counts = torch.cat([torch.zeros_like(seen.narrow(axis, 0, 1)), seen], axis).cumsum(
        axis, dtype=torch.int32
    )
    begin, end = (i.clamp(0, seen.shape[axis]) for i in (begin, end))
    return counts.index_select(axis, end) > counts.index_select(axis, begin)


def seen_or_finite(image, mask, radius, dilation, neighbourhood, *options):
    """The image with 0 for what is not finite and the descriptor of no voxel that the mask counts reads.

    It would spoil the mean of V, and with it the sample. GPUs are not asked whether there is any: they would have to wait.
    """
    if mask is None or image.numel() == 0 or (image.device.type == "cpu" and image.isfinite().all()):
        return image
    seen = ~(mask <= 0)
    at = [torch.arange(n, device=image.device) for n in image.shape[2:]]
    for axis, i in enumerate(at, 2):  # where patches lie
        seen = _any_within(seen, axis, i - radius, i + radius + 1)
    read = seen if neighbourhood == "six" else torch.zeros_like(seen)
    for axis, i in enumerate(at, 2):  # what they are shifted by, to the border at most
        last = len(i) - 1
        for begin, end in ((i - dilation, torch.where(i == last, last + 1, i - dilation + 1)),
                           (torch.where(i == 0, 0, i + dilation), i + dilation + 1)):  # fmt: skip
            read = read | _any_within(seen, axis, begin, end)
    return image.masked_fill(~(image.isfinite() | read), 0)


def _mean_variance(v):
    mean = v.detach().double().flatten(1).mean(1)
    return torch.where(mean.isfinite(), mean, float("nan"))


def descriptors(image, mean_variance, radius, dilation, neighbourhood, patch, sigma):
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
    return descriptors(image, None, *options).to(image.dtype)


def mind_mean_variance_ref(image, mask, *options):
    """(N,) in fp64; NaN where it is not finite. The mask: see `seen_or_finite`."""
    image = seen_or_finite(image, mask, *options)
    return _mean_variance(_variance(_distances(image, *options), options[2])[1])


def mind_bwd_ref(grad, image, *options):
    return _ext.grad_of(lambda x: mind_ref(x, *options), (image,), grad)[0]


def _mind_fake(image, radius, dilation, neighbourhood, *options):
    n_channels = len(channels(neighbourhood, image.dim() - 2))
    return image.new_empty((image.shape[0], n_channels, *image.shape[2:]))


def _bwd_fake(grad, image, *options):
    return torch.empty_like(image, memory_format=torch.contiguous_format)


def _mean_variance_fake(image, mask, *options):
    return image.new_empty(image.shape[0], dtype=torch.float64)


_OPTIONS = "int radius, int dilation, str neighbourhood, str patch, float sigma"
_ext.define(f"mind(Tensor image, {_OPTIONS}) -> Tensor", mind_ref, _mind_fake)
_ext.define(f"mind_bwd(Tensor grad, Tensor image, {_OPTIONS}) -> Tensor", mind_bwd_ref, _bwd_fake)
_ext.define(
    f"mind_mean_variance(Tensor image, Tensor? mask, {_OPTIONS}) -> Tensor",
    mind_mean_variance_ref,
    _mean_variance_fake,
)


def _setup(ctx, inputs, output):
    image, *ctx.options = inputs
    ctx.save_for_backward(image)


def _backward(ctx, grad):
    return torch.ops.fastreg.mind_bwd(grad, *ctx.saved_tensors, *ctx.options), *[None] * 5


_ext.autograd("mind", _setup, _backward)
_ext.autograd("mind_mean_variance", lambda ctx, inputs, output: None, lambda ctx, grad: (None,) * 7)
_ext.once_differentiable("mind_bwd")
_ext.batched("mind", "mind_bwd", "mind_mean_variance")
