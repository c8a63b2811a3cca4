"""warp_coarse: image(p + u(p)), u on half the grid. Gradient to the displacement, as in pairwise registration."""

import math
import sys

import pytest

import fastreg
from bench import bench_resize_displacement, bench_warp, common
from bench.common import Case, Provider, keeps

CASES = [
    Case("u", (1, 1, 160, 160, 160), (False, True)),
    *common.sizes(lambda n: (1, 1, n, n, n), (False, True), name="u-{}"),
]

# The displacement is interpolated in fp32, as the two ops do: where rounding moves a position a dark voxel beside a bright one shows it,
# and a few positions in a million change their cell, which some 60 of them share on the coarse grid.
least, kinks = 1e-2, 1e-4


def make_inputs(case, device, dtype):
    image = common.image(case.shape, 0, device, dtype)
    grid = [s // 2 for s in case.shape[2:]]
    # A few voxels of the image.
    u = common.displacement((case.shape[0], 1, *grid), 1, device, dtype, amplitude=1.5)
    return [image, u]


def output_shape(case):
    return case.shape


def bytes_moved(case, mode):
    n, c, *size = case.shape
    image = n * c * math.prod(size) * case.dtype.itemsize
    grid = n * len(size) * math.prod(s // 2 for s in size) * case.dtype.itemsize
    return 2 * image + grid + (2 * image + 2 * grid if mode == "fwd+bwd" else 0)


def stock(case, inputs):
    """The displacement is brought to the image's grid, then sampled with."""
    fine = (case.shape[0], inputs[1].shape[1], *case.shape[2:])
    resize = bench_resize_displacement.stock(common.Case("fine", fine, (True,)), inputs[1:])
    warp = bench_warp.stock(case, inputs)
    return keeps(lambda image, u: warp(image, resize(u)), *warp.state)


def reference(case):
    return lambda image, u: stock(case, (image, u))(image, u)


def compiled(case, inputs):
    function = stock(case, inputs)
    return keeps(common.compiled(function), *function.state)


def two_ops(case, inputs):
    return lambda image, u: fastreg.warp(image, fastreg.resize_displacement(u, image.shape[2:]))


PROVIDERS = {
    "fastreg": Provider(lambda case, inputs: fastreg.warp_coarse, "fastreg"),
    "fastreg, two ops": Provider(two_ops, "fastreg"),
    "torch": Provider(stock),
    "compile": Provider(compiled),
}


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_warp_coarse(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
