"""The benchmarks: providers pass the gate, red ones are refused, rows and tables are whole."""

import contextlib
import csv
import math
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import bench.registrars  # noqa: E402
import fastreg  # noqa: E402
from bench import clock, common, markdown, memory, models, run, tables  # noqa: E402
from bench.common import Case, Provider  # noqa: E402
from bench.registrars import tables as registrars  # noqa: E402
from fastreg import _ext, convert  # noqa: E402

N16 = (16, 16, 16)


def gate_cases():
    for op in common.ops():
        module = common.load(op)
        for case in module.CASES:
            if case.only == ("fastreg",) or "cpu" not in case.on:
                continue
            # Stock pooling wants the image larger than its largest window.
            small = common.shrunk(case, common.SMALL if op == "lcc_loss" else N16)
            for name in common.providers(module, case):
                if name != "compile":
                    yield pytest.param(op, small, name, id=f"{op}-{case}-{name}".replace(" ", "_"))


@pytest.mark.parametrize(("op", "case", "name"), list(gate_cases()))
def test_gate(op, case, name):
    module = common.load(op)
    if why := common.missing(module.PROVIDERS[name].package):
        pytest.skip(why)
    verdict = common.gate(module, case, name, "cpu")
    assert verdict.ok, verdict.text


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
def test_gate_compiled():
    case = Case("tiny", (1, 1, 8, 8, 8), (False, True))
    verdict = common.gate(common.load("mse_loss"), case, "compile", "cpu")
    assert verdict.ok, verdict.text


@pytest.mark.parametrize("op", common.ops())
def test_bench_file_is_complete(op):
    module = common.load(op)
    assert {"fastreg", "torch", "compile"} <= set(module.PROVIDERS)
    names = [case.name for case in module.CASES]
    assert len(set(names)) == len(names)
    # 160^3 is the headline, and time per voxel is shown from 64^3 to 256^3; 2D ops: 256^2, to 1024^2. Cost
    # volumes are 125 times their grid.
    headline, largest = (160,) * 3, 256
    if op in ("local_correlation", "cost_volume"):
        headline, largest = (96,) * 3, 128
    elif len(module.CASES[0].shape) == 4:
        headline, largest = (256,) * 2, 1024
    assert module.CASES[0].shape[2:] == headline
    scaling = {c.shape[2] for c in module.CASES if c.only == ("fastreg",)}
    assert {64, largest} <= scaling
    for case in module.CASES:
        for mode in module.PROVIDERS["fastreg"].modes:
            assert module.bytes_moved(case, mode) > 0
        assert set(case.only or ()) <= set(module.PROVIDERS)


@pytest.fixture
def tiny(monkeypatch):
    """The warp benchmark with one small case; the copy that measures bandwidth is small too."""
    module = common.load("warp")
    monkeypatch.setattr(module, "CASES", [Case("tiny", (1, 1, *N16), (False, True))])
    monkeypatch.setattr(module, "PROVIDERS", dict(module.PROVIDERS))
    small_copy(monkeypatch)
    return module


def small_copy(monkeypatch):
    def init(self, device):
        self.bytes, self.repeat = 2**10, 1

    monkeypatch.setattr(common.Copy, "__init__", init)
    monkeypatch.setattr(common.Copy, "__call__", lambda self, i=0: sum(range(1000)))


def measured(tmp_path, *extra):
    args = ["warp", "--no-memory", "--results", str(tmp_path), "--provider", "torch", "--rounds", "3"]
    return run.main([*args, "--budget", "0.1", *extra])


def test_rows(tiny, tmp_path, capsys):
    assert measured(tmp_path) == 0
    rows = common.read_rows(tmp_path / "cpu.csv")
    assert {(r["provider"], r["mode"]) for r in rows} == {
        (p, m) for p in ("fastreg", "torch") for m in ("fwd", "fwd+bwd")
    }
    for r in rows:
        assert list(r) == common.FIELDS
        assert 0 < float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"])
        assert float(r["floor"]) > 0
        assert int(r["rounds"]) == 3
        assert r["shape"] == "1x1x16x16x16"
        assert r["version"].startswith(r["provider"])
        assert all(r[k] for k in ("date", "commit", "device_name", "isa", "torch", "gate"))
        if r["provider"] == "fastreg":
            assert float(r["ratio"]) == 1
    assert measured(tmp_path) == 0
    assert len(common.read_rows(tmp_path / "cpu.csv")) == 2 * len(rows)
    assert "gate passed" in capsys.readouterr().out


