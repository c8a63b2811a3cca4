"""plastimatch: a B-spline registration's vector field."""

from recipe import main, run

COMMANDS = """[GLOBAL]
fixed={scene}/fixed.nii.gz
moving={scene}/moving.nii.gz
vf_out={out}/field.mha
img_out={out}/moved.nii.gz
img_out_type=float
default_value=0

[STAGE]
xform=bspline
optim=lbfgsb
metric=mse
max_its=30
grid_spac=25 25 25
res=1 1 1
"""


def make(scene, out):
    (out / "commands.txt").write_text(COMMANDS.format(scene=scene, out=out))
    run("plastimatch", "register", out / "commands.txt")


def use(scene, out, files):
    run(
        "plastimatch",
        "convert",
        "--input",
        scene / "moving.nii.gz",
        "--output-img",
        out / "moved.nii.gz",
        "--xf",
        files[0],
        "--fixed",
        scene / "fixed.nii.gz",
        "--interpolation",
        "linear",
        "--default-value",
        0,
        "--output-type",
        "float",
    )


main(make, use)
