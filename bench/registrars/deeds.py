"""deedsBCV: its defaults. Its field, by what its applyBCVfloat makes of the coordinates: no format to know."""

import subprocess
import sys
from pathlib import Path

import itk_field
import numpy as np
import SimpleITK

fixed, moving, out, _, program, *field = sys.argv[1:]
stem = f"{out}/deeds"
if not field:
    subprocess.run([program, "-F", fixed, "-M", moving, "-O", stem], check=True)
else:
    reference = SimpleITK.ReadImage(fixed)
    identity = np.indices(SimpleITK.GetArrayViewFromImage(reference).shape).astype(np.float32)
    positions = []
    for axis, coordinates in enumerate(identity):
        image = SimpleITK.GetImageFromArray(coordinates)
        image.CopyInformation(reference)
        before, after = f"{out}/{axis}.nii.gz", f"{out}/{axis}_moved.nii.gz"
        SimpleITK.WriteImage(image, before)
        apply = Path(program).with_name("applyBCVfloat")
        subprocess.run([apply, "-M", before, "-O", stem, "-D", after], check=True)
        positions.append(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(after)))
    itk_field.write(f"{out}/field.nii.gz", np.moveaxis(np.stack(positions) - identity, 0, -1), fixed)
