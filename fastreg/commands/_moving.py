"""How `fastreg apply` and `register` move an image: what users choose of it."""

import argparse
from typing import Any

import torch

from fastreg import _moved, io
from fastreg._console import warn


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--interpolation",
        choices=_moved.INTERPOLATIONS,
        help="of moved.nii.gz (default: linear; nearest for what looks like labels)",
    )
    parser.add_argument(
        "--output-type",
        choices=_moved.TYPES,
        default="same",
        help="numbers that moved.nii.gz holds; whole ones are rounded, what is beyond them becomes the least or the most "
        "(default: same as MOVING)",
    )


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """What add_arguments adds."""
    return {"interpolation": args.interpolation, "output_type": args.output_type}


def moved_volumes(
    args: argparse.Namespace,
    path: str,
    volumes: io.Volumes,
    onto: io.Geometry,
    u: torch.Tensor,
) -> tuple[io.Volumes, float]:
    """(Volumes on `onto`, the share of it that they reach); says what becomes of values."""
    array = volumes.array
    if volumes.channels == 1:
        interpolation, is_labels = _moved.interpolation_of(array[..., 0], path, args.interpolation, warn)
    else:
        interpolation, is_labels = args.interpolation or "linear", False
    out, share, beyond = _moved.move_volumes(
        volumes,
        onto,
        u,
        interpolation=interpolation,
        output_type=args.output_type,
        is_labels=is_labels,
    )
    _moved.tell_losses(array, out.array, beyond, is_labels, path, warn)
    return out, share
