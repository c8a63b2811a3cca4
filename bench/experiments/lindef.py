"""Experiment 4: what LinDef's affine part is good for, and its deformable one.

    FASTREG_DATA=... python -m bench.experiments.lindef [--setting small | whole | full] [--methods LinDef ...]

lungmr_proton, five people: 0004, 0006 and 0011 train, 0007 and 0012 are the test. A pair is two people; the moving image is
also turned by up to 15 degrees about each axis and shifted by up to 30 mm along each, at random. The held-out pairs are three of the
training people with offsets of their own; the test: both people onto each other, 8 offsets each, the same for all methods. Dice of the
lungs (both as one) at whole size; image and lungs are resampled once, by offset and displacement together. Intensities: 0 and the 99th
percentile to 0 and 1. LinDef as it is, with the deformable part alone and with the affine part alone (mean squared difference,
"two_pass"); VoxelMorph-2 with its own loss, the LCC. The held-out squared error is of all alike.

small: 20x43x32 voxels of 12 mm, an eighth of LinDef's widths. whole: 60x128x96 voxels, the scans' own, an eighth of the widths, one
pair a step (what two cores can do in an hour). full: whole size, the paper's widths and batch.
"""

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F

from bench.experiments import common, panels
from fastreg import metrics, ops
from fastreg.models import LinDef, VoxelMorph
from fastreg.training import RECIPES, Sample

TRAIN, TEST = ("0004", "0006", "0011"), ("0007", "0012")
DEGREES, MILLIMETRES, OFFSETS = 15.0, 30.0, 8
VIRTUAL = 100_000  # length of the endless sequence of training pairs
NARROW = {"encoder": (8, 8, 16, 8, 8), "decoder": (16, 8, 8, 8, 8)}
# name: model, options, those of the small setting, Dice in the paper (all pairs; before: 57.2 %), learning rate if small
METHODS = {
    "LinDef": (LinDef, {}, NARROW, "0.823"),
    "LinDef without affine": (LinDef, {"affine": False}, NARROW, "0.818"),
    "LinDef, affine alone": (LinDef, {"deformable": False}, NARROW, ""),
    "VoxelMorph-2": (VoxelMorph, {}, {}, ""),
}
BEFORE = "0.572"
MINUTES = {"small": 4, "whole": 60, "full": 960}
SIZES = {"small": (20, 43, 32), "whole": (60, 128, 96), "full": (60, 128, 96)}


def rigid(draw, shape, spacing):
    """A random turn and shift about the centre, (1, 3, 4) in voxels of `shape`."""
    angles = (2 * torch.rand(3, generator=draw) - 1) * math.radians(DEGREES)
    shift = (2 * torch.rand(3, generator=draw) - 1) * MILLIMETRES
    turn = torch.eye(3)
    for axis, angle in enumerate(angles.tolist()):
        a, b = (k for k in range(3) if k != axis)
        step = torch.eye(3)
        step[a, a] = step[b, b] = math.cos(angle)
        step[a, b], step[b, a] = -math.sin(angle), math.sin(angle)
        turn = turn @ step
    spacing = torch.tensor(spacing, dtype=torch.float32)
    linear = turn * spacing / spacing[:, None]
    centre = torch.tensor([(n - 1) / 2 for n in shape])
    return torch.cat([linear, (centre + shift / spacing - linear @ centre)[:, None]], 1)[None]


