"""DIPY: a symmetric registration; its map as dipy.io writes it."""

import nibabel
import numpy as np
from dipy.align import write_mapping
from dipy.align.imwarp import SymmetricDiffeomorphicRegistration
from dipy.align.metrics import SSDMetric
from recipe import main


def make(scene, out):
    fixed, moving = (nibabel.load(scene / f"{name}.nii.gz") for name in ("fixed", "moving"))
    data = [np.asarray(image.dataobj, np.float32) for image in (fixed, moving)]
    registration = SymmetricDiffeomorphicRegistration(SSDMetric(3), level_iters=[20, 10])
    found = registration.optimize(*data, fixed.affine, moving.affine)
    write_mapping(found, str(out / "map.nii.gz"))
    moved = found.transform(data[1], interpolation="linear")
    nibabel.save(nibabel.Nifti1Image(moved.astype(np.float32), fixed.affine), out / "moved.nii.gz")


main(make)
