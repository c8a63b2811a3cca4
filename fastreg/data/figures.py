"""Textured geometric figures, 2D, with a known motion (the simulation of PRDFE, Zhou et al. 2020): nothing but numpy and torch.

The paper says: ten types of geometric figures with textures, 128 x 128, intensities in [0, 1], affine and nonlinear fields made with
SyN, small, medium and large. It leaves open which figures and textures, how many to an image, what lies between them, and how large
the fields are. Here an image is a heap of figures on a faint texture, so that the motion is visible nearly everywhere, and fades to
zero at its border, so that a warp finds the same outside of it whatever its padding. The motion is affine plus a random cubic B-spline,
without folding. Sizes span what the paper's numbers suggest: its VoxelMorph, which hardly registers, has a field MSE of 132.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .. import ops

__all__ = ["DEFORMATIONS", "KINDS", "Figures", "figures"]

# Root mean square of the displacement's length, in voxels of a 128 x 128 image.
DEFORMATIONS = {"small": 5.0, "medium": 10.0, "large": 16.0}
KINDS = ("disc", "ellipse", "ring", "triangle", "square", "pentagon", "star", "cross", "crescent", "flower")
_MARGIN = 8.0
_SHRINK = 0.8
_LEAST_DETERMINANT = 0.2


@dataclass
class Figures:
    """Two images and the truth between them: fixed = warp(moving, displacement), exactly.

    fixed, moving (Tensor): (1, 1, H, W) fp32 in [0, 1]. displacement (Tensor): (1, 2, H, W) fp32, voxels, (y, x).
    fixed_labels, moving_labels (Tensor): (1, 1, H, W) uint8, 1 + index into KINDS, 0 between figures.
    """

    fixed: torch.Tensor
    moving: torch.Tensor
    displacement: torch.Tensor
    fixed_labels: torch.Tensor
    moving_labels: torch.Tensor


def _depth(kind, y, x):
    """Of points in a figure of radius 1, positive inside; its slope at the edge is about 1."""
    r, angle = np.hypot(y, x), np.arctan2(y, x)
    if kind == "disc":
        return 1.0 - r
    if kind == "ellipse":
        return 0.55 * (1.0 - np.hypot(y / 0.55, x))
    if kind == "ring":
        return 0.25 - np.abs(r - 0.75)
    if kind == "cross":
        a, b = np.abs(y), np.abs(x)
        return np.minimum(1.0 - np.maximum(a, b), 0.33 - np.minimum(a, b))
    if kind == "crescent":
        return np.minimum(1.0 - r, np.hypot(y, x - 0.55) - 0.75)
    if kind == "star":
        return 0.7 * (0.72 + 0.28 * (2 / np.pi) * np.arcsin(np.cos(5 * angle)) - r)
    if kind == "flower":
        return 0.8 * (0.78 + 0.22 * np.cos(6 * angle) - r)
    corners = {"triangle": 3, "square": 4, "pentagon": 5}[kind]
    half = np.pi / corners
    return np.cos(half) - r * np.cos(np.mod(angle, 2 * half) - half)


def _texture(rng, y, x, scale):
    """In [-1, 1]: stripes, checks or waves of a few directions, 7 to 22 voxels long."""
    kind = rng.integers(3)
    count = (1, 2, 4)[kind]
    direction = (
        rng.uniform(0, np.pi) + np.arange(count) * np.pi / count + rng.normal(0, 0.3, count) * (count > 2)
    )
    k = 2 * np.pi / (scale * rng.uniform(7, 22, 1 if count < 3 else count)) * np.ones(count)
    phase = rng.uniform(0, 2 * np.pi, count)
    waves = np.cos(
        (k * np.sin(direction))[:, None, None] * y
        + (k * np.cos(direction))[:, None, None] * x
        + phase[:, None, None]
    )
    return waves.prod(0) if count == 2 else waves.sum(0) / count


def _image(rng, size):
    """Moving image and labels."""
    scale = size / 128
    y, x = np.mgrid[:size, :size].astype(np.float32)
    image = 0.16 + 0.1 * _texture(rng, y, x, scale * 2)
    labels = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(6, 11)):
        kind = rng.integers(len(KINDS))
        cy, cx = rng.uniform(0.12, 0.88, 2) * size
        radius = rng.uniform(13, 30) * scale
        c, s = np.cos(turn := rng.uniform(0, 2 * np.pi)), np.sin(turn)
        dy, dx = (y - cy) / radius, (x - cx) / radius
        depth = radius * _depth(KINDS[kind], c * dy - s * dx, s * dy + c * dx)
        inside = np.clip(depth + 0.5, 0, 1)
        level, contrast = rng.uniform(0.35, 0.75), rng.uniform(0.1, 0.25)
        image = image + (level + contrast * _texture(rng, y, x, scale) - image) * inside
        labels[inside > 0.5] = kind + 1
    edge = np.minimum(np.minimum(y, size - 1 - y), np.minimum(x, size - 1 - x)) / (_MARGIN * scale)
    fade = np.clip(edge, 0, 1)
    return image * fade * fade * (3 - 2 * fade), labels


def _affine(rng, size):
    """Displacement of a random affine motion about the centre, of RMS length 1."""
    a = np.deg2rad(rng.normal(0, 12))
    turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    matrix = turn @ (np.eye(2) + rng.normal(0, 0.08, (2, 2))) - np.eye(2)
    p = np.mgrid[:size, :size] - (size - 1) / 2
    u = np.tensordot(matrix, p, 1) + rng.normal(0, 0.05 * size, 2)[:, None, None]
    return u / np.sqrt((u**2).sum(0).mean())


def _smooth(rng, size):
    """Cubic B-spline of normal coefficients, a fifth to a third of the image apart, of RMS length 1."""
    spacing = round(size * rng.uniform(0.2, 0.32))
    control = -(-size // spacing) + 3
    u = ops.bspline_displacement(
        torch.from_numpy(rng.normal(size=(1, 2, control, control))), spacing, (size, size)
    )
    u = u[0].numpy()
    return u / np.sqrt((u**2).sum(0).mean())


def figures(seed=0, *, size=128, deformation="medium"):
    """A pair of images of textured figures; the same arguments give the same pair.

    Args: seed (int or sequence of ints). size (int): voxels along y and x, at least 32. deformation (str or number): "small",
    "medium", "large" (DEFORMATIONS) or the root mean square of the displacement's length in voxels of a 128 x 128 image;
    it grows with the size, as figures do.
    Returns: Figures.
    Raises: ValueError."""
    if isinstance(deformation, str):
        if deformation not in DEFORMATIONS:
            raise ValueError(
                f"fastreg::figures: deformation must be one of {tuple(DEFORMATIONS)} or a number, got {deformation!r}"
            )
        deformation = DEFORMATIONS[deformation]
    if not 0 <= deformation <= 32:
        raise ValueError(f"fastreg::figures: deformation must be in [0, 32], got {deformation}")
    if size < 32:
        raise ValueError(f"fastreg::figures: size must be at least 32, got {size}")
    rng = np.random.default_rng(seed)
    image, labels = _image(rng, size)
    affine, smooth = _affine(rng, size), _smooth(rng, size)
    share, length = rng.uniform(0.4, 0.7), deformation * size / 128
    while True:
        # Less of the nonlinear part until nothing folds; an affine part alone does not, at these lengths.
        u = affine * (1 - share) + smooth * share
        u = torch.from_numpy(u * length / np.sqrt((u**2).sum(0).mean()))[None]
        if share < 0.05 or float(ops.jacobian_determinant(u).min()) >= _LEAST_DETERMINANT:
            break
        share *= _SHRINK
    displacement = u.float()
    moving = torch.from_numpy(image.astype(np.float32))[None, None]
    moving_labels = torch.from_numpy(labels)[None, None]
    return Figures(
        fixed=ops.warp(moving, displacement),
        moving=moving,
        displacement=displacement,
        fixed_labels=ops.warp(moving_labels.float(), displacement, mode="nearest").to(torch.uint8),
        moving_labels=moving_labels,
    )
