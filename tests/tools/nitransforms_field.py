"""nitransforms: an ITK field, read and written by it."""

import nibabel
import numpy as np
from nitransforms.nonlinear import DenseFieldTransform
from nitransforms.resampling import apply
from recipe import main


def make(scene, out):
    stored = np.load(scene / "u.npz")
    deltas = stored["u"] * (-1, -1, 1)  # its own are RAS
    field = nibabel.Nifti1Image(deltas.astype(np.float64), stored["affine"])
    field.header.set_intent("vector")
    transform = DenseFieldTransform(field, is_deltas=True)
    transform.to_filename(str(out / "field.nii.gz"), fmt="itk")
    _moved(scene, out, transform)


def use(scene, out, files):
    _moved(scene, out, DenseFieldTransform.from_filename(str(files[0]), fmt="itk"))


def _moved(scene, out, transform):
    transform.reference = nibabel.load(scene / "fixed.nii.gz")
    moved = apply(transform, nibabel.load(scene / "moving.nii.gz"), order=1, cval=0.0)
    nibabel.save(
        nibabel.Nifti1Image(np.asarray(moved.dataobj, np.float32), moved.affine), out / "moved.nii.gz"
    )


main(make, use)
