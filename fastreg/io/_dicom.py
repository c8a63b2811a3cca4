"""DICOM: which slices make a volume, and where they lie. Positions count, not file names or numbers.

A folder, or a file of many frames, may hold several volumes: `PATH#K` is the K-th of those that the refusal lists, `PATH#UID`
that of a series.
"""

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastreg._files import InputError, Name, require_utf8
from fastreg._refusals import Missing

from ._dicom_files import Slice, no_image, number, slices_of, sop_class, suffix, unreadable
from ._geometry import Geometry
from ._reading import Reading, Warn
from ._shear import STRAIGHT, straightened
from ._sitk import heard, sitk
from ._stack import Lie, complaint, grouped

# Tags that tell volumes apart where slices of one series lie at one place; the first that does so counts.
APART = {
    "0020|0012": "AcquisitionNumber", "0020|0100": "TemporalPositionIdentifier", "0020|9128": "TemporalPositionIndex",
    "0020|9056": "StackID", "0018|0086": "EchoNumbers", "0018|0081": "EchoTime", "0018|9087": "DiffusionBValue",
    "0018|1060": "TriggerTime", "0018|0082": "InversionTime", "0018|1314": "FlipAngle", "0018|1210": "ConvolutionKernel",
    "0008|0008": "ImageType", "0020|0011": "SeriesNumber", "0008|0022": "AcquisitionDate", "0008|0032": "AcquisitionTime",
    "0018|0050": "SliceThickness",
}  # fmt: skip
# Of those, what two volumes whose slices lie between each other's differ in, and the halves of one may.
INTERLEAVED = ("0020|0012", "0020|0100", "0018|0086", "0018|0081")
LISTED = 12  # volumes that a refusal names
LOOKED_AT = 10000  # files, for a better word on a folder that holds none


@dataclass(frozen=True)
class Volume:
    """Slices, ascending along the normal; what tells them from others of their series."""

    slices: list[Slice]
    what: str = ""

    @property
    def normal(self) -> np.ndarray:
        axes = self.slices[0].axes
        assert axes is not None
        return np.asarray(np.cross(axes[0], axes[1]))

    @property
    def points(self) -> np.ndarray:
        return np.array([s.position for s in self.slices])

    @property
    def even(self) -> bool:
        if len(self.slices) == 1:
            return True
        lie = Lie.of(self.points)
        return lie.even and float(lie.step @ self.normal) > 1e-6

    def __str__(self) -> str:
        first, n = self.slices[0], len(self.slices)
        spacing = list(first.spacing or ())
        if n > 1:
            spacing.append(float(np.median(np.diff(self.points @ self.normal))))
        parts = (
            first["0008|0060"], repr(first["0008|103e"]) if first["0008|103e"] else "",
            f"{n} slice{'s' * (n > 1)} of {first.size[0]}x{first.size[1]}",
            f"{' x '.join(f'{s:.4g}' for s in spacing)} mm" if spacing else "", self.what, first.uid,
        )  # fmt: skip
        return ", ".join(p for p in parts if p)


def parted(path: Name) -> tuple[Path, str | None]:
    """(file or folder, which of its volumes): of PATH#K or PATH#UID, where no file has all of that for its name."""
    text = os.fspath(path)
    base, hash_, which = text.rpartition("#")
    if hash_ and which and not os.path.lexists(text) and os.path.lexists(base):
        return Path(base), which
    return Path(path), None


def is_dicom(path: Path) -> bool:
    return sop_class(str(path)) is not None or suffix(str(path)) in (".dcm", ".ima", ".dicom")


# Which slices belong together


def _of_folder(folder: Path, warn: Warn) -> list[Slice]:
    found: list[Slice] = []
    refused, unusable = [], []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        require_utf8(entry.path)
        if entry.name.startswith(".") or not entry.is_file():
            continue
        class_ = sop_class(entry.path)
        try:
            slices = [] if no_image(class_ or "") else slices_of(entry.path)
        except InputError as error:
            unusable.append(error)
            continue
        found += slices
        if not slices:
            refused.append((entry.path, class_))
    suffixes = {suffix(s.file) for s in found} - {""}
    for file, class_ in refused:
        # What may be a slice is not left out without a word.
        if not no_image(class_ or "") and (class_ is not None or suffix(file) in suffixes):
            what = (
                "is empty" if os.path.getsize(file) == 0 else "is no DICOM image that can be read, or damaged"
            )
            raise InputError(f"{file}: {what}")
    if not found:
        if unusable:
            raise unusable[0]
        raise InputError(_nothing(folder, [class_ or "" for _, class_ in refused]))
    if unusable:
        warn(
            f"{folder}: {len(unusable)} file{'s are' if len(unusable) > 1 else ' is'} left out: {unusable[0]}"
        )
    return found


