"""How a launcher starts a Triton kernel, and how tests learn what launchers start."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
_recorder: Callable[..., None] | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """``kernel[grid](*args, **constants)`` on the device and the current stream of the first tensor.

    No autotuning and no host synchronisation: CUDA graphs capture it. Python floats become fp32 arguments: pass what needs
    fp64 as a constant or in a tensor.
    """
    if _recorder is not None:
        _recorder(kernel, grid, args, constants, num_warps, num_stages)
        return
    tensor = next(a for a in args if isinstance(a, torch.Tensor))
    device = torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()
    with device:
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


@contextlib.contextmanager
def recording(recorder: Callable[..., None]) -> Iterator[None]:
    """Within it nothing is launched: ``recorder(kernel, grid, args, constants, num_warps, num_stages)`` is told instead."""
    global _recorder
    _recorder, before = recorder, _recorder
    try:
        yield
    finally:
        _recorder = before


def blocks(n: int, block: int) -> int:
    return triton.cdiv(n, block)


def power_of_two(n: int, most: int) -> int:
    """A block that holds n elements, of at most `most`."""
    return min(most, triton.next_power_of_2(n))


def arithmetic_of(*tensors: Tensor | None) -> torch.dtype:
    """The type that kernels compute in; None is no tensor."""
    return (
        torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    )


def contiguous(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    return (t if t is None else t.contiguous() for t in tensors)
