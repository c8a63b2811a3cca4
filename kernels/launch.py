"""How a launcher starts a Triton kernel, and how tests learn what launchers start."""

import contextlib

import torch
import triton

_recorder = None


def launch(kernel, grid, *args, num_warps=4, num_stages=2, **constants):
    """``kernel[grid](*args, **constants)`` on the device and the current stream of the first tensor.

    No autotuning and no host synchronisation: CUDA graphs capture it. Python floats become fp32 arguments: pass what needs
    fp64 as a constant or in a tensor.
    """
    if _recorder is not None:
        _recorder(kernel, args, constants, num_warps, num_stages)
        return
    tensor = next(a for a in args if isinstance(a, torch.Tensor))
    device = torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()
    with device:
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


@contextlib.contextmanager
def recording(recorder):
    """Within it nothing is launched: ``recorder(kernel, args, constants, num_warps, num_stages)`` is told instead."""
    global _recorder
    _recorder, before = recorder, _recorder
    try:
        yield
    finally:
        _recorder = before


def blocks(n, block):
    return triton.cdiv(n, block)
