"""Experiment 6: every 3D method trained on pairs of people for the same time, and asked about people it has not seen.

    FASTREG_DATA=... python -m bench.experiments.inter_subject [--setting small | full] [--methods VoxelMorph-2 ...]

hippocampusmr_msd04: subjects 1 to 8 train, 9 and 10 are the held-out ones, 11 to 15 the test: 20 ordered pairs, Dice of the
anterior and posterior hippocampus, on the whole images. Every image: its 1st and 99th percentile (of what is not padding) to 0 and 1,
cropped to the 32x48x32 voxels that hold the hippocampi of the training subjects. A training pair is two subjects, both mirrored or
not, each moved by a small random affine map of its own. Losses are the papers'; no label is used in training, nor in choosing when it ends.

small: images at half resolution (16x24x16 voxels of 2 mm; the displacement is resized), but for RRN, whose displacement is four times
coarser; RRN with half, LinDef with a quarter of the papers' widths; learning rates of 1e-3 (RRN: 5e-4), batches of 2 or 4 (PyTorch's convolution of
one small image is several times slower), PRDFE's regulariser at 0.05; chosen on the held-out subjects. full: whole resolution, the papers' widths and recipes.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

import fastreg
from bench.experiments import baselines, common, panels
from bench.experiments.rrn import HALF
from fastreg import metrics, ops
from fastreg.models import PRDFE, RRN, F3RNet, LinDef, VoxelMorph
from fastreg.training import RECIPES, Sample

TRAIN, HELD_OUT, TEST = range(8), (8, 9), range(10, 15)
BOX = (slice(4, 36), slice(4, 52), slice(4, 36))
MINUTES = {"small": 3, "full": 600}
LABELS = (1, 2)
VIRTUAL = 100_000  # length of the endless sequence of training pairs
PATIENCE = 12  # looks: nets that start from the identity need some before they move
QUARTER = {"encoder": (8, 16, 32, 8, 8), "decoder": (32, 16, 8, 8, 8)}


@dataclasses.dataclass(frozen=True)
class Method:
    """recipe: the paper's, by name. options: of the model. In the small setting: small, more of them; size of a net's voxel, mm; batch;
    note, how it differs from the paper's.
    """

    model: type
    recipe: str
    options: dict = dataclasses.field(default_factory=dict)
    small: dict = dataclasses.field(default_factory=dict)
    size: int = 2
    batch: int = 4
    learning_rate: float = 1e-3
    note: str = "2 mm"


METHODS = {
    "VoxelMorph-1": Method(VoxelMorph, "voxelmorph", {"decoder": (32, 32, 32, 32, 8, 8)}),
    "VoxelMorph-2": Method(VoxelMorph, "voxelmorph"),
    # Its displacement has a quarter of the images' resolution.
    "RRN": Method(RRN, "rrn", {}, HALF, 1, 2, 5e-4, "1 mm, half of the widths, identity at first"),
    "LinDef": Method(LinDef, "lindef", {}, QUARTER, note="2 mm, a quarter of the widths"),
    "F3RNet": Method(F3RNet, "f3rnet", batch=2),
    # The paper's 0.001 is for brains that are aligned and normalised.
    "PRDFE": Method(PRDFE, "prdfe", {}, {"weight": 0.05}, batch=2, note="2 mm, regulariser's weight 0.05"),
}


def images(data):
    """(1, 1, *spatial) each, the 1st and 99th percentile of what is not padding at 0 and 1."""
    out = []
    for image in data["images"]:
        low, high = np.percentile(image[image > 0], [1, 99])
        out.append(common.tensor(common.unit(image, low, high)))
    return out


class People:
    """Training pairs: pair k is drawn from k alone. size: of a net's voxel."""

    def __init__(self, images, size):
        self.images, self.size = images, size

    def __len__(self):
        return VIRTUAL

    def __getitem__(self, k):
        draw = torch.Generator().manual_seed(k)
        i, j = torch.randperm(len(self.images), generator=draw)[:2].tolist()
        fixed, moving = (seen(_varied(self.images[n], draw), self.size) for n in (i, j))
        if torch.rand((), generator=draw) < 0.5:
            fixed, moving = fixed.flip(2), moving.flip(2)
        return Sample(f"{i}-{j}", fixed, moving)


