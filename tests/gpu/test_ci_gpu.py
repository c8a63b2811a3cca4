"""What .ci/gpu would run on a GPU, and that a stage goes on where the last one stopped. No GPU."""

import importlib.machinery
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from common import BACKEND

import fastreg
import fastreg.ops

ROOT = Path(fastreg.__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    BACKEND != "cpu" or not (ROOT / ".ci" / "gpu").exists(), reason="of a checkout; says nothing of kernels"
)


@pytest.fixture(scope="module")
def gpu():
    loader = importlib.machinery.SourceFileLoader("ci_gpu", str(ROOT / ".ci" / "gpu"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("ci_gpu", loader))
    sys.modules["ci_gpu"] = module  # its dataclass looks itself up
    loader.exec_module(module)
    sys.path.insert(0, str(ROOT))
    yield module
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def plan(gpu):
    return gpu.Plan()


def steps_of(unit):
    """Steps of test_gpu.py that the unit's -k takes."""
    from test_gpu import STEPS

    wanted = unit.command[unit.command.index("-k") + 1]
    return [s for s in STEPS if eval(re.sub(r"\b(?!and\b|not\b)(\w+)", rf"('\1' in 'stream[{s}]')", wanted))]


def test_what_the_stages_run(plan):
    units = {stage: list(getattr(plan, stage)()) for stage in ("build", "test", "sanitize", "bench")}
    for stage in units.values():
        assert max(Counter(u.name for u in stage).values()) == 1
        assert all(u.seconds <= 460 for u in stage), "a stage ends after 470 s: .ci/gpu, FASTREG_GPU_SECONDS"
    ours = plan.cuda & set(fastreg.ops.__all__)
    assert {"warp", "lcc_loss", "local_correlation", "mind", "mind_loss", "mse_loss", "compose"} <= ours
    tests = {u.name: u for u in units["test"]}
    for op in fastreg.ops.__all__:
        if (ROOT / f"tests/ops/test_{op}.py").exists():
            assert {f"test-cuda-{op}-0", f"test-cuda-{op}-1"} <= set(tests)
            assert (f"test-triton-{op}" in tests) == (op in plan.triton)
    assert tests["test-triton-warp"].environment["FASTREG_TEST_CASES"] == "3"
    taken = tests["test-cuda-mind-0"].command
    assert taken[taken.index("-k") + 1] == "test_mind.py or [mind- or [mind]", "not what is of mind_loss"
    # Each step of an op with kernels once per tool.
    for tool in ("memcheck", "racecheck"):
        sanitized = [u for u in units["sanitize"] if re.fullmatch(rf"{tool}-cuda-\w+-0", u.name)]
        counts = Counter(s for u in sanitized for s in steps_of(u))
        assert set(counts.values()) == {1}
        assert {op for op in ours if op in counts} == ours
    for u in units["sanitize"]:
        assert ("--report-api-errors" in u.command) == ("memcheck" in u.command), "an option of memcheck's"
    # A case is a unit; memory after all times.
    names = [u.name for u in units["bench"]]
    assert {"bench-cuda-lcc_loss-w9_256", "bench-cuda-lcc_loss-w9-both_256-memory"} <= set(names)
    assert names[:3] == [
        f"bench-cuda-{n}"
        for n in ("integrate_velocity-steps-7_256", "lcc_loss-w9_256", "lcc_loss-w9-both_256")
    ]
    memory = [n.endswith("-memory") for n in names]
    assert memory == sorted(memory)
    for u in units["bench"]:
        assert ("--memory-only" in u.command, "--no-memory" in u.command) == (
            u.name.endswith("-memory"),
            not u.name.endswith("-memory"),
        )
        assert plan.run.parser().parse_args(u.command[2:]).case


def test_chosen_ops(gpu):
    names = [u.name for u in gpu.Plan(["warp"]).test()]
    assert names == [
        "test-cuda-warp-1",
        "test-cuda-warp-0",
        "test-gpu",
        "test-triton-warp",
        "test-triton-gpu",
    ]
    with pytest.raises(SystemExit, match="no such op: wrap; there are integrate_velocity, lcc_loss"):
        gpu.Plan(["wrap"])


def test_the_list_needs_no_gpu(gpu, capsys, monkeypatch):
    monkeypatch.delenv("PYTHON", raising=False)
    assert gpu.main(["bench", "lcc_loss", "--list"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("bench-cuda-lcc_loss-w9_256 (400s): FASTREG_CUDA_BACKEND=cuda ")
    assert "--case 'w9 256' " in first
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["bench", "lcc_loss"]) == 1
    assert "sees no GPU" in capsys.readouterr().out


def code(gpu, name, text, seconds=60):
    return gpu.Unit(name, seconds, [sys.executable, "-S", "-c", text], {"NAMED": name})


def test_a_stage_is_resumed(gpu, tmp_path, capsys):
    note = f"import os; open({str(tmp_path / 'ran')!r}, 'a').write(os.environ['NAMED'] + ' '); "
    units = [
        code(gpu, "fails", note + "print('why'); raise SystemExit(3)"),
        code(gpu, "passes", note + "print('7 passed, 1 skipped')"),
        code(gpu, "other", note),
    ]

    def ran(limit=60):
        (tmp_path / "ran").write_text("")
        missed = gpu.run_units(units, tmp_path / "state", limit)
        return (tmp_path / "ran").read_text().split(), missed, capsys.readouterr().out

    order, missed, out = ran()
    assert (order, missed) == (["fails", "passes", "other"], ["fails"])
    assert re.search(r"-- passes: passed \(\d+s\) 7 passed, 1 skipped", out)
    assert re.search(r"-- fails: FAILED with 3 .*fails.log ends:\nwhy", out)
    units.append(code(gpu, "late", note))
    order, missed, out = ran()
    assert order == ["late", "fails"], "what failed waits for the rest"
    assert "-- passes: passed before" in out
    assert ran(limit=0)[:2] == ([], ["fails (not run)"])


def test_a_unit_ends_with_all_it_started(gpu, tmp_path, capsys):
    child = f"import time; time.sleep(1.5); open({str(tmp_path / 'alive')!r}, 'w')"
    hangs = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    assert gpu.run_units([code(gpu, "hangs", hangs, 0.5)], tmp_path / "state", 60) == ["hangs"]
    assert "FAILED with more than 0s" in capsys.readouterr().out
    import time

    time.sleep(1.5)
    assert not (tmp_path / "alive").exists()
    assert gpu.run_units([gpu.Unit("none", 9, ["no-such-command"])], tmp_path / "state", 60) == ["none"]
    assert "FAILED with 127" in capsys.readouterr().out


def test_on_a_pretended_gpu(gpu, tmp_path, monkeypatch, capsys):
    """`build` names the GPU's architecture, and `sanitize` runs what compute-sanitizer is given, with both backends."""
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "state_folder", lambda: tmp_path / "state")
    monkeypatch.setattr(gpu, "SITE", tmp_path / "site")
    monkeypatch.setattr(gpu, "BUNDLE", tmp_path / "none")
    started = []
    monkeypatch.setattr(
        gpu, "status_of", lambda unit, log, seconds: log.write_text("") or started.append(unit) or 0
    )
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **options: None)
    for name in ("PATH", "PYTHONPATH"):
        monkeypatch.setenv(name, "before")
    assert gpu.main(["build"]) == 0
    assert [u.name for u in started] == ["extensions", "no-spills"]
    assert started[0].environment == {"FASTREG_CUDA": "1", "FASTREG_CUDA_ARCHS": "90"}
    assert gpu.os.environ["PATH"] == f"{tmp_path / 'site' / 'bin'}:before"
    assert gpu.os.environ["PYTHONPATH"] == f"{ROOT}:{tmp_path / 'site'}:before"


