"""Numbers that judge a registration: overlap of labels, landmark error, regularity of the displacement."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastreg._check import fail, tensor
from fastreg.ops.compose import compose
from fastreg.ops.jacobian_determinant import jacobian_determinant

__all__ = [
    "TRE",
    "Dice",
    "Distance",
    "Jacobian",
    "Slice",
    "assd",
    "dice",
    "folding",
    "hd95",
    "inverse_residual",
    "jacobian",
    "move_points",
    "per_slice",
    "sdlogj",
    "tre",
]


class Dice(NamedTuple):
    """mean: over `per_label`, NaN when that is empty. per_label: label -> overlap in [0, 1]."""

    mean: float
    per_label: dict[int, float]


class Distance(NamedTuple):
    """mean: over `per_label`, NaN when that is empty. per_label: label -> distance, in the unit of the spacing."""

    mean: float
    per_label: dict[int, float]


class TRE(NamedTuple):
    """Landmark distances, in the unit of the spacing; sd is that of the population, per_axis the mean of the absolute
    differences along each axis.
    """

    mean: float
    sd: float
    q25: float
    median: float
    q75: float
    max: float
    per_axis: tuple[float, ...]


class Slice(NamedTuple):
    """mean and max: of the errors of one slice's images."""

    mean: float
    max: float


class Jacobian(NamedTuple):
    """Of the determinant of the Jacobian. folding: share of voxels at which it is <= 0; folded_voxels: their number; sdj: its standard
    deviation (of the population); sdlogj: that of its logarithm.
    """

    folding: float
    folded_voxels: int
    sdj: float
    sdlogj: float


def _check_labels(op: str, fixed_labels: Tensor, moved_labels: Tensor) -> None:
    for name, value in (("fixed_labels", fixed_labels), ("moved_labels", moved_labels)):
        tensor(op, name, value)
        if value.is_floating_point() or value.is_complex():
            fail(op, name, "be integer or bool", value.dtype, TypeError)
    shape = tuple(fixed_labels.shape)
    if moved_labels.shape != fixed_labels.shape:
        fail(op, "moved_labels", f"have the shape {shape} of fixed_labels", tuple(moved_labels.shape))
    if moved_labels.device != fixed_labels.device:
        fail(op, "moved_labels", f"be on {fixed_labels.device}", moved_labels.device)


def dice(fixed_labels: Tensor, moved_labels: Tensor, labels: Iterable[int] | None = None) -> Dice:
    """Overlap of each label: ``2 |A and B| / (|A| + |B|)``. Dice 1945.

    Args:
        fixed_labels (Tensor): integer or bool, any shape.
        moved_labels (Tensor): integer or bool, of the same shape.
        labels (iterable of int, optional): the ones to score; all but the background 0 when None. A label absent from
            both is left out, absent from one it scores 0.

    Returns:
        Dice: the mean over labels and a dict of each.

    Raises:
        TypeError: labels are floating.
        ValueError: shapes or devices differ.

    Example:
        >>> fixed, moved = torch.tensor([0, 1, 1, 2, 2, 2]), torch.tensor([0, 0, 1, 2, 2, 2])
        >>> fastreg.metrics.dice(fixed, moved)
        Dice(mean=0.8333333333333333, per_label={1: 0.6666666666666666, 2: 1.0})
    """
    _check_labels("dice", fixed_labels, moved_labels)
    fixed, moved = fixed_labels.reshape(-1).long(), moved_labels.reshape(-1).long()
    present, index = torch.cat([fixed, moved]).unique(return_inverse=True)
    fixed, moved = index[: fixed.numel()], index[fixed.numel() :]
    n = present.numel()
    total = index.bincount(minlength=n).tolist()
    both = fixed[fixed == moved].bincount(minlength=n).tolist()
    scores = {label: 2 * b / t for label, b, t in zip(present.tolist(), both, total, strict=True)}
    wanted = [label for label in scores if label != 0] if labels is None else [int(label) for label in labels]
    per_label = {label: scores[label] for label in wanted if label in scores}
    mean = sum(per_label.values()) / len(per_label) if per_label else float("nan")
    return Dice(mean, per_label)


