"""antspyx: SyN with its affine, as the usual two files; and the composite of the same as one .h5."""

import shutil

import ants
from recipe import main


def images(scene):
    return ants.image_read(str(scene / "fixed.nii.gz")), ants.image_read(str(scene / "moving.nii.gz"))


def make(scene, out):
    fixed, moving = images(scene)
    ants.config.set_ants_deterministic(True, 1)
    found = ants.registration(fixed, moving, "SyN", reg_iterations=(20, 10, 0), outprefix=str(out / "syn"))
    moved = ants.apply_transforms(fixed, moving, found["fwdtransforms"], interpolator="linear")
    ants.image_write(moved, str(out / "moved.nii.gz"))
    for path, name in zip(found["fwdtransforms"], ("warp.nii.gz", "affine.mat"), strict=True):
        shutil.copy(path, out / name)
    composite = ants.apply_transforms(fixed, moving, found["fwdtransforms"], compose=str(out / "composed_"))
    shutil.copy(composite, out / "composed.nii.gz")


def use(scene, out, files):
    fixed, moving = images(scene)
    moved = ants.apply_transforms(fixed, moving, [str(f) for f in files], interpolator="linear")
    ants.image_write(moved, str(out / "moved.nii.gz"))


main(make, use)
