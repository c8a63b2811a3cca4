"""diffusion: mean squared forward differences of a displacement."""

import math
import sys

import pytest

import fastreg
from bench import common
from bench.common import Case, Provider

CASES = [
    Case("l2", (1, 3, 160, 160, 160), (True,)),
    *common.sizes(lambda n: (1, 3, n, n, n), (True,), name="l2-{}"),
]


def make_inputs(case, device, dtype):
    n, _, *size = case.shape
    return [common.displacement((n, 1, *size), 0, device, dtype)]


def bytes_moved(case, mode):
    return math.prod(case.shape) * case.dtype.itemsize * (3 if mode == "fwd+bwd" else 1)


def stock(case=None, inputs=None):
    def diffusion(u):
        axes = range(2, u.dim())
        return sum(u.diff(dim=k).square().mean() for k in axes) / len(axes)

    return diffusion


def central(case):
    """Squared central differences on the grid cropped by one, summed over axes."""

    def diffusion(u):
        inner = [slice(None), slice(None), *[slice(1, -1)] * (u.dim() - 2)]
        total = 0
        for k in range(2, u.dim()):
            after, before = list(inner), list(inner)
            after[k], before[k] = slice(2, None), slice(None, -2)
            total = total + ((u[tuple(after)] - u[tuple(before)]) / 2) ** 2
        return total.mean()

    return diffusion


def neurite(case, inputs):
    from neurite.nn.modules import SpatialGradient

    return SpatialGradient(penalty="l2")


def monai(case, inputs):
    from monai.losses import DiffusionLoss

    return DiffusionLoss()


PROVIDERS = {
    "fastreg": Provider(lambda case, inputs: fastreg.diffusion, "fastreg"),
    "torch": Provider(stock),
    "compile": Provider(lambda case, inputs: common.compiled(stock())),
    "neurite": Provider(neurite, "neurite"),
    "monai": Provider(monai, "monai", reference=central),
}


def reference(case):
    return stock()


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_diffusion(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
