"""Random pairs of a breathing thorax, registered by the command line's defaults: how often it is right, and whether it says when not.

    python -m bench.robustness [--pairs 200] [--seed 0] [--no-store] [-- ARGUMENT ...]

Motion of 0 to 40 mm that slides along the chest wall, and each of the faults below in some 30 % of the pairs. The truth is known
from the formulas and is not told to the command. Rows go to bench/results/robustness.csv. Exit status: 1 where a pair came out worse
than it began and "status" in its report.json does not say so.
"""

import argparse
import contextlib
import json
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
from bench.markdown import number, table  # noqa: E402
from fastreg import cli, convert, io, metrics  # noqa: E402
from fastreg.data import phantom  # noqa: E402

SHAPE = (64, 56, 80)  # voxels of 4.4 x 4 x 4 mm
RIGHT = 4.0  # mm, a voxel: mean error that counts as found
WORSE = 0.25  # mm, by which the mean error may grow unsaid: a sixteenth of a voxel
FAULTS = ("noise", "bias field", "missing slices", "cropped", "inverted", "swapped")
FIELDS = [
    "date", "commit", "device", "device_name", "threads", "isa", "torch", "seed", "pair", "amplitude_mm", "faults", "before", "after",
    "wall", "folding", "status", "said", "seconds", "arguments",
]  # fmt: skip


def noise(rng, image, grid):
    return image + rng.normal(scale=rng.uniform(20, 80), size=image.shape).astype(np.float32), grid


