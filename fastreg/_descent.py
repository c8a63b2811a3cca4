"""One level of `fastreg.register`: what is minimised, over which parameters, and the descent.

A level compares the images at its own voxel size. Its transform turns parameters into a displacement of
that size; every transform starts from the field the level before ended with and seeks an increment that is
smooth by construction: smoothing the parameter rather than the result also smooths the gradient, and
Adam's per-voxel scaling cannot tear the field.

dense     u = base + G * p, on a grid twice as coarse, where regulariser, smoothing and optimiser cost an
          eighth; interpolated where the image is read, never held at its size
velocity  the same for a stationary velocity, integrated on its grid: invertible up to discretisation
bspline   u = base + cubic B-splines with control points p: the sum over levels is a multilevel B-spline
affine    (before the others, or alone) x -> M x + b in mm, M and b about the centre of the image; the sampling position is
          A p + u(p), with a velocity A (p + u(p)), which is as invertible as u
rigid     the same with M the exponential of a skew matrix, a rotation in mm

Symmetric, the field v is a velocity whatever the transform, exp(v) and exp(-v) are compared, each with the image it leads to, and
the mean of both is minimised: with the images exchanged -v follows the same path. A matrix is the exponential of its generator, -G
that of its inverse; its half, exp(G / 2), is laid on both images before the rest is found.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check, nn
from . import ops as _fused
from ._adam import Adam
from .ops.bspline_displacement import control_shape

TransformName = Literal["dense", "velocity", "bspline", "rigid", "affine"]
LINEAR = ("rigid", "affine")  # one matrix, and nothing after it
TRANSFORMS = tuple(name for name in get_args(TransformName) if name not in LINEAR)
HELD = 4  # channels that are compared, or made smaller, at a time
STEPS = 5  # squarings of a velocity; 7 and 9 gave the same folds

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
# What a similarity is multiplied by, so that one regularization and one Adam epsilon suit all.
WEIGHT = {"lcc": 1.0, "mind": 0.5, "mi": 0.5, "mse": 20.0}
_BINS = 32  # of mutual information
# Standard deviation, in units of the image's range, below which a window counts as noise. Clamped, because
# an added floor would everywhere reward a displacement for raising the contrast of what it fetches.
_NOISE = 3e-2
_EPS = 1e-2  # gradients this small, each voxel's share of the loss being 1, do not earn Adam's full step
_LEAST_JACOBIAN = 0.05
_FLAT = 1e-4  # a level ends when ten iterations gain less than this share of its loss
_ROOM = 0.5  # of the range of what counts
_KNOT = 4  # voxels between control points, along the axis of the finest spacing


def spacing_of(shape, full, spacing):
    """mm per voxel of a grid of `shape` whose corner voxels sit on those of the full grid."""
    grids = zip(spacing, full, shape, strict=True)
    return tuple(s * (f - 1) / max(n - 1, 1) if f > 1 else s for s, f, n in grids)


def grid_shape(shape, spacing):
    """The displacement's grid: voxels twice as large as the finest spacing, never finer than the image."""
    axes = list(zip(shape, spacing, strict=True))
    target = 2.0 * min((s for n, s in axes if n > 1), default=1.0)
    return tuple(min(n, max(4, math.ceil((n - 1) * s / target) + 1)) for n, s in axes)


def resized(image: Tensor, shape: tuple[int, ...]) -> Tensor:
    before = tuple(image.shape[2:])
    if before == tuple(shape):
        return image
    if image.shape[1] > HELD:
        return torch.cat([resized(few, shape) for few in image.split(HELD, 1)], 1)
    ratio = [(b - 1) / max(s - 1, 1) for b, s in zip(before, shape, strict=True)]
    image = _fused.smooth(image, [0.5 * math.sqrt(max(r * r - 1.0, 0.0)) for r in ratio])
    return F.interpolate(image, size=tuple(shape), mode=_LINEAR[len(before)], align_corners=True)


