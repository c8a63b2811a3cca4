"""jacobian_determinant: determinant of the Jacobian of x + u, central differences inside, one-sided at the
faces.
"""

import math
import sys

import pytest
import torch

import fastreg
from bench import common
from bench.common import Case, Provider

CASES = [
    Case("3d", (1, 3, 160, 160, 160), (True,)),
    *common.sizes(lambda n: (1, 3, n, n, n), (True,), name="3d-{}"),
]


def make_inputs(case, device, dtype):
    n, _, *size = case.shape
    return [common.displacement((n, 1, *size), 0, device, dtype)]


def output_shape(case):
    return (case.shape[0], 1, *case.shape[2:])


def bytes_moved(case, mode):
    volume = case.shape[0] * math.prod(case.shape[2:]) * case.dtype.itemsize
    nd = case.shape[1]
    return volume * (nd + 1 + (1 + nd + nd if mode == "fwd+bwd" else 0))


def stock(case=None, inputs=None):
    """Differences by torch.gradient, the determinant written out: torch.det of a matrix per voxel is far
    slower.
    """

    def determinant(u):
        nd = u.shape[1]
        columns = torch.gradient(u, dim=list(range(2, u.dim())))
        j = [[columns[b][:, a : a + 1] + (1 if a == b else 0) for b in range(nd)] for a in range(nd)]
        if nd == 2:
            return j[0][0] * j[1][1] - j[0][1] * j[1][0]
        return (
            j[0][0] * (j[1][1] * j[2][2] - j[1][2] * j[2][1])
            - j[0][1] * (j[1][0] * j[2][2] - j[1][2] * j[2][0])
            + j[0][2] * (j[1][0] * j[2][1] - j[1][1] * j[2][0])
        )

    return determinant


def reference(case):
    return stock()


def voxelmorph(case, inputs):
    from voxelmorph.py.utils import jacobian_determinant

    def determinant(u):
        return torch.from_numpy(jacobian_determinant(u[0].movedim(0, -1).cpu().numpy()))[None, None].to(u)

    return determinant


PROVIDERS = {
    "fastreg": Provider(lambda case, inputs: fastreg.jacobian_determinant, "fastreg"),
    "torch": Provider(stock),
    "compile": Provider(lambda case, inputs: common.compiled(stock())),
    # NumPy, without gradient.
    "voxelmorph": Provider(voxelmorph, "voxelmorph", modes=("fwd",)),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_jacobian_determinant(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