def test_stubs_have_what_peers_name(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "SITE", tmp_path)
    monkeypatch.setattr(gpu, "REQUIRED", ("a_package_nobody_has",))
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    gpu.prepare()
    assert "lacks a_package_nobody_has" in capsys.readouterr().out
    named = (
        "import SimpleITK as sitk, matplotlib, matplotlib.pyplot as plt, matplotlib.pylab, matplotlib.cm\n"
        "from matplotlib.colors import Colormap\n"
        "from mpl_toolkits.axes_grid1 import make_axes_locatable\n"
        "from skimage import measure\n"
        "def read(image: sitk.Image, colours: Colormap) -> sitk.Image: ...\n"
        "print(sitk.__file__, hasattr(plt, '__all__'))"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", named], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert run.stdout == f"{tmp_path / 'SimpleITK' / '__init__.py'} False\n", run.stderr


def test_a_python_that_is_not_there(gpu, monkeypatch):
    monkeypatch.setenv("PYTHON", "/nowhere/python")
    with pytest.raises(SystemExit, match="PYTHON=/nowhere/python: No such file or directory"):
        gpu.main(["test", "--list"])


def test_the_state_is_that_of_the_sources(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    for name in ("bench/results/cuda.csv", "fastreg/warp.py", "fastreg/_C.so", "setup.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    first = gpu.state_folder()
    for name in ("bench/results/cuda.csv", "fastreg/_C.so"):
        (tmp_path / name).write_text("2")
    assert gpu.state_folder() == first
    (tmp_path / "fastreg" / "warp.py").write_text("2")
    assert gpu.state_folder() != first
