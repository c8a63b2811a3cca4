"""Points as 3D Slicer and elastix write them. Tables: _tables.py; which file is what: _landmarks.py."""

import copy
import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastreg._files import InputError, Name

# Slicer's own names and numbers of them; IJK is the index of the image.
SLICER = {"RAS": "RAS", "0": "RAS", "LPS": "LPS", "1": "LPS", "IJK": "voxel", "2": "voxel"}
UNITS = {"mm": 1.0, "cm": 10.0, "m": 1000.0, "um": 1e-3, "µm": 1e-3, "nm": 1e-6}
FCSV = "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID".split(",")
DEFINED = 2  # Slicer's positionStatus: 0 undefined, 1 preview, 2 defined, 3 missing


class Raw(NamedTuple):
    """What a file says. points (P, nd): mm or voxels, (x, y, z); a row of NaN is a point without a position. space: that the
    file states, or None. default: what its kind means then. text: what the file would be with other points, as many, in a
    space, NaN where they have none.
    """

    points: np.ndarray
    names: list[str] | None
    space: str | None
    default: str
    suffix: str
    text: Callable[[np.ndarray, str], str]


def number(text: Any) -> float:
    """NaN where it is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def written(value: float) -> str:
    """Enough of a number."""
    return f"{value:.9g}"


def flat(points: np.ndarray, nd: int, path: Name) -> np.ndarray:
    """(P, 3) -> (P, nd): of a 2D image the third number must be 0."""
    if nd == 2 and np.nan_to_num(points[:, 2:]).any():
        raise InputError(f"{path}: holds 3D points, and the image is 2D")
    return points[:, :nd]


def fcsv(path: Name, text: str, nd: int) -> Raw:
    """3D Slicer's fiducials, of any version: RAS up to 4.10, LPS later; the file says which."""
    found = re.search(r"^#\s*CoordinateSystem\s*=\s*(\S*)", text, re.M | re.I)
    space = SLICER.get(found[1].upper()) if found else None
    if found and space is None:
        raise InputError(f"{path}: CoordinateSystem must be RAS, LPS or IJK (0, 1, 2), got {found[1]!r}")
    named = re.search(r"^#\s*columns\s*=\s*(.*)$", text, re.M | re.I)
    columns = [name.strip() for name in named[1].split(",")] if named else FCSV
    missing = [axis for axis in "xyz" if axis not in columns]
    if missing:
        raise InputError(f"{path}: its columns lack {missing[0]}: {','.join(columns)[:80]}")
    at = [columns.index(axis) for axis in "xyz"]
    label = columns.index("label") if "label" in columns else None
    lines, rows = text.splitlines(), []
    for n, line in enumerate(lines):
        if line.strip() and not line.startswith("#"):
            rows.append((n, next(csv.reader([line]))))
    points = []
    for n, row in rows:
        status = number(row[len(columns)]) if len(row) == len(columns) + 2 else DEFINED
        point = [number(row[c]) if c < len(row) else math.nan for c in at]
        if status == DEFINED and not np.isfinite(point).all():
            raise InputError(f"{path}: line {n + 1} must hold x, y and z, got {lines[n][:60]!r}")
        points.append(point if status == DEFINED else [math.nan] * 3)

    def text_of(moved: np.ndarray, into: str) -> str:
        out = list(lines)
        for (n, row), old, point in zip(rows, points, moved, strict=True):
            there = np.isfinite(point).all()
            if there or np.isfinite(old).all():
                if not there:
                    row += [""] * (len(columns) + 2 - len(row))
                    row[len(columns) :] = ["0", "0"]  # undefined
                for c, value in zip(at, np.nan_to_num(point), strict=False):
                    row[c] = written(value)
                stream = io.StringIO()
                csv.writer(stream, lineterminator="").writerow(row)
                out[n] = stream.getvalue()
        told = {"voxel": "IJK"}.get(into, into)
        if found:
            word = told if found[1].isalpha() else str(["RAS", "LPS", "IJK"].index(told))
            n = text[: found.start()].count("\n")
            out[n] = re.sub(r"(=\s*)\S*", rf"\g<1>{word}", out[n], count=1)
        else:
            out.insert(1, f"# CoordinateSystem = {told}")
        return "\n".join(out) + "\n"

    names = None if label is None else [row[label] if label < len(row) else "" for _, row in rows]
    return Raw(flat(np.reshape(points, (-1, 3)), nd, path), names, space, "RAS", ".fcsv", text_of)


def _markups(path: Name, content: Any) -> list[dict[str, Any]]:
    markups = content.get("markups") if isinstance(content, dict) else None
    if not (isinstance(markups, list) and all(isinstance(m, dict) for m in markups)):
        raise InputError(f"{path}: is JSON, but no markups file of 3D Slicer")
    of_points = [m for m in markups if m.get("type") == "Fiducial"]
    if not of_points:
        kinds = ", ".join(sorted({str(m.get("type")) for m in markups})) or "nothing"
        raise InputError(f"{path}: holds no point list (Fiducial), but {kinds}")
    return of_points


