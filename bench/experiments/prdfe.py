"""PRDFE, table I: textured figures with known motion; VoxelMorph, PDFE, IPRDFE and PRDFE after equal steps.

    python -m bench.experiments.prdfe [--setting full]

The claim under test: the field MSE of IPRDFE and PRDFE is far below that of VoxelMorph and PDFE (paper: 6.0 and 3.1 against 132.2
and 138.4). As in the paper one training set holds motions of all sizes, and the test pairs are grouped by size; loss weights are the
paper's, one per method (it chose them by image MSE). Each method sees the same pairs in the same order with the same learning
rate; no run ends before its steps; the weights of the best held-out loss count. PDFE twice: a resized field not multiplied by the
ratio of sizes (what the paper criticises in its predecessors), and multiplied. As weights differ between the methods, VoxelMorph has a
row with PRDFE's too (first seed only).

Small: widths of 8 to 32 where the paper has 144 to 160, 1200 steps on 600 pairs, learning rate 1e-3 where the paper has 1e-4, as few steps have to do:
nothing is trained to its end, and all are cut off at the same point.
Full: the paper's widths, learning rate and 2000 + 500 pairs.

Field MSE: mean over voxels and both components, voxels^2, over the whole image; once more over the figures alone, where there is
something to see. sd: over test pairs (of all seeds); seeds_sd: over the seeds' means.
"""

import math
import sys
from dataclasses import replace

import numpy as np
import torch

import fastreg
from bench.experiments import common
from fastreg import models
from fastreg.data.figures import DEFORMATIONS, figures
from fastreg.models.prdfe import SIMULATION
from fastreg.training import RECIPES, Sample

SEEDS = (0, 1, 2)
LOOKS = 8
# pairs for training, held out, for testing (multiples of 3), steps, learning rate
SETTINGS = {
    "small": {"pairs": 600, "held_out": 12, "tests": 90, "steps": 1200, "learning_rate": 1e-3, "minutes": 15},
    "full": {
        "pairs": 2000,
        "held_out": 48,
        "tests": 500,
        "steps": 20_000,
        "learning_rate": 1e-4,
        "minutes": 180,
    },
}
WIDTHS = {
    "small": {"encoder": (16, 16, 32, 32), "decoder": (32, 32, 32, 16, 16, 8, 8)},
    "full": {k: SIMULATION[k] for k in ("encoder", "decoder")},
}
# label, class, arguments; image and field MSE of the paper's table I
METHODS = {
    "voxelmorph": ("VoxelMorph", "VoxelMorph", {"similarity": "mse", "weight": 0.001}, (0.0051, 132.2309)),
    "voxelmorph_smooth": (
        "VoxelMorph, PRDFE's weight",
        "VoxelMorph",
        {"similarity": "mse", "weight": 0.05},
        None,
    ),
    "pdfe": ("PDFE", "PRDFE", {"variant": "pdfe", "weight": 0.001}, (0.0030, 138.4297)),
    "pdfe_scaled": (
        "PDFE, scaled",
        "PRDFE",
        {"variant": "pdfe", "scale_magnitude": True, "weight": 0.001},
        None,
    ),
    "iprdfe": ("IPRDFE", "PRDFE", {"variant": "iprdfe", "weight": 0.01}, (0.0011, 6.0331)),
    "prdfe": ("PRDFE", "PRDFE", {"variant": "prdfe", "weight": 0.05}, (0.0006, 3.1005)),
}
CONTROL = "voxelmorph_smooth"


def build(method, setting, seed):
    torch.manual_seed(seed)
    _, kind, arguments, _ = METHODS[method]
    model = getattr(models, kind)(ndim=2, **WIDTHS[setting], **arguments)
    # A quarter less time on a CPU.
    return model.to(memory_format=torch.channels_last)


def made(part, count):
    """Pairs of small, medium and large motion in turn; part: a number that no other part of the data has."""
    names = list(DEFORMATIONS)
    return [(names[k % 3], figures((part, k), deformation=names[k % 3])) for k in range(count)]


def samples(pairs):
    return [Sample(f"{name} {k}", p.fixed, p.moving) for k, (name, p) in enumerate(pairs)]


@torch.no_grad()
def scores(pairs, predict):
    """Of each pair: its size of motion, image MSE, field MSE, that over the figures, share of folded voxels."""
    rows = []
    for name, p in pairs:
        u = predict(p.fixed, p.moving)
        error = (u - p.displacement).square().mean(1, keepdim=True)
        rows.append(
            {
                "deformation": name,
                "image_mse": float((fastreg.warp(p.moving, u) - p.fixed).square().mean()),
                "field_mse": float(error.mean()),
                "figures_mse": float(error[p.fixed_labels > 0].mean()),
                "folding": float((fastreg.jacobian_determinant(u) <= 0).float().mean()),
            }
        )
    return rows


def summary(runs):
    """Rows by size of motion, and of all, from the scores of each seed."""
    out = []
    for name in (*DEFORMATIONS, "all"):
        seeds = [[r for r in run if name in (r["deformation"], "all")] for run in runs]
        row = {"deformation": name, "seeds": len(seeds), "tests": len(seeds[0])}
        for key in ("image_mse", "field_mse", "figures_mse"):
            values = np.array([[r[key] for r in run] for run in seeds])
            found = {"mean": values.mean(), "sd": values.std(), "seeds_sd": values.mean(1).std()}
            row |= {f"{key}_{name}": round(float(value), 7) for name, value in found.items()}
        row["folding"] = np.mean([r["folding"] for run in seeds for r in run])
        out.append(row)
    return out


