"""The ops as modules: options at construction, tensors at the call; names and defaults of the functions.

warp, loss = fastreg.nn.Warp(padding="border"), fastreg.nn.LCCLoss(window=7)
loss(fixed, warp(moving, displacement), mask=mask)
"""

import inspect

import torch

from fastreg import ops
from fastreg.ops.mind_loss import check_mind_loss, mind_loss_prepared, prepare_mind


class _Op(torch.nn.Module):
    """Has the signature of its op: unknown options fail at construction, values are checked at the call."""

    def __init_subclass__(cls, op, inputs):
        super().__init_subclass__()
        cls.op, cls.inputs = staticmethod(op), inputs
        options = [p for name, p in inspect.signature(op).parameters.items() if name not in inputs]
        cls.__signature__ = inspect.Signature(options)

    def __init__(self, *args, **options):
        super().__init__()
        self.options = self.__signature__.bind(*args, **options).arguments

    def forward(self, *tensors, **named):
        if len(tensors) > len(self.inputs):
            raise TypeError(
                f"{type(self).__name__} takes {', '.join(self.inputs)}, got {len(tensors)} tensors"
            )
        return self.op(**dict(zip(self.inputs, tensors, strict=False)), **named, **self.options)

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class Warp(_Op, op=ops.warp, inputs=("image", "displacement", "affine")):
    """``forward(image, displacement, affine=None)``: see fastreg.warp."""


class Compose(_Op, op=ops.compose, inputs=("u", "v")):
    """``forward(u, v)``: see fastreg.compose."""


class IntegrateVelocity(_Op, op=ops.integrate_velocity, inputs=("v",)):
    """``forward(v)``: see fastreg.integrate_velocity."""


class ResizeDisplacement(_Op, op=ops.resize_displacement, inputs=("u",)):
    """``forward(u)``: see fastreg.resize_displacement."""


class Smooth(_Op, op=ops.smooth, inputs=("u",)):
    """``forward(u)``: see fastreg.smooth."""


class BSplineDisplacement(_Op, op=ops.bspline_displacement, inputs=("coefficients",)):
    """``forward(coefficients)``: see fastreg.bspline_displacement."""


class GaussianDisplacement(_Op, op=ops.gaussian_displacement, inputs=("params",)):
    """``forward(params)``: see fastreg.gaussian_displacement."""


class JacobianDeterminant(_Op, op=ops.jacobian_determinant, inputs=("u",)):
    """``forward(u)``: see fastreg.jacobian_determinant."""


class IntegrateGradients(_Op, op=ops.integrate_gradients, inputs=("phi",)):
    """``forward(phi)``: see fastreg.integrate_gradients."""


class LocalCorrelation(_Op, op=ops.local_correlation, inputs=("fixed", "moving", "displacement")):
    """``forward(fixed, moving, displacement=None)``: see fastreg.local_correlation."""


class LCCLoss(_Op, op=ops.lcc_loss, inputs=("fixed", "moved", "mask")):
    """``forward(fixed, moved, mask=None)``: see fastreg.lcc_loss."""


class MIND(_Op, op=ops.mind, inputs=("image",)):
    """``forward(image)``: see fastreg.mind."""


class MINDLoss(_Op, op=ops.mind_loss, inputs=("fixed", "moved", "mask")):
    """``forward(fixed, moved, mask=None)``: see fastreg.mind_loss. For one fixed image and many moved ones:

    loss = fastreg.nn.MINDLoss(radius=2).prepare(fixed)
    loss(moved, mask=mask)  # the bits of fastreg.nn.MINDLoss(radius=2)(fixed, moved, mask)
    """

    def prepare(self, fixed):
        """torch.nn.Module: ``forward(moved, mask=None)`` against this image, to which no gradient flows."""
        return _PreparedMINDLoss(fixed, self.options)


class _PreparedMINDLoss(torch.nn.Module):
    """Holds the fixed image and one number per sample: the mean that bounds V, which costs a pass over the image."""

    def __init__(self, fixed, options):
        super().__init__()
        self.options = dict(options)
        check_mind_loss(**{k: v for k, v in options.items() if k in ("norm", "reduction")})
        descriptor = {k: v for k, v in options.items() if k not in ("norm", "reduction")}
        variance = prepare_mind(fixed, **descriptor)
        # A copy: the image may be a buffer that is filled anew.
        self.register_buffer("fixed", fixed.detach().clone(), persistent=False)
        self.register_buffer("variance", variance.detach(), persistent=False)

    def _apply(self, fn, recurse=True):
        # half() must not touch the mean: V of CT units overflows one.
        variance = self.variance
        super()._apply(fn, recurse)
        self.variance = variance.to(self.fixed.device)
        return self

    def forward(self, moved, mask=None):
        return mind_loss_prepared(self.fixed, self.variance, moved, mask=mask, **self.options)


class MSELoss(_Op, op=ops.mse_loss, inputs=("fixed", "moved", "mask")):
    """``forward(fixed, moved, mask=None)``: see fastreg.mse_loss."""


class Diffusion(_Op, op=ops.diffusion, inputs=("u",)):
    """``forward(u)``: see fastreg.diffusion."""


class TotalVariation(_Op, op=ops.total_variation, inputs=("u",)):
    """``forward(u)``: see fastreg.total_variation."""


class BendingEnergy(_Op, op=ops.bending_energy, inputs=("u",)):
    """``forward(u)``: see fastreg.bending_energy."""


__all__ = [name for name, value in globals().items() if inspect.isclass(value) and not name.startswith("_")]
