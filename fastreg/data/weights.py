"""What of a pair's images counts: masks, NaN, and padding that looks like none."""

import numpy as np
import torch

from fastreg._descent import filled
from fastreg._files import InputError, Name
from fastreg.io._reading import Reading, Warn, ignore

# Padding: more than a hundredth of the voxels hold one extreme value, further from all others than a share of their range.
_PADDED, _FAR = 0.01, 0.3
SMALL_OVERLAP = 0.1  # of the fixed image, that is told
_MANY = 27  # voxels: of the few that a small mask leaves, any one is a large share


def known(array: np.ndarray) -> np.ndarray | None:
    """Where an image holds numbers, bool; None: everywhere."""
    if array.dtype.kind != "f":
        return None
    finite = np.isfinite(array)
    return None if finite.all() else finite


def counting(path: Name, array: np.ndarray, mask: np.ndarray | None, reading: Reading) -> np.ndarray | None:
    """The mask of an image, 0 also where it holds no number, if `reading` says that this may be; None: all of it counts.

    InputError: it may not be, and the mask counts such voxels.
    """
    finite = known(array)
    if finite is None:
        return mask
    bad = int((~finite if mask is None else ~finite & (mask > 0)).sum())
    if not bad:
        return mask
    if reading.nan != "mask":
        raise InputError(
            f"{path}: must be finite, got NaN or infinity in {bad} of {array.size} voxels; with --nan mask they count nothing"
        )
    left = finite.astype(np.uint8) if mask is None else np.where(finite, mask, 0)
    if not left.any():
        raise InputError(f"{path}: holds no number where its mask is not 0")
    return left


def warn_of_padding(path: Name, array: np.ndarray, mask: np.ndarray | None, flag: str, warn: Warn) -> None:
    """Says that an image seems to be padded, where no mask leaves the padding out: it would count as what was seen."""
    values = array[np.isfinite(array)] if array.dtype.kind == "f" else array
    values = values if mask is None else array[mask > 0]
    for value, side in ((values.min(), -1), (values.max(), 1)):
        n = np.count_nonzero(values == value)
        share = n / values.size
        if n < _MANY or not _PADDED < share < 1:
            continue
        rest = values[values != value]
        rest = rest[:: max(1, rest.size // 1_000_000)]
        low, high = np.percentile(rest.astype(np.float64), [0.1, 99.9])
        gap = low - float(value) if side < 0 else float(value) - high
        # 0 around a body without its surroundings is no padding, it is the background
        if gap > _FAR * (high - low) and (side > 0 or value < 0):
            which = "below" if side < 0 else "above"
            warn(
                f"{path}: {100 * share:.2g} % of its voxels hold {value:g}, far {which} all others, and count: {flag} can leave them out"
            )


def seen(array: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """An image as it may be smoothed and interpolated: what is no number, or where the mask is 0, continued from around it."""
    keep = known(array)
    if mask is not None:
        keep = mask > 0 if keep is None else keep & (mask > 0)
    if keep is None or keep.all():
        return array
    image = torch.from_numpy(np.where(keep, array, 0).astype(np.float64))[None, None]
    out = filled(image, torch.from_numpy(keep)[None, None])[0, 0].numpy()
    return out.astype(np.float32) if array.dtype == np.float32 else out


def weights_of(
    mask: torch.Tensor | None, inside: torch.Tensor, warn: Warn = ignore, apart: str | None = None
) -> tuple[float, torch.Tensor | None]:
    """Where a loss counts: where the moving image reaches (inside, bool), times the user's mask (or None), both
    (1, 1, *spatial): (share that is reached, fp32 weights or None: everywhere). apart: what is said where that is nowhere.
    """
    share = inside.double().mean().item()
    if share == 0:
        raise InputError(apart or "the fixed and the moving image do not overlap in physical space")
    if share < SMALL_OVERLAP:
        warn(f"the moving image covers only {100 * share:.2g} % of the fixed one")
    if mask is None:
        return share, None if share == 1 else inside.float()
    weights = mask.float() * inside
    if not weights.any():
        raise InputError("the mask is 0 wherever the moving image reaches")
    return share, weights
