"""Matrices of 4 x 4 numbers in text: greedy's, and NiftyReg's of reg_aladin."""

import numpy as np

from fastreg._files import InputError
from fastreg.io._sitk import sitk

from ._chain import Step
from ._format import Format, Source
from ._nifti import FLIP


def read(source: Source, inverse: bool = False) -> list[Step]:
    """From points of the fixed image to the moving one, RAS."""
    matrix = np.loadtxt(source.path)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or not np.array_equal(matrix[3], (0, 0, 0, 1)):
        raise InputError(f"{source.path}: must hold 4 x 4 numbers, the last row 0 0 0 1")
    if inverse:
        try:
            matrix = np.asarray(np.linalg.inv(matrix), dtype=np.float64)
        except np.linalg.LinAlgError as error:
            raise InputError(f"{source.path}: its matrix is singular and has no inverse") from error
    turned = FLIP[:, None] * matrix[:3, :3] * FLIP
    transform = sitk().AffineTransform(turned.ravel().tolist(), (FLIP * matrix[:3, 3]).tolist())
    what = "RAS matrix (fixed to moving, mm)" + " (inverted)" * inverse
    return [Step(what, str(source.path), other=transform)]


FORMAT = Format(
    "ras-matrix",
    "greedy, NiftyReg reg_aladin",
    ".mat .txt",
    "",
    "4 x 4 numbers: from points of the fixed image to the moving one, mm, RAS",
    read,
    needs="--like where it comes first",
    instead="is read only: write --to itk",
)
