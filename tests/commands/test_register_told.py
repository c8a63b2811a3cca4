"""What `fastreg register` tells of itself: a line a level, the parameters in its report, channels that it cannot take."""

import json

import numpy as np
import pytest

from fastreg import cli, io

pytest.importorskip("SimpleITK")

GRID = io.Geometry.of((48, 52), (1.0, 1.0))


def blob(y, x):
    return sum(
        h * np.exp(-((np.indices(GRID.shape) - np.array([y + a, x + b])[:, None, None]) ** 2).sum(0) / 40)
        for h, a, b in ((100, 0, 0), (60, 9, -8), (80, -9, 10))
    ).astype(np.float32)


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    io.write_image("fixed.nii.gz", blob(24, 26), GRID)
    io.write_image("moving.nii.gz", blob(25, 28), GRID)


def run(*more):
    images = ["fixed.nii.gz", "moving.nii.gz"]
    return cli.main(["register", *images, "-o", "out", "--force", "--no-picture", *map(str, more)])


def told():
    with open("out/report.json", encoding="utf-8") as stream:
        return json.load(stream)


@pytest.mark.parametrize(
    ("plan", "lines"),
    [("0,1", ("left out", "1 iteration, loss")), ("2,0", ("2 iterations, loss", "left out"))],
)
def test_a_level_that_is_left_out_has_a_line(capsys, plan, lines):
    assert run("--levels", 2, "--iterations", plan) == 0
    out = capsys.readouterr().out.splitlines()
    for level, line in enumerate(lines):
        assert out[1 + level].startswith(f"level {level + 1} of 2: {line}")


def test_no_iteration_at_all_is_told(capsys):
    assert run("--iterations", 0, "--quiet") == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "fastreg: warning: no level had an iteration: the displacement is that of the start\n"
    assert run("--iterations", 0, "--affine") == 0
    assert "no level" not in capsys.readouterr().err  # the affine part has its own


@pytest.mark.parametrize(("more", "plan"), [((), [50, 50, 20, 0]), (("--iterations", 2), 2)])
def test_the_report_says_what_a_preset_stands_for(more, plan):
    assert run("--preset", "fast", *more) == 0
    parameters = told()["parameters"]
    assert (parameters["preset"], parameters["iterations"], parameters["search_range"]) == ("fast", plan, 0)


@pytest.mark.parametrize(("asked", "why"), [("auto", "bright and dark parts"), ("lcc", "asked for")])
def test_why_a_similarity_was_taken(asked, why):
    assert run("--iterations", 2, "--similarity", asked) == 0
    assert told()["similarity"]["why"].startswith(why)


def test_channels_of_any_numbers():
    """A small range on a large offset is no constant."""
    for name, image in (("fixed", blob(24, 26)), ("moving", blob(25, 28))):
        io.write_image(f"{name}_large.nii.gz", 2**30 + image.astype(np.int32), GRID)
        io.write_image(f"{name}_plain.nii.gz", image.astype(np.int32), GRID)
    found = []
    for kind in ("large", "plain"):
        assert run("--channel", f"fixed_{kind}.nii.gz", f"moving_{kind}.nii.gz", 3, "--iterations", 20) == 0
        found.append(io.read_displacement("out/displacement.nii.gz")[0])
    assert (found[0] - found[1]).abs().max() < 0.01


def test_a_channel_that_ends_early_is_told(capsys):
    half = io.Geometry.of((48, 26), (1.0, 1.0))
    io.write_image("half.nii.gz", blob(24, 26)[:, :26], half)
    assert run("--channel", "half.nii.gz", "moving.nii.gz", 1, "--iterations", 1) == 0
    assert (
        "half.nii.gz: covers 50 % of the fixed image; beyond it its border goes on" in capsys.readouterr().err
    )
