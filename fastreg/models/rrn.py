"""RRN, Recursive Refinement Network (He et al. 2021): a feature pyramid, and per level a warp, a normalised local cost
volume and a dense estimator that refines the displacement of the level below.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastreg import ops
from fastreg.ops.warp import Padding

from .base import Model, Prediction
from .blocks import FlowHead, activated, concat_conv, conv, dense_block, single
from .recipe import PaperInput, Recipe

PYRAMID_SLOPE, SLOPE = 0.1, 0.05
PYRAMID = (16, 32, 64, 96)
DENSE = (128, 128, 96, 64, 32)
REFINE, DILATIONS = (128, 128, 128, 96, 64, 32), (1, 2, 4, 8, 16, 1)
REGULARIZERS = {"tv": 0.01, "diffusion": 1.25}  # and their weights


class _Estimator(nn.Module):
    """Context and displacement of a level from what the level knows."""

    def __init__(self, inputs, dense, deviation):
        super().__init__()
        widths = [inputs + sum(dense[:k]) for k in range(len(dense))]
        self.layers = nn.ModuleList(conv(3, i, o) for i, o in zip(widths, dense, strict=True))
        self.head = FlowHead(3, dense[-1], deviation=deviation)

    def forward(self, activate, *sources):
        context = dense_block(self.layers, sources, SLOPE, activate=activate)
        return context, self.head(context)


class RRN(Model, released={"regularizer": "diffusion"}):
    """RRN (He et al. 2021). Displacements at 1/16, 1/8 and 1/4 of the size, each added to the doubled one before, a dilated refinement at 1/4,
    then two doublings.

    Args:
        cost_volume (bool): False: the normalised features themselves instead (the paper's ablation).
        radius (int): of the cost volume.
        normalize (bool): features to the mean and deviation of the pair, per sample.
        window (int): of the LCC (the paper does not say; the authors' code has 5).
        regularizer (str): "tv" (paper) or "diffusion" (released), of the displacement in voxels.
        weight (float or None): of it; None: 0.01 for "tv", 1.25 for "diffusion".
        deviation (float or None): of the flow heads' initial weights; None: PyTorch's, as released.
        pyramid (4 widths), dense (of an estimator, the last of its context), refine (6 widths): the paper's by default.
        padding (str): of the loss's warp; features are warped with zeros. checkpoint (str): see Model.

    Prediction.fields: displacements at 1/16, 1/8, 1/4 and the refined one at 1/4, in voxels of their (padded) grids.
    16,652,076 parameters; 16,760,940 without the cost volume.
    """

    # "Till the value of LCC is stable": over 20 of the authors' epochs of 50 pairs, to a thousandth.
    recipe = Recipe(epoch=50, steps=25_000, watch="similarity", patience=20, tolerance=1e-3)
    paper_input = PaperInput((-1000, -100), (256, 256, 256))

    def __init__(
        self,
        *,
        cost_volume: bool = True,
        radius: int = 2,
        normalize: bool = True,
        window: int = 5,
        regularizer: str = "tv",
        weight: float | None = None,
        deviation: float | None = None,
        pyramid: Sequence[int] = PYRAMID,
        dense: Sequence[int] = DENSE,
        refine: Sequence[int] = REFINE,
        padding: Padding = "zeros",
        checkpoint: str = "none",
    ) -> None:
        super().__init__()
        self.choice("regularizer", regularizer, REGULARIZERS)
        self.cost_volume, self.radius, self.normalize = cost_volume, radius, normalize
        if radius < 0 or window < 1 or window % 2 == 0:
            self.fail(ValueError, f"radius must be >= 0 and window odd, got {radius} and {window}")
        if len(pyramid) != 4 or len(dense) < 1 or len(refine) != 6:
            self.fail(
                ValueError,
                f"pyramid must have 4 widths, dense at least 1 and refine 6, got {pyramid}, {dense} and {refine}",
            )
        self.window, self.regularizer = window, regularizer
        self.weight = REGULARIZERS[regularizer] if weight is None else weight
        self.padding, self.checkpoint = padding, checkpoint
        inputs, context = (1, *pyramid[:-1]), dense[-1]
        self.pyramid = nn.ModuleList(
            nn.ModuleList([conv(3, i, o, stride=2), conv(3, o, o), conv(3, o, o)])
            for i, o in zip(inputs, pyramid, strict=True)
        )
        # Coarse to fine: 1/16, 1/8, 1/4.
        matches = [c + ((2 * radius + 1) ** 3 if cost_volume else 2 * c) for c in pyramid[:0:-1]]
        widths = [m + (context + 3 if k else 0) for k, m in enumerate(matches)]
        self.estimators = nn.ModuleList(_Estimator(w, dense, deviation) for w in widths)
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(context, context, 4, stride=2, padding=1) for _ in range(2)
        )
        inputs = (context + 3, *refine[:-1])
        self.refine = nn.ModuleList(
            conv(3, i, o, dilation=d) for i, o, d in zip(inputs, refine, DILATIONS, strict=True)
        )
        self.head = FlowHead(3, refine[-1], deviation=deviation)

    def _encode(self, image):
        def level(x, *layers):
            for layer in layers:
                x = activated(layer, x, PYRAMID_SLOPE)
            return x

        x, features = 2 * image - 1, []
        for layers in self.pyramid:
            x = self.block(lambda x, layers=layers: level(x, *layers), x)
            features.append(x)
        return features[:0:-1]

    def _match(self, fixed, moving, u):
        """The cost volume (or both maps) of a level, and how many of its channels the estimator has to activate."""
        if self.cost_volume:
            cost = ops.local_correlation(
                fixed, moving, self.radius, displacement=u, normalize=self.normalize, padding="zeros"
            )
            return [cost], cost.shape[1]
        warped = moving if u is None else ops.warp(moving, u, padding="zeros")
        return list(_normalized(fixed, warped) if self.normalize else (fixed, warped)), 0

    def predict(self, fixed: Tensor, moving: Tensor, f_levels: list[Tensor]) -> Prediction:
        m_levels = self._encode(moving)
        u: Any = None
        context: Any = None
        fields: list[Tensor] = []
        for k, (f, m) in enumerate(zip(f_levels, m_levels, strict=True)):
            carried = []
            if k:
                u = ops.resize_displacement(u, f.shape[2:], scale=2)
                context = self.ups[k - 1](context)
                carried = [context, u]
            matched, activate = self._match(f, m, u)
            context, step = self.block(self.estimators[k], activate, *matched, f, *carried)
            u = step if u is None else u + step
            fields.append(u)

        def refine(context, u):
            x = concat_conv(self.refine[0], (context, u), SLOPE)
            for layer in self.refine[1:]:
                x = activated(layer, x, SLOPE)
            return self.head(x)

        u = u + self.block(refine, context, u)
        fields.append(u)
        for _ in range(2):
            u = ops.resize_displacement(u, [2 * n for n in u.shape[2:]], scale=2)
        return Prediction(u, fields)

    def terms(
        self, fixed: Tensor, moving: Tensor, prediction: Prediction, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        u = prediction.displacement
        moved = ops.warp(moving, u, padding=self.padding)
        regularizer = ops.total_variation if self.regularizer == "tv" else ops.diffusion
        return {
            "similarity": ops.lcc_loss(fixed, moved, self.window, mask=mask),
            "regularity": self.weight * regularizer(u),
        }


def _normalized(f, m):
    """Both maps to mean 0 and deviation 1, of the averages of their statistics, as local_correlation has them."""
    f, m = single(f), single(m)
    axes = tuple(range(1, f.ndim))
    mean = (f.mean(axes, keepdim=True) + m.mean(axes, keepdim=True)) / 2
    deviation = (f.std(axes, keepdim=True) + m.std(axes, keepdim=True)) / 2
    return (torch.sub(t, mean) / (deviation + 1e-6) for t in (f, m))
