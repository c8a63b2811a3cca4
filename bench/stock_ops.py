"""The ops that models use in the best form stock PyTorch has, under fastreg's names: what a model is measured against.

with stock_ops.installed():                 # the models on stock ops
with stock_ops.installed(layers=True):      # and their layers as torch.cat, in-place LeakyReLU, instance_norm
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

from bench import (
    bench_diffusion,
    bench_local_correlation,
    bench_mind_loss,
    bench_total_variation,
)
from bench.bench_lcc_loss import box, correlation
from bench.bench_warp import identity, scale
from bench.common import Case
from fastreg.models import base, f3rnet, lindef, prdfe, r2n2, rrn, voxelmorph
from fastreg.ops.gaussian_displacement import gaussian_displacement_ref

MODULES = (f3rnet, lindef, prdfe, r2n2, rrn, voxelmorph)


def warp(image, displacement, *, affine=None, mode="linear", padding="zeros"):
    if displacement is None:
        displacement = affine_displacement(affine, image.shape[2:])
    image = image.to(displacement.dtype)
    grid, factor = (f(displacement.shape, displacement.device, displacement.dtype) for f in (identity, scale))
    positions = torch.addcmul(grid, displacement.movedim(1, -1).flip(-1), factor)
    return F.grid_sample(image, positions, padding_mode=padding, align_corners=True)


def compose(u, v, *, padding="border"):
    return v + warp(u, v, padding=padding)


def affine_displacement(matrix, shape):
    nd = len(shape)
    axes = [torch.arange(n, dtype=matrix.dtype, device=matrix.device) for n in shape]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    moved = torch.einsum("nij,j...->ni...", matrix[:, :, :nd], points)
    return moved + matrix[:, :, nd].view(-1, nd, *[1] * nd) - points


def resize_displacement(u, size, *, align_corners=True, scale="exact"):
    nd = u.ndim - 2
    if scale == "exact":
        ratio = [
            (o - 1) / (i - 1) if align_corners else o / i for o, i in zip(size, u.shape[2:], strict=True)
        ]
        scale = u.new_tensor(ratio).view(-1, *[1] * nd)
    mode = "trilinear" if nd == 3 else "bilinear"
    # Scaled while it is still small.
    return F.interpolate(u * scale, size=tuple(size), mode=mode, align_corners=align_corners)


def integrate_gradients(phi):
    return torch.stack([(c - 1).cumsum(k) for k, c in enumerate(phi.unbind(1), 1)], 1)


def gaussian_displacement(params, shape, *, sigma_is="std"):
    return gaussian_displacement_ref(params, shape, sigma_is)


def lcc_loss(fixed, moved, window=9, *, mask=None):
    assert mask is None
    nd = fixed.ndim - 2
    return correlation(box(window, nd), window**nd)(fixed, moved)


def mind_loss(fixed, moved, *, mask=None, **options):
    assert mask is None
    case = Case("", tuple(fixed.shape), (False, True), {"radius": 2, "dilation": 2, **options})
    return bench_mind_loss.stock(case)(fixed, moved)


def mse_loss(fixed, moved, *, mask=None):
    if mask is None:
        return F.mse_loss(moved, fixed)
    return (mask * (fixed - moved).square()).sum() / mask.sum()


def diffusion(u):
    return bench_diffusion.stock()(u)


def total_variation(u, *, isotropic=False):
    return bench_total_variation.stock(SimpleNamespace(params={"isotropic": isotropic}))(u)


def local_correlation(fixed, moving, radius, *, displacement=None, normalize=False, padding="zeros"):
    if displacement is not None:
        moving = warp(moving, displacement)
    case = Case(
        "", tuple(fixed.shape), (True, True), {"radius": radius, "normalize": normalize, "displaced": False}
    )
    return bench_local_correlation.shifted_products(case, (fixed, moving))(fixed, moving)


def concat_conv(layer, sources, slope):
    size = sources[-1].shape[2:]
    x = layer(torch.cat([s if s.shape[2:] == size else F.interpolate(s, size=size) for s in sources], 1))
    return x if slope is None else F.leaky_relu_(x, slope)


def dense_block(layers, sources, slope, activate=0):
    if activate:
        assert activate == sources[0].shape[1]
        sources = (F.leaky_relu_(sources[0], slope), *sources[1:])
    x = torch.cat(list(sources), 1)
    for layer in layers[:-1]:
        x = torch.cat([x, F.leaky_relu_(layer(x), slope)], 1)
    return F.leaky_relu_(layers[-1](x), slope)


def chain(layers, x, slope, eps=1e-5):
    parts = [x]
    for layer in layers:
        parts.append(norm_act_(layer(parts[-1]), slope, eps))
    return torch.cat(parts, 1)


def norm_act_(x, slope, eps=1e-5):
    return F.leaky_relu_(F.instance_norm(x, eps=eps), slope)


def activated(layer, x, slope):
    return F.leaky_relu_(layer(x), slope)


def convolved(layer, x):
    return layer(x)


def residual(layer, x, z, slope):
    return z + F.leaky_relu_(layer(x), slope)


def upsampled(x, factor, mode="trilinear"):
    corners = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(x, scale_factor=factor, mode=mode, **corners)


def pooled(x, size, kind="max"):
    return F.max_pool3d(x, size) if kind == "max" else F.avg_pool3d(x, size)


OPS = (
    warp,
    compose,
    affine_displacement,
    resize_displacement,
    integrate_gradients,
    gaussian_displacement,
    lcc_loss,
    mind_loss,
    mse_loss,
    diffusion,
    total_variation,
    local_correlation,
)
LAYERS = (concat_conv, dense_block, chain, norm_act_, activated, convolved, residual, pooled, upsampled)


@contextlib.contextmanager
def installed(layers=False):
    """Models built and called inside use these."""
    ops = SimpleNamespace(**{f.__name__: f for f in OPS})
    similarities = {"lcc": lcc_loss, "mind": mind_loss, "mse": mse_loss}
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "ops", ops))
            for layer in LAYERS if layers else ():
                if hasattr(module, layer.__name__):
                    stack.enter_context(mock.patch.object(module, layer.__name__, layer))
        stack.enter_context(mock.patch.dict(base.SIMILARITIES, similarities))
        yield
