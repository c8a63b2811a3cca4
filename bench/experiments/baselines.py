"""Classical registration by other packages, as rows beside the nets: the tools of bench/registrars that this Python has."""

import sys
import tempfile
from pathlib import Path

import numpy as np

from bench import registrars
from fastreg import convert

BASELINES = {"SyN": "ANTs", "Demons": "Demons"}


def there(methods):
    """Of methods those that are baselines whose package is installed; says which are not."""
    wanted = [m for m in methods if m in BASELINES]
    found = registrars.found(None) if wanted else {}
    for name in wanted:
        if BASELINES[name] not in found:
            package = registrars.REGISTRARS[BASELINES[name]].distribution
            print(f"{name}: left out, {package} is not installed", flush=True)
    return [m for m in wanted if BASELINES[m] in found]


def displacement(name, fixed, moving, spacing, threads):
    """(what a baseline finds for images (1, 1, *spatial), (1, nd, *spatial) in voxels; columns of its row)."""
    import SimpleITK

    tool = registrars.REGISTRARS[BASELINES[name]]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{side}.nii.gz") for side in ("fixed", "moving")]
        for path, image in zip(paths, (fixed, moving), strict=True):
            array = np.ascontiguousarray(image[0, 0].cpu().numpy(), dtype=np.float32)
            volume = SimpleITK.GetImageFromArray(array)
            volume.SetSpacing([float(s) for s in spacing][::-1])
            SimpleITK.WriteImage(volume, str(path))
        files, used = registrars.run(BASELINES[name], sys.executable, *paths, Path(folder, "out"), threads)
        u, _ = convert.read_chain([str(f) for f in files], like=str(paths[0])).displacement()
    note = f"no net, {tool.distribution}, {tool.how}; CPU seconds over threads, of the whole process"
    return u.nan_to_num(0.0).float(), {"seconds_per_pair": f"{used.cpu / threads:.2f}", "note": note}
