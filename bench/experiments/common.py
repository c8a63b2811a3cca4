"""What the experiments share: scans, training for equal time, held-out loss, stored tables and pictures.

Each experiment is a module with `main`: `--setting small` (two cores, at most 15 minutes a method) or `full` (the paper's sizes, a GPU).
Time is the process's CPU time over its threads, so that methods compared on a machine that others use get the same share of it;
on a GPU it is wall clock. A method has been trained when its held-out loss has stopped improving (`PATIENCE` looks) or its time is up;
the weights of the best look are kept.
"""

import argparse
import copy
import io
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench import common
from fastreg._files import replacing, write_bytes
from fastreg.training import Training

RESULTS = common.RESULTS / "experiments"
GROUP = ("setting", "device_name", "threads")  # what rows of one table have in common
PATIENCE = 6


class Unusable(Exception):
    """One line for the user."""


class Parser(argparse.ArgumentParser):
    """Arguments of every experiment. minutes: of training a method, by setting, the default first; methods: their names, in the order
    of the table; long: with --seed and --state, for an experiment that passes both on to `train`.

    What it parses has `minutes` resolved, `methods`, those asked for, in their order, `every`, all of them, and the threads are set.
    """

    def __init__(self, doc, minutes, methods, *, long=False):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.minutes, self.every = minutes, tuple(methods)
        default = ", ".join(f"{setting}: {m:g}" for setting, m in minutes.items())
        names = ", ".join(self.every)
        first = next(iter(minutes))
        self.add_argument("--setting", choices=list(minutes), default=first, help=f"default: {first}")
        self.add_argument("--minutes", type=float, help=f"of training a method (default: {default})")
        self.add_argument("--steps", type=int, help="of training a method at most")
        self.add_argument(
            "--methods", nargs="+", help=f"only these of {names}; stored rows of the others stay"
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.add_argument("--device", choices=["cpu", "cuda"], default=device)
        self.add_argument("--threads", type=int, default=2)
        self.add_argument(
            "--results", type=Path, default=RESULTS, help="folder for the table and the picture"
        )
        self.add_argument("--no-store", action="store_true", help="leave the results alone")
        if long:
            self.add_argument("--seed", type=int, default=0, help="of weights and pairs (default: 0)")
            self.add_argument(
                "--state", type=Path, help="folder that keeps each training at every look, to go on from"
            )
        self.shared = len(self._actions)

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name in ("minutes", "steps", "threads"):
            value = getattr(args, name)
            if value is not None and not value > 0:
                self.error(f"--{name} must be above 0, got {value}")
        if args.minutes is None:
            args.minutes = self.minutes[args.setting]
        if unknown := [m for m in args.methods or () if m not in self.every]:
            raise Unusable(f"--methods must be of {', '.join(self.every)}, got {', '.join(unknown)}")
        args.methods = [m for m in self.every if not args.methods or m in args.methods]
        args.every = self.every
        if not args.no_store and args.results.resolve() == RESULTS.resolve():
            for action in self._actions[self.shared :]:
                if getattr(args, action.dest) != action.default:
                    flag = action.option_strings[0]
                    raise Unusable(
                        f"with {flag} the rows are not those of the table: --results FOLDER or --no-store"
                    )
        torch.set_num_threads(args.threads)
        return args


def scans(name):
    """The arrays of FASTREG_DATA/NAME.npz."""
    folder = os.environ.get("FASTREG_DATA")
    if not folder or not Path(folder).is_dir():
        raise Unusable("FASTREG_DATA must name the folder with the scans (NAME.npz)")
    path = Path(folder) / f"{name}.npz"
    if not path.exists():
        raise Unusable(f"FASTREG_DATA holds no {path.name}")
    return dict(np.load(path))


def tensor(array):
    """(..., *spatial) -> (1, 1, *spatial) fp32."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None, None]


def unit(array, low=None, high=None):
    """Clipped to [low, high] (its own range by default) and scaled to [0, 1]."""
    array = np.asarray(array, dtype=np.float32)
    low, high = array.min() if low is None else low, array.max() if high is None else high
    return (np.clip(array, low, high) - low) / (high - low)


def clock(device):
    """Seconds: CPU time over threads, on a GPU wall clock."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


@dataclass
class Trained:
    """steps and seconds spent; the best held-out loss, at which step; why training ended; the looks (step, seconds, loss); what was watched
    (step, seconds, value); seed."""

    steps: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_step: int = 0
    ended: str = ""
    looks: list = field(default_factory=list)
    watched: list = field(default_factory=list)
    seed: int = 0


@torch.no_grad()
def held_out_loss(model, pairs):
    """Mean of the model's own loss over samples."""
    model.eval()
    losses = []
    for s in pairs:
        f, m = (t.to(next(model.parameters()).device) for t in (s.fixed, s.moving))
        losses.append(float(model.loss(f, m, model(f, m))))
    return sum(losses) / len(losses)


class _Kept:
    """A training in a file, as it was at its last look; without a path, nothing. about: what it must be of."""

    def __init__(self, path, about):
        self.path, self.about = path, about

    def load(self):
        if self.path is None or not self.path.exists():
            return None
        found = torch.load(self.path, map_location="cpu", weights_only=True)
        if found["about"] != self.about:
            raise Unusable(f"{self.path}: is of another training, {found['about']}; not {self.about}")
        return found

    def save(self, **content):
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            torch.save({"about": self.about, **content}, buffer)
            write_bytes(self.path, buffer.getbuffer())


def state_of(args, *names):
    """Where --state keeps the training of these names; None without it."""
    text = "_".join((args.setting, *names, str(args.seed)))
    return args.state and args.state / "".join(c if c.isalnum() or c in "._-" else "-" for c in f"{text}.pt")


def train(
    model,
    pairs,
    held_out,
    recipe,
    *,
    minutes,
    steps=None,
    looks=25,
    seed=0,
    tell=common.say,
    patience=PATIENCE,
    watch=None,
    watched="score",
    state=None,
):
    """Trains until minutes, steps or the recipe are over, or the held-out loss has not improved for `patience` looks of some `looks`
    in the whole time; leaves the model with the weights of the best look (held_out None: the last). A recipe that watches
    validation looks at the held-out loss too.
    watch: model -> a number for the picture, at each look, called `watched`; it decides on nothing. state: a path, which has the
    training as of the last look, and from which it goes on. Returns Trained.
    """
    device = next(model.parameters()).device
    validation = None if held_out is None else lambda model: held_out_loss(model, held_out)
    training = Training(model, pairs, recipe, seed=seed, validation=validation)
    done, since, best = Trained(seed=seed), 0, None
    kept = _Kept(
        state, {"arguments": repr(getattr(model, "arguments", None)), **asdict(recipe), "seed": seed}
    )
    if (found := kept.load()) is not None:
        training.restore(found["training"])
        done, since, best = Trained(**found["trained"]), found["since"], found["best"]
        tell(f"    goes on at step {training.step}, {done.seconds:.0f} s")
    budget = minutes * 60

    def end():
        if done.seconds >= budget:
            return "time"
        if (steps is not None and training.step >= steps) or training.step >= recipe.steps:
            return "steps"
        return "no improvement" if since >= patience or training.done else ""

    # Looking costs no training time.
    next_look = done.seconds + budget / looks
    done.ended = end()
    while not done.ended:
        begin = clock(device)
        training.advance()
        done.seconds += clock(device) - begin
        done.steps = training.step
        by_steps = steps is not None and training.step % max(1, steps // looks) == 0
        if not (by_steps or done.seconds >= next_look or end()):
            continue
        next_look = done.seconds + budget / looks
        line = f"    step {training.step}, {done.seconds:.0f} s"
        if held_out is not None:
            loss = held_out_loss(model, held_out)
            done.looks.append((training.step, done.seconds, loss))
            line += f": held-out loss {loss:.5f}" if held_out is not pairs else f": loss {loss:.5f}"
            if loss < done.best:
                done.best, done.best_step, since = loss, training.step, 0
                best = copy.deepcopy(model.state_dict())
            else:
                since += 1
        if watch is not None:
            model.eval()
            done.watched.append((training.step, done.seconds, float(watch(model))))
            line += f", {watched} {done.watched[-1][2]:.4f}"
        tell(line)
        done.ended = end()
        kept.save(training=training.state(), trained=asdict(done), since=since, best=best)
    if best is not None:
        model.load_state_dict(best)
    model.eval()
    return done


@torch.no_grad()
def seconds_per_pair(model, sample, repeats=5):
    """Median seconds of a prediction, wall clock."""
    model.eval()
    f, m = (t.to(next(model.parameters()).device) for t in (sample.fixed, sample.moving))
    model(f, m)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        model(f, m)
        if f.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def columns(model, recipe, done, sample):
    """What a row says of a net beside its scores. done: of `train`, whose best held-out loss is "loss"; sample: what it is timed on."""
    return {
        "seconds_per_pair": f"{seconds_per_pair(model, sample):.3f}",
        "parameters": parameters(model),
        "learning_rate": recipe.learning_rate,
        "seed": done.seed,
        "steps": done.steps,
        "seconds": f"{done.seconds:.0f}",
        "ended": done.ended,
        "best_step": done.best_step,
        "loss": f"{done.best:.5f}",
    }


def store(args, name, rows, key="method"):
    """Rows, each a dict, into RESULTS/<name>.csv in place of those of its GROUP; a run of some methods leaves the
    rows of the others, one of a seed those of other seeds. key: the column with the methods' names.
    """
    if args.no_store:
        return
    about = {**common.environment(args.device), "setting": args.setting}
    rows = [{**about, **row} for row in rows]
    path = args.results / f"{name}.csv"

    def which(r):
        return r[key], str(r.get("seed") or 0)

    anew = {which(r) for r in rows}

    def merged(old):
        def mine(r):
            return all(r[k] == str(about[k]) for k in GROUP)

        others = [r for r in old if not mine(r)]
        left = [r for r in old if mine(r) and which(r) not in anew and r[key] in args.every]
        place = {method: k for k, method in enumerate(args.every)}
        return others + sorted([*rows, *left], key=lambda r: (place.get(r[key], -1), which(r)[1]))

    common.rewrite_rows(path, merged)


def picture(args, name, figure, *, dpi=110, colours=None):
    """Writes a matplotlib figure to RESULTS/<name>.png, small enough to keep in the repository; <name>_full.png of the full setting,
    <name>_cuda.png of a GPU, <name>_partial.png of some methods (not kept). colours: 256 halve the bytes, for pictures of one or two colour maps: several
    come out in bands.
    """
    if args.no_store:
        return
    args.results.mkdir(parents=True, exist_ok=True)
    parts = [name]
    parts += [args.setting] if args.setting != "small" else []
    parts += [args.device] if args.device != "cpu" else []
    parts += ["partial"] if len(args.methods) < len(args.every) else []
    with replacing(args.results / f"{'_'.join(parts)}.png") as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
        if colours:
            from PIL import Image

            with Image.open(temporary) as image:
                small = image.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
            small.save(temporary, format="png", optimize=True)


def run(experiment, argv=None):
    """Calls experiment(args) as a command: exit status 2 and one line for what cannot be used."""
    common.quiet()
    try:
        return experiment(argv) or 0
    except Unusable as error:
        print(f"bench.experiments: {error}", file=sys.stderr)
        return 2
