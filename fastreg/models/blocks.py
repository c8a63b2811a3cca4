"""Layers whose memory is designed: what a concatenation would copy is kept once, or not at all.

`concat_conv` convolves the concatenation of sources and keeps the sources; `dense_block` keeps one buffer instead of a
growing concatenation per convolution. `residual` keeps the sign of an activation that nobody else reads, `pooled` where the maxima
are. All give the numbers of the plain form (tests/models/test_models.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

CONVS = {2: nn.Conv2d, 3: nn.Conv3d}


def conv(
    nd: int,
    inputs: int,
    outputs: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    dilation: int = 1,
    bias: bool = True,
) -> nn.Module:
    """A convolution that keeps the size (or divides it by stride)."""
    padding = dilation * (kernel // 2)
    return CONVS[nd](inputs, outputs, kernel, stride=stride, padding=padding, dilation=dilation, bias=bias)


class FlowHead(nn.Module):
    """A linear convolution to nd components in fp32, also under autocast. `deviation`: of its normal initial weights
    (VoxelMorph: 1e-5, so that training starts at the identity); None: PyTorch's.
    """

    def __init__(
        self, nd: int, inputs: int, outputs: int | None = None, deviation: float | None = 1e-5
    ) -> None:
        super().__init__()
        layer: Any = conv(nd, inputs, outputs or nd)
        self.conv = layer
        if deviation is not None:
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self.conv(x.to(self.conv.weight.dtype))


def single(x: torch.Tensor) -> torch.Tensor:
    """At least fp32: for sums over space and what follows from them, under autocast too."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def activated(layer: Any, x: torch.Tensor, slope: float) -> torch.Tensor:
    """LeakyReLU of layer(x), in place: the backward needs its sign alone, and the next layer keeps it anyway."""
    if _along_first(layer):
        # Viewed after it is activated: in place of a view, autograd would copy.
        return F.leaky_relu_(_first_axis(layer, x), slope).unflatten(3, x.shape[3:])
    return F.leaky_relu_(convolved(layer, x), slope)


def convolved(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """layer(x), of a convolution."""
    if _halvable(x, layer):  # whose backward is to know that too, and to keep x
        return _ConcatConv.apply(layer, x.shape[2:], layer.weight, layer.bias, x)
    return _convolve(x, layer, layer.weight, layer.bias)


def residual(layer: Any, x: torch.Tensor, z: torch.Tensor, slope: float) -> torch.Tensor:
    """``z + leaky_relu(layer(x), slope)``, which keeps the sign of the activation and nothing else of it."""
    if _along_first(layer):
        return _plus_activated(_first_axis(layer, x), z.flatten(3), slope).unflatten(3, z.shape[3:])
    return _plus_activated(convolved(layer, x), z, slope)


def pooled(x: torch.Tensor, size: int, kind: str = "max") -> torch.Tensor:
    """Pooling of windows of size^3 that tile x, "max" or "mean"; keeps where the maxima are, not x."""
    if kind == "mean":
        return _MeanPool.apply(x, size)
    if torch.is_grad_enabled() or size & (size - 1):
        return _MaxPool.apply(x, size)
    # Nobody asks where they are: halved axis by axis, in a fifth of the time.
    while size > 1:
        for axis in (2, 3, 4):
            x = torch.maximum(*x.unflatten(axis, (-1, 2)).unbind(axis + 1))
        size //= 2
    return x


def upsampled(x: torch.Tensor, factor: int, mode: str = "trilinear") -> torch.Tensor:
    """``F.interpolate(x, scale_factor=factor, mode=mode)`` of a volume; a CPU multiplies by a matrix for each axis, which takes a
    third of the time."""
    if mode == "nearest":
        return F.interpolate(x, scale_factor=factor)
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return F.interpolate(x, scale_factor=factor, mode=mode, align_corners=False)
    with torch.autocast("cpu", enabled=False):
        z, y, w = (_linear(n, factor, x) for n in x.shape[2:])
        rows = y @ (x @ w.T)
        return (z @ rows.flatten(3)).unflatten(3, rows.shape[3:])


def _linear(n, factor, like):
    """(factor n, n): linear interpolation of n values, between pixels' edges."""
    unit = torch.eye(n, dtype=like.dtype, device=like.device)
    return F.interpolate(unit[None], scale_factor=factor, mode="linear", align_corners=False)[0].T


def _plus_activated(y, z, slope):
    if y.dtype != z.dtype:  # under autocast, where the sum stays as precise as z
        return z + F.leaky_relu_(y, slope)
    return _PlusActivated.apply(y, z, slope)


class _PlusActivated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, slope):
        ctx.slope = slope
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(y > 0)
        ctx.mark_dirty(y)
        return F.leaky_relu_(y, slope).add_(z)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (positive,) = ctx.saved_tensors
        # 1 and 0 have the signs that count; torch.where takes four times as long.
        return _leaky_backward(grad, positive.to(grad.dtype), ctx.slope), grad, None


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size):
        y, at = F.max_pool3d(x, size, return_indices=True)
        ctx.shape = x.shape[2:]
        ctx.save_for_backward(at.to(torch.int32) if x.shape[2:].numel() < 2**31 else at)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (at,) = ctx.saved_tensors
        whole = grad.new_zeros(*grad.shape[:2], ctx.shape.numel())
        # Windows do not overlap: nothing is written twice.
        whole.scatter_(2, at.flatten(2).long(), grad.flatten(2))
        return whole.view(*grad.shape[:2], *ctx.shape), None


