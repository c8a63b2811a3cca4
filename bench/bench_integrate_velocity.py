"""integrate_velocity: scaling and squaring of a stationary velocity field, gradient to the velocity."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

import fastreg
from bench import common
from bench.bench_warp import identity, scale
from bench.common import Case, Provider, keeps

STEPS = 7
kinks = 2e-5  # of the steps' fields a few positions in a million lie on faces of cells, and a gradient passes through many
CASES = [
    Case("steps-7", (1, 3, 160, 160, 160), (True,)),
    Case("2d", (4, 2, 512, 512), (True,)),
    *[Case(f"steps-{s}", (1, 3, 96, 96, 96), (True,), {"steps": s}, ("fastreg", "checkpoint")) for s in (3, 5, 10)],
    *common.sizes(lambda n: (1, 3, n, n, n), (True,), name="steps-7-{}"),
    Case("steps-7 256", (1, 3, 256, 256, 256), (True,), on=("cuda",)),
]  # fmt: skip


def steps(case):
    return case.params.get("steps", STEPS)


def make_inputs(case, device, dtype):
    return [common.displacement((case.shape[0], 1, *case.shape[2:]), 1, device, dtype)]


def output_shape(case):
    return case.shape


def bytes_moved(case, mode):
    """A step reads a field and writes one; a step back reads the field and a gradient and writes one."""
    field = math.prod(case.shape) * case.dtype.itemsize
    return field * steps(case) * (2 + (3 if mode == "fwd+bwd" else 0))


def stock(case, inputs, padding="border"):
    """The identity grid is built once; a step scales the displacement, adds, samples and adds."""
    grid, factor = (f(case.shape, inputs[0].device, inputs[0].dtype) for f in (identity, scale))

    def integrate(v):
        u = v / 2 ** steps(case)
        for _ in range(steps(case)):
            positions = torch.addcmul(grid, u.movedim(1, -1).flip(-1), factor)
            u = u + F.grid_sample(u, positions, padding_mode=padding, align_corners=True)
        return u

    return keeps(integrate, grid)


def reference(case, padding="border"):
    return lambda v: stock(case, (v,), padding)(v)


def compiled(case, inputs):
    integrate = stock(case, inputs)
    return keeps(common.compiled(integrate), *integrate.state)


def fused(checkpoint):
    return lambda case, inputs: lambda v: fastreg.integrate_velocity(v, steps(case), checkpoint=checkpoint)


def voxelmorph(case, inputs):
    from voxelmorph.nn.modules import IntegrateVelocityField

    return IntegrateVelocityField(steps=steps(case))


PROVIDERS = {
    "fastreg": Provider(fused(False), "fastreg"),
    "checkpoint": Provider(fused(True), "fastreg"),
    "torch": Provider(stock),
    "compile": Provider(compiled),
    # Zeros outside.
    "voxelmorph": Provider(voxelmorph, "voxelmorph", reference=lambda case: reference(case, "zeros")),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_integrate_velocity(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
