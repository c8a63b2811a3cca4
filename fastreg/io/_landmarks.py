"""Landmarks: points in the files of several tools."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from fastreg._files import InputError, Name, replacing, require_regular

from . import _points, _tables
from ._geometry import Geometry
from ._reading import Reading, Warn, ignore

FORMATS = "a table with a header, 3D Slicer's .fcsv or .mrk.json, points for elastix"


@dataclass(frozen=True)
class Landmarks:
    """Points of a file: points (P, nd) fp64, mm, LPS, (x, y, z), P >= 1; a row of NaN is named in the file without a position.

    names: of each, or None. space: of the numbers in the file, "LPS", "RAS" (mm) or "voxel" (the image's index, x first).
    suffix: of its format, ".csv", ".fcsv", ".mrk.json" or ".txt" (elastix).
    """

    points: np.ndarray
    names: tuple[str, ...] | None
    space: str
    suffix: str
    _text: Callable[[np.ndarray, str], str] = field(repr=False)

    def write(self, path: Name, points: np.ndarray, grid: Geometry | None = None) -> None:
        """Writes the file again with other points (P, nd), mm, LPS: its format, columns, names and space; grid: of the image that
        they lie in, for voxels. A space that a table's header does not say is written into its header.
        """
        space = "LPS" if self.suffix == ".txt" else self.space
        text = self._text(in_space(points, space, grid), space)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")


def in_space(points: np.ndarray, space: str, grid: Geometry | None) -> np.ndarray:
    """(P, nd) mm, LPS -> the numbers of a space, (x, y, z)."""
    if space == "voxel":
        assert grid is not None
        return grid.to_index(points)[:, ::-1]
    return points * [-1, -1, 1][: points.shape[1]] if space == "RAS" else points


def from_space(numbers: np.ndarray, space: str, grid: Geometry | None) -> np.ndarray:
    """The numbers of a space, (x, y, z) -> (P, nd) mm, LPS."""
    if space == "voxel":
        assert grid is not None
        return grid.to_physical(numbers[:, ::-1])
    return in_space(numbers, space, None)


def _text_of(path: Name) -> str:
    require_regular(path)
    try:
        with open(path, "rb") as stream:
            content = stream.read()
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file in UTF-8; landmarks are read from {FORMATS}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _raw(path: Name, text: str, nd: int, wanted: str | None) -> _points.Raw:
    start, name = text.lstrip(), str(path).lower()
    if "\0" in text[:4096] or start.startswith(("<", "# vtk", "MNI Tag", "%")):
        raise InputError(f"{path}: not a file that landmarks are read from: {FORMATS}")
    if start.startswith("{"):
        return _points.mrk_json(path, text, nd)
    if name.endswith(".fcsv") or start.startswith(("# Markups fiducial", "# Fiducial List")):
        return _points.fcsv(path, text, nd)
    if "OutputPoint = [" in text:
        return _points.transformix(path, text, nd)
    if _points.is_elastix(start):
        return _points.elastix(path, text, nd)
    return _tables.table(path, text, nd, wanted)


def read_points(
    path: Name, nd: int, grid: Geometry | None = None, reading: Reading = Reading(), warn: Warn = ignore
) -> Landmarks:
    """Reads landmarks with what else their file says; arguments and errors are those of read_landmarks."""
    wanted = None if reading.landmarks_space == "file" else reading.landmarks_space
    raw = _raw(path, _text_of(path), nd, wanted)
    if wanted is not None and raw.space not in (None, wanted):
        raise InputError(f"{path}: says itself that it is {raw.space}, and --landmarks-space says {wanted}")
    space = raw.space or wanted or raw.default
    if raw.space is None and wanted is None and raw.suffix != ".csv":
        warn(f"{path}: names no coordinate system, and is read as {space}, as 3D Slicer does")
    if space == "voxel" and grid is None:
        raise InputError(f"{path}: holds voxels, which mean something with their image alone")
    if not np.isfinite(raw.points).all(1).any():
        raise InputError(f"{path}: holds no landmarks")
    points = from_space(raw.points, space, grid)
    return Landmarks(points, None if raw.names is None else tuple(raw.names), space, raw.suffix, raw.text)


def read_landmarks(
    path: Name, nd: int, grid: Geometry | None = None, reading: Reading = Reading(), warn: Warn = ignore
) -> np.ndarray:
    """Reads the points of a file.

    A table (csv, also with semicolons, tabs, decimal commas) has a header whose letters say what its columns are: x,y,z
    (mm, LPS), l,p,s, r,a,s or i,j,k (voxels counted from 0, i along the image's first axis); 2D: the first two. Others: 3D
    Slicer's .fcsv and .mrk.json, points for elastix and transformix. Points that have a name but no position are left out.

    Args: path. nd: 2 or 3. grid (Geometry): of the image, for files that hold voxels. reading (Reading): landmarks_space says
    what numbers mean whose file does not; "file" takes x,y,z as LPS. warn: is told what was taken for granted.
    Returns:
        ndarray: (P, nd) fp64, mm, LPS, (x, y, z), P >= 1.
    Raises:
        InputError: missing, not text, none of these, without a column, a row that is no point, no points, a file that
            contradicts reading.landmarks_space, voxels without a grid.
    """
    points = read_points(path, nd, grid, reading, warn).points
    return points[np.isfinite(points).all(1)]


def write_landmarks(path: Name, points: ArrayLike, names: "tuple[str, ...] | None" = None) -> None:
    """Writes (P, nd) points, mm, LPS, (x, y, z), and their names if there are any, as a csv that read_landmarks reads."""
    points = np.asarray(points, dtype=np.float64)
    rows = [dict(zip("xyz", map(_points.written, point), strict=False)) for point in points]
    if names is not None:
        rows = [{**row, "label": name} for row, name in zip(rows, names, strict=True)]
    header = [*"xyz"[: points.shape[1]], *(["label"] if names is not None else [])]
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = _tables.csv.DictWriter(stream, header)
        writer.writeheader()
        writer.writerows(rows)
