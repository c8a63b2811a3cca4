"""Registers the real scans under FASTREG_DATA by the command line, and by every other tool that is installed, and judges all alike.

    FASTREG_DATA=... python -m bench.real [--pair NAME] [--tool NAME] [--environments DIR] [--work FOLDER] [--no-store] [-- ARGUMENT ...]

The scans are not part of this repository. Every pair is written as NIfTI and registered by a process of its own, ours with the
command line's defaults; CPU and wall seconds include starting Python, reading and writing, but no picture. The other tools
(bench/registrars) are looked for in this Python and in the virtual environments DIR/*; they turn with the pairs, so that what else
the machine does meets all of them. Every displacement is read by fastreg.convert and judged by the same lines below. Rows go to
bench/results/real.csv. Exit status: 0 all goals met by fastreg, 1 one missed, 2 no data or a failed run of ours.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

import fastreg  # noqa: E402
from bench import common, registrars  # noqa: E402
from fastreg import convert, metrics  # noqa: E402

THREADS = 2
FOLDING = 1e-3


@dataclass(frozen=True)
class Pair:
    """`fixed` and `moving` name arrays of the file, or of an array of several (`images`) rows; "{}" in labels and landmarks stands
    for those names. landmarks: score -> (name for fixed, name for moving).
    """

    source: str
    fixed: str = "fixed"
    moving: str = "moving"
    labels: str = ""
    landmarks: dict = field(default_factory=dict)

    def array(self, data, key):
        """The image `key`, or where pattern has "{}" what it stands for of that image."""
        for name in (key, f"img_{key}"):
            if name in data:
                return data[name]
        return data["images"][int(key)]

    def labels_of(self, data, key):
        """Labels without those that are not scored."""
        name = self.labels.format(key)
        labels = data[name] if name in data else data["segs"][int(key)]
        return scored(data, labels)


@dataclass(frozen=True)
class Set:
    """goals: score -> what its mean over the pairs must reach; tre: mm, at most; dice: mean over the labels, at least; "dice of
    all": of their union.
    """

    pairs: dict
    goals: dict


LANDMARKS = {
    "tre": ("fixed_lm", "moving_lm"),
    "tre refined": ("fixed_lm", "moving_lm_refined"),
    "tre dense": ("fixed_lm_dense", "moving_lm_dense"),
}
LUNGS = ("0004", "0006", "0011", "0012")
SETS = {
    "lung CT": Set(
        {"lungct_dirlab4dct_case1": Pair("lungct_dirlab4dct_case1", landmarks=LANDMARKS)},
        {"tre": 1.00, "tre refined": 0.74, "tre dense": 0.40},
    ),
    "brain MR": Set({"brainmr_vxm": Pair("brainmr_vxm", labels="{}_seg")}, {"dice": 0.750}),
    "hippocampus MR": Set(
        {
            f"hippocampusmr_msd04_{k}": Pair("hippocampusmr_msd04", "0", str(k), "segs {}")
            for k in range(1, 15)
        },
        {"dice": 0.775},
    ),
    # Lungs of different people: five lobes, and the lungs as their union.
    "lung MR": Set(
        {f"lungmr_proton_{n}": Pair("lungmr_proton", "0007", n, "lobe_{}") for n in LUNGS},
        {"dice of all": 0.957, "dice": 0.912},
    ),
    "T1 to T2 cord": Set(
        {"spinalmr_t1t2_sct": Pair("spinalmr_t1t2_sct", "t2", "t1", "{}_seg")}, {"dice": 0.925}
    ),
}
PAIRS = {name: pair for group in SETS.values() for name, pair in group.pairs.items()}
FIELDS = [
    "date", "commit", "device", "device_name", "threads", "isa", "torch", "set", "pair", "tool", "version", "how", "score", "before",
    "after", "cpu_seconds", "seconds", "peak_mb", "load", "folding", "arguments",
]  # fmt: skip


class Unusable(Exception):
    """One line for the user."""


def scored(data, labels):
    """Labels without those that the file says are too small to be scored."""
    wanted = json.loads(str(data["meta"])).get("labels_ge_1000vox")
    return labels if wanted is None else np.where(np.isin(labels, wanted), labels, 0).astype(labels.dtype)


def write(pair, data, folder):
    """Writes a pair's two images; returns their paths."""
    import SimpleITK

    paths = []
    for side, key in (("fixed", pair.fixed), ("moving", pair.moving)):
        # identity direction and zero origin
        volume = SimpleITK.GetImageFromArray(np.ascontiguousarray(pair.array(data, key), dtype=np.float32))
        volume.SetSpacing(tuple(data["spacing"].astype(float)[::-1]))
        paths.append(folder / f"{side}.nii.gz")
        SimpleITK.WriteImage(volume, str(paths[-1]))
    return paths


def scores(pair, data, u):
    """Score -> value for a displacement, (1, 3, *spatial) in voxels."""
    out = {}
    for score, names in pair.landmarks.items():
        fixed, moving = (torch.from_numpy(data[name]) for name in names)
        found = metrics.tre(metrics.move_points(fixed, u), moving, data["spacing"].tolist())
        out[score] = found.mean
    if pair.labels:
        fixed, moving = (
            torch.from_numpy(pair.labels_of(data, key).astype(np.int64))[None, None]
            for key in (pair.fixed, pair.moving)
        )
        moved = fastreg.warp(moving.float(), u, mode="nearest", padding="zeros").long()
        out["dice"] = metrics.dice(fixed, moved, fixed.unique()[1:].tolist()).mean
        out["dice of all"] = metrics.dice((fixed > 0).long(), (moved > 0).long(), [1]).mean
    return out


