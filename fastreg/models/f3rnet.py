"""F3RNet, full-resolution residual registration with factorised 3D convolutions (Xu et al. 2021): a stream at full
resolution exchanges features with a U-shaped one through multi-scale residual blocks (MRB).
"""

from typing import Any

from torch import Tensor, nn

from fastreg import ops
from fastreg.ops.warp import Padding

from .base import Model, Prediction
from .blocks import FlowHead, activated, concat_conv, conv, convolved, pooled, residual, upsampled
from .recipe import PaperInput, Recipe

SLOPE = 0.2
STREAM = 16  # channels at full resolution
# Which parts are factorised; "extra": two more MRBs at 1/16 come with it.
VARIANTS = {
    "none": (),
    "full": ("fr", "encoder", "bottleneck", "decoder"),
    "decoder": ("decoder",),
    "encoder": ("encoder",),
    "fr": ("fr",),
    "ms": ("encoder", "bottleneck", "decoder"),
    "mrb": ("fr", "encoder", "bottleneck", "decoder", "extra"),
}
POLICIES = ("fit", "all")
# Lambda, where the paper's Dice was best (its figure 3).
WEIGHTS = {variant: 2.0 if variant in ("encoder", "ms") else 1.5 for variant in VARIANTS}
MIND_2012 = {"radius": 1, "dilation": 1, "neighbourhood": "six", "patch": "gaussian", "norm": "l1"}
POOLS = ("max", "mean")
UPS = ("trilinear", "nearest")


class _F3D(nn.Sequential):
    """3x3 in the plane, then 3 along the slices."""

    def __init__(self, inputs, outputs):
        super().__init__(
            nn.Conv3d(inputs, outputs, (1, 3, 3), padding=(0, 1, 1)),
            nn.Conv3d(outputs, outputs, (3, 1, 1), padding=(1, 0, 0)),
        )


def _conv(inputs, outputs, factorized):
    return _F3D(inputs, outputs) if factorized else conv(3, inputs, outputs)


def _activated(layer, sources):
    """LeakyReLU of a convolution of what `_conv` makes."""
    if not isinstance(layer, _F3D):
        return concat_conv(layer, sources, SLOPE) if len(sources) > 1 else activated(layer, *sources, SLOPE)
    x = convolved(layer[0], *sources) if len(sources) == 1 else concat_conv(layer[0], sources, None)
    return activated(layer[1], x, SLOPE)


class _Residual(nn.Module):
    """z + act(conv(act(conv(z))))."""

    def __init__(self, width, factorized):
        super().__init__()
        self.first, self.second = _conv(width, width, factorized), _conv(width, width, factorized)

    def forward(self, z):
        x = _activated(self.first, (z,))
        if isinstance(self.second, _F3D):
            return residual(self.second[1], convolved(self.second[0], x), z, SLOPE)
        return residual(self.second, x, z, SLOPE)


class _MRB(nn.Module):
    """Exchange at 1/scale: h and the pooled stream are convolved; that, brought back, is added to the stream; its residual
    block is the new h.
    """

    def __init__(self, scale, inputs, width, convolution, residual, pool, up):
        super().__init__()
        self.scale, self.pool, self.up = scale, pool, up
        self.conv = _conv(STREAM + inputs, width, convolution)
        self.residual = _Residual(width, residual)
        self.to_stream = nn.Conv3d(width, STREAM, 1)

    def forward(self, stream, h, last=False):
        small = pooled(stream, self.scale, self.pool)
        x = _activated(self.conv, (small,) if h is None else (h, small))
        # In place: neither is kept.
        stream = upsampled(self.to_stream(x), self.scale, self.up).add_(stream)
        return stream, (None if last else self.residual(x))


