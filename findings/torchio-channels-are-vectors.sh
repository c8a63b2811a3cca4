#!/usr/bin/env bash
# torchio 1.2.1: an image of several channels (T1 and T2 of one person, colours) saved as NIfTI becomes a vector image: five axes,
# the channels last, intent 1007. That is exactly how ITK and ANTs keep a displacement field: SimpleITK makes a transform of
# a three-channel scan without an error. One channel is saved as a plain image. Programs that expect (X, Y, Z, C) meet an axis of 1.
#
# seen:
#   1 channel: (5, 6, 7), intent 0
#   2 channels: (5, 6, 7, 1, 2), intent 1007
#   3 channels: (5, 6, 7, 1, 3), intent 1007
#   the three-channel scan as a transform: (2.0, 2.0, 2.0) -> (102.0, 202.0, 302.0)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.2.6 torch==2.13.0 torchio==1.2.1 nibabel==5.4.2 simpleitk==2.5.7
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import nibabel
import numpy as np
import SimpleITK as sitk
import torch
import torchio

assert torchio.__version__ == "1.2.1"
seen = []
for channels in (1, 2, 3):
    # values of three contrasts: 100, 200, 300
    scan = torch.arange(1, channels + 1).float().view(-1, 1, 1, 1) * 100
    torchio.ScalarImage(tensor=scan.expand(-1, 5, 6, 7).contiguous(), affine=np.diag([-1, -1, 1, 1])).save("scan.nii.gz")
    header = nibabel.load("scan.nii.gz").header
    seen.append((header.get_data_shape(), int(header["intent_code"])))
    print(f"{channels} channel{'s' * (channels > 1)}: {seen[-1][0]}, intent {seen[-1][1]}")
transform = sitk.DisplacementFieldTransform(sitk.ReadImage("scan.nii.gz", sitk.sitkVectorFloat64))
point = transform.TransformPoint((2.0, 2.0, 2.0))
print(f"the three-channel scan as a transform: (2.0, 2.0, 2.0) -> {point}")
assert seen == [((5, 6, 7), 0), ((5, 6, 7, 1, 2), 1007), ((5, 6, 7, 1, 3), 1007)]
assert point == (102.0, 202.0, 302.0)
PYTHON
