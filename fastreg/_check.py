"""Checks of what users pass: ``fastreg::<op>: <argument> must <rule>, got <value>``."""

import operator
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._refusals import refuse

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What labels may be, and the type that passes them through arithmetic unchanged (int64 up to 2^53).
WHOLE = dict.fromkeys((torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16), torch.float32)
WHOLE |= dict.fromkeys((torch.int32, torch.uint32, torch.int64), torch.float64)
AXES = {2: "H, W", 3: "D, H, W"}
IMAGES = ("image", "fixed", "moving", "moved", "mask")


def fail(
    op: str, argument: str, rule: str, got: object, error: type[ValueError] | type[TypeError] = ValueError
) -> NoReturn:
    refuse(error, f"fastreg::{op}: ", f"{argument} must {rule}, got {got}")


def tensor(op: str, name: str, t: object) -> None:
    if isinstance(t, torch.Tensor):
        return
    hint = ""
    if type(t).__module__ == "numpy":
        shape = getattr(t, "shape", ())
        axes = "[None]" if shape and len(shape) == shape[0] + 1 else ""
        if name in IMAGES:
            axes = "[None, None]" if len(shape) in AXES else ""
        hint = f": pass torch.from_numpy({name}){axes}"
    fail(op, name, "be a tensor", f"{type(t).__name__}{hint}", TypeError)


def floating(op: str, **tensors: Any) -> None:
    """Real floating tensors on one device, outside the transforms through which ops have no derivative.

    A mask may be missing, or of bool.
    """
    device = None
    for name, t in tensors.items():
        if t is None and name == "mask":
            continue
        tensor(op, name, t)
        if t.dtype not in FLOATS and not (name == "mask" and t.dtype == torch.bool):
            rule = "be fp64, fp32, fp16, bf16 or bool" if name == "mask" else "be fp64, fp32, fp16 or bf16"
            hint = f": pass {name}.float()" if t.dtype in WHOLE else ""
            fail(op, name, rule, f"{t.dtype}{hint}", TypeError)
        if t.layout != torch.strided or t.is_nested:
            fail(op, name, "be a dense tensor", t.layout)
        device = device or t.device
        if t.device != device:
            fail(op, name, f"be on {device} as the other tensors", t.device)
    _no_forward_derivative(op, *tensors.values())


def _no_forward_derivative(op: str, *tensors: Tensor | None) -> None:
    """torch.func.grad and forward mode would see a silent zero tangent: refuse them."""
    if torch.compiler.is_compiling():
        return
    stack = torch._C._functorch.get_interpreter_stack()
    for interpreter in stack or ():
        if interpreter.key() in (
            torch._C._functorch.TransformType.Grad,
            torch._C._functorch.TransformType.Jvp,
        ):
            raise RuntimeError(
                f"fastreg::{op}: torch.func.grad, vjp and jvp are not supported; use torch.autograd.grad or .backward()"
            )
    if torch.autograd.forward_ad._current_level >= 0:
        for t in tensors:
            if isinstance(t, torch.Tensor) and torch.autograd.forward_ad.unpack_dual(t).tangent is not None:
                raise RuntimeError(f"fastreg::{op}: forward-mode differentiation is not supported")


def _requires_grad(t: Tensor) -> bool:
    """Seen through vmap's wrapper, which hides it."""
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_batchedtensor(t):
            t = torch._C._functorch.get_unwrapped(t)
    return t.requires_grad


def needs_grad(t: Tensor) -> bool:
    """Whether autograd wants a gradient to t."""
    return torch.is_grad_enabled() and _requires_grad(t)


def image(op: str, name: str, t: Tensor, nd: int | None = None) -> int:
    """(N, C, *spatial) of 2 or 3 axes; returns the number of axes."""
    rule = f"have shape (N, C, {AXES[nd]})" if nd else "have shape (N, C, D, H, W) or (N, C, H, W)"
    if t.dim() not in ((nd + 2,) if nd else (4, 5)):
        hint = f": pass {name}[None, None] for ({AXES[t.dim()]})" if t.dim() in AXES else ""
        hint += f", {name}[None] for (C, H, W)" if t.dim() == 3 else ""
        fail(op, name, rule, f"{tuple(t.shape)}{hint}")
    return t.dim() - 2


