"""How results show themselves: tensors by shape, as nobody reads a million numbers."""

import dataclasses
from typing import Any

import torch


def shapes(result: Any) -> str:
    """A dataclass or a named tuple as one line."""
    names = getattr(result, "_fields", None) or [f.name for f in dataclasses.fields(result)]
    values = ((name, getattr(result, name)) for name in names)
    return f"{type(result).__name__}({', '.join(f'{name}={_shown(v)}' for name, v in values)})"


def _shown(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return "x".join(map(str, value.shape))
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, (list, tuple)):
        return f"<{len(value)}>"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)
