"""What each setting of `fastreg register` changes, on real scans: the tables of docs/settings.md.

    FASTREG_DATA=... python -m bench.settings [--pair NAME] [--setting NAME] [--no-store]

Every pair is registered by fastreg.register once a setting. Time is the process's CPU time, of all threads: what else the
machine does hardly changes it. Rows go to bench/results/settings.csv; a pair and a setting stored at this commit are not
run again. The pairs were looked at while the defaults were chosen, so they say how settings compare, not how good they are.
"""

import argparse
import math
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass, replace

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # threads that wait would spend CPU time

import numpy as np
import torch
import torch.nn.functional as F

import fastreg
from bench import common, real
from bench.experiments.common import Unusable, scans, tensor
from bench.markdown import grouped, measured, number, table
from fastreg import metrics, ops
from fastreg.data import phantom

STORE = "settings.csv"
FIELDS = [
    "date", "commit", "device", "device_name", "threads", "isa", "torch", "pair", "setting", "options", "score",
    "before", "after", "cpu_seconds", "seconds", "folding",
]  # fmt: skip
KEY = ("device_name", "threads", "pair", "setting", "score")

# --mask MASK stands for the pair's own mask.
MASK = {"mask": "MASK"}
SETTINGS = {
    "defaults": {},
    "preset fast": {"preset": "fast"},
    "fast": {"iterations": (100, 100, 60, 0)},
    "faster": {"iterations": (50, 50, 20, 0)},
    "fewer iterations": {"iterations": 30},
    "more iterations": {"iterations": 200},
    "window 5": {"window": 5},
    "window 9": {"window": 9},
    "mse": {"similarity": "mse"},
    "mind": {"similarity": "mind"},
    "mi": {"similarity": "mi"},
    "weight 0.5": {"regularization": 0.5},
    "weight 1": {"regularization": 1.0},
    "weight 2": {"regularization": 2.0},
    "weight 4": {"regularization": 4.0},
    "velocity": {"transform": "velocity"},
    "bspline": {"transform": "bspline"},
    "affine": {"affine": True},
    "mask": MASK,
    "symmetric": {"symmetric": True},
    "no search": {"search_range": 0},
}
TURN, SHIFT = 12.0, 6.0  # degrees about the first axis, voxels along the last two
MARGIN = 3  # voxels that a mask has around what it is made from


@dataclass
class Scan:
    """Two images (1, 1, *spatial) with points (P, 3), voxels, or labels (1, 1, *spatial), and a mask or None."""

    fixed: torch.Tensor
    moving: torch.Tensor
    spacing: tuple
    points: tuple = ()
    labels: tuple = ()
    mask: torch.Tensor | None = None
    truth: torch.Tensor | None = None  # displacement, known where body is 1
    body: torch.Tensor | None = None

    def score(self, u):
        """TRE in mm, mean Dice, or where all of the motion is known its mean error, mm, over the body."""
        if self.truth is not None:
            size = torch.tensor(self.spacing).view(1, -1, 1, 1, 1)
            error = ((u - self.truth) * size).norm(dim=1, keepdim=True)
            return "error", float(error[self.body].mean())
        if self.points:
            fixed, moving = self.points
            return "tre", metrics.tre(metrics.move_points(fixed, u), moving, self.spacing).mean
        fixed, moving = self.labels
        moved = ops.warp(moving.float(), u, mode="nearest", padding="zeros").long()
        return "dice", metrics.dice(fixed, moved, fixed.unique()[1:].tolist()).mean


def around(inside):
    """1 where a bool array is true and MARGIN voxels around."""
    return F.max_pool3d(tensor(inside), 2 * MARGIN + 1, 1, MARGIN)


def of_real(name):
    """A pair of bench/real.py."""
    pair = real.PAIRS[name]
    data = scans(pair.source)
    sides = pair.fixed, pair.moving
    images = [tensor(pair.array(data, k)) for k in sides]
    spacing = tuple(float(s) for s in data["spacing"])
    if pair.landmarks:
        return Scan(*images, spacing, points=[torch.from_numpy(data[k]) for k in pair.landmarks["tre"]])
    arrays = [pair.labels_of(data, k).astype(np.int64) for k in sides]
    lung = data.get(f"lung_{pair.fixed}")
    mask = around((arrays[0] if lung is None else lung) > 0)
    return Scan(*images, spacing, labels=[torch.from_numpy(a)[None, None] for a in arrays], mask=mask)


def hippocampus(k):
    """Subject k to subject 0."""
    data = scans("hippocampusmr_msd04")
    labels = [torch.from_numpy(data["segs"][i].astype(np.int64))[None, None] for i in (0, k)]
    mask = around(labels[0][0, 0].numpy() > 0)
    return Scan(*(tensor(data["images"][i]) for i in (0, k)), (1.0, 1.0, 1.0), labels=labels, mask=mask)