def _scale(op: str, spacing: float | Sequence[float], nd: int) -> Tensor:
    scale = torch.as_tensor(spacing, dtype=torch.float64)
    if scale.numel() not in (1, nd) or scale.ndim > 1 or not bool((scale > 0).all()):
        fail(op, "spacing", f"be 1 or {nd} positive numbers", spacing)
    return scale


def assd(
    fixed_labels: Tensor,
    moved_labels: Tensor,
    spacing: float | Sequence[float],
    labels: Iterable[int] | None = None,
) -> Distance:
    """Average symmetric surface distance of each label: the mean, over the surface voxels of both, of the distance to the
    nearest surface voxel of the other.

    A surface voxel has a face neighbour (or the image's end) outside of the label.

    Args:
        fixed_labels (Tensor): integer or bool, (*spatial) or with leading axes of 1.
        moved_labels (Tensor): integer or bool, of the same shape.
        spacing (number or sequence): voxel size, one or one per axis; its unit is that of the distances.
        labels (iterable of int, optional): as for `dice`. A label absent from both is left out, absent from one it is at an
            infinite distance.

    Returns:
        Distance: the mean over labels and a dict of each.

    Raises:
        TypeError: labels are floating.
        ValueError: shapes, devices or spacing do not fit.
        ImportError: without SimpleITK.

    Example:
        >>> fixed = torch.zeros(8, 8, dtype=torch.uint8)
        >>> fixed[2:5, 2:5] = 1
        >>> fastreg.metrics.assd(fixed, fixed.roll(1, 0), spacing=2.0)
        Distance(mean=1.0, per_label={1: 1.0})
    """
    return _surfaces(
        "assd", fixed_labels, moved_labels, spacing, labels, lambda a, b: np.concatenate([a, b]).mean()
    )


def hd95(
    fixed_labels: Tensor,
    moved_labels: Tensor,
    spacing: float | Sequence[float],
    labels: Iterable[int] | None = None,
) -> Distance:
    """95th percentile of the Hausdorff distance of each label: the larger of both directions, of the distances of `assd`.

    Args:
        fixed_labels (Tensor): integer or bool, (*spatial) or with leading axes of 1.
        moved_labels (Tensor): integer or bool, of the same shape.
        spacing (number or sequence): voxel size, one or one per axis; its unit is that of the distances.
        labels (iterable of int, optional): as for `assd`.

    Returns:
        Distance: the mean over labels and a dict of each.

    Raises:
        TypeError: labels are floating.
        ValueError: shapes, devices or spacing do not fit.
        ImportError: without SimpleITK.

    Example:
        >>> fixed = torch.zeros(8, 8, dtype=torch.uint8)
        >>> fixed[2:5, 2:5] = 1
        >>> fastreg.metrics.hd95(fixed, fixed.roll(1, 0), spacing=2.0).mean
        2.0
    """
    return _surfaces(
        "hd95",
        fixed_labels,
        moved_labels,
        spacing,
        labels,
        lambda a, b: max(np.percentile(d, 95) for d in (a, b)),
    )


