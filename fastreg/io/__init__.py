"""Images, landmarks and displacements between files and tensors: grids in physical space.

Physical points are ITK's: millimetres, LPS, in the order (x, y, z). Arrays, tensors and voxel indices are
(z, y, x). Only images need SimpleITK.
"""

from fastreg._files import InputError

from ._affine import is_rigid, write_affine
from ._channels import Volumes, read_volumes, volume_geometry, write_volumes
from ._displacement import read_displacement, write_displacement
from ._geometry import Geometry
from ._images import read_image, write_image
from ._inverse import Residual, invert, invert_points
from ._landmarks import Landmarks, read_landmarks, read_points, write_landmarks
from ._reading import Reading
from ._resample import resample

__all__ = [
    "Geometry",
    "InputError",
    "Landmarks",
    "Reading",
    "Residual",
    "Volumes",
    "invert",
    "invert_points",
    "is_rigid",
    "read_displacement",
    "read_image",
    "read_landmarks",
    "read_points",
    "read_volumes",
    "resample",
    "volume_geometry",
    "write_affine",
    "write_displacement",
    "write_image",
    "write_landmarks",
    "write_volumes",
]
