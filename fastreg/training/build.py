"""A net and its input, as a command line or a script names them."""

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fastreg import io, models
from fastreg._files import InputError
from fastreg._refusals import Refusal
from fastreg.data.pairs import Case
from fastreg.data.preprocessing import Preprocessing
from fastreg.data.sample import Sample

from .step import displacement_of

# The papers', of each method.
RECIPES = {name: cls.recipe for name, cls in models.MODELS.items()}
PAPER = {name: asdict(cls.paper_input) for name, cls in models.MODELS.items() if cls.paper_input is not None}

WIDEST = 2**20  # channels, steps

Numbers = str | Sequence[float]


@dataclass
class Net:
    """Which net, and what it is given. None: the default. What is text is as on the command line.

    method: of fastreg.models.MODELS. preset: of its arguments. set: more of them, {name: value} or ["name=value", ...].
    intensity, crop, size, spacing: see Preprocessing; "paper" for the paper's intensity and size.
    """

    method: str = ""
    preset: str | None = None
    set: Mapping[str, Any] | Sequence[str] | None = None
    intensity: Numbers | None = None
    crop: str | Sequence[tuple[int | None, int | None]] | None = None
    size: Numbers | None = None
    spacing: Numbers | None = None

    @property
    def cls(self) -> type[models.Model]:
        if self.method not in models.MODELS:
            raise InputError(f"method must be one of {', '.join(sorted(models.MODELS))}, got {self.method}")
        return models.MODELS[self.method]

    def preprocessing(self) -> Preprocessing:
        """InputError for what makes no sense."""
        cls = self.cls
        options: dict[str, Any] = {"intensity": cls.default_intensity}
        for name, kind in (("intensity", float), ("size", int), ("spacing", float)):
            value = getattr(self, name)
            if value == "paper" and name != "spacing":
                if cls.paper_input is None:
                    raise InputError(f"{self.method} has no {name} of a paper")
                value = getattr(cls.paper_input, name)
            elif isinstance(value, str) and (name != "intensity" or "," in value):
                value = _numbers(name, value, kind)
            if value is not None:
                options[name] = value if isinstance(value, str) else tuple(value)
        if self.crop is not None:
            options["crop"] = _crop(self.crop) if isinstance(self.crop, str) else tuple(self.crop)
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


@torch.no_grad()
def predict(
    model: nn.Module, sample: Sample, grid: io.Geometry, case: Case, preprocessing: Preprocessing
) -> torch.Tensor:
    """What the net makes of a Sample on its grid: the displacement on the case's fixed grid, on the CPU. InputError: no number."""
    model.eval()
    device = next(model.parameters()).device
    u = displacement_of(model(sample.fixed.to(device), sample.moving.to(device)))
    if not u.isfinite().all():
        raise InputError(f"{case.title}: the net's displacement is not finite")
    return preprocessing.displacement(u.float().cpu(), grid, case.fixed_grid)
