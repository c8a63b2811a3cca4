"""What a format of transforms is to us."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastreg._files import InputError
from fastreg.io import Geometry, Reading
from fastreg.io._reading import Warn, ignore

from ._chain import Step


@dataclass(frozen=True)
class Source:
    """A file to read, and what was given beside it."""

    path: Path
    like: Geometry | None = None
    moving: Geometry | None = None
    reading: Reading = Reading()
    warn: Warn = ignore

    def needs(self, what: str, why: str) -> Geometry:
        """like or moving, which must have been given."""
        geometry = self.like if what == "like" else self.moving
        if geometry is None:
            flag = "--like FIXED" if what == "like" else "--moving MOVING"
            raise InputError(f"{self.path}: {why}: give {flag}")
        return geometry


@dataclass(frozen=True)
class Target:
    """A file to write: u (1, nd, *spatial) in voxels of geometry; the moving image's grid, where it is known."""

    path: Path
    u: torch.Tensor
    geometry: Geometry
    moving: Geometry | None = None

    @property
    def voxels(self) -> np.ndarray:
        """(*spatial, nd) fp64, (z, y, x) both."""
        return self.u[0].detach().cpu().double().movedim(0, -1).numpy()

    @property
    def vectors(self) -> np.ndarray:
        """(*spatial, nd) fp64 mm, LPS, (x, y, z)."""
        return self.voxels @ self.geometry.matrix.T


@dataclass(frozen=True)
class Format:
    """A row of FORMATS.

    tools: whose it is. files: the suffixes. known: what in the file says so, "" where nothing does and `--from` must. holds: unit, sign and
    order. read and write: None where we do not; instead: what to do then. suffixes: of what can be written. undefined: whether NaN
    has a meaning in it. written: what holds says, of the files that we write, where others may hold more.
    """

    name: str
    tools: str
    files: str
    known: str
    holds: str
    read: Callable[[Source], list[Step]] | None = None
    write: Callable[[Target], None] | None = None
    needs: str = ""
    instead: str = ""
    suffixes: tuple[str, ...] = ()
    undefined: bool = False
    written: str = ""
