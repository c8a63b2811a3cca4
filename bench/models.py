#!/usr/bin/env python3
"""Measures the models against the same nets on stock ops, and against the plain nets.

    python bench/models.py                      every model, 2 threads; rows go to bench/results/models.csv
    python bench/models.py rrn voxelmorph       these models
    python bench/models.py --check              only the correctness gate
    python bench/models.py --quick              small images, three rounds, no peaks; not stored
    python bench/models.py rrn --shape 96 96 96 images of this size are timed

Forms of a model:

fastreg     as it is
stock ops   its layers, and the ops in the best form PyTorch has (bench/stock_ops.py): what the ops alone change
plain       stock ops, and the layers as torch.cat, nn.Conv3d, in-place LeakyReLU, F.instance_norm: the net as one writes it
... blocks  with checkpoint="blocks"

First the gate: loss and gradients of fastreg must be those of the plain net in fp64 on a small pair, or none of the
model's rows are stored and the exit status is 1. Then

saved       bytes autograd keeps from forward to backward, loss included: storages given to the saved-tensor hooks, each
            once, without images and parameters. Counted with fake tensors, which have sizes and no numbers: at the paper's
            size too, where a CPU cannot run the step. tests/bench/test_bench.py holds them to real ones.
peak        of a training step in a fresh process, beyond model, images and the gradients of the parameters.
step        forward, loss and backward, in rounds that alternate over the forms; ratios are medians over rounds.
inference   displacement and moved image under no_grad.
work        seconds of the processor in all threads (on a GPU: of the clock), which other people's processes change less.
share       of a step's work that its ops do, forward and backward (bench/clock.py).
bound       1 / (1 - share of stock ops): the speed-up of a step whose ops cost nothing.
reached     work of a step on stock ops / that on fastreg's / bound.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    # A thread that spins while it waits would count as work; read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch._subclasses import FakeTensorMode

import fastreg
from bench import clock, common, memory, stock_ops
from bench.common import say
from bench.markdown import grouped, measured, number, table
from fastreg import models

RESULTS = "models.csv"
FORMS = ("fastreg", "stock ops", "plain", "fastreg, blocks", "plain, blocks")
TIMED = FORMS[:4]
GOAL_REACHED = 0.85
FIELDS = [
    "date", "commit", "device", "device_name", "threads", "isa", "torch", "model", "form", "shape", "saved_bytes",
    "peak_bytes", "rounds", "step_p20_ms", "step_p50_ms", "step_p80_ms", "step_ratio", "work_ratio",
    "inference_p50_ms", "inference_ratio", "ops_share", "bound", "reached", "gate",
]  # fmt: skip
KEY = ["device_name", "threads", "isa", "model", "form", "shape"]


@dataclass(frozen=True)
class Subject:
    """A model and the sizes it is measured at.

    Args:
        paper: size of the paper's training images.
        timed: size that two cores step through in seconds.
        quick, gate: sizes of --quick and of the gate.
        sizes: further sizes whose bytes are counted.
        goal: (form, saved bytes of it / of the plain net, at most).
        dtype: that the gate runs fastreg in.
    """

    label: str
    cls: type
    paper: tuple
    timed: tuple
    quick: tuple = (16, 32, 32)
    gate: tuple = (12, 17, 16)
    sizes: tuple = ()
    goal: tuple | None = None
    dtype: torch.dtype = torch.float32
    options: dict = field(default_factory=dict)

    def build(self, form):
        torch.manual_seed(0)
        checkpoint = "blocks" if form.endswith("blocks") else "none"
        return self.cls(**self.options, checkpoint=checkpoint)


def cubes(*sizes):
    return tuple((n, n, n) for n in sizes)


SUBJECTS = {
    "rrn": Subject(
        "RRN",
        models.RRN,
        *cubes(256, 64),
        gate=(16, 18, 16),
        sizes=cubes(64, 96, 128),
        goal=("fastreg", 0.6),
    ),
    "rrn-features": Subject(
        "RRN, no cost volume", models.RRN, *cubes(256, 64), gate=(16, 18, 16), options={"cost_volume": False}
    ),
    "voxelmorph": Subject(
        "VoxelMorph-2, LCC",
        models.VoxelMorph,
        *cubes(256, 96),
        sizes=cubes(64, 96, 128),
        goal=("fastreg", 0.6),
    ),
    "f3rnet": Subject("F3RNet, MIND", models.F3RNet, (144, 144, 128), (64, 64, 64), goal=("fastreg", 0.7)),
    "prdfe": Subject("PRDFE", models.PRDFE, (120, 144, 160), (48, 64, 64)),
    "lindef": Subject("LinDef", models.LinDef, (64, 192, 192), (16, 48, 32), quick=(8, 24, 24)),
    # Its loss counts pixels sampled inside; at the border, where the motion all but vanishes, rounding decides which.
    "r2n2": Subject(
        "R2N2", models.R2N2, (256, 256), (128, 128), quick=(64, 64), gate=(37, 26), dtype=torch.float64
    ),
}


def of_form(form):
    """The context in which a model of this form is built and run."""
    if form.startswith("fastreg"):
        return contextlib.nullcontext()
    return stock_ops.installed(layers=form.startswith("plain"))


def pair(shape, device="cpu"):
    """A fixed image and the same one elsewhere."""
    fixed = common.image((1, 1, *shape), 0, device, torch.float32)
    return fixed, fastreg.warp(fixed, common.displacement(fixed.shape, 1, device, torch.float32))


def train(model, fixed, moving):
    loss = model.loss(fixed, moving, model(fixed, moving))
    loss.backward()
    return loss.detach()


@torch.no_grad()
def infer(model, form, fixed, moving):
    prediction = model(fixed, moving)
    warp = fastreg.warp if form.startswith("fastreg") else stock_ops.warp
    return warp(moving, prediction.displacement, padding=model.padding)


# The gate


def gate(subject):
    """Loss and gradients against the plain net in fp64, at weights whose heads hide nothing.

    The loss within 1e-5; the gradients of all parameters, relative L2, within 1e-3.
    """
    images = pair(subject.gate)
    results = []
    for form in ("fastreg", "plain"):
        with of_form(form):
            model = subject.build(form).eval()
            for parameter in model.parameters():
                if parameter.abs().max() < 1e-3:
                    torch.nn.init.normal_(parameter, std=0.02)
            dtype = subject.dtype if form == "fastreg" else torch.float64
            loss = train(model.to(dtype), *(t.to(dtype) for t in images))
        grads = [p.grad.double().flatten() for p in model.parameters() if p.requires_grad]
        results.append((loss.double(), torch.cat(grads)))
    (loss, grad), (truth, truth_grad) = results
    value = (abs(loss - truth) / abs(truth)).item()
    error = ((grad - truth_grad).norm() / truth_grad.norm()).item()
    text = f"value {value:.1e}, gradient {error:.1e}"
    # Written so that a NaN is red.
    ok = value <= 1e-5 and error <= 1e-3
    return common.Verdict(ok, text if ok else f"deviates: {text}")


# Memory


def saved_bytes(subject, form, shape, fake=True):
    """Bytes kept for the backward pass of a step."""

    def key(t):
        return t.untyped_storage()._cdata

    kept = {}
    with FakeTensorMode() if fake else contextlib.nullcontext(), of_form(form):
        model = subject.build(form)
        images = [torch.rand(1, 1, *shape) for _ in range(2)]
        given = {key(t) for t in (*images, *model.parameters())}

        def pack(t):
            if key(t) not in given:
                # Kept alive, so that no later one has its address.
                kept[key(t)] = t.detach()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.loss(*images, model(*images))
        return sum(t.untyped_storage().nbytes() for t in kept.values())


def peak_bytes(subject, form, shape, device):
    """Of this process, over one step. The gradients of the parameters are there before it: a step adds to them."""
    with of_form(form):
        model = subject.build(form).to(device)
        train(model, *pair([min(n, 16) for n in shape], device))
        images = pair(shape, device)
        memory.give_back()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            train(model, *images)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            before = memory.resident("VmRSS")
            with memory.HighWater() as mark:
                train(model, *images)
            peak = mark.peak
    return peak - before


# Time


@dataclass(frozen=True)
class Cost:
    """Seconds on the wall, of work, and of work in ops."""

    wall: float
    work: float
    ops: float


def cost(call, device):
    watch = clock.Clock(device)
    with clock.running(watch):
        common.synchronize(device)
        start, begin = time.perf_counter(), watch.now()
        call()
        common.synchronize(device)
        return Cost(time.perf_counter() - start, watch.now() - begin, watch.seconds)


def alternating(calls, most, budget):
    """name -> cost of each round; at least three rounds, after one that warms up."""
    total = sum(call().wall for call in calls.values())
    rounds = max(3, min(most, int(budget / total)))
    costs = {name: [] for name in calls}
    names = list(calls)
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            costs[name].append(calls[name]())
    return costs


def walls(costs):
    return [c.wall for c in costs]


def ratio(costs, name, what):
    """Median over rounds of what a form costs, over that of fastreg."""
    pairs = zip(costs[name], costs["fastreg"], strict=True)
    return statistics.median(getattr(a, what) / getattr(b, what) for a, b in pairs)


def measured_times(subject, shape, args):
    """form -> columns of times."""
    images = pair(shape, args.device)
    nets = {}
    for form in TIMED:
        with of_form(form):
            nets[form] = subject.build(form).to(args.device)

    def step(form):
        with of_form(form):
            result = cost(lambda: train(nets[form], *images), args.device)
        nets[form].zero_grad()
        return result

    def inference(form):
        with of_form(form):
            return cost(lambda: infer(nets[form], form, *images), args.device)

    most, budget = (3, 0) if args.quick else (args.rounds, args.budget)
    steps = alternating({f: lambda f=f: step(f) for f in TIMED}, most, budget)
    inferences = alternating({f: lambda f=f: inference(f) for f in TIMED[:3]}, most, budget / 2)
    columns = {}
    for form, costs in steps.items():
        columns[form] = {
            "rounds": len(costs),
            **{f"step_p{q}_ms": f"{common.quantile(walls(costs), q / 100) * 1e3:.4g}" for q in (20, 50, 80)},
            "step_ratio": f"{ratio(steps, form, 'wall'):.4g}",
            "work_ratio": f"{ratio(steps, form, 'work'):.4g}",
        }
    for form, costs in inferences.items():
        columns[form]["inference_p50_ms"] = f"{statistics.median(walls(costs)) * 1e3:.4g}"
        columns[form]["inference_ratio"] = f"{ratio(inferences, form, 'wall'):.4g}"
    for form in ("fastreg", "stock ops"):
        share = statistics.median(c.ops / c.work for c in steps[form])
        columns[form]["ops_share"] = f"{share:.4g}"
    # The last share is that of the stock ops.
    bound = 1 / (1 - share)
    columns["fastreg"]["bound"] = f"{bound:.4g}"
    columns["fastreg"]["reached"] = f"{ratio(steps, 'stock ops', 'work') / bound:.4g}"
    return columns


# Running


# What a line says of a row's columns, where it has them.
TOLD = {
    "step_p50_ms": "step {:.4g} ms",
    "inference_p50_ms": "inference {:.4g} ms",
    "peak_bytes": "peak {:.4g} bytes",
    "ops_share": "ops' share {:.2g}",
    "bound": "bound {:.3g}",
    "reached": "reached {:.2g} of it",
}


def run_model(name, args):
    """Rows, or None where the gate is red."""
    subject = SUBJECTS[name]
    verdict = gate(subject)
    say(f"{name}: gate {'passed' if verdict.ok else 'RED'}; {verdict.text}")
    if not verdict.ok:
        return None
    if args.check:
        return []
    on_timed = tuple(args.shape or (subject.quick if args.quick else subject.timed))
    if args.device == "cuda" and not (args.shape or args.quick):
        on_timed = subject.paper
    times = measured_times(subject, on_timed, args)
    rows = []
    for shape in [on_timed] if args.quick else dict.fromkeys([subject.paper, on_timed, *subject.sizes]):
        for form in FORMS:
            row = {
                **common.environment(args.device),
                "model": name,
                "form": form,
                "shape": "x".join(map(str, shape)),
                "saved_bytes": saved_bytes(subject, form, shape),
                "gate": verdict.text,
            }
            if shape == on_timed and form in times:
                row.update(times[form])
                if not args.quick:
                    row["peak_bytes"] = fresh_peak(name, form, shape, args)
            rows.append(row)
            told = [f"  {row['shape']:12} {form:16} saved {row['saved_bytes'] / 1e9:7.3f} GB"]
            for key, text in TOLD.items():
                if key in row:
                    told.append(text.format(float(row[key])))
            say("  ".join(told))
    return rows


def fresh_peak(name, form, shape, args):
    arguments = [name, "--form", form, "--device", args.device, "--threads", args.threads, "--shape", *shape]
    return memory.fresh(arguments, __file__)["peak_bytes"]


# The table


def tables(results):
    """name of a model -> what it keeps and how long it takes, per device."""
    rows = [r for r in common.read_rows(results / RESULTS) if r["model"] in SUBJECTS]
    order = list(SUBJECTS)
    rows = sorted(common.newest(rows, KEY), key=lambda r: order.index(r["model"]))
    # A variant ("rrn-features") stands with its model.
    rows = [r | {"name": r["model"].partition("-")[0]} for r in rows]
    sections = {}
    for (name, *_), mine in grouped(rows, "name", "device_name", "threads", "isa").items():
        sections.setdefault(name, []).extend([measured(mine), saved_table(mine), time_table(mine)])
    return {name: "\n\n".join(parts) for name, parts in sections.items()}


def by_form(rows):
    """(model, shape) -> form -> row."""
    groups = {}
    for r in sorted(rows, key=lambda r: list(SUBJECTS).index(r["model"])):
        groups.setdefault((r["model"], r["shape"]), {})[r["form"]] = r
    return groups


def label(form):
    return form.replace("blocks", '`checkpoint="blocks"`')


def saved_table(rows):
    header = ["model", "images", "saved for the backward pass", "GB", "of GB", "ratio", "goal", "met"]
    lines = []
    for (name, shape), forms in by_form(rows).items():
        subject = SUBJECTS[name]
        wanted, limit = subject.goal or ("", math.inf)
        compared = [("fastreg", "plain"), ("fastreg, blocks", "plain"), ("fastreg", "stock ops")]
        for form, base in compared:
            if form not in forms or base not in forms:
                continue
            ours, theirs = (float(forms[f]["saved_bytes"]) for f in (form, base))
            if form == "fastreg, blocks" and ours == float(forms["fastreg"]["saved_bytes"]):
                continue
            has_goal = form == wanted and base == "plain"
            text = {"plain": "plain net", "stock ops": "the same on stock ops (the ops alone)"}[base]
            lines.append(
                [
                    subject.label,
                    shape,
                    f"{label(form)}, of {text}",
                    number(ours / 1e9),
                    number(theirs / 1e9),
                    number(ours / theirs, 2),
                    f"{limit}" if has_goal else "",
                    ("yes" if ours <= limit * theirs else "no") if has_goal else "",
                ]
            )
    return table(header, lines)


def time_table(rows):
    header = ["model", "images", "", "step ms", "p20 to p80", "x fastreg", "work, x fastreg"]
    header += [
        "inference ms",
        "x fastreg",
        "peak GB",
        "ops' share",
        "bound",
        f"reached (goal {GOAL_REACHED})",
    ]
    lines = []
    for (name, shape), forms in by_form(rows).items():
        for form, r in forms.items():
            if not r["step_p50_ms"]:
                continue
            lines.append(
                [
                    SUBJECTS[name].label,
                    shape,
                    label(form),
                    number(r["step_p50_ms"]),
                    f"{number(r['step_p20_ms'])} to {number(r['step_p80_ms'])}",
                    "1" if form == "fastreg" else number(r["step_ratio"]),
                    "1" if form == "fastreg" else number(r["work_ratio"]),
                    number(r["inference_p50_ms"]),
                    "1" if form == "fastreg" else number(r["inference_ratio"]),
                    number(float(r["peak_bytes"]) / 1e9) if r["peak_bytes"] else "",
                    f"{100 * float(r['ops_share']):.2g} %" if r["ops_share"] else "",
                    number(r["bound"]),
                    number(r["reached"], 2),
                ]
            )
    return table(header, lines)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="*", help=f"of {', '.join(SUBJECTS)} (default: all)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: timed at the paper's size")
    p.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    p.add_argument("--shape", type=int, nargs="+", help="size of the timed images")
    p.add_argument("--budget", type=float, default=60.0, help="seconds of steps per model (default 60)")
    p.add_argument("--rounds", type=int, default=11, help="at most so many rounds (default 11)")
    p.add_argument("--quick", action="store_true", help="small images, three rounds, no peaks; not stored")
    p.add_argument("--check", action="store_true", help="only the correctness gate")
    p.add_argument("--no-store", action="store_true", help="leave the stored rows alone")
    p.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the stored rows")
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--form", choices=TIMED, help=argparse.SUPPRESS)
    return p


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if unknown := set(args.model) - set(SUBJECTS):
        p.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    names = args.model or list(SUBJECTS)
    if args.shape and any(len(args.shape) != len(SUBJECTS[n].paper) for n in names):
        p.error(f"--shape: {len(args.shape)} sizes are not for each of {', '.join(names)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("no CUDA device")
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    common.quiet()
    if args.child:
        print(json.dumps({"peak_bytes": peak_bytes(SUBJECTS[names[0]], args.form, args.shape, args.device)}))
        return 0
    red = []
    for name in names:
        rows = run_model(name, args)
        if rows is None:
            red.append(name)
        elif rows and not (args.quick or args.no_store):
            common.append_rows(args.results / RESULTS, rows, FIELDS)
    if red:
        say(f"refused, because the gate is red: {', '.join(red)}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