WRONG = {
    "value": lambda image, u: 1.001 * fastreg.warp(image, u),
    "gradient": lambda image, u: fastreg.warp(image, 1.01 * u - 0.01 * u.detach()),
    "shape": lambda image, u: fastreg.warp(image, u)[..., 1:],
    "nan": lambda image, u: fastreg.warp(image, u) * math.nan,
}


@pytest.mark.parametrize("kind", WRONG)
def test_red_is_refused(kind, tiny, tmp_path, capsys):
    tiny.PROVIDERS["fastreg"] = Provider(lambda case, inputs: WRONG[kind], "fastreg")
    assert measured(tmp_path) == 1
    assert not (tmp_path / "cpu.csv").exists()
    out = capsys.readouterr().out
    assert "RED" in out
    assert "refused" in out
    assert measured(tmp_path, "--check") == 1


def test_check_measures_nothing(tiny, tmp_path):
    assert measured(tmp_path, "--check") == 0
    assert not (tmp_path / "cpu.csv").exists()


def test_deviating_peer_is_marked(tiny, tmp_path):
    tiny.PROVIDERS["torch"] = Provider(lambda case, inputs: lambda image, u: 1.1 * fastreg.warp(image, u))
    assert measured(tmp_path) == 0
    gates = {r["provider"]: r["gate"] for r in common.read_rows(tmp_path / "cpu.csv")}
    assert gates["torch"].startswith("deviates")
    assert not gates["fastreg"].startswith("deviates")
    text = tables.speed(tmp_path)["warp"]
    assert "PyTorch, best stock form ¹ |" in text
    assert "¹ Not the numbers of the formula it states: " in text


def test_failing_and_missing_peers_are_skipped(tiny, tmp_path, capsys):
    def build(case, inputs):
        raise RuntimeError("no such kernel")

    tiny.PROVIDERS["torch"] = Provider(build)
    tiny.PROVIDERS["absent"] = Provider(build, "a-package-nobody-has-installed")
    assert measured(tmp_path, "--provider", "absent") == 0
    assert {r["provider"] for r in common.read_rows(tmp_path / "cpu.csv")} == {"fastreg"}
    out = capsys.readouterr().out
    assert "no such kernel" in out
    assert "absent: skipped, a-package-nobody-has-installed is not installed" in out


def test_quick_is_not_stored(tiny, tmp_path):
    assert measured(tmp_path, "--quick") == 0
    assert not (tmp_path / "cpu.csv").exists()


def test_memory_is_added_to_rows(tiny, tmp_path, monkeypatch, capsys):
    """To the newest of this commit, once: a run that was cut short goes on where it stopped."""
    asked = []

    def fresh(arguments):
        asked.append(arguments[arguments.index("--provider") + 1])
        if len(asked) == 2:
            raise RuntimeError("cut short")
        return {"peak_volumes": 2.5, "saved_volumes": 1.25}

    monkeypatch.setattr(memory, "fresh", fresh)
    only = ["warp", "--memory-only", "--results", str(tmp_path), "--provider", "torch"]
    assert run.main(only) == 1
    assert "without a time: warp tiny" in capsys.readouterr().out
    assert not asked
    for _ in range(2):
        assert measured(tmp_path) == 0
    before = common.read_rows(tmp_path / "cpu.csv")
    assert run.main(only) == 0
    assert run.main(only) == 0
    assert asked == ["fastreg", "torch", "torch"]
    rows = common.read_rows(tmp_path / "cpu.csv")
    volumes = [(r["provider"], r["mode"], r["peak_volumes"], r["saved_volumes"]) for r in rows[4:]]
    assert {v for v in volumes if v[2]} == {(p, "fwd+bwd", "2.5", "1.25") for p in ("fastreg", "torch")}
    blank = {"peak_volumes": "", "saved_volumes": ""}
    assert [r | blank for r in rows] == before
    monkeypatch.setattr(common, "commit", lambda: "another")
    assert run.main(only) == 1


