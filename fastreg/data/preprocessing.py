"""From a scan on its own grid to what a net takes, and from the net's displacement back.

What is done to a pair is a Preprocessing, and `sample_of` (pairs.py) does it: align, crop, pad or resample, match histograms, scale
intensities. Where that leaves the pair is a View, which leads back. Training, validation and `fastreg apply` all go through both.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from fastreg import _start, io, ops
from fastreg._files import InputError
from fastreg.io._sitk import sitk

ALIGNMENTS = ("none", "rigid", "affine")
INTENSITIES = ("percentiles", "minmax", "zscore")
MOST = 2**40  # voxels of a grid


# Of ITK's own example for Demons.
_LEVELS, _POINTS = 1024, 7


@dataclass(frozen=True)
class View:
    """Where a net sees a pair: on `grid`, which lies in the space of the image on `fixed`; there the moving image is laid by
    `matrix`, (nd, nd + 1), mm, of fixed points to moving ones (None: it lies as it is).
    """

    grid: io.Geometry
    fixed: io.Geometry
    matrix: np.ndarray | None = None

    def laid(self, moving: io.Geometry) -> io.Geometry:
        """Where the matrix lays what is on a grid of the moving image."""
        return moving if self.matrix is None else moving.before(self.matrix)

    def displacement(self, u: torch.Tensor) -> torch.Tensor:
        """All of the motion, (1, nd, *fixed.shape) in voxels of fixed, of what a net says, (1, nd, *grid.shape) in those of grid.

        A point p that the net moves to p + u(p) belongs to matrix (p + u(p)). Beyond a crop the border of u goes on.
        """
        if self.grid != self.fixed:
            nd = self.fixed.nd
            scale = [a / b for a, b in zip(self.grid.spacing_zyx, self.fixed.spacing_zyx, strict=True)]
            u = u * u.new_tensor(scale).view(1, nd, *[1] * nd)
            u = io.resample(u, self.grid, self.fixed, outside=None)[0]
        return u if self.matrix is None else _start.Start("aligned", self.fixed, self.matrix).then(u)


@dataclass(frozen=True)
class Preprocessing:
    """What a net is given of a pair.

    intensity: "percentiles" (0.5 and 99.5 of each image become 0 and 1), "minmax", "zscore" (mean 0, deviation 1, cut at
        two deviations: R2N2) or (low, high), which become 0 and 1 (CT); beyond them values are clipped.
    crop: (start, stop) of each axis in voxels of the fixed image; "mask": the box that holds the masks of both images, with
        `margin` mm around it; or None.
    size: voxels of each axis, to which what is left is resampled; spacing: mm of them, instead. Both: so many voxels of
        that size about its centre, what is beyond them cut off, and where the image ends before them it is padded with its border, which counts
        nothing.
    align: "rigid" or "affine": the moving image is laid on the fixed one first (`find_alignment`); what comes back has that in it.
    match_histograms: intensities of the moving image become those of the fixed one of the same rank (ITK's filter, which
        leaves out what is darker than the mean: the background). Needs SimpleITK.
    """

    intensity: str | tuple[float, float] = "percentiles"
    crop: tuple[tuple[int | None, int | None], ...] | str | None = None
    size: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    align: str = "none"
    margin: float = 0.0
    match_histograms: bool = False

    def __post_init__(self) -> None:
        i = self.intensity
        window = isinstance(i, (tuple, list)) and len(i) == 2 and -math.inf < i[0] < i[1] < math.inf
        if not window and i not in INTENSITIES:
            raise InputError(f"the intensity must be one of {', '.join(INTENSITIES)} or LOW,HIGH, got {i}")
        if self.align not in ALIGNMENTS:
            raise InputError(f"align must be one of {', '.join(ALIGNMENTS)}, got {self.align}")
        if isinstance(self.crop, str) and self.crop != "mask":
            raise InputError(f"crop must be a range for each axis or mask, got {self.crop}")
        if not 0 <= self.margin < math.inf:
            raise InputError(f"margin must be 0 mm or more, got {self.margin}")
        if self.margin and self.crop != "mask":
            raise InputError(f"margin goes with the crop to a mask, got crop {self.crop}")
        for name in ("size", "spacing"):
            value = getattr(self, name)
            least = 1 if name == "size" else 0
            if value is not None and not all(least < v < math.inf for v in value):
                raise InputError(
                    f"{name} must be {'at least 2' if name == 'size' else 'positive'}, got {value}"
                )

    def grid(self, fixed: io.Geometry, counts: np.ndarray | None = None) -> io.Geometry:
        """The net's grid (Geometry) for a fixed image's: cropped, then resampled between its corner voxels' centres, or about its
        centre. counts: bool, of the fixed image's shape: where the masks are not 0, for crop="mask".
        """
        nd = fixed.nd
        for name in ("crop", "size", "spacing"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str) and len(value) != nd:
                raise InputError(f"{name} must have {nd} numbers or ranges for {nd}D images, got {value}")
        bounds, step = self._bounds(fixed, counts), fixed.spacing_zyx
        first, cut = [float(a) for a, _ in bounds], [b - a for a, b in bounds]
        size, new = tuple(cut), list(step)
        if self.spacing is not None:
            # without what a header rounds, so that nothing is interpolated where nothing has to be
            new = [
                s if math.isclose(s, h, rel_tol=1e-6) else h for s, h in zip(step, self.spacing, strict=True)
            ]
        if self.spacing is not None and self.size is None:
            size = tuple(
                max(2, round(min((n - 1) * s / h, MOST)) + 1) for n, s, h in zip(cut, step, new, strict=True)
            )
        elif self.size is not None:
            size = tuple(self.size)
        if math.prod(size) > MOST:
            raise InputError(f"size or spacing ask for too many voxels, {'x'.join(map(str, size))}")
        if self.size is not None and self.spacing is not None:
            first = [
                a + (n - 1) / 2 - (m - 1) / 2 * h / s
                for a, n, m, h, s in zip(first, cut, size, new, step, strict=True)
            ]
            first = [math.floor(a) if h == s else a for a, h, s in zip(first, new, step, strict=True)]
        else:
            new = [s * (n - 1) / (m - 1) for s, n, m in zip(step, cut, size, strict=True)]
        origin = fixed.to_physical(first)
        return io.Geometry(size[::-1], tuple(new)[::-1], tuple(float(v) for v in origin), fixed.direction)

    def _bounds(self, fixed: io.Geometry, counts: np.ndarray | None) -> list[tuple[int, int]]:
        """What the crop leaves: from and to which voxel of each axis."""
        if self.crop is None:
            return [(0, n) for n in fixed.shape]
        if not isinstance(self.crop, str):
            bounds = [slice(a, b).indices(n)[:2] for (a, b), n in zip(self.crop, fixed.shape, strict=True)]
            if any(b - a < 2 for a, b in bounds):
                raise InputError(f"crop must leave at least 2 voxels an axis of {fixed}, got {self.crop}")
            return bounds
        if counts is None:
            raise InputError("the crop is to the box of the masks, and neither image has one")
        bounds = []
        for axis, (n, s) in enumerate(zip(fixed.shape, fixed.spacing_zyx, strict=True)):
            there = np.flatnonzero(counts.any(tuple(k for k in range(fixed.nd) if k != axis)))
            if not len(there):
                raise InputError("the crop is to the box of the masks, and they do not reach the fixed image")
            more = math.ceil(self.margin / s - 1e-9)
            a, b = max(0, int(there[0]) - more), min(n, int(there[-1]) + 1 + more)
            # of one voxel two, as an axis must have
            bounds.append((a, b) if b - a > 1 else (max(0, b - 2), max(2, b)))
        return bounds

    def matched(self, moving: np.ndarray, fixed: np.ndarray) -> np.ndarray:
        """The moving image as it is given on: as it is, or with the fixed image's histogram."""
        if not self.match_histograms:
            return moving
        itk = sitk("matching histograms")
        images = (itk.GetImageFromArray(np.ascontiguousarray(a, dtype=np.float64)) for a in (moving, fixed))
        matched = itk.HistogramMatching(*images, _LEVELS, _POINTS, True)
        return np.asarray(itk.GetArrayFromImage(matched))

    def scaled(self, array: np.ndarray) -> np.ndarray:
        """The array's intensities as the net takes them, fp32."""
        array = np.asarray(array, dtype=np.float64)
        if self.intensity == "zscore":
            out = (array - array.mean()) / max(array.std(), 1e-30)
            return np.clip(out, -2, 2).astype(np.float32)
        if self.intensity == "percentiles":
            low, high = np.percentile(array, [0.5, 99.5])
            if not high > low:  # a few bright voxels on nothing
                low, high = array.min(), array.max()
        elif self.intensity == "minmax":
            low, high = array.min(), array.max()
        else:
            low, high = self.intensity  # type: ignore[str-unpack]
        out = np.clip((array - low) / (high - low), 0, 1).astype(np.float32)
        if out.min() == out.max():
            raise InputError(f"the image must not be constant between the intensities {low:g} and {high:g}")
        return out

    def image(
        self, array: np.ndarray, geometry: io.Geometry, onto: io.Geometry
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(array on geometry) -> (1, 1, *onto.shape) and where the image reaches, bool of the same shape.

        Smoothed first where the new voxels are larger; beyond the image its border goes on.
        """
        image = torch.from_numpy(self.scaled(array))[None, None]
        # Voxels of the image per voxel of the net's, along each axis of the image.
        ratio = np.abs(np.linalg.inv(geometry.matrix) @ onto.matrix).max(1)
        sigma = [0.5 * float(max(r * r - 1, 0)) ** 0.5 for r in ratio]
        if max(sigma) > 0:
            image = ops.smooth(image, sigma)
        if geometry == onto:
            return image, torch.ones_like(image, dtype=torch.bool)
        return io.resample(image, geometry, onto, outside=None)

    def plain(self) -> dict[str, Any]:
        """As a dict, for a checkpoint: Preprocessing(**plain) builds it."""
        return asdict(self)
