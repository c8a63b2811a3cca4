"""Points in tables: a header says which columns, and by their letters in which space."""

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fastreg._files import InputError, Name

from ._points import UNITS, Raw, number, written

NAMES = ("label", "name", "landmark", "fiducial", "point", "id")
# By letter: the axis, and the sign that makes it LPS.
ANATOMY = {"l": (0, 1), "r": (0, -1), "p": (1, 1), "a": (1, -1), "s": (2, 1), "i": (2, -1)}
HEADERS = {None: "xyz", "LPS": "lps", "RAS": "ras", "voxel": "ijk"}
VOXELS = ("vox", "voxel", "voxels", "px", "pixel", "pixels")
_COLUMN = re.compile(r"([a-z])[\s_]*[(\[]?\s*(mm|cm|m|um|µm|nm|vox|voxels?|px|pixels?)?\s*[)\]]?$")


class _Columns(NamedTuple):
    """Where the points of a table stand: columns and signs of x, y, z (or their like); space: that the letters state."""

    space: str | None
    letters: str
    at: list[int]
    signs: list[int]
    scale: float


def _split(line: str, delimiter: str) -> list[str]:
    if delimiter == " ":
        return line.split()
    return [v.strip() for v in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]


def _found(header: Sequence[str], nd: int) -> list[_Columns]:
    """All that could be points in a header, with the columns that there are."""
    letters: dict[str, list[int]] = {}
    units: dict[str, str] = {}
    for n, name in enumerate(header):
        if match := _COLUMN.fullmatch(name.lower()):
            letters.setdefault(match[1], []).append(n)
            units[match[1]] = match[2] or ""
    anatomical = ["".join(c for c in pair if c in letters) for pair in ("lr", "pa", "si")[:nd]]
    if {"j", "k"} & letters.keys():
        anatomical[2:] = [c.replace("i", "") for c in anatomical[2:]]
    out = []
    for system in (["x", "y", "z"], ["i", "j", "k"], anatomical):
        present = [c for c in system[:nd] if c and len(c) == 1 and len(letters.get(c, ())) == 1]
        if not present:
            continue
        word = "".join(present)
        space: str | None = {"xyz"[:nd]: None, "ijk"[:nd]: "voxel", "ras"[:nd]: "RAS"}.get(word, "LPS")
        signs = [1] * len(present)
        if space == "LPS":
            signs = [ANATOMY.get(c, (0, 1))[1] for c in present]
        unit = {units[c] for c in present}
        scale = 1.0
        if len(unit) == 1 and (one := unit.pop()):
            scale = UNITS.get(one, 1.0)
            if one in VOXELS:
                space = "voxel" if space is None else space
        out.append(_Columns(space, word, [letters[c][0] for c in present], signs, scale))
    return out


def _columns(path: Name, header: Sequence[str], nd: int, wanted: str | None) -> _Columns:
    """What of a header is the points; wanted: the space that the user asked for."""
    found = _found(header, nd)
    whole = [c for c in found if len(c.at) == nd]
    if len(whole) > 1 and wanted is not None:
        whole = [c for c in whole if c.space == wanted] or [c for c in whole if c.space is None]
    if len(whole) == 2 and wanted is None and {c.letters for c in whole} == {"xyz"[:nd], "ijk"[:nd]}:
        whole = [c for c in whole if c.space is None] or whole  # beside voxels x, y, z are mm
    if len(whole) == 1:
        return whole[0]
    shown = repr(",".join(header)[:60])
    if whole:
        raise InputError(
            f"{path}: names points twice, as {' and '.join(','.join(c.letters) for c in whole)}: say which with --landmarks-space"
        )
    wants = f"{path}: the header must be {','.join('xyz'[:nd])} (mm, LPS), or {','.join('ras'[:nd])}, {','.join('lps'[:nd])} or {','.join('ijk'[:nd])} (voxels)"
    for part in found:
        for system in ("xyz", "ijk", "ras", "lps"):
            lacking = [c for c in system[:nd] if c not in part.letters]
            if len(part.at) >= 2 and set(part.letters) <= set(system):
                raise InputError(f"{wants}; column {lacking[0]} is missing, got {shown}")
    if header and all(not math.isnan(number(v.replace(",", "."))) for v in header):
        raise InputError(f"{wants}, got {shown}; what a file without one holds says --landmarks-space")
    raise InputError(f"{wants}, got {shown}")


def _values(
    path: Name, cells: Sequence[tuple[int, str, list[str]]], delimiter: str
) -> tuple[np.ndarray, bool]:
    """((P, nd), whether commas are decimal ones)."""
    commas = any("," in v for _, _, row in cells for v in row)
    if commas and any("." in v or v.count(",") > 1 for _, _, row in cells for v in row):
        raise InputError(f"{path}: its numbers hold both . and , : one of them must be the decimal sign")
    points = [[number(v.replace(",", ".")) for v in row] for _, _, row in cells]
    for (n, line, row), point in zip(cells, points, strict=True):
        if not np.isfinite(point).all():
            raise InputError(f"{path}: line {n} must hold {len(row)} numbers, got {line.strip()[:60]!r}")
    return np.reshape(points, (len(cells), -1)) if cells else np.empty((0, 1)), commas


