import json
import math
from dataclasses import replace
from functools import wraps

import numpy as np
import pytest

from fastreg import cli, io
from fastreg.commands import register as command

sitk = pytest.importorskip("SimpleITK")
pytest.importorskip("matplotlib")

FIXED = io.Geometry((40, 36), (1.0, 1.2), (3.0, -8.0), (0.96, -0.28, 0.28, 0.96))
RNG = np.random.default_rng(3)
BLOBS = [*zip(RNG.uniform(-18, 18, (50, 2)), RNG.uniform(1.5, 4, 50), RNG.uniform(0.3, 1, 50), strict=True)]
POINTS = np.array([[-9.0, 3.0], [6.0, 8.0], [11.0, -4.0], [-2.0, -11.0], [1.0, 1.0]])
QUICK = ("--iterations", "30", "--quiet")


def anatomy(grid, matrix):
    """Blobs about the fixed image's centre, mapped by (2, 3), mm."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij"), -1)
    p = (grid.to_physical(index) - matrix[:, -1]) @ np.linalg.inv(matrix[:, :-1]).T - FIXED.centre
    image = 100 * sum(a * np.exp(-((p - c) ** 2).sum(-1) / (2 * w * w)) for c, w, a in BLOBS)
    return image.astype(np.float32)


def motion(degrees=0.0, shift=(0.0, 0.0)):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = np.array([[c, -s], [s, c]])
    return np.concatenate([turn, (FIXED.centre + shift - turn @ FIXED.centre)[:, None]], 1)


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """A function that writes fixed and moving, whose grid lies `away` mm off, and the landmarks of both."""
    monkeypatch.chdir(tmp_path)

    def make(matrix, away=(0.0, 0.0)):
        grid = io.Geometry((44, 42), (1.0, 1.0), tuple(np.add((-6.0, -3.0), away).tolist()), (1.0, 0, 0, 1.0))
        identity = np.eye(2, 3)
        io.write_image("fixed.nii.gz", anatomy(FIXED, identity), FIXED)
        io.write_image("moving.nii.gz", anatomy(grid, matrix), grid)
        points = FIXED.centre + POINTS
        io.write_landmarks("fixed.csv", points)
        io.write_landmarks("moving.csv", points @ matrix[:, :-1].T + matrix[:, -1])
        return grid

    return make


def run(*more, out="out"):
    landmarks = ["--fixed-landmarks", "fixed.csv", "--moving-landmarks", "moving.csv"]
    command = ["register", "fixed.nii.gz", "moving.nii.gz", "-o", out, *landmarks, *map(str, more)]
    assert cli.main(command) == 0
    with open(f"{out}/report.json", encoding="utf-8") as stream:
        return json.load(stream)


@pytest.mark.parametrize("away", [(30.0, 0.0), (-300.0, 400.0)], ids=["30mm", "500mm"])
def test_scans_of_different_origins_are_registered(pair, capsys, away):
    pair(motion(shift=away), away)
    report = run("--iterations", "30", "--affine")
    assert f"start: {report['start']['taken']} aligned, " in capsys.readouterr().out
    assert report["start"]["asked"] == "auto"
    assert report["start"]["mm"] == pytest.approx(np.linalg.norm(away), abs=4)
    assert report["tre"]["before"]["mean"] == pytest.approx(np.linalg.norm(away), abs=1e-3)
    assert report["tre"]["after"]["mean"] < 0.3
    assert report["overlap"] > 0.7
    assert report["overlap_after"] > 0.7
    # the files say it all: one interpolation of the moving scan by ITK gives what we wrote
    transform = sitk.DisplacementFieldTransform(
        sitk.ReadImage("out/displacement.nii.gz", sitk.sitkVectorFloat64)
    )
    fixed, moving = (sitk.ReadImage(f"{name}.nii.gz") for name in ("fixed", "moving"))
    theirs = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, -1.0))
    ours = io.read_image("out/moved.nii.gz")[0]
    assert np.abs(theirs - ours)[theirs >= 0].max() < 0.02


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_a_matrix_alone_is_an_itk_transform(pair, kind):
    matrix = motion(8, (32.0, -1.0))
    if kind == "affine":
        matrix[:, :-1] = matrix[:, :-1] @ np.array([[1.08, 0.05], [0.0, 0.94]])
        matrix[:, -1] += FIXED.centre - (matrix @ np.append(FIXED.centre, 1)) + (32.0, -1.0)
    pair(matrix, (30.0, 0.0))
    report = run("--transform", kind, "--start", "centres", *QUICK)
    transform = sitk.ReadTransform("out/affine.tfm")
    wanted = {"rigid": "Euler2DTransform", "affine": "AffineTransform"}
    assert transform.GetName() == wanted[kind]
    assert report["affine"]["kind"] == kind
    found = np.array(report["affine"]["matrix_lps_mm"])
    for point in FIXED.centre + POINTS:
        there = transform.TransformPoint(point.tolist())
        assert np.allclose(there, found[:, :-1] @ point + found[:, -1], atol=1e-4)
        assert np.allclose(there, matrix[:, :-1] @ point + matrix[:, -1], atol=0.5)
    field = sitk.DisplacementFieldTransform(sitk.ReadImage("out/displacement.nii.gz", sitk.sitkVectorFloat64))
    inside = (FIXED.centre + np.array([2.0, 3.0])).tolist()
    assert np.allclose(field.TransformPoint(inside), transform.TransformPoint(inside), atol=1e-3)
    assert report["tre"]["after"]["mean"] < 0.3


def write_start(name, matrix):
    if name == "start.nii.gz":
        transform = sitk.AffineTransform(2)
        transform.SetMatrix(matrix[:, :-1].ravel().tolist())
        transform.SetTranslation(matrix[:, -1].tolist())
        grid = FIXED.size, FIXED.origin, FIXED.spacing, FIXED.direction
        sitk.WriteImage(sitk.TransformToDisplacementField(transform, sitk.sitkVectorFloat64, *grid), name)
    elif name == "composite.tfm":
        first = sitk.TranslationTransform(2, (-5.0, 4.0))
        second = sitk.AffineTransform(2)
        second.SetMatrix(matrix[:, :-1].ravel().tolist())
        second.SetTranslation((matrix[:, -1] - matrix[:, :-1] @ (-5.0, 4.0)).tolist())
        sitk.WriteTransform(sitk.CompositeTransform([second, first]), name)
    else:
        io.write_affine(name, matrix, np.array([1.0, 2.0]))


@pytest.mark.parametrize("name", ["start.tfm", "start.mat", "composite.tfm", "start.nii.gz"])
def test_a_start_from_a_file(pair, name):
    matrix = motion(50, (25.0, 10.0))
    pair(matrix, (25.0, 8.0))
    write_start(name, motion(47, (26.0, 9.0)))
    report = run("--start", name, *QUICK)
    assert report["start"]["taken"] == name
    assert report["start"]["mm"] == pytest.approx(np.hypot(26, 9), abs=3.0)
    assert report["tre"]["after"]["mean"] < 0.3


def test_a_result_is_a_start(pair):
    matrix = motion(10, (20.0, 5.0))
    pair(matrix, (20.0, 5.0))
    run("--transform", "rigid", *QUICK)
    report = run("--start", "out/affine.tfm", "--iterations", "0", "--quiet", out="again")
    assert report["tre"]["after"]["mean"] < 0.3
    again = run("--start", "out/displacement.nii.gz", "--iterations", "0", "--quiet", out="third")
    assert again["tre"]["after"]["mean"] == pytest.approx(report["tre"]["after"]["mean"], abs=1e-3)


def test_turned_by_a_right_angle(pair):
    matrix = motion(90, (3.0, -2.0))
    pair(matrix)
    report = run("--start", "search", "--transform", "rigid", *QUICK)
    assert report["start"]["degrees"] == pytest.approx(90, abs=3)
    assert report["tre"]["after"]["mean"] < 0.3


def test_auto_is_none_where_scans_lie_well(pair):
    pair(motion(3, (1.0, -1.0)))
    report = run(*QUICK)
    assert report["start"] == {"asked": "auto", "taken": "none", "mm": 0.0}
    run("--start", "none", *QUICK, out="none")
    assert np.array_equal(*(io.read_displacement(f"{out}/displacement.nii.gz")[0] for out in ("out", "none")))


def nowhere(name):
    io.write_affine(name, motion(0, (900.0, 0.0)), FIXED.centre)


def flat(name):
    transform = sitk.AffineTransform(2)
    transform.SetMatrix([1.0, 0.0, 1.0, 0.0])
    sitk.WriteTransform(transform, name)


@pytest.mark.parametrize(
    ("write", "name", "match"),
    [
        (
            None,
            "center",
            "--start must be one of auto, none, centres, masses, search or a file, got 'center'",
        ),
        (None, "fixed.csv", "fixed.csv: "),
        (None, "fixed.nii.gz", "fixed.nii.gz: "),
        (
            lambda n: sitk.WriteTransform(sitk.AffineTransform(3), n),
            "3d.tfm",
            "3d.tfm: transforms and images must have one dimension, got [3, 2]",
        ),
        (flat, "flat.tfm", "flat.tfm: must be invertible"),
        (nowhere, "far.tfm", "far.tfm: leads nowhere into the moving image"),
    ],
)
def test_bad_starts(pair, capsys, write, name, match):
    pair(motion())
    if write is not None:
        write(name)
    assert cli.main(["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", "--start", name]) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1


def test_a_start_is_not_a_nets(pair, capsys):
    pair(motion())
    command = ["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", "--method", "voxelmorph"]
    assert cli.main([*command, "--start", "masses"]) == 2
    assert "--start is a parameter of fastreg.register, not of --method" in capsys.readouterr().err


def test_a_motion_that_ran_away_is_told(pair, capsys, monkeypatch):
    pair(motion())
    found = command.register

    def runs_away(*images, **options):
        result = found(*images, **{**options, "iterations": 0})
        return replace(result, displacement=result.displacement + 25)

    monkeypatch.setattr(command, "register", wraps(found)(runs_away))
    run(*QUICK)
    told = capsys.readouterr().err
    assert "of the fixed one after the motion that was found, and " in told
    assert "% where it started: it has run away" in told


def test_one_slice_in_space_has_an_affine_part_in_space(tmp_path, monkeypatch):
    """Turned out of the axes' planes, 30 mm apart in the plane and 1 mm across it."""
    monkeypatch.chdir(tmp_path)
    turn = np.array([[0.8, 0.0, 0.6], [0.0, 1.0, 0.0], [-0.6, 0.0, 0.8]])
    step = turn @ (30.0, 4.0, 1.0)
    image = anatomy(FIXED, np.eye(2, 3))[None]
    for name, by in (("fixed", 0 * step), ("moving", step)):
        origin = tuple((np.array([5.0, 6.0, 7.0]) + by).tolist())
        grid = io.Geometry((*FIXED.size, 1), (*FIXED.spacing, 3.0), origin, tuple(turn.ravel().tolist()))
        io.write_image(f"{name}.nii.gz", image, grid)
    command = ["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", "--transform", "rigid", *QUICK]
    assert cli.main(command) == 0
    transform = sitk.ReadTransform("out/affine.tfm")
    assert transform.GetName() == "Euler3DTransform"
    point = np.array([20.0, 25.0, -3.0])
    assert np.allclose(transform.TransformPoint(point.tolist()) - point, step, atol=0.2)
