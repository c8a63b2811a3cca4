"""total_variation: mean absolute forward differences of a displacement, or their root over axes."""

import math
import sys

import pytest

import fastreg
from bench import common
from bench.common import Case, Provider

CASES = [
    Case("anisotropic", (1, 3, 160, 160, 160), (True,), {"isotropic": False}),
    Case("isotropic", (1, 3, 160, 160, 160), (True,), {"isotropic": True}),
    Case("isotropic-2d", (16, 2, 256, 256), (True,), {"isotropic": True}),
    *common.sizes(lambda n: (1, 3, n, n, n), (True,), {"isotropic": False}, name="anisotropic-{}"),
    *common.sizes(lambda n: (1, 3, n, n, n), (True,), {"isotropic": True}, name="isotropic-{}"),
]


def make_inputs(case, device, dtype):
    n, _, *size = case.shape
    return [common.displacement((n, 1, *size), 0, device, dtype)]


def bytes_moved(case, mode):
    return math.prod(case.shape) * case.dtype.itemsize * (3 if mode == "fwd+bwd" else 1)


def stock(case, inputs=None):
    """A root has no gradient at 0, so the least positive number stands in for it."""

    def anisotropic(u):
        axes = range(2, u.dim())
        return sum(u.diff(dim=k).abs().sum() for k in axes) * u.shape[1] / u.numel() / len(axes)

    def isotropic(u):
        axes = range(2, u.dim())
        last = {k: u.shape[k] - 1 for k in axes}
        square = 0
        for k in axes:
            difference = u.diff(dim=k)
            for j in axes:
                if j != k:
                    difference = difference.narrow(j, 0, last[j])
            square = square + difference.square()
        return square.clamp_min(1e-30).sqrt().mean()

    return isotropic if case.params["isotropic"] else anisotropic


def build(case, inputs):
    return lambda u: fastreg.total_variation(u, **case.params)


PROVIDERS = {
    "fastreg": Provider(build, "fastreg"),
    "torch": Provider(stock),
    "compile": Provider(lambda case, inputs: common.compiled(stock(case))),
}


def reference(case):
    return stock(case)


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_total_variation(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
