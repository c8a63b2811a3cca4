"""Experiment 5: F3RNet's parameters, and T1 onto T2 by MIND.

    FASTREG_DATA=... python -m bench.experiments.f3rnet [--setting small | full] [--methods "F3RNet mrb" ...]

Two tables: f3rnet_parameters.csv, the seven variants of the paper's table 1 under both readings of what is factorised, beside the
printed numbers (in thousands); and f3rnet.csv, spinalmr_t1t2_sct, Dice of the spinal cord, T2 fixed. One pair of one
person: every net starts anew and is trained on that pair, as it would be applied, for the same time, and training ends when the pair's
loss has stopped improving. All nets have F3RNet's loss, MIND of 2012 and the diffusion with the weight that the paper found best for
them: 2 for "encoder" and "ms", 1.5 for the others. Intensities: 0 and the 99th percentile to 0 and 1.

small: the 48x32x32 voxels around the cord and learning rate 1e-3. full: the whole scan, 55x60x52, and the paper's 1e-5.
"""

import dataclasses
from functools import partial

import numpy as np
import torch

import fastreg
from bench.experiments import baselines, common, panels
from fastreg import metrics, ops
from fastreg.models import F3RNet, VoxelMorph
from fastreg.models.f3rnet import MIND_2012, VARIANTS
from fastreg.training import RECIPES, Sample

# Parameters, thousands (table 1): of the variants, and of VoxelMorph-1 and -2.
PAPER = {"none": 359, "full": 204, "decoder": 335, "encoder": 321, "fr": 348, "ms": 243, "mrb": 288}
VOXELMORPH = {"vm1": 260, "vm2": 300}
MINUTES = {"small": 1.5, "full": 120}
BOX = (slice(4, 52), slice(16, 48), slice(12, 44))
METHODS = {
    **{f"F3RNet {variant}": partial(F3RNet, variant=variant) for variant in VARIANTS},
    **{
        f"VoxelMorph-{preset[-1]}": partial(
            VoxelMorph.from_preset, preset, similarity="mind", mind=MIND_2012, weight=1.5
        )
        for preset in VOXELMORPH
    },
}


def parameters():
    """Rows of the parameter table."""
    rows = []
    for variant in VARIANTS:
        fit, text = (common.parameters(F3RNet(variant=variant, f3d_policy=p)) for p in ("fit", "all"))
        rows.append(
            {
                "net": f"F3RNet {variant}",
                "paper_thousands": PAPER[variant],
                "fit": fit,
                "fit_off": f"{fit / PAPER[variant] / 1000 - 1:+.1%}",
                "all": text,
                "all_off": f"{text / PAPER[variant] / 1000 - 1:+.1%}",
            }
        )
    for preset, printed in VOXELMORPH.items():
        count = common.parameters(VoxelMorph.from_preset(preset))
        off = f"{count / printed / 1000 - 1:+.1%}"
        rows.append(
            {
                "net": f"VoxelMorph-{preset[-1]}",
                "paper_thousands": printed,
                "fit": count,
                "fit_off": off,
                "all": count,
                "all_off": off,
            }
        )
    return rows


class Pair:
    """The scans, the sample a net sees, and the cord in both."""

    def __init__(self, box, device):
        data = common.scans("spinalmr_t1t2_sct")
        self.spacing = tuple(float(s) for s in data["spacing"])
        self.fixed, self.moving = (
            common.tensor(common.unit(data[k], 0, np.percentile(data[k], 99))) for k in ("t2", "t1")
        )
        self.cords = [torch.from_numpy(data[k].astype(np.int64)) for k in ("t2_seg", "t1_seg")]
        self.shape = tuple(self.fixed.shape[2:])
        self.box = box or tuple(slice(0, n) for n in self.shape)
        self.sample = Sample(
            "t1 onto t2", *(i[(..., *self.box)].contiguous().to(device) for i in (self.fixed, self.moving))
        )

    @torch.no_grad()
    def field(self, model):
        """Displacement at the scans' size: of the box, and beyond it what its nearest voxel has."""
        u = model(self.sample.fixed, self.sample.moving).displacement.cpu()
        around = [
            p for b, n in zip(self.box[::-1], self.shape[::-1], strict=True) for p in (b.start, n - b.stop)
        ]
        return torch.nn.functional.pad(u, around, mode="replicate")

    def cord(self, u):
        return ops.warp(self.cords[1][None, None].float(), u, mode="nearest")[0, 0].long()

    def dice(self, u):
        return metrics.dice(self.cords[0], self.cord(u)).mean

    def row(self, name, u, **more):
        return {
            "method": name,
            "dice": f"{self.dice(u):.4f}",
            "assd_mm": f"{metrics.assd(self.cords[0], self.cord(u), self.spacing).mean:.3f}",
            "folding": f"{metrics.folding(u):.3g}",
            "sdlogj": f"{metrics.sdlogj(u):.3f}",
            **more,
        }