def ours(fixed, moving, out, extra):
    """Registers a pair by the command line."""
    command = [sys.executable, "-m", "fastreg", "register", fixed, moving, "-o", out / "found", "--quiet"]
    command += ["--no-picture", "--threads", THREADS, "--device", "cpu", *extra]
    out.mkdir(parents=True)
    used = registrars.measured(command, THREADS, out, path=(ROOT,))
    return [out / "found" / "displacement.nii.gz"], used


def run(group, name, data, folder, tools, extra=()):
    """Registers one pair by each tool, ours first; returns a row per tool and score."""
    pair, rows = PAIRS[name], []
    folder.mkdir(parents=True, exist_ok=True)
    fixed, moving = write(pair, data, folder)
    wanted = {*SETS[group].goals}
    before = scores(pair, data, torch.zeros(1, 3, *pair.array(data, pair.fixed).shape))
    for tool, (python, version) in tools.items():
        own = tool == "fastreg"
        try:
            work = folder / tool
            files, used = (
                ours(fixed, moving, work, extra)
                if own
                else registrars.run(tool, python, fixed, moving, work, THREADS)
            )
            chain = convert.read_chain([str(f) for f in files], like=str(fixed), moving=None)
            u = chain.displacement()[0]
        except (RuntimeError, OSError, ValueError) as error:
            if own:
                raise Unusable(f"{name}: {error}") from error
            print(f"{name}: {tool} failed: {error}", file=sys.stderr)
            continue
        u = u.nan_to_num(0.0).float()
        after, folding = scores(pair, data, u), metrics.folding(u)
        row = {
            **common.environment("cpu"),
            "set": group,
            "pair": name,
            "tool": tool,
            "version": version,
            "how": "" if own else registrars.REGISTRARS[tool].how,
            "cpu_seconds": f"{used.cpu:.2f}",
            "seconds": f"{used.wall:.2f}",
            "peak_mb": f"{used.peak_mb:.0f}",
            "load": f"{used.load:.2f}",
            "folding": f"{folding:.3g}",
            "arguments": " ".join(extra) if own else "",
        }
        for score in sorted(wanted):
            rows.append(
                {**row, "score": score, "before": f"{before[score]:.4f}", "after": f"{after[score]:.4f}"}
            )
        said = ", ".join(f"{s} {before[s]:.3f} -> {after[s]:.3f}" for s in sorted(wanted))
        print(
            f"{name:26} {tool:11} {said}; folding {100 * folding:.3g} %, {used.cpu:.1f} CPU s, {used.wall:.1f} s, {used.peak_mb:.0f} MB",
            flush=True,
        )
    return rows


def met(goal, score, value):
    return value <= goal if score.startswith("tre") else value >= goal


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.real", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pair", action="append", choices=list(PAIRS), help="only this pair; may be repeated"
    )
    parser.add_argument(
        "--tool",
        action="append",
        choices=["fastreg", *registrars.REGISTRARS],
        help="only this one; may be repeated",
    )
    parser.add_argument(
        "--environments", type=Path, metavar="DIR", help="folder of virtual environments with other tools"
    )
    parser.add_argument("--work", type=Path, help="folder for inputs and outputs, kept (default: temporary)")
    parser.add_argument("--no-store", action="store_true", help="leave bench/results alone")
    parser.add_argument("extra", nargs="*", metavar="-- ARGUMENT", help="arguments for fastreg register")
    args = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    rows = []
    try:
        folder = os.environ.get("FASTREG_DATA")
        if not folder or not Path(folder).is_dir():
            what = f"is no folder: {folder}" if folder else "is not set"
            raise Unusable(f"FASTREG_DATA {what}; it names the folder with the scans (NAME.npz)")
        there = {"fastreg": (sys.executable, fastreg.__version__), **registrars.found(args.environments)}
        tools = {name: there[name] for name in args.tool or there if name in there}
        missing = [name for name in args.tool or registrars.REGISTRARS if name not in there]
        if missing:
            print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="fastreg-real-") as temporary:
            work = (args.work or Path(temporary)).resolve()
            for group, these in SETS.items():
                for name, pair in these.pairs.items():
                    if args.pair and name not in args.pair:
                        continue
                    source = Path(folder) / f"{pair.source}.npz"
                    if not source.exists():
                        raise Unusable(f"FASTREG_DATA holds no {source.name}")
                    with np.load(source) as file:
                        data = dict(file)
                    new = run(group, name, data, work / name, tools, args.extra)
                    if not args.no_store:
                        common.append_rows(common.RESULTS / "real.csv", new, FIELDS)
                    rows += new
    except Unusable as error:
        print(f"bench.real: {error}", file=sys.stderr)
        return 2
    good = True
    for group, score, goal, value, folding in judged(rows):
        reached = met(goal, score, value) and folding < FOLDING
        good &= reached
        print(
            f"{group}: {score} {value:.3f} (goal {goal}), folding {100 * folding:.3g} %: {'met' if reached else 'MISSED'}"
        )
    return 0 if good else 1


def judged(rows):
    """Yields (set, score, goal, mean of fastreg, its worst share of folds) of the sets in rows."""
    for group, these in SETS.items():
        for score, goal in these.goals.items():
            of = [r for r in rows if (r["set"], r["tool"], r["score"]) == (group, "fastreg", score)]
            if of:
                value = float(np.mean([float(r["after"]) for r in of]))
                yield group, score, goal, value, max(float(r["folding"]) for r in of)


if __name__ == "__main__":
    sys.exit(main())
