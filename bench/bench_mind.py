"""mind: MIND-SSC descriptors of an image, which are stored: 12 channels."""

import math
import sys

import pytest

import fastreg
from bench import bench_mind_loss, common
from bench.bench_mind_loss import DEFAULT, N160, descriptors
from bench.common import Case, Provider

CASES = [
    Case("ssc r2 d2", N160, (True,), DEFAULT, only=("fastreg", "torch", "compile", "convexadam")),
    *common.sizes(lambda n: (1, 1, n, n, n), (True,), DEFAULT, "ssc-{}"),
]


def make_inputs(case, device, dtype):
    return [common.image(case.shape, 0, device, dtype)]


def output_shape(case):
    return (case.shape[0], 12, *case.shape[2:])


def bytes_moved(case, mode):
    # The image twice, since the mean of V bounds V; the gradient of 12 channels in the backward.
    volume = math.prod(case.shape) * case.dtype.itemsize
    return volume * (2 + 12) if mode == "fwd" else volume * (2 + 12 + 2 + 12 + 1)


def reference(case):
    return descriptors(case)


def convexadam(case, inputs):
    from convexAdam.convex_adam_utils import MINDSSC

    return lambda image: MINDSSC(image, case.params["radius"], case.params["dilation"], image.device)


PROVIDERS = {
    "fastreg": Provider(lambda case, inputs: lambda image: fastreg.mind(image, **case.params), "fastreg"),
    "torch": Provider(lambda case, inputs: descriptors(case), slow=True),
    "compile": Provider(lambda case, inputs: common.compiled(descriptors(case)), slow=True),
    "convexadam": Provider(convexadam, "convexAdam", slow=True),
}


def gate(case, name, device):
    return bench_mind_loss.gate(case, name, device, globals())


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_mind(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
