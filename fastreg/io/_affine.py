"""Affine maps of fixed points to moving ones, as ITK's transform files hold them."""

import numpy as np

from fastreg._files import Name, replacing

from ._sitk import silent_stderr, sitk


def is_rigid(matrix: np.ndarray) -> bool:
    """Whether an affine map, (nd, nd + 1), turns and shifts only: up to fp32, in which registrations are computed."""
    linear = matrix[:, :-1]
    return bool(np.abs(linear @ linear.T - np.eye(len(linear))).max() < 1e-5 and np.linalg.det(linear) > 0)


def write_affine(path: Name, matrix: np.ndarray, centre: np.ndarray) -> None:
    """Writes an affine map of fixed to moving points, (nd, nd + 1) in mm (x, y, z), as an ITK transform about `centre` (mm).

    Euler2DTransform or Euler3DTransform where it only turns and shifts, else AffineTransform.
    """
    itk, nd = sitk(), len(matrix)
    linear = matrix[:, :-1]
    translation = linear @ centre + matrix[:, -1] - centre
    if is_rigid(matrix):
        transform = itk.Euler3DTransform() if nd == 3 else itk.Euler2DTransform()
        u, _, v = np.linalg.svd(linear)  # the nearest matrix that ITK takes for a rotation
        linear = u @ v
    else:
        transform = itk.AffineTransform(nd)
    transform.SetCenter(centre.tolist())
    transform.SetMatrix(linear.ravel().tolist())
    transform.SetTranslation(translation.tolist())
    with replacing(path) as temporary:
        try:
            with silent_stderr():
                itk.WriteTransform(transform, str(temporary))
        except RuntimeError as error:
            raise OSError(f"{path}: cannot be written as a transform") from error
