"""How `fastreg apply` and `register` move an image: what users choose of it."""

import argparse

import numpy as np
import torch

from fastreg import _moved, io
from fastreg._console import warn


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--interpolation",
        choices=_moved.INTERPOLATIONS,
        help="of MOVING (default: linear; nearest for what looks like labels)",
    )
    parser.add_argument(
        "--output-type",
        choices=_moved.TYPES,
        default="same",
        help="numbers that moved.nii.gz holds; whole ones are rounded, what is beyond them becomes the least or the most "
        "(default: same as MOVING)",
    )


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
    dtype = out.array.dtype
    if beyond:
        warn(f"{path}: {beyond} of {out.array.size} values are beyond what {dtype} holds: clamped")
    if array.dtype.kind == "f" and dtype.kind in "iu" and not is_labels:
        warn(
            f"{path}: its values, {array.min():g} to {array.max():g}, are rounded to whole numbers ({dtype})"
        )
    inexact = {np.dtype(np.float32): 2**24, np.dtype(np.float64): 2**53}.get(dtype)
    if (
        is_labels
        and inexact
        and array.dtype != dtype
        and max(abs(int(array.min())), abs(int(array.max()))) > inexact
    ):
        warn(f"{path}: {dtype} does not hold labels above {inexact} exactly")
    return out, share
