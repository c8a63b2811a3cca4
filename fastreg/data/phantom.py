"""Breathing thorax with a known motion, built from formulas: no download, nothing but numpy and torch.

Axes are (z, y, x), z towards the head, y towards the back. Fixed is end-exhale, moving end-inhale.
The thoracic cavity is a stack of superellipses of half-axes r(z) (a_y, a_x); with q = (y - y0, x - x0) / r(z)

    z -> z + s(z, q),    q -> q,    so (y, x) -> centre + q r(z + s):

along the wall and never through it, while ribs, spine and muscle stay. The displacement is discontinuous at
the chest wall (by up to 30 mm), which is what smooth registration finds hard. Both images are rendered from
the same anatomy at its two places, neither by interpolating the other; noise and lung density differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .. import metrics

__all__ = ["GOALS", "Phantom", "failures", "score", "thorax"]

EXTENT = (280.0, 224.0, 320.0)  # mm
GOALS = {"tre_before": 8.0, "tre_after": 1.5, "tre_wall": 3.0, "folding": 1e-3, "seconds": 60.0}
WALL_MM = 10.0

_CENTRE = np.array([112.0, 160.0])
_HALF = np.array([78.0, 118.0])
_POWER = 2.4
_TOP, _SHOULDER, _DIAPHRAGM = 264.0, 118.0, 84.0
_AMPLITUDE = 26.0


@dataclass
class Phantom:
    """Two images of one thorax and the truth between them. Points are voxels (z, y, x), as floats.

    fixed, moving (Tensor): (1, 1, D, H, W) fp32, CT numbers. spacing (tuple): mm, (z, y, x).
    fixed_labels, moving_labels (Tensor): (1, 1, D, H, W) uint8; 1 the lung of low x, 2 the other, else 0.
    displacement (Tensor): (1, 3, D, H, W) fp32; fixed(p) shows what moving shows at p + displacement(p).
    fixed_landmarks, moving_landmarks (Tensor): (P, 3) fp64. near_wall (Tensor): (P,) bool, within 10 mm
    of where the lung slides.
    """

    fixed: torch.Tensor
    moving: torch.Tensor
    spacing: tuple
    fixed_labels: torch.Tensor
    moving_labels: torch.Tensor
    displacement: torch.Tensor
    fixed_landmarks: torch.Tensor
    moving_landmarks: torch.Tensor
    near_wall: torch.Tensor


def _radius(z):
    # (top - z) ** 0.6 near the apex, so that r(z + s) / r(z) stays bounded where both go to 0
    t = np.clip((z - _SHOULDER) / (_TOP - _SHOULDER), 0.0, 1.0)
    return np.maximum((1.0 - t**2.5) ** 0.6, 1e-3)


def _norm(qy, qx):
    return (np.abs(qy / _HALF[0]) ** _POWER + np.abs(qx / _HALF[1]) ** _POWER) ** (1.0 / _POWER)


def _dome(qy, qx):
    """Height of the diaphragm above the floor, mm, in the fixed image: a cupola under each lung."""
    side = np.exp(-(((np.abs(qx) - 58.0) / 42.0) ** 2) - ((qy + 8.0) / 60.0) ** 2)
    return _DIAPHRAGM - 22.0 + 34.0 * side


def _swing(qy, qx, amplitude):
    """How far the diaphragm goes down at each place, mm."""
    wave = 0.06 * np.sin(qx / 31.0) * np.cos(qy / 23.0)
    return amplitude * (1.0 + 0.22 * qy / _HALF[0] - 0.10 * qx / _HALF[1] + wave)


def _shift(z, dome, swing):
    """Motion s of the cavity along z, mm (negative: breathing in pulls down), and its slope ds/dz > -0.6."""
    above = np.clip((_TOP - z) / (_TOP - dome), 0.0, 1.0)
    root = np.sqrt(np.sqrt(above))
    lung = z >= dome
    # both branches are 1 at the diaphragm; the abdomen is squeezed to rest at the bottom of the image
    shift = -swing * np.where(lung, above * root, np.clip(z / dome, 0.0, 1.0))
    return shift, swing * np.where(lung, 1.25 * root / (_TOP - dome), -1.0 / dome)


def _q(z, y, x):
    r = _radius(z)
    return (y - _CENTRE[0]) / r, (x - _CENTRE[1]) / r


def _inside(z, qy, qx):
    return (_norm(qy, qx) < 1.0) & (z < _TOP)


def _move(points, amplitude):
    """Where cavity points (P, 3) in mm of the fixed image lie in the moving image."""
    z, y, x = points.T
    qy, qx = _q(z, y, x)
    z2 = z + _shift(z, _dome(qy, qx), _swing(qy, qx, amplitude))[0]
    r2 = _radius(z2)
    return np.stack([z2, _CENTRE[0] + qy * r2, _CENTRE[1] + qx * r2], 1)


def _soft(distance, width):
    return 1.0 / (1.0 + np.exp(np.clip(-4.0 * distance / width, -60.0, 60.0)))


def _lung_depth(z, qy, qx, dome=None):
    """Signed depth in a lung, mm, roughly: positive inside. z in the fixed image."""
    wall = (0.985 - _norm(qy, qx)) * 70.0 * _radius(z)
    floor = z - (_dome(qy, qx) if dome is None else dome)
    heart = 1.0 - np.sqrt(((z - 118.0) / 52.0) ** 2 + ((qy + 22.0) / 42.0) ** 2 + ((qx - 22.0) / 52.0) ** 2)
    middle = np.minimum(np.abs(qx) - 20.0, -45.0 * heart)
    return np.minimum(np.minimum(wall, floor), middle)


def _waves(rng, count, low, high):
    direction = rng.normal(size=(count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    vectors = direction * (2.0 * np.pi / rng.uniform(low, high, (count, 1)))
    return vectors, rng.uniform(0, 2 * np.pi, count)


def _texture(waves, z, y, x):
    vectors, phases = waves
    out = np.zeros(z.shape, np.float32)
    for k, phase in zip(vectors.astype(np.float32), phases.astype(np.float32), strict=True):
        out += np.cos(k[0] * z + k[1] * y + k[2] * x + phase)
    return out * np.sqrt(2.0 / len(phases)).astype(np.float32)


def _tree(rng, side, count):
    """A vessel tree in one lung: nodes (P, 3) mm in the fixed image, parent index (P,), radius (P,) mm."""
    hilum = np.array([158.0, _CENTRE[0] + 4.0, _CENTRE[1] + side * 30.0])
    targets = np.empty((0, 3))
    while len(targets) < count:
        p = rng.uniform([40.0, 20.0, 20.0], [_TOP, 204.0, 300.0], (4 * count, 3))
        qy, qx = _q(*p.T)
        keep = (_lung_depth(p[:, 0], qy, qx) > 2.5) & (np.sign(qx) == side)
        targets = np.concatenate([targets, p[keep]])[:count]
    targets = targets[np.argsort(np.linalg.norm(targets - hilum, axis=1))]
    nodes, parent, tips = [hilum], [-1], [0]
    for target in targets:
        there = np.array(nodes)
        near = np.linalg.norm(there - target, axis=1) + 0.25 * np.linalg.norm(there - hilum, axis=1)
        start = int(np.argmin(near))
        steps = max(1, int(np.ceil(np.linalg.norm(target - there[start]) / 4.0)))
        bend = rng.normal(size=3) * 0.08 * np.linalg.norm(target - there[start])
        for i in range(1, steps + 1):
            t = i / steps
            nodes.append(there[start] + t * (target - there[start]) + 4 * t * (1 - t) * bend)
            parent.append(start if i == 1 else len(nodes) - 2)
        tips.append(len(nodes) - 1)
    carried = np.zeros(len(nodes))
    carried[tips] = 1.0
    for i in range(len(nodes) - 1, 0, -1):
        carried[parent[i]] += carried[i]
    # Murray's law: the cube of the radius adds up over the branches
    return np.array(nodes), np.array(parent), 1.0 * np.cbrt(np.maximum(carried, 1.0))


def _draw(image, spacing, start, end, radius):
    """Raises image to a soft tube from start to end, in place; all in mm, each row its own tube."""
    step = np.asarray(spacing)
    blur = float(step.mean())
    limit = np.array(image.shape)
    for a, b, r in zip(start, end, radius, strict=True):
        reach = r + 1.5 * blur
        low = np.clip(np.floor((np.minimum(a, b) - reach) / step - 0.5).astype(int), 0, limit)
        high = np.clip(np.ceil((np.maximum(a, b) + reach) / step + 0.5).astype(int), 0, limit)
        if (high <= low).any():
            continue
        grid = np.ogrid[tuple(slice(i, j) for i, j in zip(low, high, strict=True))]
        offset = [(g + 0.5) * s - o for g, s, o in zip(grid, step, a, strict=True)]
        axis = b - a
        length = float(axis @ axis)
        t = sum(o * d for o, d in zip(offset, axis, strict=True)) / max(length, 1e-9)
        t = np.clip(t, 0.0, 1.0)
        distance = np.sqrt(sum((o - t * d) ** 2 for o, d in zip(offset, axis, strict=True)))
        part = image[tuple(slice(i, j) for i, j in zip(low, high, strict=True))]
        np.maximum(part, _soft(r - distance, blur), out=part)


def _wall_distance(points):
    """Distance, mm, of points in the fixed image to the surface on which the lungs slide."""
    z = np.arange(50.0, _TOP, 2.0)[:, None]
    angle = np.arange(0.0, 2 * np.pi, 0.02)[None]
    c, s = np.cos(angle), np.sin(angle)
    qy, qx = (h * np.sign(v) * np.abs(v) ** (2 / _POWER) for h, v in zip(_HALF, (s, c), strict=True))
    r = _radius(z)
    slides = (z > _dome(qy, qx)) & (np.abs(qx) > 20.0)
    surface = np.stack(np.broadcast_arrays(z, _CENTRE[0] + qy * r, _CENTRE[1] + qx * r), -1)[slides]
    return np.array([np.sqrt(((surface - p) ** 2).sum(1).min()) for p in points])


def thorax(shape: tuple[int, ...] = (112, 112, 160), seed: int = 0, amplitude: float = _AMPLITUDE) -> Phantom:
    """A thorax at end-exhale (fixed) and end-inhale (moving). The same arguments give the same phantom.

    Args: shape (tuple): voxels (D, H, W), each at least 16; they always cover 280 x 224 x 320 mm. seed (int).
    amplitude (float): mm, mean way of the diaphragm, 0 to 45; as much slides along the wall.
    Returns: Phantom.
    Errors: ValueError for a shape that is not three sizes of at least 16."""
    if len(shape) != 3 or min(shape) < 16:
        raise ValueError(f"fastreg::phantom: shape must be three sizes of at least 16, got {tuple(shape)}")
    if not 0 <= amplitude <= 45:
        raise ValueError(f"fastreg::phantom: amplitude must be in [0, 45] mm, got {amplitude}")
    rng = np.random.default_rng(seed)
    shape = tuple(int(s) for s in shape)
    spacing = tuple(e / s for e, s in zip(EXTENT, shape, strict=True))
    blur = float(np.mean(spacing))

    lung_waves, soft_waves, wall_waves = (_waves(rng, 8, *mm) for mm in ((12, 45), (12, 40), (10, 30)))
    trees = [_tree(rng, side, 330) for side in (-1, 1)]
    ends = []
    for nodes, parent, _ in trees:
        children = np.bincount(parent[1:], minlength=len(nodes))
        # what an expert would mark: where vessels branch or end
        ends.append(nodes[(children != 1) & (np.arange(len(nodes)) > 0)])
    marks = np.concatenate(ends)
    depth = _lung_depth(marks[:, 0], *_q(*marks.T))
    marks = marks[depth > 2.0]
    marks = marks[rng.permutation(len(marks))[:300]]

    mm = [((np.arange(n) + 0.5) * s).astype(np.float32) for n, s in zip(shape, spacing, strict=True)]
    z, y, x = np.broadcast_arrays(mm[0][:, None, None], mm[1][:, None], mm[2])
    qy, qx = _q(z, y, x)
    cavity = _inside(z, qy, qx)

    # The chest wall is the same in both images.
    body = 1.0 - (np.abs((y - 112) / 103) ** 2.6 + np.abs((x - 160) / 150) ** 2.6) ** (1 / 2.6)
    wall = -1000.0 + (1000.0 - 60.0 + 35.0 * _texture(wall_waves, z, y, x)) * _soft(90.0 * body, blur)
    rho = _norm(qy, qx)
    turn = np.cos(np.arctan2(qx / _HALF[1], -qy / _HALF[0]))
    for height in np.arange(48.0, 300.0, 25.0):
        ring = np.hypot((rho - 1.10) * 90.0 * _radius(z), z - height + 14.0 * turn)
        wall = np.maximum(wall, -60.0 + 420.0 * _soft(5.0 - ring, blur))
    spine = _soft(11.0 - np.hypot(y - 201.0, (x - 160.0) * 0.8), blur)
    wall = np.maximum(wall, -60.0 + (260.0 + 120.0 * np.cos(2 * np.pi * z / 27.0)) * spine)

    # From here on flat arrays over the cavity's voxels: half of the volume.
    z, y, x, qy, qx = (a[cavity] for a in (z, y, x, qy, qx))
    dome, swing = _dome(qy, qx), _swing(qy, qx, amplitude)

    def render(material_z, tubes, parenchyma):
        r = _radius(material_z)
        my, mx = _CENTRE[0] + qy * r, _CENTRE[1] + qx * r
        depth = _lung_depth(material_z, qy, qx, dome)
        lung, soft = (_texture(waves, material_z, my, mx) for waves in (lung_waves, soft_waves))
        texture = np.where(depth > 0, 22.0 * lung, 28.0 * soft)
        air = parenchyma + texture
        air = air + (30.0 - air) * tubes[cavity]
        image, label = wall.copy(), np.zeros(shape, np.uint8)
        image[cavity] = 45.0 + texture + (air - 45.0 - texture) * _soft(depth, blur)
        label[cavity] = np.where(depth > 0, np.where(qx < 0, 1, 2), 0)
        image += rng.normal(scale=18.0, size=shape)
        return torch.from_numpy(image.astype(np.float32))[None, None], torch.from_numpy(label)[None, None]

    def moved(points):
        return _move(points, amplitude)

    images, labels = [], []
    for motion, parenchyma in ((lambda p: p, -790.0), (moved, -840.0)):
        tubes = np.zeros(shape, np.float32)
        for nodes, parent, radius in trees:
            nodes = motion(nodes)
            _draw(tubes, spacing, nodes[parent[1:]], nodes[1:], radius[1:])
        material_z = z
        if motion is moved:
            # Newton, on a function that is monotone and nearly straight on either side of the diaphragm
            for _ in range(6):
                shift, slope = _shift(material_z, dome, swing)
                material_z = material_z - (material_z + shift - z) / (1.0 + slope)
        image, label = render(material_z, tubes, parenchyma)
        images.append(image)
        labels.append(label)

    z2 = z + _shift(z, dome, swing)[0]
    stretch = _radius(z2) / _radius(z) - 1.0
    u = np.zeros((3, *shape), np.float32)
    for i, part in enumerate((z2 - z, (y - _CENTRE[0]) * stretch, (x - _CENTRE[1]) * stretch)):
        u[i][cavity] = part / spacing[i]

    def voxels(points):
        return torch.from_numpy(points / np.array(spacing) - 0.5)

    return Phantom(
        fixed=images[0],
        moving=images[1],
        spacing=spacing,
        fixed_labels=labels[0],
        moving_labels=labels[1],
        displacement=torch.from_numpy(u)[None],
        fixed_landmarks=voxels(marks),
        moving_landmarks=voxels(moved(marks)),
        near_wall=torch.from_numpy(_wall_distance(marks) < WALL_MM),
    )


def score(phantom: Phantom, displacement: torch.Tensor, seconds: float = 0.0) -> dict[str, float]:
    """How well a displacement (1, 3, D, H, W), in voxels, explains the phantom.

    Returns: dict: tre_before, tre_after, tre_wall (means, mm; wall: landmarks near it), folding, seconds.
    """
    spacing = torch.tensor(phantom.spacing, dtype=torch.float64)

    def errors(points):
        return ((points - phantom.moving_landmarks) * spacing).norm(dim=1)

    after = errors(metrics.move_points(phantom.fixed_landmarks, displacement).double())
    return {
        "tre_before": float(errors(phantom.fixed_landmarks).mean()),
        "tre_after": float(after.mean()),
        "tre_wall": float(after[phantom.near_wall].mean()),
        "folding": float(metrics.folding(displacement)),
        "seconds": float(seconds),
    }


def failures(result: Mapping[str, float], *, goals: Mapping[str, float] = GOALS) -> list[str]:
    """The goals that a `score` misses, one sentence each; empty when all are met. NaN misses.

    Seconds are no failure: they say as much about what else the machine does."""
    missed = []
    if not result["tre_before"] >= goals["tre_before"]:
        missed.append(f"tre_before {result['tre_before']:.2f} mm is below {goals['tre_before']:g} mm")
    for name, unit in (("tre_after", " mm"), ("tre_wall", " mm"), ("folding", "")):
        if not result[name] <= goals[name]:
            missed.append(f"{name} {result[name]:.4g}{unit} is above {goals[name]:g}{unit}")
    return missed
