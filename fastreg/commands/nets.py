"""Arguments of the commands that build a net."""

import argparse
from dataclasses import fields

from fastreg import models
from fastreg.data.preprocessing import ALIGNMENTS
from fastreg.training import Net

NAMES = tuple(f.name for f in fields(Net) if f.name != "method")


def presets() -> str:
    """What --preset is of a net."""
    known = "; ".join(f"{name}: {', '.join(cls.presets)}" for name, cls in models.MODELS.items())
    return f'arguments of the model, "paper" by default ({known})'


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """--set and what makes the net's input; None where not given."""
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="an argument of the model's class, as --set cost_volume=False; a wrong name lists them; repeatable",
    )
    parser.add_argument(
        "--intensity",
        help="percentiles (default), minmax, zscore (default of r2n2), LOW,HIGH (become 0 and 1) or paper",
    )
    add_grid(parser)
    parser.add_argument(
        "--align",
        choices=ALIGNMENTS,
        help="lay the moving image on the fixed one first, by the matrix that fastreg register --transform finds; what comes out "
        "has it in it (default: none)",
    )
    parser.add_argument(
        "--match-histograms",
        action="store_true",
        default=None,
        help="the moving image gets the histogram of the fixed one, before --intensity",
    )


def add_grid(parser: argparse._ActionsContainer) -> None:
    """What decides on which voxels a net works; None where not given."""
    parser.add_argument(
        "--crop",
        metavar="A:B,...|mask",
        help="of each axis (z,y,x), voxels of the fixed image; or the box of the masks of both images",
    )
    parser.add_argument(
        "--margin", type=float, metavar="MM", help="around the box of --crop mask (default: 0)"
    )
    parser.add_argument(
        "--size",
        metavar="Z,Y,X",
        help="voxels of the net's grid, resampled to, or paper (default: the fixed image's); with --spacing cut out or padded",
    )
    parser.add_argument(
        "--spacing", metavar="Z,Y,X", help="mm of the net's grid, or paper; without --size resampled to"
    )


def net_of(args: argparse.Namespace) -> Net:
    """The Net that the arguments ask for."""
    return Net(args.method, **{name: getattr(args, name) for name in NAMES})
