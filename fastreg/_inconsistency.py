"""Where a registration may be wrong, without truth: how far a point is from where it began after the motion that was found and one
that was found in the other direction, on its own, coarsely and briefly.

Of two descents that do not know of each other both are wrong in the same way only by chance. It sees what landed in a wrong place of
the same look, and not what both descents miss alike: a wall along which organs slide, an organ that is in one image only. Where the brief
descent does not come back it may itself have failed: before a result is called suspect the way back is found as well as the way there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import _descent, ops
from .io import Geometry

ITERATIONS = (30, 15)  # of the other direction, coarser levels and the last
_VOXELS = 1_000_000
_SHOWN = 0.06  # standard deviation, of the image's range, in a window that shows something
_WINDOW = 5
FAR = 2.0  # voxels of the map's grid
SUSPECT = 0.2  # share of what shows something that is so far off: then the whole is in doubt
_REGION = 2.5  # voxels in the mean of a neighbourhood, of a region that is named
_LEAST_REGION = 0.01  # of what shows something
_NAMED = 3


@dataclass(frozen=True)
class Map:
    """mm: (1, 1, *grid), NaN where an image shows nothing. voxel: mm, the largest side of the grid's voxels."""

    mm: Tensor
    spacing: tuple[float, ...]

    @property
    def voxel(self) -> float:
        return max(s for s, n in zip(self.spacing, self.mm.shape[2:], strict=True) if n > 1)

    @property
    def seen(self) -> Tensor:
        return ~self.mm.isnan()

    @property
    def far(self) -> float:
        """Share of what is seen that is further off than FAR."""
        seen = self.mm[self.seen]
        return float((seen > FAR * self.voxel).double().mean()) if len(seen) else 0.0

    def on(self, shape: Sequence[int]) -> np.ndarray | None:
        """On a finer grid, *shape; None: nothing is seen."""
        if not self.seen.any():
            return None
        mode = "trilinear" if len(shape) == 3 else "bilinear"
        values, seen = (
            F.interpolate(x, size=tuple(shape), mode=mode, align_corners=True)
            for x in (self.mm.nan_to_num(0.0), self.seen.float())
        )
        return (values / seen).masked_fill(seen < 0.5, math.nan)[0, 0].numpy()

    def regions(self, grid: Geometry) -> list[dict[str, Any]]:
        """The largest that are far off in the mean of their surroundings; grid: of the fixed image."""
        weight = ops.smooth(self.seen.float(), 1.0)
        mean = ops.smooth(self.mm.nan_to_num(0.0), 1.0) / weight.clamp(min=1e-3)
        labels = _parts((mean > _REGION * self.voxel) & self.seen)
        found = []
        step = [(f - 1) / max(n - 1, 1) for f, n in zip(grid.shape, labels.shape[2:], strict=True)]
        for label, count in zip(*(x.tolist() for x in labels.unique(return_counts=True)), strict=True):
            if label == 0 or count < _LEAST_REGION * int(self.seen.sum()):
                continue
            here = labels == label
            worst = np.unravel_index(int(mean.masked_fill(~here, 0.0).argmax()), labels.shape[2:])
            index = np.array(worst) * step
            place = grid.to_physical(index)
            found.append(
                {
                    "worst_lps_mm": (place if grid.plane is None else grid.plane.points(place)).tolist(),
                    "worst_voxels_zyx": index.tolist(),
                    "size_mm": float(count * math.prod(self.spacing)) ** (1 / grid.nd),
                    "mean_mm": float(self.mm[here].mean()),
                }
            )
        return sorted(found, key=lambda region: -region["size_mm"])[:_NAMED]

    def plain(self, grid: Geometry) -> dict[str, Any]:
        """For a report."""
        seen = self.mm[self.seen].double()
        seen = seen[:: max(1, seen.numel() // 1_000_000)]
        names = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
        of = {k: float(seen.quantile(q)) if len(seen) else math.nan for k, q in names.items()}
        far = {"far_mm": FAR * self.voxel, "far": self.far}
        return {
            **of,
            "max": float(seen.max()) if len(seen) else math.nan,
            **far,
            "regions": self.regions(grid),
        }

    def lines(self, plain: dict[str, Any]) -> list[str]:
        """What is suspect in what `plain` returned, where it is."""
        if plain["far"] <= SUSPECT:
            return []
        return [
            f"there and back is more than {plain['far_mm']:.3g} mm off in {100 * plain['far']:.0f} % of what the images show: the motion that "
            "was found may be wrong there (the last column of picture.png)"
        ]


def text(plain: Mapping[str, Any]) -> str:
    """For the console."""
    lines = [
        "back again  {median:.2f} mm off in the median, {p95:.2f} mm at the 95th percentile".format(**plain)
    ]
    for region in plain["regions"]:
        place = ", ".join(f"{x:.0f}" for x in region["worst_lps_mm"])
        voxel = ", ".join(f"{x:.0f}" for x in region["worst_voxels_zyx"])
        lines.append(
            f"doubtful    {region['mean_mm']:.1f} mm off around ({place}) mm, voxel [{voxel}], {region['size_mm']:.0f} mm wide"
        )
    return "\n".join(lines)


def measure(
    fixed: Tensor,
    moving: Tensor,
    u: Tensor,
    spacing: Sequence[float],
    similarity: str,
    mask: Tensor | None = None,
    moving_mask: Tensor | None = None,
    search_range: float | None = None,
    *,
    thorough: bool = False,
    **led: Any,
) -> Map:
    """Of u (1, nd, *spatial), voxels, that registers moving to fixed, (1, C, *spatial), on one device. mask, moving_mask: their weights;
    search_range: of `register`, which large motion wants for the way back too. thorough: with all iterations, at most a million voxels
    whatever the level. led: what else `register` was led by: channel_weights, affine, landmarks, labels and their weights.
    """
    from .registration import _pyramid, register

    full = tuple(fixed.shape[2:])
    shapes = _pyramid(full, spacing, None)
    some = shapes if thorough else shapes[:-1]
    shape = ([s for s in some if math.prod(s) <= _VOXELS] or shapes[:1])[-1]
    size = _descent.spacing_of(shape, full, tuple(spacing))
    masks = [None if m is None else _descent.resized(m.float(), shape) for m in (mask, moving_mask)]
    # both move: what a mask hides is not to reach what is beside it
    scaled = (_descent.rescaled(image, m) for image, m in ((fixed, mask), (moving, moving_mask)))
    known = (
        image if m is None else _descent.filled(image, m > 0)
        for image, m in zip(scaled, (mask, moving_mask), strict=True)
    )
    a, b = (_descent.resized(image, shape) for image in known)
    options: dict[str, Any] = {"similarity": similarity, "spacing": size, "search_range": search_range}
    options |= _back(led, full, shape)
    if not thorough:
        options["iterations"] = ITERATIONS
    back = register(b, a, mask=masks[1], moving_mask=masks[0], **options).displacement
    with torch.no_grad():
        u = ops.resize_displacement(u, shape)
        mm = torch.tensor(size, dtype=u.dtype, device=u.device).reshape(1, -1, *[1] * len(shape))
        off = (ops.compose(back, u) * mm).norm(dim=1, keepdim=True)
        seen = _shown(a) & _shown(ops.warp(b, u, padding="border"))
        inside = ops.warp(torch.ones_like(a[:, :1]), u, padding="zeros") > 0.5
        seen &= inside
        if masks[0] is not None:
            seen &= masks[0] > 0.5
        if masks[1] is not None:
            seen &= ops.warp(masks[1], u, padding="border") > 0.5
    return Map(off.masked_fill(~seen, math.nan).cpu(), size)


def _back(led: Mapping[str, Any], full: tuple[int, ...], shape: tuple[int, ...]) -> dict[str, Any]:
    """What led the way there for the way back, on the grid of `shape`; what does not reach that is left out."""
    found = dict(led)
    if "landmarks" in led:
        fixed, moving = led["landmarks"]
        last = moving.new_tensor(full) - 1
        inside = ((moving >= -0.5) & (moving <= last + 0.5)).all(1)
        ratio = (last.new_tensor(shape) - 1) / last.clamp(min=1)
        found["landmarks"] = tuple(p[inside] * ratio for p in (moving, fixed))
        if not inside.any():
            found = {k: v for k, v in found.items() if not k.startswith("landmark")}
    if "labels" in led:
        maps = list(reversed(led["labels"]))
        for axis, (f, n) in enumerate(zip(full, shape, strict=True)):
            at = torch.linspace(0, f - 1, n, device=maps[0].device).round().long()
            maps = [one.index_select(2 + axis, at) for one in maps]
        found["labels"] = tuple(maps)
        if not set.intersection(*({*one.unique().tolist()} - {0} for one in maps)):
            found = {k: v for k, v in found.items() if not k.startswith("label")}
    return found


def _shown(image: Tensor) -> Tensor:
    """(1, 1, *shape), bool: where any channel differs enough nearby."""
    pool = F.avg_pool3d if image.ndim == 5 else F.avg_pool2d
    window = [min(_WINDOW, n - 1 + n % 2) for n in image.shape[2:]]
    pad = [w // 2 for w in window]
    image = image - 0.5
    mean, square = (pool(x, window, 1, pad, count_include_pad=False) for x in (image, image * image))
    return (square - mean * mean > _SHOWN**2).any(1, keepdim=True)


def _parts(mask: Tensor) -> Tensor:
    """Connected parts of a mask (1, 1, *shape), neighbours by corner included: a number each, 0 elsewhere."""
    pool = F.max_pool3d if mask.ndim == 5 else F.max_pool2d
    label = torch.arange(1, mask.numel() + 1, dtype=torch.float64).reshape(mask.shape) * mask
    while True:
        grown = pool(label, 3, 1, 1) * mask
        if torch.equal(grown, label):
            return label.long()
        label = grown
