"""Checks that FASTREG_DATA holds the scans as bench/real.py, bench/settings.py and the experiments read them.

    FASTREG_DATA=... python -m bench.data

A line a file. Exit status: 0 all there and as they should be, 1 something is not, 2 no such folder. docs/data.md says
where the scans come from.
"""

import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

IMAGE, LABELS, POINTS = "image", "labels", "points"
PEOPLE = ("0004", "0006", "0007", "0011", "0012")
SUBJECTS = 15
# File -> array -> what it is; arrays of images and labels are (z, y, x), all of one shape; images of `images` (n, z, y, x).
FILES = {
    "lungct_dirlab4dct_case1": {
        **{k: IMAGE for k in ("fixed", "moving")},
        **{k: POINTS for k in ("fixed_lm", "moving_lm", "moving_lm_refined")},
    },
    "brainmr_vxm": {"fixed": IMAGE, "moving": IMAGE, "fixed_seg": LABELS, "moving_seg": LABELS},
    "spinalmr_t1t2_sct": {"t1": IMAGE, "t2": IMAGE, "t1_seg": LABELS, "t2_seg": LABELS},
    "lungmr_proton": {
        **{f"img_{p}": IMAGE for p in PEOPLE},
        **{f"{kind}_{p}": LABELS for kind in ("lung", "lobe") for p in PEOPLE},
    },
    "hippocampusmr_msd04": {"images": IMAGE, "segs": LABELS},
}


def faults(name, data):
    """What is not as it should be, in words."""
    found = [f"no {key}" for key in (*FILES[name], "spacing", "meta") if key not in data]
    if found:
        return found
    spacing = data["spacing"]
    if spacing.shape != (3,) or not (np.isfinite(spacing) & (spacing > 0)).all():
        found.append("spacing must be 3 numbers above 0, (z, y, x)")
    try:
        if not isinstance(json.loads(str(data["meta"])), dict):
            raise ValueError
    except ValueError:
        found.append("meta must be a JSON object, as a string")
    arrays = {key: data[key] for key in FILES[name]}
    ndim = 4 if name == "hippocampusmr_msd04" else 3
    voxels = {key: a for key, a in arrays.items() if FILES[name][key] != POINTS}
    first, shape = next((key, a.shape) for key, a in voxels.items())
    if len(shape) != ndim or (ndim == 4 and shape[0] < SUBJECTS):
        found.append(
            f"{first} must have {f'{SUBJECTS} images and ' * (ndim == 4)}{ndim} axes, has shape {shape}"
        )
    for key, a in voxels.items():
        if a.shape != shape:
            found.append(f"{key} must have the shape {shape} of {first}, has {a.shape}")
        if FILES[name][key] == LABELS and a.dtype.kind not in "iub":
            found.append(f"{key} must be whole numbers, is {a.dtype}")
        if a.dtype.kind == "f" and not np.isfinite(a).all():
            found.append(f"{key} must be finite")
    points = {key: a for key, a in arrays.items() if FILES[name][key] == POINTS}
    for key, a in points.items():
        if a.ndim != 2 or a.shape[1] != 3 or a.shape != next(iter(points.values())).shape:
            found.append(f"{key} must be (P, 3), a row for each of {next(iter(points))}, has shape {a.shape}")
        elif len(shape) == 3 and not ((a >= -0.5) & (a <= np.array(shape) - 0.5)).all():
            found.append(f"{key} must be voxels (z, y, x), counted from 0, and some lie outside of {shape}")
    return found


def main():
    folder = os.environ.get("FASTREG_DATA")
    if not folder or not Path(folder).is_dir():
        print("bench.data: FASTREG_DATA must name the folder with the scans (NAME.npz)", file=sys.stderr)
        return 2
    wrong = 0
    for name in FILES:
        path = Path(folder) / f"{name}.npz"
        try:
            with np.load(path) as data:
                said = faults(name, {key: data[key] for key in data.files})
        except FileNotFoundError:
            said = ["not there"]
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            said = [f"cannot be read: {error}"]
        print(f"{path.name}: {'; '.join(said) or 'as it should be'}")
        wrong += bool(said)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
