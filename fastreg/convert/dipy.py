"""DIPY."""

import numpy as np

from fastreg._files import InputError

from . import _nifti
from ._chain import Field, Step
from ._format import Format, Source


def read(source: Source) -> list[Step]:
    image = _nifti.load(source.path)
    if image.shape[3:] != (3, 2):
        raise InputError(
            f"{source.path}: a DIPY mapping must have shape (X, Y, Z, 3, 2), got {'x'.join(map(str, image.shape))}"
        )
    # The header's affine leads from RAS to voxels of the static image.
    try:
        affine = np.linalg.inv(image.affine)
    except np.linalg.LinAlgError as error:
        raise InputError(f"{source.path}: its affine cannot be inverted") from error
    grid = _nifti.grid(source.path, _nifti.FLIP[:, None] * affine[:3], image.shape[:3])
    backward = _nifti.values(source.path, image)[..., 1]
    source.warn(
        f"{source.path}: a DIPY mapping is written without the prealign matrix it may have had: where there was one, the rest is missing"
    )
    what = f"DIPY mapping (backward, RAS displacements, mm), {'x'.join(map(str, grid.size))}"
    return [Step(what, str(source.path), Field(_nifti.zyx(backward) * _nifti.FLIP, grid))]


FORMAT = Format(
    "dipy",
    "DIPY write_mapping",
    ".nii.gz .nii",
    "NIfTI (X, Y, Z, 3, 2)",
    "displacements in mm, RAS: forward, backward (which is taken); the affine leads from mm to voxels",
    read,
    instead="is read only: write it with dipy.align.imaffine and write_mapping",
)