def _nothing(folder: Path, classes: list[str]) -> str:
    """Why a folder is no series, and what is meant perhaps."""
    kinds = sorted({kind for class_ in classes if (kind := no_image(class_))})
    inside: list[str] = []
    seen = 0
    for root, folders, files in os.walk(folder):
        folders.sort()
        paths = [path for name in files if (path := Path(root, name)).is_file()]
        if root != str(folder) and any(map(is_dicom, paths)):
            inside.append(os.path.relpath(root, folder))
        seen += len(paths)
        if len(inside) == LISTED or seen > LOOKED_AT:
            break
    others = [
        name
        for name in sorted(os.listdir(folder))
        if name.lower().endswith((".nii", ".nii.gz", ".mha", ".nrrd", ".mgz"))
    ]
    text = f"{folder}: holds no DICOM image" + (f", but {', '.join(kinds)}" if kinds else "")
    if inside:
        text += f"; give one of the folders in it: {', '.join(inside)}"
    elif others:
        text += f"; give the image itself: {', '.join(others[:LISTED])}"
    return text


def _without_copies(slices: list[Slice], warn: Warn) -> list[Slice]:
    """Files that are the same instance, pixel for pixel, once."""
    kept: dict[tuple[Any, ...], Slice] = {}
    copies = []
    for s in slices:
        where = None if s.position is None else tuple(s.position)
        key: tuple[Any, ...] = (s["0008|0018"], where, s.frame)
        if s["0008|0018"] and key in kept and kept[key].file != s.file:
            if np.array_equal(
                *(sitk().GetArrayFromImage(sitk().ReadImage(f)) for f in (kept[key].file, s.file))
            ):
                copies.append(s)
                continue
            key = (*key, s.file)
        kept[key] = s
    if copies:
        files = f"{len(copies)} files are copies" if len(copies) > 1 else "is a copy"
        warn(
            f"{copies[0].file}: {files} of others beside {'them' if len(copies) > 1 else 'it'}, and left out"
        )
    return list(kept.values())


def _sorted(slices: Sequence[Slice]) -> list[Slice]:
    axes = slices[0].axes
    assert axes is not None
    normal = np.cross(axes[0], axes[1])
    return sorted(slices, key=lambda s: (float(np.dot(s.position, normal)), number(s["0020|0013"])))  # type: ignore[arg-type]


def _volumes(slices: list[Slice]) -> list[Volume]:
    """Of all slices that have a position, in an order that only depends on what they say."""
    alike: list[list[Slice]] = []
    for s in slices:
        group = next((g for g in alike if g[0].beside(s)), None)
        if group is None:
            alike.append([s])
        else:
            group.append(s)

    def rank(group: list[Slice]) -> tuple[Any, ...]:
        first = min(group, key=lambda s: (number(s["0020|0013"]), s["0008|0018"]))
        return number(first["0020|0011"]), first.uid, number(first["0020|0013"]), first["0008|0018"]

    return [volume for group in sorted(alike, key=rank) for volume in _apart(_sorted(group))]


def _apart(slices: list[Slice]) -> list[Volume]:
    """The volumes of slices of one series, size and orientation, sorted; one that is not even where nothing tells them apart."""
    whole = Volume(slices)
    if whole.even:
        return [whole]
    depths = whole.points @ whole.normal
    places = grouped(depths)
    most = max(map(len, places))
    second = None
    for tag, name in APART.items():
        parts: dict[str, list[Slice]] = {}
        for s in slices:
            parts.setdefault(s[tag], []).append(s)
        if not 1 < len(parts) <= len(slices) / min(2, len(places)):
            continue
        order = sorted(parts, key=lambda v: (number(v), v))
        volumes = [Volume(parts[v], f"{name} {v or '(none)'}") for v in order]
        if all(v.even and len(v.slices) > (len(places) > 1) for v in volumes):
            return volumes
        once = all(len(grouped(v.points @ v.normal)) == len(v.slices) for v in volumes)
        if second is None and once and len(volumes) == most:
            second = volumes
    if second is not None or most == 1:
        return second or [whole]
    # Nothing says it: the order of the instance numbers at each place does.
    ranks = [[slices[place[k]] for place in places if k < len(place)] for k in range(most)]
    return [Volume(rank, f"number {k + 1} of {most} at each place") for k, rank in enumerate(ranks)]


