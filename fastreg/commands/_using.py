"""What `fastreg register` is to use of a pair beside the two scans: further channels, landmarks, labels."""

import argparse
import math
from typing import Any

import numpy as np
import torch

from fastreg import _start, io
from fastreg._console import warn
from fastreg._files import InputError
from fastreg.data.pairs import Case
from fastreg.io._reading import Reading
from fastreg.outcome import intensities

from .options import reading_of

_REACH = 0.95  # of what counts, that a channel covers


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--channel",
        nargs=3,
        action="append",
        default=[],
        metavar=("FIXED", "MOVING", "WEIGHT"),
        help="another pair of images to compare, say T2 beside T1, on any grids that lie as FIXED and MOVING do; its weight is relative "
        "to 1 of theirs. Of 4D images and vectors, as of feature maps, all together count so much. May be given several times",
    )


def paths_of(args: argparse.Namespace) -> list[str]:
    return [path for channel in getattr(args, "channel", ()) for path in channel[:2]]


def landmarks(
    case: Case, args: argparse.Namespace, start: _start.Start | None, device: torch.device
) -> dict[str, Any]:
    """Of the case, as `register` takes them: voxels of the fixed grid, on which the moving image is laid."""
    if not hasattr(args, "landmark_weight"):
        return {}
    if case.fixed_landmarks is None or case.moving_landmarks is None:
        raise InputError("--use-landmarks goes with --fixed-landmarks and --moving-landmarks")
    fixed, moving = (
        torch.from_numpy(case.fixed_grid.to_index(p)) for p in (case.fixed_landmarks, case.moving_landmarks)
    )
    moving = moving if start is None else start.back(moving)
    return {"landmarks": (fixed.to(device), moving.to(device))}


def labels(
    case: Case, args: argparse.Namespace, start: _start.Start | None, device: torch.device
) -> dict[str, Any]:
    """The same of its labels."""
    if not hasattr(args, "label_weight"):
        return {}
    if case.fixed_labels is None or case.moving_labels is None:
        raise InputError("--use-labels goes with --fixed-labels and --moving-labels")
    fixed, moving = (
        torch.from_numpy(np.ascontiguousarray(a, dtype=kind))[None, None]
        for a, kind in ((case.fixed_labels, np.int64), (case.moving_labels, np.float64))
    )
    grid, field = (case.moving_grid, None) if start is None else start.of_image(case.moving_grid)
    moving = io.resample(moving, grid, case.fixed_grid, field, mode="nearest")[0].long()
    if not (set(fixed.unique().tolist()) & set(moving.unique().tolist())) - {0}:
        raise InputError("--use-labels: no label is in both images where they begin")
    return {"labels": (fixed.to(device), moving.to(device))}


def _weight(channel: list[str]) -> float:
    try:
        weight = float(channel[2])
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise InputError(f"--channel {' '.join(channel)}: the weight must be a number of at least 0")
    return weight


def _maps(path: str, case: Case, reading: Reading) -> tuple[torch.Tensor, io.Geometry]:
    """(1, C, *its grid), fp32."""
    volumes = io.read_volumes(path, reading, warn)
    if volumes.geometry.nd != case.fixed_grid.nd:
        raise InputError(f"{path}: must be {case.fixed_grid.nd}D as the scans, got {volumes.geometry.nd}D")
    parts = [part for volume in volumes for part in volume]
    return torch.cat([intensities(part) for part in parts], 1), volumes.geometry


def _tell_reach(path: str, inside: torch.Tensor, reached: torch.Tensor) -> None:
    """Says that a channel ends where the scans count, which have one mask for all channels."""
    share = float(inside[reached].double().mean())
    if share < _REACH:
        warn(
            f"{path}: covers {100 * share:.3g} % of the fixed image; beyond it its border goes on, and counts"
        )


def channels(
    case: Case, args: argparse.Namespace, start: _start.Start | None, reached: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, Any]]:
    """(those of the fixed grid, of the moving ones laid there, what `register` is told of them); reached: where the moving image is."""
    fixed, moving, weights = [], [], [1.0]
    asked = getattr(args, "channel", ())
    if asked and case.fixed_grid.plane is not None:
        raise InputError("--channel: not with scans of one slice in space")
    for channel in asked:
        weight = _weight(channel)
        still, grid = _maps(channel[0], case, reading_of(args))
        moves, other = _maps(channel[1], case, reading_of(args))
        if still.shape[1] != moves.shape[1]:
            both = f"{still.shape[1]} and {moves.shape[1]}"
            raise InputError(
                f"--channel {' '.join(channel[:2])}: must have as many numbers a voxel, got {both}"
            )
        if not grid.matches(case.fixed_grid):
            still, inside = io.resample(still, grid, case.fixed_grid, outside=None)
            if not inside.any():
                raise InputError(f"{channel[0]}: does not reach the fixed image")
            _tell_reach(channel[0], inside, reached)
        lies, field = (other, None) if start is None else start.of_image(other)
        moves, inside = io.resample(moves, lies, case.fixed_grid, field, outside=None)
        if not inside.any():
            raise InputError(f"{channel[1]}: does not reach the fixed image where the moving one begins")
        _tell_reach(channel[1], inside, reached)
        fixed.append(still)
        moving.append(moves)
        weights += [weight / still.shape[1]] * still.shape[1]
    return fixed, moving, {"channel_weights": weights} if asked else {}
