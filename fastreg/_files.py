"""Files that are whole or not there: writing them, folders of them, and what cannot be used."""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastreg import _exchange, _signals
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


KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _kind(path: Name) -> str | None:
    """What a path is that is no regular file; None: it is one. OSError: it is not there."""
    mode = os.stat(path).st_mode
    return None if stat.S_ISREG(mode) else next((name for of, name in KINDS if of(mode)), "no file")


def require_regular(path: Name) -> None:
    """InputError where a file to read is not there or is none: a pipe, say, that a reader would wait at for ever."""
    require_utf8(path)
    try:
        kind = _kind(path)
    except FileNotFoundError as error:
        raise InputError(f"{os.fspath(path)}: no such file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{os.fspath(path)}: {_reason(error)}") from error
    if kind is not None:
        raise InputError(f"{os.fspath(path)}: is {kind}, and must be a file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{os.fspath(path)}: permission denied")


def _refuse_places(folder: Path, names: Iterable[str]) -> None:
    """A link is replaced, whatever it leads to; what is no file stays."""
    for name in names:
        path = folder / name
        if os.path.lexists(path) and not path.is_symlink() and (kind := _kind(path)) is not None:
            raise InputError(f"{path}: is {kind}, and would have to be a file")


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _blame(error: OSError, made: Path | None, path: Path, folder: Path) -> None:
    """An error of the hidden folder `made` speaks of `path`, and of what is in it as of what is to be in `folder`."""
    if error.errno is None:
        return
    at = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
    if at is None or made is None or at == made:
        error.filename = str(path)
    elif made in at.parents:
        error.filename = str(folder / at.relative_to(made))


@contextlib.contextmanager
def replacing(path: Name) -> Iterator[Path]:
    """Yields a path of the same name in a hidden folder beside, which takes its place at the end, once it is on the disk;
    with it what else was written there, as the data of a header. Nothing is left behind. An OSError names the path.
    """
    path = Path(path)
    _refuse_places(path.parent, [path.name])
    made = None
    try:
        with _exchange.scratch(path.parent, path.name) as made:
            yield made / path.name
            # The header last, which names the data.
            written = sorted({*os.listdir(made), path.name}, key=lambda name: name == path.name)
            for name in written:
                _exchange.sync(made / name)
            for name in written:
                os.replace(made / name, path.with_name(name))
    except OSError as error:
        _blame(error, made, path, path.parent)
        raise
    if not _exchange.is_marked(path.parent.name):  # whose maker sees to it in the end
        _exchange.sync(path.parent)


def probe(path: Name) -> None:
    """An OSError that says why nothing more can be written to a file, if so: not all writers say it."""
    with contextlib.suppress(FileNotFoundError, IsADirectoryError), open(path, "ab") as stream:
        stream.write(bytes(1 << 20))
        stream.flush()
        os.fsync(stream.fileno())


def reserve(path: Name, size: int) -> None:
    """An OSError where a file cannot grow to so many bytes: for writers that end the process then. Nothing stays."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "ab") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
        os.unlink(path)


def write_bytes(path: Name, content: bytes | memoryview) -> None:
    """A whole file, or the one that was there and an OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Name, value: Any) -> None:
    """NaN and infinity, which JSON has not, become null."""
    text = json.dumps(_plain(value), indent=1, allow_nan=False, ensure_ascii=False)
    write_bytes(path, f"{text}\n".encode())


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


@contextlib.contextmanager
def held(out: Name) -> Iterator[None]:
    """A folder to write to, for this process alone until the end; what killed ones left of theirs is mended and taken away.

    InputError: another process holds it.
    """
    path = Path(os.path.realpath(out))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_exchange.held(path))
        except BlockingIOError as error:
            raise InputError(f"{os.fspath(out)}: another run is writing to it") from error
        with _signals.none():
            _exchange.sweep(path.parent, path.name)
            _exchange.sweep(path)
        yield


def exchange(made: Path, out: Path, names: Iterable[str]) -> None:
    """All files of `made`, a folder in `out`, come into `out`, and others of `names` disappear: all or, with an error, none.

    InputError: one of them is no file there.
    """
    _refuse_places(out, {*names, *os.listdir(made)})
    with _signals.none():
        _exchange.exchange(made, out, names)


@contextlib.contextmanager
def remade(out: Path, names: Iterable[str]) -> Iterator[Path]:
    """Yields an empty folder, in the existing `out` that the caller holds; `exchange` follows, and an OSError speaks of `out`."""
    made = None
    try:
        with _exchange.scratch(out, out.name) as made:
            yield made
            exchange(made, Path(os.path.realpath(out)), names)
    except OSError as error:
        _blame(error, made, out, out)
        raise


def settle(out: Name) -> None:
    """What killed processes left in a folder is mended and taken away, if no other process holds it."""
    if os.path.isdir(out):
        with contextlib.suppress(OSError, InputError), held(out):
            pass


@contextlib.contextmanager
def output_folder(out: Name, names: Iterable[str], *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder that becomes `out` at the end; on any error `out` is as it was before, and an OSError speaks of `out`.

    A new `out` appears by one rename. In one that exists the files written take the places of their namesakes
    and others of `names` disappear, all or none, with signals held back; what else is in it stays. Of several processes
    that write to one folder all but the first are refused.
    Raises:
        InputError: out is empty or no folder, holds one of `names` and replace is false or that is no file,
            cannot be made, or is another process's.
    """
    if not os.fspath(out):
        raise InputError("the output folder must have a name, got an empty one")
    given = Path(out)
    require_utf8(given.absolute())
    if not given.is_dir() and (given.exists() or given.is_symlink()):
        raise InputError(f"{given}: exists and is not a folder")
    real = Path(os.path.realpath(given))
    missing = [parent for parent in real.parents if not parent.exists()]
    made, done = None, False
    try:
        try:
            if missing:
                real.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{given}: cannot be made: {_reason(error)}") from error
        with held(given):
            exists = given.is_dir()
            _refuse_places(given, names)
            taken = [name for name in names if exists and os.path.lexists(given / name)]
            if taken and not replace:
                raise InputError(
                    f"{given}: already holds {taken[0]}; give another folder, or --force to replace it"
                )
            with contextlib.ExitStack() as stack:
                # Inside an existing folder, which may be a mount of its own that no rename crosses.
                place = real if exists else real.parent
                try:
                    made = stack.enter_context(_exchange.scratch(place, real.name))
                except OSError as error:
                    raise InputError(f"{given}: cannot be made: {_reason(error)}") from error
                yield made
                with _signals.none():
                    if exists:
                        exchange(made, real, names)
                    else:
                        _exchange.sync(made)
                        os.rename(made, real)
                        _exchange.sync(real.parent)
                    done = True
    except OSError as error:
        _blame(error, made, given, given)
        raise
    finally:
        for parent in [] if done else missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
