"""cost_volume: what each cell of a fixed image costs at each offset, as a discrete search at two to four millimetres asks for it."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import fastreg
from bench import common
from bench.common import Case, Provider

# A body at 4 and at 2 mm in twelve features (mind, ssc): cells of 16, 12, 10 and 8 mm; 24, 12, 6 and 4 mm around.
COARSE, FINE = (1, 12, 96, 96, 96), (1, 12, 96, 160, 160)
SEARCH = {"cell": 4, "radius": 2, "stride": 2}
EAGER = ("fastreg", "torch")
CASES = [
    Case("16mm", COARSE, (True, True), {"cell": 4, "radius": 6, "stride": 2}, EAGER),
    Case("12mm", COARSE, (True, True), {"cell": 3, "radius": 3, "stride": 1}, EAGER),
    Case("10mm", FINE, (True, True), {"cell": 5, "radius": 3, "stride": 2}, EAGER),
    Case("8mm", FINE, (True, True), SEARCH, EAGER),
    # Compiling a hundred differences takes minutes: torch.compile has the smallest radius only.
    Case("r1", (1, 12, 48, 48, 48), (True, True), SEARCH | {"radius": 1}),
    *common.sizes(lambda n: (1, 12, n, n, n), (True, True), SEARCH)[:3],
]


def make_inputs(case, device, dtype):
    return [common.image(case.shape, seed, device, dtype) for seed in (0, 1)]


def cells(case):
    return [-(-n // case.params["cell"]) for n in case.shape[2:]]


def offsets(case):
    return (2 * case.params["radius"] + 1) ** (len(case.shape) - 2)


def output_shape(case):
    return (case.shape[0], *cells(case), offsets(case))


def bytes_moved(case, mode):
    """Both images and the costs. (Arithmetic is what takes the time: a subtraction and a multiply-add a sample and offset.)"""
    images, costs = 2 * math.prod(case.shape), math.prod(output_shape(case))
    moved = images + costs + (2 * images + costs if mode == "fwd+bwd" else 0)
    return moved * case.dtype.itemsize


def ours(case, inputs):
    return lambda fixed, moving: fastreg.cost_volume(fixed, moving, **case.params)


def shifted_differences(case, inputs=None):
    """A difference and a mean over the cells per offset. Samples are every stride-th voxel of a cell that is whole."""
    cell, radius, stride = (case.params[k] for k in ("cell", "radius", "stride"))
    nd = len(case.shape) - 2
    pool = F.avg_pool3d if nd == 3 else F.avg_pool2d

    def sampled(x):
        """(N, samples of a cell x C, *cells), zeros and how many there are where a cell is not whole."""
        pad = [p for n in reversed(x.shape[2:]) for p in (0, -n % cell)]
        x, parts = F.pad(x, pad), []
        for where in itertools.product(range(0, cell, stride), repeat=nd):
            parts.append(x[(..., *(slice(w, None, cell) for w in where))])
        return torch.stack(parts, 1)

    def costs(fixed, moving):
        padded = F.pad(moving, [radius] * 2 * nd, mode="replicate")
        count = sampled(torch.ones_like(fixed[:1, :1])).sum(1)
        out = []
        for offset in itertools.product(range(2 * radius + 1), repeat=nd):
            window = tuple(slice(o, o + n) for o, n in zip(offset, fixed.shape[2:], strict=True))
            squares = (fixed - padded[(..., *window)]).square().mean(1, keepdim=True)
            if stride == 1 and not any(n % cell for n in fixed.shape[2:]):
                out.append(pool(squares, cell))
            else:
                out.append(sampled(squares).sum(1) / count)
        return torch.cat(out, 1).movedim(1, -1)

    return costs


def reference(case):
    return shifted_differences(case)


PROVIDERS = {
    "fastreg": Provider(ours, "fastreg"),
    "torch": Provider(shifted_differences, slow=True),
    "compile": Provider(lambda case, inputs: common.compiled(shifted_differences(case)), slow=True),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_cost_volume(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