def displacement(
    op: str, name: str, t: Tensor, spatial: torch.Size | None = None, batch: int | None = None
) -> int:
    """(N, nd, *spatial); returns nd."""
    nd = len(spatial) if spatial is not None else t.dim() - 2
    rule = f"have shape (N, {nd}, {AXES[nd]})" if nd in AXES else "have shape (N, 3, D, H, W) or (N, 2, H, W)"
    if nd not in AXES or t.dim() != nd + 2 or t.shape[1] != nd:
        one = t.dim() in (3, 4) and t.shape[0] == t.dim() - 1 and nd in (t.shape[0], t.dim() - 2)
        fail(op, name, rule, f"{tuple(t.shape)}{f': pass {name}[None]' if one else ''}")
    if spatial is not None and t.shape[2:] != spatial:
        fail(op, name, f"{rule} with the spatial shape {tuple(spatial)}", tuple(t.shape))
    if batch is not None and t.shape[0] != batch:
        many = f": pass {name}.expand({batch}, *{name}.shape[1:])" if t.shape[0] == 1 else ""
        fail(op, name, f"{rule} with N = {batch}", f"{tuple(t.shape)}{many}")
    return nd


def affine(op: str, name: str, t: Tensor, nd: int | None = None, batch: int | None = None) -> int:
    """(N, nd, nd + 1); returns nd."""
    if nd is None:
        nd = t.shape[1] if t.dim() == 3 else None
    rule = f"have shape (N, {nd}, {nd + 1})" if nd in AXES else "have shape (N, 3, 4) or (N, 2, 3)"
    if nd not in AXES or t.dim() != 3 or t.shape[1:] != (nd, nd + 1):
        fail(op, name, rule, tuple(t.shape))
    if batch is not None and t.shape[0] != batch:
        fail(op, name, f"{rule} with N = {batch}", tuple(t.shape))
    return nd


