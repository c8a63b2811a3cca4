"""What the entries of a checkpoint may be, looked at before anything is built of them.

A checkpoint comes from other machines and other people: an entry of another kind than `Run` writes must end in one line, never in
a traceback, in weights that are none or in a loop without end.
"""

import collections.abc
import math
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch

from fastreg.models.recipe import Recipe

COUNTED: dict[str, Any] = {
    "step": int, "epoch_sum": float, "epoch_steps": int, "best": float, "stale": int, "waited": int,
}  # fmt: skip
UNBOUNDED = ("best",)  # infinite until there is one
MOST = 2**53  # steps


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the kind that an annotation names; numbers must be finite."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is tuple and parts[-1] is not Ellipsis:
        return isinstance(value, (tuple, list)) and len(value) == len(parts) and all(map(fits, value, parts))
    if origin in (tuple, list, collections.abc.Sequence):
        return isinstance(value, (tuple, list)) and all(fits(v, parts[0]) for v in value)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, dict) and all(
            fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items()
        )
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (int, float) and -1e308 <= value <= 1e308
    if hint is int:
        return type(value) is int
    return value is None if hint in (None, type(None)) else type(value) is hint


def misfit(values: Any, cls: type, *, whole: bool = False) -> str | None:
    """What of a mapping does not fit the fields of a dataclass: "name 3", or None; whole: each field must be there."""
    if not isinstance(values, dict):
        return f"{type(values).__name__}"
    hints = get_type_hints(cls)
    for name in hints if whole else ():
        if name not in values:
            return f"no {name}"
    for name, value in values.items():
        if name not in hints or not fits(value, hints[name]):
            return f"{name} {_short(value)}"
    return None


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def not_a_state(state: Any) -> str | None:
    """What is wrong with the numbers of a training's state, beside its weights and optimiser; None: nothing."""
    counted = state.get("counted")
    if not isinstance(counted, dict) or counted.keys() != COUNTED.keys():
        return "counted"
    for name, kind in COUNTED.items():
        value = counted[name]
        if not (fits(value, kind) or (name in UNBOUNDED and value == math.inf)):
            return f"counted {name} {_short(value)}"
        if kind is int and not 0 <= value <= MOST:
            return f"counted {name} {_short(value)}"
    if not fits(state.get("seed"), int):
        return f"seed {_short(state.get('seed'))}"
    wrong = misfit(state.get("recipe"), Recipe, whole=True)
    return None if wrong is None else f"recipe {wrong}"


def _dense(value: Any, shape: torch.Size) -> bool:
    """Whether it is a plain tensor of that shape, with its own memory for each value."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
        return False
    if value.is_meta or value.shape != shape:
        return False
    # Strides of 0 make a few bytes a huge tensor.
    return math.prod(shape) * value.element_size() <= value.untyped_storage().nbytes()


def weights_misfit(weights: Any, wanted: Mapping[str, Any], *, finite: bool = False) -> str | None:
    """What of a checkpoint's weights does not fit a model's state; None: nothing. finite: nor may one be NaN or infinite."""
    if not isinstance(weights, dict):
        return f"weights {_short(weights)}"
    odd = sorted(map(str, wanted.keys() ^ weights.keys()))
    if odd:
        return f"weights {odd[0][:80]}"
    for name, tensor in wanted.items():
        if not isinstance(tensor, torch.Tensor):  # extra state of a module, which reads it itself
            continue
        value = weights[name]
        if not _dense(value, tensor.shape) or value.is_floating_point() != tensor.is_floating_point():
            return f"weights {name}"
        if finite and not value.isfinite().all():
            return f"weights {name} with NaN or infinity"
    return None


def optimizer_misfit(state: Any, optimizer: torch.optim.Optimizer) -> str | None:
    """What of an optimiser's stored state does not fit this one; its learning rate alone may differ. None: nothing."""
    if not isinstance(state, dict) or state.keys() != {"state", "param_groups"}:
        return "optimizer"
    mine: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    groups = state["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(mine):
        return "optimizer groups"
    for group, own in zip(groups, mine, strict=True):
        if not isinstance(group, dict):
            return "optimizer groups"
        for name in (own.keys() & group.keys()) - {"lr"}:
            if type(group[name]) is not type(own[name]) or group[name] != own[name]:
                return f"optimizer {name} {_short(group[name])}"
        rate: Any = group.get("lr")
        if not (fits(rate, float) and rate > 0):
            return f"optimizer lr {_short(rate)}"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = state["state"]
    if not isinstance(kept, dict) or not kept.keys() <= set(range(len(parameters))):
        return "optimizer state"
    for k, moments in kept.items():
        if not isinstance(moments, dict) or not {"step", "exp_avg", "exp_avg_sq"} <= moments.keys():
            return "optimizer state"
        # Its fused step writes to them unchecked.
        for name, value in moments.items():
            shape = torch.Size() if name == "step" else parameters[k].shape
            if not (_dense(value, shape) and value.isfinite().all()):
                return f"optimizer {name}"
    return None
