"""A pair of scans on the command line: what users pass is read."""

import argparse

from fastreg._console import warn
from fastreg._files import InputError
from fastreg.data import pairs

from .options import reading_of


def _pair(args: argparse.Namespace, kind: str) -> tuple[str | None, str | None]:
    paths = getattr(args, f"fixed_{kind}"), getattr(args, f"moving_{kind}")
    if (paths[0] is None) != (paths[1] is None):
        missing = "fixed" if paths[0] is None else "moving"
        raise InputError(f"--fixed-{kind} and --moving-{kind} go together: --{missing}-{kind} is missing")
    return paths


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Landmarks, labels and mask of a pair."""
    for which in ("fixed", "moving"):
        text = f"points in the {which} image: csv with header x,y,z (mm, LPS), or Slicer's, elastix's; row i of one matches row i of the other"
        parser.add_argument(f"--{which}-landmarks", metavar="FILE", help=text)
    for which in ("fixed", "moving"):
        text = f"labels on the grid of the {which} image, 0 is background"
        parser.add_argument(f"--{which}-labels", metavar="IMAGE", help=text)
    parser.add_argument("--mask", metavar="IMAGE", help="fixed grid; weights of the comparison")
    parser.add_argument("--moving-mask", metavar="IMAGE", help="moving grid; the same, moved with the image")


def read_case(args: argparse.Namespace) -> pairs.Case:
    """The Case that the arguments name."""
    fixed_labels, moving_labels = _pair(args, "labels")
    fixed_landmarks, moving_landmarks = _pair(args, "landmarks")
    files = fixed_labels, moving_labels, fixed_landmarks, moving_landmarks, args.mask, args.moving_mask
    pair = pairs.Pair(args.fixed, args.moving, *files)
    return pairs.read_case(pair, warn, reading_of(args))


def paths_of(args: argparse.Namespace) -> tuple[str | None, ...]:
    """The files of a pair that the arguments name."""
    kinds = ("", "_landmarks", "_labels")
    images = (getattr(args, f"{which}{kind}") for kind in kinds for which in ("fixed", "moving"))
    return (*images, args.mask, args.moving_mask)


def files_of(args: argparse.Namespace) -> dict[str, str]:
    """For the report."""
    return {"fixed": args.fixed, "moving": args.moving}
