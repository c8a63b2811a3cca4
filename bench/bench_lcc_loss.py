"""lcc_loss: local correlation in box, Gaussian and triangular windows, padding zeros, gradient to the moved image
as the peers have it.
"""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

import fastreg
from bench import common
from bench.common import Case, Provider, keeps

N160, N256 = ((1, 1, n, n, n) for n in (160, 256))
GPU = ("cuda",)
MOVED = (False, True)
EAGER = ("fastreg", "torch", "compile")
# ICON's LNCC(5); its 1e-5 is that of normalised weights.
LNCC5 = {"window": 21, "kernel": "gaussian", "sigma": 5.0}
LNCC5["formula"] = {"squared": False, "denominator": "each"}
CASES = [
    Case("w9", N160, MOVED, {"window": 9}, only=(*EAGER, "neurite", "monai", "dense convolution")),
    Case("w21", N160, MOVED, {"window": 21}, only=EAGER),
    # Both windows in one run: the cost must not depend on the window.
    Case("w9 and w21", N160, MOVED, {"window": 9}, only=("fastreg", "fastreg w=21")),
    Case("w9-both", N160, (True, True), {"window": 9}, only=(*EAGER, "neurite", "monai")),
    Case("w9-valid", N160, MOVED, {"window": 9, "padding": "valid"}, only=EAGER),
    *common.sizes(lambda n: (1, 1, n, n, n), MOVED, {"window": 9}, "w9-{}"),
    *common.sizes(lambda n: (1, 1, n, n, n), MOVED, {"window": 21}, "w21-{}"),
    Case("gaussian5", N160, MOVED, LNCC5, only=("fastreg", "torch", "icon")),
    Case("gaussian5-both", N160, (True, True), LNCC5, only=("fastreg", "torch", "icon")),
    *(
        Case(
            f"{kernel}-w{w}", N160, MOVED, {"window": w, "kernel": kernel}, only=("fastreg", "torch", "monai")
        )
        for kernel, w in (("gaussian", 9), ("gaussian", 21), ("triangular", 9))
    ),
    *common.sizes(lambda n: (1, 1, n, n, n), MOVED, LNCC5, "gaussian5-{}"),
    Case(
        "w9 256",
        N256,
        MOVED,
        {"window": 9},
        (*EAGER, "neurite", "monai", "dense convolution", "fused_lncc"),
        on=GPU,
    ),
    Case("w9-both 256", N256, (True, True), {"window": 9}, EAGER, on=GPU),
    Case("gaussian5 256", N256, MOVED, LNCC5, ("fastreg", "torch", "icon"), on=GPU),
]


def make_inputs(case, device, dtype):
    return [common.image(case.shape, seed, device, dtype) for seed in (0, 1)]


def bytes_moved(case, mode):
    volume = math.prod(case.shape) * case.dtype.itemsize
    return volume * (2 if mode == "fwd" else 2 + 2 + sum(case.grads))


