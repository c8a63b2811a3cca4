"""Signals for as long as something lasts."""

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | signal.Handlers


def named(*names: str) -> list[signal.Signals]:
    """Those of the signals that this system has."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


@contextlib.contextmanager
def handled(numbers: Iterable[int], handler: Handler) -> Iterator[None]:
    """Inside, handler takes these signals; afterwards what took them before. Outside the main thread: nothing happens."""
    previous = []
    try:
        with contextlib.suppress(ValueError):  # not the main thread
            for number in numbers:
                previous.append((number, signal.signal(number, handler)))
        yield
    finally:
        for number, before in previous:
            if before is not None:  # not one of Python's
                signal.signal(number, before)


def none() -> AbstractContextManager[None]:
    """Ctrl-C and its like do nothing inside: for steps of milliseconds that must not stop half-way."""
    return handled(named("SIGINT", "SIGTERM", "SIGHUP"), signal.SIG_IGN)
