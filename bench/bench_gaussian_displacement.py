"""gaussian_displacement: R2N2's sum of T Gaussian-shaped motions on a 2D grid, gradient to all parameters."""

import math
import sys

import pytest
import torch

import fastreg
from bench import common
from bench.common import Case, Provider, keeps
from fastreg.ops.gaussian_displacement import gaussian_displacement_ref


def case(name, n, t, only=None, batch=1):
    return Case(name, (batch, 2, n, n), (True,), {"t": t}, only)


CASES = [
    case("t25", 256, 25),
    case("t1", 256, 1),
    case("t100", 256, 100, only=("fastreg", "torch", "broadcast")),
    case("t25-n8", 256, 25, batch=8, only=("fastreg", "torch", "broadcast")),
    *[case(f"t25-{n}", n, 25, only=("fastreg",)) for n in (64, 128, 512, 1024)],
]


def make_inputs(case, device, dtype):
    """R2N2's ranges: centres in the image, sigma up to 0.3, a half turn, motions up to 1. Of one sign: the gate
    is relative, and sums that cancel have no fp32 digits left.
    """
    generator = torch.Generator().manual_seed(0)
    params = torch.rand(case.shape[0], case.params["t"], 7, generator=generator)
    low = torch.tensor([-1.0, -1.0, 1e-5, 1e-5, 0.0, 0.0, 0.0])
    high = torch.tensor([1.0, 1.0, 0.3, 0.3, math.pi, 1.0, 1.0])
    return [(low + (high - low) * params).to(device, dtype)]


def output_shape(case):
    return case.shape


def bytes_moved(case, mode):
    """The field, and its gradient, once."""
    return math.prod(case.shape) * case.dtype.itemsize * (2 if mode == "fwd+bwd" else 1)


def axes(case, like):
    h, w = (torch.linspace(-1, 1, n, device=like.device, dtype=like.dtype) for n in case.shape[2:])
    half = torch.tensor([(n - 1) / 2 for n in case.shape[2:]], device=like.device, dtype=like.dtype)
    return h[:, None], w[None], half.view(2, 1, 1)


def stock(case, inputs):
    """One expression per Gaussian, the quadratic form expanded, summed: how a step by step method has it."""
    y, x, half = axes(case, inputs[0])

    def field(params):
        total = 0
        for p in params.unbind(1):
            px, py, sx, sy, alpha, *_ = p[:, :, None, None].unbind(1)
            dx, dy = x - px, y - py
            u, v = 0.5 / sx.square(), 0.5 / sy.square()
            cos, sin = alpha.cos(), alpha.sin()
            a, b, c = cos**2 * u + sin**2 * v, 2 * sin * cos * (u - v), sin**2 * u + cos**2 * v
            weight = torch.exp(-(a * dx * dx + b * dx * dy + c * dy * dy))
            total = total + p[:, [6, 5], None, None] * weight[:, None]
        return total * half

    return keeps(field, y, x, half)


def broadcast(case, inputs):
    """All Gaussians in one expression: T fields at a time, the sum a matrix product."""
    y, x, half = axes(case, inputs[0])

    def field(params):
        px, py, sx, sy, alpha, *_ = params[..., None, None].unbind(2)
        dx, dy = x - px, y - py
        u, v = 0.5 / sx.square(), 0.5 / sy.square()
        cos, sin = alpha.cos(), alpha.sin()
        a, b, c = cos**2 * u + sin**2 * v, 2 * sin * cos * (u - v), sin**2 * u + cos**2 * v
        weight = torch.exp(-((a * dx + b * dy) * dx + c * dy * dy))
        motion = params[:, :, [6, 5]].mT @ weight.flatten(2)
        return motion.view(-1, 2, *weight.shape[2:]) * half

    return keeps(field, y, x, half)


def reference(case):
    return lambda params: gaussian_displacement_ref(params, case.shape[2:], "std")


PROVIDERS = {
    "fastreg": Provider(
        lambda case, inputs: lambda p: fastreg.gaussian_displacement(p, case.shape[2:]), "fastreg"
    ),
    "torch": Provider(stock),
    "compile": Provider(lambda case, inputs: common.compiled(stock(case, inputs))),
    "broadcast": Provider(broadcast),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_gaussian_displacement(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