def sliding(amplitude):
    """The thorax phantom, whose lungs slide along a wall that rests."""
    p = phantom.thorax(amplitude=amplitude)
    body = (p.fixed_labels > 0) | (p.fixed > -300)
    return Scan(p.fixed, p.moving, p.spacing, truth=p.displacement, body=body)


def turned(scan):
    """The pair with its moving image turned and shifted."""
    shape, angle = scan.moving.shape[2:], math.radians(TURN)
    turn = torch.eye(3)
    turn[1:, 1:] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    size = torch.tensor(scan.spacing)
    turn = turn * size / size[:, None]  # of mm, in voxels
    centre = torch.tensor([(n - 1) / 2 for n in shape])
    matrix = torch.cat([turn, (centre + torch.tensor([0.0, SHIFT, -SHIFT]) - turn @ centre)[:, None]], 1)[
        None
    ]
    labels = ops.warp(scan.labels[1].float(), None, affine=matrix, mode="nearest").long()
    moving = ops.warp(scan.moving, None, affine=matrix, padding="border")
    return replace(scan, moving=moving, labels=[scan.labels[0], labels])


def blocked(scan):
    """The pair with a bright block in the middle of its fixed image, a fifth of each axis wide; the mask leaves it out."""
    block = torch.zeros_like(scan.fixed)
    block[(..., *(slice(2 * n // 5, 3 * n // 5) for n in scan.fixed.shape[2:]))] = 1
    fixed = torch.where(block > 0, scan.fixed.amax(), scan.fixed)
    return replace(scan, fixed=fixed, mask=1 - around(block[0, 0] > 0))


# What a pair was changed to show.
ONLY = {"blocked": ("defaults", "mask"), **{f"{mm}mm": ("defaults", "no search") for mm in (20, 30, 40)}}
LUNG = "lungmr_proton_0004"
PAIRS = {
    **{f"hippocampus {k}": lambda k=k: hippocampus(k) for k in range(1, 8)},
    **{f"hippocampus {k}, turned": lambda k=k: turned(hippocampus(k)) for k in range(1, 8)},
    **{f"hippocampus {k}, blocked": lambda k=k: blocked(hippocampus(k)) for k in range(1, 8)},
    "spine T1 to T2": lambda: of_real("spinalmr_t1t2_sct"),
    "lungs MR": lambda: of_real(LUNG),
    "lungs MR, turned": lambda: turned(of_real(LUNG)),
    "lungs MR, blocked": lambda: blocked(of_real(LUNG)),
    "lungs CT": lambda: of_real("lungct_dirlab4dct_case1"),
    "brains": lambda: of_real("brainmr_vxm"),
    **{f"thorax, {mm}mm": lambda mm=mm: sliding(float(mm)) for mm in (20, 30, 40)},
}


def shown(options):
    """As arguments of `fastreg register`."""

    def flag(name, value):
        name = name.replace("_", "-")
        if isinstance(value, bool):
            return f"--{name}" if value else f"--no-{name}"
        return f"--{name} " + (",".join(map(str, value)) if isinstance(value, tuple) else f"{value}")

    return " ".join(flag(*option) for option in options.items()) or "defaults"


def run(name, scan, setting):
    """Registers a pair with a setting: a row, or None where the pair has not what the setting needs."""
    options = SETTINGS[setting]
    if "mask" in options and scan.mask is None:
        return None
    given = {**options, "mask": scan.mask} if "mask" in options else options
    wall, begin = time.perf_counter(), time.process_time()
    result = fastreg.register(scan.fixed, scan.moving, spacing=scan.spacing, **given)
    spent, wall = time.process_time() - begin, time.perf_counter() - wall
    score, before = scan.score(torch.zeros_like(result.displacement))
    return {
        **common.environment("cpu"),
        "pair": name,
        "setting": setting,
        "options": shown(options),
        "score": score,
        "before": f"{before:.4f}",
        "after": f"{scan.score(result.displacement)[1]:.4f}",
        "cpu_seconds": f"{spent:.2f}",
        "seconds": f"{wall:.2f}",
        "folding": f"{metrics.folding(result.displacement):.3g}",
    }


# Section of docs/results/settings.md -> its settings (None: all) and kinds of pairs (None: all).
ALIKE = ("hippocampus", "lungs MR", "lungs CT", "brains")
SECTIONS = {
    "fast": (("defaults", "fast", "faster", "fewer iterations"), ALIKE),
    "fine": (
        (
            "defaults",
            "more iterations",
            "weight 0.5",
            "weight 1",
            "weight 2",
            "weight 4",
            "window 5",
            "window 9",
            "mse",
        ),
        ALIKE,
    ),
    "contrasts": (("defaults", "mse", "mind", "mi"), ("spine T1 to T2", *ALIKE)),
    "motion": (
        ("defaults", "weight 4", "velocity", "bspline", "mind", "affine"),
        ("hippocampus, turned", "lungs MR, turned"),
    ),
    "sliding": (
        ("defaults", "no search"),
        ("thorax, 20mm", "thorax, 30mm", "thorax, 40mm", "lungs MR", "lungs CT", "brains"),
    ),
    "both": (("defaults", "velocity", "symmetric"), ALIKE),
    "transforms": (("defaults", "velocity", "bspline", "affine"), ALIKE),
    "masks": (
        ("defaults", "mask"),
        ("hippocampus, blocked", "lungs MR, blocked", "hippocampus", "lungs MR", "brains"),
    ),
    "all": (None, None),
}
NAMES = {"tre": "TRE, mm", "dice": "Dice", "error": "mean error in the body, mm"}


def kind(pair):
    """Without the number of the subject."""
    return re.sub(r" \d+\b", "", pair)


def section(found, settings, kinds):
    """found: (pair, setting) -> row. Mean score by kind of pair, median CPU time beside that of the defaults, the largest folding."""
    columns = {}
    for pair in PAIRS:
        if (pair, "defaults") in found and (kinds is None or kind(pair) in kinds):
            columns.setdefault(kind(pair), []).append(pair)

    def mean(pairs, setting, key):
        """Nothing where a pair has not been run."""
        if all((p, setting) in found for p in pairs):
            return number(f"{statistics.fmean(float(found[p, setting][key]) for p in pairs):.4f}")
        return ""

    header, before = ["setting"], ["not registered"]
    for name, pairs in columns.items():
        count = f", {len(pairs)} pairs" if len(pairs) > 1 else ""
        header.append(f"{name}{count} ({NAMES[found[pairs[0], 'defaults']['score']]})")
        before.append(mean(pairs, "defaults", "before"))
    lines = [[*before, "", ""]]
    for setting in settings or SETTINGS:
        rows = {p: found[p, setting] for pairs in columns.values() for p in pairs if (p, setting) in found}
        if not rows:
            continue
        times = [
            float(r["cpu_seconds"]) / float(found[p, "defaults"]["cpu_seconds"]) for p, r in rows.items()
        ]
        folding = max(float(r["folding"]) for r in rows.values())
        options = next(iter(rows.values()))["options"]
        lines.append(
            [
                options if options == "defaults" else f"`{options}`",
                *(mean(pairs, setting, "after") for pairs in columns.values()),
                number(f"{statistics.median(times):.3f}", 2),
                f"{100 * folding:.2g} %",
            ]
        )
    return table([*header, "CPU time", "most folding"], lines)


def sections(results):
    """The sections of docs/results/settings.md."""
    rows = common.newest(common.read_rows(results / STORE), KEY)
    if not rows:
        return {}
    found = {(r["pair"], r["setting"]): r for r in rows}
    times = {}
    for pair in PAIRS:
        if (pair, "defaults") in found:
            times.setdefault(kind(pair), []).append(float(found[pair, "defaults"]["cpu_seconds"]))
    took = "; ".join(f"{name} {number(f'{statistics.fmean(t):.2f}')}" for name, t in times.items())
    about = [
        f"CPU time: median over the pairs of the ratio to the defaults, which take (seconds, all threads): {took}.",
        *(measured(group) for group in grouped(rows, "device_name", "threads").values()),
    ]
    tables = {name: section(found, *what) for name, what in SECTIONS.items()}
    return {**tables, "all": "\n\n".join([tables["all"], *about])}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.settings", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pair", action="append", choices=list(PAIRS), metavar="NAME", help="may be repeated"
    )
    parser.add_argument(
        "--setting", action="append", choices=list(SETTINGS), metavar="NAME", help="may be repeated"
    )
    parser.add_argument("--threads", type=int, default=real.THREADS)
    parser.add_argument("--no-store", action="store_true", help="leave bench/results alone")
    args = parser.parse_args(argv)
    path = common.RESULTS / STORE
    torch.set_num_threads(args.threads)
    stored = {(r["pair"], r["setting"], r["commit"]) for r in common.read_rows(path)}
    small = torch.rand(1, 1, 16, 16, 16)
    fastreg.register(small, small)  # what torch loads at its first use is not any setting's time
    try:
        for name in args.pair or PAIRS:
            scan = PAIRS[name]()
            for setting in args.setting or ONLY.get(name.partition(", ")[2], SETTINGS):
                if not args.no_store and (name, setting, common.commit()) in stored:
                    continue
                row = run(name, scan, setting)
                if row is None:
                    continue
                print(
                    "{pair:24} {options:40} {score} {before} -> {after}, {cpu_seconds} CPU s".format(**row),
                    flush=True,
                )
                if not args.no_store:
                    common.append_rows(path, [row], FIELDS)
    except Unusable as error:
        print(f"bench.settings: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