def experiment(argv=None):
    args = common.Parser(__doc__, MINUTES, (*METHODS, "fastreg.register", *baselines.BASELINES)).parse_args(
        argv
    )
    small = args.setting == "small"
    table = parameters()
    for r in table:
        print(f"{r['net']}: fit {r['fit']:,} ({r['fit_off']}), all {r['all']:,} ({r['all_off']})")
    pair = Pair(BOX if small else None, args.device)
    rows, fields, trained = [], {}, {}

    def told(name, u, **columns):
        rows.append(pair.row(name, u, **columns))
        fields[name] = u
        print(f"{name}: Dice {rows[-1]['dice']}, folding {rows[-1]['folding']}", flush=True)

    told("identity", torch.zeros(1, 3, *pair.shape))
    for name, build in METHODS.items():
        if name not in args.methods:
            continue
        torch.manual_seed(0)
        model = build().to(args.device)
        recipe = RECIPES["f3rnet"]
        if small:
            recipe = dataclasses.replace(recipe, learning_rate=1e-3)
        print(f"{name}, {common.parameters(model):,} parameters", flush=True)
        pairs = [pair.sample]
        done = common.train(
            model,
            pairs,
            pairs,
            recipe,
            minutes=args.minutes,
            steps=args.steps,
            watch=lambda model: pair.dice(pair.field(model)),
            watched="Dice",
        )
        trained[name] = done
        told(
            name,
            pair.field(model),
            **common.columns(model, recipe, done, pair.sample),
        )
    if "fastreg.register" in args.methods:
        images = (i.to(args.device) for i in (pair.fixed, pair.moving))
        result = fastreg.register(*images, spacing=pair.spacing, similarity="mind")
        told(
            "fastreg.register",
            result.displacement.cpu(),
            seconds_per_pair=f"{result.seconds:.2f}",
            note="no net, MIND-SSC",
        )
    for name in baselines.there(args.methods):
        u, columns = baselines.displacement(name, pair.fixed, pair.moving, pair.spacing, args.threads)
        told(name, u, **columns)
    common.store(args, "f3rnet_parameters", table, key="net")
    common.store(args, "f3rnet", rows)
    draw(args, pair, fields, trained)


def draw(args, pair, fields, trained):
    """A coronal plane: T2, T1 moved, both cords; Dice over training."""
    count = len(fields) + 1
    figure = panels.figure(2.3 * count, 5.6)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    axes = top.subplots(1, count)
    at = int(np.bincount(np.nonzero(pair.cords[0].numpy())[1]).argmax())
    spacing = pair.spacing[0], pair.spacing[2]
    fixed, cord = panels.cut(pair.fixed, 1, at), panels.cut(pair.cords[0], 1, at)
    panels.show(axes[0], fixed, spacing, "T2, fixed\ncord yellow; of T1: red")
    panels.contour(axes[0], cord, "yellow")
    for ax, (name, u) in zip(axes[1:], fields.items(), strict=True):
        moved = panels.cut(ops.warp(pair.moving, u, padding="border"), 1, at)
        title = "T1, moving" if name == "identity" else name
        panels.show(ax, moved, spacing, f"{title}\nDice {pair.dice(u):.3f}")
        panels.contour(ax, cord, "yellow")
        panels.contour(ax, panels.cut(pair.cord(u), 1, at), "red", style="dashed")
    over, counted = bottom.subplots(1, 2)
    panels.curves(over, trained, "Dice of the cord", start=pair.dice(fields["identity"]))
    over.legend(fontsize=7, frameon=False)
    names = list(VARIANTS)
    place = np.arange(len(names))
    for k, (label, values) in enumerate(
        {
            "paper": [1000 * PAPER[n] for n in names],
            '"fit"': [common.parameters(F3RNet(variant=n)) for n in names],
            '"all"': [common.parameters(F3RNet(variant=n, f3d_policy="all")) for n in names],
        }.items()
    ):
        counted.bar(
            place + 0.27 * (k - 1),
            np.array(values) / 1000,
            0.25,
            label=label,
            color=("0.3", "#CC79A7", "#E3B9D1")[k],
        )
    counted.set_xticks(place, names)
    counted.set_ylabel("thousand parameters", fontsize=8)
    counted.legend(fontsize=7, frameon=False, ncols=3)
    counted.set_ylim(0, 430)
    panels.plain(counted)
    common.picture(args, "f3rnet", figure)


def main(argv=None):
    return common.run(experiment, argv)


if __name__ == "__main__":
    raise SystemExit(main())
