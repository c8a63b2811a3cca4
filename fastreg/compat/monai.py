"""MONAI 1.6.1: losses and blocks of registration. ``DiceLoss`` and the networks stay MONAI's."""

import math
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastreg import _check, ops
from fastreg.compat import Difference

__all__ = [
    "DVF2DDF",
    "BendingEnergyLoss",
    "DiffusionLoss",
    "GlobalMutualInformationLoss",
    "LocalNormalizedCrossCorrelationLoss",
    "Warp",
]

KERNELS = {"rectangular": "box", "triangular": "triangular", "gaussian": "gaussian"}
REDUCTIONS = {"mean": "mean", "sum": "sum", "none": "none"}
MODES = {"bilinear": "linear", "nearest": "nearest"}
PADDINGS = {"border": "border", "zeros": "zeros", "reflection": "reflection"}

DIFFERENCES = (
    Difference(
        "LocalNormalizedCrossCorrelationLoss",
        "a window without contrast divides rounding by `smooth_dr`: -1.4e9 in fp32 on half-flat images of 0 to 255",
        "such a window counts as 0, without a gradient",
        "variances are computed from shifted values, not as a difference of raw sums",
    ),
    Difference(
        "LocalNormalizedCrossCorrelationLoss",
        "`kernel_type='triangular', kernel_size=3` is a window of one voxel: 0 for any pair, or `-smooth_nr / smooth_dr^2`",
        "0, and a warning when it is made",
        "one voxel has no correlation: nothing would be trained",
    ),
    Difference(
        "LocalNormalizedCrossCorrelationLoss",
        "`spatial_dims=1`",
        "NotImplementedError",
        "the op is for images and volumes",
    ),
    Difference(
        "LocalNormalizedCrossCorrelationLoss",
        "weights of the windows are fp32",
        "weights are fp64; up to 1e-7 from theirs",
        "fp64 images deserve fp64 windows",
    ),
    Difference(
        "LocalNormalizedCrossCorrelationLoss, BendingEnergyLoss, DiffusionLoss, GlobalMutualInformationLoss",
        "results of half images are half: an energy beyond 65504 is infinite",
        "results of half images are fp32",
        "a loss is a sum of many small terms",
    ),
    Difference(
        "GlobalMutualInformationLoss",
        "`kernel_type='b-spline'`: bins on the range of the whole batch; constant images are NaN",
        "NotImplementedError: `fastreg.mi_loss(kernel='bspline')` has bins on the range of each sample",
        "a sample's loss should not depend on what else is in its batch",
    ),
    Difference(
        "GlobalMutualInformationLoss",
        "any `sigma_ratio`, `smooth_nr` and `smooth_dr`",
        "their defaults only; else NotImplementedError",
        "constants of the op",
    ),
    Difference(
        "Warp, DVF2DDF",
        "a mode it does not know is taken as bilinear, a padding as border (without its compiled extension)",
        "ValueError; modes and bounds given as integers, and bicubic, are refused too",
        "a typing error should not train another model",
    ),
    Difference(
        "Warp",
        "`jitter=True` shifts by the same noise at every call, half a voxel on average",
        "NotImplementedError",
        "the result would be displaced",
    ),
    Difference(
        "Warp, DVF2DDF",
        "positions pass through [-1, 1]: gradient at whole voxels from either side by rounding, 0 at clamped faces",
        "positions in voxels: gradient at whole voxels towards larger indices",
        "a training starts at zero displacement, where all voxels are whole",
    ),
    Difference(
        "Warp, DVF2DDF",
        "a NaN displacement reads the border, or 0",
        "that voxel is NaN",
        "an error should be seen",
    ),
)


def _fail(name: str, argument: str, rule: str, got: object) -> None:
    _check.fail(f"compat.monai.{name}", argument, rule, got)


class _Loss(nn.Module):
    def __init__(self, reduction: str) -> None:
        super().__init__()
        self._choice("reduction", reduction, REDUCTIONS)
        self.reduction = REDUCTIONS[reduction]

    def _choice(self, argument: str, value: Any, allowed: dict[str, str]) -> None:
        _check.choice(f"compat.monai.{type(self).__name__}", argument, value, tuple(allowed))

    def _pair(self, pred: Tensor, target: Tensor) -> None:
        if target.shape != pred.shape:
            _fail(
                type(self).__name__,
                "target",
                f"have the shape {tuple(pred.shape)} of pred",
                tuple(target.shape),
            )


