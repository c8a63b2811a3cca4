"""VoxelMorph (Balakrishnan et al. 2018): a U-Net from the pair to the displacement. The baseline of four of the papers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastreg import ops
from fastreg.ops.warp import Padding

from .base import Model, Prediction
from .blocks import FlowHead, activated, concat_conv, conv
from .recipe import PaperInput, Recipe

SLOPE = 0.2
REGULARIZERS = ("diffusion", "tv")


class VoxelMorph(Model, vm1={"decoder": (32, 32, 32, 32, 8, 8)}, vm2={}):
    """VoxelMorph (Balakrishnan et al. 2018). Four halving convolutions, then convolutions at 1/16, 1/8, 1/4, 1/2 (two) and 1/1 (one or two) of the size, each
    after nearest upsampling and concatenation with the encoder's map of its size; at full size with the images.

    Args:
        encoder, decoder (sequence): channels; VM-2 by default, VM-1: decoder (32, 32, 32, 32, 8, 8).
        ndim (int): 3 or 2.
        similarity (str): "lcc", "mse", "mind" (MIND-SSC) or "mi" (32 Gaussian windows; intensities in [0, 1]).
        window (int): of the LCC. mind (dict or None): options of fastreg.mind_loss, for similarity "mind".
        regularizer (str): "diffusion" or "tv", of the displacement in voxels. weight (float): of it.
        padding, checkpoint (str): see Model.

    Prediction.fields is empty. 259,675 parameters (VM-1), 300,547 (VM-2).
    """

    recipe = Recipe(steps=150_000)
    paper_input = PaperInput("percentiles", (160, 192, 224), (1, 1, 1))
    ndims = (3, 2)

    def __init__(
        self,
        *,
        encoder: Sequence[int] = (16, 32, 32, 32),
        decoder: Sequence[int] = (32, 32, 32, 32, 32, 16, 16),
        ndim: int = 3,
        similarity: str = "lcc",
        window: int = 9,
        mind: dict[str, Any] | None = None,
        regularizer: str = "diffusion",
        weight: float = 1.0,
        padding: Padding = "zeros",
        checkpoint: str = "none",
    ) -> None:
        super().__init__()
        if len(encoder) != 4 or len(decoder) not in (6, 7):
            self.fail(ValueError, f"encoder must have 4 widths, decoder 6 or 7, got {encoder} and {decoder}")
        self.choice("regularizer", regularizer, REGULARIZERS)
        self.compare_by(similarity, window, mind)
        self.ndim, self.regularizer, self.weight = ndim, regularizer, weight
        self.padding, self.checkpoint = padding, checkpoint
        e, d = encoder, decoder
        inputs = (2, *e[:3])
        self.encoder = nn.ModuleList(conv(ndim, i, o, stride=2) for i, o in zip(inputs, e, strict=True))
        inputs = (e[3], d[0] + e[2], d[1] + e[1], d[2] + e[0], d[3], d[4] + 2, *d[5:-1])
        self.decoder = nn.ModuleList(conv(ndim, i, o) for i, o in zip(inputs, d, strict=True))
        self.head = FlowHead(ndim, d[-1])

    def predict(self, fixed: Tensor, moving: Tensor) -> Prediction:
        skips = [fixed.new_empty(0)] * 4
        x = fixed
        for k, layer in enumerate(self.encoder):
            x = concat_conv(layer, (moving, fixed), SLOPE) if k == 0 else activated(layer, x, SLOPE)
            skips[k] = x
        d = self.decoder
        x = activated(d[0], x, SLOPE)
        for layer, skip in zip(d[1:4], skips[2::-1], strict=True):
            x = self.block(lambda x, skip, layer=layer: concat_conv(layer, (x, skip), SLOPE), x, skip)
        x = activated(d[4], x, SLOPE)
        x = self.block(lambda x, m, f: concat_conv(d[5], (x, m, f), SLOPE), x, moving, fixed)
        for layer in d[6:]:
            x = activated(layer, x, SLOPE)
        return Prediction(self.head(x))

    def terms(
        self, fixed: Tensor, moving: Tensor, prediction: Prediction, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        u = prediction.displacement
        moved = ops.warp(moving, u, padding=self.padding)
        regularizer = ops.total_variation if self.regularizer == "tv" else ops.diffusion
        return {
            "similarity": self.compared(fixed, moved, mask),
            "regularity": self.weight * regularizer(u),
        }
