"""compose: v(x) + u(x + v(x)), gradient to both displacements."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

import fastreg
from bench import common
from bench.bench_warp import identity, scale
from bench.common import Case, Provider, keeps

CASES = [
    Case("both", (1, 3, 160, 160, 160), (True, True)),
    Case("v", (1, 3, 160, 160, 160), (False, True)),
    *common.sizes(lambda n: (1, 3, n, n, n), (True, True), name="both-{}"),
]


def make_inputs(case, device, dtype):
    image = (case.shape[0], 1, *case.shape[2:])
    return [common.displacement(image, seed, device, dtype) for seed in (0, 1)]


def output_shape(case):
    return case.shape


def bytes_moved(case, mode):
    field = math.prod(case.shape) * case.dtype.itemsize
    return field * (3 + (3 + sum(case.grads) if mode == "fwd+bwd" else 0))


def stock(case, inputs):
    """The identity grid is built once; a call scales the displacement, adds, samples and adds."""
    grid, factor = (f(case.shape, inputs[1].device, inputs[1].dtype) for f in (identity, scale))

    def compose(u, v):
        positions = torch.addcmul(grid, v.movedim(1, -1).flip(-1), factor)
        return v + F.grid_sample(u, positions, padding_mode="border", align_corners=True)

    return keeps(compose, grid)


def reference(case):
    return lambda u, v: stock(case, (u, v))(u, v)


def compiled(case, inputs):
    compose = stock(case, inputs)
    return keeps(common.compiled(compose), *compose.state)


PROVIDERS = {
    "fastreg": Provider(lambda case, inputs: fastreg.compose, "fastreg"),
    "torch": Provider(stock),
    "compile": Provider(compiled),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_compose(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
