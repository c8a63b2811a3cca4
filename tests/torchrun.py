"""A script in two processes that find each other, as torchrun starts them."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TASKS = Path("/proc/self/task")


def run_two(code, *arguments, seconds=600):
    """Runs the Python code under torchrun --nproc-per-node=2. The CompletedProcess; one that does not end in time is an error."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(code, encoding="utf-8")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        process = subprocess.Popen(
            [sys.executable, *launch, *map(str, arguments)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(
                    [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "models")]
                ),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends the two
            out, err = process.communicate()
            raise AssertionError(f"not done after {seconds} s\n{out}{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def threads_of_gloo():
    """Their names; none where the system does not tell."""
    return [name for name in map(_name, TASKS.iterdir()) if "gloo" in name] if TASKS.is_dir() else []


def assert_no_threads_of_gloo():
    """One that outlives the interpreter aborts the process where it then lets go of a tensor."""
    until = time.monotonic() + 10  # one that was joined may be listed a moment longer
    while names := threads_of_gloo():
        assert time.monotonic() < until, names
        time.sleep(0.05)


def _name(task):
    try:
        return (task / "comm").read_text(encoding="utf-8").strip()
    except OSError:  # ended since
        return ""
