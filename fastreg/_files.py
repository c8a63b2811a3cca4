"""Files that are whole or not there: writing them, folders of them, and what cannot be used."""

import contextlib
import json
import math
import os
import secrets
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastreg import _signals
from fastreg._refusals import ValueRefused

Name = str | os.PathLike[str]


class InputError(ValueRefused):
    """What a user passed cannot be used; the message is one line that says why."""


def require_utf8(path: Name) -> None:
    """SimpleITK aborts the process on other names."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{ascii(os.fspath(path))[1:-1]}: the path must be UTF-8") from error


@contextlib.contextmanager
def replacing(path: Name) -> Iterator[Path]:
    """Yields a name beside path, which takes its place at the end; left behind in no case. An OSError names the path."""
    path = Path(path)
    # The extension decides the format, so it stays at the end of the name.
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Name, value: Any) -> None:
    """NaN and infinity, which JSON has not, become null."""
    text = json.dumps(_plain(value), indent=1, allow_nan=False, ensure_ascii=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """What JSON can hold: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def refuse_own_inputs(out: Name, paths: Iterable[Name | None], outputs: Iterable[str]) -> None:
    """InputError where one of the outputs in the folder `out` would replace one of the paths (None: not given)."""
    for path in (p for p in paths if p is not None):
        for name in outputs:
            with contextlib.suppress(OSError):  # not there
                if os.path.samefile(path, Path(out, name)):
                    raise InputError(f"{path}: is an input, and an output would replace it")


def _refuse_folders(out: Path, names: Iterable[str]) -> None:
    for name in names:
        if (out / name).is_dir() and not (out / name).is_symlink():
            raise InputError(f"{out / name}: is a folder, and would have to be a file")


def _exchange(temporary: Path, out: Path, names: Iterable[str]) -> None:
    """Moves all files of temporary to `out`, where `names` disappear; what fails is undone."""
    written = os.listdir(temporary)
    _refuse_folders(out, {*names, *written})
    # Not in temporary, which is deleted: should undoing fail as well, the old files are still there.
    aside = out / f"{temporary.name}.old"
    aside.mkdir()
    steps = []
    try:
        for name in {*names, *written}:
            if os.path.lexists(out / name):
                os.replace(out / name, aside / name)
                steps.append((aside / name, out / name))
        for name in written:
            os.replace(temporary / name, out / name)
            steps.append((out / name, temporary / name))
    except BaseException:
        for source, target in reversed(steps):
            os.replace(source, target)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def output_folder(out: Name, names: Iterable[str], *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder that becomes `out` at the end; on any error `out` is as it was before.

    A new `out` appears by one rename. In one that exists the files written take the places of their namesakes
    and others of `names` disappear, all or none, with signals held back; what else is in it stays.
    Raises:
        InputError: out is empty or no folder, holds one of `names` and replace is false or that is a folder,
            or cannot be made.
    """
    if not os.fspath(out):
        raise InputError("the output folder must have a name, got an empty one")
    out = Path(out)
    require_utf8(out.absolute())
    exists = out.is_dir()
    if not exists and (out.exists() or out.is_symlink()):
        raise InputError(f"{out}: exists and is not a folder")
    _refuse_folders(out, names)
    taken = [name for name in names if exists and os.path.lexists(out / name)]
    if taken and not replace:
        raise InputError(f"{out}: already holds {taken[0]}; give another folder, or --force to replace it")
    missing = [] if exists else [parent for parent in out.absolute().parents if not parent.exists()]
    # Inside an existing folder, which may be a mount of its own that no rename crosses.
    temporary = (out if exists else out.absolute().parent) / f".{out.name or 'out'}.{secrets.token_hex(4)}"
    done = False
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{out}: cannot be made: {(error.strerror or str(error)).lower()}") from error
        yield temporary
        with _no_interrupt():
            if exists:
                _exchange(temporary, out, names)
            else:
                os.rename(temporary, out)
            done = True
    finally:
        with _no_interrupt():
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in [] if done else missing:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _no_interrupt() -> AbstractContextManager[None]:
    """Ctrl-C and its like do nothing inside: for steps of milliseconds that must not stop half-way."""
    return _signals.handled(_signals.named("SIGINT", "SIGTERM", "SIGHUP"), signal.SIG_IGN)
