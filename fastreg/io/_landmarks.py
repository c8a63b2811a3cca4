"""Landmarks: points in csv files."""

import csv
import math

import numpy as np
from numpy.typing import ArrayLike

from fastreg._files import InputError, Name, replacing


def read_landmarks(path: Name, nd: int) -> np.ndarray:
    """Reads points from a csv file whose header names x, y and z (2D: x and y); other columns are ignored.

    Returns:
        ndarray: (P, nd) fp64, mm, (x, y, z), P >= 1.
    Raises:
        InputError: missing, not text, without those columns, a row that is no point, no rows.
    """
    axes = ["x", "y", "z"][:nd]
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = [(n, row) for n, row in enumerate(csv.reader(stream), 1) if any(v.strip() for v in row)]
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a csv file") from error
    header = [name.strip().lower() for name in rows[0][1]] if rows else []
    if any(header.count(axis) != 1 for axis in axes) or (nd == 2 and "z" in header):
        raise InputError(f"{path}: the header must be {','.join(axes)}, got {','.join(header)[:60]!r}")
    columns = [header.index(axis) for axis in axes]
    points = []
    for line, row in rows[1:]:
        try:
            point = [float(row[c]) for c in columns]
        except (ValueError, IndexError):
            point = [math.nan]
        if not np.isfinite(point).all():
            raise InputError(f"{path}: line {line} must hold {nd} numbers, got {','.join(row)[:60]!r}")
        points.append(point)
    if not points:
        raise InputError(f"{path}: holds no landmarks")
    return np.asarray(points, dtype=np.float64)


def write_landmarks(path: Name, points: ArrayLike) -> None:
    """Writes (P, nd) points, mm, (x, y, z), as read_landmarks reads them."""
    points = np.asarray(points, dtype=np.float64)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow("xyz"[: points.shape[1]])
        writer.writerows([f"{v:.9g}" for v in point] for point in points)