def _position(path: Name, point: Any) -> list[float]:
    where = point.get("position") if isinstance(point, dict) else None
    if isinstance(point, dict) and (point.get("positionStatus", "defined") != "defined" or not where):
        return [math.nan] * 3
    if not (isinstance(where, list) and len(where) == 3 and np.isfinite([number(v) for v in where]).all()):
        raise InputError(f"{path}: a position must be 3 numbers, got {json.dumps(where)[:60]}")
    return [float(v) for v in where]


def mrk_json(path: Name, text: str, nd: int) -> Raw:
    """Markups of 3D Slicer 4.11 and later: the points of all point lists, one after the other."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    markups = _markups(path, content)
    spaces, scales, points, names = [], [], [], []
    for markup in markups:
        said = markup.get("coordinateSystem")
        space = SLICER.get(str(said).upper()) if said is not None else None
        if said is not None and space is None:
            raise InputError(f"{path}: coordinateSystem must be LPS or RAS, got {str(said)[:20]!r}")
        units = markup.get("coordinateUnits", "mm")
        unit = units[0] if isinstance(units, list) and units else units
        if unit not in UNITS:
            raise InputError(
                f"{path}: coordinateUnits must be mm (or another length), got {str(unit)[:20]!r}"
            )
        some = markup.get("controlPoints") or []
        of_these = np.reshape([_position(path, p) for p in some], (-1, 3)) * UNITS[unit]
        spaces.append(space)
        if space != spaces[0]:
            if "voxel" in (space, spaces[0]):
                raise InputError(f"{path}: its point lists are in different coordinate systems")
            of_these = of_these * _turn(space or "LPS", spaces[0] or "LPS")
        scales.append(UNITS[unit])
        points.append(of_these)
        names += [str(p.get("label") or "") for p in some]

    def text_of(moved: np.ndarray, into: str) -> str:
        new = copy.deepcopy(content)
        rows = iter(moved)
        for markup, scale in zip(_markups(path, new), scales, strict=True):
            markup["coordinateSystem"] = {"voxel": "IJK"}.get(into, into)
            for point in markup.get("controlPoints") or []:
                row = next(rows)
                if np.isfinite(row).all():
                    point["position"][: len(row)] = [float(written(v / scale)) for v in row]
                else:
                    point |= {"position": None, "positionStatus": "undefined"}
        return json.dumps(new, indent=4, ensure_ascii=False) + "\n"

    return Raw(flat(np.concatenate(points), nd, path), names, spaces[0], "LPS", ".mrk.json", text_of)


def _turn(one: str, other: str) -> np.ndarray:
    """(3,): what numbers are multiplied with from LPS or RAS to LPS or RAS."""
    return np.array([1.0, 1.0, 1.0] if one == other else [-1.0, -1.0, 1.0])


def elastix_text(points: np.ndarray, _: str) -> str:
    """As transformix -def and elastix -fp, -mp read them. Always mm: they round what is called an index."""
    rows = [" ".join(map(written, row)) for row in points if np.isfinite(row).all()]
    return "\n".join(["point", str(len(rows)), *rows]) + "\n"


def is_elastix(text: str) -> bool:
    """`point` or `index` first, or (an older form, of indices) the number of points alone on its line."""
    words = (text.split("\n", 1)[0]).split()
    return len(words) == 1 and (words[0] in ("point", "index") or words[0].isdigit())


def elastix(path: Name, text: str, nd: int) -> Raw:
    """Points for elastix and transformix."""
    words = text.split()
    kind = words.pop(0) if words[0] in ("point", "index") else "index"
    count = int(words[0]) if words and words[0].isdigit() else -1
    values = [number(w) for w in words[1:]]
    if count < 0 or len(values) != count * nd or not np.isfinite(values).all():
        raise InputError(
            f"{path}: {kind}, the number of points, and {nd} numbers for each: says {count if count >= 0 else 'nothing'}, holds {len(values) / nd:g}"
        )
    return Raw(np.reshape(values, (-1, nd)), None, {"point": "LPS"}.get(kind, "voxel"), "LPS", ".txt", elastix_text)  # fmt: skip


def transformix(path: Name, text: str, nd: int) -> Raw:
    """outputpoints.txt: where transformix has sent the points."""
    rows = [row.split() for row in re.findall(r"OutputPoint\s*=\s*\[([^\]]*)\]", text)]
    return Raw(numbers_of(path, rows, nd), None, "LPS", "LPS", ".txt", elastix_text)


def numbers_of(path: Name, rows: Sequence[Sequence[str]], nd: int) -> np.ndarray:
    """(P, nd). InputError names the row that is no point."""
    points = [[number(v) for v in row] for row in rows]
    for n, point in enumerate(points, 1):
        if len(point) != nd or not np.isfinite(point).all():
            raise InputError(f"{path}: point {n} must be {nd} numbers, got {' '.join(rows[n - 1])[:60]!r}")
    return np.reshape(points, (-1, nd))
