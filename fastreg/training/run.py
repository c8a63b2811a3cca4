"""A training and its folder: log, checkpoints, validation, going on where it was left."""

import contextlib
import hashlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from fastreg import _signals, models, report
from fastreg._console import progress, telling, warn
from fastreg._files import InputError, Name, held, remade, settle, write_json
from fastreg._refusals import refuse
from fastreg.data.pairs import Pairs
from fastreg.data.preprocessing import Preprocessing
from fastreg.data.sample import Sample
from fastreg.models.recipe import Recipe
from fastreg.outcome import about, peak_memory

from . import checkpoint, schema
from .distributed import Stopped, ranks
from .log import Log, append, steps
from .step import PLACE, NotFinite, Training, recipe_of
from .validation import Validation

LAST, BEST, LOG, VALIDATION, PICTURE, SETTINGS, BROKEN = (
    "last.pt", "best.pt", "log.csv", "validation.csv", "validation.png", "settings.json", "not_finite.json",
)  # fmt: skip
ALIGNMENTS = "alignments"  # a folder, of pairs that are aligned first
FILES = (LAST, BEST, LOG, VALIDATION, PICTURE, SETTINGS, BROKEN)
LENGTH = ("steps", "patience")  # of a recipe: what another start may change

Samples = Sequence[Sample]
Resume = bool | Literal["auto"] | Mapping[str, Any]