def _chosen(path: Name, volumes: list[Volume], which: str | None) -> Volume:
    listed = list(enumerate(volumes, 1))
    if which is None and len(volumes) == 1:
        return volumes[0]
    if which is not None:
        listed = [(k, v) for k, v in listed if v.slices[0].uid == which]
        if which.isdecimal() and 1 <= int(which) <= len(volumes):
            listed = [(int(which), volumes[int(which) - 1])]
        if len(listed) == 1:
            return listed[0][1]
    base = f"{parted(path)[0]}"
    n = len(listed or volumes)
    text = "; ".join(f"#{k}: {v}" for k, v in (listed or list(enumerate(volumes, 1)))[:LISTED])
    text += f"; and {n - LISTED} more" if n > LISTED else ""
    asked = "" if which is None or listed else f"has no #{which}, but "
    raise InputError(
        f"{base}: {asked}holds {n} DICOM series or volume{'s' * (n > 1)}, choose one, as {base}#1: {text}"
    )


# What a volume is


def _pixels(volume: Volume) -> np.ndarray:
    """(n, rows, columns[, channels]) in a type that holds all slices' values."""
    itk, slices = sitk(), volume.slices
    last: tuple[str, np.ndarray] | None = None
    planes = []
    for s in slices:
        if last is None or last[0] != s.file:
            try:
                array = itk.GetArrayFromImage(itk.ReadImage(s.file, imageIO="GDCMImageIO"))
            except RuntimeError as error:
                raise InputError(unreadable(s.file)) from error
            last = s.file, array
        planes.append(last[1][s.frame])
    return np.stack(planes, dtype=np.result_type(*{p.dtype for p in planes}))


def _image(array: np.ndarray, geometry: Geometry) -> Any:
    image = sitk().GetImageFromArray(array, isVector=array.ndim > 3)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    return image


def _alternating(slices: list[Slice]) -> str:
    """What tells every other slice from the rest, if anything: it may be two volumes that lie between each other's slices."""
    n = len(slices)
    for tag in INTERLEAVED:
        told = [s[tag] for s in slices]
        kinds = sorted(set(told))
        if 1 < len(kinds) <= n / 2 and all(a != b for a, b in itertools.pairwise(told)):
            return f"{APART[tag]} {' and '.join(kinds[:3])}"
    numbers = np.array([number(s["0020|0013"]) for s in slices])
    if n < 6 or not np.isfinite(numbers).all():
        return ""
    runs = [numbers[k::2] for k in (0, 1)]
    if not all(abs(np.sign(np.diff(run)).sum()) == len(run) - 1 for run in runs):
        return ""
    runs.sort(key=min)
    if max(runs[0]) >= min(runs[1]):
        return ""
    return "InstanceNumber " + " and ".join(f"{min(run):g} to {max(run):g}" for run in runs)