def rescaled(image: Tensor, mask: Tensor | None = None) -> Tensor:
    """Each channel with its 0.5 % and 99.5 % quantiles (where mask > 0) at 0 and 1; a constant channel is 0.

    LCC is invariant to this but for its noise floor, which has to know what a large difference is."""
    out = []
    for channel in image[0]:
        sample = channel.flatten() if mask is None else channel[mask[0, 0] > 0]
        if sample.numel() == 0:
            sample = channel.flatten()
        sample = sample[:: max(1, sample.numel() // 1_000_000)].double()
        low, high = torch.quantile(sample, sample.new_tensor([0.005, 0.995]))
        if not high > low:
            low, high = sample.min(), sample.max()
        # in fp64, or a small range on a large offset would be rounded twice
        span = high - low
        out.append(
            ((channel.double() - low) / span).float() if span > 0 else torch.zeros_like(channel).float()
        )
    return torch.stack(out)[None]


def filled(image: Tensor, known: Tensor) -> Tensor:
    """image, (1, C, *spatial), where known (1, 1, *spatial) is true; else averages over larger and larger blocks of it."""
    if known.all():
        return image
    if not known.any():
        return torch.zeros_like(image)
    pool = F.avg_pool3d if image.ndim == 5 else F.avg_pool2d
    step = [min(2, n) for n in image.shape[2:]]
    share = pool(known.to(image.dtype), step, ceil_mode=True, count_include_pad=False)
    total = pool(image.masked_fill(~known, 0), step, ceil_mode=True, count_include_pad=False)
    coarse = filled(total / share.clamp(min=torch.finfo(image.dtype).tiny), share > 0)
    around = F.interpolate(coarse, size=image.shape[2:], mode=_LINEAR[image.ndim - 2])
    return torch.where(known, image, around)


def within(image: Tensor, mask: Tensor | None) -> Tensor:
    """An image that stays: what its mask hides helps to find what is beside it, but not where it is padding or metal, far from all that
    counts, which coarse levels would spread. It is kept within half of the range of what counts around that."""
    if mask is None or not (counts := mask > 0).any():
        return image
    parts = []
    for channel in image.split(1, 1):
        low, high = channel[counts].aminmax()
        room = _ROOM * (high - low)
        parts.append(torch.where(counts, channel, channel.clamp(low - room, high + room)))
    return torch.cat(parts, 1)


def _finest(spacing, shape):
    return min((s for s, n in zip(spacing, shape, strict=True) if n > 1), default=spacing[0])


# Transforms: parameter -> the field that is regularised -> motion, on the field's grid


@dataclass
class Dense:
    base: Tensor  # field to start from, (1, nd, *control), control voxels
    scale: Tensor  # (1, nd, 1, ...): control voxels of the finest axis to those of each axis
    spacing: tuple  # mm, of the control grid
    sigma: tuple  # control voxels
    shape: tuple  # of the level

    def parameter(self):
        return torch.zeros_like(self.base, requires_grad=True)

    def field(self, parameter, ops=_fused):
        return self.base + ops.smooth(parameter * self.scale, self.sigma)

    def motion(self, field, ops=_fused):
        return field

    def relaxed(self, field, shift):
        return relaxed(field, shift)


class Velocity(Dense):
    def motion(self, field, ops=_fused):
        return ops.integrate_velocity(field, STEPS)

    def relaxed(self, field, shift):
        return field


@dataclass
class BSpline:
    base: Tensor  # displacement to start from, (1, nd, *shape)
    scale: Tensor
    spacing: tuple  # mm, of the level
    knots: tuple  # voxels between control points
    shape: tuple

    def parameter(self):
        control = control_shape(self.shape, self.knots)
        return self.base.new_zeros((*self.base.shape[:2], *control)).requires_grad_()

    def field(self, parameter, ops=_fused):
        return self.base + ops.bspline_displacement(parameter * self.scale, self.knots, self.shape)

    def motion(self, field, ops=_fused):
        return field

    def relaxed(self, field, shift):
        return relaxed(field, shift)


class BSplineVelocity(BSpline):
    def motion(self, field, ops=_fused):
        return ops.integrate_velocity(field, STEPS)

    def relaxed(self, field, shift):
        return field


def transform(kind, field, shape, full, spacing, width, symmetric=False):
    """The transform of the level of `shape` voxels.

    Args: field: to start from, (1, nd, *any), as `Dense.field` gives it. full, spacing: of the fixed image, mm.
    width (float or None): mm; of the Gaussian on updates (None: a voxel of the control grid), for "bspline" between
    control points (None: 4 voxels). symmetric: the field is a velocity.
    """
    bspline = kind == "bspline"
    grid = tuple(shape) if bspline else grid_shape(shape, spacing_of(shape, full, spacing))
    size = spacing_of(grid, full, spacing)
    finest = _finest(size, full)
    scale = torch.tensor([finest / s for s in size], dtype=torch.float32, device=field.device)
    scale = scale.reshape(1, -1, *[1] * len(grid))
    base = _fused.resize_displacement(field, grid)
    if bspline:
        width = _KNOT * finest if width is None else width
        knots = tuple(min(max(round(width / s), 1), max(n - 1, 1)) for s, n in zip(size, grid, strict=True))
        return (BSplineVelocity if symmetric else BSpline)(base, scale, size, knots, tuple(shape))
    width = finest if width is None else width
    sigma = tuple(width / s for s in size)
    return (Velocity if symmetric or kind == "velocity" else Dense)(base, scale, size, sigma, tuple(shape))


# Levels


class Similarity:
    """How well a moved image fits the level's fixed one, to be minimised."""

    # MIND prepares the fixed image, and so is always fastreg's.
    def __init__(self, kind, fixed, mask, window):
        self.kind, self.fixed, self.mask, self.window = kind, fixed, mask, window
        # each variance gets a noise floor; they are sums, hence times the window's volume
        self.floor = _NOISE**2 * math.prod(min(window, n) for n in fixed.shape[2:])
        self.share = WEIGHT[kind]  # of the loss
        self.intensities = 0.0  # of LCC: the share of it that mse takes
        self.prepared = nn.MINDLoss(radius=1, dilation=2).prepare(fixed) if kind == "mind" else None

    def masked(self, weights):
        """What counts of both images; weights: of the moved one, (1, 1, *shape), or None."""
        if weights is None or self.mask is None:
            return self.mask if weights is None else weights
        return self.mask * weights

    def __call__(self, moved, ops=_fused, weights=None):
        mask = self.masked(weights)
        if self.kind == "mind":
            return self.prepared(moved, mask=mask)
        if self.kind == "mi":
            return ops.mi_loss(self.fixed, moved, bins=_BINS, mask=mask)
        if self.kind == "mse":
            return ops.mse_loss(self.fixed, moved, mask=mask)
        value = ops.lcc_loss(
            self.fixed,
            moved,
            self.window,
            mask=mask,
            padding="valid",
            smooth_dr=self.floor,
            denominator="clamp",
        )
        if self.intensities > 0:
            difference = WEIGHT["mse"] * ops.mse_loss(self.fixed, moved, mask=mask)
            value = (1 - self.intensities) * value + self.intensities * difference
        return value

    def compare(self, moving, move, by, ops=_fused, weights=None):
        """Of move(moving, by)."""
        return self(move(moving, by), ops, weights)


def warped(image, u, affine, ops=_fused):
    """By a displacement on the grid of the image or another one."""
    given = {} if affine is None else {"affine": affine}
    warp = ops.warp if u is None or u.shape[2:] == image.shape[2:] else ops.warp_coarse
    return warp(image, u, padding="border", **given)


def moved_weights(weights, u, affine):
    """What of the moving image counts, where it is now: it goes along, and pulls at nothing."""
    if weights is None:
        return None
    with torch.no_grad():
        return warped(weights, u, affine)


@dataclass
class Level:
    """All that an iteration needs; `objective` may be called with other ops, to compare like with like."""

    moving: Tensor
    similarity: Similarity
    transform: Dense | Velocity | BSpline
    matrix: Tensor | None  # affine part, (nd, nd + 1), mm
    affine: Tensor | None  # the same, (1, nd, nd + 1), voxels of the level
    regularization: float
    weights: Tensor | None = None  # of the moving image
    terms: tuple = ()  # of _terms
    back: "Level | None" = None  # symmetric: the other direction
    exempt: Tensor | None = None  # of the field: what the regulariser does not see, (1, nd, *control)

    def motion(self, field, ops=_fused):
        """The displacement without the affine part, on the field's grid."""
        u = self.transform.motion(field, ops)
        if self.affine is not None and isinstance(self.transform, Velocity):
            affine = affine_in_voxels(self.matrix, self.transform.spacing).to(u)
            u = torch.einsum("nij,nj...->ni...", affine[..., :-1], u)
        return u

    def displacement(self, field):
        """The same on the level's grid."""
        return _fused.resize_displacement(self.motion(field), self.transform.shape)

    def compared(self, field, ops=_fused):
        """(similarity, the sum of the terms)."""
        u = self.motion(field, ops)
        weights = moved_weights(self.weights, u, self.affine)

        def move(image, u):
            return warped(image, u, self.affine, ops)

        similarity = self.similarity.compare(self.moving, move, u, ops, weights)
        others = [term(u, self.transform.spacing, self.matrix) for term in self.terms]
        return similarity, sum(others, 0.0)

    def objective(self, parameter, ops=_fused):
        """Returns (loss, similarity, regularity), scalars; the first is differentiable in parameter."""
        field = self.transform.field(parameter, ops)
        similarity, others = self.compared(field, ops)
        if self.back is not None:
            similarity, others = (
                (a + b) / 2
                for a, b in zip((similarity, others), self.back.compared(-field, ops), strict=True)
            )
        added = field if self.exempt is None else field - self.exempt
        regularity = ops.diffusion(added, spacing=self.transform.spacing)
        loss = self.similarity.share * similarity + self.regularization * regularity + others
        return loss, similarity, regularity

    def iterate(self, parameter, optimizer, ops=_fused):
        """One step of the descent; returns (loss, similarity, regularity) from before it, detached."""
        optimizer.zero_grad()
        terms = self.objective(parameter, ops)
        # as a sum over voxels: gradients, and so Adam's epsilon, then mean the same at every size
        (terms[0] * (parameter.numel() / parameter.shape[1])).backward()
        optimizer.step()
        return tuple(t.detach() for t in terms)


def optimizer(parameter, learning_rate):
    return Adam(parameter, learning_rate, _EPS)


def relaxed(u, shift=None, rounds=60):
    """u with its folds smoothed away: where the determinant of x + u (+ shift) is not safely positive, u
    becomes its average."""
    for _ in range(rounds):
        bad = _fused.jacobian_determinant(u if shift is None else u + shift) < _LEAST_JACOBIAN
        if not bad.any():
            break
        weight = bad.reshape(1, 1, *u.shape[2:]).to(u.dtype)
        weight = (3.0 * _fused.smooth(weight, 1.0)).clamp(max=1.0)
        u = torch.lerp(u, _fused.smooth(u, 1.0), weight)
    return u


def _finite(loss):
    if not math.isfinite(loss):
        hint = "a smaller learning_rate or regularization may keep it so"
        _check.fail("register", "the loss", "stay finite", f"{loss} ({hint})")


def _minimise(step, n_iterations, report, least=20):
    """Calls step() up to n_iterations times, until after `least` the loss is flat; returns what happened."""
    losses, terms = [], (None, None, None)
    for i in range(n_iterations):
        terms = step()
        losses.append(float(terms[0]))
        _finite(losses[-1])
        if report is not None:
            report(i, n_iterations, losses[-1])
        if i >= max(least, 10) and losses[-11] - min(losses[-5:]) <= _FLAT * abs(losses[-1]):
            break
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    similarity, regularity = (None if t is None else float(t) for t in terms[1:])
    return {
        "iterations": len(losses),
        "loss_first": first,
        "loss_last": last,
        "similarity": similarity,
        "regularity": regularity,
    }


def descend(level, n_iterations, learning_rate, report):
    """Returns the level's field and what happened."""
    parameter = level.transform.parameter()
    adam = optimizer(parameter, learning_rate)
    record = _minimise(lambda: level.iterate(parameter, adam), n_iterations, report)
    with torch.no_grad():
        field = level.transform.field(parameter)
        # the last step has no loss yet; squares, because the next one would be of those
        _finite(float(field.square().sum()))
        shift = None
        if level.matrix is not None:
            affine = affine_in_voxels(level.matrix, level.transform.spacing).to(field)
            shift = _fused.affine_displacement(affine, field.shape[2:])
        field = level.transform.relaxed(field, shift)
    return field, record


# Affine


def affine_in_voxels(matrix, spacing):
    """(nd, nd + 1) in mm -> (1, nd, nd + 1) in voxels of `spacing`; the origin is voxel 0 in both."""
    s = matrix.new_tensor(spacing)
    return torch.cat([matrix[:, :-1] * s / s[:, None], matrix[:, -1:] / s[:, None]], 1)[None]
