"""What a step of your own model keeps for backward, and which line is to blame.

    python examples/profile_memory.py
    python examples/profile_memory.py --fastreg

Put your net, and what it is trained with, into `step`. (bench/memory.py --import MODULE:NAME measures one function or module
in a process of its own, with its peak.)
"""

import argparse
import traceback
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from swap_a_loss import FASTREG, STOCK  # the file beside this one

from fastreg import diffusion, integrate_velocity


def step(net, fixed, moving, warp, loss, integrate):
    """A diffeomorphic VoxelMorph in small: a velocity at half the size, integrated, and its losses."""
    velocity = net(torch.cat([fixed, moving], 1))
    u = 2 * F.interpolate(integrate(velocity), size=fixed.shape[2:], mode="trilinear", align_corners=True)
    return loss(fixed, warp(moving, u)) + diffusion(u)


def stock_integrate(velocity, steps=7):
    u = velocity / 2**steps
    for _ in range(steps):
        u = u + STOCK["warp"](u, u)
    return u


def saved_by_line(function):
    """Bytes that autograd keeps from forward to backward, each storage once, by the line of your code that led to them."""
    seen, lines, kept = set(), Counter(), []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append(tensor.detach())  # or its address could be given to another
            mine = [f for f in traceback.extract_stack() if Path(f.filename).parent == Path(__file__).parent]
            lines[f"{Path(mine[-2].filename).name}:{mine[-2].lineno} {mine[-2].line}"] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function().backward()
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=3, default=(64, 64, 96), help="voxels (64 64 96)")
    parser.add_argument("--fastreg", action="store_true", help="warp, loss and integration of fastreg")
    args = parser.parse_args(argv)

    fixed, moving = torch.rand(2, 1, 1, *args.size)
    net = torch.nn.Conv3d(2, 3, 3, stride=2, padding=1)
    forms = FASTREG if args.fastreg else STOCK
    integrate = integrate_velocity if args.fastreg else stock_integrate
    lines = saved_by_line(lambda: step(net, fixed, moving, **forms, integrate=integrate))
    volume = fixed.nbytes
    print(f"kept for backward: {sum(lines.values()) / volume:.1f} volumes of {volume / 2**20:.2f} MiB")
    for line, size in lines.most_common(8):
        print(f"{size / volume:8.2f}  {line}")


if __name__ == "__main__":
    main()
