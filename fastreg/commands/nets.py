"""Arguments of the commands that build a net."""

import argparse
from dataclasses import fields

from fastreg import models
from fastreg.training import Net

NAMES = tuple(f.name for f in fields(Net) if f.name != "method")


def add_arguments(parser: argparse._ActionsContainer, preset: str = "") -> None:
    """--preset, --set and what makes the net's input; None where not given. preset: more of its help."""
    presets = "; ".join(f"{name}: {', '.join(cls.presets)}" for name, cls in models.MODELS.items())
    parser.add_argument("--preset", help=f'arguments of the model, "paper" by default ({presets}){preset}')
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
    parser.add_argument("--crop", metavar="A:B,...", help="of each axis (z,y,x), voxels of the fixed image")
    parser.add_argument(
        "--size", metavar="Z,Y,X", help="voxels of the net's grid, or paper (default: the fixed image's)"
    )
    parser.add_argument("--spacing", metavar="Z,Y,X", help="mm of the net's grid, instead of --size")


def net_of(args: argparse.Namespace) -> Net:
    """The Net that the arguments ask for."""
    return Net(args.method, **{name: getattr(args, name) for name in NAMES})
