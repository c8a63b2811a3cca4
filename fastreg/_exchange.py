"""Folders that change as a whole: who holds one, what killed processes left of theirs, one set of files for another.

A process that works on a folder holds it by a lock, which the system drops with the process however that ends: what bears our
mark, comes from this machine and is not held is what a killed one left.
"""

import contextlib
import ctypes
import errno
import functools
import json
import os
import re
import secrets
import shutil
import socket
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fastreg import _signals

try:
    import fcntl
except ImportError:  # no locks: nothing is known to be left, so nothing is taken away
    fcntl = None  # type: ignore[assignment]

JOURNAL, OLD = ".journal", ".old"


def sync(path: Path) -> None:
    """On the disk, or OSError: what the system could not write in the end is told here."""
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except OSError:
        if folder:  # Windows
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if not folder and error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            error.filename = str(path)
            raise
    finally:
        os.close(handle)


# Names and locks


@functools.cache
def _here() -> tuple[str, str]:
    """Of this machine, and of this start of it: containers on one machine share that alone."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
    except OSError:
        start = socket.gethostname()
    return f"{_hash(socket.gethostname()):04x}", f"{_hash(start):04x}"


def _hash(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogateescape")) & 0xFFFF


def _label(name: str) -> str:
    return name if len(os.fsencode(name)) < 200 else f"{name[:40]}~{_hash(name):04x}"


def mark(name: str) -> str:
    """The name of a hidden folder of this process, for what is to be called `name`."""
    return f".{_label(name) or 'out'}.{''.join(_here())}-{secrets.token_hex(4)}"


def is_marked(name: str) -> bool:
    """Whether it is the name of a hidden folder that `mark` made."""
    return re.search(r"^\..+\.[0-9a-f]{8}-[0-9a-f]{8}$", name) is not None


def hold(path: Path, create: bool = False) -> int | None:
    """A file descriptor that holds a file or folder until it is closed; None: nothing can be held here.

    Raises: BlockingIOError: another process holds it. OSError: it cannot be opened.
    """
    if fcntl is None:
        return None
    handle = os.open(path, (os.O_RDWR | os.O_CREAT) if create else os.O_RDONLY, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Holds `out`, which need not exist but its parent, for one process. BlockingIOError: another one does."""
    lock = out.parent / f".{_label(out.name)}.lock"
    handle = None
    try:
        try:
            while out.name and (handle := hold(lock, create=True)) is not None:
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.fstat(handle), os.stat(lock)):
                        break
                os.close(handle)  # of a process that has just taken it away
        except BlockingIOError:
            raise
        except OSError:  # not ours to write to
            handle = hold(out) if out.is_dir() else None
            lock = out
        yield
    finally:
        if handle is not None:
            if lock != out:
                lock.unlink(missing_ok=True)
            os.close(handle)


def _made(folder: Path, name: str) -> tuple[Path, int | None]:
    """A new hidden folder, and what holds it. Before it is held another process's sweep may take it for one that was left."""
    while True:
        made = folder / mark(name)
        made.mkdir()
        try:
            handle = hold(made)
        except (BlockingIOError, FileNotFoundError):
            continue
        except OSError:
            return made, None
        if handle is None or made.exists():
            return made, handle
        os.close(handle)


