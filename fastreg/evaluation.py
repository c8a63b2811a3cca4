"""How well a displacement registers a Case, where landmarks or labels tell."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fastreg import io, metrics
from fastreg.data import landmarks
from fastreg.data.pairs import Case

_NEIGHBOURS = 6  # that a pair of landmarks is compared with
_ON_VOXEL = 0.02  # of a voxel: what rounding in a file of mm leaves of a landmark that was one


def scores(case: Case, u: torch.Tensor, *, surfaces: bool = False) -> dict[str, Any]:
    """Scores of u (1, nd, *fixed grid), voxels, on the CPU.

    Returns:
        dict: "tre" ({"unit", "landmarks", "before", "after"}: of metrics.TRE; "snapped": that of DIR-Lab's convention, where the
        moving image's landmarks are voxels) where the case has landmarks; "dice" ({"before", "after"}: {"mean", label: ...}) and
        "moved_labels" (ndarray) where it has labels; with surfaces "assd" (the same, mm).
    """
    found: dict[str, Any] = {}
    grid = case.fixed_grid
    if case.fixed_landmarks is not None and case.moving_landmarks is not None:
        fixed = torch.from_numpy(grid.to_index(case.fixed_landmarks))
        moving = torch.from_numpy(grid.to_index(case.moving_landmarks))
        moved = metrics.move_points(fixed, u)
        found["tre"] = {
            "unit": "mm",
            "landmarks": len(fixed),
            "before": metrics.tre(fixed, moving, grid.spacing_zyx)._asdict(),
            "after": metrics.tre(moved, moving, grid.spacing_zyx)._asdict(),
        }
        own = case.moving_grid
        voxels = torch.from_numpy(own.to_index(case.moving_landmarks))
        if (voxels - voxels.round()).abs().max() < _ON_VOXEL:
            landed = torch.from_numpy(own.to_index(grid.to_physical(moved.numpy())))
            snapped = metrics.tre(landed, voxels.round(), own.spacing_zyx, snap=True)
            found["tre"]["snapped"] = snapped._asdict()
    if case.fixed_labels is None:
        return found
    fixed, moving = (
        torch.from_numpy(np.ascontiguousarray(a, dtype=kind))[None, None]
        for a, kind in ((case.fixed_labels, np.int64), (case.moving_labels, np.float64))
    )
    before, after = (
        io.resample(moving, case.moving_grid, grid, field, mode="nearest")[0].long() for field in (None, u)
    )
    # The same labels before and after, so that the means compare: one that is moved out of sight scores 0.
    present = torch.cat([fixed.unique(), before.unique(), after.unique()]).unique().tolist()
    labels = [label for label in present if label != 0]
    found["dice"], found["moved_labels"] = {}, after[0, 0].numpy()
    if surfaces:
        found["assd"] = {}
    for when, moved in (("before", before), ("after", after)):
        of_labels = metrics.dice(fixed, moved, labels).per_label
        of_labels = {label: of_labels.get(label, 0.0) for label in labels}
        found["dice"][when] = {"mean": _mean(of_labels), **of_labels}  # type: ignore[misc]
        if surfaces:
            distances = metrics.assd(fixed, moved, grid.spacing_zyx, labels).per_label
            found["assd"][when] = {"mean": _mean(distances), **distances}  # type: ignore[misc]
    return found


def doubt(case: Case, u: torch.Tensor) -> str | None:
    """A line, where the landmarks would clearly fit better if they were meant otherwise than they were read: exchanged, in another
    space, in another order; None where they fit as they are, or where there are none. u: as for scores.

    Better is, with as many inside the images:
    - u brings them to less than half of what they were and of those that were read (if few, or if u helps those too: a quarter);
    - exchanged or in another space, u helps them by a fifth, and takes those that were read a fifth further apart;
    - in another unit, where distances do not compare, u helps them by half and those that were read not at all;
    - one file in another space: they are at a fifth before u already, and not because all lie in one place.
    """
    grids = case.fixed_grid, case.moving_grid
    if case.fixed_landmarks is None or case.moving_landmarks is None:
        return None
    read = case.fixed_landmarks, case.moving_landmarks

    def fit(fixed: np.ndarray, moving: np.ndarray) -> tuple[int, float, float]:
        grid = case.fixed_grid
        a, b = (torch.from_numpy(grid.to_index(p)) for p in (fixed, moving))
        apart, brought = (metrics.tre(p, b, grid.spacing_zyx).mean for p in (a, metrics.move_points(a, u)))
        n = landmarks.n_inside(fixed, grids[0]) + landmarks.n_inside(moving, grids[1])
        return n, apart, brought

    inside, before, after = fit(*read)
    n_points, voxel = len(read[0]), min(case.fixed_grid.spacing)
    share = 0.5 if n_points >= 6 and after > 0.5 * before else 0.25
    wide = np.linalg.norm(read[0] - read[0].mean(0), axis=1).mean()
    best: tuple[float, str] | None = None
    for other in landmarks.others(*read, grids, case.landmark_spaces):
        n, apart, brought = fit(other.fixed, other.moving)
        clearly = brought < share * min(apart, after) and brought < after - 0.5 * voxel
        if other.kind in ("exchanged", "space"):  # distances between them are the same before u
            clearly |= n_points >= 6 and brought < 0.8 * apart and after > 1.2 * before
        elif other.kind == "one":
            clearly |= max(apart, brought) < 0.2 * before and before < min(4 * wide, 1.25 * after)
        elif other.kind == "unit":
            clearly |= n_points >= 6 and brought < min(0.5 * apart, after) and after > 0.8 * before
        if other.kind in ("unit", "order"):
            clearly &= after > 0.5 * before
        if n >= inside and clearly and (best is None or brought < best[0]):
            best = brought, other.how
    if best is None:
        return None
    return f"landmarks are {after:.2f} mm apart, and would be {best[0]:.2f} mm {best[1]}"


def contradictions(case: Case) -> list[str]:
    """A line for each pair of landmarks that says otherwise than those around it: of most of its neighbours it is further from having
    their motion than it is from them, as if space folded, and ten times as far as pairs are in the median."""
    if case.fixed_landmarks is None or case.moving_landmarks is None or len(case.fixed_landmarks) < 4:
        return []
    here, motion = case.fixed_landmarks, case.moving_landmarks - case.fixed_landmarks
    nearest = min(_NEIGHBOURS, len(here) - 1)
    off, folds = np.zeros(len(here)), np.zeros(len(here), dtype=bool)
    for i, (p, u) in enumerate(zip(here, motion, strict=True)):
        away = np.linalg.norm(here - p, axis=1)
        away[i] = np.inf
        near = np.argsort(away, kind="stable")[:nearest]
        off[i] = np.linalg.norm(u - np.median(motion[near], axis=0))
        folds[i] = np.mean(np.linalg.norm(motion[near] - u, axis=1) > away[near]) > 0.5
    wrong = folds & (off > 10 * max(float(np.median(off)), min(case.fixed_grid.spacing)))
    names = case.landmark_names or [""] * len(here)
    return [
        f"landmark pair {i + 1} of {len(here)}{f' ({names[i]})' if names[i] else ''} moves by {np.linalg.norm(motion[i]):.0f} mm, "
        f"{off[i]:.0f} mm from what those around it say"
        for i in np.flatnonzero(wrong)
    ]


def _mean(values: Mapping[int, float]) -> float:
    """Over labels; one that is lost, at an infinite distance, is in the scores by label alone."""
    finite = [v for v in values.values() if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
