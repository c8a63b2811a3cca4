"""What every op promises, whatever it computes: one record an op, CONTRACT in its test_<op>.py, checked by test_contract.py.

python tests/ops/contract.py    the records as a table
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastreg.ops


@dataclass(frozen=True)
class Case:
    """A way to call an op."""

    call: Callable  # of tensors, any size of them
    make: Callable  # (n, spatial, dtype) -> those tensors, N first in each; those with gradients require them
    empty: float = math.nan  # a result of one number, of no voxels: a mean; 0: a sum, a mean over weights


@dataclass(frozen=True, kw_only=True)
class Contract:
    """A property is True (it holds for `cases`), a dict of the cases it holds for, or the reason why it does not apply."""

    cases: dict
    valid: dict  # arguments
    errors: list  # (error, match, what is changed in `valid`)
    opcheck: Callable  # dtype -> an iterable of what the op registers: (op, arguments) or (op, arguments, test_utils)
    gradcheck: bool | dict | str
    double_backward: bool  # gradgradcheck; False: it raises
    layouts: bool | dict | str
    vmap: bool | dict | str
    compiled: bool | dict | str
    empty_batch: bool | dict | str
    empty_axes: bool | dict | str
    empty_channels: bool | dict | str
    repeats: bool | dict | str  # the same bits in every run, by any number of threads
    dimensions: tuple = (3, 2)
    tolerance: float = 0.0  # relative, between layouts of the same values: 0 for the same bits
    large: tuple = (
        (17, 31, 40),
        (130, 150),
    )  # beyond one thread's piece of work, and torch's own of 2^15 numbers


PROPERTIES = (
    "gradcheck",
    "layouts",
    "vmap",
    "compiled",
    "empty_batch",
    "empty_axes",
    "empty_channels",
    "repeats",
)


def like(n, spatial):
    """A tensor that carries the size an op is asked for."""
    return torch.zeros(n, 1, *spatial)


# Of the regularisers: a call that is right, and what they refuse.
REGULARISER = {"u": torch.zeros(1, 3, 3, 4, 5)}
REGULARISER_ERRORS = [
    (
        TypeError,
        "u must be fp64, fp32, fp16 or bf16, got torch.int64",
        {"u": torch.zeros(1, 2, 4, 5).long()},
    ),
    (
        ValueError,
        r"u must have shape \(N, 3, D, H, W\), got \(1, 2, 3, 4, 5\)",
        {"u": torch.zeros(1, 2, 3, 4, 5)},
    ),
    (ValueError, "spacing must be a number > 0, or one per axis", {"spacing": 0.0}),
    (ValueError, "spacing must be a number > 0, or one per axis", {"spacing": (1.0, 2.0)}),
    (TypeError, "spacing must be a number or 3 numbers", {"spacing": "mm"}),
]


def spaced(u):
    """Another spacing along each axis."""
    return (1.0, 2.0, 3.0)[: u.dim() - 2]


def contracts():
    """{op: Contract} of every public op."""
    return {op: importlib.import_module(f"test_{op}").CONTRACT for op in fastreg.ops.__all__}


def held(contract, name):
    """{case id: Case} for which a property holds."""
    cases = getattr(contract, name)
    return contract.cases if cases is True else cases if isinstance(cases, dict) else {}


def table():
    """Markdown: a row an op, what it promises; below it why a property does not apply."""
    names = ["opcheck", *PROPERTIES, "double_backward"]
    head = ["op", "cases", "errors", *(n.replace("_", " ") for n in names)]
    rows, reasons = [head, ["---"] * len(head)], []
    for op, contract in contracts().items():
        cells = []
        for name in names:
            value = getattr(contract, name)
            if isinstance(value, str):
                reasons.append(f"{op}, {name.replace('_', ' ')}: {value}")
            cells.append("-" if isinstance(value, str) else "raises" if value is False else "yes")
        rows.append([f"`{op}`", str(len(contract.cases)), str(len(contract.errors)), *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {r}" for r in reasons)])


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
    print(table())
