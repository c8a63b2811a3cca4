"""lcc_loss: squared local correlation in a box window, padding zeros, gradient to the moved image as the
peers have it.
"""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

import fastreg
from bench import common
from bench.common import Case, Provider, keeps

N160 = (1, 1, 160, 160, 160)
MOVED = (False, True)
EAGER = ("fastreg", "torch", "compile")
CASES = [
    Case("w9", N160, MOVED, {"window": 9}, only=(*EAGER, "neurite", "monai", "dense convolution")),
    Case("w21", N160, MOVED, {"window": 21}, only=EAGER),
    # Both windows in one run: the cost must not depend on the window.
    Case("w9 and w21", N160, MOVED, {"window": 9}, only=("fastreg", "fastreg w=21")),
    Case("w9-both", N160, (True, True), {"window": 9}, only=(*EAGER, "neurite", "monai")),
    Case("w9-valid", N160, MOVED, {"window": 9, "padding": "valid"}, only=EAGER),
    *common.sizes(lambda n: (1, 1, n, n, n), MOVED, {"window": 9}, "w9-{}"),
    *common.sizes(lambda n: (1, 1, n, n, n), MOVED, {"window": 21}, "w21-{}"),
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


DENOMINATORS = {
    "product": lambda v, w, dr: v * w + dr,
    "clamp": lambda v, w, dr: v.clamp_min(dr) * w.clamp_min(dr),
    "each": lambda v, w, dr: (v + dr) * (w + dr),
}


def correlation(sums, n, denominator="product", smooth_dr=1e-5):
    """LCC from raw moments, five channels at once; `n` samples in a window, a number or a map."""

    def loss(fixed, moved):
        moments = sums(torch.cat([fixed, moved, fixed * fixed, moved * moved, fixed * moved], 1))
        s, t, ss, tt, st = moments.split(1, 1)
        v, w, c = ss - s * s / n, tt - t * t / n, st - s * t / n
        return -(c * c / DENOMINATORS[denominator](v, w, smooth_dr)).mean()

    return loss


def stock(case, inputs, window=None, **formula):
    window, nd = window or case.params["window"], len(case.shape) - 2
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
        padding = case.params.get("padding", "zeros")
        return lambda fixed, moved: fastreg.lcc_loss(
            fixed, moved, window or case.params["window"], padding=padding
        )

    return build


def neurite(case, inputs):
    from neurite.nn.modules import NCC

    ncc = NCC(window_size=case.params["window"])
    return lambda fixed, moved: -ncc(fixed, moved)


def monai(case, inputs):
    from monai.losses import LocalNormalizedCrossCorrelationLoss

    nd = len(case.shape) - 2
    loss = LocalNormalizedCrossCorrelationLoss(nd, case.params["window"], kernel_type="rectangular").to(
        inputs[0].device
    )
    return lambda fixed, moved: loss(moved, fixed)


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
    "dense convolution": Provider(dense, slow=True),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_lcc_loss(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
