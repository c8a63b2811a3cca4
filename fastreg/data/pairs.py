"""Pairs of scans in files: what a csv or a folder names, and what it holds.

A csv has a header: `fixed`, `moving`, and where there are any `fixed_labels`, `moving_labels`, `fixed_landmarks`,
`moving_landmarks`, `mask` (fixed grid), `moving_mask`. Paths are relative to the csv.
"""

import csv
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fastreg import io
from fastreg._files import InputError, Name, require_regular
from fastreg._moved import labels_in
from fastreg.io._dicom import parted
from fastreg.io._plane import in_plane, kind_of, points_in_plane, thin_axis
from fastreg.io._reading import CHOICES, Reading, Warn, ignore

from . import folders, landmarks
from .alignment import Alignments
from .preprocessing import Preprocessing, View
from .sample import Sample
from .series import fixed_of_series
from .weights import counting, seen, warn_of_padding, weights_of

TASKS = ("inter", "intra", "series", "one-shot")
OPTIONAL = ("fixed_labels", "moving_labels", "fixed_landmarks", "moving_landmarks", "mask", "moving_mask")


@dataclass(frozen=True)
class Pair:
    """Paths. Labels lie on the grid of their image, the mask on the fixed one's, the moving mask on the moving one's; landmarks are mm, LPS."""

    fixed: str
    moving: str
    fixed_labels: str | None = None
    moving_labels: str | None = None
    fixed_landmarks: str | None = None
    moving_landmarks: str | None = None
    mask: str | None = None
    moving_mask: str | None = None

    @property
    def name(self) -> str:
        return f"{Path(self.moving).name} → {Path(self.fixed).name}"


@dataclass
class Case:
    """What is to be registered. Arrays lie on the grid of their image; landmarks (P, nd): mm, LPS, (x, y, z).

    landmark_spaces: what the numbers in their files were read as. landmark_names: what the moving file calls them.
    """

    title: str
    fixed: np.ndarray
    fixed_grid: io.Geometry
    moving: np.ndarray
    moving_grid: io.Geometry
    fixed_labels: np.ndarray | None = None
    moving_labels: np.ndarray | None = None
    fixed_landmarks: np.ndarray | None = None
    moving_landmarks: np.ndarray | None = None
    mask: np.ndarray | None = None
    moving_mask: np.ndarray | None = None
    landmark_spaces: tuple[str, str] = ("LPS", "LPS")
    landmark_names: tuple[str, ...] | None = None

    @property
    def weights(self) -> torch.Tensor | None:
        """The mask as fp32 (1, 1, *spatial), at most 1, or None: only ratios count, and fp32 does not hold all that a file may."""
        return _as_weights(self.mask)

    @property
    def moving_weights(self) -> torch.Tensor | None:
        """The same of the moving mask."""
        return _as_weights(self.moving_mask)

    @property
    def fixed_seen(self) -> np.ndarray:
        """The fixed image as it is compared: NaN is continued from around it."""
        return seen(self.fixed, None)

    @property
    def moving_seen(self) -> np.ndarray:
        """The moving image as it is compared: NaN, and what its mask hides, is continued from around it."""
        return seen(self.moving, self.moving_mask)


def _as_weights(mask: np.ndarray | None) -> torch.Tensor | None:
    if mask is None:
        return None
    return torch.from_numpy((mask / float(mask.max())).astype(np.float32))[None, None]


def _read_intensities(path: Name, reading: Reading, warn: Warn) -> tuple[np.ndarray, io.Geometry]:
    """An image, in which NaN is what is no number."""
    array, grid = io.read_image(path, reading, warn, undefined=True)
    low, high = float(np.nanmin(array)), float(np.nanmax(array))
    if low == high:
        raise InputError(f"{path}: must not be constant, got {low:g} everywhere")
    largest = max(abs(low), abs(high))
    if largest > torch.finfo(torch.float32).max:
        raise InputError(f"{path}: must fit single precision, got values as large as {largest:g}")
    return array, grid


def _where_it_lies(path: Name, image: Name, reading: Reading) -> str:
    """`; ...`: how the two lie on one grid, where they would be read in another way; otherwise empty."""
    for source in CHOICES["affine_source"][0]:
        if source != reading.affine_source:
            other = replace(reading, affine_source=source)
            if io.read_image(path, other)[1].matches(io.read_image(image, other)[1]):
                return f"; the qform and sform of one of them differ, and with --affine-source {source} they agree"
    return ""


def read_beside(
    path: Name,
    grid: io.Geometry,
    image: Name,
    reading: Reading = Reading(),
    warn: Warn = ignore,
    *,
    labels: bool = False,
) -> np.ndarray:
    """An image that must lie on the grid of another one."""
    array, own = io.read_image(path, reading, warn, labels=labels)
    if not own.matches(grid):
        hint = _where_it_lies(path, image, reading)
        raise InputError(f"{path}: must lie on the grid of {image}: {own.difference(grid)}{hint}")
    return array


