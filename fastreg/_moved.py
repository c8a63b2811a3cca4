"""What becomes of an image that a displacement moves: how it is interpolated, and the type it comes back in."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from fastreg import io
from fastreg._files import InputError, Name
from fastreg.io._reading import Warn
from fastreg.io._sitk import sitk

INTERPOLATIONS = ("linear", "nearest", "cubic", "lanczos")
INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
TYPES = ("same", *INTEGERS, "float32", "float64")
# Scans have more values than FEW; of those with more the ones with at most MANY may be labels: atlases have hundreds, cells and
# supervoxels thousands.
FEW, MANY = 32, 1 << 14
_TABLE = 1 << 16  # values: where they lie closer together they are counted, which is faster than sorting


def labels_in(array: np.ndarray) -> int:
    """How many distinct values an array (..., *spatial) has, if it looks like a label map; else 0.

    All are whole numbers, in whatever type, and there are at most FEW: interpolated, they would be values that nothing stands
    for. Or at most MANY, most neighbours that are not background (the commonest value) are the same, and most that
    differ are not of successive values, which they are where a picture of few levels is smooth.
    """
    if array.dtype.kind not in "fiu" or array.size == 0:
        return 0
    lines = array.reshape(-1, array.shape[-1])
    whole = _whole_numbers(lines[len(lines) // 2 : len(lines) // 2 + 1])
    if whole is None or len(whole) > MANY:
        return 0
    found = whole
    step = max(1, (1 << 20) // lines.shape[1])
    for start in range(0, len(lines), step):
        whole = _whole_numbers(lines[start : start + step])
        if whole is None or len(found := np.union1d(found, whole)) > MANY:
            return 0
    if len(found) <= FEW:
        return len(found)
    some = lines[:: max(1, lines.size // (1 << 22))]
    rank = _ranks(some, found)
    commonest = np.bincount(rank.ravel()).argmax()
    left, right = rank[:, :-1], rank[:, 1:]
    counted = (left != commonest) | (right != commonest)
    apart = np.abs(left - right)[counted]
    same, next_to = (apart == 0).sum(), (apart == 1).sum()
    return len(found) if 2 * same > apart.size and 2 * next_to < apart.size - same else 0


def _whole_numbers(array: np.ndarray) -> np.ndarray | None:
    """The distinct values; None where one is not a whole number."""
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        return None
    low, high = array.min(), array.max()
    if not float(high) - float(low) < _TABLE:
        return np.unique(array)
    return np.flatnonzero(np.bincount(_above(array, low).ravel())).astype(array.dtype) + low


def _ranks(array: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which of the distinct, ascending values each number is."""
    if not float(values[-1]) - float(values[0]) < _TABLE:
        return np.searchsorted(values, array)
    table = np.zeros(int(values[-1]) - int(values[0]) + 1, np.int16)
    table[_above(values, values[0])] = np.arange(len(values))
    return table[_above(array, values[0])]


def _above(array: np.ndarray, low: Any) -> np.ndarray:
    """How far whole numbers are above the least of them, as indices."""
    if array.dtype.kind == "i":  # whose own type may not hold it
        return np.subtract(array, low, dtype=np.int64).astype(np.intp, copy=False)
    return (array - low).astype(np.intp)


def interpolation_of(array: np.ndarray, path: Name, wanted: str | None, warn: Warn) -> tuple[str, bool]:
    """(interpolation, whether these are labels): the wanted one; else "nearest" for what looks like labels, of which warn(message) tells,
    and "linear" for the rest.
    """
    n = labels_in(array) if wanted in (None, "nearest") else 0
    if wanted is not None:
        return wanted, n > 0
    if n:
        warn(
            f"{path}: holds {n} value{'s' * (n != 1)}, all of them whole numbers: taken for labels, nearest neighbour "
            "(--interpolation linear if they are intensities)"
        )
    return "nearest" if n else "linear", n > 0


