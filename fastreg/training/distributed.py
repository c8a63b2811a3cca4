"""Several processes of one training."""

import contextlib
import ctypes
import datetime
import gc
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from fastreg._files import InputError

# DDP imports it, and imported later than init_process_group it keeps the group in its default arguments for good; gloo's
# threads then outlive destroy_process_group, and may abort the process at its end.
with contextlib.suppress(ImportError):  # a torch without torch.distributed
    import torch.distributed.nn.functional


class Stopped(KeyboardInterrupt):
    """A signal ended a run after a step, in all processes at once, with everything saved."""


def ranks() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def usable(name: str | torch.device | None = None) -> torch.device:
    """The device of that name, or by default a GPU where there is one. InputError where it cannot be used."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if str(name).partition(":")[0] not in ("cpu", "cuda"):
            raise RuntimeError("must be cpu or cuda")
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


@contextlib.contextmanager
def processes(device: str | torch.device | None = None) -> Iterator[torch.device]:
    """Yields this process's device: the one given, else a GPU of its own where there are any. Under torchrun the processes find each
    other, and part at the end (once in a program); started otherwise there is one, and nothing else happens.

    A Training made inside lets go of the group with `release` (a Run does), or at the latest when it is garbage.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield usable(device)
        return
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = usable(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The others wait while the first validates.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=4))
    stopped = None
    try:
        yield device
    except Stopped as error:
        stopped = error
    except BaseException as error:
        # The end of the group would wait for what this process has begun with the others, who may not come: so it never ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            # What ended the other one, it says itself.
            raise InputError("another process of this run has ended") from error
        raise
    # Garbage may hold DDP, which holds the group, and gloo's threads last as long as the group: one that lets go of a tensor
    # while the interpreter ends aborts the process.
    gc.collect()
    dist.destroy_process_group()
    if stopped is not None:
        raise stopped
