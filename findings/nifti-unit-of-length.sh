#!/usr/bin/env bash
# SimpleITK 2.5.7 and nibabel 5.4.2 disagree by a factor of 1000 about a NIfTI file whose header says that its unit is the micron (or the
# metre): ITK turns spacing and origin into mm, nibabel's affine leaves the numbers as they are, in whatever unit. A displacement field
# in mm of the one moves by a thousand voxels, or by nothing, in the other. Where the header says mm, or nothing, they agree.
#
# seen: voxels of 10 x 10 x 20, origin (100, -200, 300) RAS
#   mm     nibabel 10    SimpleITK 10
#   micron nibabel 10    SimpleITK 0.01, origin (-0.1, 0.2, 0.3)
#   meter  nibabel 10    SimpleITK 10000
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
affine = np.diag([10.0, 10, 20, 1])
affine[:3, 3] = 100, -200, 300
for unit, factor in (("mm", 1), ("micron", 1e-3), ("meter", 1e3)):
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.float32), affine)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, "u.nii.gz")
    by_nibabel, by_itk = nibabel.load("u.nii.gz"), sitk.ReadImage("u.nii.gz")
    print(unit, "nibabel", by_nibabel.affine[0, 0], "SimpleITK", by_itk.GetSpacing()[0], by_itk.GetOrigin())
    assert by_nibabel.affine[0, 0] == 10
    np.testing.assert_allclose(by_itk.GetSpacing(), np.array([10, 10, 20]) * factor, rtol=1e-6)
    np.testing.assert_allclose(by_itk.GetOrigin(), np.array([-100, 200, 300]) * factor, rtol=1e-6)
PYTHON
echo "as seen"
