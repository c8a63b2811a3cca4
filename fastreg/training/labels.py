"""Labels as something to train by, beside the images: the Dice of each one, moved by the displacement."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastreg import ops
from fastreg._channels import HELD, in_turn
from fastreg._refusals import refuse
from fastreg.data.sample import Sample

PLACE = "fastreg::train: "


def labels_of(sample: Sample) -> tuple[Tensor, Tensor]:
    """Those of a Sample, checked: (1, 1, *spatial), int64. ValueError: it has none; TypeError: they are no whole numbers."""
    maps = []
    for side in ("fixed", "moving"):
        labels, shape = getattr(sample, f"{side}_labels"), tuple(sample.fixed.shape)
        if labels is None:
            refuse(
                ValueError,
                PLACE,
                f"{sample.name} has no {side}_labels, which labels_weight asks for (of Pairs: labels=True)",
            )
        if labels.is_floating_point() or labels.is_complex():
            refuse(
                TypeError,
                PLACE,
                f"{side}_labels of {sample.name} must be integer or bool, got {labels.dtype}",
            )
        if labels.shape != shape:
            got = tuple(labels.shape)
            refuse(ValueError, PLACE, f"{side}_labels of {sample.name} must have shape {shape}, got {got}")
        maps.append(labels.long())
    return maps[0], maps[1]


def with_labels(
    terms: Mapping[str, Tensor],
    weight: float,
    labels: tuple[Tensor, Tensor],
    u: Tensor,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """Terms of a loss with that of the labels. The loss of a model that tells no terms is then one of two: "images"."""
    own = {"images" if name == "loss" else name: term for name, term in terms.items()}
    return {**own, "labels": weight * dice_loss(*labels, u, names)}


def dice_loss(fixed_labels: Tensor, moving_labels: Tensor, u: Tensor, names: Sequence[str]) -> Tensor:
    """``1 - 2 sum(f m) / (sum(f) + sum(m))``, in the mean over the labels that both images of a pair have, but for the background 0,
    and then over pairs: f is where fixed_labels are one label, m where moving_labels are, warped by u (linear, 0 outside).
    Balakrishnan et al. 2019.

    A few labels at a time are moved, and their gradient made at once: memory does not grow with their number. Differentiable
    (once) in u.

    Args: fixed_labels, moving_labels (Tensor): (N, 1, *spatial), integer. u (Tensor): (N, nd, *spatial), voxels. names: of the pairs,
    for errors. Returns: Tensor: scalar, 0 to 1. Raises: ValueError: the images of a pair share no label.
    """
    losses = []
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    for k, name in enumerate(names):
        fixed, moving = fixed_labels[k : k + 1], moving_labels[k : k + 1]
        both = set(fixed.unique().tolist()) & set(moving.unique().tolist())
        shared = sorted(both - {0})
        if not shared:
            refuse(
                ValueError, PLACE, f"no label but 0 is in both images of {name}, as labels_weight asks for"
            )
        parts = [_part(fixed, moving, shared[at : at + HELD]) for at in range(0, len(shared), HELD)]
        losses.append(in_turn(u[k : k + 1], parts) / len(shared))
    return torch.stack(losses).mean()


def _part(fixed: Tensor, moving: Tensor, some: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The sum over some labels, of a displacement."""

    def part(u: Tensor) -> Tensor:
        labels = torch.tensor(some, device=u.device).view(1, -1, *[1] * (fixed.ndim - 2))
        f, m = ((image == labels).to(u.dtype) for image in (fixed, moving))
        m = ops.warp(m, u)
        axes = tuple(range(2, m.ndim))
        overlap = 2 * (f * m).sum(axes) / (f.sum(axes) + m.sum(axes))
        return (1 - overlap).sum()

    return part
