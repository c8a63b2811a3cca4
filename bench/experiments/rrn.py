"""Experiment 2: RRN trained on one pair of lung CTs, as its authors trained on the cases they test.

    FASTREG_DATA=... python -m bench.experiments.rrn [--setting small | thorax-10 | thorax-20 | thorax-40 | full] [--methods RRN ...]

lungct_dirlab4dct_case1, end-exhale (fixed) and end-inhale, clipped to 80 ... 900 and scaled to [0, 1], resampled; every net starts
anew and has the same time for the same pair and the same loss, LCC and 0.01 times the total variation: RRN with and without its
cost volume, VoxelMorph-2. TRE: of the 300 landmarks, at the scan's own size, and of their sub-voxel version. There is no held-out
pair: training ends when the loss of the pair itself has stopped improving. The paper's figures are of other scans (DIR-Lab COPDGene, 23.5 mm before).

small: 48x48x64 voxels, RRN with half of the paper's channels and at the identity at first (the authors' initial weights begin far from
it), learning rate 1e-3. full: 256x256x256, the paper's widths and learning rate, 1e-4. thorax-MM: as small, of the thorax phantom, whose
lungs slide along a wall by up to MM; its landmarks are exact, and TRE is that of all of them and of those within 10 mm of the wall.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

import fastreg
from bench.experiments import baselines, common, panels
from fastreg import metrics, ops
from fastreg.data import phantom
from fastreg.models import RRN, VoxelMorph
from fastreg.training import RECIPES, Sample

THORAX = {f"thorax-{mm}": float(mm) for mm in (10, 20, 40)}
MINUTES = {"small": 60, **dict.fromkeys(THORAX, 60), "full": 600}
SMALL = (48, 48, 64)
SIZES = {"full": (256, 256, 256)}
HALF = {
    "pyramid": (8, 16, 32, 48),
    "dense": (64, 64, 48, 32, 16),
    "refine": (64, 64, 64, 48, 32, 16),
    "deviation": 1e-5,
}
# name: model, options, those of the small setting, mm in the paper
METHODS = {
    "RRN": (RRN, {}, HALF, 0.83),
    "RRN without cost volume": (RRN, {"cost_volume": False}, HALF, 1.10),
    "VoxelMorph-2": (VoxelMorph, {"window": 5, "regularizer": "tv", "weight": 0.01}, {}, 7.95),
}
BEFORE = 23.46


def resampled(image, size):
    return F.interpolate(image, size=size, mode="trilinear", align_corners=True)


class Pair:
    """The scans at their own size and the sample a net sees."""

    def __init__(self, setting, size, device):
        if setting in THORAX:
            p = phantom.thorax(amplitude=THORAX[setting])
            # CT numbers of what the scans' own values, 80 to 900, are
            images = [common.tensor(common.unit(i[0, 0].numpy(), -944, -124)) for i in (p.fixed, p.moving)]
            self.spacing, self.paper = p.spacing, False
            self.points, self.near = [p.fixed_landmarks, p.moving_landmarks], p.near_wall.numpy()
        else:
            data = common.scans("lungct_dirlab4dct_case1")
            images = [common.tensor(common.unit(data[k], 80, 900)) for k in ("fixed", "moving")]
            self.spacing, self.paper = tuple(float(s) for s in data["spacing"]), True
            self.points = [torch.from_numpy(data[k]) for k in ("fixed_lm", "moving_lm", "moving_lm_refined")]
            self.near = None
        self.fixed, self.moving = images
        self.shape = tuple(self.fixed.shape[2:])
        self.sample = Sample(
            setting, *(resampled(i, size).contiguous().to(device) for i in (self.fixed, self.moving))
        )

    @torch.no_grad()
    def field(self, model):
        """Displacement at the scans' own size."""
        u = model(self.sample.fixed, self.sample.moving).displacement
        return ops.resize_displacement(u, self.shape).cpu()

    def errors(self, u, refined=False):
        """Distances of the landmarks, mm."""
        moved = metrics.move_points(self.points[0], u)
        scale = torch.tensor(self.spacing, dtype=torch.float64)
        return ((moved - self.points[2 if refined else 1]) * scale).norm(dim=1).numpy()

    def row(self, name, u, paper="", **more):
        at = self.errors(u)
        refined = self.errors(u, refined=True).mean() if len(self.points) > 2 else None
        near = None if self.near is None else at[self.near].mean()
        return {
            "method": name,
            "tre_mm": f"{at.mean():.3f}",
            "tre_sd": f"{at.std():.3f}",
            "tre_refined_mm": "" if refined is None else f"{refined:.3f}",
            "tre_wall_mm": "" if near is None else f"{near:.3f}",
            "paper_mm": paper if self.paper else "",
            "folding": f"{metrics.folding(u):.3g}",
            **more,
        }


