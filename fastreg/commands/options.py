"""What the commands share: arguments, devices, messages."""

import argparse
import contextlib
import os
import re
import sys
import time

import torch

from fastreg.io import InputError


class Parser(argparse.ArgumentParser):
    """Whose errors are InputError, one line; `-1000,-100` is a value, not an option."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._negative_number_matcher = re.compile(r"-[\d.]")

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def warn(message):
    """A line on stderr."""
    print(f"fastreg: warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def telling():
    """For prints: a reader that has gone away must not fail a run."""
    try:
        yield
        if sys.stdout is not None:  # closed from the start
            sys.stdout.flush()
    except (OSError, UnicodeError):
        # or the interpreter would fail to flush what is left when it exits
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


def numbers(text):
    """A number, or several that commas separate."""

    def one(part):
        try:
            return int(part)
        except ValueError:
            return float(part)

    parts = tuple(one(part) for part in text.split(","))
    return parts if len(parts) > 1 else parts[0]


numbers.__name__ = "number"  # argparse names it in its message


def device_of(args):
    """The torch.device that the arguments ask for; sets the number of threads."""
    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"--threads must be at least 1, got {args.threads}")
        if args.threads > 1024:  # OpenMP crashes where the system refuses it a thread
            raise InputError(f"--threads must be at most 1024, got {args.threads}")
        torch.set_num_threads(args.threads)
    name = args.device
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("must be cpu or cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def add_common(parser):
    """What every command that computes takes."""
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors")
    parser.add_argument(
        "--progress", action="store_true", help="the progress bar, though stderr is no terminal"
    )
    parser.add_argument("--force", action="store_true", help="replace outputs that OUT already holds")


def bar(args, **options):
    """A tqdm bar on stderr; None where nobody looks, or tqdm is not installed."""
    seen = sys.stderr is not None and (args.progress or (not args.quiet and sys.stderr.isatty()))
    if not seen:
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(file=sys.stderr, **options)


LINES = 60.0  # seconds between lines


@contextlib.contextmanager
def progress(args, *, total, initial=0):
    """Of many steps: yields a function to call after each with a dict of numbers. A bar; where nobody looks a line after the first step
    and then one a minute, on stdout; nothing if --quiet.
    """
    shown = bar(args, total=total, initial=initial)
    begin, due, step = time.perf_counter(), 0.0, initial

    def after(values):
        nonlocal due, step
        step += 1
        values = {name: f"{value:.4g}" for name, value in values.items()}
        if shown is not None:
            shown.set_postfix(values, refresh=False)
            shown.update()
            return
        spent = time.perf_counter() - begin
        if args.quiet or spent < due:
            return
        due = spent + LINES
        seconds = spent / (step - initial)
        with telling():
            print(f"step {step} of {total}, {seconds:.3g} s each: {', '.join(map(' '.join, values.items()))}")

    try:
        yield after
    finally:
        if shown is not None:
            shown.close()