class _MeanPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size):
        ctx.size = size
        return F.avg_pool3d(x, size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return F.interpolate(grad / ctx.size**3, scale_factor=ctx.size), None


def _cast(tensors):
    """As autocast would have a convolution's operands; a Function is called outside of it."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device) and tensors[0].dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return [t if t is None else t.to(dtype) for t in tensors]
    return list(tensors)


def _along_first(layer):
    """Whether a convolution goes along the first axis of three alone."""
    return (
        isinstance(layer, nn.Conv3d)
        and layer.kernel_size[1:] == (1, 1)
        and layer.kernel_size[0] > 1
        and (layer.stride, layer.dilation, layer.groups) == ((1, 1, 1), (1, 1, 1), 1)
    )


def _first_axis(layer, x):
    """Such a convolution as one in 2D, (N, C, D, H W): a CPU takes a quarter of the time."""
    return F.conv2d(x.flatten(3), layer.weight[..., 0], layer.bias, padding=(layer.padding[0], 0))


# Up to so many N C D H, PyTorch's CPU convolves one volume by im2col instead of oneDNN, at three to ten times the time.
_SLOW, _TINY = 20480, 4096


def _halvable(x, layer):
    """Whether x is so small a volume, and its halves as a batch of two have the same result in less time."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.ndim == 5
        and len(x) == 1
        and x.shape[:4].numel() <= _SLOW
        and x.numel() >= _TINY
        and x.shape[2] % 2 == 0
        and layer.groups == 1
        and max(layer.kernel_size) == 3
        and max(*layer.stride, *layer.dilation) == 1
    )


def _halves(x, more):
    """Both halves of a volume along its first axis, as a batch, each with `more` of its other half, and of zeros."""
    if more:
        x = F.pad(x, (0, 0, 0, 0, more, more))
    half = x.shape[2] // 2 + more
    return torch.cat([x[:, :, :half], x[:, :, -half:]])


