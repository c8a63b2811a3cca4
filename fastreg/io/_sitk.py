"""SimpleITK, where it is installed."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from fastreg._refusals import Missing


def sitk() -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise Missing("SimpleITK", "reading and writing images") from error
    return SimpleITK


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """The C libraries below SimpleITK print to file descriptor 2; what they say is in the error we raise."""
    try:
        saved = os.dup(2)
    except OSError:
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
