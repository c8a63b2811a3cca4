"""A whole iteration of `fastreg.register` at its finest level: smoothing, warp by a coarser grid, LCC, diffusion,
backward, Adam.

Every provider runs the objective of fastreg/_descent.py itself; only the ops in it differ. The gate runs
the loop and wants the loss of the same loop in fp64 on stock ops, within 1 %.
"""

import functools
import inspect
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from bench import bench_diffusion, bench_lcc_loss, bench_smooth, bench_warp, common
from bench.common import ITERATION, Case, Provider, keeps
from fastreg import _adaptive, _descent, _similarity, registration

DEFAULTS = {n: p.default for n, p in inspect.signature(registration.register).parameters.items()}
SPACING = 1.0
GATE_ITERATIONS = 10
MODES = (ITERATION,)
CASES = [
    Case("iteration", (1, 1, 160, 160, 160), (False, False)),
    *common.sizes(lambda n: (1, 1, n, n, n), (False, False), name="iteration-{}"),
]


def make_inputs(case, device, dtype):
    """A pair that a displacement of a few voxels relates, but for noise."""
    fixed = common.image(case.shape, 0, "cpu", torch.float32)
    u = common.displacement(case.shape, 1, "cpu", torch.float32, amplitude=2.0)
    moving = bench_warp.reference(case)(fixed, u) + 0.05 * common.image(case.shape, 2, "cpu", torch.float32)
    return [t.to(device, dtype) for t in (fixed, moving)]


def bytes_moved(case, mode):
    """Each op reads its inputs and writes its results once; Adam reads four and writes three tensors."""
    nd = len(case.shape) - 2
    volume = math.prod(case.shape) * case.dtype.itemsize
    control = nd * math.prod(_control(case)) / math.prod(case.shape[2:])
    forward = 2 * control + (1 + control + 1) + 2 + control
    backward = 3 + (1 + 1 + 2 * control) + 2 * control + 2 * control
    return volume * (forward + backward + 7 * control)


def _control(case):
    return _descent.grid_shape(case.shape[2:], (SPACING,) * (len(case.shape) - 2))


def level_of(case, inputs):
    """The finest level as `register` sets it up with its defaults, starting from a coarser one's result."""
    size = tuple(case.shape[2:])
    # Not zero: at integer positions the gradient of a linear interpolation is one-sided, and which side a
    # stock sampler takes hangs on its rounding.
    base = common.displacement((1, 1, *_control(case)), 3, inputs[0].device, torch.float32, amplitude=0.5)
    images, spacing = (*inputs, None, None), (SPACING,) * len(size)
    start = base.to(inputs[0].dtype)
    # LCC is what "auto" takes of images of one kind; the weight changes no work
    window = _similarity.window_of(len(size), finest=True)
    taken = {**DEFAULTS, "similarity": "lcc", "window": window, "regularization": _adaptive.OTHER}
    options = (taken[n] for n in ("transform", "smoothing", "similarity", "window", "regularization"))
    return registration._level(images, size, spacing, start, *options)


