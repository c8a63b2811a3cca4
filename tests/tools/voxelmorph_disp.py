"""voxelmorph: displacements in voxels by its save_volfile, applied by its spatial_transform; the scans share one grid there."""

import sys
from pathlib import Path

import nibabel
import numpy as np
import torch
import voxelmorph as vxm
from recipe import main

sys.path.insert(0, str(Path(__file__).parent))


def moved(scene, out, u):
    fixed = nibabel.load(scene / "fixed.nii.gz")
    moving = torch.from_numpy(np.asarray(nibabel.load(scene / "same_grid.nii.gz").dataobj))
    field = torch.from_numpy(np.ascontiguousarray(np.moveaxis(u, -1, 0))).float()
    data = vxm.nn.functional.spatial_transform(moving[None, None], field[None])[0, 0]
    nibabel.save(nibabel.Nifti1Image(data.numpy().astype(np.float32), fixed.affine), out / "moved.nii.gz")


def make(scene, out):
    import scene as made

    stored = np.load(scene / "u.npz")
    image = nibabel.Nifti1Image(made.texture(made.points(made.FIXED)).astype(np.float32), stored["affine"])
    nibabel.save(image, scene / "same_grid.nii.gz")
    u = (stored["u"] * (-1, -1, 1)) @ np.linalg.inv(stored["affine"][:3, :3]).T
    vxm.py.utils.save_volfile(u.astype(np.float32), str(out / "disp.nii.gz"), affine=stored["affine"])
    moved(scene, out, u)


def use(scene, out, files):
    moved(scene, out, np.asarray(nibabel.load(files[0]).dataobj))


main(make, use)
