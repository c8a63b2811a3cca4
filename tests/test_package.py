"""The package around the ops: loading, falling back, choosing instruction sets."""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from common import COMPILED

import fastreg
from fastreg import _ext

PACKAGE = Path(fastreg.__file__).parent


def python(code, path=PACKAGE.parent, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTREG_")}
    env = clean | {"PYTHONPATH": str(path)} | environment
    # An editable install would lend its extension to a copy that has none.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n" + code
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=path, capture_output=True, text=True)


def copy_without_extension(folder):
    shutil.copytree(PACKAGE, folder / "fastreg", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return folder


STEP = """
import torch, fastreg
torch.manual_seed(0)
x, u = torch.rand(1, 2, 9, 10, 41, requires_grad=True), torch.randn(1, 3, 9, 10, 41, requires_grad=True)
y = fastreg.warp(x, u)
loss = fastreg.lcc_loss(x.detach(), y, 5) + fastreg.diffusion(u) + fastreg.mse_loss(x.detach(), y)
loss = loss + fastreg.jacobian_determinant(fastreg.smooth(u, 1.0)).square().mean()
loss = loss + fastreg.resize_displacement(u, (5, 12, 30)).square().mean()
loss = loss + fastreg.total_variation(u, isotropic=True) + fastreg.bending_energy(u)
loss = loss + fastreg.integrate_gradients(u).square().mean()
g = torch.autograd.grad(loss, (x, u))
print(loss.item(), *(t.double().sum().item() for t in g), *(t.double().square().sum().item() for t in g))
"""


def test_works_without_an_extension_and_says_so_once(tmp_path):
    path = copy_without_extension(tmp_path)
    run = python(STEP, path)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("UserWarning: fastreg: compiled extension not found") == 1
    assert "pip install --no-build-isolation -e ." in run.stderr
    silent = python("import fastreg; print(fastreg.backends()['warp']['cpu'])", path, FASTREG_REFERENCE="1")
    assert silent.stderr == ""
    assert silent.stdout == "PyTorch reference (extension not loaded: FASTREG_REFERENCE=1)\n"


def test_a_broken_extension_is_reported_and_survived(tmp_path):
    path = copy_without_extension(tmp_path)
    (path / "fastreg" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    run = python(STEP, path)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("UserWarning: fastreg: compiled extension failed to load under torch") == 1


def test_every_op_has_an_implementation_on_every_device():
    table = fastreg.backends()
    assert {"warp", "warp_bwd", "lcc_loss", "lcc_map"} <= set(table)
    for row in table.values():
        assert set(row) == {"cpu", "cuda"}
        assert row["cpu"].startswith("C++ (" if COMPILED else "PyTorch reference (extension")
        assert row["cuda"].startswith(("CUDA C++", "Triton", "PyTorch reference ("))


@pytest.mark.skipif(not COMPILED, reason="needs the compiled extension")
def test_instruction_sets_agree():
    results = {isa: python(STEP, FASTREG_ISA=isa) for isa in _ext.build_info()["isa_available"]}
    assert all(r.returncode == 0 and r.stderr == "" for r in results.values()), results
    numbers = [[float(v) for v in r.stdout.split()] for r in results.values()]
    assert all(n == pytest.approx(numbers[0], rel=1e-6) and len(n) == 5 for n in numbers), results


@pytest.mark.skipif(not COMPILED, reason="needs the compiled extension")
def test_reference_and_kernels_agree():
    ours, theirs = (
        [float(v) for v in python(STEP, **e).stdout.split()] for e in ({}, {"FASTREG_REFERENCE": "1"})
    )
    assert len(ours) == 5
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.skipif(not COMPILED, reason="needs the compiled extension")
def test_an_instruction_set_the_machine_lacks_is_refused():
    run = python("import fastreg; print(fastreg.backends()['warp']['cpu'])", FASTREG_ISA="sse9")
    assert "UserWarning: fastreg: FASTREG_ISA=sse9 is not of this machine (baseline" in run.stderr
    assert run.stdout == f"C++ ({_ext.build_info()['isa_available'][-1]})\n"


def test_public_names_are_documented():
    for name in fastreg.__all__:
        if callable(getattr(fastreg, name)):
            assert getattr(fastreg, name).__doc__, name


SETUP = PACKAGE.parent / "setup.py"
NVCC = "Cuda compilation tools, release {0}, V{0}.88\nBuild cuda_{0}.r{0}/compiler.36424714_0\n"


@pytest.fixture
def setup_py(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    if not SETUP.exists():
        pytest.skip("not in a checkout")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("FASTREG_EXT", "0")
    return runpy.run_path(str(SETUP))


@pytest.mark.parametrize(("compiler", "torch_cuda"), [("13.0", "13.1"), ("12.8", "12.4"), ("12.8", None)])
def test_nvcc_of_the_major_version_of_torch_is_taken(setup_py, compiler, torch_cuda):
    assert setup_py["cuda_mismatch"](NVCC.format(compiler), torch_cuda) is None
    assert setup_py["cuda_mismatch"]("says nothing", torch_cuda) is None


@pytest.fixture
def fake_nvcc(monkeypatch, tmp_path):
    """Writes a compiler that runs this shell script."""

    def write(script):
        compiler = tmp_path / "bin" / "nvcc"
        compiler.parent.mkdir(exist_ok=True)
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        return str(compiler)

    return write


def test_nvcc_of_another_major_version_is_refused(setup_py, fake_nvcc, monkeypatch, capsys):
    message = "nvcc is of CUDA 13.0, torch of CUDA 12.8"
    assert setup_py["cuda_mismatch"](NVCC.format("13.0"), "12.8").startswith(message)
    compiler = fake_nvcc(f"cat <<END\n{NVCC.format('13.0')}END")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.delenv("FASTREG_CUDA", raising=False)
    assert setup_py["nvcc"]() is None
    assert message in capsys.readouterr().err
    monkeypatch.setenv("FASTREG_CUDA", "1")
    with pytest.raises(SystemExit, match=message):
        setup_py["nvcc"]()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert setup_py["nvcc"]() == str(compiler)


def test_an_nvcc_that_does_not_run_costs_the_cuda_kernels_alone(setup_py, fake_nvcc, monkeypatch, capsys):
    compiler = fake_nvcc("exit 1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("FASTREG_CUDA", raising=False)
    assert setup_py["nvcc"]() is None
    assert f"{compiler} does not run" in capsys.readouterr().err
    monkeypatch.setenv("FASTREG_CUDA", "1")
    with pytest.raises(SystemExit, match="does not run"):
        setup_py["nvcc"]()


def test_architectures_are_those_that_nvcc_knows(setup_py, fake_nvcc, monkeypatch):
    monkeypatch.delenv("FASTREG_CUDA_ARCHS", raising=False)
    assert setup_py["architectures"](fake_nvcc("echo sm_75 sm_80 sm_86 sm_90")) == ["80", "86", "90"]
    with pytest.raises(SystemExit, match="FASTREG_CUDA_ARCHS"):
        setup_py["architectures"](fake_nvcc("echo sm_50"))
    monkeypatch.setenv("FASTREG_CUDA_ARCHS", "90 100")
    assert setup_py["architectures"](fake_nvcc("echo sm_50")) == ["90", "100"]


def test_an_object_is_current_as_long_as_its_sources_say_the_same(setup_py, tmp_path):
    done, source = tmp_path / "op.o", tmp_path / "op.cpp"
    done.touch(), source.write_text("int a;")
    assert not setup_py["is_current"](done, ["-O3"])
    done.with_suffix(".d").write_text(f"{done}: {source} \\\n {SETUP}\n")
    setup_py["note_key"](done, ["-O3"])
    assert setup_py["is_current"](done, ["-O3"])
    assert not setup_py["is_current"](done, ["-O2"])
    source.write_text("int b;")
    os.utime(source, (0, 0))  # older than the object, which says nothing
    setup_py["digest"].cache_clear()
    assert not setup_py["is_current"](done, ["-O3"])
