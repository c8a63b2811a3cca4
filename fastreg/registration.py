"""Pairwise deformable registration, coarse to fine, by gradient descent on a dense displacement.

    minimise over u:  lcc_loss(fixed, warp(moving, u), padding="valid") + regularization * diffusion(u)

with the diffusion in mm over mm. Each level sees the images at its own voxel size; its displacement
lives on a grid twice as coarse, where regulariser, smoothing and optimiser cost an eighth, and is
resized for the warp. A level starts from the one before and seeks an increment G * p (G a Gaussian):
smoothing the parameter rather than the result also smooths the gradient, and Adam's per-voxel scaling
cannot tear the field. After each level, places that fold are relaxed.
"""

import functools
import math
import time
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn.functional as F

from . import ops as _fused

__all__ = ["Registration", "register"]

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
_SHORTEST = 12  # voxels an axis must keep to be halved once more
# Standard deviation, in units of the image's range, below which a window counts as noise. Clamped, because
# an added floor would everywhere reward a displacement for raising the contrast of what it fetches.
_NOISE = 3e-2
_EPS = 1e-2  # gradients this small, each voxel's share of the loss being 1, do not earn Adam's full step
_LEAST_JACOBIAN = 0.05
_FLAT = 1e-4  # a level ends when ten iterations gain less than this share of its loss


@dataclass
class Registration:
    """What `register` found.

    displacement (Tensor): (1, nd, *spatial) fp32, voxels of the fixed grid.
    moved (Tensor): (1, C, *spatial) fp32, warp(moving, displacement).
    levels (list[dict]): coarse to fine: shape, spacing_mm, iterations, loss_first, loss_last, similarity,
        regularity, seconds.
    seconds (float): all of it, wall clock.
    """

    displacement: torch.Tensor
    moved: torch.Tensor
    levels: list
    seconds: float


def _fail(kind, text):
    raise kind(f"fastreg::register: {text}")


def _numbers(name, value, count, *, least=None, above=None):
    """value or its repetition, as a tuple of `count` finite floats."""
    many = isinstance(value, (tuple, list)) or getattr(value, "ndim", 0) > 0
    values = tuple(value) if many else (value,) * count
    bound = f"at least {least}" if above is None else f"above {above}"
    for v in values:
        if not isinstance(v, Real) and not hasattr(v, "__float__"):
            _fail(TypeError, f"{name} must be a number or {count} of them, got {value!r}")
    values = tuple(float(v) for v in values)
    if len(values) != count:
        _fail(ValueError, f"{name} must be a number or {count} of them, got {len(values)}")
    for v in values:
        if not math.isfinite(v) or (least is not None and v < least) or (above is not None and v <= above):
            _fail(ValueError, f"{name} must be {bound}, got {value!r}")
    return values


def _count(name, value, least):
    if not isinstance(value, Integral) or isinstance(value, bool):
        _fail(TypeError, f"{name} must be a whole number, got {value!r}")
    if value < least:
        _fail(ValueError, f"{name} must be at least {least}, got {value}")
    return int(value)


def _image(name, image):
    """Detached, checked; fp32, or fp64 where fp32 could round a small range on a large offset away."""
    if not isinstance(image, torch.Tensor):
        _fail(TypeError, f"{name} must be a tensor, got {type(image).__name__}")
    if image.layout != torch.strided or image.device.type == "meta":
        kind = "meta" if image.device.type == "meta" else str(image.layout).removeprefix("torch.")
        _fail(TypeError, f"{name} must be a dense tensor with data, got a {kind} one")
    if image.dtype.is_complex or image.dtype == torch.bool:
        _fail(TypeError, f"{name} must have a real dtype, got {image.dtype}")
    if image.ndim not in (4, 5) or image.shape[0] != 1:
        _fail(ValueError, f"{name} must have shape (1, C, D, H, W) or (1, C, H, W), got {tuple(image.shape)}")
    if image.numel() == 0:
        _fail(ValueError, f"{name} must not be empty, got {tuple(image.shape)}")
    image = image.detach()
    single = image.float()
    if not torch.isfinite(single).all():
        bad = int((~torch.isfinite(single)).sum())
        _fail(ValueError, f"{name} must be finite, got {bad} NaN or infinite values")
    return image.double() if image.dtype != torch.float32 and image.dtype.itemsize > 2 else single


