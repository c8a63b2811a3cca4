"""SimpleITK: an affine and a field as a composite .h5."""

import numpy as np
import SimpleITK as sitk
from recipe import main


def images(scene):
    return [sitk.ReadImage(str(scene / f"{name}.nii.gz"), sitk.sitkFloat32) for name in ("fixed", "moving")]


def make(scene, out):
    fixed, moving = images(scene)
    u = np.load(scene / "u.npz")["u"]
    field = sitk.GetImageFromArray(np.ascontiguousarray(u.transpose(2, 1, 0, 3)), isVector=True)
    field.CopyInformation(fixed)
    affine = sitk.AffineTransform(3)
    affine.SetMatrix((1.01, 0.02, 0, -0.01, 0.99, 0.01, 0, 0.02, 1.0))
    affine.SetTranslation((0.7, -0.4, 0.5))
    affine.SetCenter((20.0, -30.0, 10.0))
    chain = sitk.CompositeTransform([affine, sitk.DisplacementFieldTransform(field)])
    sitk.WriteTransform(chain, str(out / "chain.h5"))
    sitk.WriteImage(sitk.Resample(moving, fixed, chain, sitk.sitkLinear, 0.0), str(out / "moved.nii.gz"))


def use(scene, out, files):
    fixed, moving = images(scene)
    transform = sitk.ReadTransform(str(files[0]))
    sitk.WriteImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0), str(out / "moved.nii.gz"))


main(make, use)
