"""warp: image(p + u(p)), linear. Gradient to the displacement (as in pairwise registration) or to both (as in
networks).
"""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

import fastreg
from bench import common
from bench.common import Case, Provider, keeps

N160 = (1, 1, 160, 160, 160)
CASES = [
    Case("u", N160, (False, True)),
    Case("both", N160, (True, True)),
    Case("both-c16", (1, 16, 96, 96, 96), (True, True), only=("fastreg", "torch", "voxelmorph")),
    *common.sizes(lambda n: (1, 1, n, n, n), (False, True), name="u-{}"),
    *common.sizes(lambda n: (1, 1, n, n, n), (True, True), name="both-{}"),
    Case("both-c1 256", (1, 1, 256, 256, 256), (True, True), on=("cuda",)),
    Case("both-c32 128", (1, 32, 128, 128, 128), (True, True), on=("cuda",)),
]


def make_inputs(case, device, dtype):
    return [common.image(case.shape, 0, device, dtype), common.displacement(case.shape, 1, device, dtype)]


def output_shape(case):
    return case.shape


def bytes_moved(case, mode):
    n, c = case.shape[:2]
    volume = n * math.prod(case.shape[2:]) * case.dtype.itemsize
    nd = len(case.shape) - 2
    forward = c + nd + c
    backward = c + nd + (c + nd if case.grads[1] else 0) + (c if case.grads[0] else 0)
    return volume * (forward + (backward if mode == "fwd+bwd" else 0))


def identity(shape, device, dtype):
    axes = [torch.linspace(-1, 1, s, device=device, dtype=dtype) for s in shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)[None]


def scale(shape, device, dtype):
    return torch.tensor([2 / (s - 1) for s in shape[2:]][::-1], device=device, dtype=dtype)


def stock(case, inputs):
    """The identity grid is built once; a call scales the displacement, adds and samples."""
    grid, factor = (f(case.shape, inputs[1].device, inputs[1].dtype) for f in (identity, scale))

    def warp(image, u):
        return F.grid_sample(
            image, torch.addcmul(grid, u.movedim(1, -1).flip(-1), factor), align_corners=True
        )

    return keeps(warp, grid)


def reference(case):
    return lambda image, u: stock(case, (image, u))(image, u)


def compiled(case, inputs):
    warp = stock(case, inputs)
    return keeps(common.compiled(warp), *warp.state)


def sampling_positions(case, inputs):
    image, u = inputs
    factor = scale(case.shape, u.device, u.dtype)
    grid = identity(case.shape, u.device, u.dtype) + u.detach().movedim(1, -1).flip(-1) * factor
    return [image, grid.requires_grad_(u.requires_grad)]


def to_displacement_gradient(case, grads):
    *image, grid = grads
    return [*image, (grid * scale(case.shape, grid.device, grid.dtype)).flip(-1).movedim(-1, 1)]


def voxelmorph(case, inputs):
    from voxelmorph.nn.modules import SpatialTransformer

    return SpatialTransformer()


def monai(case, inputs):
    from monai.networks.blocks import Warp

    return Warp(padding_mode="zeros")


PROVIDERS = {
    "fastreg": Provider(lambda case, inputs: fastreg.warp, "fastreg"),
    "torch": Provider(stock),
    "compile": Provider(compiled),
    # A bound for whoever keeps sampling positions instead of displacements: nothing but the sampling.
    "grid_sample, positions given": Provider(
        lambda case, inputs: lambda image, grid: F.grid_sample(image, grid, align_corners=True),
        prepare=sampling_positions,
        restore=to_displacement_gradient,
    ),
    "voxelmorph": Provider(voxelmorph, "voxelmorph"),
    "monai": Provider(monai, "monai"),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_warp(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
