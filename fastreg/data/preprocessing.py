"""From a scan on its own grid to what a net takes, and from the net's displacement back."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from fastreg import io, ops
from fastreg._files import InputError

INTENSITIES = ("percentiles", "minmax", "zscore")
MOST = 2**40  # voxels of a grid


@dataclass(frozen=True)
class Preprocessing:
    """What a net is given of a pair.

    intensity: "percentiles" (0.5 and 99.5 of each image become 0 and 1), "minmax", "zscore" (mean 0, deviation 1, cut at
        two deviations: R2N2) or (low, high), which become 0 and 1 (CT); beyond them values are clipped.
    crop: (start, stop) of each axis in voxels of the fixed image, or None. size: voxels of each axis after it, or None.
    spacing: mm of each axis after the crop, or None; not with size.
    """

    intensity: str | tuple[float, float] = "percentiles"
    crop: tuple[tuple[int | None, int | None], ...] | None = None
    size: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        i = self.intensity
        window = isinstance(i, (tuple, list)) and len(i) == 2 and -math.inf < i[0] < i[1] < math.inf
        if not window and i not in INTENSITIES:
            raise InputError(f"the intensity must be one of {', '.join(INTENSITIES)} or LOW,HIGH, got {i}")
        if self.size is not None and self.spacing is not None:
            raise InputError("size and spacing exclude each other")
        for name in ("size", "spacing"):
            value = getattr(self, name)
            least = 1 if name == "size" else 0
            if value is not None and not all(least < v < math.inf for v in value):
                raise InputError(
                    f"{name} must be {'at least 2' if name == 'size' else 'positive'}, got {value}"
                )

    def grid(self, fixed: io.Geometry) -> io.Geometry:
        """The net's grid (Geometry) for a fixed image's: cropped, then resampled between its corner voxels' centres."""
        nd, shape = fixed.nd, fixed.shape
        for name in ("crop", "size", "spacing"):
            value = getattr(self, name)
            if value is not None and len(value) != nd:
                raise InputError(f"{name} must have {nd} numbers or ranges for {nd}D images, got {value}")
        start, stop = (0,) * nd, shape
        if self.crop is not None:
            bounds = [slice(a, b).indices(n)[:2] for (a, b), n in zip(self.crop, shape, strict=True)]
            start, stop = zip(*bounds, strict=True)
            if any(b - a < 2 for a, b in bounds):
                raise InputError(f"crop must leave at least 2 voxels an axis of {fixed}, got {self.crop}")
        cut = tuple(b - a for a, b in zip(start, stop, strict=True))
        step = fixed.spacing_zyx
        if self.size is not None:
            size = self.size
        elif self.spacing is not None:
            size = tuple(
                max(2, round(min((n - 1) * s / new, MOST)) + 1)
                for n, s, new in zip(cut, step, self.spacing, strict=True)
            )
        else:
            size = cut
        if math.prod(size) > MOST:
            raise InputError(f"size or spacing ask for too many voxels, {'x'.join(map(str, size))}")
        step = tuple(s * (n - 1) / (m - 1) for s, n, m in zip(step, cut, size, strict=True))
        origin = fixed.to_physical(start)
        return io.Geometry(tuple(size)[::-1], step[::-1], tuple(float(v) for v in origin), fixed.direction)

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

    def displacement(self, u: torch.Tensor, grid: io.Geometry, fixed: io.Geometry) -> torch.Tensor:
        """The net's displacement (1, nd, *grid.shape), voxels of grid, on the fixed image's grid in its voxels.

        Beyond a crop its border goes on.
        """
        if grid == fixed:
            return u
        nd = fixed.nd
        scale = [a / b for a, b in zip(grid.spacing_zyx, fixed.spacing_zyx, strict=True)]
        u = u * u.new_tensor(scale).view(1, nd, *[1] * nd)
        return io.resample(u, grid, fixed, outside=None)[0]

    def plain(self) -> dict[str, Any]:
        """As a dict, for a checkpoint: Preprocessing(**plain) builds it."""
        return asdict(self)
