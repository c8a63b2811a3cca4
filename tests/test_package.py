"""The package around the ops: loading, falling back, choosing instruction sets."""

import importlib.metadata
import importlib.util
import os
import platform
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


def test_a_script_beside_the_clone_finds_the_package(tmp_path):
    try:
        importlib.metadata.version("fastreg")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastreg is not installed here")
    (tmp_path / "fastreg" / "csrc").mkdir(parents=True)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = "import fastreg; fastreg.warp"
    run = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


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


@pytest.mark.skipif(not COMPILED, reason="needs the compiled extension")
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_an_extension_that_is_cut_short_is_not_loaded(tmp_path, share):
    """As a full disk leaves it: loading it is a bus error."""
    content = Path(importlib.util.find_spec("fastreg._C").origin).read_bytes()
    assert _ext._unfit(importlib.util.find_spec("fastreg._C").origin) == ""
    (tmp_path / "extension").write_bytes(content[: int(share * len(content))])
    assert _ext._unfit(tmp_path / "extension") == "is cut short"


@pytest.mark.skipif(not COMPILED, reason="needs the compiled extension")
def test_an_extension_of_another_torch_is_not_loaded(tmp_path):
    path = copy_without_extension(tmp_path)
    extension = Path(importlib.util.find_spec("fastreg._C").origin)
    built = b"FASTREG_TORCH=" + torch.__version__.encode() + b"\0"
    major, minor, rest = torch.__version__.split(".", 2)
    other = f"{major}.{int(minor) + 1:0{len(minor)}}.{rest}"
    content = extension.read_bytes()
    assert content.count(built) == 1
    (path / "fastreg" / extension.name).write_bytes(
        content.replace(built, b"FASTREG_TORCH=" + other.encode() + b"\0")
    )
    run = python(STEP, path)
    assert run.returncode == 0, run.stderr
    message = f"compiled extension was built against torch {other}, and this is torch {torch.__version__}"
    assert run.stderr.count(f"UserWarning: fastreg: {message}, using the PyTorch reference (slow)") == 1
    assert "pip install --no-build-isolation -e ." in run.stderr


@pytest.mark.skipif(not COMPILED, reason="needs the compiled extension")
@pytest.mark.parametrize(
    ("file", "schema"),
    [("ops/compose.py", "compose(Tensor u, "), ("io/_resample.py", "resample(Tensor image, ")],
    ids=["of an op", "of io"],
)
def test_an_extension_of_another_fastreg_is_not_loaded(tmp_path, file, schema):
    """After `git pull` an op may have another schema: one warning, and all ops by the reference, none by half of the kernels."""
    path = copy_without_extension(tmp_path)
    extension = Path(importlib.util.find_spec("fastreg._C").origin)
    (path / "fastreg" / extension.name).write_bytes(extension.read_bytes())
    op = path / "fastreg" / file
    text = op.read_text(encoding="utf-8")
    assert text.count(schema) == 1
    op.write_text(text.replace(schema, f"{schema}int more, "), encoding="utf-8")
    none = "assert not any(fastreg._ext.has_kernel(op, 'CPU') for op in fastreg.ops.__all__)\n"
    none += "assert not torch._C._dispatch_has_kernel_for_dispatch_key('fastreg_io::resample', 'CPU')"
    run = python(f"{STEP}\n{none}\n", path)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("UserWarning: fastreg: compiled extension failed to load under torch") == 1
    assert "(built from another fastreg: " in run.stderr


@pytest.mark.parametrize(
    ("built", "running", "differs"),
    [
        ("2.13.0+cpu", "2.13.1+cu130", False),
        ("2.13.0", "2.14.0", True),
        ("2.14.0.dev20261101", "2.14.0", True),
        ("2.14.0.dev20261101", "2.14.0.dev20261101", False),
    ],
)
def test_minor_versions_of_torch_differ(monkeypatch, tmp_path, built, running, differs):
    (tmp_path / "extension").write_bytes(b"\x7fELF\0FASTREG_TORCH=" + built.encode() + b"\0...")
    monkeypatch.setattr(torch, "__version__", running)
    assert bool(_ext._unfit(tmp_path / "extension")) is differs


def test_instruction_sets_that_were_not_built_are_named():
    def said(refused, built, machine, used):
        available = [s for s in built if s in machine]
        return _ext._sets_to_warn_of(
            {
                "isa": used,
                "isa_refused": refused,
                "isa_built": built,
                "isa_of_machine": machine,
                "isa_available": available,
            }
        )

    every = ["baseline", "avx2", "avx512"]
    assert said("", every, every, "avx512") == ""
    assert said("", ["baseline"], every, "baseline") == ""
    message = said("avx2", ["baseline", "avx512"], every, "avx512")
    assert message.startswith(
        "fastreg: FASTREG_ISA=avx2 was not built (baseline, avx512): using avx512. `FASTREG_ISAS=all pip"
    )
    assert (
        said("avx512", every, every[:2], "avx2")
        == "fastreg: FASTREG_ISA=avx512 is not of this machine (baseline, avx2): using avx2"
    )
    message = said("", ["baseline", "avx512"], every[:2], "baseline")
    assert message.startswith(
        "fastreg: built for avx512, which is not of this machine (baseline, avx2): using baseline"
    )


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