def draw(tests, fields):
    """Per size of motion one pair: what each method makes of it, and the length of its error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [next(k for k, (n, _) in enumerate(tests) if n == name) for name in DEFORMATIONS]
    columns = 1 + len(fields)
    figure, axes = plt.subplots(
        2 * len(chosen), columns, figsize=(1.75 * columns + 1.2, 3.8 * len(chosen)), layout="constrained"
    )
    for r, k in enumerate(chosen):
        name, p = tests[k]
        above, below = axes[2 * r], axes[2 * r + 1]
        above[0].imshow(p.fixed[0, 0], cmap="gray", vmin=0, vmax=1)
        above[0].set_title(f"fixed, {name} motion", fontsize=9)
        y, x = np.mgrid[:128, :128] + p.displacement[0].numpy()
        below[0].imshow(np.ones((128, 128)), cmap="gray", vmin=0, vmax=1)
        for lines in (y, x):
            below[0].contour(lines, np.arange(0, 128, 8), colors="k", linewidths=0.6)
        below[0].set_title("true motion", fontsize=9)
        limit = 1.5 * DEFORMATIONS[name]
        for c, (label, of_pairs) in enumerate(fields.items(), 1):
            u = of_pairs[k]
            above[c].imshow(fastreg.warp(p.moving, u)[0, 0], cmap="gray", vmin=0, vmax=1)
            above[c].set_title("moving" if c == 1 else label, fontsize=9)
            error = (u - p.displacement)[0].norm(dim=0)
            shown = below[c].imshow(error, cmap="inferno", vmin=0, vmax=limit)
            below[c].set_title(f"error, rms {error.square().mean().sqrt():.1f}", fontsize=9)
        bar = figure.colorbar(shown, ax=below.tolist(), fraction=0.02, pad=0.01)
        bar.set_label("voxels", fontsize=9)
    for a in axes.flat:
        a.set_xticks([])
        a.set_yticks([])
    return figure


def experiment(argv):
    p = common.Parser(__doc__, {name: s["minutes"] for name, s in SETTINGS.items()}, METHODS)
    p.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    p.add_argument("--pairs", type=int, help="to train on")
    p.add_argument("--tests", type=int, help="pairs to test on")
    args = p.parse_args(argv)
    setting = SETTINGS[args.setting]
    steps = args.steps or setting["steps"]
    minutes = args.minutes / len(args.seeds)
    recipe = replace(RECIPES["prdfe"], learning_rate=setting["learning_rate"], steps=steps)

    training = samples(made(1, args.pairs or setting["pairs"]))
    held_out = samples(made(2, setting["held_out"]))
    tests = made(3, args.tests or setting["tests"])
    print(f"{len(training)} pairs to train on, {len(held_out)} held out, {len(tests)} to test on")

    still = [torch.zeros_like(p.displacement) for _, p in tests]
    of_still = iter(still)
    rows = [
        {"method": "identity", "label": "identity", **row}
        for row in summary([scores(tests, lambda f, m: next(of_still))])
    ]
    fields = {"identity": still}
    for method in args.methods:
        label, _, _, paper = METHODS[method]
        runs, trained = [], []
        for seed in args.seeds[: 1 if method == CONTROL else None]:
            model = build(method, args.setting, seed).to(args.device)
            done = common.train(
                model,
                training,
                held_out,
                recipe,
                minutes=minutes,
                steps=steps,
                looks=10,
                seed=seed,
                patience=math.inf,
            )
            trained.append(done)
            us = []

            def predict(f, m, model=model, us=us):
                us.append(model(f.to(args.device), m.to(args.device)).displacement.cpu())
                return us[-1]

            runs.append(scores(tests, predict))
            if seed == args.seeds[0]:
                fields[label] = us
            means = {k: np.mean([r[k] for r in runs[-1]]) for k in ("image_mse", "field_mse")}
            print(
                f"{label}, seed {seed}: {done.steps} steps, {done.seconds:.0f} s ({done.ended}); "
                f"image MSE {means['image_mse']:.4f}, field MSE {means['field_mse']:.2f}",
                flush=True,
            )
        about = {
            "weight": model.weight,
            "parameters": common.parameters(model),
            "steps": min(d.steps for d in trained),
            "best_step": np.mean([d.best_step for d in trained]),
            "train_seconds": np.mean([d.seconds for d in trained]),
        }
        for row in summary(runs):
            row |= about
            if paper and row["deformation"] == "all":
                row |= {"paper_image_mse": paper[0], "paper_field_mse": paper[1]}
            rows.append({"method": method, "label": label, **row})
    common.store(args, "prdfe", rows)
    for row in rows:
        print(
            f"{row['label']:28} {row['deformation']:7} image {row['image_mse_mean']:.4f} +- {row['image_mse_sd']:.4f}  "
            f"field {row['field_mse_mean']:7.2f} +- {row['field_mse_sd']:.2f}  figures {row['figures_mse_mean']:7.2f}  "
            f"folding {100 * row['folding']:.2f} %"
        )
    common.picture(args, "prdfe", draw(tests, fields), colours=256)


def main(argv=None):
    return common.run(experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
