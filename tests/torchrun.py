"""A script in two processes that find each other, as torchrun starts them."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_two(code, *arguments):
    """Runs the Python code under torchrun --nproc-per-node=2; both must end well."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(code, encoding="utf-8")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        done = subprocess.run(
            [sys.executable, *launch, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr


def assert_no_threads_of_gloo():
    """One that outlives the interpreter aborts the process where it then lets go of a tensor."""
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        return
    until = time.monotonic() + 10  # one that was joined may be listed a moment longer
    while names := [n for n in map(_name, tasks.iterdir()) if "gloo" in n]:
        assert time.monotonic() < until, names
        time.sleep(0.05)


def _name(task):
    try:
        return (task / "comm").read_text(encoding="utf-8").strip()
    except OSError:  # ended since
        return ""