def _surfaces(
    op: str,
    fixed_labels: Tensor,
    moved_labels: Tensor,
    spacing: float | Sequence[float],
    labels: Iterable[int] | None,
    summary: Callable[[np.ndarray, np.ndarray], float],
) -> Distance:
    from fastreg.io._sitk import sitk as simple_itk

    sitk = simple_itk()
    _check_labels(op, fixed_labels, moved_labels)
    shape = tuple(n for k, n in enumerate(fixed_labels.shape) if n > 1 or k >= fixed_labels.ndim - 2)
    if len(shape) not in (2, 3):
        fail(op, "fixed_labels", "have 2 or 3 axes longer than 1", tuple(fixed_labels.shape))
    scale = _scale(op, spacing, len(shape)).expand(len(shape)).tolist()
    fixed, moved = (t.reshape(shape).cpu().numpy() for t in (fixed_labels, moved_labels))
    present = np.union1d(fixed, moved).tolist()
    wanted = (
        [label for label in present if label != 0] if labels is None else [int(label) for label in labels]
    )
    per_label = {}
    for label in wanted:
        masks = fixed == label, moved == label
        if not any(m.any() for m in masks):
            continue
        if not all(m.any() for m in masks):
            per_label[label] = math.inf
            continue
        # Where the label is, and a margin: what lies beyond changes nothing.
        box = tuple(slice(where.min(), where.max() + 1) for where in np.nonzero(masks[0] | masks[1]))
        surfaces, distances = [], []
        for mask in masks:
            image = sitk.GetImageFromArray(np.pad(mask[box], 1).astype(np.uint8))
            image.SetSpacing(scale[::-1])
            contour = sitk.BinaryContour(image, fullyConnected=False)
            surfaces.append(sitk.GetArrayViewFromImage(contour).astype(bool))
            away = sitk.SignedMaurerDistanceMap(contour, squaredDistance=False, useImageSpacing=True)
            distances.append(np.maximum(sitk.GetArrayFromImage(away), 0).astype(np.float64))
        per_label[label] = float(summary(distances[1][surfaces[0]], distances[0][surfaces[1]]))
    mean = sum(per_label.values()) / len(per_label) if per_label else float("nan")
    return Distance(mean, per_label)


def tre(points_a: Tensor, points_b: Tensor, spacing: float | Sequence[float], *, snap: bool = False) -> TRE:
    """Target registration error: statistics of the distances ``||(a - b) * spacing||`` of landmarks.

    Args:
        points_a (Tensor): (P, nd) in voxels, P >= 1.
        points_b (Tensor): (P, nd) in voxels, row i matching row i of points_a.
        spacing (number or sequence): voxel size, one or one per axis, in the points' axis order.
        snap (bool): points_a count as the nearest voxel (halves go to the even one), which is DIR-Lab's convention for landmarks
            that were found and are given as voxels: points_a are then the moved ones, in voxels of the image of points_b.

    Returns:
        TRE: mean, standard deviation (of the population), quartiles and maximum of the distances, and the mean of the
        absolute differences along each axis, in the unit of the spacing.

    Raises:
        TypeError: a tensor is missing.
        ValueError: shapes or spacing do not fit.

    Example:
        >>> points = torch.tensor([[10.0, 20.0, 30.0], [5.0, 6.0, 7.0]])
        >>> found = points + torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 3.25]])
        >>> fastreg.metrics.tre(found, points, spacing=(2.5, 1.0, 1.0))
        TRE(mean=2.875, sd=0.375, q25=2.6875, median=2.875, q75=3.0625, max=3.25, per_axis=(1.25, 0.0, 1.625))
        >>> fastreg.metrics.tre(found, points, spacing=(2.5, 1.0, 1.0), snap=True).max
        3.0
    """
    for name, value in (("points_a", points_a), ("points_b", points_b)):
        tensor("tre", name, value)
        if value.ndim != 2 or value.numel() == 0:
            fail("tre", name, "have shape (P, nd), P >= 1", tuple(value.shape))
    if points_a.shape != points_b.shape:
        shape = tuple(points_a.shape)
        fail("tre", "points_b", f"have the shape {shape} of points_a", tuple(points_b.shape))
    nd = points_a.shape[1]
    scale = _scale("tre", spacing, nd).to(points_a.device)
    a, b = points_a.double(), points_b.to(points_a.device).double()
    apart = ((a.round() if snap else a) - b) * scale
    distance = apart.norm(dim=1)
    q25, median, q75 = distance.quantile(distance.new_tensor([0.25, 0.5, 0.75])).tolist()
    mean, sd = distance.mean().item(), distance.std(correction=0).item()
    return TRE(mean, sd, q25, median, q75, distance.max().item(), tuple(apart.abs().mean(0).tolist()))