def test_the_copy_is_larger_than_the_cache_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda size, device: torch.empty(size, device="meta"))
    assert (common.Copy("cuda").bytes, common.Copy("cuda").repeat) == (2 * 2**30, 10)
    assert (common.Copy("cpu").bytes, common.Copy("cpu").repeat) == (2 * 2**27, 1)


def test_unknown_op(tmp_path, capsys):
    with pytest.raises(SystemExit) as status:
        run.main(["wrap", "--results", str(tmp_path)])
    assert status.value.code == 2
    assert "no such op: wrap" in capsys.readouterr().err


def test_rounds_alternate(monkeypatch):
    small_copy(monkeypatch)
    monkeypatch.setattr(common, "_milliseconds", lambda call, device, repeat: call(0) or 1.0)
    calls = []
    cost = {"fastreg": 1.0, "peer": 2.0, "dense": 500.0}
    runners = {n: lambda i, n=n: calls.append(n) or cost[n] for n in cost}
    timings = common.measure(runners, "cpu", budget=1e9, most=6, slow=("dense",))
    calls = calls[6:]
    assert calls.count("fastreg") == calls.count("peer") == 6
    assert calls.count("dense") == 2
    # In every round both fast ones, not always in the same order.
    pairs = [c for c in calls if c != "dense"]
    rounds = [tuple(pairs[i : i + 2]) for i in range(0, 12, 2)]
    assert {frozenset(r) for r in rounds} == {frozenset(("fastreg", "peer"))}
    assert len(set(rounds)) == 2
    assert timings["peer"].ratios == [2.0] * 6
    assert timings["dense"].ratios == [500.0] * 2


def test_csv_is_never_half_written(tmp_path):
    """Writers in parallel lose nothing; a reader never sees a broken line."""
    path = tmp_path / "cpu.csv"
    writers, rows = 4, 8
    fields = ["date", "op", "note"]
    done, broken = threading.Event(), []

    def write(number):
        for i in range(rows):
            common.append_rows(path, [{"date": f"{number}-{i}", "op": "x", "note": 'a, "b"\n' * 50}], fields)

    def read():
        while not done.is_set():
            broken.extend(
                r for r in common.read_rows(path) if None in r or None in r.values() or r["op"] != "x"
            )

    reader = threading.Thread(target=read)
    threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
    for t in (reader, *threads):
        t.start()
    for t in threads:
        t.join()
    done.set()
    reader.join()
    assert not broken
    assert {r["date"] for r in common.read_rows(path)} == {
        f"{n}-{i}" for n in range(writers) for i in range(rows)
    }


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "cpu.csv"
    common.append_rows(path, [{"op": "warp"}])
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        common.append_rows(path, [{"op": "smooth"}])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_new_column(tmp_path):
    """Rows of before a column was added stay readable."""
    path = tmp_path / "cpu.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["op", "old"], ["warp", "1"]])
    common.append_rows(path, [{"op": "smooth", "new": 2}], ["op", "new"])
    assert common.read_rows(path) == [
        {"op": "warp", "new": "", "old": "1"},
        {"op": "smooth", "new": "2", "old": ""},
    ]


def row(**values):
    base = dict.fromkeys(common.FIELDS, "")
    base.update(
        date="2026-01-02T03:04:05+0000", commit="abc", device="cpu", device_name="Some CPU", threads="2"
    )
    base.update(
        isa="avx2", torch="2.13.0", op="warp", case="u", mode="fwd+bwd", provider="fastreg", dtype="float32"
    )
    base.update(
        version="fastreg 0.1", shape="1x1x160x160x160", rounds="9", p20_ms="9.0", p50_ms="10.0", p80_ms="11.0"
    )
    base.update(ratio="1", floor="0.5", copy_gbs="20", gate="value 1e-7, gradient 1e-7")
    return {**base, **values}


def test_tables(tmp_path):
    peer = {"provider": "voxelmorph", "version": "voxelmorph 0.3.4", "p50_ms": "456.7", "ratio": "45.67"}
    series = [row(case=f"u-{n}", shape=f"1x1x{n}x{n}x{n}", p50_ms=f"{n**3 * 3e-6:.6g}") for n in (64, 256)]
    old = row(p50_ms="99")
    common.append_rows(
        tmp_path / "cpu.csv", [old, row(), row(mode="fwd", p50_ms="4.0"), row(**peer), *series]
    )
    sections = tables.speed(tmp_path)
    assert list(sections) == ["warp", "by size"]
    text = sections["warp"]
    assert "| u | 1x1x160x160x160 | fastreg | 4.00 | 10.0 | 9.00 to 11.0 | 1 | 0.50 |" in text
    assert "| voxelmorph 0.3.4 |  | 457 |" in text
    assert "45.7" in text
    assert "99" not in text
    assert "| warp, u | 3.00 | 3.00 |" in sections["by size"]
    ops = tables.where(tmp_path)[""]
    assert "executed on Some CPU (avx2), 2026-01-02 |" in ops
    assert "executed on Some GPU" not in ops


