"""Which kernels a GPU gets: those it was built for, or else Triton. Pretended GPUs, no real one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastreg
from fastreg import _ext

ROOT = Path(fastreg.__file__).resolve().parents[1]
# fastreg with a CUDA extension of which only the architectures are real, on GPUs of these compute capabilities.
PRETENDED = """
import importlib.util, sys, types, torch
library, *capabilities = sys.argv[1:]
capabilities = [tuple(map(int, c.split("."))) for c in capabilities]
find = importlib.util.find_spec
origin = types.SimpleNamespace(origin=library)
importlib.util.find_spec = lambda name, *more: origin if name == "fastreg._C_cuda" else find(name, *more)
torch.version.cuda = "13.0"

def load(path):
    torch.kept = torch.library.Library("fastreg", "IMPL")
    for op in "warp", "mse_map":
        torch.kept.impl(op, lambda *args, op=op: torch.full((1,), 7.0), "CUDA")

def too_early(*args):
    raise AssertionError("import asks for GPUs")

torch.ops.load_library = load
torch.cuda.device_count = torch.cuda.get_device_capability = torch.cuda.init = too_early
import fastreg
from fastreg import kernels
kernels.launcher = lambda op: lambda *args: torch.full((1,), 3.0)

def start():
    (call,) = [call for call, _ in torch.cuda._queued_calls if call.__module__ == "fastreg._ext"]
    call()

torch.cuda.is_available = lambda: True
torch.cuda.init = start
torch.cuda.device_count = lambda: len(capabilities)
torch.cuda.get_device_capability = lambda gpu: capabilities[gpu]
torch.cuda.get_device_name = lambda gpu: f"GPU {gpu}"

class OnGpu(torch.Tensor):
    device = property(lambda self: torch.device("cuda", self.gpu))

def on(gpu, *shape):
    tensor = torch.rand(shape).as_subclass(OnGpu)
    tensor.gpu = gpu
    return tensor

table = fastreg.backends()
print(*(table[op]["cuda"] for op in ("warp", "mse_map", "compose")), sep="; ")
for gpu in range(len(capabilities)):
    for op, *args in ("warp", on(gpu, 1, 3, 4, 4), None, torch.eye(2, 3)[None], "linear", "zeros"), (
        "mse_map", on(gpu, 1, 1, 4, 4), on(gpu, 1, 1, 4, 4), None
    ):
        kernel = torch.library.get_kernel(f"fastreg::{op}", "CUDA")
        result = kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)
        print({7.0: "CUDA C++", 3.0: "Triton"}.get(result.flatten()[0].item(), "reference"), end=" ")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """csrc/cuda/archs.cu, which holds no kernel, as a library of two architectures."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("library") / "_C_cuda.so"
    source = ROOT / "csrc" / "cuda" / "archs.cu"
    command = ["g++", "-shared", "-fPIC", "-x", "c++", str(source), "-o", str(path)]
    macros = {"FASTREG_CUDA_ARCHS": "80 90+ptx", "FASTREG_TORCH_VERSION": torch.__version__}
    subprocess.run([*command, *(f'-D{name}="{value}"' for name, value in macros.items())], check=True)
    return path


@pytest.mark.parametrize(
    ("capabilities", "answers", "used"),
    [
        ("8.6", "CUDA C++; CUDA C++; Triton", "CUDA C++ CUDA C++"),
        ("9.0 12.0", "CUDA C++; CUDA C++; Triton", "CUDA C++ CUDA C++ CUDA C++ CUDA C++"),
        ("7.5", "Triton; PyTorch reference (CUDA extension built for 80 90+ptx); Triton", "Triton reference"),
        (
            "9.0 7.5",
            "CUDA C++; on cuda:1 Triton; CUDA C++; on cuda:1 PyTorch reference (CUDA extension built for 80 90+ptx); Triton",
            "CUDA C++ CUDA C++ Triton reference",
        ),
    ],
)
def test_a_gpu_that_was_not_built_for_takes_triton(capabilities, answers, used, library):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTREG_")}
    command = [sys.executable, "-c", PRETENDED, str(library), *capabilities.split()]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert [line.strip() for line in run.stdout.splitlines()] == [answers, used]
    warned = "7.5" in capabilities
    assert run.stderr.count("Warning") == warned, run.stderr
    assert (
        f"built for 80 90+ptx, not for GPU {len(capabilities.split()) - 1} (sm_75)" in run.stderr
    ) == warned


@pytest.mark.parametrize(
    ("archs", "runs_on", "not_on"),
    [
        ("80 86+ptx", "8.0 8.6 8.9 9.0 12.1", "7.5"),
        ("80 86", "8.0 8.6 8.9", "7.5 9.0"),
        ("86", "8.6 8.9", "8.0"),
        ("90a+ptx", "9.0", "8.9 10.0"),
        ("100f+ptx 120+ptx", "10.0 10.3 12.0 12.1", "9.0 11.0"),
    ],
)
def test_what_a_build_runs_on(archs, runs_on, not_on):
    def fit(capability):
        return _ext.fits(archs, tuple(map(int, capability.split("."))))

    assert all(map(fit, runs_on.split()))
    assert not any(map(fit, not_on.split()))
