"""Every op on inputs that nobody would think of, against its fp64 reference: values and every gradient. .ci/fuzz runs it.

A case is a seed and a number: `.ci/fuzz --seed S --case K` makes it again and prints it.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from common import TOLERANCE, layouts
from torch.utils._python_dispatch import TorchDispatchMode

import fastreg
from fastreg import _ext

SIZES = (1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
VALUES = (
    "uniform", "uniform", "normal", "offset", "scaled", "constant", "half flat", "denormal", "integers", "halves",
    "not finite",
)  # fmt: skip
MOVES = ("near", "near", "zero", "integers", "halves", "leaving", "huge", "scaled", "offset", "not finite")


class References(TorchDispatchMode):
    """What is called of fastreg's ops is their references."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastreg":
            func = _ext._references[func._schema.name.split("::")[1]]
        return func(*args, **(kwargs or {}))


@dataclass
class Case:
    op: str
    tensors: dict  # name -> tensor; those of `wanted` get gradients
    options: dict
    module: bool = False
    wanted: tuple = ()
    kinds: dict = field(default_factory=dict)

    def call(self, tensors: dict):
        if self.module:
            name = {f.op.__name__: f for f in _modules()}[self.op]
            return name(**self.options)(**tensors)
        return getattr(fastreg, self.op)(**tensors, **self.options)

    def __str__(self):
        shown = ", ".join(
            f"{k}={tuple(t.shape)} {str(t.dtype)[6:]} {self.kinds.get(k, '')}"
            for k, t in self.tensors.items()
            if t is not None
        )
        return f"{self.op}{' (module)' if self.module else ''}({shown}; {self.options})"


def _modules():
    return [getattr(fastreg.nn, n) for n in fastreg.nn.__all__]


