"""FASTREG_TEST_BACKEND: whose kernels the tests of the ops run.

cpu (default)   what a user of CPU tensors gets
triton          the Triton launchers on CPU tensors, under Triton's interpreter
emulation       csrc/cuda under g++ on CPU tensors (tests/emulation/), every CUDA thread a fiber
cuda            everything on a GPU, where there is one
"""

import os

BACKEND = os.environ.get("FASTREG_TEST_BACKEND") or "cpu"
if BACKEND == "triton":
    # Read where triton is imported, and torch._inductor imports it.
    os.environ["TRITON_INTERPRET"] = "1"


def install():
    """Called before fastreg is imported."""
    if BACKEND == "cpu":
        return
    if BACKEND == "cuda":
        import torch

        torch.set_default_device("cuda")
        return
    os.environ["FASTREG_REFERENCE"] = "1"
    if BACKEND == "triton":
        _hasten_the_interpreter()
        from fastreg import _ext, kernels

        for op in kernels.LAUNCHERS:
            _ext.lib.impl(op, kernels.launcher(op), "CPU")
    elif BACKEND == "emulation":
        import emulation

        emulation.load()
    else:
        raise ValueError(f"FASTREG_TEST_BACKEND must be cpu, triton, emulation or cuda, got {BACKEND!r}")


def _hasten_the_interpreter():
    """Its checks of integer overflow are a third of its time."""
    from triton.language.semantic import TritonSemantic

    TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, a, b, op: None
