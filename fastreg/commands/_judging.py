"""What `fastreg register` looks at before it calls its own result one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastreg import _channels, _inconsistency, _similarity
from fastreg._descent import LINEAR
from fastreg.registration import Registration, _pyramid

Doubt = Callable[[str], None]

# That a similarity may lose: of what it was; of any, or images that are alike before and after would be suspect.
_GIVEN_UP, _ALIKE = 0.01, 1e-4
# Of the parameters, what the way back needs too.
_LED = ("channel_weights", "affine", "landmark_weight", "label_weight")
_FEWEST = 9  # voxels along each axis, of a cube of which fewer count: less than one window


def few_voxels(weights: torch.Tensor | None, moving_weights: torch.Tensor | None, doubt: Doubt) -> None:
    """Says where masks leave next to nothing to register by. weights: (1, 1, *spatial), or None: all count."""
    masks = [w > 0 for w in (weights, moving_weights) if w is not None]
    if not masks:
        return
    counts = int(torch.stack(masks).all(0).sum())
    nd = masks[0].ndim - 2
    if counts < min(_FEWEST**nd, masks[0].numel() // 2):
        s = "" if counts == 1 else "s"
        doubt(f"only {counts} voxel{s} of {masks[0].numel()} count in both images: too few to register by")


def judge(
    result: Registration,
    images: tuple[torch.Tensor, torch.Tensor],
    masks: tuple[torch.Tensor | None, torch.Tensor | None],
    spacing: Sequence[float],
    parameters: Mapping[str, Any],
    used: Mapping[str, Any],
    doubt: Doubt,
) -> tuple[dict[str, float], _inconsistency.Map | None]:
    """(the similarity before and after, how consistent the motion is with the way back).

    images, masks, used: as `register` took them, the start being theirs.
    """
    fixed, moving = images
    u, shapes = result.displacement, _pyramid(tuple(fixed.shape[2:]), spacing, None)
    # not at voxels so fine that nothing was sought there
    sought = {
        tuple(level["shape"])
        for level in result.levels
        if level["iterations"] and level["transform"] == parameters["transform"]
    }
    shapes = [shape for shape in shapes if shape in sought] or shapes
    shares = _channels.shares_of(parameters.get("channel_weights"), fixed.shape[1])
    compared = result.similarity, parameters["window"], fixed, moving, u, *masks
    before, after = _similarity.fits(*compared, shapes, shares)
    # for its own regularisation a descent may give some of it up
    if after > before + max(_GIVEN_UP * abs(before), _ALIKE):
        doubt(f"the images are less alike than before, by {result.similarity}: {before:.4f} -> {after:.4f}")
    inconsistency = None
    if parameters["transform"] not in LINEAR:
        # what needed no search one way needs none on the way back, where it is half of the time
        search = parameters["search_range"] if result.discrete and result.discrete["used"] else 0.0
        led = {name: parameters[name] for name in _LED if name in parameters} | dict(used)
        of = fixed, moving, u, spacing, result.similarity, *masks, search
        try:
            inconsistency = _inconsistency.measure(*of, **led)
            if inconsistency.far > _inconsistency.SUSPECT:
                again = _inconsistency.measure(*of, thorough=True, **led)
                inconsistency = min(inconsistency, again, key=lambda one: one.far)
        except ValueError as error:  # what was found one way is no less a result
            doubt(f"from the moving image back to the fixed one there is no way: {error}")
    return {"before": before, "after": after}, inconsistency