class Scans:
    """People's images and lungs at whole size."""

    def __init__(self):
        data = common.scans("lungmr_proton")
        self.spacing = tuple(float(s) for s in data["spacing"])
        self.images, self.lungs = {}, {}
        for name in (*TRAIN, *TEST):
            image = data[f"img_{name}"].astype(np.float32)
            self.images[name] = common.tensor(common.unit(image, 0, np.percentile(image, 99)))
            self.lungs[name] = torch.from_numpy((data[f"lung_{name}"] > 0).astype(np.int64))
        self.shape = tuple(image.shape)

    def offset(self, draw):
        return rigid(draw, self.shape, self.spacing)

    def sample(self, fixed, moving, offset, size):
        """What a net sees."""
        moved = ops.warp(self.images[moving], None, affine=offset, padding="zeros")
        images = (F.adaptive_avg_pool3d(i, size) for i in (self.images[fixed], moved))
        return Sample(f"{fixed}-{moving}", *images)

    def moved(self, name, offset, u, labels=False):
        """Image (or lungs) of `name`, moved by the displacement after the offset."""
        turned = (offset[:, :, :3] @ u.flatten(2)).view_as(u)
        whole = ops.affine_displacement(offset, self.shape) + turned
        if labels:
            lungs = self.lungs[name][None, None].float()
            return ops.warp(lungs, whole, mode="nearest", padding="zeros")[0, 0].long()
        return ops.warp(self.images[name], whole, padding="zeros")

    @torch.no_grad()
    def seen(self, model, sample):
        """Displacement of what a net sees."""
        device = next(model.parameters()).device
        return model(sample.fixed.to(device), sample.moving.to(device)).displacement.cpu()

    def field(self, model, sample):
        """Displacement at whole size."""
        return ops.resize_displacement(self.seen(model, sample), self.shape, align_corners=False)


class People:
    """Training pairs: pair k is drawn from k alone."""

    def __init__(self, scans, size):
        self.scans, self.size = scans, size

    def __len__(self):
        return VIRTUAL

    def __getitem__(self, k):
        draw = torch.Generator().manual_seed(k)
        i, j = torch.randperm(len(TRAIN), generator=draw)[:2].tolist()
        return self.scans.sample(TRAIN[i], TRAIN[j], self.scans.offset(draw), self.size)


def cases(people, offsets, scans, seed):
    """(fixed, moving, offset) of all ordered pairs."""
    draw = torch.Generator().manual_seed(seed)
    pairs = [(a, b) for a in people for b in people if a != b]
    return [(*pair, scans.offset(draw)) for _ in range(offsets) for pair in pairs]


def score(scans, cases, displacement):
    """Dice of the lungs and share of folded voxels of each case; displacement(fixed, moving, offset)."""
    dice, folding = [], []
    for fixed, moving, offset in cases:
        u = displacement(fixed, moving, offset)
        dice.append(metrics.dice(scans.lungs[fixed], scans.moved(moving, offset, u, labels=True)).mean)
        folding.append(metrics.folding(u))
    return np.array(dice), float(np.mean(folding))


def squares(held_out, displacement):
    """Mean squared difference over samples; displacement(sample)."""
    moved = (ops.warp(s.moving, displacement(s), padding="border") for s in held_out)
    return float(np.mean([float(ops.mse_loss(s.fixed, m)) for s, m in zip(held_out, moved, strict=True)]))


def row(name, dice, folding, paper="", **more):
    return {
        "method": name,
        "dice": f"{dice.mean():.4f}",
        "dice_sd": f"{dice.std():.4f}",
        "dice_least": f"{dice.min():.4f}",
        "paper_dice": paper,
        "folding": f"{folding:.3g}",
        **more,
    }


def quick(recipe, batch_size):
    """Without what waits for hundreds of epochs."""
    return dataclasses.replace(recipe, batch_size=batch_size, plateau=None, patience=None)