class LocalNormalizedCrossCorrelationLoss(_Loss):
    """``fastreg.lcc_loss(target, pred, kernel_size, denominator="clamp")``.

    Flat windows count as 0. ``triangular`` with a kernel_size of 3 is a window of one voxel, always 0: warned about.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        kernel_size: int = 3,
        kernel_type: str = "rectangular",
        reduction: str = "mean",
        smooth_nr: float = 0.0,
        smooth_dr: float = 1e-5,
    ) -> None:
        super().__init__(reduction)
        name = type(self).__name__
        if spatial_dims not in (1, 2, 3):
            _fail(name, "spatial_dims", "be 1, 2 or 3", spatial_dims)
        if spatial_dims == 1:
            raise NotImplementedError(f"fastreg::compat.monai.{name}: spatial_dims=1 is MONAI's alone")
        if kernel_size % 2 == 0:
            _fail(name, "kernel_size", "be odd", kernel_size)
        self._choice("kernel_type", kernel_type, KERNELS)
        if kernel_size == 1 or (kernel_type == "triangular" and kernel_size == 3):
            warnings.warn(
                f"fastreg: a {kernel_type} window of size {kernel_size} is one voxel: the loss is 0 for any pair",
                stacklevel=2,
            )
        self.ndim, self.kernel_size, self.kernel_type = spatial_dims, kernel_size, KERNELS[kernel_type]
        self.smooth_nr, self.smooth_dr = float(smooth_nr), float(smooth_dr)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        if pred.ndim != self.ndim + 2:
            _fail(type(self).__name__, "pred", f"have {self.ndim} spatial axes", tuple(pred.shape))
        self._pair(pred, target)
        if self.reduction == "none":  # channels as samples: the op averages over channels
            shape = (-1, 1, *pred.shape[2:])
            return self._lcc(pred.reshape(shape), target.reshape(shape)).view(pred.shape)
        return self._lcc(pred, target)

    def _lcc(self, pred: Tensor, target: Tensor) -> Tensor:
        return ops.lcc_loss(
            target,
            pred,
            self.kernel_size,
            kernel=self.kernel_type,  # type: ignore[arg-type]
            smooth_nr=self.smooth_nr,
            smooth_dr=self.smooth_dr,
            denominator="clamp",
            reduction=self.reduction,  # type: ignore[arg-type]
        )


class GlobalMutualInformationLoss(_Loss):
    """``fastreg.mi_loss(target, pred, bins=num_bins)``: Gaussian windows, intensities in [0, 1].

    ``b-spline`` and other constants than the defaults raise NotImplementedError.
    """

    def __init__(
        self,
        kernel_type: str = "gaussian",
        num_bins: int = 23,
        sigma_ratio: float = 0.5,
        reduction: str = "mean",
        smooth_nr: float = 1e-7,
        smooth_dr: float = 1e-7,
    ) -> None:
        super().__init__(reduction)
        if num_bins < 2:
            _fail(type(self).__name__, "num_bins", "be at least 2", num_bins)
        self._choice("kernel_type", kernel_type, {"gaussian": "", "b-spline": ""})
        if kernel_type == "b-spline":
            raise NotImplementedError(
                "fastreg::compat.monai.GlobalMutualInformationLoss: kernel_type 'b-spline'; fastreg.mi_loss(fixed, moved, "
                "kernel='bspline') is near it, with bins on the range of each sample"
            )
        if (sigma_ratio, smooth_nr, smooth_dr) != (0.5, 1e-7, 1e-7):
            raise NotImplementedError(
                "fastreg::compat.monai.GlobalMutualInformationLoss: sigma_ratio other than 0.5, smooth_nr and smooth_dr "
                f"other than 1e-7, got {sigma_ratio}, {smooth_nr}, {smooth_dr}"
            )
        self.num_bins = num_bins

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        self._pair(pred, target)
        shape = (pred.shape[0], 1, 1, math.prod(pred.shape[1:]))  # a histogram has no axes
        return ops.mi_loss(
            target.reshape(shape),
            pred.reshape(shape),
            bins=self.num_bins,
            reduction=self.reduction,  # type: ignore[arg-type]
        )


class _Regulariser(_Loss):
    def __init__(self, normalize: bool = False, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.normalize = normalize

    def _checked(self, pred: Tensor) -> None:
        name = type(self).__name__
        if pred.ndim not in (3, 4, 5) or pred.shape[1] != pred.ndim - 2:
            _fail(
                name,
                "pred",
                "have shape (N, 3, D, H, W), (N, 2, H, W) or (N, 1, W)",
                tuple(pred.shape),
            )
        if min(pred.shape[2:]) <= 2:
            _fail(name, "pred", "have more than 2 voxels along each axis", tuple(pred.shape))

    def _reduced(self, energy: Tensor) -> Tensor:
        if self.reduction == "none":
            return energy
        return energy.sum() if self.reduction == "sum" else energy.mean()


def _wide(u: Tensor) -> Tensor:
    return u if u.dtype == torch.float64 else u.float()


def _shifted(u: Tensor, by: Mapping[int, int] = MappingProxyType({})) -> Tensor:
    """u(p + by) of the voxels inside the faces, by in voxels along dimensions."""
    for axis in range(2, u.ndim):
        u = u.narrow(axis, 1 + by.get(axis, 0), u.shape[axis] - 2)
    return u


def _component_sizes(u: Tensor) -> Tensor:
    """N_i of component i, as (1, nd, 1...)."""
    return torch.tensor(u.shape[2:], dtype=u.dtype, device=u.device).view(1, -1, *[1] * (u.ndim - 2))


class BendingEnergyLoss(_Regulariser):
    """``fastreg.bending_energy(pred)``; normalize: with a spacing of 1 / size per axis.

    ``reduction="none"`` and 1D hold the map of derivatives in memory, as theirs does.
    """

    def forward(self, pred: Tensor) -> Tensor:
        self._checked(pred)
        if pred.ndim == 3 or self.reduction == "none":
            return self._reduced(self._map(_wide(pred)))
        spacing = [1 / n for n in pred.shape[2:]] if self.normalize else None
        energy = ops.bending_energy(pred, spacing=spacing)
        if self.reduction == "mean":
            return energy
        return energy * (pred.shape[0] * pred.shape[1] * math.prod(n - 2 for n in pred.shape[2:]))

    def _map(self, u: Tensor) -> Tensor:
        total = u.new_zeros(())
        for i in range(2, u.ndim):
            for j in range(i, u.ndim):
                if i == j:
                    d = _shifted(u, {i: 1}) - 2 * _shifted(u) + _shifted(u, {i: -1})
                else:
                    equal = _shifted(u, {i: 1, j: 1}) + _shifted(u, {i: -1, j: -1})
                    d = (equal - _shifted(u, {i: 1, j: -1}) - _shifted(u, {i: -1, j: 1})) / 4
                if self.normalize:
                    d = d * (u.shape[i] * u.shape[j] / _component_sizes(u))
                total = total + (1 if i == j else 2) * d.square()
        return total


class DiffusionLoss(_Regulariser):
    """Mean of the squared central differences ``(u(p + e) - u(p - e)) / 2``, summed over axes, inside the faces.

    It does not see a checkerboard; ``fastreg.diffusion`` takes forward differences, does, and is a mean over axes.
    """

    def forward(self, pred: Tensor) -> Tensor:
        self._checked(pred)
        u = _wide(pred)
        total = u.new_zeros(())
        for i in range(2, u.ndim):
            d = (_shifted(u, {i: 1}) - _shifted(u, {i: -1})) / 2
            if self.normalize:
                d = d * (u.shape[i] / _component_sizes(u))
            total = total + d.square()
        return self._reduced(total)


class Warp(nn.Module):
    """``fastreg.warp(image, ddf, padding="border")``: displacement in voxels, components in the order of the axes."""

    def __init__(self, mode: str = "bilinear", padding_mode: str = "border", jitter: bool = False) -> None:
        super().__init__()
        name = f"compat.monai.{type(self).__name__}"
        _check.choice(name, "mode", mode, tuple(MODES))
        _check.choice(name, "padding_mode", padding_mode, tuple(PADDINGS))
        if jitter:
            raise NotImplementedError(f"fastreg::{name}: jitter, which shifts every image by half a voxel")
        self.mode, self.padding = MODES[mode], PADDINGS[padding_mode]

    def forward(self, image: Tensor, ddf: Tensor) -> Tensor:
        nd = image.ndim - 2
        if nd not in (2, 3):
            raise NotImplementedError(
                f"fastreg::compat.monai.Warp: image must have 2 or 3 spatial axes, got {tuple(image.shape)}"
            )
        shape = (image.shape[0], nd, *image.shape[2:])
        if ddf.shape != shape:
            _fail("Warp", "ddf", f"have shape {shape}", tuple(ddf.shape))
        return ops.warp(image, ddf, mode=self.mode, padding=self.padding)  # type: ignore[arg-type]


class DVF2DDF(nn.Module):
    """``fastreg.integrate_velocity(dvf, num_steps, padding="zeros")``."""

    def __init__(self, num_steps: int = 7, mode: str = "bilinear", padding_mode: str = "zeros") -> None:
        super().__init__()
        if num_steps <= 0:
            _fail("DVF2DDF", "num_steps", "be positive", num_steps)
        self.num_steps = num_steps
        self.warp_layer = Warp(mode=mode, padding_mode=padding_mode)

    def forward(self, dvf: Tensor) -> Tensor:
        layer = self.warp_layer
        if layer.mode == "linear":
            return ops.integrate_velocity(dvf, self.num_steps, padding=layer.padding)  # type: ignore[arg-type]
        ddf = dvf / 2**self.num_steps
        for _ in range(self.num_steps):
            ddf = ddf + layer(ddf, ddf)
        return ddf
