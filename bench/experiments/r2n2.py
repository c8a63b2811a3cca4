"""R2N2: coronal 2D lung MR series with simulated breathing of known displacement, against a B-spline registration and VoxelMorph.

    FASTREG_DATA=... python -m bench.experiments.r2n2 [--setting full] [--threads 1] [--state FOLDER]

The claim under test: R2N2 is on par with the B-spline in TRE (paper, its own patients: 0.98 against 0.94 mm). What it says of time
and of the transform's numbers: bench.experiments.r2n2_speed.

Pairs: slices of lungmr_proton, 128 x 96 pixels of 3.9 mm. Each becomes a series, a cycle from inhale (the scan) to exhale, its
diaphragm 8 to 28 mm higher, and back on another way. As in the paper all images of a series are registered to the one nearest the
mean phase, so in both directions, by up to half of that. The motion falls off towards apex, body wall and the foot end of the image,
widens the chest by a fifth, differs between the sides and has an irregular part, which is not the same on the way back. Each image is
warped once, from the scan, and gets noise of its own; the truth between two is the motion of the one after the inverse of the
other's. Three persons train, two are tested; the held-out loss is that of slices of the training persons, which are not trained on.
Images are standardised and clamped to [-2, 2] (all methods). TRE: over every pixel of the lung in the fixed image, mm; sd and worst
over pairs; "slice": the largest of a series' images, mean over series.

B-spline, after the paper: quadratic, control points 3, 8 and 19 pixels apart at a quarter, half and all of the size, MSE and isotropic
TV (0.01, where the image spans [-1, 1]), 250 iterations of AMSGrad at 1e-3 a level.
R2N2 as the paper has it (tanh, no normalisation, three residual blocks a unit) but for what two cores do not train: 12 steps T of
units of a quarter of the width; no noise of training (a regulariser for 180,000 iterations); batches of 2, where the paper has 1. VoxelMorph, whose weight, 0.1, is the first that was tried: 1e-3, batches of 4, a thirtieth of the time. Full: R2N2 as in the paper.

seconds: of a pair, CPU time over threads (GPU: wall clock).
"""

import itertools
import math
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

import fastreg
from bench.experiments import common
from fastreg import models
from fastreg.data import fixed_of_series
from fastreg.models.r2n2 import _inside
from fastreg.ops.bspline_displacement import control_shape
from fastreg.training import RECIPES, Sample

TRAINING, TESTED = ("0004", "0006", "0011"), ("0007", "0012")
LEAST_LUNG = 900  # pixels of a slice's lung
# Every fifth slice of a training person is held out.
FIFTH = 5
NOISE = 0.05
AMPLITUDE = (8.0, 28.0)  # mm
IMAGES = 13  # of a series
HELD_OUT = 24  # pairs
SMALL = {"steps": 12, "widths": (8, 16, 32, 64), "noise": "none"}
# motions: series of a training slice; tests: slices of a tested person; minutes: shares of the time.
SETTINGS = {
    "small": {
        "minutes": 90,
        "motions": 2,
        "tests": 5,
        "r2n2": SMALL,
        "recipes": {
            # The paper's rate. At 3e-4, after four minutes, and at 1e-3 the Gaussians shrink to nothing and have no gradient any more.
            "r2n2": {"batch_size": 2},
            "voxelmorph": {"learning_rate": 1e-3, "batch_size": 4},
        },
        "share": {"voxelmorph": 1 / 30},
    },
    "full": {"minutes": 600, "motions": 40, "tests": 20, "r2n2": {}, "recipes": {}, "share": {}},
}
VOXELMORPH = {"ndim": 2, "similarity": "mse", "weight": 0.1}
STRIDES, ITERATIONS, RATE, WEIGHT = (3, 8, 19), 250, 1e-3, 0.01
PAPER = {"bspline": {"paper_tre": 0.94}, "r2n2": {"paper_tre": 0.98}}
METHODS = {"bspline": "B-spline", "voxelmorph": "VoxelMorph", "r2n2": "R2N2"}


