"""resize_displacement: a displacement on half the grid brought to the full one and rescaled (`case.shape` is
the result).
"""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

import fastreg
from bench import common
from bench.common import Case, Provider

CASES = [
    Case("x2", (1, 3, 160, 160, 160), (True,)),
    *common.sizes(lambda n: (1, 3, n, n, n), (True,), name="x2-{}"),
]


def make_inputs(case, device, dtype):
    n, _, *size = case.shape
    return [common.displacement((n, 1, *(s // 2 for s in size)), 0, device, dtype)]


def output_shape(case):
    return case.shape


def bytes_moved(case, mode):
    size = case.shape[2:]
    both = (
        math.prod(case.shape[:2]) * (math.prod(size) + math.prod(s // 2 for s in size)) * case.dtype.itemsize
    )
    return both * (2 if mode == "fwd+bwd" else 1)


def stock(case, inputs, factor=None):
    size = case.shape[2:]
    old = inputs[0].shape[2:]
    factors = [factor or (o - 1) / (i - 1) for o, i in zip(size, old, strict=True)]
    scale = torch.tensor(factors, device=inputs[0].device, dtype=inputs[0].dtype).view(-1, *[1] * len(size))
    mode = "trilinear" if len(size) == 3 else "bilinear"
    # Scaled while it is still small.
    return lambda u: F.interpolate(u * scale, size=size, mode=mode, align_corners=True)


def reference(case, factor=None):
    return lambda u: stock(case, (u,), factor)(u)


def voxelmorph(case, inputs):
    from voxelmorph.nn.modules import ResizeDisplacementField

    return ResizeDisplacementField(scale_factor=2.0)


PROVIDERS = {
    "fastreg": Provider(
        lambda case, inputs: lambda u: fastreg.resize_displacement(u, case.shape[2:]), "fastreg"
    ),
    "torch": Provider(stock),
    "compile": Provider(lambda case, inputs: common.compiled(stock(case, inputs))),
    # Multiplies by the factor of the sizes, not by that of the voxel distances.
    "voxelmorph": Provider(voxelmorph, "voxelmorph", reference=lambda case: reference(case, 2.0)),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_resize_displacement(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
