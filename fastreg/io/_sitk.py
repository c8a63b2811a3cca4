"""SimpleITK, where it is installed."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastreg._refusals import Missing

from ._reading import Warn


def sitk(what: str = "reading and writing images") -> Any:
    """The module; Missing where it is not installed, which says for what it is needed."""
    try:
        import SimpleITK
    except ImportError as error:
        raise Missing("SimpleITK", what) from error
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


@contextlib.contextmanager
def heard(path: Path, warn: Warn) -> Iterator[None]:
    """What the C libraries print to file descriptor 2 inside becomes warnings, each once, where nothing is raised."""
    with tempfile.TemporaryFile() as said:
        try:
            saved = os.dup(2)
        except OSError:
            yield
            return
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        said.seek(0)
        text = said.read(1 << 16).decode(errors="replace")
    lines = [re.sub(r"^\w+ \(0x\w+\): ", "", line.strip()) for line in text.splitlines()]
    for line in dict.fromkeys(
        line for line in lines if line and not re.match(r"warning: in .*line \d+", line, re.I)
    ):
        warn(f"{path}: SimpleITK says: {' '.join(line.split())[:200]}")
