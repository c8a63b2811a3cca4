"""integrate_gradients: cumulative sums of the components of a field, each along its own axis."""

import math
import sys

import pytest
import torch

import fastreg
from bench import common
from bench.common import Case, Provider

CASES = [
    Case("3d", (1, 3, 160, 160, 160), (True,)),
    Case("2d", (16, 2, 256, 256), (True,)),
    *common.sizes(lambda n: (1, 3, n, n, n), (True,), name="3d-{}"),
]


def make_inputs(case, device, dtype):
    """Derivatives between 0 and 2."""
    n, _, *size = case.shape
    return [1 + common.displacement((n, 1, *size), 0, device, dtype, amplitude=1.0).tanh_()]


def output_shape(case):
    return case.shape


def bytes_moved(case, mode):
    return math.prod(case.shape) * case.dtype.itemsize * (4 if mode == "fwd+bwd" else 2)


def stock(case=None, inputs=None):
    def integrate(phi):
        return torch.stack([(p - 1).cumsum(k) for k, p in enumerate(phi.unbind(1), 1)], 1)

    return integrate


PROVIDERS = {
    "fastreg": Provider(lambda case, inputs: fastreg.integrate_gradients, "fastreg"),
    "torch": Provider(stock),
    "compile": Provider(lambda case, inputs: common.compiled(stock())),
}


def reference(case):
    return stock()


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_integrate_gradients(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