def read_labels(
    path: Name, grid: io.Geometry, image: Name, reading: Reading = Reading(), warn: Warn = ignore
) -> np.ndarray:
    """Whole numbers on the grid of an image."""
    array = read_beside(path, grid, image, reading, warn, labels=True)
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        raise InputError(f"{path}: labels must be whole numbers")
    if max(abs(float(array.min())), abs(float(array.max()))) >= 2**53:
        raise InputError(f"{path}: labels must be below 2^53")
    return array


def read_mask(
    path: Name, grid: io.Geometry, image: Name, reading: Reading = Reading(), warn: Warn = ignore
) -> np.ndarray:
    """Weights on the grid of an image."""
    array = read_beside(path, grid, image, reading, warn)
    if array.min() < 0 or not array.any():
        raise InputError(f"{path}: a mask must be 0 or more everywhere, and more somewhere")
    return array


def _require_one_kind(pair: Pair, fixed: io.Geometry, moving: io.Geometry) -> None:
    kinds = kind_of(fixed), kind_of(moving)
    if kinds[0] != kinds[1]:
        raise InputError(f"{pair.fixed} is {kinds[0]} and {pair.moving} is {kinds[1]}")


def _flat(case: Case, pair: Pair, warn: Warn = ignore) -> Case:
    """A Case of two slices in space, in 2D in their plane; any other as it is."""
    if thin_axis(case.fixed_grid) is None:
        return case
    fixed, moving = in_plane(case.fixed_grid, case.moving_grid, pair.moving, warn)
    parts = {"fixed": fixed.shape, "fixed_labels": fixed.shape, "mask": fixed.shape}
    parts |= {"moving": moving.shape, "moving_labels": moving.shape, "moving_mask": moving.shape}
    flat = {
        name: array.reshape(shape)
        for name, shape in parts.items()
        if (array := getattr(case, name)) is not None
    }
    for side, grid in (("fixed", fixed), ("moving", moving)):
        if (points := getattr(case, f"{side}_landmarks")) is not None:
            path = getattr(pair, f"{side}_landmarks")
            flat[f"{side}_landmarks"] = points_in_plane(points, grid, path)
    return replace(case, fixed_grid=fixed, moving_grid=moving, **flat)


def read_case(pair: Pair, warn: Warn = ignore, reading: Reading = Reading()) -> Case:
    """What the files of a Pair hold. InputError for those that do not fit each other; warn(message) for what may be meant."""
    fixed, fixed_grid = _read_intensities(pair.fixed, reading, warn)
    moving, moving_grid = _read_intensities(pair.moving, reading, warn)
    _require_one_kind(pair, fixed_grid, moving_grid)
    for path, array in ((pair.fixed, fixed), (pair.moving, moving)):
        if (n := labels_in(array)) > 2:  # of two, how far apart they are says nothing
            warn(
                f"{path}: holds {n} whole numbers, as label maps do: they are compared as intensities; labels of a scan go to "
                "--fixed-labels and --moving-labels"
            )
    case = Case(pair.name, fixed, fixed_grid, moving, moving_grid)
    if pair.fixed_landmarks and pair.moving_landmarks:
        paths = pair.fixed_landmarks, pair.moving_landmarks
        points, case.landmark_spaces, case.landmark_names = landmarks.read_pair(
            paths, (fixed_grid, moving_grid), warn, reading
        )
        case.fixed_landmarks, case.moving_landmarks = points
    if pair.fixed_labels and pair.moving_labels:
        case.fixed_labels = read_labels(pair.fixed_labels, fixed_grid, pair.fixed, reading, warn)
        case.moving_labels = read_labels(pair.moving_labels, moving_grid, pair.moving, reading, warn)
        if not (case.fixed_labels.any() or case.moving_labels.any()):
            raise InputError(f"{pair.fixed_labels} and {pair.moving_labels} hold background only")
    _weigh(case, pair, reading, warn)
    return _flat(case, pair, warn)


def _weigh(case: Case, pair: Pair, reading: Reading, warn: Warn) -> None:
    """What counts of both images of a Case that has no mask yet."""
    for side, name in (("fixed", "mask"), ("moving", "moving_mask")):
        path, array, file = getattr(pair, side), getattr(case, side), getattr(pair, name)
        mask = read_mask(file, getattr(case, f"{side}_grid"), path, reading, warn) if file else None
        mask = counting(path, array, mask, reading)
        if not labels_in(array):  # one of few labels is far from the others, and no padding
            warn_of_padding(path, array, mask, f"--{name.replace('_', '-')}", warn)
        setattr(case, name, mask)


# Lists of pairs


