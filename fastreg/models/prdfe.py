"""PRDFE, Pyramidal Residual Deformation Field Estimation (Zhou et al. 2020), and its ablations: a shared feature pyramid
whose moving maps are warped by the field so far, and a residual of the field per level.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastreg import ops
from fastreg.ops.warp import Padding

from .base import Model, Prediction
from .blocks import FlowHead, activated, concat_conv, conv
from .recipe import PaperInput, Recipe

SLOPE = 0.2
VARIANTS = ("prdfe", "iprdfe", "pdfe")
HALVINGS = ("stride", "max", "mean")
POOLS = {  # of (nd, how)
    (2, "max"): F.max_pool2d,
    (3, "max"): F.max_pool3d,
    (2, "mean"): F.avg_pool2d,
    (3, "mean"): F.avg_pool3d,
}
SIMULATION = {
    "ndim": 2,
    "encoder": (144, 160, 160, 160),
    "decoder": (160, 160, 160, 160, 160, 144, 144),
    "weight": 0.05,
}


class PRDFE(Model, simulation=SIMULATION):
    """PRDFE (Zhou et al. 2020). Levels 1/16, 1/8, 1/4, 1/2 and 1/1: the field so far is resized, the moving features are warped by it, and a few
    convolutions of both maps (and of the level before) give what is added to it.

    Args:
        variant (str): "prdfe"; "iprdfe": averaged images instead of learned features; "pdfe": each level predicts the
            whole field, the one before serves only to warp.
        encoder (4 widths), decoder (7 widths: one a level, two at 1/2 and 1/1).
        ndim (int): 3 or 2.
        halving (str): of the encoder's sizes: "stride", by its convolutions, as VoxelMorph's; "max" or "mean": convolutions at full
            size and pooling after them, as the paper's text has it, which does not say of which kind; as many parameters.
        unet_skip (bool): the decoder's map goes on to the next level (figure 2); False: not (equation 2 to the letter).
        direct (bool): residuals resized to a level in one go (equation 4) instead of level by level.
        scale_magnitude (bool or None): whether a resized field is multiplied by the ratio of sizes. None: yes, but for
            "pdfe", which stands for methods that do not.
        weight (float): of the diffusion of the displacement in voxels.
        padding, checkpoint (str): see Model.

    Sizes need not be divisible by anything: a level has half the size, rounded up. Prediction.fields: the field at each
    level, in voxels of that level. 654,887 parameters ("paper": brain scans), 3,800,586 ("simulation": 2D figures).
    """

    # The steps are ours: 48 hours are not a number of steps.
    recipe = Recipe(batch_size=4, steps=150_000)
    paper_input = PaperInput("percentiles", (120, 144, 160))
    ndims = (3, 2)
    divisor = 1

    def __init__(
        self,
        *,
        variant: str = "prdfe",
        encoder: Sequence[int] = (24, 40, 40, 40),
        decoder: Sequence[int] = (40, 40, 40, 40, 40, 24, 24),
        ndim: int = 3,
        halving: str = "stride",
        unet_skip: bool = True,
        direct: bool = False,
        scale_magnitude: bool | None = None,
        weight: float = 0.001,
        padding: Padding = "border",
        checkpoint: str = "none",
    ) -> None:
        super().__init__()
        self.choice("variant", variant, VARIANTS)
        self.choice("halving", halving, HALVINGS)
        if len(encoder) != 4 or len(decoder) != 7:
            self.fail(ValueError, f"encoder must have 4 widths and decoder 7, got {encoder} and {decoder}")
        self.variant, self.ndim, self.unet_skip, self.direct = variant, ndim, unet_skip, direct
        self.scale_magnitude = variant != "pdfe" if scale_magnitude is None else scale_magnitude
        self.weight, self.padding, self.checkpoint, self.halving = weight, padding, checkpoint, halving
        features = (1, 1, 1, 1) if variant == "iprdfe" else encoder
        if variant == "iprdfe":
            self.encoder = nn.ModuleList()
        else:
            inputs = (1, *encoder[:3])
            stride = 2 if halving == "stride" else 1
            self.encoder = nn.ModuleList(
                conv(ndim, i, o, stride=stride) for i, o in zip(inputs, encoder, strict=True)
            )
        d = decoder
        widths = [(d[0],), (d[1],), (d[2],), (d[3], d[4]), (d[5], d[6])]
        self.decoder, self.heads, below = nn.ModuleList(), nn.ModuleList(), 0
        for outputs, maps in zip(widths, (*features[::-1], 1), strict=True):
            inputs = (2 * maps + below, *outputs[:-1])
            self.decoder.append(nn.ModuleList(conv(ndim, i, o) for i, o in zip(inputs, outputs, strict=True)))
            self.heads.append(FlowHead(ndim, outputs[-1]))
            below = outputs[-1] if unet_skip else 0

    def _encode(self, image):
        x, levels = image, [image]
        images = self.variant == "iprdfe"
        pool = POOLS.get((self.ndim, "mean" if images else self.halving))
        for k in range(4):
            if not images:
                x = activated(self.encoder[k], x, SLOPE)
            if pool is not None:
                x = pool(x, 2, ceil_mode=True)
            levels.append(x)
        return levels[::-1]

    def _resized(self, u, size):
        if u.shape[2:] == size:
            return u
        scale = "exact" if self.scale_magnitude else 1
        return ops.resize_displacement(u, size, align_corners=False, scale=scale)

    def predict(self, fixed: Tensor, moving: Tensor, f_levels: list[Tensor]) -> Prediction:
        m_levels = self._encode(moving)
        h, fields, steps = None, list[Tensor](), list[Tensor]()

        def level(layers, *sources):
            x = concat_conv(layers[0], sources, SLOPE)
            for layer in layers[1:]:
                x = activated(layer, x, SLOPE)
            return x

        for layers, head, f, m in zip(self.decoder, self.heads, f_levels, m_levels, strict=True):
            u: Any = None
            if fields:
                size = f.shape[2:]
                u = (
                    sum(self._resized(s, size) for s in steps)
                    if self.direct and self.variant != "pdfe"
                    else self._resized(fields[-1], size)
                )
                m = ops.warp(m, u, padding=self.padding)
            # The last source has the size of the level; the map of the level before is read at the nearest voxel.
            sources = (h, f, m) if h is not None and self.unet_skip else (f, m)
            h = self.block(lambda *sources, layers=layers: level(layers, *sources), *sources)
            step = head(h)
            steps.append(step)
            fields.append(step if u is None or self.variant == "pdfe" else u + step)
        return Prediction(fields[-1], fields)

    def terms(
        self, fixed: Tensor, moving: Tensor, prediction: Prediction, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        u = prediction.displacement
        return {
            "similarity": ops.mse_loss(fixed, ops.warp(moving, u, padding=self.padding), mask=mask),
            "regularity": self.weight * ops.diffusion(u),
        }