def _rescaled(image, mask=None):
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


def _pyramid(shape, spacing, levels):
    """Shapes, coarse to fine. A step doubles the smallest spacing and leaves axes about as coarse."""
    shapes = [tuple(shape)]
    spacing = list(spacing)
    # an axis that starts out short (a stack of thick slices) stays, and does not hold the others up
    follow = [a for a in range(len(shape)) if shape[a] >= 2 * _SHORTEST]
    while follow and (levels is None or len(shapes) < levels):
        size = list(shapes[-1])
        target = 2.0 * min(spacing[a] for a in follow)
        halved = [a for a in follow if spacing[a] < target / 1.4]
        if any(size[a] < 2 * _SHORTEST for a in halved):
            break
        for a in halved:
            n = round((size[a] - 1) * spacing[a] / target) + 1
            spacing[a] *= (size[a] - 1) / (n - 1)
            size[a] = n
        shapes.append(tuple(size))
    return shapes[::-1]


def _spacing(shape, full, spacing):
    """mm per voxel of a grid of `shape` whose corner voxels sit on those of the full grid."""
    grids = zip(spacing, full, shape, strict=True)
    return tuple(s * (f - 1) / max(n - 1, 1) if f > 1 else s for s, f, n in grids)


def _control_shape(shape, spacing):
    """The displacement's grid: voxels twice as large as the finest spacing, never finer than the image."""
    axes = list(zip(shape, spacing, strict=True))
    target = 2.0 * min((s for n, s in axes if n > 1), default=1.0)
    return tuple(min(n, max(4, math.ceil((n - 1) * s / target) + 1)) for n, s in axes)


def _resized(image, shape):
    before = tuple(image.shape[2:])
    if before == tuple(shape):
        return image
    ratio = [(b - 1) / max(s - 1, 1) for b, s in zip(before, shape, strict=True)]
    image = _fused.smooth(image, [0.5 * math.sqrt(max(r * r - 1.0, 0.0)) for r in ratio])
    return F.interpolate(image, size=tuple(shape), mode=_LINEAR[len(before)], align_corners=True)


@dataclass
class _Level:
    """All that an iteration needs; `objective` may be called with other ops, to compare like with like."""

    fixed: torch.Tensor
    moving: torch.Tensor
    mask: torch.Tensor | None
    base: torch.Tensor  # displacement to start from, (1, nd, *control), control voxels
    scale: torch.Tensor  # (1, nd, 1, ...): control voxels of the finest axis to those of each axis
    spacing: tuple  # mm, of the control grid
    sigma: tuple  # control voxels
    window: int
    regularization: float

    def displacement(self, parameter, ops=_fused):
        return self.base + ops.smooth(parameter * self.scale, self.sigma)

    def objective(self, parameter, ops=_fused):
        """Returns (loss, similarity, regularity), scalars; the first is differentiable in parameter."""
        control = self.displacement(parameter, ops)
        dense = ops.resize_displacement(control, self.fixed.shape[2:])
        moved = ops.warp(self.moving, dense, padding="border")
        # each variance gets a noise floor; they are sums, hence times the window's volume
        floor = _NOISE**2 * math.prod(min(self.window, n) for n in self.fixed.shape[2:])
        similarity = ops.lcc_loss(
            self.fixed,
            moved,
            self.window,
            mask=self.mask,
            padding="valid",
            smooth_dr=floor,
            denominator="clamp",
        )
        regularity = ops.diffusion(control, spacing=self.spacing)
        return similarity + self.regularization * regularity, similarity, regularity

    def iterate(self, parameter, optimizer, ops=_fused):
        """One step of the descent; returns (loss, similarity, regularity) from before it, detached."""
        optimizer.zero_grad()
        terms = self.objective(parameter, ops)
        # as a sum over voxels: gradients, and so Adam's epsilon, then mean the same at every size
        (terms[0] * (parameter.numel() / parameter.shape[1])).backward()
        optimizer.step()
        return tuple(t.detach() for t in terms)


