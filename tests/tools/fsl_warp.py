"""fslpy: a warp as fnirt writes it, relative and absolute, and what fslpy's applyDeformation makes of it."""

import nibabel
import numpy as np
from fsl.data.image import Image
from fsl.transform import affine, fnirt, nonlinear
from recipe import main


def images(scene):
    return Image(str(scene / "fixed.nii.gz")), Image(str(scene / "moving.nii.gz"))


def moved(scene, out, field):
    fixed, moving = images(scene)
    data = nonlinear.applyDeformation(moving, field, ref=fixed, order=1, mode="constant", cval=0.0)
    nibabel.save(nibabel.Nifti1Image(data.astype(np.float32), fixed.voxToWorldMat), out / "moved.nii.gz")


def make(scene, out):
    fixed, moving = images(scene)
    u = np.load(scene / "u.npz")["u"] * (-1, -1, 1)  # RAS
    index = np.stack(np.meshgrid(*[np.arange(n) for n in fixed.shape[:3]], indexing="ij"), -1).reshape(-1, 3)
    world = affine.transform(index, fixed.getAffine("voxel", "world")) + u.reshape(-1, 3)
    to = affine.transform(world, moving.getAffine("world", "fsl")).reshape(*fixed.shape[:3], 3)
    at = affine.transform(index, fixed.getAffine("voxel", "fsl")).reshape(to.shape)
    for name, data in (("relative", to - at), ("absolute", to)):
        header = fixed.header.copy()
        header.set_intent(2006)
        nonlinear.DeformationField(data.astype(np.float32), moving, fixed, defType=name, header=header).save(
            str(out / f"{name}.nii.gz")
        )
    moved(scene, out, fnirt.readFnirt(str(out / "relative.nii.gz"), moving, fixed))


def use(scene, out, files):
    fixed, moving = images(scene)
    moved(scene, out, fnirt.readFnirt(str(files[0]), moving, fixed))


main(make, use)
