"""local_correlation: the cost volume of two feature maps, plain, or warped and normalised as in RRN."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import fastreg
from bench import common
from bench.bench_warp import stock as grid_sample
from bench.common import Case, Provider, keeps

PLAIN = {"radius": 2, "displaced": False, "normalize": False}
FULL = {"radius": 2, "displaced": True, "normalize": True}


def cube(channels, n):
    return (1, channels, n, n, n)


# Compiling 125 products and their gradients takes minutes: torch.compile has the smallest radius only.
EAGER = ("fastreg", "torch")
CASES = [
    Case("c16-96", cube(16, 96), (True, True), PLAIN, EAGER),
    Case("c32-80", cube(32, 80), (True, True), PLAIN, EAGER),
    Case("full-c16-96", cube(16, 96), (True, True, True), FULL, EAGER),
    Case("full-c32-80", cube(32, 80), (True, True, True), FULL, EAGER),
    Case("r1", cube(16, 48), (True, True), PLAIN | {"radius": 1}, (*EAGER, "compile")),
    *[Case(f"r{r}", cube(16, 48), (True, True), PLAIN | {"radius": r}, EAGER) for r in (2, 3, 4)],
    *[Case(f"c{c}", cube(c, 48), (True, True), PLAIN, ("fastreg",)) for c in (4, 8, 16, 32, 64)],
    *[Case(f"{n}", cube(16, n), (True, True), PLAIN, ("fastreg",)) for n in (32, 48, 64, 96, 128)],
    *[
        Case(f"{kind}c{c} {n}", cube(c, n), grads, params, (*EAGER, "one thread per output"), on=("cuda",))
        for c, n in ((32, 64), (16, 128))
        for kind, grads, params in (("", (True, True), PLAIN), ("full-", (True, True, True), FULL))
    ],
    *[Case(f"full-{n}", cube(16, n), (True, True, True), FULL, ("fastreg",)) for n in (32, 48, 64, 96, 128)],
]


def make_inputs(case, device, dtype):
    maps = [common.image(case.shape, seed, device, dtype) for seed in (0, 1)]
    return maps + ([common.displacement(case.shape, 2, device, dtype)] if case.params["displaced"] else [])


def offsets(case):
    return (2 * case.params["radius"] + 1) ** (len(case.shape) - 2)


def output_shape(case):
    return (case.shape[0], offsets(case), *case.shape[2:])


def bytes_moved(case, mode):
    n, c, *size = case.shape
    inputs = 2 * c + (len(size) if case.params["displaced"] else 0)
    volumes = inputs + offsets(case) + (2 * inputs + offsets(case) if mode == "fwd+bwd" else 0)
    return n * math.prod(size) * case.dtype.itemsize * volumes


def ours(case, inputs):
    params = case.params

    def correlate(fixed, moving, u=None):
        return fastreg.local_correlation(
            fixed, moving, params["radius"], displacement=u, normalize=params["normalize"]
        )

    return correlate


def shifted_products(case, inputs, products=None):
    """One product and mean over channels per offset, as in RRN's compute_cost_volume; or `products` for that part."""
    params, nd = case.params, len(case.shape) - 2
    sample = grid_sample(case, (inputs[1], inputs[2])) if params["displaced"] else None
    radius = params["radius"]

    def correlate(fixed, moving, u=None):
        if u is not None:
            moving = sample(moving, u)
        if params["normalize"]:
            dims = tuple(range(1, fixed.dim()))
            mu = (fixed.mean(dims, keepdim=True) + moving.mean(dims, keepdim=True)) / 2
            sigma = (fixed.std(dims, keepdim=True) + moving.std(dims, keepdim=True)) / 2 + 1e-6
            fixed, moving = (fixed - mu) / sigma, (moving - mu) / sigma
        if products is not None:
            return products(fixed, moving)
        padded = F.pad(moving, [radius] * 2 * nd)
        costs = []
        for offset in itertools.product(range(2 * radius + 1), repeat=nd):
            window = tuple(slice(o, o + n) for o, n in zip(offset, fixed.shape[2:], strict=True))
            costs.append((fixed * padded[(..., *window)]).mean(1, keepdim=True))
        return torch.cat(costs, 1)

    return keeps(correlate, *(sample.state if sample else ()))


def reference(case):
    return lambda *inputs: shifted_products(case, inputs)(*inputs)


def one_thread_per_output(case, inputs):
    """The form of the CUDA extensions that there are: no shared memory, every product read from memory."""
    from bench.naive_correlation import correlate

    return shifted_products(case, inputs, lambda f, m: correlate(f, m, case.params["radius"]))


PROVIDERS = {
    "fastreg": Provider(ours, "fastreg"),
    "torch": Provider(shifted_products, slow=True),
    "compile": Provider(lambda case, inputs: common.compiled(shifted_products(case, inputs)), slow=True),
    "one thread per output": Provider(one_thread_per_output),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_local_correlation(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