def _placed(path: Name, volume: Volume, reading: Reading, warn: Warn) -> Any:
    """The volume as a SimpleITK image, where it lies; InputError where that cannot be said with one even grid."""
    slices, n = volume.slices, len(volume.slices)
    first = slices[0]
    if first.spacing is not None and not 0 < min(first.spacing) < np.inf:
        raise InputError(
            f"{path}: pixels must have a size, got {first.spacing[0]:g} x {first.spacing[1]:g} mm (PixelSpacing)"
        )
    if first.spacing is None or first.position is None or first.axes is None:
        if n > 1 or first.position is not None:
            raise InputError(f"{path}: does not say how large its pixels are (PixelSpacing)")
        return _alone(path, first, warn)
    normal, axes = volume.normal, first.axes
    thick = number(first["0018|0088"] or first["0018|0050"])
    step = np.asarray(normal * (thick if 0 < thick < np.inf else 1.0))
    tilted = False
    if n > 1:
        lie = Lie.of(volume.points)
        if not volume.even:
            what = complaint(volume.points, normal, [number(s["0018|0050"]) for s in slices])
            raise InputError(
                f"{path}: {what}; export the series again, or give a folder with an even part of it"
            )
        if lie.off > lie.tolerance:
            warn(
                f"{path}: slices lie up to {lie.off:.2g} mm off even steps of {lie.step @ normal:.5g} mm, and are read as even"
            )
        if told := _alternating(slices):
            warn(f"{path}: slices alternate between {told}, and are read as one volume")
        step = lie.step
        sideways, angle = lie.sideways(normal), lie.tilt(normal)
        drift = float(np.linalg.norm(sideways)) * (n - 1)
        tilted = drift > lie.tolerance and angle > STRAIGHT
        if tilted and reading.tilt == "refuse":
            axis = "xyz"[int(np.abs(sideways).argmax())]
            raise InputError(
                f"{path}: slices are sheared, each is shifted by {np.linalg.norm(sideways):.3g} mm, mostly along {axis}, against the one "
                f"before (a gantry tilt of {angle:.3g} degrees); --tilt resample puts them on a straight grid"
            )
        if drift > lie.tolerance and not tilted:
            warn(
                f"{path}: slices are sheared by {angle:.2g} degrees, which is left out: the last one is read {drift:.2g} mm off"
            )
    array = _pixels(volume)
    depth = float(step @ normal)
    size, spacing = (*first.size, n), (*first.spacing, depth)
    direction = np.column_stack([axes[0], axes[1], normal])
    origin = tuple(map(float, first.position))
    grid = Geometry(size, spacing, origin, tuple(direction.ravel()))
    if tilted:
        if array.ndim > 3:
            raise InputError(f"{path}: colour slices that are sheared are not supported")
        length = float(np.linalg.norm(step))
        direction = np.column_stack([axes[0], axes[1], step / length])
        sheared = Geometry(size, (*first.spacing, length), origin, tuple(direction.ravel()))
        array, grid = straightened(array, sheared)
    return _image(array, grid)


def _alone(path: Name, s: Slice, warn: Warn) -> Any:
    """A picture without a place, such as a radiograph: 2D."""
    warn(
        f"{path}: does not say where it lies, and is read as a 2D image"
        + ("" if s.spacing else " of 1 mm pixels")
    )
    array = _pixels(Volume([s]))[0]
    image = sitk().GetImageFromArray(array, isVector=array.ndim > 2)
    image.SetSpacing(s.spacing or (1.0, 1.0))
    return image


def read_dicom(path: Name, reading: Reading, warn: Warn) -> Any:
    """A SimpleITK image of a folder or file, PATH or PATH#K or PATH#UID. InputError says what it holds instead of one volume."""
    base, which = parted(path)
    with heard(base, warn):
        if base.is_dir():
            slices = _of_folder(base, warn)
        else:
            kind = no_image(sop_class(str(base)) or "")
            slices = [] if kind else slices_of(str(base))
            if not slices:
                raise InputError(f"{base}: is {kind}" if kind else unreadable(str(base)))
        placed = [s for s in slices if s.position is not None]
        volumes = _volumes(_without_copies(placed, warn)) or [Volume([s]) for s in slices]
        volume = _chosen(path, volumes, which)
        if placed and len(placed) < len(slices):
            other = next(s.file for s in slices if s.position is None)
            warn(
                f"{base}: {len(slices) - len(placed)} pictures without a position are left out, such as {Path(other).name}"
            )
        image = _placed(path, volume, reading, warn)
    if len(slices) == 1 and not base.is_dir():
        _tell_of_siblings(base, slices[0], warn)
    return image


def _tell_of_siblings(file: Path, s: Slice, warn: Warn) -> None:
    """A slice whose folder was meant."""
    if s.position is None:
        return
    uids: Counter[str] = Counter()
    for entry in os.scandir(file.parent):
        if entry.is_file() and suffix(entry.name) == suffix(file.name) and sop_class(entry.path) is not None:
            with contextlib.suppress(InputError, Missing):
                uids.update(o.uid for o in slices_of(entry.path) if o.position is not None)
    if uids[s.uid] > 1:
        warn(
            f"{file}: is one of {uids[s.uid]} slices of its series; to read all of them give the folder, {file.parent}"
        )