class F3RNet(Model):
    """F3RNet (Xu et al. 2021). A stream of 16 channels at full resolution (head, 2 residual blocks, MRBs, 3 residual blocks, flow) and a stream that
    goes down to 1/16 and back up to 1/2.

    Args:
        variant (str): what is factorised: "mrb" (the paper's proposal: everything, and two more MRBs at 1/16), "full",
            "ms", "fr", "encoder", "decoder" or "none".
        f3d_policy (str): "fit": in MRBs of encoder and decoder the residual blocks alone; chosen after the fact so that
            parameter counts come near the paper's; "all": each 3x3x3 convolution but the last, the paper's text.
        pool ("max" | "mean"), up ("trilinear" | "nearest"): between the streams.
        mind (dict or None): options of fastreg.mind_loss; None: those of MIND 2012, as the paper names none.
        weight (float or None): of the diffusion of the displacement in voxels; None: the paper's best for the variant, 2 for
            "encoder" and "ms", 1.5 for the others.
        padding, checkpoint (str): see Model.

    The paper does not draw the net to the last block. Here MRBs sit at 1/2, 1/4, 1/8 and 1/16 on the way down and at 1/4 and 1/2 on
    the way up: there is none at 1/8 on the way up, and with "fit" the convolutions that change a resolution stay whole,
    because only so parameter counts come near the printed ones. Nothing in the loss forbids folding.

    Prediction.fields is empty. Parameters of "none", "full", "decoder", "encoder", "fr", "ms", "mrb": 358,179,
    203,699, 342,883, 312,227, 320,147, 241,731, 288,083 ("fit"); the paper prints 359, 204, 335, 321, 348, 243 and
    288 thousand.
    """

    recipe = Recipe(learning_rate=1e-5, steps=150_000)
    paper_input = PaperInput("percentiles", (128, 144, 144), (1, 1, 1))

    def __init__(
        self,
        *,
        variant: str = "mrb",
        f3d_policy: str = "fit",
        pool: str = "max",
        up: str = "trilinear",
        mind: dict[str, Any] | None = None,
        weight: float | None = None,
        padding: Padding = "border",
        checkpoint: str = "none",
    ) -> None:
        super().__init__()
        self.choice("variant", variant, VARIANTS)
        self.choice("f3d_policy", f3d_policy, POLICIES)
        self.choice("pool", pool, POOLS)
        self.choice("up", up, UPS)
        self.mind = self.mind_options(mind, MIND_2012)
        self.weight = WEIGHTS[variant] if weight is None else weight
        self.padding, self.checkpoint = padding, checkpoint
        parts = VARIANTS[variant]

        def mrb(part, scale, inputs, width):
            whole = part in parts and (f3d_policy == "all" or part in ("bottleneck", "extra"))
            return _MRB(scale, inputs, width, whole, part in parts, pool, up)

        fr = "fr" in parts
        self.stem = _conv(2, STREAM, fr)
        self.before = nn.ModuleList(_Residual(STREAM, fr) for _ in range(2))
        self.down = nn.ModuleList(
            mrb("encoder", s, i, w) for s, i, w in ((2, 0, 16), (4, 16, 16), (8, 16, 32))
        )
        extra = 2 if "extra" in parts else 0
        self.bottom = nn.ModuleList(mrb("bottleneck", 16, 32, 32) for _ in range(1 + extra))
        self.widths = nn.ModuleList(nn.Conv3d(i, o, 1) for i, o in ((32, 16), (16, 16)))
        self.ascent = nn.ModuleList(mrb("decoder", s, 16, 16) for s in (4, 2))
        # Nobody reads the h of the last one: parameters that count in the paper's table, and do nothing.
        self.ascent[-1].residual.requires_grad_(False)
        self.after = nn.ModuleList(_Residual(STREAM, fr) for _ in range(3))
        self.head = FlowHead(3, STREAM)
        self.up = up

    def predict(self, fixed: Tensor, moving: Tensor) -> Prediction:
        x = _activated(self.stem, (moving, fixed))
        for layer in self.before:
            x = self.block(layer, x)
        h: Any = None
        skips: list[Tensor] = []
        for layer in self.down:
            x, h = self.block(layer, x, h if h is None else pooled(h, 2))
            skips.append(h)
        h = pooled(h, 2)
        for layer in self.bottom:
            x, h = self.block(layer, x, h)

        h = upsampled(h, 2, self.up) + skips[2]
        for k, (width, layer) in enumerate(zip(self.widths, self.ascent, strict=True)):
            # The 1x1 convolution commutes with the interpolation, and is cheaper before it.
            h = upsampled(width(h), 2, self.up) + skips[1 - k]
            x, h = self.block(lambda x, h, layer=layer, last=k == 1: layer(x, h, last), x, h)
        for layer in self.after:
            x = self.block(layer, x)
        return Prediction(self.head(x))

    def terms(
        self, fixed: Tensor, moving: Tensor, prediction: Prediction, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        u = prediction.displacement
        moved = ops.warp(moving, u, padding=self.padding)
        return {
            "similarity": ops.mind_loss(fixed, moved, **self.mind, mask=mask),
            "regularity": self.weight * ops.diffusion(u),
        }
