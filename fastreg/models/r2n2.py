"""R2N2, Recurrent Registration Neural Network (Sandkuehler et al. 2019): a recurrent net places one Gaussian-shaped motion
after the other, 2D.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreg import ops
from fastreg.ops.gaussian_displacement import SIGMA_IS, SigmaIs
from fastreg.ops.warp import Padding

from .base import Model, Prediction
from .blocks import conv, single
from .recipe import PaperInput, Recipe

ACTIVATIONS = {"tanh": torch.tanh, "leaky_relu": F.leaky_relu}
NOISES = ("paper", "released", "none")
POOLS = ("sum", "mean")
HIDDEN = 1024
RELEASED = {
    "blocks": 6,
    "activation": "leaky_relu",
    "norm": True,
    "coordinates": False,
    "noise": "released",
}
MIN_SIGMA = 1e-5


def _expectation(p):
    """Mean coordinate (x, y) in [-1, 1] under distributions p (N, H, W)."""
    n_y, n_x = p.shape[1:]
    x = torch.linspace(-1, 1, n_x, device=p.device, dtype=p.dtype)
    y = torch.linspace(-1, 1, n_y, device=p.device, dtype=p.dtype)
    return torch.stack([(p.sum(1) * x).sum(1), (p.sum(2) * y).sum(1)], 1)


def _softmax(x):
    """Over space, in fp32 at least."""
    return torch.softmax(single(x).flatten(2), 2).view(x.shape)


def _initialised(layer, activation, *, gain=True):
    """The layer with weights as the authors' code draws them: before tanh Xavier's normal ones (with tanh's gain, 5/3, or none),
    before leaky ReLU Kaiming's. With PyTorch's a net of tanh begins with nearly the same answer to every moving image.
    """
    if activation == "tanh":
        nn.init.xavier_normal_(layer.weight, nn.init.calculate_gain("tanh") if gain else 1.0)
    else:
        nn.init.kaiming_normal_(layer.weight)
    return layer


def _noisy(t):
    """Times N(1, sqrt 2): the mean and deviation of dropout's factor at a keep rate of one half."""
    return t * (1 + math.sqrt(2) * torch.randn_like(t))


class _Gates(nn.Module):
    """Convolutional GRU: the three convolutions of the input as one, two of the state as one.

    h' = (1 - z) h + z tanh(W x + U (r h) + b), r and z sigmoids of W x + U h + b. Noise of training, drawn anew each step:
    on W and U of the candidate (the tanh) and on h' ("paper"), or on all three U ("released").
    """

    def __init__(self, width, noise):
        super().__init__()
        self.noise = noise
        self.input = conv(2, width, 3 * width)
        self.state = conv(2, width, 2 * width, bias=False)
        self.reset = conv(2, width, width, bias=False)
        for layer in (self.input, self.state, self.reset):
            for part in layer.weight.data.split(width):
                nn.init.xavier_normal_(part)
        self.input.bias.data.copy_(torch.tensor([0.0, 0.0, 1.0]).repeat_interleave(width))

    def forward(self, x, h):
        noise = self.noise if self.training else "none"
        weight = self.input.weight
        if noise == "paper":
            *gates, candidate = weight.chunk(3)
            weight = torch.cat([*gates, _noisy(candidate)])
        r, z, new = F.conv2d(x, weight, self.input.bias, padding=1).chunk(3, 1)
        if h is None:
            h = torch.sigmoid(z) * torch.tanh(new)
        else:
            state = _noisy(self.state.weight) if noise == "released" else self.state.weight
            reset = self.reset.weight if noise == "none" else _noisy(self.reset.weight)
            r_h, z_h = F.conv2d(h, state, padding=1).chunk(2, 1)
            r, z = torch.sigmoid(r + r_h), torch.sigmoid(z + z_h)
            h = torch.lerp(h, torch.tanh(new + F.conv2d(r * h, reset, padding=1)), z)
        return _noisy(h) if noise == "paper" else h


class _Unit(nn.Module):
    """Residual blocks, GRU, a proposed position with its weight, halving (GR2U)."""

    def __init__(self, width, outputs, blocks, activation, norm, noise):
        super().__init__()
        self.activation, self.norm = ACTIVATIONS[activation], norm
        self.blocks = nn.ModuleList(
            nn.ModuleList(_initialised(conv(2, width, width), activation) for _ in range(2))
            for _ in range(blocks)
        )
        self.gates = _Gates(width, noise)
        self.position = nn.Conv2d(width, 2, 1)
        for part in self.position.weight.data.split(1):
            nn.init.xavier_normal_(part)
        self.down = _initialised(conv(2, width, outputs, stride=2), activation)

    def forward(self, x, h):
        act, norm = self.activation, self.norm
        for first, second in self.blocks:
            x = act(x + norm(second(act(norm(first(x))))))
        h = self.gates(x, h)
        y = act(h + x)
        left, right = _softmax(self.position(y)).unbind(1)
        weight = 2 - (left - right).abs().sum((1, 2))
        return act(norm(self.down(y))), h, _expectation(left), weight


class _Shape(nn.Module):
    """Extents, angle and motion of the Gaussian from the coarsest map."""

    def __init__(self, width, activation, pool):
        super().__init__()
        half = width // 2
        self.activation, self.pool = ACTIVATIONS[activation], pool
        self.first = _initialised(conv(2, width, width), activation, gain=False)
        self.second = conv(2, half, half)
        self.hidden, self.out = nn.Linear(half, HIDDEN), nn.Linear(HIDDEN, 5)
        for t in (self.hidden.bias, self.out.weight, self.out.bias):
            nn.init.zeros_(t)

    def forward(self, x):
        value, attention = self.first(x).chunk(2, 1)
        value = self.second(self.activation(value))
        attended = self.activation(single(value) * _softmax(attention))
        pooled = attended.mean((2, 3)) if self.pool == "mean" else attended.sum((2, 3))
        with torch.autocast(x.device.type, enabled=False):
            return self.out(self.activation(self.hidden(pooled)))


class R2N2(Model, released=RELEASED):
    """R2N2 (Sandkuehler et al. 2019). Per step: a convolution of fixed and warped moving image, three recurrent units at 1/2, 1/4 and
    1/8 of the size, and the seven numbers of a Gaussian that is added to the displacement.

    Args:
        steps (int): T.
        widths (4 ints): channels at 1/2, 1/4, 1/8 and 1/16.
        blocks (int): residual blocks a unit.
        activation (str): "tanh" (paper) or "leaky_relu" (released). norm (bool): instance normalisation (released).
        coordinates (bool): the pixels' coordinates as input channels.
        sigma_max (float): the largest extent, where the image spans [-1, 1].
        sigma_is (str): extents are deviations ("std", released) or variances ("var", the paper's formula).
        noise (str): in training, multiplicative N(1, sqrt 2), drawn anew each step: on the weights of the GRU's candidate and on its
            output ("paper"), on all weights that its state meets ("released") or "none".
        pool (str): of the attended map into the vector that shape and motion are read from, "sum" (released) or "mean" (the paper's
            word, average pooling; attention sums to 1 already, so that a mean is smaller by the number of pixels).
        weight (float): of the isotropic total variation of the displacement, in units where the image spans [-1, 1].
        padding, checkpoint (str): see Model; a block is a step.

    The "paper" preset keeps two choices of the authors' code, sigma_is="std" and pool="sum", where the paper's text has "var" and
    "mean". Weights start as the authors' code has them, for either activation: the paper is silent.

    Images are standardised (mean 0, deviation 1) and clamped to [-2, 2]. Any size; the identity before training. Prediction.fields:
    the displacements after each step; Prediction.parameters: (N, T, 7), x, y, sx, sy, alpha, vx, vy in [-1, 1]. 3,593,611 parameters.
    """

    # The clipping is the authors' code's.
    recipe = Recipe(amsgrad=True, clip_gradient=1.0, steps=180_000)
    paper_input = PaperInput("zscore", (256, 256))
    default_intensity = "zscore"
    ndims, ndim, divisor = (2,), 2, 1
    size_bound = True

    def __init__(
        self,
        *,
        steps: int = 25,
        widths: Sequence[int] = (32, 64, 128, 256),
        blocks: int = 3,
        activation: str = "tanh",
        norm: bool = False,
        coordinates: bool = True,
        sigma_max: float = 0.3,
        sigma_is: SigmaIs = "std",
        noise: str = "paper",
        pool: str = "sum",
        weight: float = 0.1,
        padding: Padding = "zeros",
        checkpoint: str = "none",
    ) -> None:
        super().__init__()
        self.choice("activation", activation, ACTIVATIONS)
        self.choice("noise", noise, NOISES)
        self.choice("pool", pool, POOLS)
        self.choice("sigma_is", sigma_is, SIGMA_IS)
        if len(widths) != 4 or widths[-1] % 2:
            self.fail(ValueError, f"widths must be 4, the last one even, got {widths}")
        if steps < 1:
            self.fail(ValueError, f"steps must be at least 1, got {steps}")
        self.steps, self.coordinates, self.sigma_max, self.sigma_is = steps, coordinates, sigma_max, sigma_is
        self.weight, self.padding, self.checkpoint = weight, padding, checkpoint
        self.activation = ACTIVATIONS[activation]
        self.normalized, self.norm = norm, F.instance_norm if norm else nn.Identity()
        self.stem = _initialised(conv(2, 4 if coordinates else 2, widths[0], 7, stride=2), activation)
        self.units = nn.ModuleList(
            _Unit(i, o, blocks, activation, self.norm, noise) for i, o in itertools.pairwise(widths)
        )
        self.shape = _Shape(widths[-1], activation, pool)

    def _encode(self, fixed):
        """The part of the first convolution that sees fixed image and coordinates: the same in each step."""
        if self.normalized and max(fixed.shape[2:]) <= 16:
            self.fail(
                ValueError, f"with norm, images must be larger than 16 pixels, got {tuple(fixed.shape[2:])}"
            )
        weight = self.stem.weight
        inputs, weights = [fixed], [weight[:, :1]]
        if self.coordinates:
            n, _, n_y, n_x = fixed.shape
            x = torch.linspace(-1, 1, n_x, device=fixed.device, dtype=fixed.dtype).expand(n, 1, n_y, n_x)
            y = torch.linspace(-1, 1, n_y, device=fixed.device, dtype=fixed.dtype)[:, None].expand(
                n, 1, n_y, n_x
            )
            inputs += [x, y]
            weights += [weight[:, 2:]]
        return F.conv2d(torch.cat(inputs, 1), torch.cat(weights, 1), self.stem.bias, stride=2, padding=3)

    def _step(self, of_fixed, warped, *states):
        x = of_fixed + F.conv2d(warped, self.stem.weight[:, 1:2], stride=2, padding=3)
        x = self.activation(self.norm(x))
        new, positions, weights = [], [], []
        for unit, h in zip(self.units, states, strict=True):
            x, h, position, weight = unit(x, h)
            new.append(h)
            positions.append(position)
            weights.append(weight)
        weights = torch.stack(weights, 1)[..., None]
        position = (torch.stack(positions, 1) * weights).sum(1) / weights.sum(1)
        raw = self.shape(x)
        sigma = torch.sigmoid(raw[:, :2]) * self.sigma_max + MIN_SIGMA
        parameters = [position, sigma, torch.sigmoid(raw[:, 4:]) * math.pi, torch.tanh(raw[:, 2:4])]
        return torch.cat(parameters, 1), *new

    def predict(self, fixed: Tensor, moving: Tensor, of_fixed: Tensor) -> Prediction:
        states: list[Tensor | None] = [None] * len(self.units)
        warped, u = moving, moving.new_empty(0)
        fields: list[Tensor] = []
        parameters = []
        for _ in range(self.steps):
            proposal, *states = self.block(self._step, of_fixed, warped, *states)
            parameters.append(proposal)
            step = ops.gaussian_displacement(proposal[:, None], fixed.shape[2:], sigma_is=self.sigma_is)
            u = u + step if fields else step
            fields.append(u)
            warped = ops.warp(moving, u, padding=self.padding)
        return Prediction(u, fields, parameters=torch.stack(parameters, 1))

    def terms(
        self, fixed: Tensor, moving: Tensor, prediction: Prediction, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        similarity: Any = 0
        for u in prediction.fields:
            moved = ops.warp(moving, u, padding=self.padding)
            inside = _inside(u) if mask is None else _inside(u) * mask
            # A mean over each image's pixels, then over images.
            inside = inside / inside.mean((1, 2, 3), keepdim=True).clamp_min(1e-30)
            similarity = similarity + ops.mse_loss(fixed, moved, mask=inside)
        u = prediction.displacement
        span = u.new_tensor([2 / max(n - 1, 1) for n in u.shape[2:]]).view(1, 2, 1, 1)
        return {
            "similarity": similarity / len(prediction.fields),
            "regularity": self.weight * ops.total_variation(u * span, isotropic=True),
        }


@torch.no_grad()
def _inside(u):
    """1 where the moving image is sampled inside, (N, 1, H, W)."""
    inside = None
    for k, n in enumerate(u.shape[2:]):
        p = u[:, k] + torch.arange(n, device=u.device, dtype=u.dtype).view(
            -1 if k == 0 else 1, -1 if k else 1
        )
        within = (p >= 0) & (p <= n - 1)
        inside = within if inside is None else inside & within
    return inside[:, None].to(u.dtype)
