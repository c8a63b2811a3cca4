"""Launchers of lcc_loss: options, tables of window weights, and which of two sets of kernels runs."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fastreg.kernels.launch import arithmetic_of
from fastreg.kernels.lcc_march import MOST_RADIUS, march
from fastreg.kernels.lcc_separable import separable
from fastreg.kernels.lcc_terms import TAU
from fastreg.ops.lcc_loss import _taps


@dataclass
class Windows:
    """Weights of windows over a volume of a given size, on the device; per axis z, y, x."""

    radius: list  # taps reach that far inside the image
    taps: list  # (radius + 1,): weight of the samples so many voxels from the centre
    edges: list  # (2, size): weight of a window's samples inside and outside the image
    rule: (
        torch.Tensor
    )  # smooth_nr, smooth_dr, n below which a window counts as empty, whole weight along y, along x


@functools.cache
def _windows(*args):
    """Some KB, kept for good: a CUDA graph that captured a call reads them at each replay (its first call comes before)."""
    with torch.device("cpu"):
        return _make_windows(*args)


def _make_windows(window, kernel, sigma, size, nr, dr, whole, dtype, device):
    radius, taps, edges, total, peak = [], [], [], [], 1.0
    for n, present in size:
        if not present or kernel == "box":
            side = torch.ones(
                min(window // 2, max(n, MOST_RADIUS)) + 1 if present else 1, dtype=torch.float64
            )
            beyond = window // 2 + 1 - len(side) if present else 0
        else:
            side = _taps(window, kernel, sigma)
            side, beyond = side[len(side) // 2 :], 0
        # tail[i]: all samples of one side from the i-th on, a sum of positive terms.
        tail = torch.cat([side.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)]) + beyond
        at = torch.arange(n)
        outside = tail[(at + 1).clamp_max(len(side))] + tail[(n - at).clamp_max(len(side))]
        total.append(float(side[0] + 2 * tail[1]))
        # The march unrolls whole windows.
        radius.append(len(side) - 1 if whole else min(len(side), n) - 1)
        taps.append(side[: radius[-1] + 1].to(device, dtype))
        edges.append(torch.stack([total[-1] - outside, outside]).to(device, dtype))
        peak *= float(side[0])
    rule = torch.tensor([nr, dr, 2 * peak, total[1], total[2]], dtype=torch.float64)
    return Windows(radius, taps, edges, rule.to(device, dtype))


@dataclass
class Problem:
    """Images as (n c, D, H, W) volumes (2D: D is their y axis and H = 1, so that slabs bound the memory there, too)."""

    fixed: torch.Tensor
    moved: torch.Tensor
    mask: torch.Tensor | None  # (n, 1, D, H, W), arithmetic dtype
    upstream: torch.Tensor | None  # what the map is multiplied by, in place of the mask
    n: int
    c: int
    size: tuple
    windows: Windows
    solve: Callable  # march or separable
    options: dict  # constants of the kernels
    map: torch.Tensor | None = None  # -LCC / c
    wanted: dict = field(default_factory=dict)  # 0 (fixed), 1 (moved): gradient


def _problem(fixed, moved, mask, upstream, options, need, want_map=False, dtype=None):
    window, kernel, sigma, squared, padding, nr, dr, denominator = options
    spatial = fixed.shape[2:]
    size = tuple(spatial) if len(spatial) == 3 else (spatial[0], 1, spatial[1])
    present = (True, len(spatial) == 3, True)
    arithmetic = arithmetic_of(fixed)

    def per_voxel(t):
        return None if t is None else t.to(arithmetic).contiguous()

    marches = arithmetic == torch.float32 and window // 2 <= MOST_RADIUS
    sums = torch.float32 if marches else torch.float64
    p = Problem(
        fixed.contiguous(), moved.contiguous(), per_voxel(mask), per_voxel(upstream), *fixed.shape[:2], size,
        _windows(
            window, kernel, sigma, tuple(zip(size, present, strict=True)), nr, dr, marches, sums, fixed.device,
        ),
        march if marches else separable,
        dict(
            TAU=TAU[sums], VALID=padding == "valid", SQUARED=squared, DENOMINATOR=denominator, HAS_UPSTREAM=upstream is not None,
            WANT_MAP=want_map, WANT_FIXED=need[0], WANT_MOVED=need[1],
        ),
    )  # fmt: skip
    if want_map:
        p.map = fixed.new_empty(fixed.shape, dtype=arithmetic)
    p.wanted = {i: fixed.new_empty(fixed.shape, dtype=dtype or arithmetic) for i in (0, 1) if need[i]}
    return p


def _gradients(p, like):
    return tuple(p.wanted[i] if i in p.wanted else like.new_empty(0) for i in (0, 1))


def lcc_loss(fixed, moved, mask, *options_and_needs):
    *options, need_fixed, need_moved = options_and_needs
    like = fixed.new_zeros(fixed.shape[0], dtype=arithmetic_of(fixed))
    if fixed.numel() == 0:
        return like, *(like.new_empty(fixed.shape if need else 0) for need in (need_fixed, need_moved))
    p = _problem(fixed, moved, mask, None, options, (need_fixed, need_moved))
    return p.solve(p).to(like.dtype), *_gradients(p, like)


def lcc_map(fixed, moved, mask, *options):
    if fixed.numel() == 0:
        # The average over no channels is NaN.
        return fixed.new_full((fixed.shape[0], 1, *fixed.shape[2:]), float("nan"), dtype=arithmetic_of(fixed))
    p = _problem(fixed, moved, mask, None, options, (False, False), want_map=True)
    p.solve(p)
    return p.map if p.c == 1 else p.map.sum(1, keepdim=True)


def lcc_map_bwd(grad, fixed, moved, mask, *options_and_needs):
    *options, need_fixed, need_moved = options_and_needs
    if fixed.numel() == 0:
        return tuple(fixed.new_empty(fixed.shape if need else 0) for need in (need_fixed, need_moved))
    p = _problem(fixed, moved, mask, grad, options, (need_fixed, need_moved), dtype=fixed.dtype)
    p.solve(p)
    return _gradients(p, fixed)
