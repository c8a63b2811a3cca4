#!/usr/bin/env bash
# SimpleITK 2.5.7: Warp(image, field) gives its result the size of the displacement field, but spacing 1, origin 0 and the
# identity as direction, whatever grid the field lies on. No error, no warning: on any grid that is not that one the result shows
# another part of the scan, at another scale. DisplacementFieldTransform with Resample, or all four arguments, do what is meant.
#
# seen:
#   field: size (20, 18, 16), spacing (2.0, 1.5, 3.0), origin (-10.0, 5.0, 40.0)
#   Warp:  size (20, 18, 16), spacing (1.0, 1.0, 1.0), origin (0.0, 0.0, 0.0)
#   off the image by 127.4 of 255 in the mean; with the four arguments by 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.2.6 simpleitk==2.5.7
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import SimpleITK as sitk

assert sitk.Version_VersionString() == "2.5.7"
values = np.random.default_rng(0).integers(0, 256, (16, 18, 20)).astype(np.float32)
image = sitk.GetImageFromArray(values)
image.SetSpacing((2.0, 1.5, 3.0))
image.SetOrigin((-10.0, 5.0, 40.0))
# No motion at all: the result should be the image.
field = sitk.GetImageFromArray(np.zeros((16, 18, 20, 3)), isVector=True)
field.CopyInformation(image)

warped = sitk.Warp(image, field)
told = sitk.Warp(
    image, field, outputSize=field.GetSize(), outputSpacing=field.GetSpacing(), outputOrigin=field.GetOrigin(),
    outputDirection=field.GetDirection(),
)
off, right = (float(np.abs(sitk.GetArrayFromImage(w) - values).mean()) for w in (warped, told))
print(f"field: size {field.GetSize()}, spacing {field.GetSpacing()}, origin {field.GetOrigin()}")
print(f"Warp:  size {warped.GetSize()}, spacing {warped.GetSpacing()}, origin {warped.GetOrigin()}")
print(f"off the image by {off:.1f} of 255 in the mean; with the four arguments by {right:.1f}")
assert warped.GetSize() == field.GetSize()
assert warped.GetSpacing() == (1.0, 1.0, 1.0) and warped.GetOrigin() == (0.0, 0.0, 0.0)
assert off > 50 and right == 0
PYTHON
