"""warp(affine=): image(A [p, 1]), linear. Gradient to the matrix (affine registration) or to both."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

import fastreg
from bench import common
from bench.common import Case, Provider

CASES = [
    Case("matrix", (1, 1, 160, 160, 160), (False, True)),
    Case("both", (1, 1, 160, 160, 160), (True, True)),
    *common.sizes(lambda n: (1, 1, n, n, n), (False, True), name="matrix-{}"),
]


def make_inputs(case, device, dtype):
    n, _, *size = case.shape
    nd = len(size)
    generator = torch.Generator().manual_seed(1)
    matrix = torch.eye(nd, nd + 1) + 0.05 * torch.randn(n, nd, nd + 1, generator=generator)
    return [common.image(case.shape, 0, device, dtype), matrix.to(device, dtype)]


def output_shape(case):
    return case.shape


def bytes_moved(case, mode):
    volume = math.prod(case.shape) * case.dtype.itemsize
    return volume * (2 + (2 + case.grads[0] if mode == "fwd+bwd" else 0))


def stock(case, inputs):
    """affine_grid and grid_sample; the matrix is brought to [-1, 1] coordinates (x, y, z)."""
    size, like = case.shape[2:], inputs[1]
    nd = len(size)
    half = torch.tensor([(s - 1) / 2 for s in size], device=like.device, dtype=like.dtype)
    to_voxels = torch.zeros(nd, nd + 1, device=like.device, dtype=like.dtype)
    to_voxels[:, :nd], to_voxels[:, nd] = torch.diag(half).flip(1), half

    def warp(image, matrix):
        moved = matrix[:, :, :nd] @ to_voxels
        moved[..., nd] += matrix[..., nd] - half
        return F.grid_sample(
            image,
            F.affine_grid((moved / half[:, None]).flip(1), list(image.shape), align_corners=True),
            align_corners=True,
        )

    return warp


def reference(case):
    return lambda image, matrix: stock(case, (image, matrix))(image, matrix)


PROVIDERS = {
    "fastreg": Provider(
        lambda case, inputs: lambda image, matrix: fastreg.warp(image, None, affine=matrix), "fastreg"
    ),
    "torch": Provider(stock),
    "compile": Provider(lambda case, inputs: common.compiled(stock(case, inputs))),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_warp_affine(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
