"""`fastreg train`: a net on many pairs, or on the one that it is to register."""

import contextlib
import ctypes
import datetime
import gc
import math
import os
import shlex
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from fastreg import _signals, checkpoint, models, report
from fastreg.data.pairs import TASKS, Pairs, find_pairs, read_case
from fastreg.io import InputError
from fastreg.training import RECIPES, NotFinite, Training, ranks

from . import nets
from .case import about, peak_memory, refuse_own_inputs, write_json
from .options import add_common, device_of, progress, telling, warn
from .tables import Log, append, steps
from .validation import Validation

LAST, BEST, LOG, VALIDATION, PICTURE, SETTINGS, BROKEN = (
    "last.pt", "best.pt", "log.csv", "validation.csv", "validation.png", "settings.json", "not_finite.json",
)  # fmt: skip
FILES = (LAST, BEST, LOG, VALIDATION, PICTURE, SETTINGS, BROKEN)
DEFAULTS = {
    "task": "inter", "seed": 0, "save_every": 100, "validate_most": 8, "amp": False, "compile": False,
}  # fmt: skip
RECIPE = ("steps", "learning_rate", "batch_size", "patience")
# What a run cannot change half-way; the rest of its arguments may differ when it is resumed.
KEPT = ("method", "pairs", "task", "validation", *nets.NAMES, "seed", "learning_rate", "batch_size", "amp")


def add(commands):
    command = commands.add_parser(
        "train",
        help="train a net",
        description="Trains a net. OUT becomes a folder with last.pt and best.pt (for fastreg apply --weights), log.csv, "
        "validation.csv and validation.png. Ctrl-C saves and ends; --resume goes on. "
        "Several GPUs: torchrun --nproc-per-node=N -m fastreg.train ...",
    )
    command.add_argument("--method", choices=sorted(models.MODELS))
    command.add_argument(
        "--pairs",
        metavar="CSV|FOLDER",
        help="csv: columns fixed, moving and perhaps fixed_labels, moving_labels, fixed_landmarks, moving_landmarks, mask; "
        "paths relative to it. Folder: images, or images/, labels/ and landmarks/ with the same names",
    )
    command.add_argument(
        "--task",
        choices=TASKS,
        help="which pairs of a folder: inter (default): all; intra: names that agree up to the last _; one-shot: the only one",
    )
    command.add_argument(
        "--validation", metavar="CSV|FOLDER", help="other pairs, to validate on (default: those trained on)"
    )
    command.add_argument("-o", "--out", metavar="OUT", required=True, help="folder of the run")
    command.add_argument(
        "--resume", action="store_true", help="go on from OUT/last.pt, with the arguments it was started with"
    )
    nets.add_arguments(command)
    group = command.add_argument_group("training")
    group.add_argument("--steps", type=int, help="of the optimiser (default: the paper's)")
    group.add_argument("--minutes", type=float, help="end after so many, if --steps are not done before")
    group.add_argument("--learning-rate", type=float, help="of Adam (default: the paper's)")
    group.add_argument(
        "--batch-size", type=int, help="pairs a step, over all processes (default: the paper's)"
    )
    group.add_argument(
        "--patience", type=int, metavar="N", help="end after N epochs without a better mean loss"
    )
    group.add_argument("--seed", type=int, help="of weights, order and noise (default: 0)")
    group.add_argument("--amp", action="store_true", default=None, help="bf16 convolutions")
    group.add_argument("--compile", action="store_true", default=None, help="torch.compile")
    group.add_argument(
        "--validate-every", type=int, metavar="N", help="steps (default: a twentieth of them, 10 at least)"
    )
    group.add_argument("--validate-most", type=int, metavar="N", help="pairs (default: 8)")
    group.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: 100)")
    add_common(command)
    command.set_defaults(run=_run)


