"""invert_displacement: v with u(x + v) + v = 0, gradient to u.

Peers stop by tolerances of their own, set here so that they come as near as they do to the residual that is promised: 1e-3 voxels
at the most. The gate is that residual, of the volume that is timed; the verdict that is stored says what each one left.
"""

import functools
import math
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import fastreg
from bench import bench_compose, common
from bench.common import Case, Provider, Verdict

PROMISED = 1e-3
STEPS = 100  # of the fixed point at most; as many of ITK's
CASES = [
    Case("3d", (1, 3, 160, 160, 160), (True,), only=("fastreg", "SimpleITK")),
    Case("3d-small", (1, 3, 96, 96, 96), (True,)),
    *common.sizes(lambda n: (1, 3, n, n, n), (True,), name="3d-{}"),
]


def make_inputs(case, device, dtype):
    """To several voxels, without folds; 0 at the border, beyond which ITK takes u for 0. But where gradients are compared:
    those of v = 0 are two, on either side of a voxel."""
    n, _, *size = case.shape
    u = common.displacement((n, 1, *size), 0, device, torch.float32, amplitude=2.0)
    for k, length in enumerate(size if not case.params else ()):
        x = torch.arange(length, device=device)
        share = (torch.minimum(x, length - 1 - x) / 16).clamp(max=1)
        u = u * share.view([-1 if j == k else 1 for j in range(len(size))])
    return [u.to(dtype)]


def output_shape(case):
    return case.shape


def bytes_moved(case, mode):
    return math.prod(case.shape) * case.dtype.itemsize * (2 if mode == "fwd" else 6)


def stock(case, inputs=None, residual=PROMISED, steps=STEPS, step=bench_compose.stock):
    """v <- -u(x + v) with grid_sample, until the residual is what was promised. Its backward would keep every step."""
    together = functools.cache(lambda **kind: step(case, [torch.empty(0, **kind)] * 2))

    def invert(u):
        v = -u
        for _ in range(steps):
            r = together(device=u.device, dtype=u.dtype)(u, v)
            if r.detach().norm(dim=1).max() < residual:
                return v
            v = v - r
        return v

    return invert


def reference(case):
    return stock(case, residual=1e-10, steps=1000)


def of_itk(invert):
    """SimpleITK's components are in the order x, y, z."""
    import SimpleITK as sitk

    def call(u):
        image = sitk.GetImageFromArray(
            u[0].detach().movedim(0, -1).flip(-1).contiguous().numpy(), isVector=True
        )
        v = torch.from_numpy(sitk.GetArrayFromImage(invert(sitk, image)))
        return v.flip(-1).movedim(-1, 0)[None].to(u)

    return call


def itk_invert(sitk, image):
    return sitk.InvertDisplacementField(
        image,
        maximumNumberOfIterations=STEPS,
        maxErrorToleranceThreshold=PROMISED,
        meanErrorToleranceThreshold=PROMISED / 100,
        enforceBoundaryCondition=False,
    )


def itk_iterative(sitk, image):
    return sitk.IterativeInverseDisplacementField(image, numberOfIterations=STEPS, stopValue=0.9 * PROMISED)


def gate(case, name, device):
    """fastreg: also its gradient, of a small volume, against fp64's through all steps of the fixed point."""
    module, provider = sys.modules[__name__], PROVIDERS[name]
    try:
        (u,) = inputs = make_inputs(case, device, case.dtype)
        v = provider.build(case, inputs)(u)
        residual = fastreg.metrics.inverse_residual(u.double(), v.double())
    except Exception as error:
        return common.failure(error)
    most, mean = residual.max().item(), residual.mean().item()
    ours = provider.package == "fastreg"
    text, ok = f"residual {mean:.1e}, at most {most:.1e}", most <= PROMISED if ours else mean < 0.01
    if ours:
        small = replace(common.shrunk(case, (40, 41, 42)), params={"gradient": True})
        gradient = common._errors(module, small, provider, name, device, False)[1]
        text, ok = f"{text}, gradient {gradient:.1e}", ok and gradient < 1e-3
    return Verdict(ok, text if ok else f"deviates: {text}")


PROVIDERS = {
    "fastreg": Provider(lambda case, inputs: fastreg.invert_displacement, "fastreg"),
    "torch": Provider(stock, slow=True, modes=("fwd",)),
    "compile": Provider(partial(stock, step=bench_compose.compiled), slow=True, modes=("fwd",)),
    "SimpleITK": Provider(lambda *_: of_itk(itk_invert), "SimpleITK", slow=True, modes=("fwd",)),
    "SimpleITK iterative": Provider(lambda *_: of_itk(itk_iterative), "SimpleITK", slow=True, modes=("fwd",)),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_invert_displacement(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
