"""Layers whose memory is designed: what a concatenation would copy is kept once, or not at all.

`concat_conv` convolves the concatenation of sources and keeps the sources; `dense_block` keeps one buffer instead of a
growing concatenation per convolution. Both give the numbers of the concatenating form (tests/models/test_models.py).
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


def activated(layer: nn.Module, x: torch.Tensor, slope: float) -> torch.Tensor:
    """LeakyReLU of layer(x), in place: the backward needs its sign alone, and the next layer keeps it anyway."""
    return F.leaky_relu_(layer(x), slope)


def _cast(tensors):
    """As autocast would have a convolution's operands; a Function is called outside of it."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device) and tensors[0].dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return [t if t is None else t.to(dtype) for t in tensors]
    return list(tensors)


def _convolve_backward(grad, x, layer, weight, bias, need_x):
    return torch.ops.aten.convolution_backward.default(
        grad,
        x,
        weight,
        None if bias is None else list(bias.shape),
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        [0] * len(layer.stride),
        1,
        [need_x, weight.requires_grad, bias is not None and bias.requires_grad],
    )


def _convolve(x, layer, weight, bias):
    function = F.conv3d if x.ndim == 5 else F.conv2d
    return function(x, weight, bias, layer.stride, layer.padding, layer.dilation)


def _leaky_backward(grad, output, slope):
    return torch.ops.aten.leaky_relu_backward.default(grad, output, slope, True)


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


class _ConcatConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, size, weight, bias, *sources):
        x = torch.cat([_upsample(s, size) for s in sources], 1)
        ctx.layer, ctx.size = layer, size
        ctx.save_for_backward(weight, bias, *sources)
        return _convolve(x, layer, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, bias, *sources = ctx.saved_tensors
        x = torch.cat([_upsample(s, ctx.size) for s in sources], 1)
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
            y = F.leaky_relu_(_convolve(buffer[:, :at], layer, weight, bias), slope)
            if at < channels:
                buffer[:, at : at + y.shape[1]].copy_(y)
                at += y.shape[1]
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


def _normalize_(y, slope, eps):
    """Instance normalisation and LeakyReLU in place; the deviation's reciprocal."""
    axes = tuple(range(2, y.ndim))
    variance, mean = torch.var_mean(y, axes, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    F.leaky_relu_(y.sub_(mean).mul_(rstd), slope)
    return rstd


def _normalize_backward(grad, y, rstd, slope):
    """The normalised value is read off the output, which a positive slope keeps one to one."""
    axes = tuple(range(2, y.ndim))
    g = _leaky_backward(grad, y, slope)
    x = F.leaky_relu(y, 1 / slope)
    g = g.sub_(g.mean(axes, keepdim=True))
    return g.sub_(x.mul_((g * x).mean(axes, keepdim=True))).mul_(rstd)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slope, eps):
        rstd = _normalize_(x, slope, eps)
        ctx.mark_dirty(x)
        ctx.slope = slope
        ctx.save_for_backward(x, rstd)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, rstd = ctx.saved_tensors
        return _normalize_backward(grad, y, rstd, ctx.slope), None, None


def norm_act_(x: torch.Tensor, slope: float, eps: float = 1e-5) -> torch.Tensor:
    """``leaky_relu(instance_norm(x))`` in place of x, an activation nobody else keeps. Keeps its output alone."""
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
            y = _convolve(buffer[:, at : at + inputs], layer, weight, bias)
            rstds.append(_normalize_(y, slope, eps))
            at += inputs
            buffer[:, at : at + y.shape[1]].copy_(y)
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
