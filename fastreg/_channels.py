"""Many channels, or channels that weigh differently: a few at a time are moved and compared, with their gradient at once.

So an iteration holds the images and the workspace of a few channels, whatever their number: of 32 feature maps 4.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _check, _descent
from . import ops as _fused

HELD = _descent.HELD


class _InTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        total, gradient = x.new_zeros(()), None
        for part in parts:
            if not ctx.needs_input_grad[0]:
                total = total + part(x)
                continue
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                value = part(y)
                (slope,) = torch.autograd.grad(value, y)
            total = total + value.detach()
            gradient = slope if gradient is None else gradient + slope
            del slope  # or it would be held beside the next one
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return slopes[0] * gradient, None


def in_turn(x: Tensor, parts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """The sum of part(x), scalars. What a part needs for its gradient is gone before the next one begins; differentiable once."""
    return _InTurn.apply(x, parts)


class Channels:
    """A Similarity of runs of channels that weigh the same, HELD at most, which sees a moving image of all of them.

    MIND of several channels is one descriptor of them all; here it is that of each channel by itself, and so is mutual information.
    """

    def __init__(
        self, kind: str, fixed: Tensor, mask: Tensor | None, window: int, shares: Sequence[float]
    ) -> None:
        """shares: of the channels, which sum to 1."""
        self.kind, self.share = kind, _descent.WEIGHT[kind]
        self.runs = []
        held = 1 if kind in ("mind", "mi") else HELD
        first = 0
        for share, run in itertools.groupby(shares):
            last = first + len(list(run))
            for begin in range(first, last, held) if share > 0 else ():
                end = min(begin + held, last)
                one = _descent.Similarity(kind, fixed[:, begin:end], mask, window)
                self.runs.append((share * (end - begin), begin, end, one))
            first = last

    def compare(
        self,
        moving: Tensor,
        move: Callable[[Tensor, Tensor], Tensor],
        by: Tensor,
        ops: Any = _fused,
        weights: Tensor | None = None,
    ) -> Tensor:
        """As Similarity.compare."""

        def part(run: tuple[float, int, int, _descent.Similarity]) -> Callable[[Tensor], Tensor]:
            share, begin, end, one = run
            return lambda y: share * one.compare(moving[:, begin:end], move, y, ops, weights)

        return in_turn(by, [part(run) for run in self.runs])


def similarity(
    kind: str, fixed: Tensor, mask: Tensor | None, window: int, shares: Sequence[float] | None
) -> _descent.Similarity | Channels:
    """shares: of `shares_of`."""
    channels = fixed.shape[1]
    if kind == "mi" and channels > 1:  # of one histogram of them all a bin would mean another thing in each
        shares = shares or [1 / channels] * channels
    if shares is None:
        return _descent.Similarity(kind, fixed, mask, window)
    return Channels(kind, fixed, mask, window, shares)


def shares_of(weights: Any, channels: int) -> list[float] | None:
    """What `register` was given, checked, as shares of the whole; None: few channels, all alike."""
    op = "register"
    if weights is None:
        return None if channels <= HELD else [1 / channels] * channels
    if hasattr(weights, "tolist"):  # numpy, torch
        weights = weights.tolist()
    if not isinstance(weights, (list, tuple)) or len(weights) != channels:
        got = len(weights) if isinstance(weights, (list, tuple)) else repr(weights)
        _check.fail(op, "channel_weights", f"be {channels} numbers, one per channel", got)
    weights = _check.per_axis(op, "channel_weights", weights, channels)
    total = sum(weights)
    if not 0 < total < float("inf"):
        _check.fail(op, "channel_weights", "be more than 0 somewhere", weights)
    return None if channels <= HELD and len(set(weights)) == 1 else [w / total for w in weights]
