"""What the commands share: arguments, devices."""

import argparse
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import torch

from fastreg import convert, report
from fastreg._files import InputError, Name
from fastreg.io._reading import CHOICES, Reading
from fastreg.training.distributed import usable


class Parser(argparse.ArgumentParser):
    """Whose errors are InputError, one line; `-1000,-100` is a value, not an option."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._negative_number_matcher = re.compile(r"-[\d.]")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def numbers(text: str) -> int | float | tuple[int | float, ...]:
    """A number, or several that commas separate."""

    def one(part: str) -> int | float:
        try:
            return int(part)
        except ValueError:
            return float(part)

    parts = tuple(one(part) for part in text.split(","))
    return parts if len(parts) > 1 else parts[0]


numbers.__name__ = "number"  # argparse names it in its message


def set_threads(args: argparse.Namespace) -> None:
    """As the arguments say."""
    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"--threads must be at least 1, got {args.threads}")
        if args.threads > 1024:  # OpenMP crashes where the system refuses it a thread
            raise InputError(f"--threads must be at most 1024, got {args.threads}")
        torch.set_num_threads(args.threads)


def device_of(args: argparse.Namespace) -> torch.device:
    """The torch.device that the arguments ask for; sets the number of threads."""
    set_threads(args)
    return usable(args.device)


def add_reading(parser: argparse.ArgumentParser, only: Sequence[str] = tuple(CHOICES)) -> None:
    """A flag for each field of Reading, or for those that the command has files for; None is one that is not given."""
    group = parser.add_argument_group("how files are read")
    for name in only:
        values, text = CHOICES[name]
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, choices=values, help=f"{text} (default: {values[0]})")


def reading_given(args: argparse.Namespace) -> dict[str, Any] | None:
    """The fields of Reading that the arguments set; None: none."""
    given = {f.name: getattr(args, f.name, None) for f in fields(Reading)}
    return {name: value for name, value in given.items() if value is not None} or None


def reading_of(args: argparse.Namespace) -> Reading:
    """How files are read, as the arguments say."""
    return Reading.of(reading_given(args))


PLACES = ("affine_source", "tilt")  # of Reading, what decides where an image lies


def add_source(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    silent = ", ".join(n for n, f in convert.FORMATS.items() if not f.known or "--from" in f.known)
    text = f"what the files hold, where they do not say it themselves: {silent}"
    parser.add_argument("--from", dest="source", metavar="FORMAT", help=text)


def add_transforms(parser: argparse.ArgumentParser) -> None:
    """What transforms of other tools may need to be understood."""
    group = parser.add_argument_group("transforms of other tools")
    add_source(group)
    group.add_argument(
        "--like",
        "--reference",
        metavar="FIXED",
        help="an image on the grid of the result; beyond a field nothing is displaced, as in ITK",
    )


def add_one_file(parser: argparse.ArgumentParser) -> None:
    """What every command takes that makes a file, and no folder."""
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors")
    parser.add_argument("--force", action="store_true", help="replace OUT")


def require_free(out: str, inputs: Iterable[Name | None], force: bool) -> None:
    """InputError where the file `out` exists and may not be replaced: without force, or because it is an input (None: not given)."""
    if not os.path.lexists(out):
        return
    for path in inputs:
        if path is not None and os.path.exists(path) and os.path.samefile(path, out):
            raise InputError(f"{path}: is an input, and the output would replace it")
    if not force:
        raise InputError(f"{out}: exists; give another name, or --force to replace it")


def add_html(parser: argparse._ActionsContainer) -> None:
    """--html; None where not given."""
    text = "report.html too: numbers, slices to leaf through and the picture, on a page that needs no network"
    parser.add_argument("--html", action="store_true", default=None, help=text)


def add_picture(parser: argparse._ActionsContainer) -> None:
    """--no-picture; None where not given."""
    text = "without picture.png, which takes half a second and matplotlib"
    parser.add_argument("--no-picture", action="store_true", default=None, help=text)


def drawing(args: argparse.Namespace) -> bool:
    """Whether there is to be a picture; refuses before anything is computed where it cannot be drawn."""
    if args.no_picture:
        if args.html:
            raise InputError("--html shows the picture: it does not go with --no-picture")
        return False
    report.require_matplotlib()
    return True


def add_common(parser: argparse.ArgumentParser) -> None:
    """What every command that computes takes."""
    group = parser.add_argument_group("common")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    group.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    group.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors")
    group.add_argument(
        "--progress", action="store_true", help="the progress bar, though stderr is no terminal"
    )
    group.add_argument("--force", action="store_true", help="replace outputs that OUT already holds")
