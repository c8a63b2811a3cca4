"""The ops as modules: options at construction, tensors at the call; names and defaults of the functions.

warp, loss = fastreg.nn.Warp(padding="border"), fastreg.nn.LCCLoss(window=7)
loss(fixed, warp(moving, displacement), mask=mask)
"""

import inspect

import torch

from fastreg import ops


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


class Warp(_Op, op=ops.warp, inputs=("image", "displacement")):
    """``forward(image, displacement)``: see fastreg.warp."""


class ResizeDisplacement(_Op, op=ops.resize_displacement, inputs=("u",)):
    """``forward(u)``: see fastreg.resize_displacement."""


class Smooth(_Op, op=ops.smooth, inputs=("u",)):
    """``forward(u)``: see fastreg.smooth."""


class LCCLoss(_Op, op=ops.lcc_loss, inputs=("fixed", "moved", "mask")):
    """``forward(fixed, moved, mask=None)``: see fastreg.lcc_loss."""


class MSELoss(_Op, op=ops.mse_loss, inputs=("fixed", "moved", "mask")):
    """``forward(fixed, moved, mask=None)``: see fastreg.mse_loss."""


class Diffusion(_Op, op=ops.diffusion, inputs=("u",)):
    """``forward(u)``: see fastreg.diffusion."""


__all__ = [name for name, value in globals().items() if inspect.isclass(value) and not name.startswith("_")]
