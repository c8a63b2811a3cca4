"""Triton kernels: what answers on a GPU where ``fastreg._C_cuda`` does not. <op>.py holds launchers, <op>_*.py what they launch.

A launcher is a plain function with the name and the signature of its op, so tests call it on CPU tensors under
``TRITON_INTERPRET=1``. Importing this package does not import triton.
"""

import importlib
from collections.abc import Callable
from typing import Any

# Op: the file that holds its launcher.
LAUNCHERS = {
    "local_correlation": "local_correlation",
    "local_correlation_bwd": "local_correlation",
    "cost_volume": "cost_volume",
    "lcc_loss": "lcc_loss",
    "lcc_map": "lcc_loss",
    "lcc_map_bwd": "lcc_loss",
    "warp": "warp",
    "warp_bwd": "warp",
    "compose": "integrate_velocity",
    "compose_bwd": "integrate_velocity",
    "integrate_velocity": "integrate_velocity",
    "integrate_velocity_bwd": "integrate_velocity",
    "invert_displacement": "invert_displacement",
    "invert_displacement_adjoint": "invert_displacement",
    "mind": "mind",
    "mind_bwd": "mind",
    "mind_mean_variance": "mind",
    "mind_loss": "mind",
    "mind_map": "mind",
    "mind_map_bwd": "mind",
}


def launcher(op: str) -> Callable[..., Any]:
    """The Triton implementation of ``fastreg::<op>``, imported when it is first called."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"fastreg.kernels.{LAUNCHERS[op]}"), op)(*args)

    return call