@dataclass
class Pair:
    """Images (1, 1, H, W), standardised; truth (1, 2, H, W), pixels; lung (H, W) bool, of the fixed image; further: how much more
    the moving image is breathed out, in [-1, 1]."""

    series: str
    fixed: torch.Tensor
    moving: torch.Tensor
    truth: torch.Tensor
    lung: torch.Tensor
    further: float


def breathing(lung, rng, spacing):
    """Displacements (2, 2, H, W), pixels, from inhale to exhale: regular and irregular part; rows of the slice run from foot to head.
    lung: (H, W) bool.
    """
    h, w = lung.shape
    rows, columns = np.flatnonzero(lung.any(1)), np.flatnonzero(lung.any(0))
    apex, left, right = rows[-1], columns[0], columns[-1]
    y, x = np.mgrid[:h, :w].astype(float)
    # The diaphragm where the lung has one, its height carried on to either side.
    dome = np.interp(np.arange(w), columns, lung[:, columns].argmax(0))
    dome = np.minimum(dome, np.quantile(dome, 0.8))
    above = np.clip((apex - y) / np.maximum(apex - dome, 1), 0, 1) ** rng.uniform(1.0, 1.6)
    below = np.clip(y / np.maximum(dome, 1), 0, 1)
    along = np.where(y >= dome, above, below * below * (3 - 2 * below))
    outside = np.clip(np.maximum(left - x, x - right) / 10, 0, 1)
    across = 0.5 + 0.5 * np.cos(np.pi * outside)
    middle, half = (left + right) / 2, (right - left) / 2
    side = 1 + rng.uniform(-0.25, 0.25) * (x - middle) / half
    reach = rng.uniform(*AMPLITUDE) / spacing
    u = np.stack([-reach * along * side, 0.2 * reach * along * np.clip((x - middle) / half, -1, 1)]) * across
    stride = 24
    noise = torch.from_numpy(rng.normal(size=(1, 2, *control_shape((h, w), stride))))
    odd = fastreg.bspline_displacement(noise, stride, (h, w)) * torch.from_numpy(across * along)
    return fastreg.smooth(torch.cat([torch.from_numpy(u)[None], 0.08 * reach * odd]), 2.0).float()


def standardised(image):
    """Of each image (n, 1, H, W)."""
    axes = (1, 2, 3)
    return ((image - image.mean(axes, keepdim=True)) / image.std(axes, keepdim=True)).clamp(-2, 2)


def series(name, image, lung, spacing, seed):
    """The pairs of a slice's breathing cycle; seed: ints."""
    rng = np.random.default_rng(seed)
    regular, irregular = breathing(lung, rng, spacing)
    angle = torch.from_numpy(2 * np.pi * (np.arange(IMAGES) + rng.uniform()) / IMAGES).float()
    phase = (1 - angle.cos()) / 2
    motion = phase.view(-1, 1, 1, 1) * regular + angle.sin().view(-1, 1, 1, 1) / 2 * irregular
    scan = standardised(common.tensor(image)).expand(IMAGES, -1, -1, -1).contiguous()
    seen = fastreg.warp(scan, motion, padding="border")
    seen = standardised(seen + NOISE * torch.from_numpy(rng.normal(size=seen.shape)).float())
    k = fixed_of_series(seen, phase)
    of_fixed = motion[k : k + 1]
    # fixed(p) = scan(p + of_fixed(p)), and there the moving image has what it has at the inverse of its motion.
    truth = fastreg.compose(fastreg.invert_displacement(motion), of_fixed.expand_as(motion).contiguous())
    lung = fastreg.warp(common.tensor(lung), of_fixed, mode="nearest")[0, 0] > 0
    return [
        Pair(name, seen[k : k + 1], seen[t : t + 1], truth[t : t + 1], lung, float(phase[t] - phase[k]))
        for t in range(IMAGES)
        if t != k
    ]


