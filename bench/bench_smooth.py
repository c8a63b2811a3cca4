"""smooth: separable sampled Gaussian on a displacement, border padding, truncated at four standard
deviations.
"""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

import fastreg
from bench import common
from bench.common import Case, Provider, keeps

N160 = (1, 3, 160, 160, 160)
CASES = [
    Case("s1.5", N160, (True,), {"sigma": 1.5}),
    Case("s4", N160, (True,), {"sigma": 4.0}, only=("fastreg", "torch")),
    *common.sizes(lambda n: (1, 3, n, n, n), (True,), {"sigma": 1.5}, "s1.5-{}"),
]


def make_inputs(case, device, dtype):
    n, _, *size = case.shape
    return [common.displacement((n, 1, *size), 0, device, dtype)]


def output_shape(case):
    return case.shape


def bytes_moved(case, mode):
    return math.prod(case.shape) * case.dtype.itemsize * (4 if mode == "fwd+bwd" else 2)


def gaussian(sigma, device, dtype, truncate=4.0):
    radius = math.ceil(truncate * sigma)
    x = torch.arange(-radius, radius + 1, device=device, dtype=dtype)
    return torch.exp(-x * x / (2 * sigma * sigma))


def stock(case, inputs, padding="replicate", weights=None):
    """One depthwise convolution per axis: the fastest of the convolution forms (batched, depthwise, 2D) that
    were tried.
    """
    u = inputs[0]
    channels, nd = case.shape[1], len(case.shape) - 2
    line = weights if weights is not None else gaussian(case.params["sigma"], u.device, u.dtype)
    line = line if weights is not None else line / line.sum()
    radius = len(line) // 2
    kernels = [line.view(1, 1, *[-1 if j == k else 1 for j in range(nd)]) for k in range(nd)]
    kernels = [k.expand(channels, *k.shape[1:]).contiguous() for k in kernels]
    pads = [[radius if j // 2 == nd - 1 - k else 0 for j in range(2 * nd)] for k in range(nd)]
    convolve = F.conv3d if nd == 3 else F.conv2d

    def smooth(u):
        for kernel, pad in zip(kernels, pads, strict=True):
            u = convolve(F.pad(u, pad, mode=padding), kernel, groups=channels)
        return u

    return keeps(smooth, *kernels)


def reference(case):
    return lambda u: stock(case, (u,))(u)


def as_monai(case):
    """Zero padding, and normalised by the integral of the Gaussian instead of the sum of its samples."""
    sigma = case.params["sigma"]

    def smooth(u):
        weights = gaussian(sigma, u.device, u.dtype) / (2.5066282 * sigma)
        return stock(case, (u,), "constant", weights)(u)

    return smooth


def monai(case, inputs):
    from monai.networks.layers import GaussianFilter

    nd = len(case.shape) - 2
    return GaussianFilter(nd, case.params["sigma"], truncated=4.0, approx="sampled").to(inputs[0].device)


PROVIDERS = {
    "fastreg": Provider(lambda case, inputs: lambda u: fastreg.smooth(u, case.params["sigma"]), "fastreg"),
    "torch": Provider(stock),
    "compile": Provider(lambda case, inputs: common.compiled(stock(case, inputs))),
    "monai": Provider(monai, "monai", reference=as_monai),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_smooth(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
