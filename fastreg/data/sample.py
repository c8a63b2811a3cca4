"""What a net is trained on."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sample:
    """A pair as a net takes it: images (1, 1, *spatial) of one shape; mask: the same shape, weights, or None."""

    name: str
    fixed: torch.Tensor
    moving: torch.Tensor
    mask: torch.Tensor | None = None
