"""fastreg register: a result that may be worse than nothing says so."""

import json
import math

import numpy as np
import pytest
import torch

import fastreg
from fastreg import _inconsistency, cli, evaluation, io, smooth
from fastreg.commands import _judging
from fastreg.commands import register as command
from fastreg.data import phantom
from fastreg.data.pairs import Case

pytest.importorskip("SimpleITK")

SHAPE = (56, 56, 80)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    p = phantom.thorax(SHAPE)
    grid = io.Geometry.of(SHAPE, p.spacing)
    fixed, moving = p.fixed[0, 0].numpy(), p.moving[0, 0].numpy()
    few, labels = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    few[20:23, 20:23, 20:23] = 1
    labels[12:28, 12:28, 12:20] = 1
    noise = torch.randn(1, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    blobs = smooth(noise, 2.0)[0, 0].numpy()
    images = {
        "fixed": fixed,
        "moving": moving,
        "few": few,
        "labels": labels,
        "blobs": blobs,
        "folded": np.abs(blobs),
        "noise": noise[0, 0].numpy(),
    }
    for name, image in images.items():
        io.write_image(folder / f"{name}.nii.gz", image, grid)
    return folder


def run(scans, out, *more, pair=("fixed", "moving")):
    files = [scans / f"{name}.nii.gz" for name in pair]
    assert (
        cli.main(
            [
                str(a)
                for a in (
                    "register",
                    *files,
                    "-o",
                    out,
                    "--no-picture",
                    "--start",
                    "none",
                    "--search-range",
                    0,
                    *more,
                )
            ]
        )
        == 0
    )
    with open(out / "report.json", encoding="utf-8") as stream:
        return json.load(stream)


def test_a_good_pair_is_ok(scans, tmp_path, capsys):
    report = run(scans, tmp_path / "out")
    said = capsys.readouterr()
    assert report["status"] == "ok"
    assert report["suspect"] == []
    assert report["similarity"]["after"] < report["similarity"]["before"]
    assert "warning" not in said.err
    assert "suspect" not in said.out
    assert "back again" in said.out
    assert "similarity  lcc" in said.out


def test_what_leads_elsewhere_is_suspect(scans, tmp_path, capsys):
    report = run(scans, tmp_path / "out", "--similarity", "lcc", "--regularization", 60)
    said = capsys.readouterr()
    assert report["status"] == "suspect"
    assert report["inconsistency"]["far"] > 0.2
    assert any("there and back" in line for line in report["suspect"])
    assert all(f"fastreg: warning: {line}" in said.err for line in report["suspect"])
    assert "status      suspect" in said.out
    assert "doubtful" in said.out


@pytest.mark.parametrize(
    ("more", "pair", "line"),
    [
        (
            ("--iterations", 1, "--mask", "few"),
            ("fixed", "moving"),
            "only 27 voxels of 250880 count in both images",
        ),
        (("--iterations", 1, "--similarity", "lcc"), ("blobs", "folded"), "correlate with different signs"),
        (("--iterations", 1), ("fixed", "noise"), "next to nothing in the same places"),
        (
            ("--fixed-labels", "labels", "--moving-labels", "labels"),
            ("fixed", "moving"),
            "labels overlap less than before",
        ),
    ],
    ids=["mask", "contrast", "noise", "labels"],
)
def test_why_it_is_suspect(scans, tmp_path, capsys, more, pair, line):
    more = [scans / f"{a}.nii.gz" if a in ("few", "labels") else a for a in more]
    report = run(scans, tmp_path / "out", *more, pair=pair)
    assert report["status"] == "suspect"
    assert any(line in reason for reason in report["suspect"])
    assert line in capsys.readouterr().err


def test_a_descent_that_makes_it_worse_is_suspect(scans):
    image = torch.rand(1, 1, 20, 22, 24, generator=torch.Generator().manual_seed(0))

    class Result:
        displacement = torch.full((1, 3, 20, 22, 24), 3.0)
        similarity = "mse"
        levels = ()

    told = []
    judged, off = _judging.judge(
        Result,
        (image, image),
        (None, None),
        (1.0, 1.0, 1.0),
        {"window": 9, "transform": "rigid"},
        {},
        told.append,
    )
    assert judged["before"] == 0 < judged["after"]
    assert off is None
    assert len(told) == 1
    assert told[0].startswith("the images are less alike than before, by mse: 0.0000 -> ")


@pytest.mark.parametrize("similarity", ["lcc", "mind", "mi", "mse"])
def test_images_that_are_alike_before_and_after_are_not_suspect(similarity):
    image = smooth(torch.rand(1, 1, 40, 44, generator=torch.Generator().manual_seed(0)), 2.0)

    class Result:
        displacement = torch.full((1, 2, 40, 44), 0.01)
        discrete = None
        levels = ()

    Result.similarity = similarity
    told = []
    parameters = {"window": 9, "transform": "rigid"}
    _judging.judge(Result, (image, image), (None, None), (1.0, 1.0), parameters, {}, told.append)
    assert told == []


def test_images_are_judged_where_something_was_sought():
    """Fine noise that is the same in both, and what is under it 3 voxels away: what the coarse level finds lays the noise elsewhere."""
    moving = textured(0, (96, 96))
    noise = torch.randn(moving.shape, generator=torch.Generator().manual_seed(9)) * moving.std()
    fixed = moving.roll(3, -1) + noise
    options = {"similarity": "lcc", "search_range": 0.0}
    for plan, suspect in (((60, 60, 0), False), ((60, 60, 1), True)):
        told, (alike, _) = judged(fixed, moving + noise, levels=3, iterations=plan, **options)
        assert (alike["after"] > alike["before"]) == suspect
        assert any("less alike" in line for line in told) == suspect


def textured(seed, shape=(72, 80)):
    generator = torch.Generator().manual_seed(seed)
    return sum(smooth(torch.randn(1, 1, *shape, generator=generator), s) * s for s in (2.0, 4.0, 8.0))


def judged(fixed, moving, used=(), **options):
    """What is told of what register found, and what it makes of the way back."""
    used = dict(used)
    result = fastreg.register(fixed, moving, **used, **options)
    parameters = {p.name: p.default for p in command.tunable() if p.name not in command.FLAGS}
    told = []
    judge = result, (fixed, moving), (None, None), (1.0, 1.0), parameters | options, used, told.append
    return told, _judging.judge(*judge)


def test_the_way_back_has_an_affine_part_where_the_way_there_had():
    moving = textured(0)
    turn = torch.tensor([[math.cos(0.4), -math.sin(0.4)], [math.sin(0.4), math.cos(0.4)]])
    centre = torch.tensor([35.5, 39.5])
    matrix = torch.cat([turn, (centre - turn @ centre)[:, None]], 1)[None]
    fixed = fastreg.warp(moving, None, affine=matrix, padding="border")
    told, (alike, off) = judged(fixed, moving, affine=True)
    assert alike["after"] < alike["before"]
    assert off.far < 0.1
    assert told == []


def test_the_way_back_knows_the_landmarks():
    """Stripes, which the images alone would lay on those beside them."""
    x = torch.arange(96.0)
    stripes = torch.sin(2 * math.pi * x / 12).expand(1, 1, 72, 96).contiguous()
    moving = stripes.roll(10, -1)
    points = torch.cartesian_prod(torch.arange(6.0, 70, 10), torch.arange(6.0, 80, 6))
    used = {"landmarks": (points, points + torch.tensor([0.0, 10.0]))}
    led = {"landmark_weight": 5.0, "similarity": "lcc"}
    _, (_, off) = judged(stripes, moving, used, **led)
    assert off.far < _inconsistency.SUSPECT
    away = {"landmarks": (points, points + torch.tensor([0.0, 80.0]))}
    assert "landmarks" in _inconsistency._back(used | led, (72, 96), (36, 48))
    assert _inconsistency._back(away, (72, 96), (36, 48)).keys() <= {"landmarks"}


def test_all_channels_that_count_are_judged():
    """The first says nothing."""
    moving, noise = textured(0), [textured(s) for s in (1, 2)]
    u = 5 * torch.sin(torch.linspace(0, math.pi, 80)).expand(1, 2, 72, 80)
    fixed = fastreg.warp(moving, u.contiguous(), padding="border")
    fixed, moving = torch.cat([noise[0], fixed], 1), torch.cat([noise[1], moving], 1)
    options = {"channel_weights": [0.02, 1.0], "similarity": "lcc"}
    told, (alike, off) = judged(fixed, moving, **options)
    assert alike["after"] < 0.9 * alike["before"] < 0
    assert off.far < 0.1
    assert told == []


def case(fixed, moving, names=None):
    grid = io.Geometry.of((50, 50, 50), (2.0, 2.0, 2.0))
    empty = np.zeros(grid.shape, np.float32)
    points = {"fixed_landmarks": fixed, "moving_landmarks": moving, "landmark_names": names}
    return Case("pair", empty, grid, empty, grid, **points)


def test_a_landmark_that_contradicts_its_neighbours_is_named():
    rng = np.random.default_rng(0)
    fixed = rng.uniform(0, 98, (40, 3))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    sliding = np.where(fixed[:, :1] > 50, [[0, 0, 20.0]], 0.0) + rng.normal(size=(40, 3))
    for moving in (fixed, fixed + 30, fixed @ turn, 1.3 * fixed, fixed + sliding, rng.permutation(fixed)):
        assert evaluation.contradictions(case(fixed, moving)) == []
    wrong = fixed + sliding
    wrong[11] += [0, 100, 0]
    (line,) = evaluation.contradictions(case(fixed, wrong))
    assert line.startswith("landmark pair 12 of 40 moves by ")
    names = tuple(f"P{i}" for i in range(40))
    assert "landmark pair 12 of 40 (P11)" in evaluation.contradictions(case(fixed, wrong, names))[0]
    assert evaluation.contradictions(case(fixed[:3], wrong[:3])) == []
