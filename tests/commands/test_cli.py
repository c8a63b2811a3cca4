import functools
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import fastreg
from fastreg import cli, io, metrics
from fastreg.commands import register as command
from fastreg.commands.demo import DEMO_OUTPUTS
from fastreg.data import find_pairs, phantom
from fastreg.outcome import OUTPUTS
from fastreg.registration import register

sitk = pytest.importorskip("SimpleITK")
pytest.importorskip("matplotlib")

FAST = ["--iterations", "2", "--levels", "1"]
TURN = (0.96, -0.28, 0.0, 0.28, 0.96, 0.0, 0.0, 0.0, -1.0)  # about z, and z upside down


def blobs(geometry, shift=(0.0, 0.0, 0.0), seed=0):
    """Smooth blobs, fixed in physical space but for the shift (mm), seen on a grid."""
    rng = np.random.default_rng(seed)
    nd = geometry.nd
    index = np.stack(np.meshgrid(*[np.arange(n) for n in geometry.shape], indexing="ij"), -1)
    points = geometry.to_physical(index) - np.array(shift[:nd])
    image = np.zeros(geometry.shape)
    for centre, width in zip(rng.uniform(0, 24, (40, 3)), rng.uniform(2, 4, 40), strict=True):
        image += np.exp(-((points - centre[:nd]) ** 2).sum(-1) / (2 * width**2))
    return (100 * image).astype(np.float32)


def volume(kind):
    """(fixed grid, moving grid) of a small pair."""
    if kind == "2d":
        return io.Geometry.of((24, 26), (1.0, 1.0)), io.Geometry(
            (26, 22), (0.9, 1.2), (-1.0, 0.0), (1.0, 0, 0, 1.0)
        )
    fixed = io.Geometry.of((16, 20, 24), (1.5, 1.2, 1.0))
    if kind == "same":
        return fixed, fixed
    return fixed, io.Geometry((22, 24, 14), (1.3, 1.1, 1.9), (1.5, -4.0, 24.0), TURN)


@pytest.fixture
def case(tmp_path):
    """A function that writes a small pair and gives its arguments: kind "same", "other" or "2d"."""

    def make(kind="other", shift=(1.5, 1.0, -1.0)):
        grids = volume(kind)
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        for name, grid, move in zip(("fixed", "moving"), grids, ((0, 0, 0), shift), strict=True):
            image = blobs(grid, move)
            io.write_image(folder / f"{name}.nii.gz", image, grid)
            labels = np.digitize(image, [60, 140]).astype(np.uint8)
            io.write_image(folder / f"{name}_labels.nii.gz", labels, grid)
            points = np.random.default_rng(1).uniform(6, 18, (12, 3)) + np.array(move)
            io.write_landmarks(folder / f"{name}.csv", points[:, : grid.nd])
        return folder

    return make


def run(folder, *more, out=None):
    out = folder.parent / "out" if out is None else out
    images = [str(folder / "fixed.nii.gz"), str(folder / "moving.nii.gz")]
    return cli.main(["register", *images, "-o", str(out), *FAST, *map(str, more)])


def extras(folder):
    options = []
    for which in ("fixed", "moving"):
        options += [f"--{which}-landmarks", folder / f"{which}.csv"]
        options += [f"--{which}-labels", folder / f"{which}_labels.nii.gz"]
    return options