@contextlib.contextmanager
def scratch(folder: Path, name: str) -> Iterator[Path]:
    """Yields a new folder in another one, held, for what is to be called `name`; gone at the end, as are those that were left."""
    sweep(folder, name)
    made, handle = _made(folder, name)
    try:
        yield made
    finally:
        with _signals.none():
            shutil.rmtree(made, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _left(folder: Path, name: str | None) -> list[Path]:
    """What bears a mark of this machine, for `name` or for any."""
    label = ".+" if name is None else re.escape(_label(name) or "out")
    form = re.compile(rf"\.{label}\.([0-9a-f]{{4}})([0-9a-f]{{4}})-[0-9a-f]{{8}}", re.DOTALL)
    try:
        found = [(one, form.fullmatch(one)) for one in os.listdir(folder)]
    except OSError:
        return []
    here = _here()
    return [
        folder / one for one, is_ours in found if is_ours and (is_ours[1] == here[0] or is_ours[2] == here[1])
    ]


def sweep(folder: Path, name: str | None = None) -> None:
    """Takes away what killed processes left in a folder, for `name` or for any; an exchange that one has begun is undone.

    OSError where that cannot be undone.
    """
    for left in _left(folder, name):
        try:
            handle = hold(left)
        except OSError:  # held, or not ours
            continue
        if handle is None:
            continue
        try:
            if left.is_dir() and not left.is_symlink():
                _undo(left, folder)
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(handle)


# One set of files for another


def exchange(made: Path, out: Path, names: Iterable[str]) -> None:
    """All files of `made`, a folder in `out`, come into `out`, and others of `names` disappear; what else is there stays.

    By one step where the system can exchange two folders; elsewhere by a journal, from which an exchange that failed, or
    whose process was killed, is undone: at once or by the next `sweep`.
    """
    written = os.listdir(made)
    for name in written:
        sync(made / name)
    if not _at_once(made, out, {*names, *written}):
        _by_journal(made, out, {*names, *written}, written)


def _at_once(made: Path, out: Path, gone: set[str]) -> bool:
    """Whether it was possible: a folder beside `out` with hard links to what stays takes its place."""
    swap = _swap()
    before = set(os.listdir(out)) - {made.name}
    stays = before - gone
    if swap is None or os.path.ismount(out) or _visited(out):
        return False
    if any((out / name).is_dir() and not (out / name).is_symlink() for name in stays):
        return False
    beside = out.parent / made.name
    linked = []
    try:
        os.rename(made, beside)
        try:
            for name in stays:
                os.link(out / name, beside / name, follow_symlinks=False)
                linked.append(name)
            shutil.copystat(out, beside)
            was, now = os.stat(out), os.stat(beside)
            if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
                os.chown(beside, was.st_uid, was.st_gid)
            sync(beside)
            swap(beside, out)
        except BaseException:
            for name in linked:
                (beside / name).unlink()
            os.rename(beside, made)
            raise
    except OSError:  # another mount, no hard links, not ours: the other way says what is wrong
        return False
    # What came while we were at it.
    for name in set(os.listdir(beside)) - before:
        if not os.path.lexists(out / name):
            with contextlib.suppress(OSError):
                os.rename(beside / name, out / name)
    sync(out.parent)
    shutil.rmtree(beside, ignore_errors=True)
    return True


def _by_journal(made: Path, out: Path, gone: set[str], written: Iterable[str]) -> None:
    had = [name for name in gone if os.path.lexists(out / name)]
    (made / OLD).mkdir()
    draft = made / f"{JOURNAL}.new"
    draft.write_text(json.dumps({"had": had, "written": list(written)}), encoding="utf-8")
    sync(draft)
    os.rename(draft, made / JOURNAL)
    sync(made)
    try:
        for name in had:
            os.replace(out / name, made / OLD / name)
        for name in written:
            os.replace(made / name, out / name)
        sync(out)
    except BaseException:
        _undo(made, out)
        raise
    (made / JOURNAL).unlink()  # from here on it is done


def _undo(made: Path, out: Path) -> None:
    """Where a journal is: `out` is as before the exchange. Can be done again where it was interrupted."""
    try:
        journal = json.loads((made / JOURNAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    for name in journal["written"]:
        if name not in journal["had"] and not os.path.lexists(made / name):
            (out / name).unlink(missing_ok=True)
    for name in journal["had"]:
        if os.path.lexists(made / OLD / name):
            os.replace(made / OLD / name, out / name)
    sync(out)
    (made / JOURNAL).unlink()


def _swap() -> Callable[[Path, Path], None] | None:
    """A function that exchanges two paths in one step; None where the system has none."""
    if sys.platform != "linux":
        return None
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None

    def swap(one: Path, other: Path) -> None:
        here, exchanged = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchanged):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(other))

    return swap


def _visited(folder: Path) -> bool:
    """Whether it is the current folder of a process, a shell say, which would be left in the old one."""
    here = os.stat(folder)
    for process in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(process), here):
                return True
    return False
