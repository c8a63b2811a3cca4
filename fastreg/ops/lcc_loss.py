"""Local cross-correlation (LCC, also LNCC) of two images.

The forward kernel computes the unit gradient in the same pass when an input requires one; the backward only scales it.
"""

import itertools
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops import _losses

Kernel = Literal["box", "gaussian", "triangular"]
KERNELS = get_args(Kernel)
Padding = Literal["zeros", "valid"]
PADDINGS = get_args(Padding)
Denominator = Literal["product", "clamp", "each"]
DENOMINATORS = get_args(Denominator)
TILE = 32  # voxels an axis over which the reference implementation shares one shift
TAU = 2.0**-42
MAX_WEIGHTED = 2**16 + 1  # every sample of a weighted window is visited


def lcc_loss(
    fixed: Tensor,  # (N, C, *spatial)
    moved: Tensor,  # (N, C, *spatial)
    window: int = 9,
    *,
    kernel: Kernel = "box",
    sigma: float | None = None,
    mask: Tensor | None = None,  # (N, 1, *spatial)
    squared: bool = True,
    padding: Padding = "zeros",
    smooth_nr: float = 0.0,
    smooth_dr: float = 1e-5,
    denominator: Denominator = "product",
    reduction: _losses.Reduction = "mean",
) -> Tensor:  # () or (N, 1, *spatial)
    """Negative local cross-correlation of two images over windows of ``window`` voxels an axis.

    ``LCC = c^2 / (v w)`` per voxel, minimised as ``-mean``: ``v``, ``w`` and ``c`` are the weighted variance sums of fixed and
    moved and their covariance sum over the window, from sums shifted by a local reference, never ``E[x^2] - E[x]^2`` of raw
    values. A window whose variance is not resolved is flat and contributes 0, with no gradient. Gradient of a sample q:
    ``sum over windows p holding q of k_pq (2 dLCC/dv (f_q - f_mean_p) + dLCC/dc (m_q - m_mean_p))``.
    Avants et al. 2008; same numbers as VoxelMorph's NCC ("box", "product", "zeros"), MONAI's LNCC (every kernel, "clamp",
    "zeros") and, as 1 + loss, ICON's LNCC(s) ("gaussian", sigma s, window 4 s + 1, unsquared, "each", smooth_dr 1e-5 times
    the weight of a window).

    Args:
        fixed, moved (Tensor): (N, C, D, H, W) or (N, C, H, W), fp64 / fp32 / fp16 / bf16; mixed dtypes are promoted.
        window (int): odd number of samples per axis; may exceed the image (not box: at most 65537).
        kernel (str): weight of the sample x voxels from the centre, multiplied over the axes. "box": 1. "gaussian":
            ``exp(-x^2 / 2 sigma^2)``. "triangular": two boxes of f samples convolved, each of weight 1 / f, f the largest odd
            number <= (window + 1) / 2; a window of 3 is a single sample, whose LCC is 0.
        sigma (float, optional): of the Gaussian, in voxels; window / 3 by default.
        mask (Tensor, optional): (N, 1, *spatial), >= 0, or bool: weights samples in every sum and voxels in the mean. No
            gradient. A window whose weights sum to less than those of 2 samples at its centre counts as empty.
        squared (bool): ``c^2 / D`` in [0, 1], else ``c / sqrt(D)`` in [-1, 1].
        padding (str): "zeros": samples outside the image are 0 and count (VoxelMorph, MONAI). "valid": only samples inside the
            image count; it alone is exactly invariant to an intensity offset.
        smooth_nr, smooth_dr (float): ``LCC = (c^2 + smooth_nr) / D``.
        denominator (str): D: "product" ``v w + dr``, "clamp" ``max(v, dr) max(w, dr)``, "each" ``(v + dr)(w + dr)``.
        reduction (str): "mean" over voxels, channels and batch (weighted by the mask), "sum", or "none".

    Returns:
        Tensor: scalar, or for "none" the map -LCC averaged over channels, (N, 1, *spatial); fp32 (fp64 for fp64 inputs).
        Differentiable once in fixed and moved; both gradients come from one pass.

    Raises:
        TypeError: not floating.
        ValueError: shapes, devices, an even window, a sigma that is not positive or not of a Gaussian, a mask that
            requires a gradient, a bad option.

    Notes:
        A window that holds a NaN or infinity, of an image or the mask, is NaN, no other; where the mask is 0 nothing is
        looked at. With "valid", constant images give 0
        with gradient 0 (with "zeros" their faces are edges); so does an all-zero mask.
        CPU: fp64 sums; on finite images bits independent of the number of threads. "box": one pass, cost independent of the window; extra memory per thread: some 3 (both gradients: 5)
        times ``window`` planes of fp64. Other kernels: cost proportional to the window; extra memory with gradients: 3 (both: 5) times ``window + 31`` planes of fp64, at most those of the image.
        A region whose offset from the rest is beyond 1e6 times its contrast counts as flat.
        CUDA: fp32 sums, shifted tile by tile (16 x 16 columns, at most 32 planes), for windows that reach at most 10 voxels from
        their centre; there a region whose offset from the rest of its tile is beyond 500 times its contrast counts as flat, and a
        window whose variance sums multiply beyond fp32 (both images of a contrast of some 1e8) is NaN. fp64 sums for fp64 images
        and longer windows, at a cost proportional to the window. Bits independent of the run. Extra memory with gradients: 3
        (both: 5) maps of some 100 planes of a 256^3 volume.

    Example:
        >>> fixed = torch.arange(64.0).view(1, 1, 8, 8).sin()
        >>> fastreg.lcc_loss(fixed, 100 + 5 * fixed, 3, padding="valid")  # a line through all samples of every window
        tensor(-1.0000)
        >>> moved = fixed.roll(1, -1).requires_grad_()
        >>> loss = fastreg.lcc_loss(fixed, moved, 3)
        >>> loss.backward()
        >>> moved.grad.shape
        torch.Size([1, 1, 8, 8])
    """
    fixed, moved, mask = _losses.images("lcc_loss", fixed, moved, mask, reduction)
    _check.choice("lcc_loss", "kernel", kernel, KERNELS)
    _check.choice("lcc_loss", "padding", padding, PADDINGS)
    _check.choice("lcc_loss", "denominator", denominator, DENOMINATORS)
    window = _check.odd_window("lcc_loss", window)
    if kernel != "box" and window > MAX_WEIGHTED:
        _check.fail("lcc_loss", "window", f"be at most {MAX_WEIGHTED} for kernel {kernel!r}", window)
    if kernel == "gaussian":
        sigma = window / 3 if sigma is None else sigma
        (sigma,) = _check.per_axis("lcc_loss", "sigma", sigma, 1, strict=True)
    elif sigma is not None:
        _check.fail("lcc_loss", "sigma", f"be None for kernel {kernel!r}", sigma)
    (smooth_nr,) = _check.per_axis("lcc_loss", "smooth_nr", smooth_nr, 1)
    (smooth_dr,) = _check.per_axis("lcc_loss", "smooth_dr", smooth_dr, 1)
    squared = _check.flag("lcc_loss", "squared", squared)
    options = (window, kernel, sigma, squared, padding, smooth_nr, smooth_dr, denominator)
    if reduction == "none":
        return torch.ops.fastreg.lcc_map(fixed, moved, mask, *options)
    need = (_check.needs_grad(fixed), _check.needs_grad(moved))
    total = torch.ops.fastreg.lcc_loss(fixed, moved, mask, *options, *need)[0].sum()
    return total if reduction == "sum" else _losses.mean_of(total, fixed, mask)