def _level(images, shape, spacing, displacement, width, window, regularization):
    """The level of `shape` voxels.

    Args: images: rescaled fixed and moving, mask or None, at full size. spacing: mm, of those.
    displacement: to start from, (1, nd, *any). width (float or None): of the smoothing, mm; None: a voxel
    of the displacement's grid.
    """
    fixed, moving, mask = images
    full = fixed.shape[2:]
    control = _control_shape(shape, _spacing(shape, full, spacing))
    size = _spacing(control, full, spacing)
    finest = min((s for s, n in zip(size, full, strict=True) if n > 1), default=size[0])
    width = finest if width is None else width
    return _Level(
        fixed=_resized(fixed, shape),
        moving=_resized(moving, shape),
        mask=None if mask is None else _resized(mask, shape),
        base=_fused.resize_displacement(displacement, control),
        scale=torch.tensor([finest / s for s in size], device=fixed.device).reshape(1, -1, *[1] * len(shape)),
        spacing=size,
        sigma=tuple(width / s for s in size),
        window=window,
        regularization=regularization,
    )


def _optimizer(parameter, learning_rate):
    return torch.optim.Adam([parameter], lr=learning_rate, eps=_EPS, fused=True)


def _relax(u, rounds=60):
    """u with its folds smoothed away: where the determinant is not safely positive, u becomes its average."""
    for _ in range(rounds):
        bad = _fused.jacobian_determinant(u) < _LEAST_JACOBIAN
        if not bad.any():
            break
        weight = bad.reshape(1, 1, *u.shape[2:]).to(u.dtype)
        weight = (3.0 * _fused.smooth(weight, 1.0)).clamp(max=1.0)
        u = torch.lerp(u, _fused.smooth(u, 1.0), weight)
    return u


def _finite(loss):
    if not math.isfinite(loss):
        hint = "a smaller learning_rate or regularization may keep it so"
        _fail(ValueError, f"the loss must stay finite, got {loss} ({hint})")


def _descend(level, n_iterations, learning_rate, report):
    """Returns the level's displacement, on its control grid, and what happened."""
    parameter = torch.zeros_like(level.base, requires_grad=True)
    optimizer = _optimizer(parameter, learning_rate)
    losses, similarity, regularity = [], None, None
    for i in range(n_iterations):
        loss, similarity, regularity = level.iterate(parameter, optimizer)
        losses.append(float(loss))
        _finite(losses[-1])
        if report is not None:
            report(i, n_iterations, losses[-1])
        if i >= 20 and losses[-11] - min(losses[-5:]) <= _FLAT * abs(losses[-1]):
            break
    with torch.no_grad():
        displacement = level.displacement(parameter)
        # the last step has no loss yet; squares, because the next one would be of those
        _finite(float(displacement.square().sum()))
        displacement = _relax(displacement)
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    return displacement, {
        "iterations": len(losses),
        "loss_first": first,
        "loss_last": last,
        "similarity": None if similarity is None else float(similarity),
        "regularity": None if regularity is None else float(regularity),
    }