def same_shape(op: str, name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.shape != other.shape:
        fail(op, name, f"have the shape {tuple(other.shape)} of {other_name}", tuple(t.shape))


def same_device(op: str, name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.device != other.device:
        fail(op, name, f"be on the device of {other_name}, {other.device}", t.device)


def scan(op: str, name: str, image: Tensor, unless: Tensor | None = None) -> Tensor:
    """An image of one sample, detached, finite but where `unless` is 0; fp32, or fp64 where fp32 could round a small range on a
    large offset away.
    """
    tensor(op, name, image)
    if image.layout != torch.strided or image.device.type == "meta":
        kind = "meta" if image.device.type == "meta" else str(image.layout).removeprefix("torch.")
        fail(op, name, "be a dense tensor with data", f"a {kind} one", TypeError)
    if image.dtype.is_complex or (image.dtype == torch.bool and "mask" not in name):
        fail(op, name, "have a real dtype", image.dtype, TypeError)
    if image.ndim not in (4, 5) or image.shape[0] != 1:
        hint = f": pass {name}[None, None]" if image.ndim in AXES else ""
        fail(op, name, "have shape (1, C, D, H, W) or (1, C, H, W)", f"{tuple(image.shape)}{hint}")
    if image.numel() == 0:
        fail(op, name, "not be empty", tuple(image.shape))
    image = image.detach()
    single = image.float()
    bad = ~torch.isfinite(single)
    if unless is not None and unless.device == bad.device and unless.shape[2:] == bad.shape[2:]:
        bad = bad & (unless > 0)
    if bad.any():
        fail(op, name, "be finite", f"{int(bad.sum())} NaN or infinite values")
    return image.double() if image.dtype != torch.float32 and image.dtype.itemsize > 2 else single


def mask(op: str, t: Tensor | None, image: Tensor, name: str = "mask") -> Tensor | None:
    """(N, 1, *spatial) weights without a gradient; bool ones as 0 and 1 in the dtype of the image."""
    if t is None:
        return None
    shape = (image.shape[0], 1, *image.shape[2:])
    if t.shape != shape:
        fail(op, name, f"have shape {tuple(shape)}", tuple(t.shape))
    if _requires_grad(t):
        fail(op, name, "not require a gradient", "requires_grad=True")
    return t.to(image.dtype) if t.dtype == torch.bool else t


def odd_window(op: str, value: Any) -> int:
    """An odd whole number, as an int."""
    value = whole(op, "window", value, float("-inf"), float("inf"))
    if value < 1 or value % 2 == 0 or value >= 2**31:
        fail(op, "window", "be odd and positive", value)
    return value


def flag(op: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        fail(op, name, "be True or False", repr(value), TypeError)
    return value


def choice(op: str, name: str, value: Any, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        fail(op, name, "be " + " or ".join(repr(a) for a in allowed), repr(value))


def per_axis(
    op: str, name: str, value: Any, nd: int, *, minimum: float = 0.0, strict: bool = False
) -> list[float]:
    """A finite number, or one per axis, as a list of nd floats, each >= minimum (> where strict)."""
    try:
        if isinstance(value, (str, bytes, set, frozenset, dict)):
            raise TypeError
        single = isinstance(value, Real) or getattr(value, "ndim", None) == 0
        values = [float(value)] * nd if single else [float(v) for v in value]
    except (TypeError, ValueError, OverflowError):
        fail(op, name, "be a number" if nd == 1 else f"be a number or {nd} numbers", repr(value), TypeError)
    sign = ">" if strict else ">="
    good = len(values) == nd and all(
        minimum < v < float("inf") or (v == minimum and not strict) for v in values
    )
    if not good:
        rule = f"be a number {sign} {minimum:g}"
        fail(op, name, rule if nd == 1 else f"{rule}, or one per axis ({nd})", value)
    return values


def whole(op: str, name: str, value: Any, least: float, most: float = 2**31 - 1) -> int:
    """A whole number from `least` to `most`, as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        fail(op, name, "be an int", repr(value), TypeError)
    number = int(value)
    if not least <= number <= most:
        rule = f"be from {least} to {most}" if most < 2**31 - 1 else f"be at least {least}"
        fail(op, name, rule, number)
    return number


def sizes(op: str, name: str, value: Any, nd: int, least: int, *, one_for_all: bool = False) -> list[int]:
    """A whole number per axis, symbolic ones too, or where allowed one for all; as a list."""
    numbers: list[Any]
    rule = f"be {'an integer or ' if one_for_all else ''}{nd} integers"
    try:
        if one_for_all and hasattr(value, "__index__"):
            value = [value] * nd
        numbers = [n if isinstance(n, (int, torch.SymInt)) else operator.index(n) for n in value]
    except TypeError:
        fail(op, name, rule, repr(value), TypeError)
    if len(numbers) != nd or not all(n >= least for n in numbers):
        fail(op, name, f"{rule} >= {least}", tuple(numbers))
    return numbers


def whole_per_axis(
    op: str, name: str, value: Any, nd: int, *, minimum: int = 0, limit: int = 2**15
) -> list[int]:
    """A whole number, or one per axis, as a list of nd ints, each in [minimum, limit)."""
    values = [value] * nd if isinstance(value, Integral) else value
    if not isinstance(values, (list, tuple)) or not all(
        isinstance(v, Integral) and not isinstance(v, bool) for v in values
    ):
        fail(op, name, f"be an int or {nd} ints", repr(value), TypeError)
    if len(values) != nd or not all(minimum <= v < limit for v in values):
        fail(op, name, f"be an int >= {minimum} and below {limit}, or one per axis ({nd})", value)
    return [int(v) for v in values]
