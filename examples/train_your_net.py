"""A net of your own in a run of fastreg: checkpoints, resume, validation, a log, several GPUs.

    python examples/train_your_net.py -o runs/mine              again: goes on where it ended
    torchrun --nproc-per-node 2 examples/train_your_net.py -o runs/mine

The net needs `forward(fixed, moving)`, a displacement in voxels, and `loss(fixed, moving, prediction)`.
"""

import argparse

import own_training_loop  # the file beside this one

import fastreg
from fastreg import training
from fastreg.data import phantom


class Net(own_training_loop.Net):
    def loss(self, fixed, moving, u):
        moved = fastreg.warp(moving, u)
        return fastreg.lcc_loss(fixed, moved, window=7) + 0.05 * fastreg.diffusion(u)


def sample(size, seed):
    """What a run trains on is any sequence of these; fastreg.data.Pairs makes them of files."""
    thorax = phantom.thorax(size, seed)
    fixed, moving = ((image + 1000) / 1500 for image in (thorax.fixed, thorax.moving))
    return training.Sample(f"thorax {seed}", fixed, moving)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=3, default=(56, 56, 80), help="voxels (56 56 80)")
    parser.add_argument("--steps", type=int, default=100, help="of Adam; more than before go on (100)")
    parser.add_argument("-o", "--out", default="runs/mine", help="the run's folder (runs/mine)")
    args = parser.parse_args(argv)

    with training.processes() as device:
        run = training.Run(
            args.out,
            Net().to(device),
            [sample(args.size, seed) for seed in range(3)],
            validation=[sample(args.size, 3)],
            recipe=training.Recipe(learning_rate=1e-3, steps=args.steps),
        )
        run.train()  # or: for told in run: ... your own lines after each step


if __name__ == "__main__":
    main()
