"""What the benchmarks share: cases, providers, inputs, correctness gate, alternating timing, stored rows.

A bench file declares ``CASES``, ``make_inputs(case, device, dtype)``, ``PROVIDERS``, ``reference(case)``
(plain PyTorch, run in fp64) and ``bytes_moved(case, mode)`` (what any implementation must read and write).
Modes: ``fwd`` is the forward under ``no_grad``, ``fwd+bwd`` forward and the gradients the case asks for,
``iteration`` a call that does everything itself.
"""

import csv
import datetime
import fcntl
import functools
import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
SMALL = (24, 34, 28)
# The fp64 reference of a larger case does not fit a laptop; it is checked at this many numbers at most.
GATE_VOXELS = {"cpu": 170**3, "cuda": 256**3}
FIELDS = [
    "date", "commit", "device", "device_name", "threads", "isa", "torch", "op", "case", "mode", "provider",
    "version", "dtype", "shape", "rounds", "p20_ms", "p50_ms", "p80_ms", "ratio", "floor", "copy_gbs",
    "peak_volumes", "saved_volumes", "gate",
]  # fmt: skip
KEY = ["device", "device_name", "threads", "isa", "op", "case", "mode", "provider", "dtype", "shape"]
ITERATION = "iteration"


@dataclass(frozen=True)
class Case:
    """`shape` is that of the (fixed) image or of the output; `grads` says which inputs want a gradient.

    `on`: devices it is measured on. The headline cases of a GPU are its alone: a CPU would take minutes for them.
    """

    name: str
    shape: tuple
    grads: tuple
    params: dict = field(default_factory=dict, hash=False)
    only: tuple | None = None
    dtype: torch.dtype = torch.float32
    on: tuple = ("cpu", "cuda")

    def __str__(self):
        return self.name


@dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Args:
        build: (case, inputs) -> function of the inputs. May import a peer; buffers it keeps for later calls
            are named with `keeps`.
        package: distribution whose version is stored.
        reference: (case) -> fp64 function, where the formula claimed is not the bench file's.
        slow: no warm-up at full size and two rounds.
        prepare, restore: own inputs made from the common ones, and its gradients back, both untimed.
    """

    build: Callable
    package: str = "torch"
    reference: Callable | None = None
    slow: bool = False
    modes: tuple = ("fwd", "fwd+bwd")
    prepare: Callable | None = None
    restore: Callable | None = None


def keeps(function, *tensors):
    """Names the tensors `function` holds between calls; memory.py counts them."""
    function.state = tensors
    return function


def ops():
    return sorted(p.stem.removeprefix("bench_") for p in ROOT.glob("bench_*.py"))


def load(op):
    return importlib.import_module(f"bench.bench_{op}")


def op_of(module):
    return module.__name__.split(".")[-1].removeprefix("bench_")


def sizes(shape_of, grads, params=None, name="{}", only=("fastreg",)):
    """fastreg alone from 64^3 to 256^3: time per voxel must stay flat."""
    return [Case(name.format(n), shape_of(n), grads, params or {}, only) for n in (64, 96, 128, 192, 256)]


def shrunk(case, spatial=SMALL):
    """The same case on a volume of a few thousand voxels, all axes different."""
    nd = len(case.shape) - 2
    return replace(
        case,
        shape=(*case.shape[:2], *(min(s, m) for s, m in zip(case.shape[2:], spatial[-nd:], strict=True))),
    )


def providers(module, case):
    return [n for n in module.PROVIDERS if case.only is None or n in case.only]


def modes(module, case, name):
    return module.PROVIDERS[name].modes


@functools.cache
def missing(package):
    """Why a provider cannot run here; empty if it can."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # A bare checkout on the path has no metadata.
        return "" if importlib.util.find_spec(package) else f"{package} is not installed"
    return ""


@functools.cache
def version(package):
    if package in ("torch", "fastreg"):
        return f"{package} {importlib.import_module(package).__version__}"
    return f"{package} {importlib.metadata.version(package)}"


# Inputs


