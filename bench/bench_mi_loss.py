"""mi_loss: mutual information by Parzen windows; gradient to the moved image."""

import math
import sys

import pytest
import torch

import fastreg
from bench import common
from bench.common import Case, Provider

N160, N96 = (1, 1, 160, 160, 160), (1, 1, 96, 96, 96)
GRADS = (False, True)
CASES = [
    Case("gaussian-32", N160, GRADS, {"bins": 32}),
    Case("gaussian-64", N96, GRADS, {"bins": 64}),
    # MONAI bins a batch together, and gives the top bin no gradient.
    Case("bspline-32", N96, GRADS, {"bins": 32, "kernel": "bspline"}, ("fastreg", "torch", "compile")),
    *common.sizes(lambda n: (1, 1, n, n, n), GRADS, {"bins": 32}, name="gaussian-32-{}"),
]


def make_inputs(case, device, dtype):
    return [common.image(case.shape, seed, device, dtype) for seed in (0, 1)]


def bytes_moved(case, mode):
    volumes = 2 if mode == "fwd" else 4 + sum(case.grads)
    return math.prod(case.shape) * case.dtype.itemsize * volumes


def windows(x, bins, kernel):
    """Of all values for all bins: (N, values, bins)."""
    x = x.flatten(1)[..., None]
    if kernel == "gaussian":
        t = x.clamp(0, 1) * (bins - 1)
    else:
        low, high = x.detach().amin(1, keepdim=True), x.detach().amax(1, keepdim=True)
        t = 2 + (x - low) / (high - low) * (bins - 5)
    d = t - torch.arange(bins, dtype=x.dtype, device=x.device)
    if kernel == "gaussian":
        return torch.softmax(-2 * d.square(), -1)
    a, rest = d.abs(), (2 - d.abs()).clamp_min(0)
    return torch.where(a < 1, (4 + a.square() * (3 * a - 6)) / 6, rest**3 / 6)


def stock(case, inputs=None):
    bins, kernel = case.params["bins"], case.params.get("kernel", "gaussian")

    def loss(fixed, moved):
        f, m = windows(fixed, bins, kernel), windows(moved, bins, kernel)
        p = f.transpose(1, 2) @ m / f.shape[1]
        q = p.sum(2, keepdim=True) * p.sum(1, keepdim=True)
        return -(p * ((p + 1e-7) / (q + 1e-7) + 1e-7).log()).sum((1, 2)).mean()

    return loss


def reference(case):
    return stock(case)


def ours(case, inputs):
    return lambda fixed, moved: fastreg.mi_loss(fixed, moved, **case.params)


def monai(case, inputs):
    from monai.losses import GlobalMutualInformationLoss

    loss = GlobalMutualInformationLoss("gaussian", num_bins=case.params["bins"]).to(inputs[0].device)
    return lambda fixed, moved: loss(moved, fixed)


PROVIDERS = {
    "fastreg": Provider(ours, "fastreg"),
    "torch": Provider(stock),
    "compile": Provider(lambda case, inputs: common.compiled(stock(case))),
    "monai": Provider(monai, "monai"),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_mi_loss(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
