"""bspline_displacement: cubic B-spline field of a 3D control grid, gradient to the coefficients."""

import math
import sys

import pytest
import torch

import fastreg
from bench import common
from bench.common import Case, Provider, keeps
from fastreg.ops.bspline_displacement import basis, control_shape

N160 = (1, 3, 160, 160, 160)


def case(name, spacing, order=3, shape=N160, only=None):
    return Case(name, shape, (True,), {"spacing": spacing, "order": order}, only)


CASES = [
    case("s4", 4),
    case("s8", 8),
    case("s4-order1", 4, 1, only=("fastreg", "torch")),
    case("s2", 2, only=("fastreg", "torch")),
    case("s16", 16, only=("fastreg", "torch")),
    *common.sizes(lambda n: (1, 3, n, n, n), (True,), {"spacing": 4, "order": 3}, "s4-{}"),
]


def make_inputs(case, device, dtype):
    n, _, *size = case.shape
    control = control_shape(size, case.params["spacing"], case.params["order"])
    return [common.displacement((n, 1, *control), 0, device, dtype)]


def output_shape(case):
    return case.shape


def bytes_moved(case, mode):
    """The field, and its gradient, once."""
    return math.prod(case.shape) * case.dtype.itemsize * (2 if mode == "fwd+bwd" else 1)


def stock(case, inputs):
    """A matrix of basis values per axis: the fastest of the stock forms that were tried (products with
    matrices; transposed convolution with the kernel, whole or per axis).
    """
    u, size = inputs[0], case.shape[2:]
    spacing, order = case.params["spacing"], case.params["order"]
    matrices = []
    for n, control in zip(size, u.shape[2:], strict=True):
        voxel = torch.arange(n)
        weights = torch.stack(basis((voxel % spacing).double() / spacing, order), 1)
        matrix = torch.zeros(n, control, dtype=torch.double)
        matrix.scatter_(1, (voxel // spacing)[:, None] + torch.arange(order + 1), weights)
        matrices.append(matrix.to(u))

    def field(u):
        z, y, x = matrices
        u = u @ x.T  # (N, 3, cz, cy, W)
        u = y @ u  # (N, 3, cz, H, W)
        return (z @ u.flatten(3)).unflatten(3, u.shape[3:])

    return keeps(field, *matrices)


def reference(case):
    return lambda u: stock(case, (u,))(u)


def transposed_convolution(case, inputs):
    """One transposed convolution per axis, stride the spacing, kernel the sampled spline, then cropped."""
    u, size, nd = inputs[0], case.shape[2:], len(case.shape) - 2
    spacing, order = case.params["spacing"], case.params["order"]
    f = torch.arange(spacing, dtype=torch.double) / spacing
    # The spline from its first voxel on: in piece j it is the weight of control point i + order - j.
    line = torch.cat(list(reversed(basis(f, order)))).to(u)
    kernels = [line.view(1, 1, *[-1 if j == k else 1 for j in range(nd)]) for k in range(nd)]

    def field(u):
        shape = u.shape
        u = u.flatten(0, 1).unsqueeze(1)
        for k, kernel in reversed(list(enumerate(kernels))):
            stride = [spacing if j == k else 1 for j in range(nd)]
            u = torch.nn.functional.conv_transpose3d(u, kernel, stride=stride)
            u = u.narrow(k + 2, order * spacing, size[k])
        return u.reshape(*shape[:2], *size)

    return keeps(field, *kernels)


PROVIDERS = {
    "fastreg": Provider(
        lambda case, inputs: (
            lambda c: fastreg.bspline_displacement(
                c, case.params["spacing"], case.shape[2:], case.params["order"]
            )
        ),
        "fastreg",
    ),
    "torch": Provider(stock),
    "compile": Provider(lambda case, inputs: common.compiled(stock(case, inputs))),
    "conv_transpose": Provider(transposed_convolution),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_bspline_displacement(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