def _upsampled(shape, step, generator, make):
    coarse = make((*shape[:2], *(max(2, s // step) for s in shape[2:])), generator=generator)
    return F.interpolate(
        coarse, size=shape[2:], mode="trilinear" if len(shape) == 5 else "bilinear", align_corners=True
    )


def image(shape, seed, device, dtype):
    """Smooth structures with fine texture in [0, 1]; no flat window, where peers lose their digits."""
    generator = torch.Generator().manual_seed(seed)
    fine = torch.rand(shape, generator=generator).mul_(0.2)
    return fine.add_(_upsampled(shape, 8, generator, torch.rand), alpha=0.8).to(device, dtype)


def displacement(shape, seed, device, dtype, amplitude=3.0):
    """A smooth displacement of a few voxels: (N, nd, *spatial) for an image of `shape`.

    No component is nearly an integer: a linear interpolation has two gradients there; rounding would choose.
    """
    generator = torch.Generator().manual_seed(seed)
    nd = len(shape) - 2
    u = _upsampled((shape[0], nd, *shape[2:]), 16, generator, torch.randn).mul_(amplitude)
    return u.add_(((u - u.round()).abs() < 1e-3) * 2e-3).to(device, dtype)


def want(inputs, grads):
    """Leaves with gradients where the case wants them."""
    return [t.detach().requires_grad_(g) for t, g in zip(inputs, grads, strict=True)]


def inputs_of(module, case, device, dtype=None):
    return want(module.make_inputs(case, device, dtype or case.dtype), case.grads)


# Running one provider


class Runner:
    """`runner(i)` runs one call of a provider on its i-th copy of the inputs and returns its results."""

    def __init__(self, module, case, name, mode, device, copies=1):
        provider = module.PROVIDERS[name]
        self.mode = mode
        self.sets = []
        for _ in range(copies):
            inputs = inputs_of(module, case, device)
            if provider.prepare:
                inputs = [t.detach().requires_grad_(t.requires_grad) for t in provider.prepare(case, inputs)]
            self.sets.append(inputs)
        self.function = provider.build(case, self.sets[0])
        # What flows into a map is noise: the gradient of a sum is an expanded scalar, which is not typical.
        self.weight = None
        if mode == "fwd+bwd" and hasattr(module, "output_shape"):
            generator = torch.Generator().manual_seed(7)
            self.weight = torch.randn(module.output_shape(case), generator=generator).to(device, case.dtype)

    def __call__(self, i=0):
        inputs = self.sets[i % len(self.sets)]
        if self.mode == "fwd":
            with torch.no_grad():
                return self.function(*inputs), ()
        if self.mode == ITERATION:
            return self.function(), ()
        output = self.function(*inputs)
        return output, torch.autograd.grad(output, [t for t in inputs if t.requires_grad], self.weight)


# The gate


@dataclass(frozen=True)
class Verdict:
    ok: bool
    text: str


def failure(error):
    lines = str(error).strip().splitlines() or [""]
    return Verdict(False, f"fails: {type(error).__name__}: {lines[0][:120]}")


def _worst(actual, truth, floor, but=0.0):
    """Of all values, or of all but a share of the worst."""
    actual, truth = actual.detach().double(), truth.detach().double()
    if actual.shape != truth.shape:
        if actual.numel() != 1 or truth.numel() != 1:
            return math.inf
        actual = actual.reshape(truth.shape)
    scale = truth.abs().clamp_min(floor * truth.abs().max()).clamp_min(torch.finfo(torch.float32).tiny)
    errors = ((actual - truth).abs() / scale).flatten()
    if not errors.isfinite().all():
        return math.inf
    return errors.kthvalue(errors.numel() - int(but * errors.numel())).values.item()


def _l2(actual, truth):
    actual, truth = actual.detach().double().flatten(), truth.detach().double().flatten()
    if actual.shape != truth.shape:
        return math.inf
    error = ((actual - truth).norm() / truth.norm().clamp_min(1e-300)).item()
    return error if math.isfinite(error) else math.inf


def gated(case, ours, device):
    """The cases a provider is compared at: a small volume; for fastreg also the one that is timed."""
    small = shrunk(case)
    as_timed = ours and math.prod(case.shape) <= GATE_VOXELS[device] and small.shape != case.shape
    return [small, case] if as_timed else [small]


def gate(module, case, name, device):
    """Compares a provider with the fp64 reference of the formula it claims, value and gradients.

    fastreg: a scalar within 1e-5, each value of a map within 1e-4 of max(|x|, 1e-3 max|x|), each gradient
    within 1e-4 of max(|g|, 0.1 max|g|), on a small volume and on the one that is timed. A module's `kinks` is the
    share of gradients that may deviate: a position that rounding moves across the face of a cell has the slope
    of the other side; its `least` takes the place of 1e-3. Others: relative L2
    error of 1e-3 on the small volume; one that deviates is timed all the same and marked.
    """
    if hasattr(module, "gate"):
        return module.gate(case, name, device)
    provider = module.PROVIDERS[name]
    ours = provider.package == "fastreg"
    worst = [0.0, 0.0]
    for small in gated(case, ours, device):
        try:
            errors = _errors(module, small, provider, name, device, ours)
        except Exception as error:
            return failure(error)
        worst = [max(w, e) for w, e in zip(worst, errors, strict=True)]
    scalar = not hasattr(module, "output_shape")
    limits = (1e-5 if scalar else 1e-4, 1e-4) if ours else (1e-3, 1e-3)
    text = f"value {worst[0]:.1e}, gradient {worst[1]:.1e}"
    ok = all(w <= limit for w, limit in zip(worst, limits, strict=True))
    return Verdict(ok, text if ok else f"deviates: {text}")


def _errors(module, case, provider, name, device, ours):
    mode = provider.modes[-1]
    runner = Runner(module, case, name, mode, device)
    output, grads = runner()
    if provider.restore:
        grads = provider.restore(case, grads)
    truth_inputs = want([t.double() for t in module.make_inputs(case, device, case.dtype)], case.grads)
    truth = (provider.reference or module.reference)(case)(*truth_inputs)
    value = _worst(output, truth, getattr(module, "least", 1e-3)) if ours else _l2(output, truth)
    if mode == "fwd":
        return value, 0.0
    weight = runner.weight.double() if runner.weight is not None else None
    truth_grads = torch.autograd.grad(truth, [t for t in truth_inputs if t.requires_grad], weight)
    grad = max(
        _worst(g, t, 0.1, getattr(module, "kinks", 0.0)) if ours else _l2(g, t) for g, t in zip(grads, truth_grads, strict=True)
    )  # fmt: skip
    return value, grad


# Timing


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def copies_of(module, case, device):
    """On a GPU the inputs rotate through more memory than its L2 holds."""
    if device != "cuda":
        return 1
    per_set = sum(t.numel() * t.element_size() for t in module.make_inputs(case, "cpu", case.dtype))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return 1 + math.ceil(2 * cache / max(per_set, 1))


def _milliseconds(call, device, repeat):
    """Mean time of `repeat` calls; call(i) must not return before its work is queued."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(repeat):
            call(i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeat
    begin = time.perf_counter()
    for i in range(repeat):
        call(i)
    return (time.perf_counter() - begin) / repeat * 1e3


class Copy:
    """A plain copy far larger than any cache: the bandwidth the rows are measured against.

    On a GPU larger still, and the mean of several: one of 128 MiB would take 60 us, half of it in its L2, and what
    lies between two events weighs as much.
    """

    def __init__(self, device):
        size, self.repeat = (2**28, 10) if device == "cuda" else (2**25, 1)
        self.source = torch.ones(size, device=device)
        self.target = torch.ones_like(self.source)
        self.bytes = 2 * self.source.nbytes

    def __call__(self, i=0):
        self.target.copy_(self.source)


@dataclass
class Timing:
    times: list
    ratios: list
    copy_gbs: float


def measure(runners, device, *, budget=8.0, most=25, slow=(), first="fastreg"):
    """Times providers in alternating rounds of one process.

    Each round runs every provider once, in an order that rotates; a provider too slow for that sits out
    rounds, evenly spread, and its ratio pairs it with `first` in the rounds they share.

    Args:
        runners (dict[str, Callable]): name -> call(i).
        budget (float): seconds each provider may take in all.
        most (int): rounds of a fast provider.
        slow (collection of str): not warmed up here, two rounds.

    Returns:
        dict[str, Timing].
    """
    copy = Copy(device)
    copy()
    repeat, rounds = {}, {}
    for name, call in runners.items():
        if name in slow:
            repeat[name], rounds[name] = 1, min(2, most)
            continue
        for _ in range(2):
            call(0)
        synchronize(device)
        estimate = _milliseconds(call, device, 1) / 1e3
        repeat[name] = max(1, min(100, math.ceil(0.004 / max(estimate, 1e-7))))
        rounds[name] = max(min(3, most), min(most, int(budget / max(estimate * repeat[name], 1e-9))))
    total = max(rounds.values())
    if first in rounds:
        rounds[first] = total
    times = {name: {} for name in runners}
    copies = []
    names = list(runners)
    for r in range(total):
        order = names[r % len(names) :] + names[: r % len(names)]
        for name in order:
            if (r + 1) * rounds[name] // total > r * rounds[name] // total:
                times[name][r] = _milliseconds(runners[name], device, repeat[name])
        copies.append(_milliseconds(copy, device, copy.repeat))
    gbs = copy.bytes / statistics.median(copies) / 1e6
    base = times.get(first, {})
    return {
        name: Timing(list(t.values()), [t[r] / base[r] for r in t if r in base], gbs)
        for name, t in times.items()
    }


def quantile(values, q):
    values = sorted(values)
    position = q * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (position - low) * (values[high] - values[low])


# Rows


@functools.cache
def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*args):
    return subprocess.run(
        ["git", *args], cwd=ROOT.parent, capture_output=True, text=True, check=True, timeout=30
    ).stdout.strip()  # fmt: skip


@functools.cache
def commit():
    """Commit of this checkout; "+dirty" when anything but results differs from it. FASTREG_COMMIT where git is not."""
    try:
        dirty = _git("status", "--porcelain", "--", ".", ":!bench/results", ":!README.md")
        return _git("rev-parse", "--short", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("FASTREG_COMMIT", "unknown")


def implementation(op, device):
    """What answers: the CPU's instruction set, or "CUDA C++", "Triton" or "reference" on a GPU."""
    import fastreg
    from fastreg import _ext

    if device == "cpu":
        return _ext.build_info().get("isa") or "reference"
    # register is composed of ops; its kernels are of one kind.
    name = fastreg.backends().get(op, fastreg.backends()["warp"])["cuda"]
    return "reference" if name.startswith("PyTorch") else name


def environment(device, op=""):
    return {
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "device": device,
        "device_name": device_name(device),
        "threads": torch.get_num_threads() if device == "cpu" else "",
        "isa": implementation(op, device),
        "torch": torch.__version__,
    }


def identity(module, case, mode, name, device):
    """What a row is of: when, where and what."""
    return {
        **environment(device, op_of(module)),
        "op": op_of(module),
        "case": case.name,
        "mode": mode,
        "provider": name,
        "version": version(module.PROVIDERS[name].package),
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": "x".join(map(str, case.shape)),
    }


def row(module, case, mode, name, timing, verdict, device):
    times = timing.times
    p50 = quantile(times, 0.5)
    floor = module.bytes_moved(case, mode) / (timing.copy_gbs * 1e6) / p50
    return {
        **identity(module, case, mode, name, device),
        "rounds": len(times),
        "p20_ms": f"{quantile(times, 0.2):.4g}",
        "p50_ms": f"{p50:.4g}",
        "p80_ms": f"{quantile(times, 0.8):.4g}",
        "ratio": f"{statistics.median(timing.ratios):.4g}" if timing.ratios else "",
        "floor": f"{floor:.3g}",
        "copy_gbs": f"{timing.copy_gbs:.3g}",
        "gate": verdict.text,
    }


def read_rows(path):
    path = Path(path)
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_rows(path, rows, fields=None):
    """Adds rows to a CSV file; see rewrite_rows."""
    rewrite_rows(path, lambda old: [*old, *rows], fields or FIELDS)


def rewrite_rows(path, change, fields=()):
    """The rows of a CSV file become change(rows); readers see it before or after, never in between, and no writer is lost."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = change(read_rows(path))
        names = list(dict.fromkeys([*fields, *(k for r in rows for k in r)]))
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    finally:
        os.close(lock)


def newest(rows, key=KEY):
    """The last row stored for each key, in the order in which the keys first appeared."""
    table = {}
    for r in rows:
        table[tuple(r.get(k, "") for k in key)] = r
    return list(table.values())


# pytest-benchmark


def combinations(module_globals):
    """Every (case, mode, provider) of a bench file, as pytest parameters."""
    import pytest

    table = module_globals["PROVIDERS"]
    return [
        pytest.param(case, mode, name, id=f"{case.name}-{mode}-{name}".replace(" ", "_"))
        for case in module_globals["CASES"]
        for name in table
        if case.only is None or name in case.only
        if os.environ.get("FASTREG_BENCH_DEVICE", "cpu") in case.on
        for mode in table[name].modes
    ]


def run_benchmark(benchmark, module, case, mode, name):
    """Body of the pytest-benchmark tests: gate, then rounds. FASTREG_BENCH_DEVICE chooses the device."""
    import pytest

    device = os.environ.get("FASTREG_BENCH_DEVICE", "cpu")
    provider = module.PROVIDERS[name]
    if why := missing(provider.package):
        pytest.skip(why)
    verdict = gate(module, case, name, device)
    benchmark.extra_info.update(
        environment(device, op_of(module)), gate=verdict.text, version=version(provider.package)
    )
    if provider.package == "fastreg":
        assert verdict.ok, f"{op_of(module)} {case} {name}: {verdict.text}"
    elif verdict.text.startswith("fails"):
        pytest.skip(verdict.text)
    runner = Runner(module, case, name, mode, device, copies_of(module, case, device))
    benchmark.group = f"{op_of(module)} {case} {mode}"
    count = iter(range(10**9))

    def call():
        runner(next(count))
        synchronize(device)

    benchmark.pedantic(call, rounds=2 if provider.slow else 7, warmup_rounds=0 if provider.slow else 2)


def compiled(function, fullgraph=True):
    """`function` under torch.compile for one fixed shape."""
    # Each case is a fresh graph; without this, dynamo's limit on recompilations ends in an error.
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=fullgraph)


def say(text):
    print(text, flush=True)


def quiet():
    """Peers warn on import about things that are not our concern."""
    warnings.filterwarnings("ignore")