def test_torchs_headers_are_those_of_this_environment(setup_py, tmp_path):
    done = tmp_path / "op.o"
    done.with_suffix(".d").write_text(f"{done}: {SETUP} /elsewhere/lib/torch/include/ATen/ATen.h")
    assert setup_py["files_of"](done) == [str(SETUP), f"{setup_py['torch_headers']()}/ATen/ATen.h"]
    assert Path(setup_py["files_of"](done)[1]).exists()


def test_an_object_whose_source_was_edited_meanwhile_is_not_current(setup_py, tmp_path):
    source = tmp_path / "op.cpp"
    source.touch(), os.utime(source, (0, 0))
    compiler = tmp_path / "compiler"  # ... -MMD -MF listed -o object
    compiler.write_text(f'echo "$5: {source}" > "$3"; touch "$5"; [ -z "$EDIT" ] || echo "int b;" > {source}')
    for edit, current in ((False, True), (True, False)):
        done = tmp_path / f"{edit}.o"
        command = ["env", f"EDIT={'1' * edit}", "sh", str(compiler)]
        setup_py["compiled"](command, done, command)
        assert setup_py["is_current"](done, command) is current


def test_instruction_sets_are_those_that_are_asked_for(setup_py, fake_nvcc, monkeypatch):
    sets = setup_py["instruction_sets"]
    if len(setup_py["ISAS"]) == 1:
        pytest.skip("there is only one")
    monkeypatch.delenv("FASTREG_ISAS", raising=False)
    old = fake_nvcc("echo '#define __AVX__ 1'")
    assert sets(old, "all") == ["baseline", "avx2", "avx512"]
    assert sets(old, "native") == ["baseline"]
    assert sets(fake_nvcc("echo '#define __AVX2__ 1\n#define __FMA__ 1\n#define __F16C__ 1'"), "native") == [
        "baseline",
        "avx2",
    ]
    assert sets(fake_nvcc("exit 1"), "native") == ["baseline", "avx2", "avx512"]
    monkeypatch.setenv("FASTREG_ISAS", "avx512")
    assert sets(old, "all") == ["baseline", "avx512"]
    monkeypatch.setenv("FASTREG_ISAS", "sse9")
    with pytest.raises(
        SystemExit, match="FASTREG_ISAS must be native, all or some of baseline avx2 avx512, got sse9"
    ):
        sets(old, "all")


COMPILER = """#!/bin/sh
case "$*" in
  --version) echo "$FAKE_VERSION"; exit;;
  *" -dM "*) exit 1;;
esac
while [ $# -gt 0 ]; do
  case $1 in -MF) listed=$2;; -o) out=$2;; -c) source=$2;; esac
  shift
done
[ -z "$listed" ] || echo "$out: $source" > "$listed"
touch "$out"
"""


def test_a_build_compiles_what_is_not_of_this_compiler(tmp_path):
    """The objects of one folder, built by two checkouts."""
    pytest.importorskip("setuptools")
    if not SETUP.exists():
        pytest.skip("not in a checkout")
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER), compiler.chmod(0o755)

    def build(version, sets):
        own = {
            "CC": str(compiler),
            "CXX": str(compiler),
            "LDCXXSHARED": f"{compiler} -shared",
            "FAKE_VERSION": version,
        }
        own |= {
            "FASTREG_OBJECTS": str(tmp_path / "objects"),
            "FASTREG_ISAS": sets,
            "FASTREG_CUDA": "0",
            "MAX_JOBS": "2",
        }
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTREG_")}
        command = [sys.executable, str(SETUP), "--quiet", "build_ext", "--build-lib", str(tmp_path / "lib")]
        command += ["--build-temp", str(tmp_path / "temp")]
        run = subprocess.run(command, cwd=SETUP.parent, env=clean | own, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    kernels = len(list((SETUP.parent / "csrc" / "cpu").glob("*.cpp")))
    first = build("a compiler 1.0", "baseline")
    assert f"fastreg._C: {2 * kernels + 1} objects to compile, about " in first
    assert f"[ 1/{2 * kernels + 1}] " in first
    assert build("a compiler 1.0", "baseline") == "fastreg._C is up to date\n"
    assert f"fastreg._C: {2 * kernels + 1} objects to compile" in build("a compiler 1.1", "baseline")
    # module.cpp says what was built; the bindings are the same for all sets.
    if platform.machine() in ("x86_64", "AMD64"):
        assert f"fastreg._C: {kernels + 1} objects to compile" in build("a compiler 1.1", "avx2")


def test_without_torch_a_build_says_what_to_do(tmp_path):
    if not SETUP.exists():
        pytest.skip("not in a checkout")
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    run = subprocess.run(
        [sys.executable, str(SETUP), "--version"],
        cwd=SETUP.parent,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "FASTREG_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "install torch, then pip install --no-build-isolation -e ." in run.stderr
    assert "Traceback" not in run.stderr
