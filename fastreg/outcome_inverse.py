"""The other direction of a registered pair: the fixed image on the grid of the moving one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastreg import _moved, io
from fastreg._console import warn
from fastreg._files import InputError, Name
from fastreg.data.pairs import Case

OUTPUTS = (
    "inverse_displacement.nii.gz",
    "moved_fixed.nii.gz",
    "moved_fixed_labels.nii.gz",
    "moving_landmarks_in_fixed.csv",
)
GOOD = 0.01  # voxels, in the mean: below it stays the inverse of a field that does not fold


def check(residual: io.Residual, field: str) -> None:
    """Warns of an inverse that is none, and refuses one that says nothing."""
    if residual.outside == 1:
        raise InputError(f"{field}: no voxel of the inverse's grid comes from inside of it")
    if residual.mean_voxels > GOOD:
        warn(
            f"{field}: its inverse is off by {residual.mean_voxels:.3g} voxels in the mean, up to {residual.max_voxels:.3g}; "
            f"where a field folds, as this one at {100 * residual.folded:.3g} % of its voxels, it has none"
        )


def off_by(residual: Mapping[str, float]) -> str:
    """A Residual by name, in words."""
    return "off by {mean_voxels:.2g} voxels in the mean, at most {max_voxels:.2g} ({mean_mm:.2g} and {max_mm:.2g} mm)".format(
        **residual
    )


def lines(residual: io.Residual) -> list[str]:
    """What there is to print of it."""
    told = [
        f"inverse     {off_by(vars(residual))}",
        f"            {100 * residual.folded:.3g} % of the field's voxels fold",
    ]
    if residual.outside:
        told.append(
            f"            {100 * residual.outside:.3g} % of its voxels come from outside of the field"
        )
    return told


def write(folder: Path, case: Case, u: torch.Tensor, name: Name) -> dict[str, Any]:
    """Writes OUTPUTS, those that the case has something for; u (1, nd, *fixed grid), voxels; name: of the fixed
    image, for messages. Returns what the report says."""
    grids = case.fixed_grid, case.moving_grid
    v, residual = io.invert(u, *grids)
    if residual.outside < 1:
        check(residual, "displacement.nii.gz")
    else:  # nothing to refuse what was registered for
        warn("displacement.nii.gz: no voxel of the moving image comes from inside of the fixed one")
    interpolation, is_labels = _moved.interpolation_of(case.fixed, name, None, warn)
    outside = _moved.outside_of(case.fixed, is_labels)
    how: dict[str, Any] = {"interpolation": interpolation, "dtype": case.fixed.dtype, "outside": outside}
    moved = _moved.move(np.ascontiguousarray(case.fixed)[None], *grids, v, **how)
    io.write_displacement(folder / OUTPUTS[0], v, case.moving_grid)
    io.write_image(folder / OUTPUTS[1], moved.array[0], case.moving_grid)
    if case.fixed_labels is not None:
        labels = torch.from_numpy(np.ascontiguousarray(case.fixed_labels))[None, None]
        back, _ = io.resample(labels, *grids, v, mode="nearest")
        io.write_image(folder / OUTPUTS[2], back[0, 0].numpy(), case.moving_grid)
    if case.moving_landmarks is not None:
        points = io.invert_points(case.moving_landmarks, u, case.fixed_grid)
        io.write_landmarks(folder / OUTPUTS[3], case.fixed_grid.in_space(points), case.landmark_names)
    return {**vars(residual), "outside_value": outside}