def _lines(text: str) -> list[tuple[int, str]]:
    """Lines with their numbers; of comments that begin a table, the last is its header where it names columns. `sep=;` is Excel's."""
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip(' \t;,"')]
    lines = lines[1:] if lines and re.fullmatch("sep=.", lines[0][1].strip('" '), re.I) else lines
    body = [(n, line) for n, line in lines if not line.startswith("#")]
    above = [(n, line[1:]) for n, line in lines if line.startswith("#") and (not body or n < body[0][0])]
    if above and any(_found(_split(above[-1][1].strip(), d), 2) for d in ",;\t "):
        first = _split(body[0][1], ",") if body else []
        if not _found(first, 2):
            return [above[-1], *body]
    return body


def table(path: Name, text: str, nd: int, wanted: str | None) -> Raw:
    """A csv or its like, fields separated by comma, semicolon, tab or blanks."""
    lines = _lines(text)
    if not lines:
        _columns(path, [], nd, wanted)
    headers = {d: _split(lines[0][1].strip("\r\n "), d) for d in (",", ";", "\t", " ")}
    bare = {
        d: h for d, h in headers.items()
        if len([v for v in h if v]) == nd and all(not math.isnan(number(v.replace(",", "." if d != "," else ","))) for v in h[:nd])
    }  # fmt: skip
    if bare and wanted is not None:
        delimiter = next(iter(bare))
        columns = _Columns(None, "xyz"[:nd], list(range(nd)), [1] * nd, 1.0)
        header, body = list("xyz"[:nd]), lines
    else:
        complete = [d for d, h in headers.items() if any(len(c.at) == nd for c in _found(h, nd))]
        delimiter = complete[0] if complete else max(headers, key=lambda d: len(headers[d]) * (d != " "))
        header, body = headers[delimiter], lines[1:]
        columns = _columns(path, header, nd, wanted)
    rows = [(n, line, _split(line.strip("\r\n"), delimiter)) for n, line in body]
    for n, line, row in rows:
        if any(row[len(header) :]):
            hint = "; decimal commas need ; or tabs between numbers" if delimiter == "," else ""
            raise InputError(
                f"{path}: line {n} has more fields than the header, got {line.strip()[:60]!r}{hint}"
            )
    third = {"xy": "z", "ij": "k"}.get(columns.letters, "s")
    beyond = [n for n, name in enumerate(header) if name.lower() == third] if nd == 2 else []
    if any(abs(number(row[n].replace(",", "."))) > 0 for _, _, row in rows for n in beyond if n < len(row)):
        raise InputError(
            f"{path}: the header must be {','.join(columns.letters)} for a 2D image, got {','.join(header)[:60]!r}"
        )
    # Tables that 3D Slicer exports have points that were not placed yet.
    placed = [n for n, name in enumerate(header) if name.lower() == "defined"][:1]
    there = [all(n < len(row) and row[n].lower() not in ("0", "false") for n in placed) for _, _, row in rows]
    cells = [(n, line, [row[c] if c < len(row) else "" for c in columns.at]) for n, line, row in rows]
    cells = [cell for cell, known in zip(cells, there, strict=True) if known]
    points = np.full((len(rows), nd), np.nan)
    points[there], commas = _values(path, cells, delimiter)
    named = [n for name in NAMES for n, title in enumerate(header) if title.lower() == name][:1]
    names = [row[named[0]] if named[0] < len(row) else "" for _, _, row in rows] if named else None
    factor = np.asarray(columns.signs) * columns.scale
    text_of = _writer(header, [row for _, _, row in rows], columns, factor, delimiter, commas, placed)
    return Raw(points * factor, names, columns.space, "LPS", ".csv", text_of)


def _writer(
    header: list[str], rows: list[list[str]], columns: _Columns, factor: np.ndarray, delimiter: str, commas: bool, placed: list[int]
) -> Callable[[np.ndarray, str], str]:  # fmt: skip
    """The table with other points; a space that its header does not say becomes the header's."""

    def text_of(points: np.ndarray, space: str) -> str:
        titles = list(header)
        if columns.space is None and space != "LPS":
            for c, letter in zip(columns.at, HEADERS[space], strict=False):
                titles[c] = letter
        stream = io.StringIO()
        out = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
        out.writerow(titles)
        for row, point in zip(rows, points / factor, strict=True):
            row = row + [""] * (len(header) - len(row))
            for c, value in zip(columns.at, point, strict=True):
                row[c] = written(value).replace(".", ",") if commas else written(value)
            for c in placed if np.isnan(point).any() else ():
                row[c] = "0"
            out.writerow(row)
        return stream.getvalue()

    return text_of
