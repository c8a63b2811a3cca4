"""mse_loss: mean squared difference, plain and weighted by a mask; gradient to the moved image."""

import math
import sys

import pytest
import torch.nn.functional as F

import fastreg
from bench import common
from bench.common import Case, Provider

N160 = (1, 1, 160, 160, 160)
CASES = [
    Case("plain", N160, (False, True)),
    Case("mask", N160, (False, True, False), {"mask": True}),
    *common.sizes(lambda n: (1, 1, n, n, n), (False, True), name="plain-{}"),
]


def make_inputs(case, device, dtype):
    inputs = [common.image(case.shape, seed, device, dtype) for seed in (0, 1)]
    if case.params.get("mask"):
        inputs.append((common.image(case.shape, 2, device, dtype) > 0.5).to(dtype))
    return inputs


def bytes_moved(case, mode):
    read = 3 if case.params.get("mask") else 2
    return (
        math.prod(case.shape) * case.dtype.itemsize * (read if mode == "fwd" else 2 * read + sum(case.grads))
    )


def stock(case, inputs=None):
    if case.params.get("mask"):
        return lambda fixed, moved, mask: (mask * (fixed - moved).square()).sum() / mask.sum()
    return lambda fixed, moved: F.mse_loss(moved, fixed)


def reference(case):
    return stock(case)


def ours(case, inputs):
    if case.params.get("mask"):
        return lambda fixed, moved, mask: fastreg.mse_loss(fixed, moved, mask=mask)
    return fastreg.mse_loss


PROVIDERS = {
    "fastreg": Provider(ours, "fastreg"),
    "torch": Provider(stock),
    "compile": Provider(lambda case, inputs: common.compiled(stock(case))),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_mse_loss(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
