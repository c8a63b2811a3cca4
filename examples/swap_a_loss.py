"""A loop as many have one, F.grid_sample and an LCC from average pooling, and the same on fastreg: two lines change.

    python examples/swap_a_loss.py --size 64 64 96

Both descend alike; time and memory do not.
"""

import argparse
import time

import torch
import torch.nn.functional as F

import fastreg
from fastreg.data import phantom


def stock_warp(image, u):
    """What F.grid_sample wants: an identity grid, channels last and reversed, in [-1, 1]."""
    size = image.shape[2:]
    identity = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij"))
    positions = (identity + u).movedim(1, -1) * 2 / (torch.tensor(size) - 1) - 1
    return F.grid_sample(image, positions.flip(-1), align_corners=True)


def stock_lcc(fixed, moved, window=9):
    """Five sums over windows; volumes, all of them kept for backward."""
    n = window**3

    def total(x):
        for k in ((window, 1, 1), (1, window, 1), (1, 1, window)):
            x = window * F.avg_pool3d(x, k, stride=1, padding=[w // 2 for w in k])
        return x

    f, m = total(fixed), total(moved)
    cross = total(fixed * moved) - f * m / n
    fixed_variance = (total(fixed * fixed) - f * f / n).clamp_min(0)
    moved_variance = (total(moved * moved) - m * m / n).clamp_min(0)
    return -(cross * cross / (fixed_variance * moved_variance + 1e-5)).mean()


STOCK = {"warp": stock_warp, "loss": stock_lcc}
FASTREG = {"warp": fastreg.warp, "loss": fastreg.lcc_loss}  # the swap


def descend(fixed, moving, warp, loss, steps):
    """Adam on the displacement itself; a network's output would stand in its place."""
    u = torch.zeros(1, 3, *fixed.shape[2:], requires_grad=True)
    optimizer = torch.optim.Adam([u], lr=0.1)
    losses = []
    for _ in range(steps):
        value = loss(fixed, warp(moving, u)) + fastreg.diffusion(u)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=3, default=(64, 64, 96), help="voxels (64 64 96)")
    parser.add_argument("--steps", type=int, default=10, help="of Adam (10)")
    args = parser.parse_args(argv)

    thorax = phantom.thorax(args.size)
    fixed, moving = ((image + 1000) / 1500 for image in (thorax.fixed, thorax.moving))
    for name, forms in {"stock": STOCK, "fastreg": FASTREG}.items():
        descend(fixed, moving, **forms, steps=1)  # loads and starts everything
        begin = time.perf_counter()
        losses = descend(fixed, moving, **forms, steps=args.steps)
        seconds = (time.perf_counter() - begin) / args.steps
        print(f"{name:8} loss {losses[0]:.4f} -> {losses[-1]:.4f}, {1e3 * seconds:.0f} ms a step")


if __name__ == "__main__":
    main()
