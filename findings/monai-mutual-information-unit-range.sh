#!/usr/bin/env bash
# MONAI 1.6.1: with its default kernel GlobalMutualInformationLoss has bins from 0 to 1, whatever the images hold, and does not say
# so. In other units (8-bit grey levels, CT numbers) nearly every voxel falls beyond the bins: images that agree and images that
# have nothing in common get the same loss, near 0. With kernel_type="b-spline" the same loss takes its bins from the images.
#
# seen: the loss of two images that agree but for 10 % noise, and of two unrelated ones
#   values from 0 to   1, gaussian: alike -1.7729, unrelated -0.0054
#   values from 0 to   1, b-spline: alike -1.7277, unrelated -0.0055
#   values from 0 to  10, gaussian: alike -0.1781, unrelated -0.0052
#   values from 0 to  10, b-spline: alike -1.7277, unrelated -0.0055
#   values from 0 to 255, gaussian: alike -0.0000, unrelated -0.0000
#   values from 0 to 255, b-spline: alike -1.7277, unrelated -0.0055
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.2.6 torch==2.13.0 monai==1.6.1
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import monai
import torch
from monai.losses import GlobalMutualInformationLoss

assert monai.__version__ == "1.6.1"
torch.manual_seed(0)
fixed, unrelated = torch.rand(2, 1, 1, 24, 24, 24).unbind()
alike = (fixed + 0.1 * torch.rand_like(fixed)) / 1.1
seen = {}
for factor in (1, 10, 255):
    for kernel in ("gaussian", "b-spline"):
        loss = GlobalMutualInformationLoss(kernel_type=kernel)
        pair = seen[kernel, factor] = [float(loss(image * factor, fixed * factor)) for image in (alike, unrelated)]
        print("values from 0 to {:3}, {:8}: alike {:.4f}, unrelated {:.4f}".format(factor, kernel, *pair))
for factor in (1, 10, 255):
    alike, unrelated = seen["b-spline", factor]
    assert alike < -1.5 and abs(unrelated) < 0.01
assert seen["gaussian", 1][0] < -1.5
assert -0.3 < seen["gaussian", 10][0] < -0.05
assert abs(seen["gaussian", 255][0]) < 2e-3
PYTHON
