"""Experiment 4, beforehand: how LinDef's loss is to be reduced, and how much the deviation of Phi is to weigh.

    FASTREG_DATA=... python -m bench.experiments.lindef_beta [--methods "net, mean, 1e-06" ...]

The scans, pairs and size of `bench.experiments.lindef --setting whole`, 60x128x96 voxels. "Phi alone": no net; Phi and the affine map
of the first two held-out pairs are optimised by themselves (Adam, 40 steps of 0.05), which says what the loss allows. "net": LinDef
with a sixteenth of its widths, a pair a step, trained for the minutes given, which says what is learnt. Both for each reduction and beta; "keras" is
the mean squared error beside the sum over Phi. moved: share of the entries of Phi that are more than 0.01 from 1. Dice, folding and
the squared error are of the held-out pairs of that experiment.
"""

import numpy as np
import torch

from bench import common as bench
from bench.experiments import common, lindef
from fastreg import metrics, ops
from fastreg.models import LinDef
from fastreg.models.base import Prediction
from fastreg.models.lindef import _to_voxels
from fastreg.training import RECIPES

LOSSES = (("keras", 1e-6), ("mean", 1e-6), ("mean", 1e-4), ("mean", 1e-2), ("mean", 1e-1))
NAMES = {
    f"{kind}, {reduction}, {beta:g}": (kind, reduction, beta)
    for kind in ("Phi alone", "net")
    for reduction, beta in LOSSES
}
MINUTES = {"whole": 5}
STEPS, RATE = 40, 0.05
WIDTHS = {"encoder": (4, 4, 8, 4, 4), "decoder": (8, 4, 4, 4, 4)}


def alone(model, sample):
    """Phi and displacement that the model's loss finds best for one pair, without its net."""
    shape = sample.fixed.shape[2:]
    # A, of [-1, 1], moves every voxel at once.
    x, step = torch.zeros(1, 3, *shape, requires_grad=True), torch.zeros(1, 3, 4, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [x]}, {"params": [step], "lr": RATE / 10}], lr=RATE)

    def prediction():
        phi = 2 * torch.sigmoid(x)
        u = ops.integrate_gradients(phi)
        matrix = _to_voxels(step, shape)
        whole = ops.compose(u, ops.affine_displacement(matrix, shape), padding="border")
        return Prediction(whole, [phi, u], matrix)

    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        model.loss(sample.fixed, sample.moving, prediction()).backward()
        optimizer.step()
    with torch.no_grad():
        return prediction()


def scored(scans, cases, samples, predictions):
    """What a row says of predictions for held-out pairs."""
    dice, folding, moved, error = [], [], [], []
    for case, sample, p in zip(cases, samples, predictions, strict=True):
        fixed, moving, offset = case
        u = ops.resize_displacement(p.displacement, scans.shape, align_corners=False)
        dice.append(metrics.dice(scans.lungs[fixed], scans.moved(moving, offset, u, labels=True)).mean)
        folding.append(metrics.folding(u))
        phi = p.fields[0] if p.fields else torch.ones(1)
        moved.append(float(((phi - 1).abs() > 0.01).float().mean()))
        warped = ops.warp(sample.moving, p.displacement, padding="border")
        error.append(float(ops.mse_loss(sample.fixed, warped)))
    return {
        "pairs": len(dice),
        "held_out_mse": f"{np.mean(error):.5f}",
        "dice": f"{np.mean(dice):.4f}",
        "folding": f"{np.mean(folding):.3g}",
        "moved": f"{np.mean(moved):.3g}",
    }


def experiment(argv=None):
    parser = common.Parser(__doc__, MINUTES, NAMES, long=True)
    parser.add_argument("--size", type=int, nargs=3, help="what the scans are resampled to")
    args = parser.parse_args(argv)
    size, scans = args.size or lindef.SIZES["whole"], lindef.Scans()
    cases = lindef.cases(lindef.TRAIN, 1, scans, seed=2)[::2]
    held_out = [scans.sample(*case, size) for case in cases]
    rows = []

    def told(name, predictions, **columns):
        n = len(predictions)
        found = scored(scans, cases[:n], held_out[:n], predictions)
        rows.append({"method": name, **found, **columns})
        bench.say(f"{name}: {found}")
        common.store(args, "lindef_beta", rows)

    still = [Prediction(torch.zeros(1, 3, *s.fixed.shape[2:])) for s in held_out]
    told("identity", still)
    told("identity, two pairs", still[:2])
    for name, (kind, reduction, beta) in NAMES.items():
        if name not in args.methods:
            continue
        torch.manual_seed(args.seed)
        model = LinDef(reduction=reduction, beta=beta, **WIDTHS).to(args.device)
        if kind == "Phi alone":
            told(name, [alone(model, s) for s in held_out[:2]], steps=STEPS)
            continue
        recipe = lindef.quick(RECIPES["lindef"], batch_size=1)
        done = common.train(
            model,
            lindef.People(scans, size),
            held_out,
            recipe,
            minutes=args.minutes,
            steps=args.steps,
            looks=6,
            seed=args.seed,
            state=common.state_of(args, "lindef_beta", name),
        )
        with torch.no_grad():
            predictions = [model(s.fixed, s.moving) for s in held_out]
        told(name, predictions, **common.columns(model, recipe, done, held_out[0]))


def main(argv=None):
    return common.run(experiment, argv)


if __name__ == "__main__":
    raise SystemExit(main())
