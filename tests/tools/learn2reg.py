"""Learn2Reg's evaluation: displacements in voxels, moving read at identity + displacement by scipy; the scans share one grid there."""

import sys
from pathlib import Path

import nibabel
import numpy as np
from recipe import main
from scipy.ndimage import map_coordinates

sys.path.insert(0, str(Path(__file__).parent))


def moved(scene, out, u):
    fixed = nibabel.load(scene / "fixed.nii.gz")
    moving = np.asarray(nibabel.load(scene / "same_grid.nii.gz").dataobj)
    identity = np.stack(np.meshgrid(*[np.arange(n) for n in fixed.shape], indexing="ij"))
    data = map_coordinates(moving, identity + np.moveaxis(u, -1, 0), order=1, cval=0.0)
    nibabel.save(nibabel.Nifti1Image(data.astype(np.float32), fixed.affine), out / "moved.nii.gz")


def make(scene, out):
    import scene as made

    stored = np.load(scene / "u.npz")
    image = nibabel.Nifti1Image(made.texture(made.points(made.FIXED)).astype(np.float32), stored["affine"])
    nibabel.save(image, scene / "same_grid.nii.gz")
    u = (stored["u"] * (-1, -1, 1)) @ np.linalg.inv(stored["affine"][:3, :3]).T  # voxels of the grid
    nibabel.save(nibabel.Nifti1Image(u.astype(np.float32), np.eye(4)), out / "disp.nii.gz")
    np.savez(out / "disp.npz", u.astype(np.float32))
    moved(scene, out, u)


def use(scene, out, files):
    path = files[0]
    if path.suffix == ".npz":
        (u,) = np.load(path).values()
    else:
        u = np.asarray(nibabel.load(path).dataobj)
    moved(scene, out, u)


main(make, use)
