"""affine_displacement: A [p, 1] - p, gradient to the matrix (`case.shape` is the result)."""

import math
import sys

import pytest
import torch

import fastreg
from bench import common
from bench.common import Case, Provider, keeps

CASES = [
    Case("matrix", (1, 3, 160, 160, 160), (True,)),
    *common.sizes(lambda n: (1, 3, n, n, n), (True,), name="matrix-{}"),
]


def make_inputs(case, device, dtype):
    n, nd = case.shape[:2]
    generator = torch.Generator().manual_seed(1)
    matrix = torch.eye(nd, nd + 1) + 0.05 * torch.randn(n, nd, nd + 1, generator=generator)
    return [matrix.to(device, dtype)]


def output_shape(case):
    return case.shape


def bytes_moved(case, mode):
    return math.prod(case.shape) * case.dtype.itemsize * (2 if mode == "fwd+bwd" else 1)


def stock(case, inputs):
    """One product with the positions, which are built once."""
    nd, size = case.shape[1], case.shape[2:]
    axes = [torch.arange(s, device=inputs[0].device, dtype=inputs[0].dtype) for s in size]
    points = torch.stack([*torch.meshgrid(*axes, indexing="ij"), torch.ones(size).to(axes[0])]).flatten(1)
    identity = torch.eye(nd, nd + 1).to(points)
    return keeps(lambda matrix: ((matrix - identity) @ points).unflatten(2, size), points)


def reference(case):
    return lambda matrix: stock(case, (matrix,))(matrix)


PROVIDERS = {
    "fastreg": Provider(
        lambda case, inputs: lambda matrix: fastreg.affine_displacement(matrix, case.shape[2:]), "fastreg"
    ),
    "torch": Provider(stock),
    "compile": Provider(
        lambda case, inputs: (lambda f: keeps(common.compiled(f), *f.state))(stock(case, inputs))
    ),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_affine_displacement(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
