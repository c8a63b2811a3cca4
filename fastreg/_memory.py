"""How much memory a process can still take, where the system tells."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path


def available() -> int | None:
    """Bytes, the least that anything leaves: the machine with its swap, the limits of the process and of its control groups."""
    return min((max(0, free) for free in (*_machine(), *_process(), *_groups())), default=None)


def _machine() -> Iterator[int]:
    with contextlib.suppress(OSError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii")
        found = {key: int(kb) << 10 for key, kb in re.findall(r"(\w+): +(\d+) kB", lines)}
        yield found["MemAvailable"] + found.get("SwapFree", 0)


def _process() -> Iterator[int]:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            yield most - pages * resource.getpagesize()


def _groups() -> Iterator[int]:
    """Control groups, version 2 or 1; of a container's only its own is seen."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kinds, name = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            root = Path("/sys/fs/cgroup", *(["memory"] if kinds else []))
            files = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes")
                if kinds
                else ("memory.max", "memory.current")
            )
            own = root / name.lstrip("/")
            for group in (own, *own.parents):
                if group == root.parent:
                    break
                # "max", or not there
                with contextlib.suppress(OSError, ValueError):
                    most, used = (int((group / file).read_text(encoding="ascii")) for file in files)
                    told = (group / "memory.stat").read_text(encoding="ascii")
                    # What is kept of files gives way.
                    yield (
                        most
                        - used
                        + sum(map(int, re.findall(r"^(?:total_)?inactive_file (\d+)$", told, re.M)[-1:]))
                    )
