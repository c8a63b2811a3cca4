#!/usr/bin/env bash
# nitransforms 25.1.0: DenseFieldTransform.map takes another way when all points of a call lie on voxels, and that way takes their
# indices as Python does: a point three voxels before the field is moved as the third from its end, one beyond its end is an
# IndexError. With one point between voxels in the same call, the same point stays where it is. And near the border the
# cubic spline of positions bends a motion that is the same everywhere.
#
# seen: a field of 10^3 voxels of 1 mm, each moved by 2 mm
#   at -3 alone: 9.0
#   at -3 beside a point at 4.5: -3.0
#   at 12 alone: IndexError
#   at 4.5: moved by 2.000; at 0.5: moved by 1.842
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.2.6 nibabel==5.4.2 scipy==1.15.3 nitransforms==25.1.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import nibabel
import nitransforms
import numpy as np
from nitransforms.nonlinear import DenseFieldTransform

assert nitransforms.__version__ == "25.1.0"
u = np.zeros((10, 10, 10, 3), np.float32)
u[..., 0] = 2
transform = DenseFieldTransform(nibabel.Nifti1Image(u, np.eye(4)), is_deltas=True)


def moved(*x):
    return transform.map(np.array([[value, 1.0, 1.0] for value in x]))[:, 0]


alone, beside = moved(-3.0)[0], moved(-3.0, 4.5)[0]
print(f"at -3 alone: {alone}")
print(f"at -3 beside a point at 4.5: {beside}")
try:
    moved(12.0)
    beyond = "no error"
except IndexError:
    beyond = "IndexError"
print(f"at 12 alone: {beyond}")
middle, border = moved(4.5)[0] - 4.5, moved(0.5)[0] - 0.5
print(f"at 4.5: moved by {middle:.3f}; at 0.5: moved by {border:.3f}")
assert (alone, beside, beyond) == (9.0, -3.0, "IndexError")
assert abs(middle - 2) < 1e-3 and 1.8 < border < 1.9
PYTHON
