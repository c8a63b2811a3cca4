#!/usr/bin/env bash
# SimpleITK 2.5.7: of a NIfTI file that says by its sform alone where it lies (qform code 0), the axes come from the sform, but the voxel
# size from pixdim, which nobody has to have kept in step: an image of 1.5 x 2 x 3 mm is read as one of 1 x 1 x 1 mm, without a word.
# nibabel, FSL and others take the size from the sform; nibabel itself writes such a file when the sform is set and the qform is not.
#
# seen: sform diag(1.5, 2, 3), pixdim 1 1 1
#   nibabel (1.5, 2.0, 3.0)    SimpleITK (1.0, 1.0, 1.0)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.2.6 SimpleITK==2.5.7 nibabel==5.4.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import nibabel
import numpy as np
import SimpleITK as sitk

assert (sitk.Version.VersionString(), nibabel.__version__) == ("2.5.7", "5.4.2")
image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.float32), None)
image.set_qform(None, 0)
image.set_sform(np.diag([1.5, 2, 3, 1]), 1)
nibabel.save(image, "s.nii.gz")
by_nibabel = tuple(np.sqrt((nibabel.load("s.nii.gz").affine[:3, :3] ** 2).sum(0)).tolist())
by_itk = sitk.ReadImage("s.nii.gz").GetSpacing()
print("nibabel", by_nibabel, "SimpleITK", by_itk)
assert by_nibabel == (1.5, 2.0, 3.0) and by_itk == (1.0, 1.0, 1.0)
PYTHON
echo "as seen"
