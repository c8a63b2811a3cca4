"""What is told while something runs: warnings, lines, progress."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastreg._refusals import Missing


def warn(message: str) -> None:
    """A line on stderr."""
    print(f"fastreg: warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def telling() -> Iterator[None]:
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


def seen(*, quiet: bool = False, always: bool = False) -> bool:
    """Whether a bar is looked at: on a terminal and not quiet, or `always`."""
    return sys.stderr is not None and (always or (not quiet and sys.stderr.isatty()))


def bar(*, quiet: bool = False, always: bool = False, **options: Any) -> Any:
    """A tqdm bar on stderr; None where nobody looks, or where tqdm is not installed."""
    if not seen(quiet=quiet, always=always):
        return None
    try:
        from tqdm import tqdm
    except ImportError as error:
        if always:
            raise Missing("tqdm", "a progress bar") from error
        return None
    return tqdm(file=sys.stderr, **options)


LINES = 60.0  # seconds between lines


@contextlib.contextmanager
def progress(
    *, total: int, initial: int = 0, quiet: bool = False, always: bool = False
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Of many steps: yields a function to call after each with numbers by name. A bar; where nobody looks a line after the first step
    and then one a minute, on stdout; nothing if quiet.
    """
    shown = bar(quiet=quiet, always=always, total=total, initial=initial)
    begin, due, step = time.perf_counter(), 0.0, initial

    def after(values: Mapping[str, float]) -> None:
        nonlocal due, step
        step += 1
        texts = {name: f"{value:.4g}" for name, value in values.items()}
        if shown is not None:
            shown.set_postfix(texts, refresh=False)
            shown.update()
            return
        spent = time.perf_counter() - begin
        if quiet or spent < due:
            return
        due = spent + LINES
        seconds = spent / (step - initial)
        with telling():
            print(f"step {step} of {total}, {seconds:.3g} s each: {', '.join(map(' '.join, texts.items()))}")

    try:
        yield after
    finally:
        if shown is not None:
            shown.close()
