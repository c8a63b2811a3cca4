"""A run of files, as `fastreg train` has it."""

import contextlib
import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from fastreg._console import warn
from fastreg._files import InputError, Name, refuse_own_inputs
from fastreg.data.pairs import Pairs, find_pairs, read_case
from fastreg.io import Reading

from . import schema
from .build import Net
from .distributed import ranks
from .run import ALIGNMENTS, FILES, LAST, PICTURE, Resume, Run, resumable, shared_batch

RECIPE = ("steps", "learning_rate", "batch_size", "patience", "watch", "labels_weight")


@dataclass
class Settings(Net):
    """All that makes a run of pairs in files; the names are those of `fastreg train --help`, None is the default.

    reading: fields of fastreg.io.Reading by name.

    Settings(method="voxelmorph", pairs="pairs.csv", size=(28, 28, 40), steps=100).run("runs/mine").train()
    """

    pairs: str = ""
    task: str = "inter"
    validation: str | None = None
    seed: int = 0
    steps: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    patience: int | None = None
    watch: str | None = None
    labels_weight: float | None = None
    amp: bool = False
    compile: bool = False
    validate_every: int | None = None
    validate_most: int = 8
    save_every: int = 100
    reading: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, path in _absolute(vars(self)).items():
            setattr(self, name, path)
        self.reading = asdict(Reading.of(self.reading))

    def plain(self) -> dict[str, Any]:
        """Those that are set, as a checkpoint keeps them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def check(self) -> None:
        """InputError for what makes no sense."""
        for name in ("method", "pairs"):
            if not getattr(self, name):
                raise InputError(f"--{name} is missing")
        for name in ("steps", "batch_size", "patience", "validate_every", "validate_most", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise InputError(f"--learning-rate must be positive, got {self.learning_rate}")
        if self.labels_weight is not None and not 0 <= self.labels_weight < math.inf:
            raise InputError(f"--labels-weight must be 0 or more, got {self.labels_weight}")

    def run(
        self,
        folder: Name,
        *,
        resume: Resume = "auto",
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> Run:
        """The Run; options: its `replace`, `minutes`, `quiet` and `progress`. InputError for what cannot be."""
        saved = resumable(folder, resume)
        if saved is not None:
            self = replace(self, **merged(folder, self.plain(), saved))
        self.check()
        _refuse_own_inputs(folder, (self.pairs, self.validation))
        preprocessing = self.preprocessing()
        for name in ("pairs", "validation") if saved is not None else ():
            path = getattr(self, name)
            if path is not None and not os.path.exists(path):
                raise InputError(
                    f"{path}: no such file or folder; where the data has moved: --{name} (resume goes on with it)"
                )
        # A line once, though folder and validation may be one.
        told = functools.cache(warn) if ranks()[0] == 0 else lambda message: None
        reading = Reading.of(self.reading)
        found = validated = find_pairs(self.pairs, self.task, told, reading=reading)
        if self.validation is not None:
            validated = find_pairs(self.validation, self.task, told, validation=True, reading=reading)
        # The first pair tells how many axes images have.
        ndim = read_case(found[0], told, reading).fixed_grid.nd
        torch.manual_seed(self.seed % 2**63)
        model = self.model(ndim).to(device)
        given = {name: getattr(self, name) for name in RECIPE if getattr(self, name) is not None}
        given.setdefault("batch_size", shared_batch(model.recipe.batch_size, saved))
        self = replace(self, batch_size=given["batch_size"])
        read: Any = {"ndim": ndim, "reading": reading, "warn": told, "cache": Path(folder, ALIGNMENTS)}
        read["labels"] = (self.labels_weight or 0) > 0
        return Run(
            folder,
            model,
            Pairs(found, preprocessing, **read),
            validation=Pairs(validated, preprocessing, **read),
            recipe=replace(model.recipe, **given),
            seed=self.seed,
            resume=saved or False,
            amp=self.amp,
            compile=self.compile,
            validate_every=self.validate_every,
            validate_most=self.validate_most,
            save_every=self.save_every,
            settings=self.plain(),
            **options,
        )


# What a run cannot change half-way; the rest of its settings may differ when it is resumed. Where the pairs lie may, as data
# moves; that they are the same ones Run sees by their names.
KEPT = (
    *(f.name for f in fields(Net)),
    *("task", "seed", "learning_rate", "batch_size", "watch", "labels_weight", "amp"),
)


def _absolute(settings: Mapping[str, Any]) -> dict[str, str]:
    """The paths among them, for a run that goes on from another folder."""
    return {name: os.path.abspath(settings[name]) for name in ("pairs", "validation") if settings.get(name)}


def merged(folder: Name, given: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run that goes on: those given before those of its checkpoint. InputError where they cannot change."""
    before = saved["settings"]
    known = {f.name for f in fields(Settings)}
    if not {"method", "pairs"} <= before.keys() or not before.keys() <= known:
        raise InputError(f"{folder}: is a run of a script, which can go on with it")
    wrong = schema.misfit(before, Settings)
    if wrong is not None:
        raise InputError(f"{Path(folder, LAST)}: its settings are none of this version's ({wrong})")
    given = {**given, **_absolute(given)}
    read = asdict(Reading.of(before.get("reading")))
    asked = {name: value for name, value in (given.pop("reading", None) or {}).items() if value is not None}
    was, wanted = {**before, **read}, {**given, **asked}
    for name in (*KEPT, *read):
        if name in wanted and wanted[name] != was.get(name):
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{folder}: was started with {flag} {was.get(name)}, and cannot be resumed with {wanted[name]}"
            )
    return {**before, **given, "reading": read}


def _refuse_own_inputs(folder: Name, paths: Sequence[str | None]) -> None:
    refuse_own_inputs(folder, paths, FILES)
    for path in paths:
        with contextlib.suppress(OSError):  # not there, not given
            if os.path.samefile(path or "", folder) and not Path(path or "", "images").is_dir():
                raise InputError(f"{folder}: holds the images, and {PICTURE} would be one of them")
