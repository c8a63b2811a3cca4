"""A displacement in voxels of a grid without rotation, (z, y, x, 3) in axis order, as ITK writes one: mm, x first."""

import numpy as np
import SimpleITK


def write(path, displacement, like):
    """like: the image on whose grid it lies."""
    reference = SimpleITK.ReadImage(like)
    mm = displacement[..., ::-1] * np.array(reference.GetSpacing())
    field = SimpleITK.GetImageFromArray(np.ascontiguousarray(mm, dtype=np.float64), isVector=True)
    field.CopyInformation(reference)
    SimpleITK.WriteImage(field, path)