def pairs(data, setting, tests):
    """(training, held out, tests): lists of Pair. tests: slices a person."""
    spacing = float(data["spacing"][1])
    training, held_out, tested = [], [], []
    for person in (*TRAINING, *TESTED):
        image, lung = np.asarray(data[f"img_{person}"], dtype=np.float32), data[f"lung_{person}"] > 0
        slices = np.flatnonzero(lung.sum((1, 2)) >= LEAST_LUNG)
        if person in TESTED:
            slices = slices[np.linspace(0, len(slices) - 1, tests + 2)[1:-1].round().astype(int)]
        for k, s in enumerate(slices):
            kept = k % FIFTH == FIFTH // 2
            part = tested if person in TESTED else held_out if kept else training
            for motion in range(setting["motions"] if part is training else 1):
                seed = (int(person in TRAINING), int(person), int(s), motion)
                part += series(f"{person} slice {s}", image[s], lung[s], spacing, seed)
    held_out = [held_out[k] for k in np.linspace(0, len(held_out) - 1, HELD_OUT).round().astype(int)]
    return training, held_out, tested


def bspline(fixed, moving):
    """The B-spline registration that the paper compares with. Returns the displacement and how many numbers describe it."""
    shape, total, count = fixed.shape[2:], None, 0
    for k, stride in enumerate(STRIDES):
        size = [-(-n // 2 ** (len(STRIDES) - 1 - k)) for n in shape]
        f, m = (
            t if list(t.shape[2:]) == size else F.interpolate(t, size=size, mode="area")
            for t in (fixed, moving)
        )
        # Parameters and TV where the image spans [-1, 1], as AirLab has them.
        half = f.new_tensor([(n - 1) / 2 for n in size]).view(1, 2, 1, 1)
        base = 0 if total is None else fastreg.resize_displacement(total, size)
        c = f.new_zeros((1, 2, *control_shape(size, stride, 2)), requires_grad=True)
        adam = torch.optim.Adam([c], lr=RATE, amsgrad=True)
        for _ in range(ITERATIONS):
            u = base + half * fastreg.bspline_displacement(c, stride, size, order=2)
            moved = fastreg.warp(m, u)
            loss = fastreg.mse_loss(f, moved, mask=_inside(u)) + WEIGHT * fastreg.total_variation(
                u / half, isotropic=True
            )
            adam.zero_grad()
            loss.backward()
            adam.step()
        with torch.no_grad():
            total = base + half * fastreg.bspline_displacement(c, stride, size, order=2)
        count += c.numel()
    return total, count


def scores(tests, predict, spacing, device):
    """Per pair: TRE, its maximum, of which series and direction, image MSE, folding, seconds; and the displacements."""
    rows, fields = [], []
    for p in tests:
        f, m = p.fixed.to(device), p.moving.to(device)
        begin = common.clock(device)
        u = predict(f, m)
        seconds = common.clock(device) - begin
        u = u.detach().cpu()
        error = spacing * (u - p.truth)[0].norm(dim=0)[p.lung]
        rows.append(
            {
                "tre": float(error.mean()),
                "series": p.series,
                "further": p.further,
                "tre_max": float(error.max()),
                "image_mse": float((fastreg.warp(p.moving, u) - p.fixed).square().mean()),
                "folding": float((fastreg.jacobian_determinant(u) <= 0).float().mean()),
                "seconds": seconds,
            }
        )
        fields.append(u)
    return rows, fields


def summary(rows):
    """tre_slice: the paper's small number, the largest TRE of a series' images, mean over series."""
    tre = np.array([r["tre"] for r in rows])
    names, further = np.array([r["series"] for r in rows]), np.array([r["further"] for r in rows])
    return {
        "pairs": len(rows),
        "tre_mean": tre.mean(),
        "tre_sd": tre.std(),
        "tre_worst": tre.max(),
        "tre_max": max(r["tre_max"] for r in rows),
        "tre_slice": np.mean([tre[names == name].max() for name in dict.fromkeys(names)]),
        "tre_to_inhale": tre[further < 0].mean(),
        "tre_to_exhale": tre[further > 0].mean(),
        "image_mse": np.mean([r["image_mse"] for r in rows]),
        "folding": np.mean([r["folding"] for r in rows]),
        "seconds": float(np.median([r["seconds"] for r in rows])),
    }


def build(method, setting, seed):
    torch.manual_seed(seed)
    if method == "voxelmorph":
        return models.VoxelMorph(**VOXELMORPH)
    return models.R2N2(**setting["r2n2"])


def draw(tests, fields, steps_of, spacing):
    """A pair of each person, of the most motion in one direction and in the other: what each method leaves of the difference and of
    the motion; R2N2's motion as it grows. steps_of: pair -> its displacements after each step, or None.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    persons = sorted({p.series.split()[0] for p in tests})
    chosen = []
    for person, direction in zip(persons, itertools.cycle((-1, 1)), strict=False):
        of_person = [k for k, p in enumerate(tests) if p.series.startswith(person)]
        chosen.append(
            max(of_person, key=lambda k: direction * float(tests[k].truth[0, 0][tests[k].lung].mean()))
        )
    columns = 1 + len(fields)
    blocks = 2 * len(chosen) + (steps_of is not None)
    figure, axes = plt.subplots(
        blocks, columns, figsize=(2.0 * columns + 1.2, 2.75 * blocks), layout="constrained"
    )
    options = {"origin": "lower", "aspect": "equal"}
    for r, k in enumerate(chosen):
        p, above, below = tests[k], axes[2 * r], axes[2 * r + 1]
        above[0].imshow(p.fixed[0, 0], cmap="gray", vmin=-1.5, vmax=2, **options)
        above[0].set_title(f"fixed, {p.series}", fontsize=9)
        length = spacing * p.truth[0].norm(dim=0)
        most = float(length.max())
        below[0].imshow(length, cmap="inferno", vmin=0, vmax=most, **options)
        below[0].set_title(f"true motion, to {most:.0f} mm", fontsize=9)
        for c, (label, us) in enumerate(fields.items(), 1):
            error = spacing * (us[k] - p.truth)[0].norm(dim=0)
            difference = fastreg.warp(p.moving, us[k]) - p.fixed
            seen = above[c].imshow(difference[0, 0], cmap="RdBu_r", vmin=-2, vmax=2, **options)
            above[c].set_title("moving − fixed" if c == 1 else f"{label}: difference", fontsize=9)
            shown = below[c].imshow(error, cmap="inferno", vmin=0, vmax=most, **options)
            below[c].contour(p.lung, [0.5], colors="w", linewidths=0.6)
            below[c].set_title(f"error, lung {float(error[p.lung].mean()):.2f} mm", fontsize=9)
        figure.colorbar(seen, ax=above.tolist(), fraction=0.02, pad=0.01).set_label(
            "standard deviations of the image", fontsize=8
        )
        figure.colorbar(shown, ax=below.tolist(), fraction=0.02, pad=0.01).set_label("mm", fontsize=8)
    if steps_of is not None:
        p, row = tests[chosen[-1]], axes[-1]
        steps = steps_of(p)
        most = spacing * float(p.truth[0, 0].abs().max())
        at = sorted({round(t) for t in np.geomspace(1, len(steps), columns - 1)})
        grown = [("truth", p.truth), *((f"R2N2 after {t} of {len(steps)}", steps[t - 1]) for t in at)]
        for a, (label, u) in zip(row, grown, strict=False):
            shown = a.imshow(spacing * u[0, 0], cmap="PuOr", vmin=-most, vmax=most, **options)
            a.set_title(label, fontsize=9)
        figure.colorbar(shown, ax=row.tolist(), fraction=0.02, pad=0.01).set_label(
            "towards the head, mm", fontsize=8
        )
    for a in axes.flat:
        a.set_xticks([])
        a.set_yticks([])
        if not a.has_data():
            a.axis("off")
    return figure


def experiment(argv):
    p = common.Parser(__doc__, {name: s["minutes"] for name, s in SETTINGS.items()}, METHODS, long=True)
    p.add_argument("--tests", type=int, help="slices a person to test on")
    args = p.parse_args(argv)
    setting, data = SETTINGS[args.setting], common.scans("lungmr_proton")
    spacing = float(data["spacing"][1])
    training, held_out, tests = pairs(data, setting, args.tests or setting["tests"])
    print(f"{len(training)} pairs to train on, {len(held_out)} held out, {len(tests)} to test on")
    training, held_out = (
        [Sample(p.series, p.fixed, p.moving) for p in some] for some in (training, held_out)
    )

    found, fields = scores(tests, lambda f, m: torch.zeros_like(f).repeat(1, 2, 1, 1), spacing, args.device)
    rows = [{"method": "identity", "label": "identity", **summary(found), "seconds": "", "numbers": 0}]
    fields, steps_of = {"identity": fields}, None
    for method in args.methods:
        label, about = METHODS[method], {}
        if method == "bspline":
            counts = []

            def predict(f, m, counts=counts):
                u, count = bspline(f, m)
                counts.append(count)
                return u

            found, fields[label] = scores(tests, predict, spacing, args.device)
            about["numbers"] = counts[0]
        else:
            model = build(method, setting, args.seed).to(args.device)
            recipe = replace(RECIPES[method], **setting["recipes"].get(method, {}))
            # A net that has not found the motion yet gets the whole time.
            done = common.train(
                model,
                training,
                held_out,
                recipe,
                minutes=args.minutes * setting["share"].get(method, 1),
                steps=args.steps,
                looks=45,
                seed=args.seed,
                patience=math.inf,
                state=common.state_of(args, "r2n2", method),
            )
            predict = torch.no_grad()(lambda f, m, model=model: model(f, m).displacement)
            predict(tests[0].fixed.to(args.device), tests[0].moving.to(args.device))
            found, fields[label] = scores(tests, predict, spacing, args.device)
            if method == "r2n2":

                @torch.no_grad()
                def steps_of(p, model=model):
                    fields = model(p.fixed.to(args.device), p.moving.to(args.device)).fields
                    return [u.cpu() for u in fields]

            about = {
                "numbers": 7 * model.steps if method == "r2n2" else tests[0].truth.numel(),
                "parameters": common.parameters(model),
                "learning_rate": recipe.learning_rate,
                "batch": recipe.batch_size,
                "seed": done.seed,
                "steps": done.steps,
                "train_seconds": done.seconds,
                "best_step": done.best_step,
                "loss": done.best,
                "ended": done.ended,
            }
        rows.append({"method": method, "label": label, **summary(found), **about, **PAPER.get(method, {})})
        print(f"{label}: TRE {rows[-1]['tre_mean']:.2f} mm", flush=True)
    common.store(args, "r2n2", rows)
    for row in rows:
        print(
            f"{row['label']:12} TRE {row['tre_mean']:.2f} +- {row['tre_sd']:.2f} mm (worst pair {row['tre_worst']:.2f}, "
            f"slice {row['tre_slice']:.2f}, inhale {row['tre_to_inhale']:.2f}, exhale {row['tre_to_exhale']:.2f}), "
            f"{row['seconds'] or 0:.3f} s, {row['numbers']} numbers, folding {100 * row['folding']:.2f} %"
        )
    common.picture(args, "r2n2", draw(tests, fields, steps_of, spacing), dpi=80)


def main(argv=None):
    return common.run(experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