def test_tables_of_a_gpu(tmp_path):
    gpu = {"device": "cuda", "device_name": "Some GPU", "threads": "", "op": "mse_loss"}
    rows = [row(**gpu, isa="CUDA C++", p50_ms="1"), row(**gpu, isa="Triton", p50_ms="2")]
    common.append_rows(tmp_path / "cuda.csv", rows)
    text = "\n".join(tables.speed(tmp_path).values())
    assert text.count("**Some GPU**") == 2, "each implementation is a run of its own"
    assert "**Some GPU**, CUDA C++" in text
    assert "**Some GPU**, Triton" in text
    (line,) = [line for line in tables.where(tmp_path)[""].splitlines() if line.startswith("| `mse_loss`")]
    assert line.split(" | ")[2] == "executed on Some GPU, 2026-01-02"


def test_gpu_cases_are_left_to_the_gpu():
    for op in common.ops():
        module = common.load(op)
        on_cpu, on_gpu = run.headline(module, "cpu"), run.headline(module, "cuda")
        assert on_cpu == module.CASES[:1]
        assert all("cuda" in case.on for case in on_gpu)
    assert [c.shape[-1] for c in run.headline(common.load("lcc_loss"), "cuda")] == [256] * 3


def test_real_tables(tmp_path):
    base = {
        "date": "2026-01-02", "commit": "abc", "device_name": "CPU", "threads": "2", "set": "brain MR", "pair": "brainmr_vxm", "score": "dice",
        "tool": "fastreg", "version": "0.1", "how": "", "before": "0.5", "after": "0.74", "cpu_seconds": "12.5", "seconds": "7", "peak_mb": "900",
        "load": "0.3", "folding": "0", "arguments": "",
    }  # fmt: skip
    peer = {**base, "tool": "greedy", "how": "NCC", "after": "0.72", "folding": "0.012", "cpu_seconds": "50"}
    rows = [
        {**base, "after": "0.60"},  # an older one of the same
        base,
        {**base, "after": "0.99", "arguments": "--window 5"},
        peer,
        {**base, "set": "lung MR", "pair": "lungmr_proton_0004"},  # one of four
        {**base, "cpu_seconds": ""},  # of the time before CPU seconds were taken
    ]
    common.append_rows(tmp_path / "real.csv", rows, list(base))
    text = registrars.sections(tmp_path)
    assert (
        "| brain MR | 1 | mean Dice | 0.500 | 0.750 | **0.740** | 0.720 (1.2 % folds) |" in text["Accuracy"]
    )
    assert "lung MR" not in text["Accuracy"]
    assert "| brain MR | 12.5 / 900 | 50.0 / 900 |" in text["Cost"]
    assert len(registrars.draw(tmp_path).axes) == 1


def test_demons_find_a_shift(tmp_path):
    """The script of a tool, from NIfTI to a displacement: two voxels along x, one along z, the voxels not cubes."""
    itk = pytest.importorskip("SimpleITK")
    p = np.stack(np.meshgrid(*[np.arange(24.0)] * 3, indexing="ij"), -1)
    for name, centre in (("fixed", (11, 12, 11)), ("moving", (12, 12, 13))):
        image = itk.GetImageFromArray(100 * np.exp(-((p - centre) ** 2).sum(-1) / 40))
        image.SetSpacing((1.0, 1.5, 2.0))
        itk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    pair = tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz"
    files, used = bench.registrars.run("Demons", sys.executable, *pair, tmp_path / "out", 1)
    assert used.cpu > 0
    u, _ = convert.read_chain([str(f) for f in files], like=str(pair[0])).displacement()
    inside = u[0, :, 9:14, 10:15, 9:14].flatten(1).mean(1)
    torch.testing.assert_close(inside.float(), torch.tensor([1.0, 0.0, 2.0]), atol=0.3, rtol=0)


