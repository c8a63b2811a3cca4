"""How well a displacement registers a Case, where landmarks or labels tell."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fastreg import io, metrics
from fastreg.data.pairs import Case


def scores(case: Case, u: torch.Tensor, *, surfaces: bool = False) -> dict[str, Any]:
    """Scores of u (1, nd, *fixed grid), voxels, on the CPU.

    Returns:
        dict: "tre" ({"unit", "landmarks", "before", "after"}: of metrics.TRE) where the case has landmarks; "dice" ({"before",
        "after"}: {"mean", label: ...}) and "moved_labels" (ndarray) where it has labels; with surfaces "assd" (the same, mm).
    """
    found: dict[str, Any] = {}
    grid = case.fixed_grid
    if case.fixed_landmarks is not None and case.moving_landmarks is not None:
        fixed = torch.from_numpy(grid.to_index(case.fixed_landmarks))
        moving = torch.from_numpy(grid.to_index(case.moving_landmarks))
        found["tre"] = {
            "unit": "mm",
            "landmarks": len(fixed),
            "before": metrics.tre(fixed, moving, grid.spacing_zyx)._asdict(),
            "after": metrics.tre(metrics.move_points(fixed, u), moving, grid.spacing_zyx)._asdict(),
        }
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


def exchanged(case: Case, u: torch.Tensor) -> float | None:
    """Mean distance in mm after u, were the landmarks of the two images exchanged; None unless that clearly brings them closer, and u apart."""
    grid = case.fixed_grid
    if case.fixed_landmarks is None or case.moving_landmarks is None:
        return None
    fixed, moving = (
        torch.from_numpy(grid.to_index(p)) for p in (case.fixed_landmarks, case.moving_landmarks)
    )
    before, after, otherwise = (
        metrics.tre(a, b, grid.spacing_zyx).mean
        for a, b in (
            (fixed, moving),
            (metrics.move_points(fixed, u), moving),
            (metrics.move_points(moving, u), fixed),
        )
    )
    return otherwise if otherwise < 0.8 * before and after > 1.2 * before else None


def _mean(values: Mapping[int, float]) -> float:
    """Over labels; one that is lost, at an infinite distance, is in the scores by label alone."""
    finite = [v for v in values.values() if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