def one_line(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("fastreg: error: ")
    return captured.err


@pytest.mark.parametrize("kind", ["same", "other", "2d"])
def test_register_writes_everything(case, tmp_path, capsys, kind):
    folder = case(kind)
    assert run(folder, *extras(folder)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "written to" in captured.out
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    out = tmp_path / "out"
    assert sorted(os.listdir(out)) == sorted({*OUTPUTS} - {"affine.tfm"})
    fixed_grid = volume(kind)[0]
    moved, own = io.read_image(out / "moved.nii.gz")
    assert own.matches(fixed_grid)
    assert moved.dtype == np.float32
    assert (out / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    # ITK moves the original image by our file as we did.
    field = sitk.ReadImage(str(out / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(field)
    for name, produced, interpolator in (
        ("moving", moved, sitk.sitkLinear),
        ("moving_labels", io.read_image(out / "moved_labels.nii.gz")[0], sitk.sitkNearestNeighbor),
    ):
        original = sitk.ReadImage(str(folder / f"{name}.nii.gz"))
        reference = sitk.ReadImage(str(folder / "fixed.nii.gz"))
        outside = float(sitk.GetArrayViewFromImage(original).min())
        arguments = (original, reference, transform, interpolator, outside, original.GetPixelID())
        expected = sitk.GetArrayFromImage(sitk.Resample(*arguments))
        if interpolator == sitk.sitkLinear:
            np.testing.assert_allclose(produced, expected, atol=1e-3 * np.ptp(expected), rtol=0)
        else:
            # A point half-way between two voxels may go to either.
            assert (produced != expected).mean() < 1e-2
            assert produced.dtype == np.uint8

    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["parameters"]["iterations"] == 2
    assert report["parameters"]["window"] == inspect.signature(register).parameters["window"].default
    assert [level["iterations"] for level in report["levels"]] == [2]
    assert report["versions"]["fastreg"] == fastreg.__version__
    assert report["peak_memory_mb"]["process"] > 0
    assert report["seconds_total"] > report["seconds"] > 0
    assert 0 <= report["folding"] <= 1
    assert report["sdlogj"] >= 0
    assert report["fixed"]["shape"] == list(fixed_grid.shape)
    assert (report["overlap"] == 1) == (kind == "same")
    nd = fixed_grid.nd
    assert report["tre"]["before"]["mean"] == pytest.approx(np.linalg.norm([1.5, 1.0, -1.0][:nd]), rel=1e-5)
    assert report["tre"]["before"]["sd"] == pytest.approx(0, abs=1e-5)
    assert set(report["tre"]["after"]) == set(metrics.TRE._fields)
    assert set(report["dice"]["after"]) == set(report["dice"]["before"]) == {"mean", "1", "2"}
    points = [io.read_landmarks(folder / f"{which}.csv", nd) for which in ("fixed", "moving")]
    after = [
        np.linalg.norm(np.subtract(transform.TransformPoint(p), q)) for p, q in zip(*points, strict=True)
    ]
    assert report["tre"]["after"]["mean"] == pytest.approx(np.mean(after), rel=1e-4)
    labels = [
        io.read_image(path)[0] for path in (folder / "fixed_labels.nii.gz", out / "moved_labels.nii.gz")
    ]
    expected = metrics.dice(*(torch.from_numpy(v) for v in labels))
    assert report["dice"]["after"]["mean"] == pytest.approx(expected.mean)


def test_register_registers(case, tmp_path):
    folder = case("other")
    images = [str(folder / f"{which}.nii.gz") for which in ("fixed", "moving")]
    options = ["-o", str(tmp_path / "out"), "--quiet", *map(str, extras(folder)), "--iterations", "40"]
    assert cli.main(["register", *images, *options]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["tre"]["after"]["mean"] < 0.5 * report["tre"]["before"]["mean"]
    assert report["dice"]["after"]["mean"] > report["dice"]["before"]["mean"]


def test_similarity_transform_and_affine(case, tmp_path):
    folder = case("same")
    options = ["--similarity", "mse", "--transform", "bspline", "--affine"]
    assert run(folder, *extras(folder), *options) == 0
    summary = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert summary["parameters"]["similarity"] == "mse"
    assert {level["transform"] for level in summary["levels"]} == {"affine", "bspline"}
    assert np.array(summary["affine_voxels_zyx"]).shape == (3, 4)
    assert summary["tre"]["after"]["mean"] < 0.5 * summary["tre"]["before"]["mean"]


def test_quiet_and_progress(case, capsys):
    folder = case("same")
    assert run(folder, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    pytest.importorskip("tqdm")
    assert run(folder, "--quiet", "--progress", "--force") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "level 1/1" in captured.err


def test_thick_slices(case, tmp_path):
    folder = case("same")
    grid = io.Geometry.of((8, 32, 32), (10.0, 1.0, 1.0))
    for which, move in (("fixed", 0), ("moving", 1)):
        io.write_image(folder / f"{which}.nii.gz", blobs(grid, (move,) * 3), grid)
    assert run(folder) == 0


def test_integer_images_and_mask(case, tmp_path, capsys):
    folder = case("same")
    grid = volume("same")[0]
    for which in ("fixed", "moving"):
        array = io.read_image(folder / f"{which}.nii.gz")[0]
        io.write_image(folder / f"{which}.nii.gz", (array - 1000).astype(np.int16), grid)
    mask = np.zeros(grid.shape, np.uint8)
    io.write_image(folder / "mask.nii.gz", mask, grid)
    assert run(folder, "--mask", folder / "mask.nii.gz") == 2
    assert "mask must be 0 or more everywhere, and more somewhere" in one_line(capsys)
    mask[4:12, 5:15, 6:20] = 1
    io.write_image(folder / "mask.nii.gz", mask.astype(bool), grid)
    assert run(folder, "--mask", folder / "mask.nii.gz") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["outside_value"] < -900


def test_existing_output_needs_force(case, tmp_path, capsys):
    folder = case("same")
    assert run(folder, *extras(folder)) == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert run(folder) == 2
    assert "already holds moved.nii.gz; give another folder, or --force to replace it" in one_line(capsys)
    assert run(folder, "--force") == 0
    # The labels of the earlier run would belong to another displacement.
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        {*OUTPUTS, "notes.txt"} - {"moved_labels.nii.gz", "affine.tfm"}
    )


def change(path, function):
    array, grid = io.read_image(path)
    io.write_image(path, *function(array, grid))


def constant(array, grid):
    return np.full_like(array, 3), grid


def not_finite(array, grid):
    array = array.copy()
    array[0, 0, :3] = np.nan
    return array, grid


def far_away(array, grid):
    return array, io.Geometry(grid.size, grid.spacing, (500.0, 0.0, 0.0), grid.direction)


def cropped(array, grid):
    return array[1:], io.Geometry(array[1:].shape[::-1], grid.spacing, grid.origin, grid.direction)


def shifted(array, grid):
    return array, io.Geometry(grid.size, grid.spacing, (1.0, 0.0, 0.0), grid.direction)


def flat(array, grid):
    return array[0], io.Geometry.of(array.shape[1:], grid.spacing_zyx[1:])


def halves(array, grid):
    return array.astype(np.float32) / 2, grid


def too_large(array, grid):
    return array.astype(np.float64) * 1e300, grid


def background(array, grid):
    return np.zeros_like(array), grid


LANDMARKS = ["--fixed-landmarks", "{}/fixed.csv", "--moving-landmarks", "{}/moving.csv"]
LABELS = ["--fixed-labels", "{}/fixed_labels.nii.gz", "--moving-labels", "{}/moving_labels.nii.gz"]
BAD = {
    "missing": (lambda d: (d / "fixed.nii.gz").unlink(), [], "fixed.nii.gz: no such file"),
    "corrupt": (lambda d: (d / "moving.nii.gz").write_bytes(b"x" * 999), [], "moving.nii.gz: not an image"),
    "truncated": (
        lambda d: (d / "moving.nii.gz").write_bytes((d / "moving.nii.gz").read_bytes()[:-900]),
        [],
        "moving.nii.gz: is NIfTI-1 that SimpleITK cannot read, or damaged",
    ),
    "constant": (
        lambda d: change(d / "fixed.nii.gz", constant),
        [],
        "must not be constant, got 3 everywhere",
    ),
    "nan": (lambda d: change(d / "moving.nii.gz", not_finite), [], "got NaN or infinity in 3 of 7680 voxels"),
    "apart": (
        lambda d: change(d / "moving.nii.gz", far_away),
        ["--start", "none"],
        "do not overlap in physical space",
    ),
    "dimensions": (
        lambda d: change(d / "fixed.nii.gz", flat),
        [],
        r"fixed.nii.gz is 2D and \S*moving.nii.gz is 3D",
    ),
    "one-landmarks": (lambda d: None, LANDMARKS[:2], "go together: --moving-landmarks is missing"),
    "one-labels": (lambda d: None, LABELS[2:], "go together: --fixed-labels is missing"),
    "csv-header": (lambda d: (d / "fixed.csv").write_text("1,2,3\n"), LANDMARKS, "the header must be x,y,z"),
    "csv-count": (
        lambda d: (d / "fixed.csv").write_text("x,y,z\n1,2,3\n"),
        LANDMARKS,
        r"fixed.csv holds 1 landmarks, \S*moving.csv holds 12",
    ),
    "csv-outside": (
        lambda d: (d / "fixed.csv").write_text("x,y,z\n" + "999,0,0\n" * 12),
        LANDMARKS,
        "fixed.csv: no landmark lies in the fixed image",
    ),
    "labels-size": (
        lambda d: change(d / "moving_labels.nii.gz", cropped),
        LABELS,
        r"must lie on the grid of \S*moving.nii.gz: 24x20x15 voxels .* against 24x20x16 voxels",
    ),
    "labels-origin": (
        lambda d: change(d / "fixed_labels.nii.gz", shifted),
        LABELS,
        r"fixed_labels.nii.gz: must lie on the grid of \S*fixed.nii.gz: it is 1 mm off at the corner",
    ),
    "labels-float": (
        lambda d: change(d / "fixed_labels.nii.gz", halves),
        LABELS,
        "labels must be whole numbers",
    ),
    "labels-empty": (
        lambda d: [change(d / f"{w}_labels.nii.gz", background) for w in ("fixed", "moving")],
        LABELS,
        "hold background only",
    ),
    "window": (lambda d: None, ["--window", "4"], "error: --window must be odd and positive, got 4"),
    "search-range": (
        lambda d: None,
        ["--search-range", "900"],
        "error: --search-range must be at most the longest side",
    ),
    "switch": (
        lambda d: None,
        ["--affine", "--transform", "rigid"],
        "error: --affine does not go with transform 'rigid'",
    ),
    "iterations": (
        lambda d: None,
        ["--iterations", "many"],
        "argument --iterations: invalid number value: 'many'",
    ),
    "threads": (lambda d: None, ["--threads", "0"], "--threads must be at least 1, got 0"),
    "range": (lambda d: change(d / "fixed.nii.gz", too_large), [], "fixed.nii.gz: must fit single precision"),
    "diverges": (
        lambda d: None,
        ["--regularization", "1e38"],
        "the loss must stay finite.*smaller --learning-rate",
    ),
    "meta": (lambda d: None, ["--device", "meta"], "device meta cannot be used: must be cpu or cuda"),
    "device": (lambda d: None, ["--device", "abacus"], "device abacus cannot be used: must be cpu or cuda"),
    "option": (lambda d: None, ["--wndow", "5"], "unrecognized arguments: --wndow 5"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("error")
def test_bad_input_is_one_line_and_no_output(case, tmp_path, capsys, kind):
    folder = case("same")
    spoil, options, match = BAD[kind]
    spoil(folder)
    capsys.readouterr()
    assert run(folder, "--quiet", *(option.format(folder) for option in options)) == 2
    assert re.search(match, one_line(capsys))
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.filterwarnings("error")
def test_small_range_on_a_large_offset(case, tmp_path):
    folder = case("same")
    for which in ("fixed", "moving"):
        change(folder / f"{which}.nii.gz", lambda a, g: (1e9 + 0.001 * a.astype(np.float64), g))
    assert run(folder) == 0
    assert np.ptp(io.read_image(tmp_path / "out" / "moved.nii.gz")[0]) > 0.05
    assert (
        json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["levels"][0]["loss_last"]
        < -0.1
    )


def test_output_must_not_replace_an_input(case, tmp_path, capsys):
    folder = case("same")
    (folder / "fixed.nii.gz").rename(folder / "moved.nii.gz")
    (folder / "fixed.nii.gz").symlink_to("moved.nii.gz")
    before = (folder / "moved.nii.gz").read_bytes()
    assert run(folder, "--force", out=folder) == 2
    assert "fixed.nii.gz: is an input, and an output would replace it" in one_line(capsys)
    assert (folder / "moved.nii.gz").read_bytes() == before


@pytest.mark.slow
def test_broken_pipe_at_the_end_is_no_failure(case, tmp_path):
    folder = case("same")
    images = [str(folder / f"{which}.nii.gz") for which in ("fixed", "moving")]
    command = [sys.executable, "-m", "fastreg", "register", *images, "-o", str(tmp_path / "out"), *FAST]
    read, write = os.pipe()
    os.close(read)
    for one in (command, [sys.executable, "-m", "fastreg", "info"]):
        done = subprocess.run(one, stdout=write, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b"")
    os.close(write)


def test_bad_output_places(case, tmp_path, capsys):
    folder = case("same")
    (tmp_path / "file").write_text("mine")
    for out, match in (
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "file" / "out", "not a directory"),
    ):
        assert run(folder, out=out) == 2
        assert match in one_line(capsys)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "in"]


@pytest.mark.parametrize(
    "arguments", [[], ["register"], ["nonsense"], ["register", "a", "b"], ["demo", "extra"]]
)
def test_bad_command_line(capsys, arguments):
    assert cli.main(arguments) == 2
    assert "--help)" in one_line(capsys)


def test_landmarks_outside_and_small_overlap_warn(case, capsys):
    folder = case("same")
    points = io.read_landmarks(folder / "fixed.csv", 3)
    points[:2] = 300
    io.write_landmarks(folder / "fixed.csv", points)
    change(
        folder / "moving.nii.gz", lambda a, g: (a, io.Geometry(g.size, g.spacing, (22.0, 0, 0), g.direction))
    )
    points = io.read_landmarks(folder / "moving.csv", 3) + np.array([22.0, 0, 0])
    io.write_landmarks(folder / "moving.csv", points)
    assert run(folder, "--start", "none", "--quiet", *extras(folder)[:2], *extras(folder)[4:6]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("2 of 12 landmarks lie outside the fixed image, and count")
    assert lines[1].endswith("the moving image covers only 8.3 % of the fixed one")
    assert any("too few to register by" in line for line in lines[2:])


@pytest.mark.parametrize("swapped", [False, True])
def test_landmarks_that_were_exchanged_are_told(case, capsys, swapped):
    folder = case("same")
    files = [folder / "fixed.csv", folder / "moving.csv"][:: -1 if swapped else 1]
    options = ["--fixed-landmarks", files[0], "--moving-landmarks", files[1]]
    assert run(folder, "--quiet", "--iterations", "40", *options) == 0
    told = capsys.readouterr().err
    if not swapped:
        assert told == ""
        return
    after, otherwise = map(
        float, re.search(r"are ([\d.]+) mm apart, and would be ([\d.]+) mm with", told).groups()
    )
    assert otherwise < math.dist((0, 0, 0), (1.5, 1.0, 1.0)) < after


@pytest.mark.parametrize("package", ["SimpleITK", "matplotlib.figure"])
def test_missing_extras_name_the_command(case, capsys, monkeypatch, package):
    folder = case("same")
    monkeypatch.setitem(sys.modules, package, None)
    assert run(folder) == 2
    assert f"needs {package.split('.')[0]}: pip install {package.split('.')[0]}; or in the clone" in one_line(
        capsys
    )


def test_no_picture_needs_nothing_to_draw_with(case, tmp_path, capsys, monkeypatch):
    folder = case("same")
    assert run(folder, "--no-picture", "--html") == 2
    assert "--html shows the picture" in one_line(capsys)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(folder, "--no-picture", "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert {"moved.nii.gz", "displacement.nii.gz", "report.json"} == {*os.listdir(tmp_path / "out")}


@pytest.mark.slow
def test_a_registration_imports_what_it_needs(case, tmp_path):
    """torch's compiler alone takes longer than a small registration."""
    folder = case("same")
    script = (
        "import gc, sys; from fastreg import cli; assert gc.isenabled()\n"
        "status = cli.main(sys.argv[1:])\n"
        "print(status, sorted({'torch._dynamo', 'triton', 'matplotlib', 'sympy', 'nibabel', 'pydicom'} & {*sys.modules}))"
    )
    options = ["-o", tmp_path / "out", "--no-picture", "--quiet", "--iterations", "2"]
    command = [
        sys.executable,
        "-c",
        script,
        "register",
        folder / "fixed.nii.gz",
        folder / "moving.nii.gz",
        *options,
    ]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"


def test_a_bar_that_was_asked_for_needs_tqdm(case, capsys, monkeypatch):
    folder = case("same")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert run(folder, "--progress", "--quiet") == 2
    assert "needs tqdm: pip install tqdm" in one_line(capsys)
    assert run(folder, "--quiet") == 0


def test_a_wrong_flag_points_to_its_own_help(capsys):
    assert cli.main(["register", "a", "b", "-o", "c", "--windw", "5"]) == 2
    assert "--windw 5; did you mean --window? (see fastreg register --help)" in one_line(capsys)
    assert cli.main(["register", "a", "b", "-o", "c", "--transform", "stiff"]) == 2
    assert "choose from" in (line := one_line(capsys))
    assert "(see fastreg register --help)" in line
    assert cli.main(["train", "-o", "c", "--sizes", "5"]) == 2
    assert "did you mean --size? (see fastreg train --help)" in one_line(capsys)


def test_help_shows_choices_and_defaults_as_one_types_them(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main(["register", "--help"])
    text = capsys.readouterr().out
    groups = ("the pairwise optimiser:", "a net on the pair alone:", "common:")
    assert sorted(groups, key=text.index) == list(groups)
    optimiser = text[text.index(groups[0]) : text.index(groups[1])]
    assert "--preset" in optimiser
    assert "--similarity {auto,lcc,mind,mi,mse}" in optimiser
    assert "--transform {dense,velocity,bspline,rigid,affine}" in optimiser
    for default in re.findall(r"\(default: (.*?)\)", optimiser):
        flag = default.split() if default.startswith("--") else ["--iterations", default]
        if "," in default or default.startswith("--"):
            args = cli._parser().parse_args(["register", "a", "b", "-o", "c", *flag])
            name = flag[0].removeprefix("--no-").removeprefix("--")
            assert getattr(args, name) == inspect.signature(register).parameters[name].default
    assert "100,100,60,30" in optimiser


@pytest.mark.parametrize("command", ["convert", "invert"])
def test_flags_that_say_nothing_of_a_transform_are_not_there(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert "--affine-source" in text
    assert "--landmarks-space" not in text
    assert "--nan" not in text


def test_without_a_terminal_a_line_a_level(case, capsys):
    assert run(case("same"), "--levels", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "registering: 24x20x16 voxels of 1 x 1.2 x 1.5 mm, cpu"
    for k in (1, 2):
        assert re.fullmatch(rf"level {k} of 2: 2 iterations, loss -[\d.]+, [\d.]+ s", lines[k])
    assert lines[-1].startswith("written to")


def test_the_bar_begins_with_a_level(case, capsys):
    pytest.importorskip("tqdm")
    assert run(case("same"), "--quiet", "--progress") == 0
    assert " 0it" not in capsys.readouterr().err


def test_every_parameter_of_register_has_its_flag():
    parameters = inspect.signature(register).parameters
    args = cli._parser().parse_args(["register", "a", "b", "-o", "c"])
    for name in parameters:
        if name == "start" or name not in command.GIVEN:
            assert not hasattr(args, name)  # so that the default is register's
            assert name in command.HELP
    several = cli._parser().parse_args(["register", "a", "b", "-o", "c", "--iterations", "30,20"])
    assert several.iterations == (30, 20)


def test_a_bug_keeps_its_traceback(case, tmp_path, monkeypatch):
    @functools.wraps(register)
    def broken(*args, **keywords):
        raise ValueError("something of ours")

    folder = case("same")
    monkeypatch.setattr(command, "register", broken)
    with pytest.raises(ValueError, match="something of ours"):
        run(folder)
    assert os.listdir(tmp_path) == ["in"]


ENDLESS = """
import functools, sys
from fastreg import cli
from fastreg.commands import register as command

real = command.register

@functools.wraps(real)
def register(*args, **keywords):
    while True:
        real(*args, **keywords)

command.register = register
sys.exit(cli.main(sys.argv[1:]))
"""


def start(folder, out):
    """A run that does not end by itself, once it iterates."""
    images = [str(folder / f"{which}.nii.gz") for which in ("fixed", "moving")]
    command = [sys.executable, "-c", ENDLESS, "register", *images, "-o", str(out), "--force", "--progress"]
    process = subprocess.Popen([*command, *FAST], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    seen = b""
    while b"level 1/" not in seen:
        piece = os.read(process.stderr.fileno(), 4096)
        assert piece, seen.decode()
        seen += piece
    return process


@pytest.mark.parametrize(
    ("number", "status", "before"),
    [
        pytest.param(signal.SIGINT, 130, False, id="int-new"),
        pytest.param(signal.SIGINT, 130, True, id="int-replaced", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, False, id="term-new", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, False, id="hup-new", marks=pytest.mark.slow),
    ],
)
def test_interrupted_run_leaves_no_trace(case, tmp_path, number, status, before):
    folder = case("same")
    out = tmp_path / "out"
    if before:
        assert run(folder) == 0
    earlier = {p.name: p.read_bytes() for p in out.iterdir()} if before else None
    process = start(folder, out)
    time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert b"Traceback" not in errors
    if number == signal.SIGINT:
        assert errors.decode().splitlines()[-1] == "fastreg: interrupted"
    if before:
        assert {p.name: p.read_bytes() for p in out.iterdir()} == earlier
    else:
        assert os.listdir(tmp_path) == ["in"]


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"fastreg     {fastreg.__version__}\n")
    assert torch.__version__ in text
    for op, row in fastreg.backends().items():
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [op]]
        assert all(implementation in line for implementation in row.values())


def test_module_runs():
    command = [sys.executable, "-m", "fastreg", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"fastreg {fastreg.__version__}\n"


def test_version_and_help(capsys):
    for arguments, word in ((["--version"], fastreg.__version__), (["register", "--help"], "--window")):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        assert word in capsys.readouterr().out


@pytest.fixture
def small_phantom(monkeypatch):
    thorax = phantom.thorax
    monkeypatch.setattr(phantom, "thorax", lambda: thorax((28, 28, 40)))


def test_a_file_that_is_called_like_a_parameter_keeps_its_name(case, tmp_path, capsys):
    fixed = str(case("same") / "fixed.nii.gz")
    for name in ("levels 4.nii", "search_range.nii"):
        arguments = ["register", fixed, str(tmp_path / name), "--levels", "2", "--search-range", "0"]
        assert cli.main([*arguments, "-o", str(tmp_path / "out")]) == 2
        assert f"{name}: no such file" in one_line(capsys)


def test_demo_judges(small_phantom, tmp_path, capsys, monkeypatch):
    assert cli.main(["demo", *FAST]) == 1
    text = capsys.readouterr().out
    assert "near the wall, mm" in text
    assert "missed: tre_after" in text
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(phantom, "failures", lambda score: [])
    assert cli.main(["demo", *FAST, "--search-range", "0", "--quiet"]) == 0
    told = capsys.readouterr()
    # What so few iterations do to the landmarks is told all the same.
    assert told.out == ""
    assert "fastreg: warning: landmarks are further apart than before" in told.err
    assert all(line.startswith("fastreg: warning: ") for line in told.err.splitlines())


def test_demo_output_can_be_registered_again(small_phantom, tmp_path, capsys):
    out = tmp_path / "demo"
    assert cli.main(["demo", "-o", str(out), *FAST]) == 1
    assert sorted(os.listdir(out)) == sorted({*DEMO_OUTPUTS} - {"affine.tfm"})
    options = []
    for which in ("fixed", "moving"):
        options += [f"--{which}-landmarks", str(out / f"{which}_landmarks.csv")]
        options += [f"--{which}-labels", str(out / f"{which}_labels.nii.gz")]
    (pair,) = find_pairs(out / "pairs.csv")
    assert [pair.fixed_landmarks, pair.fixed_labels, pair.moving_landmarks, pair.moving_labels] == options[
        1::2
    ]
    images = [str(out / "fixed.nii.gz"), str(out / "moving.nii.gz")]
    assert cli.main(["register", *images, "-o", str(tmp_path / "again"), *options, *FAST]) == 0
    first, second = (
        json.loads((tmp_path / d / "report.json").read_text(encoding="utf-8")) for d in ("demo", "again")
    )
    assert second["tre"]["after"]["mean"] == pytest.approx(first["tre"]["after"]["mean"], rel=1e-3)
    assert second["dice"]["after"] == pytest.approx(first["dice"]["after"], rel=1e-3)