def experiment(argv=None):
    parser = common.Parser(__doc__, MINUTES, METHODS, long=True)
    parser.add_argument("--offsets", type=int, default=OFFSETS, help="of each test pair")
    parser.add_argument("--size", type=int, nargs=3, help="what the scans are resampled to")
    args = parser.parse_args(argv)
    narrowed = args.setting != "full"
    size, scans = args.size or SIZES[args.setting], Scans()
    test = cases(TEST, args.offsets, scans, seed=1)
    held_out = [scans.sample(*case, size) for case in cases(TRAIN, 1, scans, seed=2)[::2]]
    people = People(scans, size)
    rows, scores, fields, trained = [], {}, {}, {}

    def told(method, displacement, *more, **columns):
        dice, folding = score(scans, test, displacement)
        rows.append(row(method, dice, folding, *more, **columns))
        print(f"{method}: Dice {dice.mean():.4f}, folding {folding:.2g}", flush=True)
        scores[method], fields[method] = dice, displacement(*test[0])
        # At once: the next one may take an hour.
        common.store(args, "lindef", rows)

    still = torch.zeros(1, 3, *scans.shape)
    before = squares(held_out, lambda s: torch.zeros(1, 3, *s.fixed.shape[2:]))
    told("identity", lambda *case: still, BEFORE, held_out_mse=f"{before:.5f}")
    for method, (build, options, narrow, paper) in METHODS.items():
        if method not in args.methods:
            continue
        torch.manual_seed(args.seed)
        model = build(**options, **(narrow if narrowed else {})).to(args.device)
        recipe = RECIPES["lindef"]
        if narrowed:
            recipe = quick(recipe, batch_size=recipe.batch_size if args.setting == "small" else 1)
        print(f"{method}, {common.parameters(model):,} parameters", flush=True)

        def found(*case, model=model):
            return scans.field(model, scans.sample(*case, size))

        done = common.train(
            model,
            people,
            held_out,
            recipe,
            minutes=args.minutes,
            steps=args.steps,
            looks=12 if args.setting == "small" else 25,
            seed=args.seed,
            patience=12,
            watch=lambda _, found=found: score(scans, test[:4], found)[0].mean(),
            watched="Dice",
            state=common.state_of(args, "lindef", method),
        )
        trained[method] = done
        after = squares(held_out, lambda s, model=model: scans.seen(model, s))
        told(
            method,
            found,
            paper,
            held_out_mse=f"{after:.5f}",
            **common.columns(model, recipe, done, held_out[0]),
            note="an eighth of the widths" if narrowed and narrow else "",
        )
    draw(args, scans, test, fields, scores, trained)


def draw(args, scans, test, fields, scores, trained):
    """A coronal plane with the lungs of both, differences, Dice of each case and over training."""
    fixed_name, moving_name, offset = test[0]
    count = len(fields) + 1
    figure = panels.figure(2.5 * count, 8.6)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2, 1])
    axes = top.subplots(2, count)
    lungs = scans.lungs[fixed_name]

    # Rows run from the feet up.
    def plane(volume):
        return panels.cut(volume, 0, at)[::-1]

    at = int(np.bincount(np.nonzero(lungs.numpy())[0]).argmax())
    spacing = scans.spacing[1:]
    fixed = plane(scans.images[fixed_name])
    panels.show(axes[0, 0], fixed, spacing, f"{fixed_name}, fixed\nlungs yellow; moved: red")
    panels.contour(axes[0, 0], plane(lungs), "yellow")
    axes[1, 0].axis("off")
    for k, (method, u) in enumerate(fields.items(), 1):
        moved = plane(scans.moved(moving_name, offset, u))
        title = f"{moving_name}, moving" if method == "identity" else method
        panels.show(axes[0, k], moved, spacing, f"{title}\nDice {scores[method][0]:.3f}")
        panels.contour(axes[0, k], plane(lungs), "yellow")
        after = plane(scans.moved(moving_name, offset, u, labels=True))
        panels.contour(axes[0, k], after, "red")
        panels.difference(axes[1, k], fixed, moved, spacing, "moved − fixed")
    spread, over = bottom.subplots(1, 2)
    panels.spread(spread, scores, "Dice of the lungs, 16 test cases")
    panels.curves(over, trained, "Dice, the first 4 cases", start=scores["identity"][:4].mean())
    over.legend(fontsize=7, frameon=False)
    common.picture(args, "lindef", figure)


def main(argv=None):
    return common.run(experiment, argv)


if __name__ == "__main__":
    raise SystemExit(main())