def find_pairs(
    path: Name,
    task: str = "inter",
    warn: Warn = ignore,
    *,
    validation: bool = False,
    reading: Reading = Reading(),
) -> list[Pair]:
    """The pairs that a csv lists, a folder implies or a data set's JSON holds: list of Pair. InputError says what is missing.

    A folder holds images, or `images/` with `labels/`, `masks/` and `landmarks/` or `keypoints/` beside it, or all of these with
    the ending Tr. A file belongs to the image that has its name, but for the extension and what is usual at the ends of such names
    (_0000, _T1w; _seg, _label, _mask; _landmarks). warn is told for which images there are none; a folder of which no
    file fits is an error, as are two that fit. Of a folder of images alone, those that are named as labels of others are.

    Task "inter": every ordered pair of images; "intra": of those whose names agree up to the last "_" (case1_inspiration,
    case1_expiration); "series": of those whose names agree so, or but for the number at their end, the one nearest the mean phase
    (`fixed_of_series`: their mean intensities are read) with each other one; "one-shot": two images, the first by name is fixed. A csv lists pairs whatever the task is, for
    "one-shot" one; so does a JSON of Learn2Reg: training_paired_images but for those of registration_val, or with
    validation these; without pairs the images of `training`.
    """
    path = Path(path)
    if task not in TASKS:
        raise InputError(f"task must be one of {', '.join(TASKS)}, got {task}")
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")

    def fixed_of(images: Sequence[Path]) -> int:
        return _nearest_mean(images, reading, warn)

    if path.is_dir():
        pairs = [Pair(**files) for files in folders.of_folder(path, task, warn, fixed_of)]
    elif path.suffix.lower() == ".json":
        pairs = [Pair(**files) for files in folders.of_dataset(path, task, validation, fixed_of)]
    else:
        pairs = _of_csv(path)
    if task == "one-shot" and len(pairs) != 1:
        raise InputError(f"{path}: one-shot takes one pair, got {len(pairs)}")
    for pair in pairs:
        for field in ("fixed", "moving", *OPTIONAL):
            file = getattr(pair, field)
            if file is not None and not parted(file)[0].exists():
                raise InputError(f"{file}: no such file ({field} of {pair.name} in {path})")
    return pairs


def _nearest_mean(images: Sequence[Path], reading: Reading, warn: Warn) -> int:
    """`fixed_of_series` of files, read one at a time. InputError: they are not of one place."""
    array, grid = _read_intensities(images[0], reading, warn)
    means = [float(np.nanmean(array))]
    for path in images[1:]:
        array, own = _read_intensities(path, reading, warn)
        if not own.matches(grid):
            raise InputError(
                f"{path}: must lie on the grid of {images[0]}, as an image of one series: {own.difference(grid)}"
            )
        means.append(float(np.nanmean(array)))
    return fixed_of_series(torch.tensor(means, dtype=torch.float64)[:, None])


