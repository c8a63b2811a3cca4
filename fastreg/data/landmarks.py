"""Landmarks of a pair: which belong together, and whether they may be meant otherwise than they are read."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastreg import io
from fastreg._files import InputError, Name
from fastreg.io._landmarks import from_space, in_space
from fastreg.io._reading import Reading, Warn, ignore

# What numbers may be taken for: (space, whether they stand in the order z, y, x).
MEANINGS = [(space, turned) for turned in (False, True) for space in ("LPS", "RAS", "voxel")]


def _said(space: str, turned: bool) -> str:
    kind = {"voxel": "voxels"}.get(space, space)
    return f"read as {kind} in the order z,y,x" if turned else f"read as {kind} (--landmarks-space {space})"


def _taken_as(points: np.ndarray, own: str, grid: io.Geometry, meaning: tuple[str, bool]) -> np.ndarray:
    """(P, nd) mm, LPS: where points read in the space `own` would lie, if their numbers meant something else."""
    numbers = in_space(points, own, grid)
    return from_space(numbers[:, ::-1] if meaning[1] else numbers, meaning[0], grid)


def n_inside(points: np.ndarray, grid: io.Geometry) -> int:
    """How many points (P, nd), mm, LPS, lie in an image."""
    return int(grid.contains(grid.to_index(points)).sum())


def better_inside(points: np.ndarray, own: str, grid: io.Geometry) -> str:
    """`; 12 of 12 would, read as RAS ...`, where points of one file, read in the space `own`, would clearly better lie in their image
    if they meant something else; otherwise empty.
    """
    now, n = n_inside(points, grid), len(points)
    meant = [m for m in MEANINGS if m != (own, False) and (now == 0 or not m[1])]
    counts = [(n_inside(_taken_as(points, own, grid, m), grid), m) for m in meant]
    most, meaning = max(counts, key=lambda count: count[0])
    if most < 0.9 * n or most - now < max(3, n / 2) * (now > 0):
        return ""
    return f"; {most} of {n} would, {_said(*meaning)}"


class Other(NamedTuple):
    """Landmarks of a pair if they were meant otherwise: how, fixed and moving (P, nd), mm, LPS. kind: "exchanged", "space" or "one" file in another, "unit",
    "order".
    """

    how: str
    fixed: np.ndarray
    moving: np.ndarray
    kind: str


def others(
    fixed: np.ndarray, moving: np.ndarray, grids: Sequence[io.Geometry], spaces: Sequence[str]
) -> Iterator[Other]:
    """What landmarks, mm, LPS, that were read in `spaces` from files of two images, may have been meant as: exchanged, in another
    space, both or one of them.
    """
    yield Other("with those of the fixed and the moving image exchanged", moving, fixed, "exchanged")
    both = fixed, moving
    # In the plane of one slice the numbers are no longer those of the files.
    for meaning in MEANINGS if grids[0].plane is None else ():
        new = [_taken_as(p, s, g, meaning) for p, s, g in zip(both, spaces, grids, strict=True)]
        changed = [s != meaning[0] or meaning[1] for s in spaces]
        if all(changed):
            kind = "order" if meaning[1] else "unit" if "voxel" in (meaning[0], *spaces) else "space"
            yield Other(_said(*meaning), new[0], new[1], kind)
        for k, which in enumerate(("fixed", "moving")):
            if changed[k] and not meaning[1]:
                how = f"with those of the {which} image alone read as {meaning[0]}"
                yield Other(how, (new[0], fixed)[k], (moving, new[1])[k], "one")


def _numbered(name: str) -> str:
    return (re.findall(r"\d+", name) or [""])[-1]


def _matched(paths: Sequence[Name], both: Sequence[io.Landmarks], warn: Warn) -> list[int]:
    """The rows of the second file that belong to those of the first: by name where both name them, otherwise in their order."""
    rows = list(range(len(both[1].points)))
    names = [b.names for b in both]
    a, b = (n if n is not None and all(n) and len(set(n)) == len(n) else None for n in names)
    counts = [len(x.points) for x in both]
    if counts[0] != counts[1]:
        alone = "" if a is None or b is None else ", ".join(sorted(set(a) ^ set(b)))[:60]
        raise InputError(
            f"{paths[0]} holds {counts[0]} landmarks, {paths[1]} holds {counts[1]}{f'; without a partner: {alone}' * bool(alone)}"
        )
    if a is None or b is None:
        shared = set(filter(None, names[0] or ())) & set(filter(None, names[1] or ()))
        moved = [x for x in sorted(shared) if (names[0] or ()).index(x) != (names[1] or ()).index(x)]
        if moved and names[0] != names[1]:
            warn(
                f"{paths[0]} and {paths[1]} do not name each landmark by a name of its own, and {moved[0]!r} stands in different rows: "
                "matched by their order"
            )
        return rows
    if a == b:
        return rows
    if set(a) == set(b):
        warn(
            f"{paths[1]}: its landmarks are in another order than those of {paths[0]}: matched by their names"
        )
        return [b.index(name) for name in a]
    unlike = [i for i in rows if a[i] != b[i]]
    numbers = [[_numbered(x) for x in names] for names in (a, b)]
    # Two lists that number their points alike, fixed-1 and moving-1, are meant as they stand.
    if set(a) & set(b) or numbers[0] != numbers[1] or not all(numbers[0]):
        i = unlike[0]
        warn(
            f"{paths[0]} and {paths[1]} name {len(unlike)} of {len(rows)} landmarks differently "
            f"({a[i]!r} and {b[i]!r}, row {i + 1}): matched by their order"
        )
    return rows


def read_pair(
    paths: Sequence[Name], grids: Sequence[io.Geometry], warn: Warn = ignore, reading: Reading = Reading()
) -> tuple[list[np.ndarray], tuple[str, str], tuple[str, ...] | None]:
    """([fixed (P, nd), moving (P, nd)] mm, LPS, row i of one belonging to row i of the other; the spaces that they were read in;
    what the moving file calls them, or None).
    """
    both = [io.read_points(p, g.nd, g, reading, warn) for p, g in zip(paths, grids, strict=True)]
    rows = _matched(paths, both, warn)
    points = [both[0].points, both[1].points[rows]]
    there = np.isfinite(points[0]).all(1) & np.isfinite(points[1]).all(1)
    if not there.all():
        if not there.any():
            raise InputError(f"{paths[0]} and {paths[1]} have a position in both for no landmark")
        names = both[0].names or tuple(f"row {i + 1}" for i in range(len(there)))
        lost = ", ".join(name for name, known in zip(names, there, strict=True) if not known)
        warn(
            f"{paths[0]} and {paths[1]}: left out, as one of them gives no position: {lost[:80]} ({len(there) - there.sum()} of {len(there)})"
        )
    points = [p[there] for p in points]
    for path, p, grid, one, which in zip(paths, points, grids, both, ("fixed", "moving"), strict=True):
        outside = len(p) - n_inside(p, grid)
        better = better_inside(p, one.space, grid) if outside else ""
        if outside == len(p):
            raise InputError(
                f"{path}: no landmark lies in the {which} image{better or ' (they must be mm, LPS)'}"
            )
        if outside:
            warn(
                f"{path}: {outside} of {len(p)} landmarks lie outside the {which} image, and count{better.replace('would', 'would be inside', 1)}"
            )
    called = both[1].names
    kept = None if called is None else tuple(called[row] for row in np.array(rows)[there])
    return points, (both[0].space, both[1].space), kept