def register(
    fixed,
    moving,
    *,
    spacing=1.0,
    mask=None,
    window=9,
    regularization=2.0,
    smoothing=None,
    levels=None,
    iterations=(100, 100, 60, 30),
    learning_rate=0.3,
    progress=None,
):
    """Finds u such that moving(p + u(p)) looks like fixed(p). Runs on the device of the images, in fp32.

    Args:
        fixed, moving (Tensor): (1, C, D, H, W) or (1, C, H, W), of one shape, finite, any real dtype.
        spacing (float or sequence): voxel size, mm, (z, y, x).
        mask (Tensor or None): (1, 1, *spatial) >= 0, weight of each voxel of fixed.
        window (int): LCC window, voxels of the level, odd.
        regularization (float): weight of the mean squared strain (mm over mm).
        smoothing (float or None): standard deviation, mm, of the Gaussian on the finest level's updates;
            twice as wide at each coarser level. None: the spacing of each level's displacement grid.
        levels (int or None): at most; None: halved while axes keep 12 voxels. Thick axes are halved last.
        iterations (int or sequence): at most, of every level or coarse to fine; where there are more levels
            than numbers the first serves the coarser ones, where fewer the first ones go unused. A flat
            loss ends a level.
        learning_rate (float): of Adam, in voxels of the displacement grid.
        progress (callable or None): progress(level, n_levels, iteration, n_iterations, loss).

    Returns: Registration.

    Errors: TypeError, ValueError.
    """
    start = time.perf_counter()
    fixed, moving = _image("fixed", fixed), _image("moving", moving)
    if fixed.shape != moving.shape:
        shapes = tuple(fixed.shape), tuple(moving.shape)
        _fail(ValueError, "moving must have the shape {} of fixed, got {}".format(*shapes))
    if fixed.device != moving.device:
        _fail(ValueError, f"moving must be on the device of fixed, {fixed.device}, got {moving.device}")
    full = tuple(fixed.shape[2:])
    nd = len(full)
    spacing = _numbers("spacing", spacing, nd, above=0.0)
    if mask is not None:
        mask = _image("mask", mask)
        if mask.shape != (1, 1, *full):
            _fail(ValueError, f"mask must have shape {(1, 1, *full)}, got {tuple(mask.shape)}")
        if mask.device != fixed.device:
            _fail(ValueError, f"mask must be on the device of fixed, {fixed.device}, got {mask.device}")
        if (mask < 0).any():
            _fail(ValueError, f"mask must be at least 0, got {float(mask.min()):g}")
        # only ratios of weights count, and sums of large or tiny ones would leave fp32
        mask = (mask / mask.max() if mask.any() else mask).float()
    window = _count("window", window, 1)
    if window % 2 == 0:
        _fail(ValueError, f"window must be odd, got {window}")
    (regularization,) = _numbers("regularization", regularization, 1, least=0.0)
    if smoothing is not None:
        (smoothing,) = _numbers("smoothing", smoothing, 1, least=0.0)
    (learning_rate,) = _numbers("learning_rate", learning_rate, 1, above=0.0)
    if levels is not None:
        levels = _count("levels", levels, 1)
    if hasattr(iterations, "tolist"):  # numpy, torch
        iterations = iterations.tolist()
    plan = list(iterations) if isinstance(iterations, (tuple, list, range)) else [iterations]
    if not plan:
        _fail(ValueError, "iterations must hold at least one number, got none")
    plan = [_count("iterations", n, 0) for n in plan]
    if progress is not None and not callable(progress):
        _fail(TypeError, f"progress must be callable, got {type(progress).__name__}")

    shapes = _pyramid(full, spacing, levels)
    plan = ([plan[0]] * len(shapes) + plan[1:])[-len(shapes) :]
    # The caller's no_grad, inference mode or autocast would each break the descent.
    device = fixed.device.type
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        images = (_rescaled(fixed, mask), _rescaled(moving), None if mask is None else mask.clone())
        records, displacement = [], torch.zeros(1, nd, *[1] * nd, device=fixed.device)
        for number, (shape, n_iterations) in enumerate(zip(shapes, plan, strict=True)):
            begun = time.perf_counter()
            width = None if smoothing is None else smoothing * 2.0 ** (len(shapes) - 1 - number)
            level = _level(images, shape, spacing, displacement, width, window, regularization)
            report = progress and functools.partial(progress, number, len(shapes))
            displacement, record = _descend(level, n_iterations, learning_rate, report)
            record = {"shape": shape, "spacing_mm": _spacing(shape, full, spacing), **record}
            records.append({**record, "seconds": time.perf_counter() - begun})
        with torch.no_grad():
            displacement = _relax(_fused.resize_displacement(displacement, full))
            moved = _fused.warp(moving.float(), displacement)
    return Registration(displacement, moved, records, time.perf_counter() - start)