def _varied(image, draw):
    centre = torch.tensor([(n - 1) / 2 for n in image.shape[2:]])
    linear = torch.eye(3) + 0.07 * torch.randn(3, 3, generator=draw)
    shift = torch.randn(3, generator=draw) + centre - linear @ centre
    return ops.warp(image, None, affine=torch.cat([linear, shift[:, None]], 1)[None], padding="zeros")


def seen(image, size):
    """What a net sees of an image."""
    image = image[(..., *BOX)]
    return F.avg_pool3d(image, size) if size > 1 else image.contiguous()


@torch.no_grad()
def whole(model, size, fixed, moving):
    """Displacement of the whole images: beyond the box what its nearest voxel has."""
    device = next(model.parameters()).device
    u = model(*(seen(i, size).to(device) for i in (fixed, moving))).displacement.cpu()
    if size > 1:
        u = ops.resize_displacement(u, [b.stop - b.start for b in BOX], align_corners=False)
    around = [p for b, n in zip(BOX[::-1], fixed.shape[:1:-1], strict=True) for p in (b.start, n - b.stop)]
    return F.pad(u, around, mode="replicate")


def moved_labels(labels, u):
    return ops.warp(labels[None, None].float(), u, mode="nearest", padding="zeros")[0, 0].to(labels.dtype)


def score(pairs, images, labels, displacement):
    """Dice by label of each pair, share of folded voxels of all; displacement(fixed, moving)."""
    dice, folding = [], []
    for i, j in pairs:
        u = displacement(images[i], images[j])
        result = metrics.dice(labels[i], moved_labels(labels[j], u), LABELS)
        dice.append([result.per_label[label] for label in LABELS])
        folding.append(metrics.folding(u))
    return np.array(dice), float(np.mean(folding))


def ordered(subjects):
    return [(i, j) for i in subjects for j in subjects if i != j]


def row(name, dice, folding, **more):
    mean = dice.mean(1)
    return {
        "method": name,
        "dice": f"{mean.mean():.4f}",
        "dice_sd": f"{mean.std():.4f}",
        "anterior": f"{dice[:, 0].mean():.4f}",
        "posterior": f"{dice[:, 1].mean():.4f}",
        "folding": f"{folding:.3g}",
        **more,
    }


def build(method, args):
    torch.manual_seed(0)
    small = args.setting == "small"
    return method.model(**{**method.options, **(method.small if small else {})}).to(args.device)


def recipe(method, args):
    """The paper's; in the small setting one that a few minutes are enough for."""
    paper = RECIPES[method.recipe]
    if args.setting == "full":
        return paper
    return dataclasses.replace(
        paper, learning_rate=method.learning_rate, batch_size=method.batch, plateau=None, patience=None
    )


