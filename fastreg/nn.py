"""The ops as modules: options at construction, tensors at the call; names and defaults of the functions.

warp, loss = fastreg.nn.Warp(padding="border"), fastreg.nn.LCCLoss(window=7)
loss(fixed, warp(moving, displacement), mask=mask)
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastreg import ops
from fastreg.ops.mind_loss import check_mind_loss, mind_loss_prepared, prepare_mind


class _Op(torch.nn.Module):
    """Has the signature of its op: unknown options fail at construction, values are checked at the call.

    The tensors of the op are arguments of ``forward``, in their order; the rest are options. Docstrings are the op's.
    """

    op: Callable[..., Tensor]
    inputs: tuple[str, ...]
    __signature__: inspect.Signature

    def __init_subclass__(cls, op: Callable[..., Tensor]) -> None:
        super().__init_subclass__()
        parameters = inspect.signature(op).parameters.values()
        tensors = [p for p in parameters if p.annotation in (Tensor, Tensor | None)]
        cls.op, cls.inputs = staticmethod(op), tuple(p.name for p in tensors)
        options = [p for p in parameters if p not in tensors]
        cls.__signature__ = inspect.Signature(options)

        def forward(self: _Op, *tensors: Tensor, **named: Tensor) -> Tensor:
            if len(tensors) > len(self.inputs):
                raise TypeError(
                    f"{type(self).__name__} takes {', '.join(self.inputs)}, got {len(tensors)} tensors"
                )
            return self.op(**dict(zip(self.inputs, tensors, strict=False)), **named, **self.options)

        # None stands at its place: mask and affine may be given by position too.
        order = [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in tensors),
        ]
        vars(forward)["__signature__"] = inspect.Signature(order, return_annotation=Tensor)
        about, arguments, rest = _parts(op)
        call = ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in order[1:])
        own = inspect.cleandoc(cls.__doc__ or "")
        forward.__doc__ = _joined(about[:1], arguments, cls.inputs, rest)
        forward.__qualname__ = f"{cls.__qualname__}.forward"
        cls.forward = forward
        about = [
            *about[:1],
            f"``forward({call})`` is :func:`fastreg.{op.__name__}` with these options.",
            own,
            *about[1:],
        ]
        cls.__doc__ = _joined(about, arguments, [p.name for p in options], [])

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        try:
            self.options = self.__signature__.bind(*args, **options).arguments
        except TypeError as error:
            names = ", ".join(self.__signature__.parameters) or "none"
            raise TypeError(f"{type(self).__name__}: {error}; its options: {names}") from None

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _parts(op: Callable[..., Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Of a docstring: the paragraphs before its sections, the entries of Args, the sections Returns and Raises."""
    text, *sections = re.split(r"\n\n(?=\w+:\n)", inspect.getdoc(op) or "")
    named = {s.split(":", 1)[0]: s for s in sections}
    entries = re.split(r"\n(?=    \S)", named.get("Args", ""))[1:]
    return text.split("\n\n"), entries, [named[name] for name in ("Returns", "Raises") if name in named]


def _joined(about: list[str], arguments: list[str], names: Any, rest: list[str]) -> str:
    """A docstring with the entries of these arguments."""
    kept = [a for a in arguments if set(re.findall(r"\w+", re.split(r"[:(]", a)[0])) & set(names)]
    return "\n\n".join([*filter(None, about), *(["\n".join(["Args:", *kept])] if kept else []), *rest])


class Warp(_Op, op=ops.warp): ...


class WarpCoarse(_Op, op=ops.warp_coarse): ...


class Compose(_Op, op=ops.compose): ...


class IntegrateVelocity(_Op, op=ops.integrate_velocity): ...


class InvertDisplacement(_Op, op=ops.invert_displacement): ...


class ResizeDisplacement(_Op, op=ops.resize_displacement): ...


class Smooth(_Op, op=ops.smooth): ...


class AffineDisplacement(_Op, op=ops.affine_displacement): ...


class BSplineDisplacement(_Op, op=ops.bspline_displacement): ...


class GaussianDisplacement(_Op, op=ops.gaussian_displacement): ...


class IntegrateGradients(_Op, op=ops.integrate_gradients): ...


class JacobianDeterminant(_Op, op=ops.jacobian_determinant): ...


class LocalCorrelation(_Op, op=ops.local_correlation): ...


class CostVolume(_Op, op=ops.cost_volume): ...


class MIND(_Op, op=ops.mind): ...


class LCCLoss(_Op, op=ops.lcc_loss): ...


class MINDLoss(_Op, op=ops.mind_loss):
    """For one fixed image and many moved ones, what depends on the fixed one alone is computed once:

    >>> fixed, moved = torch.rand(2, 1, 1, 8, 8)
    >>> loss = fastreg.nn.MINDLoss(radius=1)
    >>> torch.equal(loss.prepare(fixed)(moved), loss(fixed, moved))
    True
    """

    def prepare(self, fixed: Tensor, mask: Tensor | None = None) -> torch.nn.Module:
        """torch.nn.Module: ``forward(moved, mask=None)`` against this image, to which no gradient flows.

        mask: that of the calls, which is only needed where values of fixed that it leaves out are not finite.
        """
        return _PreparedMINDLoss(fixed, mask, self.options)


class MSELoss(_Op, op=ops.mse_loss): ...


class MILoss(_Op, op=ops.mi_loss): ...


class Diffusion(_Op, op=ops.diffusion): ...


class TotalVariation(_Op, op=ops.total_variation): ...


class BendingEnergy(_Op, op=ops.bending_energy): ...


class _PreparedMINDLoss(torch.nn.Module):
    """Holds the fixed image and one number per sample: the mean that bounds V, which costs a pass over the image."""

    fixed: Tensor
    variance: Tensor

    def __init__(self, fixed: Tensor, mask: Tensor | None, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = dict(options)
        check_mind_loss(**{k: v for k, v in options.items() if k in ("norm", "reduction")})
        descriptor = {k: v for k, v in options.items() if k not in ("norm", "reduction")}
        variance = prepare_mind(fixed, mask, **descriptor)
        # A copy: the image may be a buffer that is filled anew.
        self.register_buffer("fixed", fixed.detach().clone(), persistent=False)
        self.register_buffer("variance", variance.detach(), persistent=False)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> torch.nn.Module:
        # half() must not touch the mean: V of CT units overflows one.
        variance = self.variance
        super()._apply(fn, recurse)
        self.variance = variance.to(self.fixed.device)
        return self

    def forward(self, moved: Tensor, mask: Tensor | None = None) -> Tensor:
        return mind_loss_prepared(self.fixed, self.variance, moved, mask=mask, **self.options)


__all__ = [
    name
    for name, value in globals().items()
    if inspect.isclass(value) and issubclass(value, _Op) and value is not _Op
]