def _of_csv(path: Path) -> list[Pair]:
    require_regular(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a csv file") from error
    known = ("fixed", "moving", *OPTIONAL)
    unknown = [name for name in header if name not in known]
    if not {"fixed", "moving"} <= set(header) or unknown or len(set(header)) < len(header):
        raise InputError(
            f"{path}: the header must name fixed and moving, and may name {', '.join(OPTIONAL)}; got {','.join(header)[:80]!r}"
        )
    pairs = []
    for line, row in rows:
        if None in row or not all((row[k] or "").strip() for k in ("fixed", "moving")):
            raise InputError(
                f"{path}: line {line} must name a fixed and a moving image, and have a field a column"
            )
        files = {k: str(path.parent / v.strip()) for k, v in row.items() if v and v.strip()}
        for kind in ("labels", "landmarks"):
            if (f"fixed_{kind}" in files) != (f"moving_{kind}" in files):
                raise InputError(f"{path}: line {line} must name {kind} of both images or of none")
        pairs.append(Pair(**files))
    if not pairs:
        raise InputError(f"{path}: lists no pairs")
    return pairs


# What a net is trained on


class Pairs(Sequence[Sample]):
    """Pair files as a sequence of Sample, read when they are asked for; the last ones stay in memory.

    Args: pairs (list of Pair). preprocessing (Preprocessing). keep (int): samples that stay. ndim: 2 or 3, that images must
    have, or None. reading (Reading). warn: is told what may not be meant, at each reading. labels (bool): samples have them;
    InputError for a pair that has none. cache: a folder where the matrices of pairs that are aligned first are kept; None: in
    memory.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        preprocessing: Preprocessing,
        *,
        keep: int = 64,
        ndim: int | None = None,
        reading: Reading = Reading(),
        warn: Warn = ignore,
        labels: bool = False,
        cache: Name | None = None,
    ) -> None:
        self.pairs, self.preprocessing, self.ndim = list(pairs), preprocessing, ndim
        self.reading, self.warn, self.labels = reading, warn, labels
        for pair in self.pairs if labels else ():
            if pair.fixed_labels is None or pair.moving_labels is None:
                raise InputError(f"{pair.name} has no labels, which a weight of labels asks for")
        self.alignments = Alignments(cache)
        self._sample = functools.lru_cache(maxsize=keep)(self._read)
        self._image = functools.lru_cache(maxsize=keep)(_read_intensities)
        self._labels = functools.lru_cache(maxsize=keep)(read_labels)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, k: int) -> Sample:  # type: ignore[override]
        return self._sample(k)

    def _read(self, k: int) -> Sample:
        pair = self.pairs[k]
        arrays = {
            side: self._image(getattr(pair, side), self.reading, self.warn) for side in ("fixed", "moving")
        }
        (fixed, fixed_grid), (moving, moving_grid) = arrays["fixed"], arrays["moving"]
        _require_one_kind(pair, fixed_grid, moving_grid)
        case = Case(pair.name, fixed, fixed_grid, moving, moving_grid)
        if self.labels:
            how = self.reading, self.warn
            case.fixed_labels = self._labels(pair.fixed_labels, fixed_grid, pair.fixed, *how)
            case.moving_labels = self._labels(pair.moving_labels, moving_grid, pair.moving, *how)
        _weigh(case, pair, self.reading, self.warn)
        return self.of_case(_flat(case, pair, self.warn), labels=self.labels)[0]

    def of_case(self, case: Case, *, labels: bool = False) -> tuple[Sample, View]:
        """`sample_of` as the pairs are prepared."""
        return sample_of(case, self.preprocessing, self.ndim, labels=labels, alignments=self.alignments)


def _counts(case: Case, view: View) -> np.ndarray | None:
    """Where masks are not 0, of either image: bool, on the fixed image's grid; None: there are none."""
    counts = None if case.mask is None else case.mask > 0
    if case.moving_weights is not None:
        laid = view.laid(case.moving_grid)
        other = io.resample(case.moving_weights, laid, case.fixed_grid, outside=0.0)[0][0, 0].numpy() > 0
        counts = other if counts is None else counts | other
    return counts


def _labels_on(
    grid: io.Geometry, labels: np.ndarray | None, own: io.Geometry, labelled: bool
) -> torch.Tensor | None:
    """Those of the nearest voxel, 0 beyond the image; None where they are not asked for, or there are none."""
    if labels is None or not labelled:
        return None
    small = max(abs(int(labels.min())), abs(int(labels.max()))) < 2**31
    whole = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int32 if small else np.int64))
    return io.resample(whole[None, None], own, grid, mode="nearest")[0]


def sample_of(
    case: Case,
    preprocessing: Preprocessing,
    ndim: int | None = None,
    warn: Warn = ignore,
    *,
    labels: bool = False,
    alignments: Alignments | None = None,
) -> tuple[Sample, View]:
    """(Sample, View): a Case as a net takes it, and where it does. labels: with its labels, where it has them. alignments: that are
    known already.
    """
    if ndim is not None and case.fixed_grid.nd != ndim:
        raise InputError(f"{case.title}: the net registers {ndim}D images, got {case.fixed_grid.nd}D")
    try:
        view = View(case.fixed_grid, case.fixed_grid)
        if preprocessing.align != "none":
            matrix = (alignments or Alignments())(case, preprocessing.align)
            view = replace(view, matrix=matrix)
        counts = _counts(case, view) if preprocessing.crop == "mask" else None
        view = replace(view, grid=preprocessing.grid(case.fixed_grid, counts))
        grid, moving_grid = view.grid, view.laid(case.moving_grid)
        fixed, reached = preprocessing.image(case.fixed_seen, case.fixed_grid, grid)
        matched = preprocessing.matched(case.moving_seen, case.fixed_seen)
        moving, inside = preprocessing.image(matched, moving_grid, grid)
        mask = case.weights
        if mask is not None:
            mask = io.resample(mask, case.fixed_grid, grid, outside=None)[0]
        if (other := case.moving_weights) is not None:
            other = io.resample(other, moving_grid, grid, outside=0.0)[0]
            mask = other if mask is None else mask * other
        _, mask = weights_of(mask, inside, warn)
        if not reached.all():
            mask = reached.float() if mask is None else mask * reached
            if not mask.any():
                raise InputError("the moving image reaches nothing of the fixed one that counts")
    except InputError as error:
        raise InputError(f"{case.title}: {error}") from error
    maps = (
        _labels_on(grid, case.fixed_labels, case.fixed_grid, labels),
        _labels_on(grid, case.moving_labels, moving_grid, labels),
    )
    return Sample(case.title, fixed, moving, mask, *maps), view