def _taps(window, kernel, sigma):
    """Weights of a window along one axis, fp64, without those that are 0 at its ends."""
    if kernel == "box":
        return torch.ones(window, dtype=torch.float64)
    if kernel == "gaussian":
        x = torch.arange(window, dtype=torch.float64) - window // 2
        taps = torch.exp(-0.5 * (x / sigma) ** 2)
        return taps[taps > 0]
    f = (window + 1) // 2
    f -= f % 2 == 0
    return (f - (torch.arange(2 * f - 1, dtype=torch.float64) - (f - 1)).abs()) / f**2


def _sum(x, taps):
    """Weighted sums over the windows, axis by axis, zeros outside. Never subtractive."""
    nd, convolve = x.dim() - 2, (F.conv2d, F.conv3d)[x.dim() - 4]
    shape, x = x.shape, x.flatten(0, 1).unsqueeze(1)
    for axis in range(nd):
        along = [len(taps) if k == axis else 1 for k in range(nd)]
        x = convolve(x, taps.to(x).view(1, 1, *along), padding=[k // 2 for k in along])
    return x.view(shape)


def _outside(spatial, taps):
    """(*spatial): weight of the padded samples of each window. A sum of positive terms: exactly 0 where there are none."""
    radius, total, on = len(taps) // 2, taps.sum(), {"device": taps.device}
    outside = torch.zeros((), dtype=torch.float64, **on)
    inside = torch.ones((), dtype=torch.float64, **on)
    for n in spatial:
        # Offsets of a window's samples against the axis: (n, samples of the window).
        at = torch.arange(n, **on).view(-1, 1) + torch.arange(-radius, radius + 1, **on)
        beyond = ((at < 0) | (at >= n)) * taps
        within = ((at >= 0) & (at < n)) * taps
        outside = outside[..., None] * total + inside[..., None] * beyond.sum(1)
        inside = inside[..., None] * within.sum(1)
    return outside


def _tiles(spatial):
    for start in itertools.product(*[range(0, s, TILE) for s in spatial]):
        yield [(s, min(s + TILE, n)) for s, n in zip(start, spatial, strict=True)]


def _lcc_tile(fixed, moved, mask, outside, taps, squared, smooth_nr, smooth_dr, denominator):
    """LCC of every window of a tile with its halo; `outside` is the weight of the padded samples of each window."""
    dims = tuple(range(2, fixed.dim()))
    bad = ~(fixed.detach().isfinite() & moved.detach().isfinite() & mask.isfinite()) & ~(mask <= 0)
    keep = (mask > 0) & ~bad
    weight = torch.where(keep, mask, 0)

    def shifted(x):
        x = torch.where(keep, x, 0)
        c = x.detach().sum(dims, keepdim=True) / keep.sum(dims, keepdim=True).clamp_min(1)
        return torch.where(keep, x - c, 0), c

    (f, cf), (m, cm) = shifted(fixed), shifted(moved)
    n = _sum(weight.expand_as(f), taps) + outside
    s1, t1 = _sum(weight * f, taps) - outside * cf, _sum(weight * m, taps) - outside * cm
    s2, t2 = _sum(weight * f * f, taps) + outside * cf**2, _sum(weight * m * m, taps) + outside * cm**2
    st = _sum(weight * f * m, taps) + outside * cf * cm
    per_n = torch.where(n > 0, 1 / n.clamp_min(torch.finfo(n.dtype).tiny), 0)
    v, w, c = s2 - s1**2 * per_n, t2 - t1**2 * per_n, st - s1 * t1 * per_n
    counted = n >= 2 * float(taps.max()) ** len(dims)
    resolved = (v.detach() > TAU * s2.detach()) & (w.detach() > TAU * t2.detach()) & counted
    v, w, c = (torch.where(resolved, x, 0) for x in (v, w, c))
    if denominator == "product":
        d = v * w + smooth_dr
    elif denominator == "clamp":
        d = v.clamp_min(smooth_dr) * w.clamp_min(smooth_dr)
    else:
        d = (v + smooth_dr) * (w + smooth_dr)
    positive = d.detach() > 0
    d = torch.where(positive, d, 1)
    lcc = (c**2 + smooth_nr) / d if squared else c / d.sqrt()
    lcc = torch.where(positive & counted, lcc.clamp_max(1), 0)
    return torch.where(_sum(bad.to(f.dtype), (taps > 0).double()) > 0, float("nan"), lcc)


def _lcc(fixed, moved, mask, window, kernel, sigma, squared, padding, smooth_nr, smooth_dr, denominator):
    """LCC per channel, (N, C, *spatial), in fp64 tile by tile."""
    taps = _taps(window, kernel, sigma).to(fixed.device)
    spatial, radius = fixed.shape[2:], len(taps) // 2
    f, m = fixed.double(), moved.double()
    mask = torch.ones_like(f[:, :1]) if mask is None else mask.double()
    whole = _outside(spatial, taps) if padding == "zeros" else None
    out = torch.zeros_like(f)
    for tile in _tiles(spatial):
        near = [(max(lo - radius, 0), min(hi + radius, n)) for (lo, hi), n in zip(tile, spatial, strict=True)]
        region = (..., *[slice(*s) for s in near])
        outside = whole[region] if padding == "zeros" else f.new_zeros([hi - lo for lo, hi in near])
        lcc = _lcc_tile(
            f[region], m[region], mask[region], outside, taps, squared, smooth_nr, smooth_dr, denominator
        )
        inner = (..., *[slice(lo - a, hi - a) for (lo, hi), (a, _) in zip(tile, near, strict=True)])
        out[(..., *[slice(*s) for s in tile])] = lcc[inner]
    return out


def lcc_map_ref(fixed, moved, mask, *options):
    """-LCC averaged over channels, (N, 1, *spatial)."""
    return -_lcc(fixed, moved, mask, *options).mean(1, keepdim=True).to(_ext.arithmetic(fixed))


def lcc_map_bwd_ref(grad, fixed, moved, mask, *options_and_needs):
    *options, need_fixed, need_moved = options_and_needs
    grads = _ext.grad_of(lambda f, m: lcc_map_ref(f, m, mask, *options), (fixed, moved), grad)
    return _ext.only_needed(grads, (need_fixed, need_moved))


def lcc_loss_ref(fixed, moved, mask, *options_and_needs):
    """Per sample -sum of mask * LCC over voxels and channels, and its gradients in arithmetic dtype where asked for."""
    *options, need_fixed, need_moved = options_and_needs
    dtype = _ext.arithmetic(fixed)

    def total(f, m):
        lcc = _lcc(f, m, mask, *options)
        return -(lcc if mask is None else torch.where(mask <= 0, 0, mask * lcc)).flatten(1).sum(1).to(dtype)

    return _losses.with_unit_gradients(total, fixed, moved, (need_fixed, need_moved))


_OPTIONS = "int window, str kernel, float? sigma, bool squared, str padding, float smooth_nr, float smooth_dr, str denominator"
_IMAGES = f"Tensor fixed, Tensor moved, Tensor? mask, {_OPTIONS}"
_NEEDS = "bool need_fixed, bool need_moved"
_ext.define(f"lcc_loss({_IMAGES}, {_NEEDS}) -> (Tensor, Tensor, Tensor)", lcc_loss_ref, _losses.fake)
_ext.define(f"lcc_map({_IMAGES}) -> Tensor", lcc_map_ref, _losses.map_fake)
_ext.define(
    f"lcc_map_bwd(Tensor grad, {_IMAGES}, {_NEEDS}) -> (Tensor, Tensor)",
    lcc_map_bwd_ref,
    _losses.map_bwd_fake,
)


_losses.autograd("lcc_loss")
_losses.backward_by("lcc_map", "lcc_map_bwd")
_ext.once_differentiable("lcc_map_bwd")
_ext.batched("lcc_loss", "lcc_map", "lcc_map_bwd")