def test_registrars_take_what_a_process_took(tmp_path):
    script = "import sys; b = b'x' * 100_000_000; sum(range(2_000_000)); print('said', file=sys.stderr); sys.exit(int(sys.argv[1]))"
    held = b"x" * 300_000_000  # what the caller holds is not the process's
    used = bench.registrars.measured([sys.executable, "-c", script, "0"], 1, tmp_path)
    assert 95 < used.peak_mb < 250
    assert 0 < used.cpu
    del held
    with pytest.raises(RuntimeError, match="status 3, said"):
        bench.registrars.measured([sys.executable, "-c", script, "3"], 1, tmp_path)


def test_headlines(tmp_path):
    """The newest run of a case, against the faster stock form and the fastest peer of the same run."""
    both = {"case": "both", "peak_volumes": "0.5"}
    old = row(**both, date="2026-01-01", device_name="Old CPU", p50_ms="1")
    stock = row(**both, provider="torch", version="torch 2.13.0+cpu", p50_ms="40")
    compiled = row(**both, provider="compile", version="torch 2.13.0+cpu", p50_ms="30")
    peers = [
        row(**both, provider=n, version=f"{n} 1.0", p50_ms=t) for n, t in (("monai", "90"), ("vxm", "80"))
    ]
    wrong = row(**both, provider="wrong", version="wrong 1.0", p50_ms="2", gate="deviates: value 1")
    common.append_rows(tmp_path / "cpu.csv", [old, row(**both), stock, compiled, *peers, wrong])
    lines = tables.headlines(tmp_path)
    cells = "10.0 ms | 30 ms (compiled) | 80 ms (vxm 1.0) | Some CPU, 2 threads, avx2 |"
    assert lines["speed"].splitlines()[2:] == [f"| `warp` both, 1x160x160x160 | {cells}"]
    assert lines["memory"].endswith(
        "| 0.500 | 0.500 (compiled) | 0.500 (vxm 1.0) | Some CPU, 2 threads, avx2 |"
    )
    assert tables.headlines(tmp_path / "empty") == {"speed": tables.EMPTY, "memory": tables.EMPTY}