def converted(array: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """(array in dtype, how many values were beyond what it holds and became the least or the most of it). To whole numbers: the nearest."""
    if array.dtype == dtype:
        return array, 0
    limits: Any = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    low, high = limits.min, limits.max
    if array.dtype.kind in "iu":
        own = np.iinfo(array.dtype)
        low, high = max(low, own.min), min(high, own.max)
        beyond = (array < low) | (array > high) if dtype.kind in "iu" else np.zeros(1, bool)
        return (array.clip(low, high) if beyond.any() else array).astype(dtype), int(beyond.sum())
    array = np.rint(array) if dtype.kind in "iu" else array
    over, under = array > high, array < low
    n = int(over.sum() + under.sum())
    # float(2^64 - 1) is 2^64, which uint64 does not hold.
    over |= (array >= float(high)) & (dtype.kind in "iu")
    out = np.where(over | under, 0, array).astype(dtype)
    out[over], out[under] = high, low
    return out, n


def numbers(array: np.ndarray, dtype: np.dtype, outside: float, interpolation: str, path: Name) -> np.ndarray:
    """The array as it can come back in dtype: whole numbers have no NaN, which becomes what lies outside."""
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return array
    if interpolation in ("cubic", "lanczos"):
        raise InputError(
            f"{path}: holds NaN, which {interpolation} interpolation spreads: --interpolation linear or nearest"
        )
    return array if dtype.kind == "f" else np.nan_to_num(array, nan=outside)


def tell_losses(
    array: np.ndarray, out: np.ndarray, beyond: int, is_labels: bool, path: Name, warn: Warn
) -> None:
    """Says what becomes of the values of an array that came out as `out`, of another type."""
    dtype = out.dtype
    if beyond:
        warn(f"{path}: {beyond} of {out.size} values are beyond what {dtype} holds: clamped")
    if array.dtype.kind == "f" and dtype.kind in "iu" and not is_labels:
        bounds = f"{array.min():g} to {array.max():g}"
        warn(f"{path}: its values, {bounds}, are rounded to whole numbers ({dtype})")
    exact = {np.dtype(np.float32): 2**24, np.dtype(np.float64): 2**53}.get(dtype)
    if is_labels and exact and array.dtype != dtype and max(-int(array.min()), int(array.max())) > exact:
        warn(f"{path}: {dtype} does not hold labels above {exact} exactly")


class Moved(NamedTuple):
    """array (C, *spatial); inside: bool (*spatial), where the image reaches; beyond: how many values its dtype does not hold."""

    array: np.ndarray
    inside: np.ndarray
    beyond: int


def move(
    array: np.ndarray,
    geometry: io.Geometry,
    onto: io.Geometry,
    u: torch.Tensor | None,
    *,
    interpolation: str = "linear",
    dtype: np.dtype | None = None,
    outside: float = 0.0,
) -> Moved:
    """An array (C, *geometry.shape) on another grid, as io.resample; dtype: None: that of array."""
    dtype = array.dtype if dtype is None else dtype
    image = torch.from_numpy(array)[None]
    mode = "nearest" if interpolation == "nearest" else "linear"
    arguments: dict[str, Any] = {"mode": mode, "outside": outside}
    if interpolation in ("cubic", "lanczos"):
        _, reached = io.resample(image[:, :1], geometry, onto, u, **arguments)
        inside = reached[0, 0].numpy()
        values = [_by_itk(c, geometry, onto, u, interpolation) for c in array]
        out, beyond = converted(np.where(inside, np.stack(values), outside), dtype)
        return Moved(out, inside, beyond)
    bounds = float(array.min()), float(array.max()), outside
    limits: Any = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    fits = array.dtype == dtype or (limits.min <= min(bounds) and max(bounds) <= limits.max)
    # The kernel turns one type into another by way of fp64.
    exact = mode == "nearest" and array.dtype.kind in "iu" and array.dtype.itemsize == 8
    if fits and not exact:
        arguments["dtype"] = torch.from_numpy(np.empty(0, dtype)).dtype
    elif mode == "linear":
        arguments["dtype"] = torch.float64
    result, reached = io.resample(image, geometry, onto, u, **arguments)
    out, beyond = converted(result[0].numpy(), dtype)
    return Moved(out, reached[0, 0].numpy(), beyond)


def _by_itk(
    array: np.ndarray,
    geometry: io.Geometry,
    onto: io.Geometry,
    u: torch.Tensor | None,
    interpolation: str,
) -> np.ndarray:
    """fp64, (*onto.shape): the interpolators that SimpleITK has and we have not."""
    itk = sitk()

    def placed(image: Any, grid: io.Geometry) -> Any:
        image.SetSpacing(grid.spacing)
        image.SetOrigin(grid.origin)
        image.SetDirection(grid.direction)
        return image

    resampler = itk.ResampleImageFilter()
    resampler.SetNumberOfThreads(torch.get_num_threads())
    if u is not None:
        vectors = u[0].double().nan_to_num().movedim(0, -1).numpy() @ onto.matrix.T
        field = placed(itk.GetImageFromArray(vectors, isVector=True), onto)
        resampler.SetTransform(itk.DisplacementFieldTransform(field))
    resampler.SetInterpolator(
        {"cubic": itk.sitkBSpline, "lanczos": itk.sitkLanczosWindowedSinc}[interpolation]
    )
    resampler.SetSize(onto.size)
    resampler.SetOutputOrigin(onto.origin)
    resampler.SetOutputSpacing(onto.spacing)
    resampler.SetOutputDirection(onto.direction)
    resampler.SetOutputPixelType(itk.sitkFloat64)
    return np.asarray(
        itk.GetArrayFromImage(resampler.Execute(placed(itk.GetImageFromArray(array), geometry)))
    )


def outside_of(array: np.ndarray, is_labels: bool) -> float:
    """What is written where the moving image does not reach: background, or the least value."""
    return 0.0 if is_labels else float(np.nanmin(array))


def move_volumes(
    volumes: io.Volumes,
    onto: io.Geometry,
    u: torch.Tensor | None,
    *,
    interpolation: str = "linear",
    output_type: str = "same",
    is_labels: bool = False,
) -> tuple[io.Volumes, float, int]:
    """Volumes on another grid, one after the other, each component.

    Returns:
        (Volumes; share of the grid that lies inside of the image; how many values were beyond output_type).
    """
    dtype = volumes.array.dtype if output_type == "same" else np.dtype(output_type)
    outside = outside_of(volumes.array, is_labels or volumes.is_colour)
    out = np.empty((len(volumes.array), *onto.shape, volumes.channels), dtype)
    how: dict[str, Any] = {"interpolation": interpolation, "dtype": dtype, "outside": outside}
    share, beyond = math.nan, 0
    for t, volume in enumerate(volumes):
        result = move(volume, volumes.geometry, onto, u, **how)
        out[t] = np.moveaxis(result.array, 0, -1)
        share, beyond = float(result.inside.mean()), beyond + result.beyond
    return io.Volumes(out, onto, volumes.series), share, beyond