def experiment(argv=None):
    parser = common.Parser(__doc__, MINUTES, (*METHODS, "fastreg.register", *baselines.BASELINES), long=True)
    parser.add_argument("--size", type=int, nargs=3, help="what the scans are resampled to")
    args = parser.parse_args(argv)
    small = args.setting != "full"
    pair = Pair(args.setting, args.size or SIZES.get(args.setting, SMALL), args.device)
    shape = "x".join(map(str, pair.sample.fixed.shape[2:]))
    rows, fields, trained = [], {}, {}

    def told(name, u, *more, **columns):
        rows.append(pair.row(name, u, *more, **columns))
        fields[name] = u
        print(f"{name}: TRE {rows[-1]['tre_mm']} mm, folding {rows[-1]['folding']}", flush=True)

    told("identity", torch.zeros(1, 3, *pair.shape), BEFORE)
    for name, (model, options, narrow, paper) in METHODS.items():
        if name not in args.methods:
            continue
        torch.manual_seed(args.seed)
        model = model(**options, **(narrow if small else {})).to(args.device)
        recipe = RECIPES["rrn"]
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
            watch=lambda model: pair.errors(pair.field(model)).mean(),
            watched="TRE",
            seed=args.seed,
            state=common.state_of(args, "rrn", name),
        )
        trained[name] = done
        told(
            name,
            pair.field(model),
            paper,
            **common.columns(model, recipe, done, pair.sample),
            note=f"{shape}{', half of the channels' if small and narrow else ''}",
        )
    if "fastreg.register" in args.methods:
        result = fastreg.register(
            pair.fixed.to(args.device), pair.moving.to(args.device), spacing=pair.spacing
        )
        seconds, note = f"{result.seconds:.2f}", f"no net, {'x'.join(map(str, pair.shape))}"
        told("fastreg.register", result.displacement.cpu(), seconds_per_pair=seconds, note=note)
    for name in baselines.there(args.methods):
        u, columns = baselines.displacement(name, pair.fixed, pair.moving, pair.spacing, args.threads)
        told(name, u, **columns)
    common.store(args, "rrn", rows)
    draw(args, pair, fields, trained)


def draw(args, pair, fields, trained):
    """A coronal plane before and after, its differences, landmark errors, and TRE over training."""
    figure = panels.figure(2.6 * (len(fields) + 1), 6.6)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.75, 1])
    axes = top.subplots(2, len(fields) + 1)
    # The plane with the most landmarks near it.
    rows = pair.points[0][:, 1].round().long()
    at = int(np.bincount(rows.numpy(), minlength=pair.shape[1])[: pair.shape[1]].argmax())
    spacing = pair.spacing[0], pair.spacing[2]
    fixed = panels.cut(pair.fixed, 1, at)
    panels.show(axes[0, 0], fixed, spacing, "fixed")
    axes[1, 0].axis("off")
    for k, (name, u) in enumerate(fields.items(), 1):
        moved = panels.cut(ops.warp(pair.moving, u, padding="border"), 1, at)
        title = "moving" if name == "identity" else name
        panels.show(axes[0, k], moved, spacing, title)
        panels.difference(axes[1, k], fixed, moved, spacing, f"TRE {pair.errors(u).mean():.2f} mm")
    axes[1, 1].set_ylabel("moved − fixed", fontsize=9)
    errors, over = bottom.subplots(1, 2)
    for name, u in fields.items():
        e = np.sort(pair.errors(u))
        errors.plot(e, np.arange(1, len(e) + 1) / len(e), color=panels.COLOURS[name], label=name)
    errors.set_xlim(0, max(8, np.quantile(pair.errors(fields["identity"]), 0.9)))
    errors.set_xlabel("landmark error, mm", fontsize=8)
    errors.set_ylabel("share of landmarks below", fontsize=8)
    errors.legend(fontsize=7, frameon=False)
    panels.plain(errors)
    panels.curves(over, trained, "TRE, mm", start=pair.errors(fields["identity"]).mean())
    # a training that diverges leaves the picture
    over.set_ylim(0, 1.2 * pair.errors(fields["identity"]).mean())
    over.legend(fontsize=7, frameon=False)
    common.picture(args, "rrn", figure)


def main(argv=None):
    return common.run(experiment, argv)


if __name__ == "__main__":
    raise SystemExit(main())
