"""Registers the real scans under FASTREG_DATA by the command line and judges the result.

    FASTREG_DATA=... python -m bench.real [--pair NAME] [--work FOLDER] [--no-store] [-- ARGUMENT ...]

The scans are not part of this repository. Every pair is written as NIfTI (and CSV) and registered by a
process of its own, with the command line's defaults but for what PAIRS says; wall clock includes starting
Python, reading and writing. Rows go to bench/results/real.csv. Exit status: 0 all goals met, 1 one missed,
2 no data or a failed run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from bench import common  # noqa: E402

THREADS = 2


@dataclass(frozen=True)
class Pair:
    """`fixed` and `moving` name arrays of the file; "{}" in `labels` and `landmarks` stands for those names.

    goals: score -> what it must reach, or None where it is only reported. tre: mean, mm, at most; dice: mean over
    the labels, at least; "dice of all": of their union.
    """

    source: str
    goals: dict
    seconds: float
    fixed: str = "fixed"
    moving: str = "moving"
    labels: str = ""
    landmarks: str = ""
    folding: float = 1e-3
    arguments: tuple = ()


LUNGS = ("0004", "0006", "0011", "0012")
PAIRS = {
    "lungct_dirlab4dct_case1": Pair("lungct_dirlab4dct_case1", {"tre": 1.25}, 60.0, landmarks="{}_lm"),
    "brainmr_vxm": Pair("brainmr_vxm", {"dice": 0.70}, 120.0, labels="{}_seg"),
    "spinalmr_t1t2_sct": Pair(
        "spinalmr_t1t2_sct",
        {"dice": 0.90},
        60.0,
        fixed="t2",
        moving="t1",
        labels="{}_seg",
        folding=3e-3,
        arguments=("--similarity", "mind"),
    ),
    # Lungs of different people: five lobes, and the lungs as their union.
    **{
        f"lungmr_proton_{n}": Pair(
            "lungmr_proton",
            {"dice": None, "dice of all": None},
            120.0,
            fixed="0007",
            moving=n,
            labels="lobe_{}",
        )
        for n in LUNGS
    },
}
FIELDS = [
    "date", "commit", "device", "device_name", "threads", "isa", "torch", "pair", "score", "before", "after",
    "goal", "seconds", "limit", "folding", "folding_limit", "met", "preset", "arguments",
]  # fmt: skip


class Unusable(Exception):
    """One line for the user."""


def scored(data, key):
    """Labels without those that are not scored."""
    labels = data[key]
    wanted = json.loads(str(data["meta"])).get("labels_ge_1000vox")
    if wanted is None:
        return labels
    return np.where(np.isin(labels, wanted), labels, 0).astype(labels.dtype)


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

    sides = {"fixed": pair.fixed, "moving": pair.moving}
    arguments = []
    for side, key in sides.items():
        array = data[key] if key in data else data[f"img_{key}"]
        arguments.append(image(f"{side}.nii.gz", array.astype(np.float32)))
    for side, key in sides.items():
        if pair.landmarks:
            arguments += [f"--{side}-landmarks", points(f"{side}.csv", data[pair.landmarks.format(key)])]
        if pair.labels:
            arguments += [
                f"--{side}-labels",
                image(f"{side}_labels.nii.gz", scored(data, pair.labels.format(key))),
            ]
    return arguments


def union_dice(folder):
    """Dice of all labels as one, before and after."""
    import SimpleITK

    fixed, before, after = (
        SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / name))) > 0
        for name in ("fixed_labels.nii.gz", "moving_labels.nii.gz", "out/moved_labels.nii.gz")
    )
    return [2 * (fixed & moved).sum() / (fixed.sum() + moved.sum()) for moved in (before, after)]


def run(name, pair, source, folder, extra=()):
    """Registers one pair; returns a row per score."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = write(pair, source, folder)
    out = folder / "out"
    command = [sys.executable, "-m", "fastreg", "register", *arguments, "-o", str(out), "--force", "--quiet"]
    command += ["--threads", str(THREADS), "--device", "cpu", *pair.arguments, *extra]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(THREADS)}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise Unusable(f"{name}: fastreg register ended with status {done.returncode}: {lines[-1]}")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    folding = float(report["folding"])
    rows = []
    for score, goal in pair.goals.items():
        if score == "dice of all":
            before, after = union_dice(folder)
        else:
            before, after = (float(report[score][when]["mean"]) for when in ("before", "after"))
        good = goal is None or (after <= goal if score == "tre" else after >= goal)
        rows.append(
            {
                **common.environment("cpu"),
                "pair": name,
                "score": score,
                "before": f"{before:.4f}",
                "after": f"{after:.4f}",
                "goal": "" if goal is None else goal,
                "seconds": f"{seconds:.1f}",
                "limit": pair.seconds,
                "folding": f"{folding:.3g}",
                "folding_limit": pair.folding,
                "met": "yes" if good and seconds <= pair.seconds and folding < pair.folding else "no",
                "preset": " ".join(pair.arguments),
                "arguments": " ".join(extra),
            }
        )
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.real", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pair", action="append", choices=list(PAIRS), help="only this pair; may be repeated"
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
        wanted = {name: PAIRS[name] for name in args.pair or PAIRS}
        sources = {name: Path(folder).resolve() / f"{pair.source}.npz" for name, pair in wanted.items()}
        for source in sources.values():
            if not source.exists():
                raise Unusable(f"FASTREG_DATA holds no {source.name}")
        with tempfile.TemporaryDirectory(prefix="fastreg-real-") as temporary:
            work = (args.work or Path(temporary)).resolve()
            rows = [
                row
                for name, pair in wanted.items()
                for row in run(name, pair, sources[name], work / name, args.extra)
            ]
    except Unusable as error:
        print(f"bench.real: {error}", file=sys.stderr)
        return 2
    for r in rows:
        unit = " mm" if r["score"] == "tre" else ""
        print(
            f"{r['pair']:26} {r['score']} {r['before']} -> {r['after']}{unit} (goal {r['goal'] or 'none'}), "
            f"{r['seconds']} s of {r['limit']:g}, folding {100 * float(r['folding']):.3g} %: "
            f"{'met' if r['met'] == 'yes' else 'MISSED'}"
        )
    if not args.no_store:
        common.append_rows(common.RESULTS / "real.csv", rows, FIELDS)
    return 0 if all(r["met"] == "yes" for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
