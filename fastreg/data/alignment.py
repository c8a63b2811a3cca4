"""The matrix that lays a moving image on a fixed one before a net sees them: found once a pair, and kept."""

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastreg import _start, io
from fastreg._files import InputError, Name, write_json
from fastreg._refusals import Refusal
from fastreg.registration import register

from .weights import weights_of

if TYPE_CHECKING:
    from .pairs import Case

TRANSFORMS = ("rigid", "affine")
FORMAT = "fastreg alignment 1"


def find_alignment(case: "Case", transform: str = "affine") -> np.ndarray:
    """The matrix that `fastreg register --transform affine` finds for a pair: from where both are laid on each other if that is
    clearly better, by the similarity that suits them, where their masks count. On the CPU.

    Args:
        case (Case): the pair. transform (str): "affine" or "rigid".

    Returns:
        ndarray: (nd, nd + 1) fp64, mm, (x, y, z), LPS: a point of the fixed image to the moving one.

    Raises:
        InputError: the images do not overlap, or nothing of them counts in both.

    Example:
        >>> import numpy as np
        >>> from fastreg import io
        >>> from fastreg.data import Case, find_alignment
        >>> y, x = np.mgrid[:32.0, :32.0]
        >>> fixed, moving = (1.0 * (((y - 15) / 5) ** 2 + ((x - c) / 8) ** 2 < 1) for c in (14, 17))
        >>> grid = io.Geometry.of((32, 32), (2.0, 2.0))
        >>> matrix = find_alignment(Case("ellipses", fixed, grid, moving, grid), "rigid")
        >>> grid.to_index(matrix @ [28, 30, 1]).round()  # the centre of the one, mm, leads to that of the other, (y, x)
        array([15., 17.])
    """
    if transform not in TRANSFORMS:
        raise InputError(f"an alignment must be {' or '.join(TRANSFORMS)}, got {transform}")
    grid = case.fixed_grid
    # fp64, or a small range on a large offset would be rounded away
    fixed, moving = (
        torch.from_numpy(np.ascontiguousarray(a, dtype=np.float64))[None, None]
        for a in (case.fixed_seen, case.moving_seen)
    )
    weights, moving_weights = case.weights, case.moving_weights
    start = _start.find("auto", grid, case.moving_grid, fixed, moving, weights, moving_weights)
    lies = case.moving_grid if start is None else start.of_image(case.moving_grid)[0]
    laid, inside = io.resample(moving, lies, grid, outside=None)
    _, weights = weights_of(weights, inside)
    if moving_weights is not None:
        moving_weights = io.resample(moving_weights, lies, grid, outside=0.0)[0]
        if not (moving_weights if weights is None else moving_weights * weights).any():
            raise InputError("no voxel counts in both images: their masks leave nothing in common")
    options: dict[str, Any] = {"spacing": grid.spacing_zyx, "mask": weights, "moving_mask": moving_weights}
    try:
        found = register(fixed, laid, transform=transform, **options).affine  # type: ignore[arg-type]
    except Refusal as error:
        raise InputError(f"cannot be aligned: {error.brief}") from error
    affine = found if start is None else start.after(found)
    assert affine is not None
    return grid.map_to_physical(affine[0].double().numpy())


class Alignments:
    """`find_alignment` of pairs, each found once. What is kept belongs to what the images and masks hold, whatever they are called.

    folder: kept there too, a file a pair, from one process to the next; None: in memory alone. write (bool): or only read there.
    """

    def __init__(self, folder: Name | None = None, *, write: bool = True) -> None:
        self.folder, self.write = None if folder is None else Path(folder), write
        self._found: dict[str, np.ndarray] = {}

    def __call__(self, case: "Case", transform: str) -> np.ndarray:
        key = _key(case, transform)
        if key not in self._found:
            self._found[key] = self._of(key, case, transform)
        return self._found[key]

    def _of(self, key: str, case: "Case", transform: str) -> np.ndarray:
        path = None if self.folder is None else self.folder / f"{key}.json"
        kept = None if path is None else _read(path, case.fixed_grid.nd)
        if kept is not None:
            return kept
        matrix = find_alignment(case, transform)
        if path is not None and self.write:
            path.parent.mkdir(parents=True, exist_ok=True)
            about = {"format": FORMAT, "pair": case.title, "transform": transform}
            write_json(path, {**about, "matrix_lps_mm": matrix.tolist()})
        return matrix


def _key(case: "Case", transform: str) -> str:
    digest = hashlib.blake2b(transform.encode(), digest_size=16)
    for grid in (case.fixed_grid, case.moving_grid):
        for numbers in (grid.size, grid.spacing, grid.origin, grid.direction):
            digest.update(np.asarray(numbers, dtype=np.float64).tobytes())
    for array in (case.fixed, case.moving, case.mask, case.moving_mask):
        if array is None:
            digest.update(b"none")
        else:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def _read(path: Path, nd: int) -> np.ndarray | None:
    """What is kept in a file; None: there is none, or it is damaged, and will be found anew."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        matrix = np.array(content["matrix_lps_mm"], dtype=np.float64)
        known = content["format"] == FORMAT
    except (OSError, ValueError, TypeError, KeyError):
        return None
    fits = known and matrix.shape == (nd, nd + 1) and bool(np.isfinite(matrix).all())
    return matrix if fits and math.fabs(np.linalg.det(matrix[:, :-1])) > 1e-6 else None
