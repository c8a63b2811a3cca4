"""A net of your own and a training loop of your own: fastreg gives the ops, the losses and the measures.

    python examples/own_training_loop.py --steps 200

A loop that is not yours but has checkpoints, resume, validation and a log: train_your_net.py.
"""

import argparse

import torch
from torch import nn

import fastreg
from fastreg.data import phantom


class Net(nn.Module):
    """Two images -> a velocity at a quarter of their size -> a displacement that does not fold."""

    def __init__(self, width=16):
        super().__init__()
        layers, channels = [], 2
        for stride in (2, 2, 1):
            layers += [nn.Conv3d(channels, width, 3, stride, padding=1), nn.LeakyReLU(0.2)]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv3d(width, 3, 3, padding=1))

    def forward(self, fixed, moving):
        u = fastreg.integrate_velocity(self.layers(torch.cat([fixed, moving], 1)))
        return fastreg.resize_displacement(u, fixed.shape[2:])  # and its voxels, which are smaller now


def loss_of(fixed, moving, u, spacing):
    moved = fastreg.warp(moving, u)
    return {
        "lcc": fastreg.lcc_loss(fixed, moved, window=7, padding="valid"),
        "diffusion": 0.5 * fastreg.diffusion(u, spacing=spacing),
    }


@torch.no_grad()
def validate(net, thorax, fixed, moving):
    """Landmarks in mm before and after, and the fraction of voxels that fold."""
    found = phantom.score(thorax, net(fixed, moving).cpu())
    return (
        f"landmarks {found['tre_before']:.2f} -> {found['tre_after']:.2f} mm, folding {found['folding']:.2%}"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=3, default=(56, 56, 80), help="voxels (56 56 80)")
    parser.add_argument("--steps", type=int, default=200, help="of Adam (200)")
    parser.add_argument("--every", type=int, default=20, help="steps between validations (20)")
    parser.add_argument("-o", "--out", help="where the weights go")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    thorax = phantom.thorax(args.size)  # your pairs here: images (N, 1, D, H, W) of one shape
    fixed, moving = ((image.to(device) + 1000) / 1500 for image in (thorax.fixed, thorax.moving))
    net = Net().to(device)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for step in range(1, args.steps + 1):
        terms = loss_of(fixed, moving, net(fixed, moving), thorax.spacing)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        if step % args.every == 0 or step == args.steps:
            told = ", ".join(f"{name} {value.item():.4f}" for name, value in terms.items())
            print(f"step {step}: {told}; {validate(net, thorax, fixed, moving)}")
    if args.out:
        torch.save(net.state_dict(), args.out)


if __name__ == "__main__":
    main()
