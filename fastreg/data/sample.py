"""What a net is trained on."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sample:
    """A pair as a net takes it: images (1, 1, *spatial) of one shape; of the same shape, or None: mask, weights; fixed_labels and
    moving_labels, integer, of a training whose recipe weighs them.
    """

    name: str
    fixed: torch.Tensor
    moving: torch.Tensor
    mask: torch.Tensor | None = None
    fixed_labels: torch.Tensor | None = None
    moving_labels: torch.Tensor | None = None
