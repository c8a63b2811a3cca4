"""What a paper fixes beside its net: how it is trained, and on what."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    learning_rate, amsgrad: of Adam. batch_size: pairs of a step, over all processes. clip_gradient: greatest norm, or None.
    plateau: epochs without a better value of what is watched, after which the learning rate is divided by ten, or None. patience:
    the same, and training ends. epoch: steps of one; None: all pairs once. steps: number of optimiser steps.
    watch: what plateau and patience look at when an epoch ends: "loss", or a term of it ("similarity"): the mean over the epoch's
    steps; "validation": the loss of the pairs that are validated on. tolerance: what is better by no more than that is no better.
    labels_weight: of one minus the Dice of labels, which is added to the loss; 0: labels are not looked at.
    """

    learning_rate: float = 1e-4
    amsgrad: bool = False
    batch_size: int = 1
    clip_gradient: float | None = None
    plateau: int | None = None
    patience: int | None = None
    epoch: int | None = None
    steps: int = 25_000
    watch: str = "loss"
    tolerance: float = 0.0
    labels_weight: float = 0.0


@dataclass(frozen=True)
class PaperInput:
    """What a paper gives its net; `paper` on the command line.

    intensity: as of Preprocessing. size: voxels, (z, y, x). spacing: mm of them, where images are cropped or padded to it and not
    resampled; None: they are resampled, or the paper does not say.
    """

    intensity: str | tuple[float, float]
    size: tuple[int, ...]
    spacing: tuple[float, ...] | None = None