def experiment(argv=None):
    args = common.Parser(__doc__, MINUTES, (*METHODS, "fastreg.register", *baselines.BASELINES)).parse_args(
        argv
    )
    small = args.setting == "small"
    data = common.scans("hippocampusmr_msd04")
    scans, labels = images(data), [torch.from_numpy(s.astype(np.int64)) for s in data["segs"]]
    pairs, held_out = ordered(TEST), ordered(HELD_OUT)
    rows, shown, curves = [], {}, {}

    def told(name, dice, folding, **more):
        rows.append(row(name, dice, folding, **more))
        print(f"{name}: Dice {dice.mean():.4f}, folding {100 * folding:.2g} %", flush=True)
        shown[name] = dice.mean(1)

    still = torch.zeros(1, 3, *scans[0].shape[2:])
    told("identity", *score(pairs, scans, labels, lambda f, m: still))
    fields = {"identity": still}
    for name, method in METHODS.items():
        if name not in args.methods:
            continue
        model, size = build(method, args), method.size if small else 1
        looked = [Sample(f"{i}-{j}", seen(scans[i], size), seen(scans[j], size)) for i, j in held_out]
        people = People([scans[k] for k in TRAIN], size)
        print(f"{name}, {common.parameters(model):,} parameters", flush=True)

        def found(f, m, model=model, size=size):
            return whole(model, size, f, m)

        how = recipe(method, args)
        done = common.train(
            model,
            people,
            looked,
            how,
            minutes=args.minutes,
            steps=args.steps,
            patience=PATIENCE,
            watch=lambda _, found=found: score(held_out, scans, labels, found)[0].mean(),
            watched="Dice",
        )
        curves[name] = done
        dice, folding = score(pairs, scans, labels, found)
        told(
            name,
            dice,
            folding,
            **common.columns(model, how, done, looked[0]),
            note=method.note if small else "",
        )
        fields[name] = found(scans[pairs[0][0]], scans[pairs[0][1]])
    if "fastreg.register" in args.methods:
        spent = []

        def pairwise(f, m):
            result = fastreg.register(f.to(args.device), m.to(args.device))
            spent.append(result.seconds)
            return result.displacement.cpu()

        dice, folding = score(pairs, scans, labels, pairwise)
        note = "each pair optimised by itself"
        told("fastreg.register", dice, folding, seconds_per_pair=f"{np.median(spent):.3f}", note=note)
        fields["fastreg.register"] = pairwise(scans[pairs[0][0]], scans[pairs[0][1]])
    for name in baselines.there(args.methods):
        about = []

        def other(f, m, name=name, about=about):
            u, columns = baselines.displacement(name, f, m, (1.0, 1.0, 1.0), args.threads)
            about.append(columns)
            return u

        dice, folding = score(pairs, scans, labels, other)
        median = f"{np.median([float(a['seconds_per_pair']) for a in about]):.2f}"
        told(name, dice, folding, **{**about[0], "seconds_per_pair": median})
        fields[name] = other(scans[pairs[0][0]], scans[pairs[0][1]])
    common.store(args, "inter_subject", rows)
    begin = score(held_out, scans, labels, lambda f, m: still)[0].mean()
    draw(args, scans, labels, pairs[0], fields, shown, curves, begin)


def draw(args, scans, labels, pair, fields, dice, curves, begin):
    """A plane of a test pair with both hippocampi, its differences, Dice of every pair and over training."""
    i, j = pair
    count = len(fields) + 1
    figure = panels.figure(1.75 * count, 5.9)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    axes = top.subplots(2, count)
    at = int(np.bincount(np.nonzero(labels[i].numpy())[2]).argmax())
    fixed, truth = panels.cut(scans[i], 2, at), panels.cut(labels[i], 2, at)
    panels.show(axes[0, 0], fixed, (1, 1), "fixed: yellow\nmoved: red")
    panels.contour(axes[0, 0], truth, "yellow")
    axes[1, 0].axis("off")
    for k, (name, u) in enumerate(fields.items(), 1):
        moved = panels.cut(ops.warp(scans[j], u, padding="zeros"), 2, at)
        title = "moving" if name == "identity" else name
        panels.show(axes[0, k], moved, (1, 1), f"{title}\nDice {dice[name][0]:.3f}")
        panels.contour(axes[0, k], truth, "yellow")
        panels.contour(axes[0, k], panels.cut(moved_labels(labels[j], u), 2, at), "red")
        panels.difference(axes[1, k], fixed, moved, (1, 1), "moved − fixed")
    spread, over = bottom.subplots(1, 2, width_ratios=[1.4, 1])
    panels.spread(spread, dice, "Dice, 20 test pairs")
    panels.curves(over, curves, "Dice, 2 held-out pairs", start=begin)
    over.legend(fontsize=7, frameon=False)
    common.picture(args, "inter_subject", figure)


def main(argv=None):
    return common.run(experiment, argv)


if __name__ == "__main__":
    raise SystemExit(main())
