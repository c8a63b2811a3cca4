"""Two oblique scans of one texture, on unlike grids with origins far from 0, and the displacement between them: in mm, LPS.

python scene.py FOLDER: fixed.nii.gz, moving.nii.gz (float32, 100 and more inside of what is seen), u.npz: u (X, Y, Z, 3), x, y, z;
affine: of the fixed image, RAS; u.nii.gz: u as an ITK field.
"""

import sys
from pathlib import Path

import nibabel
import numpy as np

FIXED = ((44, 36, 28), (1.5, 2.0, 2.5), (0.2, -0.15, 0.1), (31.0, -42.0, 17.0))
MOVING = ((48, 40, 34), (1.7, 1.8, 2.2), (0.12, -0.1, 0.17), (28.0, -40.0, 14.0))


def rotation(angles):
    out = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        out = out @ turn
    return out


def affine(size, spacing, angles, centre):
    """Voxels to mm, LPS; the middle voxel lies at centre."""
    out = np.eye(4)
    out[:3, :3] = rotation(angles) * spacing
    out[:3, 3] = centre - out[:3, :3] @ ((np.asarray(size) - 1) / 2)
    return out


def points(grid):
    """(X, Y, Z, 3), mm, LPS."""
    matrix = affine(*grid)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid[0]], indexing="ij"), -1)
    return index @ matrix[:3, :3].T + matrix[:3, 3]


def texture(p):
    """Blobs of 8 to 12 mm on a ground of 100, at points (..., 3)."""
    draw = np.random.default_rng(5)
    centres = np.asarray(FIXED[3]) + draw.uniform(-32, 32, (70, 3))
    widths, heights = draw.uniform(8, 12, 70), draw.uniform(60, 220, 70)
    out = np.full(p.shape[:-1], 100.0)
    for c, s, h in zip(centres, widths, heights, strict=True):
        out += h * np.exp(-((p - c) ** 2).sum(-1) / (2 * s * s))
    return out


def displacement(p):
    """u (..., 3), mm, LPS: what is at p in the fixed image is at p + u in the moving one."""
    q = (p - np.asarray(FIXED[3])) / 20
    x, y, z = np.moveaxis(q, -1, 0)
    wave = np.stack([np.sin(y + 0.5 * z), np.cos(x - 0.4 * z), np.sin(0.8 * x + 0.6 * y)], -1)
    return np.array([2.1, -2.7, 1.2]) + wave


def ras(matrix):
    return np.diag([-1, -1, 1, 1]) @ matrix


def write(folder):
    folder = Path(folder)
    p = points(FIXED)
    u = displacement(p)
    # The fixed image is what the moving one shows there: the same texture, seen through u.
    for name, grid, image in (("fixed", FIXED, texture(p + u)), ("moving", MOVING, texture(points(MOVING)))):
        nibabel.save(
            nibabel.Nifti1Image(image.astype(np.float32), ras(affine(*grid))), folder / f"{name}.nii.gz"
        )
    np.savez(folder / "u.npz", u=u, affine=ras(affine(*FIXED)))
    # As fastreg register writes it: an ITK field.
    field = nibabel.Nifti1Image(u.astype(np.float32)[:, :, :, None], ras(affine(*FIXED)))
    field.header.set_intent("vector")
    nibabel.save(field, folder / "u.nii.gz")


if __name__ == "__main__":
    write(sys.argv[1])
