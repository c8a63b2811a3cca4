"""The emulation of CUDA itself: each planted fault is named, with its line, and a kernel without one gives its result."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import BACKEND

pytestmark = pytest.mark.skipif(BACKEND != "emulation", reason="FASTREG_TEST_BACKEND=emulation")
SOURCE = (Path(__file__).parents[1] / "emulation" / "planted.cpp").read_text(encoding="utf-8")
NAMES = [n.strip() for n in SOURCE.split("enum Fault : int64_t {")[1].split("}")[0].split(",") if n.strip()]


def reverse(x, fault):
    return torch.ops.fastreg_planted.reverse(x, NAMES.index(fault))


def expected(x):
    blocks = x.view(-1, 64)
    warps = blocks.flip(1).reshape(-1, 2, 32).sum(2, keepdim=True).expand(-1, 2, 32).reshape(-1, 64)
    return (warps + blocks).flatten()


def test_without_a_fault():
    x = torch.randn(640)
    torch.testing.assert_close(reverse(x, "none"), expected(x))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing_barrier", r"(missing barrier: a read|nothing has written).*planted.cpp:\d+"),
        (
            "divergent_barrier",
            r"divergent barrier: thread \d+ waits at .*planted.cpp:\d+, thread \d+ waits at",
        ),
        ("shared_off_by_one", r"shared memory index 64 of an array of 64, at .*planted.cpp:\d+"),
        ("read_past_the_end", r"an access outside the memory of a tensor, at .*planted.cpp:\d+"),
        ("write_past_the_end", r"an access outside the memory of a tensor, at .*planted.cpp:\d+"),
        ("unwritten_shared", "a read of shared memory that nothing has written"),
        ("write_after_read", "missing barrier: a (read of|write to) shared memory that thread"),
        ("divergent_shuffle", "divergent warp operation|waits for its warp|has returned"),
        ("copy_not_waited_for", "a copy is still on its way to"),
        ("early_return", "divergent barrier: .*has returned"),
        ("missing_syncwarp", "missing barrier: a write to shared memory that thread"),
    ],
)
def test_faults_are_named(fault, message):
    with pytest.raises(RuntimeError, match=message):
        reverse(torch.randn(640), fault)
    # The next launch starts afresh.
    x = torch.randn(640)
    torch.testing.assert_close(reverse(x, "none"), expected(x))


def test_an_unwritten_output_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    out = reverse(torch.randn(640), "unwritten_output")
    assert out.isnan().nonzero().flatten().tolist() == [320]


def test_a_write_before_the_start_ends_the_process():
    code = (
        "import os, sys; sys.path.insert(0, 'tests'); os.environ['FASTREG_TEST_BACKEND'] = 'emulation'\n"
        "import backends, torch; backends.install(); x = torch.randn(640)\n"
        f"torch.ops.fastreg_planted.reverse(x, {NAMES.index('write_before_the_start')})"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.returncode != 0
    assert "something was written beside a tensor of 2560 bytes" in run.stderr
