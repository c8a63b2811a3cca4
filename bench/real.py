"""Registers the real scans under FASTREG_DATA by the command line, with its defaults, and judges the result.

    FASTREG_DATA=... python -m bench.real [--pair NAME] [--work FOLDER] [--no-store] [-- ARGUMENT ...]

The scans are not part of this repository. Every pair is written as NIfTI (and CSV) and registered by a
process of its own; wall clock includes starting Python, reading and writing. Rows go to
bench/results/real.csv. Exit status: 0 all goals met, 1 one missed, 2 no data or a failed run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from bench import common  # noqa: E402

THREADS = 2
FOLDING = 1e-3
# score, goal, seconds allowed. tre: mean, mm, at most; dice: mean over the labels, at least.
GOALS = {"lungct_dirlab4dct_case1": ("tre", 1.25, 60.0), "brainmr_vxm": ("dice", 0.70, 120.0)}
FIELDS = [
    "date", "commit", "device", "device_name", "threads", "isa", "torch", "pair", "score", "before", "after",
    "goal", "seconds", "limit", "folding", "folding_limit", "met", "arguments",
]  # fmt: skip


class Unusable(Exception):
    """One line for the user."""


def write(pair, source, folder):
    """Writes a pair's files; returns the arguments of `fastreg register`."""
    import SimpleITK

    data = np.load(source)
    spacing = data["spacing"].astype(float)

    def image(name, array):
        volume = SimpleITK.GetImageFromArray(np.ascontiguousarray(array))
        volume.SetSpacing(tuple(spacing[::-1]))
        SimpleITK.WriteImage(volume, str(folder / name))
        return str(folder / name)

    def points(name, voxels):
        # identity direction and zero origin: mm are voxels times spacing, x first
        np.savetxt(folder / name, (voxels * spacing)[:, ::-1], "%.6f", ",", header="x,y,z", comments="")
        return str(folder / name)

    arguments = [image(f"{which}.nii.gz", data[which]) for which in ("fixed", "moving")]
    if GOALS[pair][0] == "tre":
        for which in ("fixed", "moving"):
            arguments += [f"--{which}-landmarks", points(f"{which}.csv", data[f"{which}_lm"])]
    else:
        scored = json.loads(str(data["meta"]))["labels_ge_1000vox"]
        for which in ("fixed", "moving"):
            labels = data[f"{which}_seg"]
            labels = np.where(np.isin(labels, scored), labels, 0).astype(labels.dtype)
            arguments += [f"--{which}-labels", image(f"{which}_labels.nii.gz", labels)]
    return arguments


def run(pair, source, folder, extra=()):
    """Registers one pair; returns its row."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = write(pair, source, folder)
    out = folder / "out"
    command = [sys.executable, "-m", "fastreg", "register", *arguments, "-o", str(out), "--force", "--quiet"]
    command += ["--threads", str(THREADS), "--device", "cpu", *extra]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(THREADS)}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise Unusable(f"{pair}: fastreg register ended with status {done.returncode}: {lines[-1]}")
    report = json.loads((out / "report.json").read_text())
    score, goal, limit = GOALS[pair]
    before, after = (float(report[score][when]["mean"]) for when in ("before", "after"))
    folding = float(report["folding"])
    good = after <= goal if score == "tre" else after >= goal
    return {
        **common.environment("cpu"),
        "pair": pair,
        "score": score,
        "before": f"{before:.4f}",
        "after": f"{after:.4f}",
        "goal": goal,
        "seconds": f"{seconds:.1f}",
        "limit": limit,
        "folding": f"{folding:.3g}",
        "folding_limit": FOLDING,
        "met": "yes" if good and seconds <= limit and folding < FOLDING else "no",
        "arguments": " ".join(extra),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.real", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pair", action="append", choices=list(GOALS), help="only this pair; may be repeated"
    )
    parser.add_argument("--work", type=Path, help="folder for inputs and outputs, kept (default: temporary)")
    parser.add_argument("--no-store", action="store_true", help="leave bench/results alone")
    parser.add_argument("extra", nargs="*", metavar="-- ARGUMENT", help="arguments for fastreg register")
    args = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    try:
        folder = os.environ.get("FASTREG_DATA")
        if not folder or not Path(folder).is_dir():
            what = f"is no folder: {folder}" if folder else "is not set"
            raise Unusable(f"FASTREG_DATA {what}; it names the folder with the scans (NAME.npz)")
        wanted = args.pair or list(GOALS)
        sources = {pair: Path(folder).resolve() / f"{pair}.npz" for pair in wanted}
        for source in sources.values():
            if not source.exists():
                raise Unusable(f"FASTREG_DATA holds no {source.name}")
        with tempfile.TemporaryDirectory(prefix="fastreg-real-") as temporary:
            work = (args.work or Path(temporary)).resolve()
            rows = [run(pair, source, work / pair, args.extra) for pair, source in sources.items()]
    except Unusable as error:
        print(f"bench.real: {error}", file=sys.stderr)
        return 2
    for r in rows:
        unit = " mm" if r["score"] == "tre" else ""
        print(
            f"{r['pair']:26} {r['score']} {r['before']} -> {r['after']}{unit} (goal {r['goal']}), "
            f"{r['seconds']} s of {r['limit']:g}, folding {100 * float(r['folding']):.3g} %: "
            f"{'met' if r['met'] == 'yes' else 'MISSED'}"
        )
    if not args.no_store:
        common.append_rows(common.RESULTS / "real.csv", rows, FIELDS)
    return 0 if all(r["met"] == "yes" for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