def bias(rng, image, grid):
    """Brighter at one end than at the other, by up to a half."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape), indexing="ij")
    slope = rng.normal(size=3)
    along = sum(s * a for s, a in zip(slope, axes, strict=True)) / np.abs(slope).sum()
    return ((image + 1000) * (1 + 0.5 * along) - 1000).astype(np.float32), grid


def missing(rng, image, grid):
    """Up to four slices are air."""
    image = image.copy()
    image[rng.choice(len(image), rng.integers(1, 5), replace=False)] = -1000
    return image, grid


def cropped(rng, image, grid):
    """Up to a fifth of an axis is not there, at either end."""
    axis, n = int(rng.integers(3)), int(rng.uniform(0.05, 0.2) * max(image.shape))
    n = min(n, image.shape[axis] // 4)
    first = n if rng.random() < 0.5 else 0
    kept = [slice(None)] * 3
    kept[axis] = slice(first, image.shape[axis] - n + first)
    corner = np.zeros(3)
    corner[axis] = first
    origin = np.asarray(grid.to_physical(corner[None]))[0]
    part = np.ascontiguousarray(image[tuple(kept)])
    return part, io.Geometry(part.shape[::-1], grid.spacing, tuple(origin), grid.direction)


def inverted(rng, image, grid):
    return -image, grid


ACTS = dict(zip(FAULTS, (noise, bias, missing, cropped, inverted), strict=False))


def pair(seed, number):
    """Images and grids of (fixed, moving), landmarks of each in mm, which of them are near the wall, amplitude, faults."""
    rng = np.random.default_rng([seed, number])
    amplitude = float(rng.uniform(0, 40))
    p = phantom.thorax(SHAPE, seed=int(rng.integers(2**31)), amplitude=amplitude)
    grid = io.Geometry.of(SHAPE, p.spacing)
    sides = [(p.fixed[0, 0].numpy(), grid), (p.moving[0, 0].numpy(), grid)]
    points = [grid.to_physical(v.numpy()) for v in (p.fixed_landmarks, p.moving_landmarks)]
    faults = [name for name in FAULTS if rng.random() < 0.3]
    for name in faults:
        if name in ACTS:
            # Both have the noise and the bias of their scanner; one of them lacks slices, is cropped or inverted.
            for which in (0, 1) if name in ("noise", "bias field") else (int(rng.integers(2)),):
                sides[which] = ACTS[name](rng, *sides[which])
    if "swapped" in faults:
        sides, points = sides[::-1], points[::-1]
    return sides, points, p.near_wall.numpy(), amplitude, faults


def registered(sides, folder, extra):
    """What the command says of a pair: displacement, grid, report, seconds."""
    paths = []
    for name, (image, grid) in zip(("fixed", "moving"), sides, strict=True):
        paths.append(folder / f"{name}.nii.gz")
        io.write_image(paths[-1], image, grid)
    begun = time.perf_counter()
    command = [
        "register",
        *paths,
        "-o",
        folder / "out",
        "--no-picture",
        "--quiet",
        "--device",
        "cpu",
        "--force",
        *extra,
    ]
    with open(folder / "said.txt", "w", encoding="utf-8") as said, contextlib.redirect_stderr(said):
        status = cli.main([str(part) for part in command])
    seconds = time.perf_counter() - begun
    words = (folder / "said.txt").read_text(encoding="utf-8").strip()
    if status:
        return None, None, {"status": f"refused ({status})"}, seconds, words
    u, grid = convert.read_chain([str(folder / "out" / "displacement.nii.gz")]).displacement()
    return u, grid, json.loads((folder / "out" / "report.json").read_text(encoding="utf-8")), seconds, words


def judged(u, grid, sides, points, near_wall):
    """Mean error in mm before and after, near the wall after, of the landmarks that both images show."""
    voxels = [g.to_index(p) for (_, g), p in zip(sides, points, strict=True)]
    shown = np.all(
        [((v >= 0) & (v <= np.array(i.shape) - 1)).all(1) for v, (i, _) in zip(voxels, sides, strict=True)], 0
    )
    before = np.linalg.norm(points[0] - points[1], axis=1)[shown].mean()
    if u is None:
        return before, before, before
    moved = metrics.move_points(torch.from_numpy(grid.to_index(points[0])), u.float()).numpy()
    error = np.linalg.norm(grid.to_physical(moved) - points[1], axis=1)
    return before, error[shown].mean(), error[shown & near_wall].mean()


def row(seed, number_, folder, extra):
    sides, points, near_wall, amplitude, faults = pair(seed, number_)
    u, grid, report, seconds, words = registered(sides, folder, extra)
    before, after, wall = judged(u, grid, sides, points, near_wall)
    return {
        **common.environment("cpu"),
        "seed": seed,
        "pair": number_,
        "amplitude_mm": f"{amplitude:.1f}",
        "faults": ", ".join(faults),
        "before": f"{before:.3f}",
        "after": f"{after:.3f}",
        "wall": f"{wall:.3f}",
        "folding": "" if u is None else f"{metrics.folding(u):.3g}",
        "status": report.get("status", "ok"),
        "said": words.replace("\n", " | "),
        "seconds": f"{seconds:.2f}",
        "arguments": " ".join(extra),
    }


def unsaid(r):
    """Whether a pair came out worse than it began and nothing says so."""
    return float(r["after"]) > float(r["before"]) + WORSE and r["status"] == "ok"


def sections(results):
    """The newest run."""
    rows = [r for r in common.read_rows(results / "robustness.csv") if not r["arguments"]]
    if not rows:
        return {}
    last = rows[-1]
    rows = common.newest(
        [r for r in rows if all(r[k] == last[k] for k in ("commit", "seed", "device_name"))], ("pair",)
    )
    groups = {"all": rows, "none of the faults": [r for r in rows if not r["faults"]]}
    groups |= {name: [r for r in rows if name in r["faults"].split(", ")] for name in FAULTS}
    for low in (0, 10, 20, 30):
        groups[f"motion of {low} to {low + 10} mm"] = [
            r for r in rows if low <= float(r["amplitude_mm"]) < low + 10
        ]
    lines = []
    for name, these in groups.items():
        if not these:
            continue
        before, after, wall = (np.median([float(r[k]) for r in these]) for k in ("before", "after", "wall"))
        right = sum(float(r["after"]) <= RIGHT for r in these)
        grown = [r for r in these if float(r["after"]) > float(r["before"]) + WORSE]
        counts = [
            len(these),
            right,
            len(grown),
            sum(map(unsaid, grown)),
            sum(r["status"] != "ok" for r in these),
        ]
        worst = max((float(r["folding"]) for r in these if r["folding"]), default=0)
        lines.append(
            [name, *map(str, counts), *(number(v) for v in (before, after, wall)), f"{100 * worst:.2g} %"]
        )
    header = [
        "pairs with", "number", f"found: {RIGHT:g} mm or less", "worse than before", "of these unsaid", "called suspect or refused",
        "median error before, mm", "after", "near the wall", "most folds",
    ]  # fmt: skip
    text = (
        f"{len(rows)} random pairs of the thorax phantom, {'x'.join(map(str, SHAPE))} voxels of 4.4 x 4 x 4 mm: motion of 0 to 40 mm that slides along the "
        "chest wall, noise, a bias field, missing slices, a part of the field of view, an inverted contrast of one image, roles swapped. `fastreg register` "
        f"with its defaults, which knows nothing of the truth. Worse: by more than {WORSE} mm. Seed {last['seed']}, {last['device_name']}, fastreg at "
        f"{last['commit']}, {last['date'][:10]}."
    )
    return {"": f"{text}\n\n{table(header, lines)}"}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.robustness", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200, metavar="N")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first pair")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--no-store", action="store_true", help="leave bench/results alone")
    parser.add_argument("extra", nargs="*", metavar="-- ARGUMENT", help="arguments for fastreg register")
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory(prefix="fastreg-robustness-") as folder:
        for k in range(args.first, args.first + args.pairs):
            r = row(args.seed, k, Path(folder), args.extra)
            rows.append(r)
            about = f"{r['amplitude_mm']} mm {r['faults']}"
            mark = "UNSAID" if unsaid(r) else ""
            print(
                f"{k:4} {about:60} {r['before']} -> {r['after']} wall {r['wall']} {r['status']} {r['seconds']} s {mark}",
                flush=True,
            )
    if not args.no_store:
        common.append_rows(common.RESULTS / "robustness.csv", rows, FIELDS)
    return 1 if any(map(unsaid, rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
