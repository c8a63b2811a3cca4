"""Two small oblique scans of one analytic image, and a field between them: read rightly it moves one onto the other.

Bytes are made by nibabel, h5py, numpy and SimpleITK from what the formats mean, without fastreg.convert.
"""

import numpy as np
import pytest
import torch

from fastreg import io

sitk = pytest.importorskip("SimpleITK")
nibabel = pytest.importorskip("nibabel")


def turned(angles):
    matrix = np.eye(3)
    for (i, j), angle in zip([(0, 1), (0, 2), (1, 2)], angles, strict=True):
        turn = np.eye(3)
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = matrix @ turn
    return matrix


def grid(size, spacing, angles, middle, flip=(1, 1, 1)):
    direction = turned(angles) * flip
    origin = np.array(middle) - direction * spacing @ (np.array(size) - 1) / 2
    return io.Geometry(size, spacing, tuple(origin), tuple(direction.ravel()))


FIXED = grid((22, 18, 14), (1.5, 2.0, 2.5), (0.2, -0.15, 0.1), (5.0, 30.0, 15.0))
MOVING = grid((24, 20, 17), (1.7, 1.8, 2.2), (0.12, -0.1, 0.17), (7.0, 28.0, 16.0))
FLIP = np.array([-1.0, -1.0, 1.0])


def points(geometry):
    """(z, y, x, 3) mm, LPS."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in geometry.shape], indexing="ij"), -1)
    return geometry.to_physical(index)


def image(p):
    """Smooth, with different slopes in all directions."""
    x, y, z = np.moveaxis(np.asarray(p), -1, 0)
    return 100 + 40 * np.sin(x / 11) + 30 * np.cos(y / 9 + x / 35) + 25 * np.sin(z / 10 - y / 40)


def field(p):
    """u at points, mm, LPS."""
    x, y, z = np.moveaxis(np.asarray(p), -1, 0)
    waves = np.stack([np.sin(y / 9), np.cos(z / 8), np.sin(x / 10 + z / 12)], -1)
    return np.array([2.1, -2.7, 1.2]) + waves


U = field(points(FIXED))  # (z, y, x, 3)


def ras(geometry):
    """The affine of nibabel: voxels (x, y, z) -> RAS."""
    affine = np.eye(4)
    direction = np.array(geometry.direction).reshape(3, 3)
    affine[:3, :3] = FLIP[:, None] * direction * geometry.spacing
    affine[:3, 3] = FLIP * geometry.origin
    return affine


def xyz(array):
    """(z, y, x, ...) -> (x, y, z, ...)."""
    return np.swapaxes(array, 0, 2)


def save(path, array, affine, *, code=0, name="", p1=0.0, dtype=np.float32):
    """(x, y, z, ...) by nibabel, with an intent."""
    file = nibabel.Nifti1Image(np.ascontiguousarray(array, dtype=dtype), affine)
    file.header["intent_code"], file.header["intent_name"], file.header["intent_p1"] = code, name, p1
    file.set_sform(affine, 1)
    file.set_qform(affine, 1)
    nibabel.save(file, path)
    return path


def images(folder):
    """The two scans in files: the fixed one is the moving one where the field leads."""
    paths = folder / "fixed.nii.gz", folder / "moving.nii.gz"
    arrays = image(points(FIXED) + U), image(points(MOVING))
    for path, array, geometry in zip(paths, arrays, (FIXED, MOVING), strict=True):
        io.write_image(path, array.astype(np.float32), geometry)
    return paths


def error(u, geometry=FIXED, truth=None):
    """The median error, grey levels, of the moving scan that u moves: below 0.2 for the field, 2 to 100 for others."""
    moving = torch.from_numpy(image(points(MOVING)))[None, None]
    moved, inside = io.resample(moving, MOVING, geometry, u)
    truth = image(points(geometry) + field(points(geometry))) if truth is None else truth
    inside = inside[0, 0].numpy()
    assert inside.mean() > 0.5
    return float(np.median(np.abs(moved[0, 0].numpy() - truth)[inside]))


def mm(u, geometry=FIXED):
    """(1, 3, z, y, x) voxels -> (z, y, x, 3) mm, LPS."""
    return u[0].double().movedim(0, -1).numpy() @ geometry.matrix.T


def voxels(vectors=U, geometry=FIXED):
    """The other way, fp32."""
    u = vectors @ np.linalg.inv(geometry.matrix).T
    return torch.from_numpy(np.moveaxis(u, -1, 0).astype(np.float32).copy())[None]
