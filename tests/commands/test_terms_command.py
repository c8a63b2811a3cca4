"""`fastreg register` that uses landmarks: what is asked for, and what the report says of it."""

import json

import numpy as np
import pytest

from fastreg import cli, io
from tests.commands.test_start_command import FIXED, POINTS, anatomy, motion

pytest.importorskip("SimpleITK")
pytest.importorskip("matplotlib")

AWAY = (300.0, -200.0)
MATRIX = motion(4.0, (2.0, 3.0))  # of fixed to moving points, before AWAY


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Scans whose origins lie apart, and landmarks that are all 3 mm further along x than the scans say."""
    monkeypatch.chdir(tmp_path)
    grid = io.Geometry((44, 42), (1.0, 1.0), tuple(np.add((-6.0, -3.0), AWAY).tolist()), (1.0, 0, 0, 1.0))
    there = np.concatenate([MATRIX[:, :-1], MATRIX[:, -1:] + np.array(AWAY)[:, None]], 1)
    io.write_image("fixed.nii.gz", anatomy(FIXED, np.eye(2, 3)), FIXED)
    io.write_image("moving.nii.gz", anatomy(grid, there), grid)
    points = FIXED.centre + POINTS
    io.write_landmarks("fixed.csv", points)
    io.write_landmarks("moving.csv", points @ there[:, :-1].T + there[:, -1] + (3.0, 0.0))
    io.write_affine("start.tfm", np.concatenate([np.eye(2), np.array(AWAY)[:, None]], 1), FIXED.centre)


NO_PICTURE = ["--no-picture"]
LANDMARKS = ["--fixed-landmarks", "fixed.csv", "--moving-landmarks", "moving.csv"]


def run(*more):
    return cli.main(
        [
            "register",
            "fixed.nii.gz",
            "moving.nii.gz",
            "-o",
            "out",
            "--force",
            "--iterations",
            "30",
            *NO_PICTURE * ("--html" not in more),
            *more,
        ]
    )


def report():
    with open("out/report.json", encoding="utf-8") as stream:
        return json.load(stream)


@pytest.mark.parametrize("start", ["auto", "start.tfm"])
def test_landmarks_that_are_used(files, start, capsys):
    assert run(*LANDMARKS, "--start", start) == 0
    assert "used" not in report()["tre"]
    assert "landmark_weight" not in report()["parameters"]
    assert "used" not in capsys.readouterr().out
    assert report()["tre"]["after"]["mean"] > 2
    assert run(*LANDMARKS, "--start", start, "--use-landmarks", "1.0", "--html") == 0
    assert report()["tre"]["after"]["mean"] < 0.7
    assert report()["tre"]["used"] is True
    assert report()["parameters"]["landmark_weight"] == 1
    assert "used: no measure of accuracy" in capsys.readouterr().out
    with open("out/report.html", encoding="utf-8") as stream:
        assert "used: no measure of accuracy" in stream.read()


def test_symmetric_scans_exchanged(files):
    """On grids of their own, one of them cut, with weights: what is found the other way is the inverse that was written."""
    image, grid = io.read_image("moving.nii.gz")
    io.write_image(
        "moving.nii.gz",
        image[:, 6:],
        io.Geometry((38, 42), grid.spacing, tuple(grid.to_physical((0, 6))), grid.direction),
    )
    mask = np.ones(FIXED.shape, np.float32)
    mask[:6] = 0
    io.write_image("mask.nii.gz", mask, FIXED)
    ways = ["fixed.nii.gz", "moving.nii.gz"]
    more = ["--symmetric", "--iterations", "40", "--start", "masses", *NO_PICTURE]
    assert cli.main(["register", *ways, "-o", "there", *more, "--mask", "mask.nii.gz"]) == 0
    assert cli.main(["register", *ways[::-1], "-o", "back", *more, "--moving-mask", "mask.nii.gz"]) == 0
    with open("there/report.json", encoding="utf-8") as stream:
        told = json.load(stream)
    assert told["parameters"]["symmetric"] is True
    assert told["inverse"]["mean_voxels"] < 1e-3
    found, _ = io.read_displacement("there/inverse_displacement.nii.gz")
    other, at = io.read_displacement("back/displacement.nii.gz")
    assert at.shape == (42, 38)
    inner = (..., slice(8, -8), slice(8, -8))
    assert (found - other)[inner].norm(dim=1).mean() < 0.15


def test_channels_on_grids_of_their_own(files, capsys):
    """The scans say nothing; a channel of other voxels, after the same start, and maps of it with noise beside."""
    fixed, moving = (io.read_image(f"{name}.nii.gz") for name in ("fixed", "moving"))
    coarse = io.Geometry((25, 20), (1.7, 2.0), FIXED.origin, FIXED.direction)
    blank = np.random.default_rng(0)
    for name, (image, grid) in (("fixed", fixed), ("moving", moving)):
        io.write_image(f"{name}_noise.nii.gz", blank.random(image.shape).astype(np.float32), grid)
    io.write_image("fixed_coarse.nii.gz", anatomy(coarse, np.eye(2, 3)), coarse)
    for name, (image, grid) in (("fixed", fixed), ("moving", moving)):
        maps = np.stack([image, -image], -1)[None]
        io.write_volumes(f"{name}_maps.nrrd", io.Volumes(maps, grid))

    def tre(*more):
        command = [
            "register",
            "fixed_noise.nii.gz",
            "moving_noise.nii.gz",
            "-o",
            "out",
            "--force",
            "--start",
            "start.tfm",
        ]
        assert cli.main([*command, *LANDMARKS, *NO_PICTURE, *more]) == 0
        return report()["tre"]["after"]["mean"]

    # the landmarks of these files lie 3 mm off
    assert abs(tre("--channel", "fixed_coarse.nii.gz", "moving.nii.gz", "20") - 3) < 0.5
    assert report()["parameters"]["channel_weights"] == [1, 20]
    assert abs(tre("--channel", "fixed_maps.nrrd", "moving_maps.nrrd", "20") - 3) < 0.3
    assert report()["parameters"]["channel_weights"] == [1, 10, 10]
    assert tre() > 3.5
    capsys.readouterr()
    for words, line in (
        (("fixed.nii.gz", "moving.nii.gz", "much"), "the weight must be a number of at least 0"),
        (("fixed.nii.gz", "moving_maps.nrrd", "1"), "must have as many numbers a voxel, got 1 and 2"),
        (("moving.nii.gz", "moving.nii.gz", "1"), "moving.nii.gz: does not reach the fixed image"),
        (("fixed.nii.gz", "fixed.nii.gz", "1"), "fixed.nii.gz: does not reach the fixed image where"),
        (("fixed.nii.gz", "nothing.nii.gz", "1"), "nothing.nii.gz"),
    ):
        assert run("--start", "start.tfm", "--channel", *words) == 2
        assert line in capsys.readouterr().err


def test_labels_that_are_used(files, capsys):
    """Discs about the landmarks, those of the moving image as far off as these."""
    _, grid = io.read_image("moving.nii.gz")
    points = FIXED.centre + POINTS
    there = points @ MATRIX[:, :-1].T + MATRIX[:, -1] + AWAY + (3.0, 0.0)
    for name, on, centres in (("fixed", FIXED, points), ("moving", grid, there)):
        at = on.to_physical(np.stack(np.meshgrid(*[np.arange(n) for n in on.shape], indexing="ij"), -1))
        near = np.linalg.norm(at[..., None, :] - centres, axis=-1)
        io.write_image(
            f"{name}_labels.nii.gz", ((near.argmin(-1) + 1) * (near.min(-1) < 4)).astype(np.uint8), on
        )
    files_of = ["--fixed-labels", "fixed_labels.nii.gz", "--moving-labels", "moving_labels.nii.gz"]
    for start in ("auto", "start.tfm"):
        assert run(*files_of, "--start", start) == 0
        before = report()["dice"]
        assert "used" not in before
        assert run(*files_of, "--start", start, "--use-labels", "5") == 0
        after = report()["dice"]
        assert after["used"] is True
        assert report()["parameters"]["label_weight"] == 5
        assert after["after"]["mean"] > 0.85 > 0.7 > before["after"]["mean"]
        assert "used: no measure of accuracy" in capsys.readouterr().out
    assert run(*files_of, "--start", "start.tfm", "--use-labels", "0") == 0
    assert "used" not in report()["dice"]
    assert run("--use-labels", "1") == 2
    assert "--use-labels goes with --fixed-labels and --moving-labels" in capsys.readouterr().err
    io.write_image("moving_labels.nii.gz", np.full(grid.shape, 9, np.uint8), grid)
    assert run(*files_of, "--use-labels", "1") == 2
    assert "no label is in both images" in capsys.readouterr().err


def test_nothing_to_use(files, capsys):
    assert run("--use-landmarks", "1") == 2
    assert "--use-landmarks goes with --fixed-landmarks and --moving-landmarks" in capsys.readouterr().err
    net = ["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", "--method", "voxelmorph"]
    assert cli.main([*net, *LANDMARKS, "--use-landmarks", "1"]) == 2
    assert "--use-landmarks is a parameter of fastreg.register" in capsys.readouterr().err
    assert run(*LANDMARKS, "--use-landmarks", "-1") == 2