def _settings(args, saved):
    """All arguments of the run: given ones before those of the checkpoint, these before defaults."""
    names = (*KEPT, *DEFAULTS, *RECIPE, "validate_every")
    given = {name: getattr(args, name) for name in dict.fromkeys(names) if getattr(args, name) is not None}
    for name in ("pairs", "validation"):
        if name in given:
            given[name] = os.path.abspath(given[name])
    if saved is not None:
        for name in KEPT:
            old = saved["settings"].get(name)
            if name in given and given[name] != old:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(
                    f"{args.out}: was started with {flag} {old}, and cannot be resumed with {given[name]}"
                )
        given = {**saved["settings"], **given}
    for name in ("method", "pairs"):
        if name not in given:
            raise InputError(f"--{name} is missing")
    settings = {**DEFAULTS, **given}
    for name in ("steps", "batch_size", "patience", "validate_every", "validate_most", "save_every"):
        if settings.get(name) is not None and settings[name] < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {settings[name]}")
    rate = settings.get("learning_rate")
    if rate is not None and not 0 < rate < math.inf:
        raise InputError(f"--learning-rate must be positive, got {rate}")
    if args.minutes is not None and not args.minutes > 0:
        raise InputError(f"--minutes must be positive, got {args.minutes}")
    return settings


@contextlib.contextmanager
def _processes(args):
    """Yields the device; under torchrun the processes find each other."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield device_of(args)
        return
    if args.device is None and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = device_of(args)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The others wait while the first validates.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=4))
    try:
        yield device
    except BaseException as error:
        # The end of the group would wait for what this process has begun with the others, who may not come: so it never ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            # What ended the other one, it says itself.
            raise InputError("another process of this run has ended") from error
        raise
    # Garbage may hold DDP, which holds the group, and gloo's threads last as long as the group: one that lets go of a tensor
    # while the interpreter ends aborts the process.
    gc.collect()
    dist.destroy_process_group()


def _run(args):
    out = Path(args.out)
    saved = None
    if args.resume:
        if not (out / LAST).exists():
            raise InputError(f"{out}: holds no {LAST} to resume")
        saved = checkpoint.load(out / LAST)
        if "optimizer" not in saved or not all(
            isinstance(saved.get(k), dict) for k in ("settings", "counted")
        ):
            raise InputError(f"{out / LAST}: holds no state of a training")
    settings = _settings(args, saved)
    _refuse_own_inputs(args, settings)
    report.require_matplotlib()
    with _processes(args) as device, _folder(out, args) if ranks()[0] == 0 else contextlib.nullcontext():
        stopped = _Run(out, settings, device, args, saved).train()
    if stopped:
        raise KeyboardInterrupt
    return 0


def _refuse_own_inputs(args, settings):
    paths = [settings.get(name) for name in ("pairs", "validation")]
    refuse_own_inputs(args, paths, FILES)
    for path in paths:
        with contextlib.suppress(OSError, TypeError):  # not there, not given
            if os.path.samefile(path, args.out) and not Path(path, "images").is_dir():
                raise InputError(f"{args.out}: holds the images, and {PICTURE} would be one of them")


@contextlib.contextmanager
def _folder(out, args):
    """OUT, made where it is missing, for this run alone; gone again where nothing was written."""
    if not args.out:
        raise InputError("the output folder must have a name, got an empty one")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: exists and is not a folder")
    taken = [name for name in FILES if os.path.lexists(out / name)]
    if taken and not (args.force or args.resume):
        raise InputError(f"{out}: already holds {taken[0]}; --resume goes on with it, --force replaces it")
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made: {(error.strerror or str(error)).lower()}") from error
    try:
        with _lock(out):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def _lock(folder):
    """Holds it until the end, or until the process ends however it does."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{folder}: another run is writing to it") from error
        except (ImportError, OSError):  # a system or file system without locks
            pass
        yield


