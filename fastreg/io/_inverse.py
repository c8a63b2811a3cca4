"""The inverse of a displacement field, on any grid."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from fastreg._inverse import Inverse
from fastreg.metrics import folding

from ._geometry import Geometry
from ._resample import resample

SLABS, LEAST = 8, 1 << 21  # at most so many slabs, each of at least so many voxels


@dataclass(frozen=True)
class Residual:
    """How far what the inverse sends back lands from where it began; where that lies inside of the field.

    Attributes:
        mean_voxels, max_voxels (float): voxels of the inverse's grid. mean_mm, max_mm (float): the same in mm.
        folded (float): share of the field's voxels at which it folds: there it has no inverse.
        outside (float): share of the inverse's voxels that come from outside of the field, which says nothing of them.
    """

    mean_voxels: float
    max_voxels: float
    mean_mm: float
    max_mm: float
    folded: float
    outside: float


def invert(
    u: torch.Tensor, geometry: Geometry, onto: Geometry | None = None
) -> tuple[torch.Tensor, Residual]:
    """Inverts a displacement field: u sends the fixed image's points to the moving one's, the result sends them back.

    Args:
        u (Tensor): (1, nd, *geometry.shape), in voxels of geometry, finite. geometry (Geometry): its grid, of the fixed image.
        onto (Geometry): the grid of the inverse, of the moving image; None: geometry.
    Returns:
        (Tensor, Residual): v (1, nd, *onto.shape) fp32, in voxels of onto, on the CPU; how good it is. What comes from
        outside of the field comes by its nearest affine map and the border of what is beside it.
    """
    onto = onto or geometry
    u = u.detach().cpu().float()
    inverse, nd = Inverse(u), geometry.nd
    v = torch.empty((1, nd, *onto.shape))
    to_voxels = torch.from_numpy(np.linalg.inv(onto.matrix) @ geometry.matrix).float()
    last = np.asarray(geometry.shape) - 1
    loose = np.where(last == 0, 0.5, 0)  # a slice is as thick as it is
    sums, most, count = np.zeros(2), np.zeros(2), 0
    step = max(LEAST // max(1, math.prod(onto.shape[1:])), -(-onto.shape[0] // SLABS), 1)
    for start in range(0, onto.shape[0], step):
        part = onto.slab(start, min(start + step, onto.shape[0]))
        index = np.stack(np.meshgrid(*map(np.arange, part.shape), indexing="ij"), -1)
        points = geometry.to_index(part.to_physical(index))
        found = inverse(torch.from_numpy(points).movedim(-1, 0)[None].float())[0]
        there = v[:, :, start : start + part.shape[0]]
        there[0] = torch.einsum("ij,j...->i...", to_voxels, found)
        # What v leaves, as it is written and as others read u. Beyond its border u is anyone's guess.
        back, _ = resample(u, geometry, part, there, outside=None)
        came_from = points + found.double().movedim(0, -1).numpy()
        kept = np.all((came_from >= -loose) & (came_from <= last + loose), axis=-1)
        mm = (back[0].double().movedim(0, -1).numpy() @ geometry.matrix.T)[kept]
        mm += there[0].double().movedim(0, -1).numpy()[kept] @ onto.matrix.T
        lengths = np.stack([np.linalg.norm(d, axis=-1) for d in (mm @ np.linalg.inv(onto.matrix).T, mm)])
        sums, count = sums + lengths.sum(1), count + int(kept.sum())
        most = np.maximum(most, lengths.max(1, initial=0))
    mean, most = (sums / count, most) if count else (sums * math.nan, most * math.nan)
    outside = 1 - count / math.prod(onto.shape)
    return v, Residual(float(mean[0]), float(most[0]), float(mean[1]), float(most[1]), folding(u), outside)


def invert_points(points: ArrayLike, u: torch.Tensor, geometry: Geometry) -> np.ndarray:
    """Where points come from: u sends the points returned to these. By Newton's method at each, not by a field between voxels.

    Args:
        points (array): (P, nd) mm (x, y, z), LPS, of the moving image.
        u (Tensor): (1, nd, *geometry.shape), in voxels of geometry. geometry (Geometry): its grid, of the fixed image.
    Returns:
        ndarray: (P, nd) mm (x, y, z), LPS, in the fixed image.
    """
    index = torch.from_numpy(geometry.to_index(points)).double()
    nd = geometry.nd
    as_field = index.T.reshape(1, nd, *[1] * (nd - 1), -1)
    found = index + Inverse(u.detach().cpu())(as_field)[0].reshape(nd, -1).T
    return geometry.to_physical(found.numpy())
