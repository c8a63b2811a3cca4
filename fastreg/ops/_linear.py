"""What the linear ops share: the backward of each is its transpose, and the backward of that is the op again."""

import torch

from fastreg import _ext


def along(values, axis, nd):
    """A 1D tensor shaped to multiply fields of nd axes along one of them."""
    return values.view([-1 if k == axis else 1 for k in range(nd)])


def autograd(name, setup):
    """Autograd of ``name`` and ``name_bwd``, each by the other; `setup` leaves the options of the other in ctx.arguments."""
    for op, transpose in ((name, f"{name}_bwd"), (f"{name}_bwd", name)):

        def backward(ctx, grad, transpose=transpose):
            return getattr(torch.ops.fastreg, transpose)(grad, *ctx.arguments), *[None] * len(ctx.arguments)

        _ext.autograd(op, setup, backward)
