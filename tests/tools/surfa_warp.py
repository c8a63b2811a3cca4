"""surfa (FreeSurfer, SynthMorph): a warp of displacements in voxels; its .nii.gz holds RAS mm."""

import numpy as np
import surfa
from recipe import main


def make(scene, out):
    fixed, moving = (surfa.load_volume(str(scene / f"{name}.nii.gz")) for name in ("fixed", "moving"))
    u = np.load(scene / "u.npz")["u"] * (-1, -1, 1)  # RAS
    warp = surfa.transform.Warp(u.astype(np.float32), source=moving.geom, target=fixed.geom, format=3)
    warp.save(str(out / "warp.nii.gz"))
    _moved(moving, warp, out)


def use(scene, out, files):
    moving, warp = surfa.load_volume(str(scene / "moving.nii.gz")), surfa.load_warp(str(files[0]))
    warp.source = moving.geom  # which an ITK field does not carry
    _moved(moving, warp, out)


def _moved(moving, warp, out):
    warp.transform(moving, method="linear", fill=0).save(str(out / "moved.nii.gz"))


main(make, use)