class Run:
    """Trains a model into a folder, and goes on there when it is started again.

        run = Run("runs/mine", model, pairs, validation=others)
        run.train()           # or: for told in run: print(told["loss"])
        model = run.best()    # the weights that validated best

    The folder holds last.pt, best.pt (by validation loss), log.csv (a row a step), validation.csv, settings.json and, where
    matplotlib is installed, validation.png. What is continued is on a CPU bit for bit what would have been. Ctrl-C (SIGTERM,
    SIGHUP) ends after the step, with everything saved, as KeyboardInterrupt. Under torchrun, inside of `processes()`, the
    batches are split and the first process writes.

    Args:
        folder: made where it is missing.
        model, recipe, seed, amp, compile: as for Training. A recipe with a labels_weight takes samples with labels, as
            Pairs(..., labels=True) makes them.
        pairs: any sequence of Sample, or fastreg.data.Pairs of files.
        validation: the same; None: the pairs themselves; or a function of the model that returns numbers by name, among them
            "loss" (lower is better). A recipe that watches "validation" asks for it at each epoch's end too.
        resume: "auto": goes on from last.pt where the folder has one; True: it must have one; False: it must not. Or what
            `resumable` has read.
        replace (bool): a run that is there makes room once the new one has done a step; with resume=False.
        minutes (float or None): ends after so many, each time it is started, if the recipe's steps are not done before.
        save_every (int): steps between checkpoints. validate_every (int or None): between validations; None: a twentieth of
            the steps, 10 at least. validate_most (int): pairs of a validation.
        preprocessing (Preprocessing or None): how samples are made of scans, for `fastreg apply`; None: that of Pairs.
        settings (dict or None): more to keep in settings.json and the checkpoints; plain values.
        quiet (bool): `train` prints nothing. progress (bool): it shows a bar, though stderr is no terminal.

    Raises: InputError where the folder cannot be used as asked, or what it holds is another training.
    """

    def __init__(
        self,
        folder: Name,
        model: nn.Module,
        pairs: Samples,
        *,
        validation: Samples | Callable[[nn.Module], Mapping[str, float]] | None = None,
        recipe: Recipe | None = None,
        seed: int = 0,
        resume: Resume = "auto",
        replace: bool = False,
        amp: bool = False,
        compile: bool = False,
        minutes: float | None = None,
        save_every: int = 100,
        validate_every: int | None = None,
        validate_most: int = 8,
        preprocessing: Preprocessing | None = None,
        settings: Mapping[str, Any] | None = None,
        quiet: bool = False,
        progress: bool = False,
    ) -> None:
        for name, value in (
            ("save_every", save_every),
            ("validate_every", validate_every),
            ("validate_most", validate_most),
        ):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if minutes is not None and not minutes > 0:
            raise InputError(f"minutes must be positive, got {minutes}")
        self.folder = Path(folder)
        self.first = ranks()[0] == 0
        saved = resumable(folder, resume)
        self.begun, self.replace = saved is not None, replace
        if self.first and not self.begun:
            _refuse_taken(folder, replace)
        self.training = Training(
            model,
            pairs,
            _recipe(recipe, model, saved),
            validation=lambda _: self._look(),
            seed=seed,
            amp=amp,
            compile=compile,
        )
        if isinstance(pairs, Pairs) and preprocessing is None:
            preprocessing = pairs.preprocessing
        self.preprocessing = preprocessing
        self.settings = dict(
            {"seed": seed, "amp": amp, **asdict(self.training.recipe)} if settings is None else settings
        )
        validated = pairs if validation is None else validation
        labels_weight = self.training.recipe.labels_weight
        self.validation = (
            validated if callable(validated) else Validation(validated, validate_most, labels_weight)
        )
        self._seen: tuple[int, dict[str, float]] | None = None  # step, and what validation found then
        self.best_loss, self.seconds, self.minutes = math.inf, 0.0, minutes
        self.save_every = save_every
        self.validate_every = validate_every or max(10, self.training.recipe.steps // 20)
        self.quiet, self.progress = quiet, progress
        # Of the last time it was started: came to an end with all saved; by a signal.
        self.ended = self.stopped = False
        if saved is not None:
            self._restore(saved)

    def _restore(self, saved: Mapping[str, Any]) -> None:
        training, last = self.training, self.folder / LAST
        best: Any = saved.get("best")
        seconds: Any = saved.get("seconds")
        try:
            if not (schema.fits(best, float) or best == math.inf) or not schema.fits(seconds, float):
                refuse(ValueError, PLACE, f"best {best}, seconds {seconds}")
            training.restore(saved)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{last}: does not fit a training of {self.method} by this version ({str(error).removeprefix(PLACE)})"
            ) from error
        self.best_loss, self.seconds = float(best), float(seconds)
        if saved.get("pairs", self.listed) != self.listed:
            raise InputError(
                f"{last}: was trained on {_told(saved['pairs'])}, and cannot go on with {_told(self.listed)}"
                " of other names; start another run"
            )
        was = {**saved["recipe"], "seed": saved["seed"]}
        for name, value in {**asdict(training.recipe), "seed": training.seed}.items():
            if name not in LENGTH and was.get(name) != value:
                raise InputError(
                    f"{last}: was started with {name} {was.get(name)}, and cannot go on with {value}"
                )

    @property
    def method(self) -> str:
        """The model's name: one of fastreg.models.MODELS, or that of its class."""
        cls = type(self.training.model)
        known = [name for name, one in models.MODELS.items() if one is cls]
        return known[0] if known else cls.__qualname__

    @property
    def done(self) -> bool:
        """Whether the recipe has come to its end, and all is written."""
        written = not self.first or self.training.step in steps(self.folder / VALIDATION)
        return self.training.done and written

    @property
    def listed(self) -> dict[str, Any]:
        """Which pairs they are, wherever they lie: how many, and of files a digest of their names in order."""
        pairs = self.training.pairs
        if not isinstance(pairs, Pairs):
            return {"number": len(pairs)}
        names = "\n".join(pair.name for pair in pairs.pairs)
        return {"number": len(pairs), "names": hashlib.sha256(names.encode("utf-8", "replace")).hexdigest()}

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "method": self.method,
            "preset": self.settings.get("preset") or "paper",
            "arguments": getattr(self.training.model, "arguments", {}),
            "preprocessing": None if self.preprocessing is None else self.preprocessing.plain(),
            "settings": self.settings,
            "pairs": self.listed,
            "best": self.best_loss,
            "seconds": self.seconds,
            **self.training.state(),
        }

    def best(self) -> nn.Module:
        """The model with the weights of best.pt, for use. InputError where there is none yet."""
        model = self.training.model
        model.load_state_dict(checkpoint.load(self.folder / BEST)["weights"])
        return model.eval()

    def train(self) -> None:
        """All steps to the end, telling how it goes unless quiet. KeyboardInterrupt where a signal ended it, after all is saved."""
        if self.done:
            self._tell(
                f"{self.folder}: is done after {self.training.step} steps; more steps (or patience) go on"
            )
            return
        try:
            for _ in self._steps(tell=not self.quiet, bar=self.progress):
                pass
        finally:
            if self.ended:
                self._tell(f"{self.training.step} steps, {self.seconds:.0f} s; written to {self.folder}")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """A dict a step: what `Training.advance` tells, "step", and in the first process what log.csv gets and, after a validation,
        "validation". Prints nothing. Leaving the loop saves.
        """
        return self._steps()

    def _tell(self, line: str) -> None:
        if self.first and not self.quiet:
            with telling():
                print(line)

    def _steps(self, tell: bool = False, bar: bool = False) -> Iterator[dict[str, Any]]:
        training, begin, before = self.training, time.perf_counter(), self.seconds
        self.ended = self.stopped = False
        if self.done:
            return
        log, saved = None, -1

        def save() -> None:
            nonlocal saved
            checkpoint.save(self.folder / LAST, self.content())
            saved = training.step

        with contextlib.ExitStack() as stack:
            stack.callback(training.release)
            if self.first:
                stack.enter_context(_folder(self.folder))
                if not self.begun:  # by another one in the meantime
                    _refuse_taken(self.folder, self.replace)
                if isinstance(self.validation, Validation):
                    self.validation.read()
                if tell:
                    parameters = sum(p.numel() for p in training.model.parameters())
                    pairs = f"{len(training.pairs)} pair{'s' * (len(training.pairs) != 1)}"
                    self._tell(f"{self.method}: {parameters:,} parameters, {pairs}, {training.device}")
            asked = stack.enter_context(_interruptible())
            if self.first:
                shown = progress(
                    total=training.recipe.steps, initial=training.step, quiet=not tell, always=bar
                )
                after = stack.enter_context(shown)
            while not (training.done or self._over(begin, asked)):
                try:
                    told = training.advance()
                except Exception as error:
                    if self.first and isinstance(error, NotFinite):
                        write_json(
                            self.folder / BROKEN,
                            {"step": error.step, "pairs": error.names, "terms": error.terms},
                        )
                    if log is not None:
                        # A pair that cannot be read, say: the weights are those of the last step.
                        try:
                            save()
                        except OSError as also:
                            warn(f"{also.filename}: {also.strerror}")
                    raise
                self.seconds = before + time.perf_counter() - begin
                row: dict[str, Any] = {"step": training.step, **told}
                if self.first:
                    if log is None:
                        log = self._begin(training.step - 1)
                        stack.callback(log.close)
                    memory = peak_memory(training.device)
                    row["memory_mb"] = memory.get("device", memory["process"])
                    row["learning_rate"] = training.optimizer.param_groups[0]["lr"]
                    row["seconds"] = round(self.seconds, 3)
                    log.write(row)
                    names = ("loss", "similarity", "regularity", "folding", "memory_mb")
                    after({name: row[name] for name in names if row.get(name) is not None})
                    watched = self._seen is not None and self._seen[0] == training.step
                    validated = watched or training.step % self.validate_every == 0
                    if validated or training.step % self.save_every == 0:
                        save()
                    if validated:
                        row["validation"] = self._validate(tell)
                try:
                    yield row
                except GeneratorExit:
                    if self.first and saved != training.step:
                        save()
                    raise
            if self.first:
                if log is None:
                    self._begin(training.step).close()
                if training.step not in steps(self.folder / VALIDATION):
                    save()
                    self._validate(tell)
            self.ended, self.stopped = True, bool(asked)
        if self.stopped:
            raise Stopped

    def _begin(self, step: int) -> Log:
        """Once a step has shown that all is well: what another run left goes, and what this one logged after `step`."""
        if not self.begun:
            if any(os.path.lexists(self.folder / name) for name in FILES):
                with remade(self.folder, FILES) as fresh:
                    checkpoint.save(fresh / LAST, self.content())
            self.begun = True
        write_json(self.folder / SETTINGS, {**self.settings, **about(self.training.device)})
        return Log(self.folder / LOG, step)

    def _over(self, begin: float, asked: Sequence[float]) -> bool:
        over = bool(asked) or (self.minutes is not None and time.perf_counter() - begin >= 60 * self.minutes)
        if self.training.world > 1:
            # All end together, or the others would wait for this one.
            flag = torch.tensor(float(over), device=self.training.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            over = bool(flag)
        return over

    def _look(self) -> dict[str, float]:
        """What validation finds at this step: looked at once, whoever asks."""
        step = self.training.step
        if self._seen is None or self._seen[0] != step:
            found = dict(self.validation(self.training.model))
            if "loss" not in found:
                refuse(ValueError, PLACE, f"a validation must return a loss, got {', '.join(found)}")
            self._seen = step, found
        return self._seen[1]

    def _validate(self, tell: bool) -> dict[str, float]:
        found = self._look()
        row: dict[str, Any] = {"step": self.training.step, **found}
        if row["loss"] < self.best_loss:
            self.best_loss = row["loss"]
            # To apply, not to resume: without the optimiser's state, which is most of the bytes.
            best = {name: value for name, value in self.content().items() if name != "optimizer"}
            checkpoint.save(self.folder / BEST, best)
            checkpoint.save(self.folder / LAST, self.content())
        if isinstance(self.validation, Validation) and report.can_draw():
            self.validation.draw(self.folder / PICTURE, title=f"step {row['step']}")
        # Last: a step with a row has all of it.
        append(self.folder / VALIDATION, row)
        if tell:
            units = {"tre": " mm", "assd": " mm"}
            # A net that moves nothing scores as before.
            before = {k: f"{row[k + '_before']:.4g} -> " for k in row if k + "_before" in row}
            told = [
                f"{k} {before.get(k, '')}{v:.4g}{units.get(k, '')}"
                for k, v in found.items()
                if not k.endswith("_before")
            ]
            self._tell(f"step {row['step']}: {', '.join(told)}")
        return found


def resumable(folder: Name, resume: Resume = True) -> Mapping[str, Any] | None:
    """What last.pt of a run's folder holds; None where it is not to go on, or with "auto" has none. InputError: it cannot."""
    last = Path(folder, LAST)
    if isinstance(resume, Mapping):
        return resume
    rank, world = ranks()
    if world > 1:
        # All as the first one sees it: another may look before it has written, or have another disk.
        found: list[Any] = [_read(last, resume) if rank == 0 else None]
        dist.broadcast_object_list(found)
        return found[0]
    return _read(last, resume)


def _read(last: Path, resume: bool | Literal["auto"]) -> Mapping[str, Any] | None:
    settle(last.parent)
    if not resume or (resume == "auto" and not last.exists()):
        return None
    if not last.exists():
        raise InputError(f"{last.parent}: holds no {LAST} to resume")
    saved = checkpoint.load(last)
    if "optimizer" not in saved or not all(isinstance(saved.get(k), dict) for k in ("settings", "counted")):
        raise InputError(f"{last}: holds no state of a training")
    return saved


def _told(listed: Any) -> str:
    number = listed.get("number") if isinstance(listed, dict) else None
    return f"{number} pair{'s' * (number != 1)}"


def _refuse_taken(folder: Name, replace: bool) -> None:
    if not os.fspath(folder):
        raise InputError("the output folder must have a name, got an empty one")
    out = Path(folder)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: exists and is not a folder")
    taken = [name for name in FILES if os.path.lexists(out / name)]
    if taken and not replace:
        raise InputError(
            f"{out}: already holds {taken[0]}; --resume (resume=True) goes on with it, --force (replace=True) replaces it"
        )


def _recipe(given: Recipe | None, model: nn.Module, saved: Mapping[str, Any] | None) -> Recipe:
    """The one given, or the model's: with the batch that it was started with, or the smallest that processes can share."""
    if given is not None:
        return given
    recipe = recipe_of(model)
    return replace(recipe, batch_size=shared_batch(recipe.batch_size, saved))


def shared_batch(size: int, saved: Mapping[str, Any] | None = None) -> int:
    """The batch of a recipe of which nobody has asked for another one."""
    if saved is not None and isinstance(saved.get("recipe"), dict) and "batch_size" in saved["recipe"]:
        # By another number of processes too: it goes on as it was, or says why not.
        return saved["recipe"]["batch_size"]
    world = ranks()[1]
    return world if size % world else size


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[None]:
    """The folder, made where it is missing, for this run alone; gone again where nothing was written."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made: {(error.strerror or str(error)).lower()}") from error
    try:
        with held(out):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def _interruptible() -> Iterator[list[float]]:
    """Yields a list that the first Ctrl-C (or its like) puts something into, for a run to end after its step; a Ctrl-C more than a second
    later ends it at once.
    """
    asked: list[float] = []

    def ask(number: int, frame: Any) -> None:
        # Schedulers and torchrun send some signals twice.
        if number == signal.SIGINT and asked and time.monotonic() > asked[0] + 1:
            signal.default_int_handler(number, frame)
        asked.append(time.monotonic())

    numbers = _signals.named("SIGINT", "SIGTERM", "SIGHUP")
    # Ignored, as by nohup and &: stays so.
    with _signals.handled([n for n in numbers if signal.getsignal(n) != signal.SIG_IGN], ask):
        yield asked
