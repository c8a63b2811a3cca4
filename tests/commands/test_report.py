import numpy as np
import pytest
import torch

from fastreg import io, outcome, report

pytest.importorskip("matplotlib")

PANELS = 7


def oblique(nd, order, signs, angle=0.2):
    """Direction (x, y, z) whose array axes are permuted, flipped and turned a little."""
    matrix = np.zeros((nd, nd))
    matrix[order, range(nd)] = signs
    turn = np.eye(nd)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn @ matrix


def corner(geometry, towards):
    """A volume that is 1 in the octant of the patient named by the signs (x, y, z), 0 elsewhere."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in geometry.shape], indexing="ij"), -1)
    middle = geometry.to_physical((np.array(geometry.shape) - 1) / 2)
    away = (geometry.to_physical(index) - middle) * np.array(towards)
    return (away > 0).all(-1).astype(np.float32)


def figure(volume, geometry, u=None, determinant=None):
    u = np.zeros((geometry.nd, *volume.shape)) if u is None else u
    determinant = np.ones_like(volume) if determinant is None else determinant
    return report.draw(volume, np.zeros_like(volume), volume, u, determinant, geometry, title="title")


def seen(axes):
    """The panel as it is on the page: rows from top to bottom, columns from left to right."""
    array = np.asarray(axes.images[0].get_array())
    rows = 1 if axes.get_ylim()[0] > axes.get_ylim()[1] else -1
    return array[::rows]


@pytest.mark.parametrize(
    ("order", "signs"),
    [([0, 1, 2], [1, 1, 1]), ([0, 1, 2], [-1, -1, 1]), ([2, 0, 1], [1, -1, 1]), ([1, 2, 0], [-1, 1, -1])],
)
def test_planes_are_anatomical_whatever_the_array(order, signs):
    direction = oblique(3, order, signs)
    geometry = io.Geometry((20, 22, 24), (1.0, 1.1, 1.2), (5.0, 6.0, 7.0), tuple(direction.ravel()))
    left_front_head = corner(geometry, (1, -1, 1))
    drawn = figure(left_front_head, geometry)
    panels = drawn.axes[: 3 * PANELS : PANELS]

    def brightest(axes):
        image = seen(axes)
        half = [n // 2 for n in image.shape]
        quarters = {
            (v, h): image[half[0] * v : half[0] * (v + 1), half[1] * h : half[1] * (h + 1)].mean()
            for v in (0, 1)
            for h in (0, 1)
        }
        return max(quarters, key=quarters.get)

    axial, coronal, sagittal = (brightest(axes) for axes in panels)
    # The patient's left is on the right of the page, the front on top or left, the head on top.
    assert axial == (0, 1)
    assert coronal == (0, 1)
    assert sagittal == (0, 0)


def test_panels_have_the_proportions_of_the_body():
    geometry = io.Geometry.of((10, 30, 40), (5.0, 1.0, 2.0))
    drawn = figure(np.random.default_rng(0).random(geometry.shape), geometry)
    width, height = drawn.get_size_inches()
    for axes, (rows, columns) in zip(
        drawn.axes[: 3 * PANELS : PANELS], [(30, 80), (50, 80), (50, 30)], strict=True
    ):
        box = axes.get_position()
        assert box.height * height / (box.width * width) == pytest.approx(rows / columns)


def test_flipped_displacement_moves_the_grid_towards_the_same_side():
    shape = (8, 20, 24)
    plain = io.Geometry.of(shape, (1.0, 1.0, 1.0))
    flipped = io.Geometry(plain.size, plain.spacing, plain.origin, (-1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    volume = np.random.default_rng(0).random(shape)
    u = np.zeros((3, *shape))
    u[2, :, :, 6] = 3.0
    lines = []
    for geometry, turn in ((plain, 1), (flipped, -1)):
        axes = figure(volume[..., ::turn], geometry, turn * u[..., ::turn]).axes[5]
        lines.append(axes.collections[0].get_segments())
    for a, b in zip(*lines, strict=True):
        np.testing.assert_allclose(a, b)


@pytest.mark.parametrize("shape", [(6, 7), (40, 31), (5, 6, 7)])
def test_writes_png(tmp_path, shape):
    geometry = io.Geometry.of(shape, (10.0, 1.0, 1.0)[3 - len(shape) :])
    volume = np.random.default_rng(0).random(shape)
    determinant = np.ones(shape)
    determinant.flat[:4] = -0.5, 0.0, np.nan, 9.0
    unseen = np.where(volume > 0.8, np.nan, volume)
    arrays = (volume, unseen, unseen, np.zeros((len(shape), *shape)), determinant)
    report.write_picture(tmp_path / "p.png", *arrays, geometry, title="$\\frac$ 日本.nii → $")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_folding_is_named_and_marked():
    geometry = io.Geometry.of((8, 10, 10), (1.0, 1.0, 1.0))
    volume = torch.rand(8, 10, 10).numpy()
    determinant = np.ones(geometry.shape, np.float32)
    assert figure(volume, geometry).axes[-1].get_xlabel() == "no folding"
    determinant[:, 2:4] = -1
    drawn = figure(volume, geometry, determinant=determinant)
    assert drawn.axes[-1].get_xlabel() == "folding (≤ 0): 20 % of voxels"
    marks = np.ma.getdata(drawn.axes[PANELS - 1].images[1].get_array())
    assert (marks == 1).mean() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({"tre": {"before": {"mean": 3.0}, "after": {"mean": 3.2}}}, ["further apart than before: 3.00 -> 3.20 mm"]),
        ({"dice": {"before": {"mean": 0.789}, "after": {"mean": 0.776}}}, ["Dice 0.789 -> 0.776"]),
        ({"tre": {"before": {"mean": 3.0}, "after": {"mean": 3.01}}}, []),
        ({"tre": {"before": {"mean": 3.0}, "after": {"mean": 0.5}}, "dice": {"before": {"mean": 0.5}, "after": {"mean": 0.9}}}, []),
        ({}, []),
    ],
)  # fmt: skip
def test_scans_that_fit_less_well_than_before_are_told(scores, words):
    lines = outcome.worse(scores)
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))
