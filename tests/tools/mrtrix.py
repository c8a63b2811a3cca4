"""MRtrix3's programs: mrregister's warp, and its places beyond the image, which are NaN."""

from recipe import main, run


def make(scene, out):
    fixed, moving = scene / "fixed.nii.gz", scene / "moving.nii.gz"
    run(
        "mrregister",
        "-quiet",
        "-force",
        "-nthreads",
        1,
        "-type",
        "nonlinear",
        "-nl_niter",
        10,
        moving,
        fixed,
        "-nl_warp_full",
        out / "full.mif",
    )
    run(
        "warpconvert",
        "-quiet",
        "-force",
        out / "full.mif",
        "warpfull2deformation",
        out / "warp.nii.gz",
        "-template",
        fixed,
    )
    use(scene, out, [out / "warp.nii.gz"])


def use(scene, out, files):
    run(
        "mrtransform",
        "-quiet",
        "-force",
        "-nthreads",
        1,
        scene / "moving.nii.gz",
        out / "moved.nii.gz",
        "-warp",
        files[0],
        "-template",
        scene / "fixed.nii.gz",
        "-interp",
        "linear",
    )


main(make, use)