def box(window, nd):
    """Separable sums of a window: one average pooling per axis."""
    pool = F.avg_pool3d if nd == 3 else F.avg_pool2d
    kernels = [[window if j == k else 1 for j in range(nd)] for k in range(nd)]

    def sums(x):
        for kernel in kernels:
            x = pool(x, kernel, stride=1, padding=[k // 2 for k in kernel])
        return x * window**nd

    return sums


def weights(case):
    """Along one axis, fp64."""
    window, kernel = case.params["window"], case.params.get("kernel", "box")
    x = torch.arange(window, dtype=torch.float64) - window // 2
    if kernel == "gaussian":
        return torch.exp(-(x**2) / (2 * (case.params.get("sigma") or window / 3) ** 2))
    if kernel == "triangular":
        f = (window + 1) // 4 * 2 + 1 if window % 4 == 1 else (window + 1) // 4 * 2 - 1
        return (f - x.abs()).clamp_min(0) / f**2
    return torch.ones_like(x)


def banded(case, like):
    """Weighted sums as one product with a banded matrix per axis, several times faster on a CPU than convolutions."""
    taps, spatial = weights(case), like.shape[2:]
    r = len(taps) // 2
    matrices = []
    for n in spatial:
        offset = torch.arange(n) - torch.arange(n).view(-1, 1) + r
        inside = (offset >= 0) & (offset < len(taps))
        matrices.append(torch.where(inside, taps[offset.clamp(0, len(taps) - 1)], 0).to(like))

    def sums(x):
        for axis, matrix in enumerate(matrices):
            before, after = x.shape[: 2 + axis].numel(), x.shape[3 + axis :].numel()
            flat = x.reshape(before, x.shape[2 + axis], after)
            x = (flat.squeeze(2) @ matrix if after == 1 else matrix @ flat).view(x.shape)
        return x

    return keeps(sums, *matrices)


DENOMINATORS = {
    "product": lambda v, w, dr: v * w + dr,
    "clamp": lambda v, w, dr: v.clamp_min(dr) * w.clamp_min(dr),
    "each": lambda v, w, dr: (v + dr) * (w + dr),
}


def correlation(sums, n, denominator="product", smooth_dr=1e-5, squared=True):
    """LCC from raw moments, several channels at once; `n` samples in a window, a number or a map. Those of the fixed image alone
    go by themselves: where it needs no gradient they stay out of the graph and are not kept.
    """

    def loss(fixed, moved):
        s, ss = sums(torch.cat([fixed, fixed * fixed], 1)).split(1, 1)
        t, tt, st = sums(torch.cat([moved, moved * moved, fixed * moved], 1)).split(1, 1)
        v, w, c = ss - s * s / n, tt - t * t / n, st - s * t / n
        d = DENOMINATORS[denominator](v, w, smooth_dr)
        return -(c * c / d if squared else c / d.sqrt()).mean()

    return loss


def formula_of(case):
    """Options of the formula the case is of."""
    options = case.params.get("formula", {})
    return options | ({"smooth_dr": 1e-5 * weights(case).sum().item() ** 3} if options else {})


def stock(case, inputs, window=None, **formula):
    window, nd = window or case.params["window"], len(case.shape) - 2
    if "kernel" in case.params:
        sums = banded(case, inputs[0])
        n = weights(case).sum().item() ** nd
        return keeps(correlation(sums, n, **(formula_of(case) | formula)), *sums.state)
    sums = box(window, nd)
    if case.params.get("padding", "zeros") == "zeros":
        return correlation(sums, window**nd, **formula)
    n = sums(torch.ones((1, 1, *case.shape[2:]), device=inputs[0].device, dtype=inputs[0].dtype))
    return keeps(correlation(sums, n, **formula), n)


def reference(case, **formula):
    return lambda fixed, moved: stock(case, (fixed, moved), **formula)(fixed, moved)


def compiled(case, inputs):
    loss = stock(case, inputs)
    return keeps(common.compiled(loss), *getattr(loss, "state", ()))


def ours(window=None):
    def build(case, inputs):
        options = {k: v for k, v in case.params.items() if k != "formula"} | formula_of(case)
        options |= {"window": window} if window else {}
        return lambda fixed, moved: fastreg.lcc_loss(fixed, moved, **options)

    return build


def neurite(case, inputs):
    from neurite.nn.modules import NCC

    ncc = NCC(window_size=case.params["window"])
    return lambda fixed, moved: -ncc(fixed, moved)


def monai(case, inputs):
    from monai.losses import LocalNormalizedCrossCorrelationLoss

    nd = len(case.shape) - 2
    kernel = case.params.get("kernel", "rectangular")
    loss = LocalNormalizedCrossCorrelationLoss(nd, case.params["window"], kernel_type=kernel)
    loss = loss.to(inputs[0].device)
    return lambda fixed, moved: loss(moved, fixed)


def fused_lncc(case, inputs):
    """1 - mean; its gradient goes to its first image alone."""
    from fused_lncc import fused_lncc_loss

    return lambda fixed, moved: fused_lncc_loss(moved, fixed, kernel_size=case.params["window"])


def icon(case, inputs):
    """ICON's LNCC(sigma): five separable convolutions with the normalised Gaussian, one axis after the other."""
    taps = weights(case)
    taps = (taps / taps.sum()).to(inputs[0])
    kernels = [taps.view(1, 1, *(len(taps) if k == axis else 1 for k in range(3))) for axis in range(3)]

    def blur(x):
        for kernel in kernels:
            x = F.conv3d(x, kernel, padding="same")
        return x

    def variance(x, mean):
        return torch.relu(blur(x * x) - mean * mean) + 1e-5

    def loss(fixed, moved):
        f, m = blur(fixed), blur(moved)
        covariance = blur(fixed * moved) - f * m
        return 1 - (covariance / torch.sqrt(variance(fixed, f) * variance(moved, m))).mean()

    return keeps(loss, taps)


def one_plus(case, **formula):
    return lambda fixed, moved: 1 + reference(case, **formula)(fixed, moved)


def dense(case, inputs):
    """One dense convolution per moment, the form of VoxelMorph until 0.2 and of TransMorph."""
    window, nd = case.params["window"], len(case.shape) - 2
    ones = torch.ones((1, 1, *[window] * nd), device=inputs[0].device, dtype=inputs[0].dtype)
    convolve = F.conv3d if nd == 3 else F.conv2d

    def sums(x):
        return torch.cat([convolve(m, ones, padding=window // 2) for m in x.split(1, 1)], 1)

    return keeps(correlation(sums, window**nd), ones)


PROVIDERS = {
    "fastreg": Provider(ours(), "fastreg"),
    "fastreg w=21": Provider(ours(21), "fastreg", reference=lambda case: reference(case, window=21)),
    "torch": Provider(stock),
    "compile": Provider(compiled),
    "neurite": Provider(neurite, "neurite"),
    "monai": Provider(monai, "monai", reference=lambda case: reference(case, denominator="clamp")),
    "fused_lncc": Provider(
        fused_lncc, "fused_lncc", reference=lambda case: one_plus(case, denominator="each")
    ),
    "icon": Provider(icon, reference=one_plus, slow=True),
    "dense convolution": Provider(dense, slow=True),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_lcc_loss(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
