"""What a model's step spends in the ops, forward and backward.

Autograd runs the nodes of a device in the reverse order of their making. The backward of an op is therefore what runs
between a hook on its result and the backward of an identity before it.
"""

import contextlib
import time
from unittest import mock

import torch

from bench import common, stock_ops
from fastreg import models


class Clock:
    """Seconds spent in ops: of the processor, in all threads; on a GPU of the clock."""

    def __init__(self, device):
        self.device, self.seconds, self.since = device, 0.0, None
        self.now = time.perf_counter if device == "cuda" else time.process_time

    def start(self):
        common.synchronize(self.device)
        self.since = self.now()

    def stop(self):
        common.synchronize(self.device)
        self.seconds += self.now() - self.since
        self.since = None


class _Before(torch.autograd.Function):
    """Identity before an op: its backward runs when that of the op has ended."""

    @staticmethod
    def forward(ctx, clock, *tensors):
        ctx.clock = clock
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *grads):
        ctx.clock.stop()
        return None, *grads


def clocked(function, clock):
    def call(*args, **options):
        values = [*args, *options.values()]
        at = [k for k, v in enumerate(values) if isinstance(v, torch.Tensor) and v.requires_grad]
        if at and torch.is_grad_enabled():
            for k, v in zip(at, _Before.apply(clock, *(values[k] for k in at)), strict=True):
                values[k] = v
        clock.start()
        n = len(args)
        result = function(*values[:n], **dict(zip(options, values[n:], strict=True)))
        clock.stop()
        if result.requires_grad:
            # Not a Function: its view could not be activated in place, as plain nets do.
            result.register_hook(lambda grad: clock.start())
        return result

    return call


class _Clocked:
    """The ops a model calls, on a clock."""

    def __init__(self, ops, clock):
        self._ops, self._clock = ops, clock

    def __getattr__(self, name):
        return clocked(getattr(self._ops, name), self._clock)


@contextlib.contextmanager
def running(clock):
    """Inside, the ops that models call count on the clock: fastreg's, or those installed."""
    with contextlib.ExitStack() as stack:
        for module in stock_ops.MODULES:
            stack.enter_context(mock.patch.object(module, "ops", _Clocked(module.ops, clock)))
        similarities = models.base.SIMILARITIES
        timed = {name: clocked(f, clock) for name, f in similarities.items()}
        stack.enter_context(mock.patch.dict(similarities, timed))
        yield