def test_pages(tmp_path, capsys):
    readme, docs = tmp_path / "README.md", tmp_path / "docs"
    readme.write_text(
        "# head\n"
        + "\n".join(f"<!-- {n}:start -->\nold\n<!-- {n}:end -->" for n in ("speed", "memory"))
        + "\ntail\n",
        encoding="utf-8",
    )
    common.append_rows(tmp_path / "cpu.csv", [row(case="both"), row(provider="torch", case="both")])
    args = ["--results", str(tmp_path), "--readme", str(readme), "--docs", str(docs)]
    assert tables.main([*args, "--check"]) == 1
    assert not docs.exists()
    assert tables.main(args) == 0
    assert tables.main([*args, "--check"]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# head\n")
    assert text.endswith("tail\n")
    assert "old" not in text
    assert "| `warp` both, 1x160x160x160 | 10.0 ms |" in text
    assert {p.stem for p in docs.iterdir()} == set(tables.PAGES)
    speed = (docs / "speed.md").read_text(encoding="utf-8")
    assert speed.index("<!-- warp:start -->") < speed.index("| both |") < speed.index("<!-- warp:end -->")
    assert tables.EMPTY in (docs / "real.md").read_text(encoding="utf-8")
    (docs / "speed.md").write_text("edited", encoding="utf-8")
    capsys.readouterr()
    assert tables.main([*args, "--check"]) == 1
    assert "speed.md is not what the stored rows say" in capsys.readouterr().out
    readme.write_text("no markers", encoding="utf-8")
    assert tables.main(args) == 1
    assert readme.read_text(encoding="utf-8") == "no markers"


def test_stored_pages_are_current():
    """python bench/tables.py after every new row, or change of an op's kernels."""
    assert tables.main(["--check"]) == 0


@pytest.mark.slow
def test_memory():
    result = memory.fresh(["warp", "--shape", "64", "64", "64", "--provider", "torch"])
    # The sampling positions are saved; the identity grid is kept.
    assert result["shape"] == [1, 1, 64, 64, 64]
    assert 3 <= result["saved_volumes"] < 3.1
    assert result["saved"][0]["shape"] == [1, 64, 64, 64, 3]
    assert result["saved"][0]["where"].startswith("bench/bench_warp.py:")
    assert 5 < result["peak_volumes"] < 12
    text = memory.text(result)
    assert "1x64x64x64x3" in text
    assert str(ROOT) not in text


def test_memory_of_ours_and_bad_requests():
    module = common.load("warp")
    runner = common.Runner(module, common.shrunk(module.CASES[0]), "fastreg", "fwd+bwd", "cpu")
    assert memory.saved_tensors(runner) == []
    for arguments, text in {
        ("warp", "--provider", "nobody"): "no provider 'nobody'",
        ("warp", "--case", "none"): "no case 'none'",
        ("warp", "--shape", "8"): "--shape takes 2 or 3 sizes",
    }.items():
        with pytest.raises(SystemExit, match=text):
            memory.report(memory.parser().parse_args(arguments))


OWN = """
import torch

class Square(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.unused = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("grid", torch.zeros(1, 1, 64, 64, 64))

    def forward(self, pred, target, factor=1.0):
        difference = (pred - target) * self.scale
        return {"loss": difference.square().mean(), "map": difference, "name": "square"}

def make():
    return Square()

def move(image, flow, region):
    return image + flow * region

def anything(*inputs):
    return sum(inputs)

def broken(image):
    return image[..., 1:] + image

def no_tensor(image):
    return 3

def no_gradient(fixed):
    return fixed + 1

def derived(image):
    return torch.func.vjp(torch.square, image)[0] * image

class Needs:
    def __init__(self, size):
        pass

constant = 3
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A folder with own.py, and what --import says of it there."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "wants.py").write_text("import a_package_nobody_has")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield lambda *arguments: memory.report(memory.parser().parse_args(["--import", *arguments]))
    for name in ("own", "wants"):
        sys.modules.pop(name, None)


def test_memory_of_ones_own(own_module, capsys):
    """In a process of its own, from the folder one is in; the numbers are those that one can count."""
    assert memory.main(["--import", "own:Square", "--shape", "64", "64", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("own:Square of image, fixed, torch ")
    assert "fwd+bwd, 1x1x64x64x64 float32, cpu; one volume is 1 MiB" in lines[0]
    # pred - target, which the scale's gradient needs; the difference is an output, and the buffer is kept.
    saved = [line.split() for line in lines if "own.py" in line]
    assert [s[0] for s in saved] == ["1.00", "1.00"]
    assert saved[0][-1] == "forward"
    assert 3 < float(lines[1].split()[6]) < 7


@pytest.mark.parametrize(
    ("arguments", "case"),
    [
        (["own:make"], "of image, fixed"),
        (["own:move", "--shape", "20", "30", "--channels", "2"], "of image, displacement, image"),
        (["own:anything", "--inputs", "image", "mask"], "of image, mask"),
        (["fastreg:lcc_loss", "--dtype", "bfloat16"], "of fixed, image"),
        (["own:no_gradient", "--mode", "fwd"], "of fixed"),
    ],
)
def test_inputs_of_ones_own(arguments, case, own_module):
    if "lcc_loss" in arguments[0] and fastreg.backends()["warp"]["cpu"].startswith("PyTorch"):
        pytest.skip("the reference of lcc_loss has no saved-tensor hooks")
    result = own_module(*arguments)
    assert result["case"] == case
    assert result["shape"] == [1, 2, 20, 30] if "20" in arguments else [1, 1, 64, 64, 64]
    assert result["dtype"] == ("bfloat16" if "bfloat16" in arguments else "float32")
    assert result["volume_bytes"] == math.prod(result["shape"][2:]) * (2 if "bfloat16" in arguments else 4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["own"], "--import takes MODULE:NAME, got 'own'"),
        (["absent.part:x"], "there is no module absent, in "),
        (["wants:x"], "importing wants fails: ModuleNotFoundError: No module named 'a_package_nobody_has'"),
        (["own:Squared"], "own has no Squared, it has: Square, make, move, anything"),
        (["own:constant"], "own:constant cannot be called, it is a int"),
        (["own:Needs"], r"Needs\(\) fails: TypeError: .*'size'; a function without arguments can make it"),
        (["own:anything"], "own:anything does not say how many inputs it takes; --inputs image image does"),
        (["own:broken"], "own:broken of image fails: RuntimeError: .*63.*64.*, at .*own.py:25 broken"),
        (["own:Square", "--inputs", "image"], "own:Square of image fails: TypeError: .*'target'"),
        (["own:Square", "--shape", "64"], "--shape takes 2 or 3 sizes, got 64"),
        (["own:Square", "--shape", "8", "0"], "--shape takes 2 or 3 sizes, got 8 0"),
        (["own:no_tensor"], "own:no_tensor returns no tensor"),
        (["own:no_gradient"], "returns requires no gradient: --mode fwd"),
    ],
)
def test_what_is_not_measured(arguments, text, own_module):
    with pytest.raises(SystemExit, match=f"^memory: .*{text}"):
        own_module(*arguments)


def test_without_the_extension_memory_says_so(own_module, monkeypatch):
    monkeypatch.setitem(_ext._state, "extension", "not built")
    wanted = r"^memory: torch.func hides what is saved; fastreg's compiled extension is not built, .*`pip install [^\n]*$"
    with pytest.raises(SystemExit, match=wanted):
        memory.report(memory.parser().parse_args(["lcc_loss"]))
    with pytest.raises(SystemExit, match=wanted):
        own_module("own:derived", "--shape", "8", "8")
    monkeypatch.setitem(_ext._state, "extension", "loaded")
    with pytest.raises(SystemExit, match="fastreg does not use it"):
        own_module("own:derived", "--shape", "8", "8")


def test_memory_wants_one_subject(capsys):
    for arguments in ([], ["warp", "--import", "own:make"]):
        with pytest.raises(SystemExit):
            memory.main(arguments)
        assert "takes an op, or --import MODULE:NAME" in capsys.readouterr().err


def test_a_scalar_that_keeps_the_storage_of_a_volume_holds_a_scalar():
    a = torch.zeros(10)
    assert memory.storage_bytes([a, a, a[:3]]) == 40
    assert memory.storage_bytes([a[:1]]) == 4
    assert memory.storage_bytes([a[:1], a[1:2]]) == 8
    assert memory.storage_bytes([a[:1].expand(100)]) == 40


# Models


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in ("r2n2", "rrn") else ()) for n in models.SUBJECTS],
)
def test_saved_bytes_of_models(name):
    """What is counted without computing is what a step really keeps, in each form."""
    if fastreg.backends()["warp"]["cpu"].startswith("PyTorch"):
        pytest.skip("the reference of lcc_loss has no saved-tensor hooks")
    subject = models.SUBJECTS[name]
    counts = {form: models.saved_bytes(subject, form, subject.gate) for form in models.FORMS}
    real = {form: models.saved_bytes(subject, form, subject.gate, fake=False) for form in models.FORMS}
    assert counts == real
    assert counts["fastreg"] < counts["stock ops"] <= counts["plain"]
    assert counts["fastreg, blocks"] < counts["plain, blocks"]


@pytest.mark.parametrize("name", [n for n, s in models.SUBJECTS.items() if s.goal])
def test_models_keep_what_they_may(name):
    """The goals, at the papers' sizes."""
    subject = models.SUBJECTS[name]
    form, limit = subject.goal
    plain = models.saved_bytes(subject, "plain", subject.paper)
    assert models.saved_bytes(subject, form, subject.paper) <= limit * plain


@pytest.mark.parametrize("name", models.SUBJECTS)
def test_gate_of_models(name):
    verdict = models.gate(models.SUBJECTS[name])
    assert verdict.ok, verdict.text


@pytest.mark.parametrize("form", ["fastreg", "plain"])
@pytest.mark.parametrize("name", ["voxelmorph", "r2n2", "rrn"])
def test_clock_of_ops(name, form, monkeypatch):
    """It changes nothing but the order of sums, and counts each op forward and backward, one after the other."""
    subject = models.SUBJECTS[name]
    if name == "r2n2":
        subject = replace(subject, options={"steps": 2, "widths": (4, 6, 8, 10)})
    images = models.pair(subject.gate)
    results, events = [], []
    for method in ("start", "stop"):
        monkeypatch.setattr(clock.Clock, method, lambda self, m=method: events.append(m))
    for context in (contextlib.nullcontext, lambda: clock.running(clock.Clock("cpu"))):
        with models.of_form(form), context():
            model = subject.build(form).eval()
            loss = models.train(model, *images)
        results.append([loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    # VoxelMorph: warp, LCC, diffusion. R2N2: twice Gaussian, two warps, MSE, one of the warps without effect; and TV.
    # RRN: three cost volumes, four doublings, warp, LCC, TV.
    calls, dead = {"voxelmorph": (3, 0), "r2n2": (2 * 4 + 1, 1), "rrn": (10, 0)}[name]
    assert events == ["start", "stop"] * (2 * calls - dead)


def small_models(monkeypatch, tmp_path, *extra):
    monkeypatch.setattr(models, "fresh_peak", lambda *args: 10**6)
    args = ["voxelmorph", "--shape", "16", "16", "16", "--budget", "0", "--results", str(tmp_path)]
    return models.main([*args, *extra])


def test_rows_of_models(monkeypatch, tmp_path):
    assert small_models(monkeypatch, tmp_path, "--check") == 0
    assert not list(tmp_path.iterdir())
    assert small_models(monkeypatch, tmp_path) == 0
    rows = common.read_rows(tmp_path / models.RESULTS)
    subject = models.SUBJECTS["voxelmorph"]
    shapes = ["x".join(map(str, s)) for s in (subject.paper, (16, 16, 16), *subject.sizes)]
    assert [(r["shape"], r["form"]) for r in rows] == [(s, f) for s in shapes for f in models.FORMS]
    timed = {r["form"]: r for r in rows if r["step_p50_ms"]}
    assert tuple(timed) == models.TIMED
    ours, stock = timed["fastreg"], timed["stock ops"]
    assert float(ours["step_ratio"]) == 1
    assert 0 < float(stock["ops_share"]) < 1
    assert float(ours["bound"]) == pytest.approx(1 / (1 - float(stock["ops_share"])), rel=1e-3)
    reached = float(stock["work_ratio"]) / float(ours["bound"])
    assert float(ours["reached"]) == pytest.approx(reached, rel=5e-3)  # of stored, rounded figures
    text = models.tables(tmp_path)["voxelmorph"]
    assert "| VoxelMorph-2, LCC | 256x256x256 | fastreg, of plain net |" in text
    assert text.count("| 0.6 | yes |") == len(shapes)
    assert "| VoxelMorph-2, LCC | 16x16x16 | stock ops |" in text
    monkeypatch.setattr(models, "run_model", lambda *args: [{"model": "voxelmorph"}])
    assert small_models(monkeypatch, tmp_path, "--no-store") == 0
    assert common.read_rows(tmp_path / models.RESULTS) == rows


def test_red_models_are_refused(monkeypatch, tmp_path, capsys):
    loss = fastreg.models.VoxelMorph.loss
    # Of fastreg's form alone: the plain net is in fp64.
    wrong = lambda self, f, *a: loss(self, f, *a) * (1.001 if f.dtype == torch.float32 else 1)  # noqa: E731
    monkeypatch.setattr(fastreg.models.VoxelMorph, "loss", wrong)
    assert small_models(monkeypatch, tmp_path) == 1
    assert not list(tmp_path.iterdir())
    assert "refused, because the gate is red: voxelmorph" in capsys.readouterr().out


@pytest.mark.slow
def test_peak_of_models():
    """In a fresh process: no less than what is kept."""
    shape, args = (32, 32, 32), SimpleNamespace(device="cpu", threads=2)
    saved = models.saved_bytes(models.SUBJECTS["voxelmorph"], "fastreg", shape)
    assert saved < models.fresh_peak("voxelmorph", "fastreg", shape, args) < 20 * saved


@pytest.mark.slow
def test_pytest_benchmark():
    pytest.importorskip("pytest_benchmark")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/bench_warp.py",
        "--benchmark-only",
        "-p",
        "no:cacheprovider",
    ]
    # Beside other processes it would not measure.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, "-k", "u-64-fwd-fastreg"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_numbers_keep_their_digits():
    texts = ["", "RRN", "0.0", "98", "0.72734", "132.2309", "0.0042", "4e-05", "1234.5", "-0.5", "nan"]
    wanted = ["", "RRN", "0", "98", "0.727", "132", "0.00420", "4e-05", "1234", "-0.500", "nan"]
    assert [markdown.number(t) for t in texts] == wanted