class _Run:
    """A training and its folder."""

    def __init__(self, out, settings, device, args, saved):
        self.out, self.settings, self.device, self.args = out, settings, device, args
        method = settings["method"]
        self.preprocessing = nets.preprocessing_of(_Namespace(settings), method)
        pairs = find_pairs(settings["pairs"], settings["task"])
        validated = pairs
        if settings.get("validation") is not None:
            validated = find_pairs(settings["validation"], settings["task"])
        self.first = ranks()[0] == 0
        # The first pair tells how many axes images have.
        ndim = read_case(pairs[0], warn if self.first else lambda message: None).fixed_grid.nd
        torch.manual_seed(settings["seed"] % 2**63)
        model = nets.model_of(_Namespace(settings), method, ndim).to(device)
        recipe = RECIPES[method]
        recipe = replace(recipe, **{k: settings[k] for k in RECIPE if settings.get(k) is not None})
        world = ranks()[1]
        if settings.get("batch_size") is None and recipe.batch_size % world:
            recipe = replace(recipe, batch_size=world)
        # Kept, so that a run that is resumed by another number of processes goes on as it was, or says why not.
        settings["batch_size"] = recipe.batch_size
        self.training = Training(
            model,
            Pairs(pairs, self.preprocessing, ndim=ndim),
            recipe,
            seed=settings["seed"],
            amp=settings["amp"],
            compile=settings["compile"],
        )
        # Evenly over the list: the first pairs of a folder share one fixed image.
        some = validated[:: max(1, len(validated) // settings["validate_most"])][: settings["validate_most"]]
        self.validation = Validation(some, self.preprocessing, ndim)
        self.best, self.seconds, self.begun = math.inf, 0.0, saved is not None
        if saved is not None:
            try:
                self.training.restore(saved)
                self.best, self.seconds = float(saved["best"]), float(saved["seconds"])
            except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"{out / LAST}: does not fit a training of {method} by this version"
                ) from error
        self.validate_every = settings.get("validate_every") or max(10, recipe.steps // 20)
        self.stop = False

    def content(self):
        return {
            "method": self.settings["method"],
            "preset": self.settings.get("preset") or "paper",
            "arguments": self.training.model.arguments,
            "preprocessing": self.preprocessing.plain(),
            "settings": self.settings,
            "best": self.best,
            "seconds": self.seconds,
            **self.training.state(),
        }

    def best_content(self):
        """To apply, not to resume: without the optimiser's state, which is most of the bytes."""
        return {name: value for name, value in self.content().items() if name != "optimizer"}

    def train(self):
        """Returns whether a signal ended it."""
        training, args, recipe = self.training, self.args, self.training.recipe
        begin, before = time.perf_counter(), self.seconds
        if training.done and (not self.first or training.step in steps(self.out / VALIDATION)):
            if self.first and not args.quiet:
                with telling():
                    print(
                        f"{self.out}: is done after {training.step} steps; more --steps (or --patience) go on"
                    )
            return False
        if self.first:
            self.validation.read()
            if not args.quiet:
                parameters = sum(p.numel() for p in training.model.parameters())
                with telling():
                    print(
                        f"{self.settings['method']}: {parameters:,} parameters, {len(training.pairs)} pairs, {self.device}"
                    )
        log = None
        with self._interruptible(), contextlib.ExitStack() as stack:
            if self.first:
                after = stack.enter_context(progress(args, total=recipe.steps, initial=training.step))
            while not (training.done or self._over(begin)):
                try:
                    told = training.advance()
                except Exception as error:
                    if self.first and isinstance(error, NotFinite):
                        write_json(
                            self.out / BROKEN,
                            {"step": error.step, "pairs": error.names, "terms": error.terms},
                        )
                    if log is not None:
                        # A pair that cannot be read, say: the weights are those of the last step.
                        try:
                            checkpoint.save(self.out / LAST, self.content())
                        except OSError as also:
                            warn(f"{also.filename}: {also.strerror}")
                    raise
                self.seconds = before + time.perf_counter() - begin
                if not self.first:
                    continue
                if log is None:
                    log = self._begin(training.step - 1)
                    stack.callback(log.close)
                memory = peak_memory(self.device)
                told["memory_mb"] = memory.get("device", memory["process"])
                rate = training.optimizer.param_groups[0]["lr"]
                log.write(
                    {"step": training.step, **told, "learning_rate": rate, "seconds": round(self.seconds, 3)}
                )
                names = ("loss", "similarity", "regularity", "folding", "memory_mb")
                after({name: told[name] for name in names if told.get(name) is not None})
                validated = training.step % self.validate_every == 0
                if validated or training.step % self.settings["save_every"] == 0:
                    checkpoint.save(self.out / LAST, self.content())
                if validated:
                    self._validate()
            if self.first:
                if log is None:
                    self._begin(training.step).close()
                if training.step not in steps(self.out / VALIDATION):
                    checkpoint.save(self.out / LAST, self.content())
                    self._validate()
        if self.first and not args.quiet:
            with telling():
                print(f"{training.step} steps, {self.seconds:.0f} s; written to {self.out}")
                if self.stop and not training.done:
                    begin = "fastreg train" if ranks()[1] == 1 else "torchrun ... -m fastreg.train"
                    print(f"go on with: {begin} --resume -o {shlex.quote(str(self.out))}")
        return self.stop

    def _begin(self, step):
        """Once a step has shown that all is well: what another run left goes, and what this one logged after `step`."""
        if not self.begun:
            old = [name for name in FILES if os.path.lexists(self.out / name)]
            if old:
                # First, as it may find the disk full: then the other run is still whole.
                fresh = self.out / f".{LAST}"
                checkpoint.save(fresh, self.content())
                for name in old:
                    (self.out / name).unlink()
                fresh.replace(self.out / LAST)
            self.begun = True
        write_json(self.out / SETTINGS, {**self.settings, **about(self.device)})
        return Log(self.out / LOG, step)

    def _over(self, begin):
        minutes = self.args.minutes
        over = self.stop or (minutes is not None and time.perf_counter() - begin >= 60 * minutes)
        if ranks()[1] > 1:
            # All end together, or the others would wait for this one.
            flag = torch.tensor(float(over), device=self.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            over = bool(flag)
        return over

    def _interruptible(self):
        """The first Ctrl-C (or its like) ends the run after its step, with everything saved; a Ctrl-C more than a second later at once."""
        asked = math.inf

        def ask(number, frame):
            # Schedulers and torchrun send some signals twice.
            nonlocal asked
            if number == signal.SIGINT and time.monotonic() > asked + 1:
                signal.default_int_handler(number, frame)
            asked, self.stop = min(asked, time.monotonic()), True

        numbers = _signals.named("SIGINT", "SIGTERM", "SIGHUP")
        # Ignored, as by nohup and &: stays so.
        return _signals.handled([n for n in numbers if signal.getsignal(n) != signal.SIG_IGN], ask)

    def _validate(self):
        row, draw = self.validation(self.training.model)
        row = {"step": self.training.step, **row}
        if row["loss"] < self.best:
            self.best = row["loss"]
            checkpoint.save(self.out / BEST, self.best_content())
            checkpoint.save(self.out / LAST, self.content())
        draw(self.out / PICTURE, title=f"step {row['step']}")
        # Last: a step with a row has all of it.
        append(self.out / VALIDATION, row)
        if not self.args.quiet:
            units = {"tre": " mm", "assd": " mm"}
            # A net that moves nothing scores as before.
            before = {k: f"{row[k + '_before']:.4g} -> " for k in row if k + "_before" in row}
            told = [
                f"{k} {before.get(k, '')}{v:.4g}{units.get(k, '')}"
                for k, v in row.items()
                if k != "step" and not k.endswith("_before")
            ]
            with telling():
                print(f"step {row['step']}: {', '.join(told)}")


class _Namespace:
    """Settings as arguments; None where there is none."""

    def __init__(self, settings):
        self.__dict__.update(settings)

    def __getattr__(self, name):
        return None
