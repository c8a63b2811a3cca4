"""Images of one place over time, and which of them the others are registered to."""

import torch

from fastreg._refusals import refuse

__all__ = ["fixed_of_series"]

PLACE = "fastreg.data.fixed_of_series: "


def fixed_of_series(images: torch.Tensor, phases: torch.Tensor | None = None) -> int:
    """Which image of a series the others are registered to: that nearest the mean phase. Sandkuehler et al. 2019, section 4.

    So the others are registered in both directions, and no further than half of the motion.

    Args:
        images (Tensor): (T, ...) of one place, any dtype and scale, T at least 2.
        phases (Tensor or None): (T,), respiratory phase or amplitude of each. None: each image's mean intensity stands for
            it, as in the authors' code (a lung that fills grows darker).

    Returns:
        int: an index into images, the first of several.

    Raises:
        TypeError: images or phases are no tensor.
        ValueError: fewer than two images, other than T phases, or one that is not finite.

    Example:
        >>> images = torch.tensor([1.0, 2.0, 6.0, 8.0]).view(4, 1, 1, 1).expand(4, 1, 3, 3)
        >>> fastreg.data.fixed_of_series(images)  # the mean is 4.25
        2
        >>> fastreg.data.fixed_of_series(images, torch.tensor([0.0, 0.4, 1.0, 0.3]))
        1
    """
    for name, value in (("images", images), ("phases", phases)):
        if not isinstance(value, torch.Tensor) and not (name == "phases" and value is None):
            refuse(TypeError, PLACE, f"{name} must be a tensor, got {type(value).__name__}")
    if images.ndim < 2 or len(images) < 2 or images.numel() == 0:
        refuse(
            ValueError,
            PLACE,
            f"images must be a series of at least 2 along axis 0, got {tuple(images.shape)}",
        )
    if phases is None:
        phases = images.double().flatten(1).mean(1)
    elif phases.shape != images.shape[:1]:
        refuse(ValueError, PLACE, f"phases must have shape ({len(images)},), got {tuple(phases.shape)}")
    phases = phases.double()
    if not phases.isfinite().all():
        refuse(ValueError, PLACE, "the phase of each image, or its mean intensity, must be finite")
    return int((phases - phases.mean()).abs().argmin())