def _convolve_backward(grad, x, layer, weight, bias, need_x):
    if _halvable(x, layer):
        more, n = layer.padding[0], x.shape[2]
        padding = (0, *layer.padding[1:])
        halves = _halves(grad, 0), _halves(x, more)
        pair, *grads = _backward(*halves, layer, padding, weight, bias, need_x)
        if not need_x:
            return None, *grads
        whole = x.new_zeros(1, x.shape[1], n + 2 * more, *x.shape[3:])
        for part, half in zip(pair.split(1), (slice(0, n // 2 + 2 * more), slice(n // 2, None)), strict=True):
            whole[:, :, half] += part
        return whole[:, :, more : more + n], *grads
    return _backward(grad, x, layer, layer.padding, weight, bias, need_x)


def _backward(grad, x, layer, padding, weight, bias, need_x):
    return torch.ops.aten.convolution_backward.default(
        grad,
        x,
        weight,
        None if bias is None else list(bias.shape),
        layer.stride,
        padding,
        layer.dilation,
        False,
        [0] * len(layer.stride),
        1,
        [need_x, weight.requires_grad, bias is not None and bias.requires_grad],
    )


def _convolve(x, layer, weight, bias):
    function = F.conv3d if x.ndim == 5 else F.conv2d
    if _halvable(x, layer):
        pair = function(_halves(x, layer.padding[0]), weight, bias, padding=(0, *layer.padding[1:]))
        return torch.cat(pair.split(1), 2)
    return function(x, weight, bias, layer.stride, layer.padding, layer.dilation)


def _leaky_backward(grad, output, slope):
    return torch.ops.aten.leaky_relu_backward.default(grad, output, slope, True)


def _activate_into(out, y, slope):
    """out = leaky_relu(y): in one pass, where a compiler does not make one of two anyway."""
    if torch.compiler.is_compiling():
        out.copy_(F.leaky_relu(y, slope))
    else:
        torch.ops.aten.leaky_relu.out(y, slope, out=out)


def _upsample(x, size):
    return x if x.shape[2:] == size else F.interpolate(x, size=size)


def _upsample_backward(grad, like):
    size = grad.shape[2:]
    if like.shape[2:] == size:
        return grad
    backward = (
        torch.ops.aten.upsample_nearest3d_backward.default
        if like.ndim == 5
        else torch.ops.aten.upsample_nearest2d_backward.default
    )
    return backward(grad.contiguous(), size, like.shape)


def _joined(sources, size):
    x = [_upsample(s, size) for s in sources]
    return torch.cat(x, 1) if len(x) > 1 else x[0]


class _ConcatConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, size, weight, bias, *sources):
        x = _joined(sources, size)
        ctx.layer, ctx.size = layer, size
        ctx.save_for_backward(weight, bias, *sources)
        return _convolve(x, layer, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, bias, *sources = ctx.saved_tensors
        x = _joined(sources, ctx.size)
        need_x = any(ctx.needs_input_grad[4:])
        grad_x, *grads = _convolve_backward(grad, x, ctx.layer, weight, bias, need_x)
        parts = grad_x.split([s.shape[1] for s in sources], 1) if need_x else [None] * len(sources)
        parts = [
            _upsample_backward(part, s) if need else None
            for part, s, need in zip(parts, sources, ctx.needs_input_grad[4:], strict=True)
        ]
        return None, None, *grads, *parts


def concat_conv(layer: nn.Module, sources: Sequence[torch.Tensor], slope: float | None) -> torch.Tensor:
    """``leaky_relu(layer(cat(sources, 1)), slope)`` that keeps sources and output instead of the concatenation.

    slope None: without the LeakyReLU. The last source has the size of the result; a smaller one is read at the nearest voxel (``F.interpolate``). The
    backward concatenates once more: a copy, where keeping it costs as much memory as all sources and more where one is
    small.
    """
    size = sources[-1].shape[2:]
    weight, bias, *sources = _cast([layer.weight, layer.bias, *sources])
    with torch.autocast(sources[0].device.type, enabled=False):
        y = _ConcatConv.apply(layer, size, weight, bias, *sources)
        # A node of its own: autograd frees output and gradient before the convolution's backward, a Function after it.
        return y if slope is None else F.leaky_relu_(y, slope)


class _DenseBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layers, slope, activate, count, *tensors):
        sources, parameters = tensors[:count], tensors[count:]
        weights, biases = parameters[::2], parameters[1::2]
        inputs = sum(s.shape[1] for s in sources)
        channels = inputs + sum(w.shape[0] for w in weights[:-1])
        first = sources[0]
        buffer = first.new_empty((first.shape[0], channels, *first.shape[2:]))
        at = 0
        for source in sources:
            buffer[:, at : at + source.shape[1]].copy_(source)
            at += source.shape[1]
        F.leaky_relu_(buffer[:, :activate], slope)
        for layer, weight, bias in zip(layers, weights, biases, strict=True):
            y = _convolve(buffer[:, :at], layer, weight, bias)
            if at < channels:
                _activate_into(buffer[:, at : at + y.shape[1]], y, slope)
                at += y.shape[1]
        F.leaky_relu_(y, slope)
        ctx.layers, ctx.slope, ctx.activate = layers, slope, activate
        ctx.widths = [s.shape[1] for s in sources]
        ctx.save_for_backward(buffer, y, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        buffer, y, *parameters = ctx.saved_tensors
        slope = ctx.slope
        weights, biases = parameters[::2], parameters[1::2]
        need_sources = any(ctx.needs_input_grad[4 : 4 + len(ctx.widths)])
        total, grads, at = None, [], buffer.shape[1]
        for k in reversed(range(len(weights))):
            output = buffer[:, at : at + weights[k].shape[0]] if k < len(weights) - 1 else y
            g = _leaky_backward(grad if total is None else total[:, at:], output, slope)
            need_x = k > 0 or need_sources
            x = buffer[:, :at]
            g_x, *g_parameters = _convolve_backward(g, x, ctx.layers[k], weights[k], biases[k], need_x)
            grads[:0] = g_parameters
            if need_x:
                total = g_x if total is None else g_x.add_(total[:, :at])
            at -= weights[k - 1].shape[0] if k else 0
        sources = [None] * len(ctx.widths)
        if need_sources:
            head = total[:, : ctx.activate]
            total[:, : ctx.activate] = _leaky_backward(head, buffer[:, : ctx.activate], slope)
            needs = ctx.needs_input_grad[4:]
            sources = [
                p if need else None for p, need in zip(total.split(ctx.widths, 1), needs, strict=False)
            ]
        return None, None, None, None, *sources, *grads


def dense_block(
    layers: Sequence[nn.Module], sources: Sequence[torch.Tensor], slope: float, activate: int = 0
) -> torch.Tensor:
    """A DenseNet block: each convolution, followed by a LeakyReLU, reads the sources and all outputs before it; the last
    output is returned.

    One buffer holds sources and outputs, and the backward reads it, instead of a concatenation per convolution. The
    first `activate` channels of the sources pass through the LeakyReLU as they are copied.
    """
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    tensors = _cast([*sources, *parameters])
    with torch.autocast(tensors[0].device.type, enabled=False):
        return _DenseBlock.apply(layers, slope, activate, len(sources), *tensors)


def _flat(x):
    """(1, N C, *spatial): the batch normalisation of that is the instance normalisation of x."""
    return x.reshape(1, -1, *x.shape[2:])


def _normalized(y, eps):
    """The instance normalisation, and the deviation's reciprocal, (N C,)."""
    x, _, rstd = torch.native_batch_norm(_flat(y), None, None, None, None, True, 0.0, eps)
    return x.view_as(y), rstd


def _normalize_backward(grad, y, rstd, slope):
    """The normalised value is read off the output, which a positive slope keeps one to one."""
    g, x = _leaky_backward(grad, y, slope), F.leaky_relu(y, 1 / slope)
    # Of mean 0 and deviation 1 already: the gradient is that of a batch normalisation whose weight is rstd.
    still, one = torch.zeros_like(rstd), torch.ones_like(rstd)
    back = torch.ops.aten.native_batch_norm_backward.default
    only = [True, False, False]
    return back(_flat(g), _flat(x), rstd, None, None, still, one, True, 0.0, only)[0].view_as(y)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slope, eps):
        y, rstd = _normalized(x, eps)
        ctx.slope = slope
        ctx.save_for_backward(F.leaky_relu_(y, slope), rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, rstd = ctx.saved_tensors
        return _normalize_backward(grad, y, rstd, ctx.slope), None, None


def norm_act_(x: torch.Tensor, slope: float, eps: float = 1e-5) -> torch.Tensor:
    """``leaky_relu(instance_norm(x))`` of x, an activation nobody else keeps. Keeps its output alone."""
    return _NormAct.apply(x, slope, eps)


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layers, slope, eps, x, *parameters):
        weights, biases = parameters[::2], parameters[1::2]
        widths = [x.shape[1], *(w.shape[0] for w in weights)]
        buffer = x.new_empty((x.shape[0], sum(widths), *x.shape[2:]))
        buffer[:, : widths[0]].copy_(x)
        at, rstds = 0, []
        for layer, weight, bias, inputs in zip(layers, weights, biases, widths, strict=False):
            y, rstd = _normalized(_convolve(buffer[:, at : at + inputs], layer, weight, bias), eps)
            rstds.append(rstd)
            at += inputs
            _activate_into(buffer[:, at : at + y.shape[1]], y, slope)
        ctx.layers, ctx.slope, ctx.widths = layers, slope, widths
        ctx.save_for_backward(buffer, *rstds, *parameters)
        return buffer

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        count = len(ctx.layers)
        buffer, *saved = ctx.saved_tensors
        rstds, parameters = saved[:count], saved[count:]
        parts = buffer.split(ctx.widths, 1)
        grad_parts = grad.split(ctx.widths, 1)
        grads, carried = [], None
        for k in reversed(range(count)):
            g = grad_parts[k + 1] if carried is None else grad_parts[k + 1] + carried
            g = _normalize_backward(g, parts[k + 1], rstds[k], ctx.slope)
            need_x = k > 0 or ctx.needs_input_grad[3]
            weight, bias = parameters[2 * k : 2 * k + 2]
            carried, *own = _convolve_backward(g, parts[k], ctx.layers[k], weight, bias, need_x)
            grads[:0] = own
        return None, None, None, grad_parts[0] + carried if ctx.needs_input_grad[3] else None, *grads


def chain(layers: Sequence[nn.Module], x: torch.Tensor, slope: float, eps: float = 1e-5) -> torch.Tensor:
    """``cat([x, e1, e2, ...], 1)`` where e1 is x through the first convolution, instance normalisation and LeakyReLU, e2
    is e1 through the second, and so on. The concatenation is the one buffer they are written to, and all that is kept.
    """
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    x, *parameters = _cast([x, *parameters])
    with torch.autocast(x.device.type, enabled=False):
        return _Chain.apply(layers, slope, eps, x, *parameters)
