"""A net and its input, as a command line or a script names them."""

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from fastreg import models
from fastreg._files import InputError
from fastreg._refusals import Refusal
from fastreg.data.preprocessing import Preprocessing, View
from fastreg.data.sample import Sample

from .step import displacement_of

# The papers', of each method.
RECIPES = {name: cls.recipe for name, cls in models.MODELS.items()}
PAPER = {name: asdict(cls.paper_input) for name, cls in models.MODELS.items() if cls.paper_input is not None}

WIDEST = 2**20  # channels, steps

GRID = ("crop", "margin", "size", "spacing")  # of a Net, what decides on which voxels it works

Numbers = str | Sequence[float]


@dataclass
class Net:
    """Which net, and what it is given. None: the default. What is text is as on the command line.

    method: of fastreg.models.MODELS. preset: of its arguments. set: more of them, {name: value} or ["name=value", ...].
    intensity, crop, size, spacing, align, margin, match_histograms: see Preprocessing; "paper" for the paper's intensity and size,
    which is cut out or padded where the paper names its voxels' size, and resampled to where it does not.
    """

    method: str = ""
    preset: str | None = None
    set: Mapping[str, Any] | Sequence[str] | None = None
    intensity: Numbers | None = None
    crop: str | Sequence[tuple[int | None, int | None]] | None = None
    size: Numbers | None = None
    spacing: Numbers | None = None
    align: str | None = None
    margin: float | None = None
    match_histograms: bool | None = None

    @property
    def cls(self) -> type[models.Model]:
        if self.method not in models.MODELS:
            raise InputError(f"method must be one of {', '.join(sorted(models.MODELS))}, got {self.method}")
        return models.MODELS[self.method]

    def preprocessing(self) -> Preprocessing:
        """InputError for what makes no sense."""
        cls = self.cls
        options: dict[str, Any] = {"intensity": cls.default_intensity}
        of_paper = cls.paper_input
        for name, kind in (("intensity", float), ("size", int), ("spacing", float)):
            value = getattr(self, name)
            if name == "spacing" and value is None and self.size == "paper" and of_paper is not None:
                value = of_paper.spacing
            if value == "paper":
                value = getattr(of_paper, name, None)
                if value is None:
                    raise InputError(f"{self.method} has no {name} of a paper")
            elif isinstance(value, str) and (name != "intensity" or "," in value):
                value = _numbers(name, value, kind)
            if value is not None:
                options[name] = value if isinstance(value, str) else tuple(value)
        if self.crop is not None:
            text = isinstance(self.crop, str) and self.crop != "mask"
            options["crop"] = _crop(self.crop) if text else self.crop  # type: ignore[arg-type]
        for name in ("align", "margin", "match_histograms"):
            if (value := getattr(self, name)) is not None:
                options[name] = value
        return Preprocessing(**options)

    def model(self, ndim: int) -> models.Model:
        """The net, for images of ndim axes. InputError where it cannot be."""
        cls = self.cls
        if ndim not in cls.ndims:
            axes = " and ".join(f"{n}D" for n in cls.ndims)
            raise InputError(f"{self.method} registers {axes} images, got {ndim}D")
        options = dict(self.set) if isinstance(self.set, Mapping) else _arguments(cls, self.set or ())
        for name, value in options.items():
            if not suits(cls, name, value):
                default = inspect.signature(cls).parameters.get(name)
                kind = (
                    "is none of its arguments"
                    if default is None
                    else f"must be of the kind of its default, {default.default!r}"
                )
                raise InputError(f"--set {name} {kind}, got {value!r}")
        if "ndim" in inspect.signature(cls).parameters:
            options.setdefault("ndim", ndim)
        try:
            return cls.from_preset(self.preset or "paper", **options)
        except Refusal as error:
            raise InputError(error.brief) from error
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" in str(error):
                raise
            raise InputError(f"{self.method} cannot be built with {options}: {error}") from error


def _numbers(name: str, text: str, kind: Callable[[str], float]) -> tuple[float, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--{name} must be comma-separated numbers, got {text}") from error


def _crop(text: str) -> tuple[tuple[int | None, int | None], ...]:
    try:
        ranges = [part.split(":") for part in text.split(",")]
        return tuple((int(a) if a else None, int(b) if b else None) for a, b in ranges)
    except ValueError as error:
        raise InputError(f"--crop must be ranges START:STOP, comma-separated, got {text}") from error


def _arguments(cls: type[models.Model], given: Sequence[str]) -> dict[str, Any]:
    """Of a model's class, of NAME=VALUE."""
    known, options = list(inspect.signature(cls).parameters), {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            raise InputError(f"--set takes NAME=VALUE with a name of {', '.join(known)}, got {text}")
        try:
            options[name] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            options[name] = value.strip()
    return options


def suits(cls: type[models.Model], name: str, value: Any) -> bool:
    """Whether a value can stand for a default of a net: a number for a number, positive whole ones for a tuple of widths, ..."""
    parameter = inspect.signature(cls).parameters.get(name)
    if parameter is None:
        return False
    default = parameter.default
    if isinstance(default, (bool, str)):
        return isinstance(value, type(default))
    if isinstance(default, tuple):
        return isinstance(value, (tuple, list)) and all(type(v) is int and 0 < v <= WIDEST for v in value)
    if default is None and isinstance(value, (bool, dict, type(None))):
        return True
    numbers = (int,) if type(default) is int else (int, float)
    # Not NaN, and nothing that a net would be built of without end.
    return type(value) in numbers and abs(value) < (WIDEST if type(value) is int else 1e30)


def regridded(stored: Preprocessing, net: Net) -> Preprocessing:
    """What a checkpoint has, on the grid that a Net asks for instead: what of GRID it says. InputError: its method cannot."""
    asked = [name for name in GRID if getattr(net, name) is not None]
    if not asked:
        return stored
    # a margin alone is one of the crop that there is
    crop = stored.crop if "crop" not in asked else net.crop
    given = replace(net, crop=crop).preprocessing()
    new = replace(
        stored,
        **{
            n: getattr(given, n)
            for k in (("crop", "margin"), ("size", "spacing"))
            if {*k} & {*asked}
            for n in k
        },
    )
    if net.cls.size_bound and new != stored:
        raise InputError(
            f"--{asked[0]}: {net.method} answers in units of the image's extent, and is applied on the grid it was trained on; "
            "train one on the other grid"
        )
    return new


@torch.no_grad()
def predict(model: nn.Module, sample: Sample, view: View) -> torch.Tensor:
    """What the net makes of a Sample, on the fixed image's grid, on the CPU. InputError: no number."""
    model.eval()
    device = next(model.parameters()).device
    u = displacement_of(model(sample.fixed.to(device), sample.moving.to(device)))
    if not u.isfinite().all():
        raise InputError(f"{sample.name}: the net's displacement is not finite")
    return view.displacement(u.float().cpu())
