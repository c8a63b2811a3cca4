"""LinDef, linear and deformable registration with a 3D CNN (Christodoulidis et al. 2018): one net at full resolution gives
the spatial gradients of a deformable map, which are summed up, and an affine matrix.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreg import ops
from fastreg.ops.warp import Padding

from .base import Model, Prediction
from .blocks import FlowHead, chain, conv, norm_act_
from .recipe import PaperInput, Recipe

SLOPE = 0.2
DILATIONS = (1, 1, 2, 3, 5)
SQUEEZE = 16  # features by channels of it
ORDERS = ("two_pass", "single_pass", "legacy")
BETAS = {"mean": 0.01, "sum": 0.01, "keras": 1e-6}  # of a reduction


class LinDef(Model):
    """LinDef (Christodoulidis et al. 2018). Five dilated convolutions whose outputs all go on to a decoder of gradients Phi in (0, 2), whose sums along each
    axis are the deformable map G_N (Phi = 1: the identity), and to a mean over space that gives the affine map G_A.

    The loss is ``similarity(R, D) + alpha |A - I| + beta |Phi - 1|`` for the fixed image R and the moved one D.

    Args:
        affine (bool): False: the deformable part alone. deformable (bool): False: the affine part alone.
        order (str): "two_pass" (paper): S is resampled by G_N, the result by G_A; "single_pass": S once, at
            G_N(G_A(p)), the same map with less blur; "legacy": S once at G_A(G_N(p)), as the authors' code has it.
        similarity (str): "mse" (paper), "lcc", "mind" (MIND-SSC) or "mi" (32 Gaussian windows; intensities in [0, 1]).
        window (int): of the LCC. mind (dict or None): options of fastreg.mind_loss, for similarity "mind".
        alpha (float): of the absolute deviation of the affine matrix from the identity, 12 numbers in [-1, 1] coordinates, summed.
        beta (float or None): of that of Phi, three numbers a voxel; both averaged over the batch. None: 0.01, and with "keras" the
            paper's 1e-6, which a voxel is as good as nothing: 0.01 costs no squared error and folds less (docs/methods/lindef.md).
        reduction (str): "mean": similarity and the deviation of Phi a voxel, so that what they pull with against each other
            does not depend on the image's size. "sum": both summed over the voxels, the paper's norms as they are printed;
            the loss, and what alpha weighs beside it, then grow with the image. "keras": the similarity a voxel, the
            deviation of Phi summed, as a mean squared error beside a Keras regulariser: what beta weighs then grows with the
            image, and at the paper's size most of Phi stays at 1.
        encoder, decoder (5 widths each): the paper's by default.
        padding, checkpoint (str): see Model.

    Any size; the identity before training. Prediction.fields: Phi and the displacement of G_N, none with deformable=False;
    Prediction.displacement: of the whole map in one, also with "two_pass". 1,767,875 parameters; 1,764,383 without the
    affine part, 420,228 without the deformable one.

    Where the paper is silent: it speaks of up-sampling in the decoder, but its encoder never shrinks the maps, so there is
    none here; widths, dilations and the squeeze's 16 are those that give its 290 features and field of 25 voxels; the slope
    of the LeakyReLU is 0.2; G_N is the running sum minus 1, so that Phi = 1 is the identity; A acts on [-1, 1] coordinates.
    "Avoid self-crossings": each coordinate grows along its own axis, which does not keep the Jacobian determinant positive.
    """

    # The authors look every 100 batches, and 300 of their epochs in 16 hours can be no more than that.
    recipe = Recipe(
        learning_rate=1e-3,
        batch_size=2,
        plateau=50,
        patience=100,
        epoch=100,
        steps=30_000,
        watch="validation",
    )
    paper_input = PaperInput((0, 1300), (64, 192, 192))
    divisor = 1
    size_bound = True

    def __init__(
        self,
        *,
        affine: bool = True,
        deformable: bool = True,
        order: str = "two_pass",
        similarity: str = "mse",
        window: int = 9,
        mind: dict[str, Any] | None = None,
        alpha: float = 1e-6,
        beta: float | None = None,
        reduction: str = "mean",
        encoder: Sequence[int] = (32, 64, 128, 32, 32),
        decoder: Sequence[int] = (128, 64, 32, 32, 32),
        padding: Padding = "border",
        checkpoint: str = "none",
    ) -> None:
        super().__init__()
        if len(encoder) != 5 or len(decoder) != 5:
            self.fail(ValueError, f"encoder and decoder must have 5 widths, got {encoder} and {decoder}")
        if not (affine or deformable):
            self.fail(ValueError, "affine and deformable must not both be False")
        self.choice("order", order, ORDERS)
        self.choice("reduction", reduction, BETAS)
        self.compare_by(similarity, window, mind)
        self.affine, self.deformable, self.order = affine, deformable, order
        self.alpha, self.reduction = alpha, reduction
        self.beta = BETAS[reduction] if beta is None else beta
        self.padding, self.checkpoint = padding, checkpoint
        inputs = (2, *encoder[:-1])
        self.encoder = nn.ModuleList(
            conv(3, i, o, dilation=d) for i, o, d in zip(inputs, encoder, DILATIONS, strict=True)
        )
        features = 2 + sum(encoder)
        if deformable:
            squeezed = max(1, features // SQUEEZE)
            self.squeeze, self.excite = nn.Linear(features, squeezed), nn.Linear(squeezed, features)
            inputs = (features, *decoder[:-1])
            self.decoder = nn.ModuleList(conv(3, i, o) for i, o in zip(inputs, decoder, strict=True))
            self.head = FlowHead(3, decoder[-1], deviation=0)
        self.linear = nn.Linear(features, 12) if affine else None
        if self.linear is not None:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def predict(self, fixed: Tensor, moving: Tensor) -> Prediction:
        # Two blocks: each layer as one would keep what the next one keeps anyway.
        x, step = self.block(self._encoded, torch.cat([moving, fixed], 1))
        if not self.deformable:
            matrix = _to_voxels(step, fixed.shape[2:])
            return Prediction(ops.affine_displacement(matrix, fixed.shape[2:]), [], matrix)
        phi = 2 * torch.sigmoid(self.head(self.block(self._decoded, x)))
        u = ops.integrate_gradients(phi)
        if step is None:
            return Prediction(u, [phi, u])
        matrix = _to_voxels(step, u.shape[2:])
        linear = ops.affine_displacement(matrix, u.shape[2:])
        if self.order == "legacy":
            # A (p + u) - p, also where p + u lies outside.
            with torch.autocast(u.device.type, enabled=False):
                whole = linear + (matrix[:, :, :3] @ u.flatten(2)).view_as(u)
        else:
            whole = ops.compose(u, linear, padding="border")
        return Prediction(whole, [phi, u], matrix)

    def _encoded(self, pair):
        """The decoder's first map and the affine step; None for a part that the net has not."""
        features = chain(self.encoder, pair, SLOPE)
        mean = features.mean((2, 3, 4), dtype=torch.promote_types(features.dtype, torch.float32))
        with torch.autocast(mean.device.type, enabled=False):
            step = self.linear(mean).view(-1, 3, 4) if self.affine else None
            if not self.deformable:
                return None, step
            scale = torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))
        return self._excited(features, scale), step

    def _decoded(self, x):
        for layer in self.decoder[1:]:
            x = norm_act_(layer(x), SLOPE)
        return x

    def _excited(self, features, scale):
        """The decoder's first layer on features times scale: the scale goes into its weights, sample by sample."""
        layer, out = self.decoder[0], []
        # split's backward would copy the gradient of the only one.
        for x, s in zip(features.split(1) if len(features) > 1 else [features], scale, strict=True):
            out.append(F.conv3d(x, layer.weight * s.view(1, -1, 1, 1, 1), layer.bias, padding=layer.padding))
        return norm_act_(out[0] if len(out) == 1 else torch.cat(out), SLOPE)

    def terms(
        self, fixed: Tensor, moving: Tensor, prediction: Prediction, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        voxels = fixed.shape[2:].numel()
        a_voxel = {"mean": (1, 1 / voxels), "sum": (voxels, 1), "keras": (1, 1)}
        of_similarity, of_phi = a_voxel[self.reduction]
        moved, matrix = moving, prediction.affine
        if self.affine and self.deformable and self.order != "two_pass":
            moved = ops.warp(moved, prediction.displacement, padding=self.padding)
        else:
            if self.deformable:
                moved = ops.warp(moved, prediction.fields[1], padding=self.padding)
            if self.affine:
                moved = ops.warp(moved, None, affine=matrix, padding=self.padding)
        terms = {"similarity": of_similarity * self.compared(fixed, moved, mask)}
        if self.deformable:
            phi = prediction.fields[0]
            terms["regularity"] = self.beta * of_phi * (phi - 1).abs().sum() / len(phi)
        if self.affine:
            step = _to_unit(matrix, fixed.shape[2:])
            terms["affine"] = self.alpha * step.abs().sum() / len(step)
        return terms


def _half(shape, like):
    """Voxels per unit of [-1, 1] coordinates, per axis."""
    return like.new_tensor([max(n - 1, 1) / 2 for n in shape])


def _to_voxels(step, shape):
    """Affine map I + step of (z, y, x) in [-1, 1], origin at the centre, as a map of voxels: (N, 3, 4)."""
    h = _half(shape, step)
    linear = torch.eye(3, dtype=step.dtype, device=step.device) + step[:, :, :3]
    scaled = linear * (h[:, None] / h)
    return torch.cat([scaled, (h * (step[:, :, 3] + 1 - linear.sum(2)))[..., None]], 2)


def _to_unit(matrix, shape):
    """The step that _to_voxels made this matrix of."""
    h = _half(shape, matrix)
    linear = matrix[:, :, :3] * (h / h[:, None])
    shift = matrix[:, :, 3:] / h[:, None] - 1 + linear.sum(2, keepdim=True)
    return torch.cat([linear - torch.eye(3, dtype=h.dtype, device=h.device), shift], 2)