class Maker:
    """The random choices of one case."""

    def __init__(self, seed, number):
        self.r = random.Random(f"{seed} {number}")
        self.g = torch.Generator().manual_seed(self.r.getrandbits(48))
        self.dtype = self.r.choice(DTYPES)
        self.nd = self.r.choice((2, 3, 3))
        self.n = self.r.choice((1, 1, 2, 3))
        self.size = tuple(self.r.choice(SIZES) for _ in range(self.nd))
        self.kinds = {}

    def rand(self, shape):
        return torch.rand(shape, generator=self.g, dtype=torch.float64)

    def randn(self, shape):
        return torch.randn(shape, generator=self.g, dtype=torch.float64)

    def finish(self, name, x, kind, dtype=None):
        """In its dtype and some layout."""
        dtype = dtype or self.dtype
        limit = torch.finfo(dtype).max / 4
        x = torch.where(x.isfinite(), x.clamp(-limit, limit), x).to(dtype)
        how = self.r.choice(("plain", "plain", *layouts(x), "offset", "expanded"))
        if how == "offset":
            x = torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
        elif how == "expanded":
            x = x[:1].expand(x.shape)
        elif how != "plain":
            x = layouts(x)[how]
        self.kinds[name] = f"{kind}, {how}"
        return x

    def spoil(self, x):
        """With an island that is not finite."""
        x = x.clone()
        for _ in range(self.r.choice((1, 2))):
            x.view(-1)[self.r.randrange(x.numel())] = self.r.choice((math.nan, math.inf, -math.inf))
        return x

    def image(self, name, channels=1, kind=None, size=None):
        shape = (self.n, channels, *(size or self.size))
        kind = kind or self.r.choice(VALUES)
        x = self.rand(shape)
        if kind == "normal":
            x = self.randn(shape)
        elif kind == "offset":
            x = x + 1000
        elif kind == "scaled":
            reach = {torch.float16: 3, torch.float32: 30}.get(self.dtype, 30)
            x = x * 10 ** self.r.uniform(-reach, reach)
        elif kind == "constant":
            x = torch.full(shape, self.r.choice((0.0, 0.3, 1.0, 1000.1)), dtype=torch.float64)
        elif kind == "half flat":
            axis = self.r.randrange(len(shape))
            x.narrow(axis, 0, (shape[axis] + 1) // 2).fill_(0.4)
        elif kind == "denormal":
            x = x * 1e-40
        elif kind == "integers":
            x = (4 * x).floor()
        elif kind == "halves":
            x = (4 * x).floor() / 2
        elif kind == "not finite":
            x = self.spoil(x)
        return self.finish(name, x, kind)

    def moves(self, name, size=None, dtype=None, kind=None, tame=False):
        size = size or self.size
        shape = (self.n, len(size), *size)
        kind = kind or self.r.choice(MOVES)
        u = 2 * self.randn(shape)
        if kind == "zero":
            u = torch.zeros(shape, dtype=torch.float64)
        elif kind == "integers":
            u = u.round()
        elif kind == "halves":
            u = (2 * u).round() / 2
        elif kind == "leaving":
            u = u * max(size)
        elif kind == "huge":
            u = u * 10 ** self.r.uniform(2, 5 if tame else 12)
        elif kind == "scaled":
            u = u * 10 ** self.r.uniform(-30, 0)
        elif kind == "offset":
            u = u + self.r.choice((0.5, 7, 1000))
        elif kind == "not finite":
            u = self.spoil(u)
        return self.finish(name, u, kind, dtype or self.r.choice((self.dtype, torch.float32)))

    def mask(self, tensors):
        """Of the images, half of the time."""
        kind = self.r.choice(("none", "none", "weights", "bool", "zero", "one voxel"))
        if kind == "none":
            return
        m = self.rand((self.n, 1, *self.size))
        m = torch.where(m < 0.3, 0, m)
        if kind == "zero":
            m = torch.zeros_like(m)
        elif kind == "one voxel":
            m = torch.zeros_like(m)
            m.view(-1)[self.r.randrange(m.numel())] = 1
        tensors["mask"] = m > 0.5 if kind == "bool" else self.finish("mask", m, kind)
        self.kinds.setdefault("mask", kind)

    def pair(self, channels=None):
        channels = channels or self.r.choice((1, 1, 2, 3))
        kind = self.r.choice((None, None, self.r.choice(VALUES)))
        tensors = {name: self.image(name, channels, kind) for name in ("fixed", "moved")}
        if self.r.random() < 0.1:
            tensors["moved"] = tensors["fixed"]
        return tensors

    def of(self, **choices):
        """Options, each left out half of the time."""
        return {k: self.r.choice(v) for k, v in choices.items() if self.r.random() < 0.5}

    def case(self, op):
        tensors, options = getattr(self, f"_{op}")()
        wanted = tuple(k for k, t in tensors.items() if k != "mask" and t is not None)
        known = {f.op.__name__ for f in _modules()}
        return Case(op, tensors, options, op in known and self.r.random() < 0.2, wanted, self.kinds)

    def matrix(self):
        a = torch.eye(self.nd, self.nd + 1, dtype=torch.float64).repeat(self.n, 1, 1)
        a = a + self.randn(a.shape) * self.r.choice((0.0, 0.1, 1.0))
        return self.finish("affine", a, "matrix", self.r.choice((torch.float64, torch.float32)))

    def _warp(self):
        tensors, options = (
            {"image": self.image("image", self.r.choice((1, 2, 5)))},
            self.of(padding=("zeros", "border", "reflection"), mode=("nearest", "linear", "linear")),
        )
        out = self.size if self.r.random() < 0.6 else None
        which = self.r.choice(("u", "u", "affine", "both"))
        tensors["displacement"] = self.moves("displacement", out) if which != "affine" else None
        if which != "u":
            tensors["affine"] = self.matrix()
        return {k: t for k, t in tensors.items() if t is not None or k == "displacement"}, options

    def _warp_coarse(self):
        grid = tuple(self.r.choice(SIZES) for _ in range(self.nd))
        tensors = {
            "image": self.image("image", self.r.choice((1, 2, 5))),
            "displacement": self.moves("displacement", grid),
        }
        if self.r.random() < 0.3:
            tensors["affine"] = self.matrix()
        return tensors, self.of(padding=("zeros", "border", "reflection"))

    def _compose(self):
        return {"u": self.moves("u"), "v": self.moves("v")}, self.of(
            padding=("zeros", "border", "reflection")
        )

    def _integrate_velocity(self):
        options = self.of(
            padding=("zeros", "border", "reflection"), steps=(0, 1, 2, 4, 7), checkpoint=(True, False)
        )
        return {"v": self.moves("v", dtype=self.dtype)}, options

    def _invert_displacement(self):
        # With an inverse: where u folds, which position is found hangs on every rounding. In fp64: in fp32 a voxel stops 1e-3
        # away and takes one step more, so what is found is as good as the reference's and not the same.
        self.dtype = torch.float64
        u = 0.2 * (2 * self.rand((self.n, self.nd, *self.size)) - 1) / self.nd
        tensors = {"u": self.finish("u", u * self.r.choice((0.01, 1.0, 1.0)), "near")}
        if self.r.random() < 0.3:
            size = tuple(self.r.choice(SIZES) for _ in range(self.nd))
            points = max(self.size) * (self.rand((self.n, self.nd, *size)) * 1.4 - 0.2)
            tensors["points"] = self.finish("points", points, "anywhere")
        return tensors, self.of(padding=("zeros", "border", "reflection"))

    def _resize_displacement(self):
        size = [self.r.choice(SIZES) for _ in range(self.nd)]
        return {"u": self.moves("u", tame=True)}, {
            "size": size,
            **self.of(align_corners=(True, False), scale=("exact", 2.0)),
        }

    def _smooth(self):
        return {"u": self.moves("u", tame=True)}, {
            "sigma": self.r.choice((0.0, 0.5, 1.0, 3.7)),
            **self.of(padding=("zeros", "border"), truncate=(1.0, 4.0)),
        }

    def _jacobian_determinant(self):
        self.size = tuple(max(s, 2) for s in self.size)
        return {"u": self.moves("u", tame=True)}, {}

    def _affine_displacement(self):
        a = self.randn((self.n, self.nd, self.nd + 1))
        return {"matrix": self.finish("matrix", a, "normal")}, {"shape": self.size}

    def _integrate_gradients(self):
        return {"phi": self.moves("phi", tame=True)}, {}

    def _gaussian_displacement(self):
        p = self.rand((self.n, self.r.choice((1, 2, 5)), 7)) * 2 - 1
        p[..., 2:4] = p[..., 2:4].abs() + 0.05
        return {"params": self.finish("params", p, "uniform")}, {
            "shape": self.size[-2:],
            **self.of(sigma_is=("std", "var")),
        }

    def _bspline_displacement(self):
        order = self.r.choice((1, 2, 3))
        spacing = [self.r.choice((1, 2, 3, 4)) for _ in range(self.nd)]
        grid = [-(-n // s) + order for n, s in zip(self.size, spacing, strict=True)]
        return {"coefficients": self.moves("coefficients", grid, tame=True)}, {
            "spacing": spacing,
            "shape": self.size,
            "order": order,
        }

    def _local_correlation(self):
        pair = self.pair()
        tensors = {"fixed": pair["fixed"], "moving": pair["moved"]}
        if self.r.random() < 0.3:
            tensors["displacement"] = self.moves("displacement")
        radius = self.r.choice((0, 1, 2, 3))
        return tensors, {
            "radius": radius,
            **self.of(normalize=(True, False), scale=("mean", "sum", "sqrt"), padding=("zeros", "border")),
        }

    def _cost_volume(self):
        pair = self.pair()
        tensors = {"fixed": pair["fixed"], "moving": pair["moved"]}
        self.mask(tensors)
        return tensors, {
            "cell": self.r.choice((1, 2, 3, 5, 9)),
            "radius": self.r.choice((0, 1, 2, 3)),
            **self.of(stride=(1, 2, 4)),
        }

    def _lcc_loss(self):
        tensors = self.pair()
        self.mask(tensors)
        options = self.of(
            padding=("zeros", "valid"),
            squared=(True, False),
            denominator=("product", "clamp", "each"),
            reduction=("mean", "sum", "none"),
            kernel=("box", "gaussian", "triangular"),
        )
        return tensors, {"window": self.r.choice((1, 3, 5, 9, 31)), **options}

    def _mind(self):
        return {"image": self.image("image", self.r.choice((1, 2)))}, self._mind_options()

    def _mind_options(self):
        return self.of(
            radius=(0, 1, 2, 3),
            dilation=(1, 2, 3),
            neighbourhood=("ssc", "six"),
            patch=("box", "gaussian"),
            sigma=(0.5, 2.0),
        )

    def _mind_loss(self):
        tensors = self.pair(self.r.choice((1, 2)))
        self.mask(tensors)
        return tensors, {
            **self._mind_options(),
            **self.of(norm=("l2", "l1"), reduction=("mean", "sum", "none")),
        }

    def _mse_loss(self):
        tensors = self.pair()
        self.mask(tensors)
        return tensors, self.of(reduction=("mean", "sum", "none"))

    def _mi_loss(self):
        tensors = self.pair(self.r.choice((1, 2)))
        self.mask(tensors)
        return tensors, {
            "bins": self.r.choice((6, 8, 32, 33)),
            **self.of(kernel=("gaussian", "bspline"), reduction=("mean", "sum", "none")),
        }

    def _regulariser(self):
        spacing = self.r.choice((None, 0.5, [float(k + 1) for k in range(self.nd)]))
        return {"u": self.moves("u", tame=True)}, {"spacing": spacing}

    def _diffusion(self):
        tensors, options = self._regulariser()
        return tensors, {**options, **self.of(norm=("l2", "l1"))}

    def _total_variation(self):
        tensors, options = self._regulariser()
        return tensors, {**options, **self.of(isotropic=(True, False))}

    def _bending_energy(self):
        return self._regulariser()


OPS = tuple(op for op in fastreg.ops.__all__ if hasattr(Maker, f"_{op}"))


def made(seed, number):
    maker = Maker(seed, number)
    return maker.case(OPS[number % len(OPS)])


def results(call: Callable, tensors: dict, wanted, weight=None):
    """Output and gradients of sum(weight * output)."""
    tensors = {k: t.detach().requires_grad_() if k in wanted else t for k, t in tensors.items()}
    out = call(tensors)
    if not out.requires_grad:
        return out, []
    weight = torch.ones_like(out) if weight is None else weight.to(out.dtype)
    grads = torch.autograd.grad(out, [tensors[k] for k in wanted], weight, allow_unused=True)
    return out.detach(), [
        g if g is not None else torch.zeros_like(tensors[k]) for k, g in zip(wanted, grads, strict=True)
    ]


def error(ours, truth, gradient, double):
    """Worst error over what is allowed; infinite where one is not finite and the other is. `double`: all inputs are fp64."""
    dtype = ours.dtype if double or ours.dtype != torch.float64 else torch.float32
    ours, limit, range_ = ours.double(), TOLERANCE[dtype], torch.finfo(dtype)
    floor = 0.1 if gradient and dtype == torch.float32 else 1e-3
    beyond = (truth.abs() > 0.999 * range_.max) & (ours.abs() > 0.99 * range_.max)
    ours, truth = (torch.where(beyond, truth.sign() * math.inf, t) for t in (ours, truth))
    both = ours.isfinite() & truth.isfinite()
    if not torch.equal(both, truth.isfinite() | ours.isfinite()) or not torch.equal(
        ours.isnan(), truth.isnan()
    ):
        return math.inf
    if not both.any():
        return 0.0
    a, b = ours[both], truth[both]
    scale = (
        b.abs().clamp_min(floor * b.abs().max()).clamp_min(max(range_.tiny, torch.finfo(torch.float32).tiny))
    )
    return ((a - b).abs() / scale).max().item() / limit


def truths(case, tensors, weight):
    with References():
        out, grads = results(case.call, tensors, case.wanted, weight)
    return [out, *grads]


def verdict(case, seed=0):
    """("ok" | a rule | "not finite" | "wrong" | "crash", text)."""
    g = torch.Generator().manual_seed(seed)
    weight = None
    wide = {k: t.double() if t is not None and t.is_floating_point() else t for k, t in case.tensors.items()}
    given = [t for t in case.tensors.values() if t is not None]
    finite, double = (
        all(t.isfinite().all() for t in given),
        all(t.dtype in (torch.float64, torch.bool) for t in given),
    )
    try:
        shape = case.call(case.tensors).shape
        weight = torch.randn(shape, generator=g, dtype=torch.float64).float().to(torch.bfloat16).double()
        out, grads = results(case.call, case.tensors, case.wanted, weight)
        truth = truths(case, wide, weight)
    except Exception as problem:  # whatever it is, it is a finding
        return "crash", f"{type(problem).__name__}: {str(problem).splitlines()[0][:160]}"
    names, ours = ["value", *(f"gradient to {k}" for k in case.wanted)], [out, *grads]
    worst = {
        n: error(a, b, i > 0, double) for i, (n, a, b) in enumerate(zip(names, ours, truth, strict=False))
    }
    bad = {n: e for n, e in worst.items() if e > 1}
    if not bad:
        return "ok", ""
    text = ", ".join(f"{n} {e:.3g} x the tolerance" for n, e in bad.items())
    if not finite:
        # What a NaN reaches is promised of values: at positions as the dtype of the inputs has them, where one that rounds to a
        # voxel's centre does not reach the next.
        rounded = truths(case, case.tensors, weight)[0] if "value" in bad else truth[0]
        if error(out, rounded.double(), False, double) <= 1:
            return "not finite", text
        bad = {"value": bad["value"]}
    info = torch.finfo(torch.float64 if double else torch.float32)
    sizes = [
        t.abs().max().item() for t in wide.values() if t is not None and t.is_floating_point() and t.numel()
    ]
    if any(s > 0 and (s * s > info.max * 1e-6 or s * s < info.tiny * 1e12) for s in sizes):
        return "range", text
    if case.op in ("mi_loss", "mind", "mind_loss"):
        contrast = min((t.max() - t.min()).item() or 1.0 for k, t in wide.items() if k in case.wanted)
        noise = (
            64
            * info.eps
            * max(weight.abs().max().item(), 1)
            * case.options.get("bins", 32)
            / min(contrast, 1.0)
        )
        small = [
            n
            for n, a, b in zip(names, ours, truth, strict=False)
            if n in bad and not (a.double() - b).abs().max().item() <= noise
        ]
        if not small:
            return "cancellation", text
        if not double and finite:
            # Terms may be far larger than that, as where V is a difference of nearly equal distances; but what shrinks with the
            # rounding of the arithmetic is rounding: a wrong term would stay.
            value, found = results(case.call, wide, case.wanted, weight)
            finer = dict(zip(names, [value, *found], strict=True))
            off = {
                n: ((a.double() - b).abs().max(), (finer[n] - b).abs().max())
                for n, a, b in zip(names, ours, truth, strict=False)
            }
            if all(off[n][1] <= 2.0**-20 * off[n][0] for n in bad):
                return "cancellation", text
    moved, apart = [], 2.0**-46 if double else 2.0**-18
    for _ in range(12):
        moved.append(truths(case, {k: beside(k, t, apart, case, g) for k, t in wide.items()}, weight))
    kind = "conditioning"
    for i, name in enumerate(names):
        if name not in bad:
            continue
        if truth[i].abs().max() > 1e-3 * info.max:
            kind = "range"
            continue
        if not torch.equal(ours[i].isnan(), truth[i].isnan()) or (not finite and bad[name] == math.inf):
            return "wrong", text
        same = truth[i].isfinite() & ours[i].isfinite()
        spread = max((m[i] - truth[i])[same].abs().nan_to_num(math.inf).max().item() for m in moved)
        spread += torch.finfo(ours[i].dtype).eps * truth[i][same].abs().max().item()  # its own rounding
        if not (ours[i].double() - truth[i])[same].abs().max().item() <= 2 * spread:
            return "wrong", text
    return kind, text


def beside(name, t, apart, case, g):
    """The input moved by a few roundings; a position also by those of its fraction of a voxel."""
    if name not in case.wanted:
        return t

    def noise():
        return apart * (2 * torch.rand(t.shape, generator=g, dtype=torch.float64) - 1)

    moved = t * (1 + noise())
    if case.op in ("mind", "mind_loss"):  # of differences between voxels: a 0 moves too
        moved = moved + noise() * t.abs().nan_to_num(0, 0, 0).max()
    position = (
        name == "displacement"
        or name == "points"
        or (case.op, name)
        in (
            ("compose", "v"),
            ("integrate_velocity", "v"),
        )
    )
    return moved + noise() if position else moved
