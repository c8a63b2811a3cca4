"""Every Triton kernel compiles to machine code, without a GPU, for every architecture it is meant for.

What is compiled is what launchers start: the calls of tests/gpu/aot_<op>.py run on CPU tensors, and instead of a launch the
kernel, the types of its arguments and its constants are noted. (What the kernels compute: FASTREG_TEST_BACKEND=triton.)
"""

import importlib
from pathlib import Path

import pytest
import torch
from common import BACKEND

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastreg import kernels  # noqa: E402

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="the interpreter replaces the compiler")
TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]
QUICK = ("integrate_velocity", 90)  # what make test compiles; the others take minutes
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
FILES = sorted(p.stem.removeprefix("aot_") for p in Path(__file__).parent.glob("aot_*.py"))


def type_of(value):
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def sources(calls):
    """Distinct (kernel, signature, constants, warps, stages) of what the calls launch."""
    from fastreg.kernels import launch

    found = {}

    def note(kernel, grid, args, constants, num_warps, num_stages):
        assert len(grid) == 1, "y and z of a grid end at 65,535, which images or planes can exceed"
        given = dict(zip(kernel.arg_names, args, strict=False)) | constants
        constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr or given[p.name] is None}
        # As a launch does: a 1 becomes part of the kernel, a number that has no methods.
        for p in kernel.params:
            value = given[p.name]
            if isinstance(value, int) and value == 1 and not (p.is_constexpr or p.do_not_specialize):
                constants[p.name] = 1
        types = {n: "constexpr" if n in constants else type_of(given[n]) for n in kernel.arg_names}
        key = (kernel.__name__, str(types), str(constants), num_warps, num_stages)
        found[key] = (kernel, types, constants, {"num_warps": num_warps, "num_stages": num_stages})

    with launch.recording(note):
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic, warn_only=True)
            for op, *args in calls:
                getattr(importlib.import_module(f"fastreg.kernels.{kernels.LAUNCHERS[op]}"), op)(*args)
    return list(found.values())


@pytest.mark.parametrize(
    ("file", "target"),
    [
        pytest.param(
            file,
            target,
            id=f"{file}-{target[0]}-{target[1]}",
            marks=() if (file, target[1]) == QUICK else pytest.mark.aot,
        )
        for file in FILES
        for target in TARGETS
    ],
)
def test_compiles(file, target):
    calls = list(importlib.import_module(f"aot_{file}").calls())
    assert {op for op, *_ in calls} == {op for op, at in kernels.LAUNCHERS.items() if at == file}
    for kernel, types, constants, options in sources(calls):
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        compiled = triton.compile(
            source, target=GPUTarget(*target), options=options | {"enable_fp_fusion": True}
        )
        assert compiled.asm.get("cubin") or compiled.asm.get("hsaco"), kernel.__name__


def test_every_launcher_is_compiled():
    assert set(FILES) == set(kernels.LAUNCHERS.values())
