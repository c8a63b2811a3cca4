"""An image on another grid."""

import math

import numpy as np
import torch

from ._geometry import Geometry

SLAB = 1 << 20  # voxels


def resample(
    image: torch.Tensor,
    geometry: Geometry,
    onto: Geometry,
    u: torch.Tensor | None = None,
    *,
    mode: str = "linear",
    outside: float | None = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Interpolates an image once on another grid: out(p) = image at the physical point of p + u(p).

    Args:
        image (Tensor): (1, C, *geometry.shape). geometry, onto (Geometry): its grid, and that of the result.
        u (Tensor): (1, nd, *onto.shape), in voxels of onto; None: zero. mode: "linear" or "nearest".
        outside (float): the value where that point is not inside the image; None: the nearest value inside.
            As in ITK the image reaches half a voxel beyond its outermost voxel centres, with their value.
    Returns:
        (Tensor, Tensor): the image (1, C, *onto.shape), dtype of image; bool (1, 1, *onto.shape): inside.
    """
    nd, shape = onto.nd, onto.shape
    # index_moving = m (p + u) + t
    inverse = np.linalg.inv(geometry.matrix)
    m = torch.from_numpy(inverse @ onto.matrix)
    t = torch.from_numpy(inverse @ (np.asarray(onto.origin) - np.asarray(geometry.origin)))
    if geometry == onto:
        m = torch.eye(nd, dtype=torch.float64)  # what the inverse gives, without its rounding
    upper = torch.tensor(geometry.shape, dtype=torch.float64).view(-1, *[1] * nd) - 0.5
    out = image.new_empty((1, image.shape[1], *shape))
    inside = torch.empty((1, 1, *shape), dtype=torch.bool)
    # Slabs along the first axis: a whole grid of fp64 positions would outweigh everything else.
    step = max(1, SLAB // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        axes = [torch.arange(start, stop), *(torch.arange(n) for n in shape[1:])]
        p = torch.stack(torch.meshgrid(*axes, indexing="ij")).double()
        target = p if u is None else p + u[0, :, start:stop].cpu().double()
        target = torch.einsum("ij,j...->i...", m, target) + t.view(-1, *[1] * nd)
        # A thousandth of a millionth of a voxel forgives the rounding of grids that share a face.
        reach = 0.5 + 1e-9
        kept = ((target >= -reach) & (target <= upper + 1e-9)).all(0)
        p[0] -= start
        slab = torch.ops.fastreg.warp(image, (target - p)[None], None, mode, "border")
        if outside is not None:
            slab = torch.where(kept, slab, torch.as_tensor(outside, dtype=image.dtype))
        out[:, :, start:stop] = slab
        inside[0, 0, start:stop] = kept
    return out, inside
