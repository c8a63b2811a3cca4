"""bending_energy: mean squared second derivatives of a displacement."""

import math
import sys

import pytest

import fastreg
from bench import common
from bench.common import Case, Provider

CASES = [
    Case("3d", (1, 3, 160, 160, 160), (True,)),
    Case("2d", (16, 2, 256, 256), (True,)),
    *common.sizes(lambda n: (1, 3, n, n, n), (True,), name="3d-{}"),
]


def make_inputs(case, device, dtype):
    n, _, *size = case.shape
    return [common.displacement((n, 1, *size), 0, device, dtype)]


def bytes_moved(case, mode):
    return math.prod(case.shape) * case.dtype.itemsize * (3 if mode == "fwd+bwd" else 1)


def stock(case=None, inputs=None):
    """Slices of one tensor; each derivative squared and averaged as it is made."""

    def bending(u):
        nd = u.dim() - 2

        def at(shift):
            steps = [slice(1 + shift.get(k, 0), u.shape[k + 2] - 1 + shift.get(k, 0)) for k in range(nd)]
            return u[(slice(None), slice(None), *steps)]

        here, total = at({}), 0
        for j in range(nd):
            total = total + (at({j: 1}) - 2 * here + at({j: -1})).square().mean()
            for k in range(j + 1, nd):
                mixed = at({j: 1, k: 1}) - at({j: 1, k: -1}) - at({j: -1, k: 1}) + at({j: -1, k: -1})
                total = total + mixed.square().mean() / 8
        return total

    return bending


def monai(case, inputs):
    from monai.losses import BendingEnergyLoss

    common.quiet()
    return BendingEnergyLoss()


PROVIDERS = {
    "fastreg": Provider(lambda case, inputs: fastreg.bending_energy, "fastreg"),
    "torch": Provider(stock),
    "compile": Provider(lambda case, inputs: common.compiled(stock())),
    "monai": Provider(monai, "monai"),
}


def reference(case):
    return stock()


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_bending_energy(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
