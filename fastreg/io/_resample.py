"""An image on another grid."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, library

from ._geometry import Geometry

SLAB = 1 << 20  # voxels
# Beside the ops of `fastreg`, which all have gradients and answer on GPUs: this one is for files, and has neither.
_lib = library.Library("fastreg_io", "DEF")


def resample(
    image: Tensor,
    geometry: Geometry,
    onto: Geometry,
    u: Tensor | None = None,
    *,
    u_geometry: Geometry | None = None,
    mode: str = "linear",
    outside: float | None = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Interpolates an image once on another grid: out(p) = image at the physical point of p + u(p).

    Args:
        image (Tensor): (1, C, *geometry.shape), any real dtype. geometry, onto (Geometry): its grid, and that of the result.
        u (Tensor): (1, nd, *u_geometry.shape), in voxels of u_geometry, NaN: outside; None: zero. u_geometry (Geometry): None: onto. Of
            another grid u is interpolated, and is 0 beyond it, as in ITK's DisplacementFieldTransform.
        mode: "linear" or "nearest" (between two voxels the upper one, as in ITK).
        outside (float): the value where that point is not inside the image; None: the nearest value inside.
            As in ITK the image reaches half a voxel beyond its outermost voxel centres, with their value.
        dtype (torch.dtype): of the result; None: of image. Integers are rounded (ITK cuts), and clamped to what the dtype holds.
    Returns:
        (Tensor, Tensor): the image (1, C, *onto.shape); bool (1, 1, *onto.shape): inside. On the CPU.
    """
    u_geometry = u_geometry or onto
    image, dtype = image.detach().cpu(), dtype or image.dtype
    u = None if u is None else u.detach().cpu()
    if u is None or u_geometry == onto:
        position = _position(geometry, onto, u_geometry)
        return torch.ops.fastreg_io.resample(image, u, position, onto.shape, mode, outside, dtype, True)
    out = torch.empty((1, image.shape[1], *onto.shape), dtype=dtype)
    inside = torch.empty((1, 1, *onto.shape), dtype=torch.bool)
    # Slabs along the first axis: what they need of u comes and goes.
    step = max(1, SLAB // math.prod(onto.shape[1:]))
    for start in range(0, onto.shape[0], step):
        slab = slice(start, min(start + step, onto.shape[0]))
        part = onto.slab(slab.start, slab.stop)
        vectors, _ = resample(u, u_geometry, part)
        out[:, :, slab], inside[:, :, slab] = torch.ops.fastreg_io.resample(
            image, vectors, _position(geometry, part, u_geometry), part.shape, mode, outside, dtype, True
        )
    return out, inside


def _position(geometry: Geometry, onto: Geometry, u_geometry: Geometry) -> Tensor:
    """(nd, 2 nd + 1), fp64: [p, u, 1], voxels of onto and of u_geometry, to voxels of geometry."""
    inverse = np.linalg.inv(geometry.matrix)
    # What the inverse gives, without its rounding, where grids are the same.
    eye = np.eye(onto.nd)
    of_p, of_u = (eye if g == geometry else inverse @ g.matrix for g in (onto, u_geometry))
    t = inverse @ (np.asarray(onto.origin) - np.asarray(geometry.origin))
    return torch.from_numpy(np.concatenate([of_p, of_u, t[:, None]], 1))


def resample_ref(
    image: Tensor,
    displacement: Tensor | None,
    position: Tensor,
    shape: Sequence[int],
    mode: str,
    outside: float | None,
    dtype: torch.dtype,
    need_inside: bool,
) -> tuple[Tensor, Tensor]:
    """index = position @ [p, u(p), 1], clamped to the image where its border goes on; slab by slab, in fp64."""
    nd, size = len(shape), torch.tensor(image.shape[2:])
    out = torch.empty((1, image.shape[1], *shape), dtype=dtype)
    inside = torch.empty((1, 1, *shape), dtype=torch.bool)
    last = (size - 1).double().view(-1, *[1] * nd)
    steps = torch.tensor([math.prod(image.shape[k + 3 :]) for k in range(nd)]).view(-1, *[1] * nd)
    flat = image.flatten(2)[0]
    slab = max(1, SLAB // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], slab):
        stop = min(start + slab, shape[0])
        axes = [torch.arange(start, stop), *(torch.arange(n) for n in shape[1:])]
        p = torch.stack(torch.meshgrid(*axes, indexing="ij")).double()
        index = torch.einsum("ij,j...->i...", position[:, :nd], p) + position[:, -1].view(-1, *[1] * nd)
        if displacement is not None:
            u = displacement[0, :, start:stop].double()
            index += torch.einsum("ij,j...->i...", position[:, nd : 2 * nd], u)
        # A thousandth of a millionth of a voxel forgives the rounding of grids that share a face.
        kept = ((index >= -0.5 - 1e-9) & (index <= last + 0.5 + 1e-9)).all(0)
        index = torch.minimum(index.clamp_min(0), last)
        if mode == "nearest":
            at = ((index.nan_to_num() + 0.5).floor().long() * steps).sum(0)
            value = _converted(_taken(flat, at), dtype)
        else:
            whole = torch.minimum(index.nan_to_num().floor(), (last - 1).clamp_min(0))
            fraction = index - whole
            value = torch.zeros(image.shape[1], *p.shape[1:], dtype=torch.float64)
            for corner in range(2**nd):
                upper = torch.tensor([corner >> k & 1 for k in range(nd)]).view(-1, *[1] * nd)
                weight = torch.where(upper == 1, fraction, 1 - fraction).prod(0)
                at = (torch.minimum(whole + upper, last).long() * steps).sum(0)
                # What carries no weight is not read: a NaN reaches those alone that touch it.
                value += torch.where(weight == 0, 0, weight * _taken(flat, at).double())
            value = _converted(value, dtype)
        if outside is not None:
            beyond = _converted(torch.tensor(outside, dtype=torch.float64), dtype)
            value = torch.from_numpy(np.where(kept.numpy(), value.numpy(), beyond.numpy()))
        out[0, :, start:stop] = value
        inside[0, 0, start:stop] = kept
    return out, inside if need_inside else inside.new_empty(0)


def _taken(flat: Tensor, at: Tensor) -> Tensor:
    """(C, n)[:, at]; torch takes no unsigned integers."""
    return torch.from_numpy(np.take(flat.numpy(), at.numpy(), axis=1))


def _converted(value: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point or value.dtype == dtype:
        return value.to(dtype)
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    array = np.nan_to_num(np.rint(value.numpy().astype(np.float64)), nan=least)
    # 2^63 is the number that follows the most that int64 holds.
    over, under = array >= most, array <= least
    array = np.where(over | under, 0, array).astype(torch.empty(0, dtype=dtype).numpy().dtype)
    array[over], array[under] = most, least
    return torch.from_numpy(array)


_lib.define(
    "resample(Tensor image, Tensor? displacement, Tensor position, SymInt[] shape, str mode, float? outside, ScalarType dtype, "
    "bool need_inside) -> (Tensor, Tensor)"
)
_lib.impl("resample", resample_ref, "CompositeExplicitAutograd")