class Stock:
    """The ops of an iteration in their best stock form, for one level; what can be made once is."""

    def __init__(self, level):
        self.size = tuple(level.similarity.fixed.shape[2:])
        self.like = {"device": level.similarity.fixed.device, "dtype": level.similarity.fixed.dtype}
        control, nd = tuple(level.transform.base.shape[2:]), len(self.size)
        whole = (1, 1, *self.size)
        self.grid = bench_warp.identity(whole, **self.like)
        self.factor = bench_warp.scale(whole, **self.like)
        self.sums = bench_lcc_loss.box(level.similarity.window, nd)
        self.counts = self.sums(torch.ones(whole, **self.like))
        ratio = [(o - 1) / (i - 1) for o, i in zip(self.size, control, strict=True)]
        self.ratio = torch.tensor(ratio, **self.like).view(-1, *[1] * nd)
        self.spacing = level.transform.spacing
        self.mm = torch.tensor(level.transform.spacing, **self.like).view(-1, *[1] * nd)
        self.convolve = F.conv3d if nd == 3 else F.conv2d
        self.kernels = []
        for axis, sigma in enumerate(level.transform.sigma):
            weights = bench_smooth.gaussian(sigma, **self.like)
            line = (weights / weights.sum()).view(1, 1, *[-1 if j == axis else 1 for j in range(nd)])
            pad = [len(weights) // 2 if j // 2 == nd - 1 - axis else 0 for j in range(2 * nd)]
            self.kernels.append((line.expand(nd, *line.shape[1:]).contiguous(), pad))

    def kept(self):
        return self.grid, self.counts

    def warp(self, image, u, *, padding):
        positions = torch.addcmul(self.grid, u.movedim(1, -1).flip(-1), self.factor)
        return F.grid_sample(image, positions, padding_mode=padding, align_corners=True)

    def warp_coarse(self, image, u, *, padding):
        return self.warp(image, self.resize_displacement(u, self.size), padding=padding)

    def lcc_loss(self, fixed, moved, window, *, mask, padding, smooth_dr, denominator):
        """Separable box sums of the five moments and the number of samples inside each window."""
        assert mask is None
        assert padding == "valid"
        return bench_lcc_loss.correlation(self.sums, self.counts, denominator, smooth_dr)(fixed, moved)

    def smooth(self, u, sigma):
        for kernel, pad in self.kernels:
            u = self.convolve(F.pad(u, pad, mode="replicate"), kernel, groups=u.shape[1])
        return u

    def resize_displacement(self, u, size):
        mode = "trilinear" if len(self.size) == 3 else "bilinear"
        return F.interpolate(u * self.ratio, size=self.size, mode=mode, align_corners=True)

    def diffusion(self, u, *, spacing):
        """Component i in units of s_i, derivative along j divided by s_j."""
        if len(set(self.spacing)) == 1:
            return bench_diffusion.stock()(u)
        mm = u * self.mm
        return sum((mm.diff(dim=2 + k) / s).square().mean() for k, s in enumerate(spacing)) / len(spacing)


def provider(stock, compile=False):
    def build(case, inputs):
        level = level_of(case, inputs)
        ops = (Stock(level),) if stock else ()
        if compile:
            # The objective computes a constant between warp and LCC in a way that ends a graph: two graphs.
            level.objective = common.compiled(level.objective, fullgraph=False)
        parameter = level.transform.parameter()
        optimizer = _descent.optimizer(parameter, DEFAULTS["learning_rate"])
        return keeps(
            lambda: float(level.iterate(parameter, optimizer, *ops)[0]), *(ops[0].kept() if stock else ())
        )

    return build


PROVIDERS = {
    "fastreg": Provider(provider(stock=False), "fastreg", modes=MODES),
    "torch": Provider(provider(stock=True), modes=MODES),
    "compile": Provider(provider(stock=True, compile=True), modes=MODES),
}


@functools.lru_cache(maxsize=4)
def _truth(shape, device):
    case = Case("truth", shape, (False, False))
    step = provider(stock=True)(case, [t.double() for t in make_inputs(case, device, torch.float32)])
    return [step() for _ in range(GATE_ITERATIONS)]


def gate(case, name, device):
    """Loss after some iterations against the same loop on stock ops in fp64; fastreg also at the size that is
    timed.
    """
    chosen = PROVIDERS[name]
    texts, ok = [], True
    for small in common.gated(case, chosen.package == "fastreg", device):
        step = chosen.build(small, make_inputs(small, device, torch.float32))
        try:
            losses = [step() for _ in range(GATE_ITERATIONS)]
        except Exception as error:
            return common.failure(error)
        truth = _truth(small.shape, device)
        texts.append(f"loss {losses[-1]:.5f}, stock in fp64 {truth[-1]:.5f}")
        # A loop that does not descend would agree about nothing.
        ok &= abs(losses[-1] - truth[-1]) <= 0.01 * abs(truth[-1]) and truth[-1] < truth[0]
    text = f"after {GATE_ITERATIONS} iterations: {texts[-1]}"
    return common.Verdict(bool(ok), text if ok else f"deviates: {text}")


@pytest.mark.parametrize(("case", "mode", "provider"), common.combinations(globals()))
def test_register(benchmark, case, mode, provider):
    common.run_benchmark(benchmark, sys.modules[__name__], case, mode, provider)
