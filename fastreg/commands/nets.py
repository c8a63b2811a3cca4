"""Arguments of the commands that build a net, and what they mean."""

import ast
import inspect
from dataclasses import asdict

import torch

from fastreg import models
from fastreg.data.preprocessing import Preprocessing
from fastreg.io import InputError

# What the papers give their nets, (z, y, x); "paper" on the command line.
PAPER = {name: asdict(cls.paper_input) for name, cls in models.MODELS.items()}
NAMES = ("preset", "set", "intensity", "crop", "size", "spacing")


def add_arguments(parser):
    """--preset, --set and what makes the net's input; None where not given."""
    group = parser.add_argument_group("the net")
    presets = "; ".join(f"{name}: {', '.join(cls.presets)}" for name, cls in models.MODELS.items())
    group.add_argument("--preset", help=f'arguments of the model, "paper" by default ({presets})')
    group.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="an argument of the model's class, as --set cost_volume=False; a wrong name lists them; repeatable",
    )
    group.add_argument(
        "--intensity",
        help="percentiles (default), minmax, zscore (default of r2n2), LOW,HIGH (become 0 and 1) or paper",
    )
    group.add_argument("--crop", metavar="A:B,...", help="of each axis (z,y,x), voxels of the fixed image")
    group.add_argument(
        "--size", metavar="Z,Y,X", help="voxels of the net's grid, or paper (default: the fixed image's)"
    )
    group.add_argument("--spacing", metavar="Z,Y,X", help="mm of the net's grid, instead of --size")


def _numbers(name, text, kind):
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--{name} must be comma-separated numbers, got {text}") from error


def _crop(text):
    try:
        ranges = [part.split(":") for part in text.split(",")]
        return tuple((int(a) if a else None, int(b) if b else None) for a, b in ranges)
    except ValueError as error:
        raise InputError(f"--crop must be ranges START:STOP, comma-separated, got {text}") from error


def preprocessing_of(args, method):
    """The Preprocessing that the arguments ask for."""
    paper = PAPER[method]
    options = {"intensity": models.MODELS[method].default_intensity}
    if args.intensity == "paper":
        options["intensity"] = paper["intensity"]
    elif args.intensity is not None:
        options["intensity"] = (
            _numbers("intensity", args.intensity, float) if "," in args.intensity else args.intensity
        )
    if args.size is not None:
        options["size"] = paper["size"] if args.size == "paper" else _numbers("size", args.size, int)
    if args.spacing is not None:
        options["spacing"] = _numbers("spacing", args.spacing, float)
    if args.crop is not None:
        options["crop"] = _crop(args.crop)
    return Preprocessing(**options)


def _settings(cls, given):
    parameters = inspect.signature(cls).parameters
    known, options = list(parameters), {}
    for text in given or ():
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            raise InputError(f"--set takes NAME=VALUE with a name of {', '.join(known)}, got {text}")
        try:
            options[name] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            options[name] = value.strip()
        default = parameters[name].default
        if not _like(options[name], default):
            raise InputError(f"--set {name} must be of the kind of its default, {default!r}, got {value!r}")
    return options


def _like(value, default):
    """Whether a value can stand for a default: a finite number for a number, positive whole ones for a tuple of widths, ..."""
    if isinstance(default, (bool, str)):
        return isinstance(value, type(default))
    if isinstance(default, tuple):
        return isinstance(value, (tuple, list)) and all(type(v) is int and v > 0 for v in value)
    if default is None and isinstance(value, (bool, dict, type(None))):
        return True
    numbers = (int,) if type(default) is int else (int, float)
    return type(value) in numbers and abs(value) < 1e30


def model_of(args, method, ndim):
    """The model that the arguments ask for, for images of ndim axes."""
    cls = models.MODELS[method]
    if ndim not in cls.ndims:
        raise InputError(f"{method} registers {' and '.join(f'{n}D' for n in cls.ndims)} images, got {ndim}D")
    options = _settings(cls, args.set)
    if "ndim" in inspect.signature(cls).parameters:
        options.setdefault("ndim", ndim)
    try:
        return cls.from_preset(args.preset or "paper", **options)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        if not str(error).startswith("fastreg.models."):
            raise InputError(f"{method} cannot be built with {options}: {error}") from error
        raise InputError(str(error).removeprefix("fastreg.models.")) from error


@torch.no_grad()
def predict(model, sample, grid, case, preprocessing):
    """What the net makes of a Sample on its grid: the displacement on the case's fixed grid, on the CPU. InputError: no number."""
    model.eval()
    device = next(model.parameters()).device
    u = model(sample.fixed.to(device), sample.moving.to(device)).displacement
    if not u.isfinite().all():
        raise InputError(f"{case.title}: the net's displacement is not finite")
    return preprocessing.displacement(u.float().cpu(), grid, case.fixed_grid)
