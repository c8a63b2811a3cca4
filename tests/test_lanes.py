"""What .ci/run leaves out and what it says at the end: .ci/changed, .ci/summary, .ci/borrow."""

import functools
import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import fastreg

CI = Path(fastreg.__file__).parents[1] / ".ci"
if not CI.exists():
    pytest.skip("not in a checkout", allow_module_level=True)


@functools.cache
def script(name):
    loader = importlib.machinery.SourceFileLoader(f"ci_{name}", str(CI / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def lane(monkeypatch, capsys):
    """(lane, files that differ) -> the ops in full, the others."""
    changed = script("changed")

    def ops(name, files):
        monkeypatch.setattr(changed, "base", lambda: "a commit")
        monkeypatch.setattr(changed, "changed", lambda since: files)
        said = []
        for which in ("full", "some"):
            changed.main(name, which)
            said.append(set(capsys.readouterr().out.split()))
        return said

    return ops


SAMPLING = {"warp", "compose", "integrate_velocity"}


@pytest.mark.parametrize(
    ("name", "file", "reached", "left"),
    [
        ("emulation", "csrc/cuda/warp_bwd.cuh", {"warp", "compose"}, {"mind", "lcc_loss"}),
        ("emulation", "csrc/cuda/sampling.cuh", {"warp", "compose"}, {"mind", "mse_loss"}),
        ("emulation", "csrc/common/mind_op.h", {"mind", "mind_loss"}, {"warp", "lcc_loss"}),
        ("emulation", "tests/emulation/emulation.h", {*SAMPLING, "mind", "lcc_loss", "mse_loss"}, set()),
        ("emulation", "csrc/common/tensor.h", {*SAMPLING, "mind", "lcc_loss", "mse_loss"}, set()),
        ("emulation", "kernels/mind.py", set(), {*SAMPLING, "mind"}),
        ("triton", "kernels/warp_sampling.py", SAMPLING, {"lcc_loss"}),
        ("triton", "tests/ops/test_lcc_loss.py", {"lcc_loss"}, {"mind", "warp"}),
        ("triton", "tests/ops/contract.py", {*SAMPLING, "mind", "lcc_loss"}, set()),
        ("triton", "fastreg/ops/mind_loss.py", {"mind_loss"}, {"warp", "lcc_loss"}),
        ("triton", "README.md", set(), {*SAMPLING, "mind", "lcc_loss"}),
    ],
)
def test_a_change_reaches_the_ops_it_is_part_of(lane, name, file, reached, left):
    full, some = lane(name, {file})
    assert reached <= full
    assert left <= some
    assert not full & some
    assert full | some == lane(name, None)[0]  # not known what differs: everything


def test_the_base_is_where_the_branch_left_main(tmp_path, monkeypatch):
    changed = script("changed")
    monkeypatch.setattr(changed, "ROOT", tmp_path)
    for variable in ("FASTREG_CI", "FASTREG_CI_BASE"):
        monkeypatch.delenv(variable, raising=False)

    def git(*arguments):
        run = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    def commit(name, hour):
        monkeypatch.setenv("GIT_COMMITTER_DATE", f"2026-01-0{1 + hour // 24}T{hour % 24:02}:00:00+00:00")
        (tmp_path / name).write_text(name)
        git("add", "."), git("commit", "-qm", name)
        return git("rev-parse", "HEAD")

    git("init", "-qb", "main")
    first = commit("a", 0)
    assert changed.base() == ""  # the first commit: nothing to compare with
    assert changed.changed("") is None
    commit("e", 23)
    assert changed.base() == ""  # all of it came within a day
    second = commit("b", 25)
    assert changed.base() == first
    git("checkout", "-qb", "topic")
    commit("c", 26)
    (tmp_path / "d").touch()
    assert changed.base() == second
    assert changed.changed(second) == {"c", "d"}
    assert changed.changed("0" * 40) is None
    monkeypatch.setenv("FASTREG_CI", "all")
    assert changed.base() == ""


def test_the_summary_counts_tests_and_names_the_slowest(tmp_path, capsys):
    (tmp_path / "steps").write_text("1\t60\tmake test\n2\t5\tlint\n")
    case = '<testcase classname="tests.a" name="{}" time="{}">{}</testcase>'
    for n, cases in enumerate(
        ([("one", 1.5, ""), ("two", 30.25, "<failure/>")], [("three", 2, "<skipped/>")])
    ):
        text = "".join(case.format(*c) for c in cases)
        (tmp_path / f"1-{n}.xml").write_text(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
    script("summary").main(tmp_path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert lines[1:4] == [
        ["make", "test", "60", "1", "1", "1"],
        ["lint", "5"],
        ["together", "65", "1", "1", "1"],
    ]
    assert [line[:2] for line in lines[5:]] == [
        ["30.2", "tests.a::two"],
        ["2.0", "tests.a::three"],
        ["1.5", "tests.a::one"],
    ]


def test_borrowed_packages_bring_what_they_require(tmp_path):
    borrow = script("borrow")
    names = {d.name.lower() for d in borrow.needed(["torch"])}
    assert {"torch", "sympy", "mpmath"} <= names
    assert "pytest" not in names
    folder = Path(
        borrow.sysconfig.get_path("purelib", vars={"base": str(tmp_path), "platbase": str(tmp_path)})
    )
    folder.mkdir(parents=True)
    borrow.main(str(tmp_path), ["sympy"])
    run = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); import sympy, mpmath; print(sympy.__file__)"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stdout.startswith(str(folder)), run.stderr


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("quick", 1)])
def test_run_says_what_it_takes_before_it_builds(argument, status):
    run = subprocess.run([CI / "run", argument], capture_output=True, text=True, timeout=20)
    assert run.returncode == status
    assert run.stdout.startswith("Everything a change must pass")
    assert run.stdout.splitlines()[-1].startswith("FASTREG_OBJECTS=folder")