def per_slice(errors: Iterable[float], slices: Iterable[Hashable]) -> dict[Hashable, Slice]:
    """Mean and maximum of the errors of each slice's images, as R2N2's table has them: a slice is imaged many times, and each image
    is registered.

    Args:
        errors (iterable of float): one per image, as ``tre(...).mean``.
        slices (iterable): which slice each image is of, by any name.

    Returns:
        dict: slice -> Slice, in the order in which slices come first.

    Raises:
        ValueError: there are not as many slices as errors.

    Example:
        >>> fastreg.metrics.per_slice([1.0, 2.0, 0.5], ["front", "front", "back"])
        {'front': Slice(mean=1.5, max=2.0), 'back': Slice(mean=0.5, max=0.5)}
    """
    errors, names = list(errors), list(slices)
    if len(errors) != len(names):
        fail("per_slice", "slices", f"be as many as errors, {len(errors)}", len(names))
    found: dict[Hashable, list[float]] = {}
    for error, name in zip(errors, names, strict=True):
        found.setdefault(name, []).append(float(error))
    return {name: Slice(sum(values) / len(values), max(values)) for name, values in found.items()}


def jacobian(u: Tensor) -> Jacobian:
    """How regular ``x + u(x)`` is, by the determinant of its Jacobian: share and number of voxels at which it folds (determinant <= 0
    or NaN), standard deviation of the determinant and of ``log(max(det, 1e-9))``.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x).

    Returns:
        Jacobian: folding, folded_voxels, sdj, sdlogj; the deviations are 0 where volume changes alike everywhere.

    Raises:
        TypeError: u is not floating.
        ValueError: its shape does not fit.

    Example:
        >>> u = torch.zeros(1, 2, 4, 4)
        >>> u[:, 1, :, 1] = 2.0  # beyond the voxels to its right
        >>> fastreg.metrics.jacobian(u)[:3]
        (0.25, 4, 1.0897247358851685)
    """
    determinant = jacobian_determinant(u)
    folded = ~(determinant > 0)
    share, number = folded.double().mean().item(), int(folded.sum())
    # One copy in fp64, whose logarithm takes its place.
    determinant = determinant.double()
    sdj = determinant.std(correction=0).item()
    sdlogj = determinant.clamp_(min=1e-9).log_().std(correction=0).item()
    return Jacobian(share, number, sdj, sdlogj)


def folding(u: Tensor) -> float:
    """Share of voxels at which ``x + u(x)`` folds: Jacobian determinant <= 0. A NaN counts as folded.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x).

    Returns:
        float: from 0 to 1.

    Raises:
        TypeError: u is not floating.
        ValueError: its shape does not fit.

    Example:
        >>> u = torch.zeros(1, 2, 4, 4)
        >>> u[:, 1, :, 1] = 2.0  # beyond the voxels to its right
        >>> fastreg.metrics.folding(u)
        0.25
    """
    determinant = jacobian_determinant(u)
    return (~(determinant > 0)).double().mean().item()


def sdlogj(u: Tensor) -> float:
    """Standard deviation over voxels of ``log(max(det, 1e-9))``, det the Jacobian determinant of ``x + u(x)``.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x).

    Returns:
        float: 0 where volume changes alike everywhere.

    Raises:
        TypeError: u is not floating.
        ValueError: its shape does not fit.

    Example:
        >>> u = torch.zeros(1, 2, 2, 3)
        >>> u[:, 1] = torch.tensor([0.0, 0.0, 1.0])
        >>> round(fastreg.metrics.sdlogj(u), 4)
        0.2843
    """
    return jacobian_determinant(u).double().clamp(min=1e-9).log().std(correction=0).item()


