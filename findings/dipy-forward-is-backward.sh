#!/usr/bin/env bash
# dipy 1.12.1: of the map that SymmetricDiffeomorphicRegistration.optimize returns, `backward` is the field that moves the moving
# image onto the static one, and get_forward_field() returns it too; the attribute `forward` leads the other way. Who takes
# mapping.forward, as the name says, moves the image away.
#
# seen: a blob that lies 3.1 voxels further along x in the moving image, at its centre
#   mapping.forward -3.0, mapping.backward 3.0, get_forward_field() 3.0
#   mean difference: not moved 0.034, by transform 0.004, by forward 0.063, by backward 0.004
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.2.6 scipy==1.15.3 dipy==1.12.1
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging

import dipy
import numpy as np
from dipy.align.imwarp import SymmetricDiffeomorphicRegistration
from dipy.align.metrics import SSDMetric
from scipy.ndimage import map_coordinates

logging.getLogger("dipy").setLevel(logging.ERROR)
assert dipy.__version__ == "1.12.1"
x, y, z = np.meshgrid(*[np.linspace(-1, 1, 32)] * 3, indexing="ij")
static = np.exp(-4 * (x**2 + y**2 + z**2))
moving = np.exp(-4 * ((x - 0.2) ** 2 + y**2 + z**2))
registration = SymmetricDiffeomorphicRegistration(SSDMetric(3), [30, 20, 10])
registration.verbosity = 0
mapping = registration.optimize(static, moving)


def off(image):
    return np.abs(image - static).mean()


def by(field):
    return map_coordinates(moving, np.indices(static.shape) + np.moveaxis(field, -1, 0), order=1, mode="nearest")


fields = mapping.forward, mapping.backward, mapping.get_forward_field()
middle = [float(field[16, 16, 16, 0]) for field in fields]
print("mapping.forward {:.1f}, mapping.backward {:.1f}, get_forward_field() {:.1f}".format(*middle))
results = off(moving), off(mapping.transform(moving)), off(by(mapping.forward)), off(by(mapping.backward))
print("mean difference: not moved {:.3f}, by transform {:.3f}, by forward {:.3f}, by backward {:.3f}".format(*results))
assert middle[0] < -2 and middle[1] > 2 and middle[2] == middle[1]
assert results[2] > 1.5 * results[0] and results[3] < 0.3 * results[0] and results[1] < 0.3 * results[0]
PYTHON
