"""greedy 1.4: a dense field, rounded to a tenth of a voxel as it does by default."""

from picsl_greedy import Greedy3D
from recipe import main


def greedy(*command):
    Greedy3D().execute(" ".join(map(str, command)))


def make(scene, out):
    pair = "-i", scene / "fixed.nii.gz", scene / "moving.nii.gz"
    greedy("-d 3 -m SSD -n 30x20", *pair, "-o", out / "warp.nii.gz", "-threads 1 -V 0")
    use(scene, out, [out / "warp.nii.gz"])


def use(scene, out, files):
    reslice = (
        "-rf",
        scene / "fixed.nii.gz",
        "-rm",
        scene / "moving.nii.gz",
        out / "moved.nii.gz",
        "-ri LINEAR",
    )
    greedy("-d 3 -threads 1 -V 0", *reslice, "-r", *files)


main(make, use)
