"""Pairwise registration, coarse to fine, by gradient descent.

    minimise over u:  similarity(fixed, warp(moving, u)) + regularization * diffusion(u)

with the diffusion in mm over mm, and the terms of _terms.py where they are asked for; or over matrices alone. What a level minimises, and over which parameters, is in
_descent.py; where it all begins, in _start.py.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import (
    _adaptive,
    _affine,
    _channels,
    _check,
    _descent,
    _discrete,
    _inverse,
    _labels,
    _similarity,
    _start,
    _terms,
)
from . import ops as _fused
from ._repr import shapes

__all__ = ["Registration", "register"]

_SHORTEST = 12  # voxels an axis must keep to be halved once more
_ITERATIONS = (100, 100, 60, 30)
_SMALL = 60  # of each level of an image that has two or one: there they cost next to nothing, and little was found before
_AFFINE_VOXELS = 2_000_000  # levels beyond this size add nothing to twelve numbers
_AFFINE_ITERATIONS = 100
_AFFINE_STEP = 0.1  # voxels

Terms = tuple[_terms.Landmarks | _labels.Labels, ...]
# Fixed, moving, weights of the one (or None), of the other.
Images = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(repr=False)
class Registration:
    """What `register` found.

    Attributes:
        displacement (Tensor): (1, nd, *spatial) fp32, voxels of the fixed grid; all of the motion.
        moved (Tensor): (1, C, *spatial) fp32, warp(moving, displacement), NaN under a mask continued from around it.
        levels (list[dict]): coarse to fine: shape, spacing_mm, iterations, loss_first, loss_last, similarity,
            regularity, regularization, strain and noise (what its weight was chosen by), intensities (their share of LCC), seconds.
        seconds (float): all of it, wall clock.
        affine (Tensor or None): (1, nd, nd + 1) fp32, voxels of the fixed grid: the affine part of the motion, a start that is
            one included. None: there is none, or the start is a field, in which it is not told apart.
        velocity (Tensor or None): (1, nd, *control) fp32, on the grid and in the voxels the last level optimised it;
            with transform="velocity" or symmetric. Integrated in 5 steps and resized it is the motion before the affine part
            (symmetric: between its two halves), but for places that folded.
        discrete (dict or None): of the search for large motion: used, why; where there was one range_mm, unit_mm, share (of the image,
            that began where it says), far_share and far_gain (the share that it moves over 8 mm otherwise than the coarse descent, and how
            much more alike the images are there), moved_mm (mean distance from where that was); these four not where its first level found nothing far; and seconds.
        start (str): "none", "centres", "masses", "search" or "given": where it began.
        similarity (str): "lcc", "mind", "mi" or "mse": what was compared by.
        consistency (float or None): at most 1, how well the signs of local correlations agreed at the start; below 0.1 "auto" takes
            "mind". NaN: too few had one. None: not looked at, with "mind" and "mi".
    """

    displacement: Tensor
    moved: Tensor
    levels: list[dict[str, Any]]
    seconds: float
    affine: Tensor | None = None
    velocity: Tensor | None = None
    start: str = "none"
    similarity: str = "lcc"
    consistency: float | None = None
    discrete: dict[str, Any] | None = None

    __repr__ = shapes

    def inverse(self) -> Tensor:
        """What warps the fixed image onto the moving one: v with ``compose(displacement, v)`` zero, in voxels of the same grid.

        By Newton's method, in a fraction of a second; its affine part exactly, however large. What comes from beyond the
        grid comes by that part and the border of what is beside it. Where the displacement folds it has no inverse, and v is
        finite: `fastreg.metrics.inverse_residual(displacement, v)` tells how good it is, in voxels.

        Returns:
            Tensor: (1, nd, *spatial) fp32.

        Example:
            >>> u = torch.full((1, 2, 4, 4), 0.5)
            >>> fastreg.Registration(u, u[:, :1], [], 0.0).inverse().unique()
            tensor([-0.5000])
        """
        return _inverse.invert(self.displacement)


def _pyramid(shape: Sequence[int], spacing: Sequence[float], levels: int | None) -> list[tuple[int, ...]]:
    """Shapes, coarse to fine. A step doubles the smallest spacing and leaves axes about as coarse."""
    shapes = [tuple(shape)]
    spacing = list(spacing)
    # an axis that is short, or has become it, stays; while that is true of no more than half of those to be halved it holds none up
    follow = [a for a in range(len(shape)) if shape[a] >= 2 * _SHORTEST]
    while follow and (levels is None or len(shapes) < levels):
        size = list(shapes[-1])
        target = 2.0 * min(spacing[a] for a in follow)
        halved = [a for a in follow if spacing[a] < target / 1.4]
        short = [a for a in halved if size[a] < 2 * _SHORTEST]
        if 2 * len(short) > len(halved):
            break
        if short:
            follow = [a for a in follow if a not in short]
            continue
        for a in halved:
            n = round((size[a] - 1) * spacing[a] / target) + 1
            spacing[a] *= (size[a] - 1) / (n - 1)
            size[a] = n
        shapes.append(tuple(size))
    return shapes[::-1]


def _resized(images: Images, shape: tuple[int, ...]) -> Images:
    fixed, moving, *weights = images
    mask, moving_mask = (None if w is None else _descent.resized(w, shape) for w in weights)
    return _descent.resized(fixed, shape), _descent.resized(moving, shape), mask, moving_mask


def _level(
    images: Images,
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    field: Tensor,
    transform: str,
    width: float | None,
    similarity: str,
    window: int,
    regularization: float,
    matrix: Tensor | None = None,
    terms: Terms = (),
    symmetric: bool = False,
    shares: Sequence[float] | None = None,
) -> _descent.Level:
    """The level of `shape` voxels; symmetric: with the other direction.

    Args: images: rescaled fixed and moving, their weights or None, at full size. spacing: mm, of those. field: of the level
    before. width: see _descent.transform. matrix: affine part, mm, or None. shares: of _channels.
    """
    fixed, moving, mask, weights = _resized(images, shape)
    full = images[0].shape[2:]
    affine = None
    if matrix is not None:
        size = _descent.spacing_of(shape, full, spacing)
        affine = _descent.affine_in_voxels(matrix, size).to(moving)
    moves = _descent.transform(transform, field, shape, full, spacing, width, symmetric)

    def one(fixed, mask, moving, weights, terms, back=None):  # type: ignore[no-untyped-def]
        compare = _channels.similarity(similarity, fixed, mask, window, shares)
        return _descent.Level(moving, compare, moves, matrix, affine, regularization, weights, terms, back)

    terms = tuple(t.at(shape) for t in terms)
    back = one(moving, weights, fixed, mask, tuple(t.back for t in terms)) if symmetric else None
    return one(fixed, mask, moving, weights, terms, back)


def _fit_affine(
    images: Images,
    shapes: list[tuple[int, ...]],
    spacing: tuple[float, ...],
    similarity: str,
    window: int,
    report: Callable[..., object] | None,
    plan: Sequence[int],
    kind: str = "affine",
    terms: Terms = (),
    symmetric: bool = False,
    shares: Sequence[float] | None = None,
) -> tuple[_affine.AffineFit, list[dict[str, Any]]]:
    """Coarse to fine; returns what was found and a record per level."""
    full = tuple(images[0].shape[2:])
    fit, records = _affine.AffineFit(full, spacing, kind == "rigid", symmetric), []
    for number, (shape, n_iterations) in enumerate(zip(shapes, plan, strict=True)):
        begun = time.perf_counter()
        fixed, moving, mask, weights = _resized(images, shape)
        size = _descent.spacing_of(shape, full, spacing)
        compare = _channels.similarity(similarity, fixed, mask, window, shares)
        here = tuple(t.at(shape) for t in terms)
        sides = [_affine.Side(moving, weights, compare, here)]
        if symmetric:
            compare = _channels.similarity(similarity, moving, weights, window, shares)
            sides.append(_affine.Side(fixed, mask, compare, tuple(t.back for t in here)))
        told = report and functools.partial(report, number)
        record = fit.descend(sides, size, n_iterations, _AFFINE_STEP, told)
        record = {"transform": kind, "shape": shape, "spacing_mm": size, **record}
        records.append({**record, "seconds": time.perf_counter() - begun})
    return fit, records


def _scan(
    name: str, image: Tensor, mask_name: str, mask: Tensor | None, moves: bool
) -> tuple[Tensor, Tensor | None]:
    """An image that is finite where its mask counts, and the mask in fp32, at most 1."""
    op = "register"
    if mask is None:
        return _check.scan(op, name, image), None
    mask = _check.scan(op, mask_name, mask)
    image = _check.scan(op, name, image, unless=mask)
    _check.mask(op, mask, image, mask_name)
    _check.same_device(op, mask_name, mask, name, image)
    least, most = mask.aminmax()
    if least < 0:
        _check.fail(op, mask_name, "be at least 0", f"{float(least):g}")
    # only ratios of weights count, and sums of large or tiny ones would leave fp32
    mask = (mask / most if most > 0 else mask).float()
    # what is not looked at must not reach its neighbours when the image is smoothed or interpolated
    known = mask > 0 if moves else image.isfinite().all(1, keepdim=True)
    return (_descent.filled(image, known) if known.any() else image.nan_to_num(0, 0, 0)), mask


def register(
    fixed: Tensor,  # (1, C, *spatial)
    moving: Tensor,  # (1, C, *spatial)
    *,
    spacing: float | Sequence[float] = 1.0,
    mask: Tensor | None = None,  # (1, 1, *spatial)
    moving_mask: Tensor | None = None,  # (1, 1, *spatial)
    start: str | Tensor | None = None,  # or (1, nd, nd + 1), or (1, nd, *spatial)
    search_range: float | None = None,
    similarity: _similarity.SimilarityName = "auto",
    channel_weights: Sequence[float] | None = None,
    transform: _descent.TransformName = "dense",
    affine: bool = False,
    window: int | None = None,
    regularization: float | Literal["auto"] = "auto",
    smoothing: float | None = None,
    levels: int | None = None,
    iterations: int | Sequence[int] = _ITERATIONS,
    learning_rate: float = 0.3,
    symmetric: bool = False,
    landmarks: tuple[Tensor, Tensor] | None = None,  # (K, nd) each
    landmark_weight: float = 1.0,
    labels: tuple[Tensor, Tensor] | None = None,  # (1, 1, *spatial) each
    label_weight: float = 1.0,
    preset: _adaptive.PresetName = "default",
    progress: Callable[[int, int, int, int, float], object] | None = None,
) -> Registration:
    """Finds u such that ``moving(p + u(p))`` looks like ``fixed(p)``. Runs on the device of the images, in fp32.

    ``minimise over u: similarity(fixed, warp(moving, u)) + regularization * diffusion(u)``, coarse to fine, by Adam; the
    diffusion in mm over mm.

    Args:
        fixed, moving (Tensor): (1, C, D, H, W) or (1, C, H, W), of one shape, any real dtype; finite where their mask is not 0.
        spacing (float or sequence): voxel size, mm, (z, y, x).
        mask (Tensor, optional): (1, 1, *spatial) >= 0, or bool: weight of each voxel of fixed. What has weight 0 is no more than
            surroundings of what counts, within half of its range around it.
        moving_mask (Tensor, optional): the same of moving, moved with it. What has weight 0 is not looked at: padding, NaN.
        start (str or Tensor, optional): where to begin; the motion found includes it. A matrix (1, nd, nd + 1) or a displacement
            (1, nd, *spatial), in voxels; "masses": those of the intensities above the background laid on each other; "auto": that
            where it is clearly better; "search": turned as well, by any angle. None or "none": as the images lie.
        search_range (float, optional): mm, at most the image's longest side: how far each place is searched before the finest level, for
            motion that no descent finds, as of organs that slide along a wall. Where it is used the level before the finest is left
            out, and the finest penalises only what it adds. None: 40; but 0, for none, where the longest side is under 100 mm or voxels are over 4.3 mm, with "velocity",
            symmetric, a matrix alone, landmarks or labels, or no iterations.
        similarity (str): "lcc", for images of one kind, also an inverted one; "mind", for those of different kinds (MIND-SSC); "mi", the
            same by mutual information of 32 bins, where an intensity means one thing all over the image;
            "auto": "mind" where the signs of local correlations say that they are, else "lcc" with a share of "mse" where intensities
            agree; "mse" for intensities that mean the same. Channels are rescaled to their range first.
        channel_weights (sequence, optional): how much each channel counts, all alike where None; only ratios matter. Of many
            channels, feature maps say, 4 are compared at a time: an iteration's memory does not grow with their number.
        transform (str): "dense" displacement; "velocity", stationary and integrated: invertible up to
            discretisation; "bspline", cubic; or a matrix alone: "rigid", a rotation in mm and a shift, or "affine".
        affine (bool): find an affine part first, for offsets that are small beside the image; the regularisation
            does not see it.
        window (int, optional): LCC window, voxels of the level, odd. None: 9 in 2D; in 3D 5, but 3 at the finest of several levels.
        regularization (float or str): weight of the mean squared strain (mm over mm). "auto": 1.5, and for the two finest levels 1, or up to 8
            where the coarser ones find the image little strained, as the insides of one person are, and noise; 3 where `search_range` was used; 2 for "mind", "mi" and "mse".
        smoothing (float, optional): standard deviation, mm, of the Gaussian on the finest level's updates; for
            "bspline" the spacing of its control points; twice as wide at each coarser level. None: the
            spacing of each level's displacement grid, of three levels and more 0.7 of it at a weight of 1 or less, all of it at 2; 4 voxels between control points.
        levels (int, optional): at most; None: halved while axes keep 12 voxels. Thick axes are halved last.
        iterations (int or sequence): at most, of every level or coarse to fine (the affine part takes up to 100 a
            level of its own, as "rigid" and "affine" do at most); where there are more levels than numbers the first serves the coarser ones, where fewer the
            first ones go unused. A flat loss ends a level. Where they are not given images so small that they have two levels or one take up to 60 at each.
        learning_rate (float): of Adam, in voxels of the displacement grid.
        symmetric (bool): what is found with fixed and moving exchanged is the inverse. Both directions are compared and their mean is
            minimised, over a velocity whatever the transform; a matrix is halved. Takes twice the time. A start is not part of it.
        landmarks (two Tensors, optional): (K, nd) voxels of fixed, and of moving, where each of them belongs: soft constraints.
            One pair that is far from what the others say is let go of.
        landmark_weight (float): 1: landmarks a tenth of the image's longest side apart, in the mean of squares, cost as much as
            images that have nothing in common; less and more in proportion.
        labels (two Tensors, optional): (1, 1, *spatial) integers, label maps of fixed and moving; those that both have, but 0, are
            laid on each other. Masks do not hide them.
        label_weight (float): 1: no overlap of any label costs as much as images that have nothing in common.
        preset (str): "fast": other defaults, for about a quarter of the time: nothing is searched, the finest level is left out and the others take at most
            50, 50 and 20 iterations. What is given explicitly stands.
        progress (callable, optional): ``progress(level, n_levels, iteration, n_iterations, loss)``; the affine
            part's levels come first and count.

    Returns:
        Registration: the displacement, the moved image and what each level did.

    Raises:
        TypeError: what is not a tensor, a number or a flag where one is needed.
        ValueError: shapes, devices or values do not fit; images that are not finite; a descent that diverges.

    Example:
        >>> y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
        >>> fixed = torch.exp(-((y - 11) ** 2 + (x - 12) ** 2) / 30)[None, None]  # a blob
        >>> moving = fixed.roll(2, -1)  # two voxels further to the right
        >>> result = fastreg.register(fixed, moving, similarity="mse")
        >>> result.displacement[0, 1, 11, 12].round()  # along x, in the middle of the blob
        tensor(2.)
        >>> fastreg.mse_loss(fixed, result.moved) < 0.01 * fastreg.mse_loss(fixed, moving)
        tensor(True)
    """
    began = time.perf_counter()
    op = "register"
    _check.flag(op, "symmetric", symmetric)
    given, given_mask = moving, moving_mask
    fixed, mask = _scan("fixed", fixed, "mask", mask, symmetric)
    fixed = _descent.within(fixed, mask)
    moving, moving_mask = _scan("moving", moving, "moving_mask", moving_mask, True)
    # as it is given, hidden places too: what is returned moved
    whole = moving if given_mask is None else _scan("moving", given, "moving_mask", given_mask, False)[0]
    _check.same_shape(op, "moving", moving, "fixed", fixed)
    _check.same_device(op, "moving", moving, "fixed", fixed)
    shares = _channels.shares_of(channel_weights, fixed.shape[1])
    if shares is not None and 0 in shares:  # nothing may look at these
        counted = [i for i, share in enumerate(shares) if share > 0]
        fixed, moving = fixed[:, counted], moving[:, counted]
        shares = _channels.shares_of([shares[i] for i in counted], len(counted))
    full = tuple(fixed.shape[2:])
    nd = len(full)
    spacing = tuple(_check.per_axis(op, "spacing", spacing, nd, strict=True))
    _check.choice(op, "similarity", similarity, _similarity.SIMILARITIES)
    _check.choice(op, "transform", transform, (*_descent.TRANSFORMS, *_descent.LINEAR))
    linear = transform in _descent.LINEAR
    if _check.flag(op, "affine", affine) and linear:
        _check.fail(op, "affine", f"be False with transform {transform!r}, which has nothing after it", True)
    if window is not None:
        window = _check.odd_window(op, window)
    heavy = None
    if isinstance(regularization, str):
        if regularization != "auto":
            _check.fail(op, "regularization", "be 'auto' or a number", repr(regularization))
    else:
        (heavy,) = _check.per_axis(op, "regularization", regularization, 1)
    if smoothing is not None:
        (smoothing,) = _check.per_axis(op, "smoothing", smoothing, 1)
        extent = max(s * n for s, n in zip(spacing, full, strict=True))
        if smoothing > extent:
            _check.fail(op, "smoothing", f"be at most the image's extent, {extent:g} mm", f"{smoothing:g}")
    (learning_rate,) = _check.per_axis(op, "learning_rate", learning_rate, 1, strict=True)
    if levels is not None:
        levels = _check.whole(op, "levels", levels, 1)
    _check.choice(op, "preset", preset, tuple(_adaptive.PRESETS))
    preset_plan = iterations is _ITERATIONS  # not given: what a caller writes out is another tuple
    if preset_plan:
        iterations = _adaptive.PRESETS[preset].get("iterations", iterations)
    if search_range is None:
        search_range = _adaptive.PRESETS[preset].get("search_range")
    if hasattr(iterations, "tolist"):  # numpy, torch
        iterations = iterations.tolist()
    numbers = iterations if isinstance(iterations, (tuple, list, range)) else [iterations]
    if not numbers:
        _check.fail(op, "iterations", "hold at least one number", "none")
    plan = [_check.whole(op, "iterations", n, 0) for n in numbers]
    if progress is not None and not callable(progress):
        _check.fail(op, "progress", "be callable", type(progress).__name__, TypeError)

    shapes = _pyramid(full, spacing, levels)
    numbers, plan = plan, ([plan[0]] * len(shapes) + plan[1:])[-len(shapes) :]
    if preset_plan and preset == "default" and levels is None and len(shapes) < 3:
        plan = [_SMALL] * len(shapes)
    if preset_plan and not any(plan):  # the only level is not left out
        plan[-1] = next(n for n in reversed(numbers) if n > 0)
    search = _discrete.range_of(search_range, full, spacing, transform, symmetric, plan)
    # The caller's no_grad, inference mode or autocast would each break the descent.
    device = fixed.device.type
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        mask, moving_mask = (None if m is None else m.clone() for m in (mask, moving_mask))
        begin = _start.of(start, (fixed, moving, mask, moving_mask), spacing)
        if begin is not None:
            moving, mask, moving_mask = begin.resampled(moving, mask, moving_mask)
        terms: Terms = _terms.landmarks_of(landmarks, landmark_weight, fixed, spacing, begin and begin.back)
        terms += _labels.labels_of(labels, label_weight, fixed, spacing, begin.laid if begin else None)
        if terms and search_range is None and search[0] > 0:
            search = 0.0, "landmarks or labels lead"  # which the search does not know of
        rescaled = (_descent.rescaled(fixed, mask), _descent.rescaled(moving, moving_mask))
        images = (*rescaled, mask, moving_mask)
        choice = _similarity.choose(similarity, *images, _pyramid(full, spacing, None), shares)
        records: list[dict[str, Any]] = []
        matrix, field = None, torch.zeros(1, nd, *[1] * nd, dtype=torch.float32, device=fixed.device)
        rough = (
            [s for s in shapes if math.prod(s) <= _AFFINE_VOXELS] or shapes[:1] if affine or linear else []
        )
        total = len(rough) + (0 if linear else len(shapes))
        searched, at, last = _discrete.Start(None, {"used": False, "why": search[1]}), -1, -1
        if search[0] > 0:
            last = max(i for i, n in enumerate(plan) if n > 0)
            at, total = max(last - 1, 0), total + 1
        if rough:
            report = progress and (lambda level, *rest: progress(level, total, *rest))
            most = [min(n, _AFFINE_ITERATIONS) if linear else _AFFINE_ITERATIONS for n in plan]
            compared, kind = (
                (choice.taken, window or _similarity.window_of(nd)),
                transform if linear else "affine",
            )
            options = *compared, report, most[: len(rough)], kind, terms, symmetric, shares
            fit, records = _fit_affine(images, rough, spacing, *options)
            matrix = fit.matrix(fit.motion)
        adapt = _adaptive.Adaptive(heavy, plan, choice.taken, similarity == "auto", smoothing is None)
        half = None
        if symmetric and affine:
            both = fit.matrix(fit.motion / 2), fit.matrix(-fit.motion / 2)
            half, back = (_descent.affine_in_voxels(m, spacing) for m in both)
            images, terms = _affine.halves(images, half, back), tuple(t.laid(*both) for t in terms)
        for number, (shape, n_iterations) in enumerate(zip(shapes, plan, strict=True)) if not linear else ():
            if number == at:
                report = progress and functools.partial(progress, len(rough) + number, total)
                searched = _discrete.start(images, spacing, field, matrix, search, shares, report)
                field = field if searched.field is None else searched.field
            if searched.field is not None and number < last:
                continue
            begun = time.perf_counter()
            width = None if smoothing is None else smoothing * 2.0 ** (len(shapes) - 1 - number)
            before = None if half is not None else matrix
            size = window or _similarity.window_of(nd, 0 < number == len(shapes) - 1)
            rest = choice.taken, size, adapt.weight, before, terms, symmetric, shares
            level = _level(images, shape, spacing, field, transform, width, *rest)
            if searched.field is not None:
                level.exempt = _fused.resize_displacement(searched.field, level.transform.base.shape[2:])
            report = progress and functools.partial(
                progress, len(rough) + number + (0 <= at <= number), total
            )
            told = adapt(level, number)
            field, record = _descent.descend(level, n_iterations, learning_rate, report)
            record = {
                "transform": transform,
                "shape": shape,
                "spacing_mm": _descent.spacing_of(shape, full, spacing),
                **record,
                **told,
            }
            records.append({**record, "seconds": time.perf_counter() - begun})
        with torch.no_grad():
            voxels = None if matrix is None else _descent.affine_in_voxels(matrix, spacing)
            own = None if voxels is None else voxels.to(field)
            displacement = None if linear else level.displacement(field)
            if half is not None:
                displacement = _affine.around(_descent.relaxed(displacement), half)
            elif own is not None:
                shift = _fused.affine_displacement(own, full)
                displacement = shift if linear else _descent.relaxed(displacement, shift) + shift
            else:
                displacement = _descent.relaxed(displacement)
            if begin is not None:
                displacement, whole_affine = begin.then(displacement), begin.after(voxels)
                own = None if whole_affine is None else whole_affine.to(field)
                if linear and own is not None:
                    displacement = _fused.affine_displacement(own, full)
            moved = _fused.warp(whole.float(), displacement)
    return Registration(
        displacement,
        moved,
        records,
        time.perf_counter() - began,
        affine=own,
        velocity=field if transform == "velocity" or (symmetric and not linear) else None,
        start="none" if begin is None else begin.taken,
        similarity=choice.taken,
        consistency=choice.consistency,
        discrete=searched.record,
    )
