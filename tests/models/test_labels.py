"""Training by labels beside the images: the loss by its definition, every method, samples of files, bad input."""

import csv
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_models import BUILD, build, pair

from fastreg import cli, io, warp
from fastreg.data import Pairs, Preprocessing, find_pairs
from fastreg.io import Geometry, InputError
from fastreg.models import MODELS
from fastreg.training import Recipe, Sample, Training, checkpoint
from fastreg.training.labels import dice_loss


def labels_like(image, highest, seed=0):
    """Cubes of random labels, on the grid of an image."""
    draw = torch.Generator().manual_seed(seed)
    coarse = [(n + 3) // 4 for n in image.shape[2:]]
    labels = torch.randint(0, highest + 1, (image.shape[0], 1, *coarse), generator=draw)
    for axis in range(2, image.ndim):
        labels = labels.repeat_interleave(4, axis).narrow(axis, 0, image.shape[axis])
    return labels


def plain(fixed, moving, u):
    """The mean over labels of both images, label by label, in the mean over the batch."""
    losses = []
    for f, m, field in zip(fixed, moving, u, strict=True):
        shared = [k for k in range(1, 100) if (f == k).any() and (m == k).any()]
        for k in shared:
            a = (f == k).to(u)
            b = warp((m == k).to(u)[None], field[None], padding="zeros")[0]
            losses.append((1 - 2 * (a * b).sum() / (a.sum() + b.sum())) / len(shared))
    return sum(losses) / len(u)


@pytest.mark.parametrize("shape", [(18, 20), (8, 9, 12)])
def test_dice_loss_by_definition(shape):
    """More labels than are held at once; some in one image alone, which do not count."""
    image = torch.zeros(2, 1, *shape)
    fixed, moving = labels_like(image, 7), labels_like(image, 6, seed=1)
    fixed[1][fixed[1] == 3] = 0
    u = torch.randn(2, len(shape), *shape, dtype=torch.float64, requires_grad=True)
    ours, theirs = dice_loss(fixed, moving, u, ["a", "b"]), plain(fixed, moving, u)
    torch.testing.assert_close(ours, theirs)
    assert 0 < ours < 1
    torch.testing.assert_close(*(torch.autograd.grad(loss, u)[0] for loss in (ours, theirs)))
    same = dice_loss(fixed, fixed, torch.zeros_like(u), ["a", "b"])
    assert same == 0


class Shift(torch.nn.Module):
    """A displacement, the same everywhere, and nothing that tells where to."""

    def __init__(self):
        super().__init__()
        self.u = torch.nn.Parameter(torch.zeros(1, 2, 1, 1))

    def forward(self, fixed, moving):
        return self.u.expand(-1, -1, *fixed.shape[2:])

    def loss(self, fixed, moving, u):
        return 0 * u.sum()


def test_labels_alone_register():
    image = torch.zeros(1, 1, 24, 24)
    fixed = torch.zeros_like(image, dtype=torch.uint8)
    fixed[..., 6:14, 8:16] = 5
    sample = Sample("square", image, image, None, fixed, fixed.roll((2, -3), (2, 3)))
    training = Training(Shift(), [sample], Recipe(learning_rate=0.2, labels_weight=0.5))
    told = [training.advance() for _ in range(40)]
    assert told[0]["labels"] == pytest.approx(0.5 * (1 - 6 * 5 / 64))
    assert told[0]["loss"] == pytest.approx(told[0]["labels"])
    assert told[0]["images"] == 0
    assert told[-1]["labels"] < 0.1 * told[0]["labels"]
    torch.testing.assert_close(
        training.model.u.detach().flatten(), torch.tensor([2.0, -3.0]), rtol=0, atol=0.2
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_method_takes_labels(name):
    assert name in BUILD
    fixed, moving = pair(name, 2)
    maps = [labels_like(fixed, 2, seed).to(torch.uint8) for seed in (0, 1)]
    parts = (fixed, moving, *maps)
    samples = [
        Sample(f"pair {k}", f, m, None, a, b)
        for k, (f, m, a, b) in enumerate(zip(*(p.split(1) for p in parts), strict=True))
    ]
    recipe = Recipe(batch_size=2)
    told = [
        Training(build(name).train(), samples, replace(recipe, labels_weight=w)).advance() for w in (0.0, 3.0)
    ]
    assert "labels" not in told[0]
    assert 0 < told[1]["labels"] < 3
    assert told[1]["loss"] == pytest.approx(told[0]["loss"] + told[1]["labels"], rel=1e-4)
    assert told[1]["gradient"] != told[0]["gradient"]


def test_what_labels_must_be():
    image = torch.zeros(1, 1, 8, 8)
    maps = torch.ones_like(image, dtype=torch.long)
    for bad, error, message in (
        ({"moving_labels": None}, ValueError, "one has no moving_labels, which labels_weight asks for"),
        (
            {"fixed_labels": image},
            TypeError,
            "fixed_labels of one must be integer or bool, got torch.float32",
        ),
        ({"fixed_labels": maps[..., 1:]}, ValueError, r"must have shape \(1, 1, 8, 8\), got \(1, 1, 8, 7\)"),
        ({"fixed_labels": 2 * maps}, ValueError, "no label but 0 is in both images of one"),
    ):
        options = {"fixed_labels": maps, "moving_labels": maps, **bad}
        training = Training(Shift(), [Sample("one", image, image, **options)], Recipe(labels_weight=1.0))
        with pytest.raises(error, match=message):
            training.advance()
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="labels_weight must be a number of at least 0"):
            Training(Shift(), [Sample("one", image, image)], Recipe(labels_weight=weight))


# Of files

GRID = Geometry.of((20, 24), (1.0, 1.5))
TINY = ["--method", "voxelmorph", "--set", "encoder=2,2,2,2", "--set", "decoder=2,2,2,2,2,2"]


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("SimpleITK")
    data = tmp_path / "data"
    for part in ("images", "labels"):
        (data / part).mkdir(parents=True)
    rows, columns = np.mgrid[:20, :24]
    for k, (y, x) in enumerate(((9, 10), (11, 13))):
        away = (rows - y) ** 2 + (columns - x) ** 2
        io.write_image(data / "images" / f"s{k}.nii.gz", np.exp(-away / 30).astype(np.float32), GRID)
        labels = np.where(away < 9, 70_000, np.where(away < 40, 3, 0)).astype(np.int32)
        io.write_image(data / "labels" / f"s{k}.nii.gz", labels, GRID)
    return data


def train(pairs, out, *more):
    options = ["--steps", "2", "--validate-every", "1", "--threads", "1", "--quiet"]
    return cli.main(["train", *TINY, "--pairs", str(pairs), "-o", str(out), *options, *more])


def rows(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_labels_of_files_lie_on_the_nets_grid(folder):
    pairs = find_pairs(folder)
    (sample, _) = Pairs(pairs, Preprocessing(crop=((2, 18), (None, None))), labels=True)
    assert sample.fixed_labels.shape == sample.moving_labels.shape == sample.fixed.shape == (1, 1, 16, 24)
    for side in ("fixed", "moving"):
        array, _ = io.read_image(getattr(pairs[0], f"{side}_labels"), labels=True)
        assert np.array_equal(getattr(sample, f"{side}_labels")[0, 0].numpy(), array[2:18])
    (sample, _) = Pairs(pairs, Preprocessing(size=(10, 12)), labels=True)
    assert sample.fixed_labels.unique().tolist() == [0, 3, 70_000]
    (sample, _) = Pairs(pairs, Preprocessing())
    assert sample.fixed_labels is None


def test_labels_weight_of_the_command(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "run"
    assert train(folder, out, "--labels-weight", "0.5") == 0
    for table in ("log.csv", "validation.csv"):
        for row in rows(out / table):
            parts = {name: float(row[name]) for name in ("loss", "similarity", "regularity", "labels")}
            assert 0 < parts["labels"] < 0.5
            assert parts["loss"] == pytest.approx(sum(parts.values()) - parts["loss"], rel=1e-5)
    assert checkpoint.load(out / "last.pt")["recipe"]["labels_weight"] == 0.5
    capsys.readouterr()
    assert train(folder, out, "--resume", "--labels-weight", "0.1") == 2
    said = "was started with --labels-weight 0.5, and cannot be resumed with 0.1"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("weight", "message"),
    [("0.5", "s0.nii.gz has no labels, which a weight of labels asks for"), ("-1", "must be 0 or more"), ("nan", "must be 0 or more")],
)  # fmt: skip
def test_labels_that_are_missing_are_one_line(folder, tmp_path, capsys, weight, message):
    pytest.importorskip("matplotlib")
    table = tmp_path / "pairs.csv"
    images = [str(folder / "images" / f"s{k}.nii.gz") for k in (0, 1)]
    table.write_text(f"fixed,moving\n{','.join(images)}\n", encoding="utf-8")
    assert train(table, tmp_path / "deep" / "run", f"--labels-weight={weight}") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "deep").exists()
    with pytest.raises(InputError, match="has no labels"):
        Pairs(find_pairs(table), Preprocessing(), labels=True)
