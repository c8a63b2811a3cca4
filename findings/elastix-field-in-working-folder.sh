#!/usr/bin/env bash
# itk-elastix 0.25.4: transformix_deformation_field returns the field, and also writes deformationField.nii into the folder that the
# program happens to run in, though no output folder was named. Two programs that run in one folder write to one file.
#
# seen: an empty folder holds deformationField.nii afterwards
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.2.6 itk-elastix==0.25.4
mkdir "$folder/empty"
cd "$folder/empty"
"$folder/venv/bin/python" - <<'PYTHON'
import os

import itk
import numpy as np

y, x = np.mgrid[:40, :40]
fixed, moving = (itk.image_from_array(np.exp(-((x - c) ** 2 + (y - 20) ** 2) / 60).astype(np.float32)) for c in (19, 21))
parameters = itk.ParameterObject.New()
parameters.AddParameterMap(parameters.GetDefaultParameterMap("translation", 1))
_, found = itk.elastix_registration_method(fixed, moving, parameter_object=parameters)
before = sorted(os.listdir())
field = itk.transformix_deformation_field(moving, found)
print("before", before, "after", sorted(os.listdir()), "field", itk.array_from_image(field).shape)
assert before == [] and sorted(os.listdir()) == ["deformationField.nii"]
PYTHON
echo "as seen"