def inverse_residual(u: Tensor, v: Tensor, spacing: float | Sequence[float] = 1.0) -> Tensor:
    """``|u(x + v(x)) + v(x)|``: how far from x what v sends u back to lies; 0 where v is the inverse of u, or u of v.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x); beyond the border its nearest voxel.
        v (Tensor): of the same shape.
        spacing (number or sequence): voxel size, one or one per axis; its unit is that of the result.

    Returns:
        Tensor: (N, *spatial), at least fp32.

    Raises:
        TypeError: u or v is not floating.
        ValueError: shapes, devices or spacing do not fit.

    Example:
        >>> u = torch.ones(1, 2, 4, 4)
        >>> fastreg.metrics.inverse_residual(u, fastreg.invert_displacement(u)).max()
        tensor(0.)
        >>> fastreg.metrics.inverse_residual(u, -0.5 * u, spacing=(3.0, 4.0)).max()  # off by half a voxel along both axes
        tensor(2.5000)
    """
    together = compose(u, v)
    together = together.to(torch.promote_types(together.dtype, torch.float32))
    nd = u.dim() - 2
    scale = _scale("inverse_residual", spacing, nd).to(together).expand(nd)
    return (together * scale.view(-1, *[1] * nd)).norm(dim=1)


def move_points(points: Tensor, u: Tensor) -> Tensor:
    """``p + u(p)``: where a displacement sends points of its own grid. Linear; outside, u of the nearest border.

    Args:
        points (Tensor): (P, nd) in voxels, axis order of u.
        u (Tensor): (1, nd, *spatial) or (nd, *spatial), in voxels.

    Returns:
        Tensor: (P, nd), the wider dtype of both, at least fp32.

    Raises:
        TypeError: u is not floating.
        ValueError: shapes or devices do not fit.

    Example:
        >>> u = torch.zeros(1, 2, 4, 4)
        >>> u[:, 1] = torch.arange(4.0)  # x moves by itself
        >>> fastreg.metrics.move_points(torch.tensor([[0.0, 1.0], [2.0, 2.5]]), u)
        tensor([[0., 2.],
                [2., 5.]])
    """
    for name, value in (("points", points), ("u", u)):
        tensor("move_points", name, value)
    if not u.is_floating_point():
        fail("move_points", "u", "be floating point", u.dtype, TypeError)
    field = u[0] if u.ndim in (4, 5) and u.shape[0] == 1 and u.shape[1] == u.ndim - 2 else u
    nd = field.ndim - 1
    if nd not in (2, 3) or field.shape[0] != nd or field.numel() == 0:
        fail("move_points", "u", "have shape (1, nd, *spatial) or (nd, *spatial)", tuple(u.shape))
    if points.ndim != 2 or points.shape[1] != nd:
        fail("move_points", "points", f"have shape (P, {nd})", tuple(points.shape))
    if points.device != u.device:
        fail("move_points", "points", f"be on {u.device}", points.device)

    p = points.double()
    last = torch.tensor(field.shape[1:], device=p.device) - 1
    inside = p.clamp(min=torch.zeros_like(last).double(), max=last.double())
    # Clamping the index too keeps NaN from reading out of bounds; its weight makes the result NaN.
    low = inside.floor().long().clamp(min=torch.zeros_like(last), max=last)
    fraction = inside - low
    moved = p.clone()
    for corner in range(2**nd):
        bits = torch.tensor([corner >> axis & 1 for axis in range(nd)], device=p.device)
        index = torch.minimum(low + bits, last)
        weight = torch.where(bits.bool(), fraction, 1 - fraction).prod(dim=1)
        at: tuple[Any, ...] = (slice(None), *index.unbind(1))
        moved += weight[:, None] * field[at].T.double()
    return moved.to(torch.promote_types(torch.promote_types(points.dtype, u.dtype), torch.float32))
