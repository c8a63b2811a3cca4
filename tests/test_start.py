import math

import numpy as np
import pytest
import torch

import fastreg
from fastreg import _start, metrics
from fastreg.io import Geometry
from fastreg.registration import register

RNG = np.random.default_rng(3)
BLOBS = list(
    zip(RNG.uniform(-0.35, 0.35, (60, 3)), RNG.uniform(0.04, 0.09, 60), RNG.uniform(0.3, 1, 60), strict=True)
)
FLAT = Geometry((48, 44), (1.3, 1.0), (5.0, -7.0), (0.8, -0.6, 0.6, 0.8))


def turn(degrees, axis=None):
    """In the plane, or about an axis."""
    a = math.radians(degrees)
    if axis is None:
        return np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    x, y, z = np.array(axis) / np.linalg.norm(axis) * a
    skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(skew).numpy()


def anatomy(grid, rotation=None, shift=0.0, about=None, size=60.0, invert=False):
    """Blobs around `about` (None: the grid's centre), turned and shifted in mm: x -> rotation (x - about) + about + shift."""
    nd = grid.nd
    about = grid.centre if about is None else about
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij"), -1)
    p = (grid.to_physical(index) - about - shift) @ (np.eye(nd) if rotation is None else rotation)
    image = sum(a * np.exp(-((p - c[:nd] * size) ** 2).sum(-1) / (2 * (w * size) ** 2)) for c, w, a in BLOBS)
    return torch.from_numpy(np.exp(-2 * image) if invert else image).float()[None, None]


def apart(found, expected, grid):
    """mm between two maps at the corners of what is in the middle of a grid."""
    points = grid.centre + 15 * np.stack(np.meshgrid(*[(-1, 1)] * grid.nd), -1).reshape(-1, grid.nd)
    return np.abs(points @ (found - expected)[:, :-1].T + (found - expected)[:, -1]).max()


def motion(grid, rotation, shift):
    """Of `anatomy`, (nd, nd + 1)."""
    return np.concatenate([rotation, (grid.centre + shift - rotation @ grid.centre)[:, None]], 1)


def moved_to(grid, origin):
    return Geometry(grid.size, grid.spacing, tuple(float(v) for v in origin), grid.direction)


@pytest.mark.parametrize("by", [(0, 0), (0.5, -1), (20, -12), (500, 300)])
@pytest.mark.parametrize("invert", [False, True], ids=["alike", "inverted"])
def test_auto_leaves_what_lies_well_and_brings_what_does_not(by, invert):
    away = moved_to(FLAT, np.add(FLAT.origin, by))
    images = anatomy(FLAT), anatomy(away, invert=invert)
    start = _start.find("auto", FLAT, away, *images)
    if np.linalg.norm(by) < 5:
        assert start is None
    else:
        assert start.matrix[:, -1] == pytest.approx(by, abs=3)
        assert start.moves == pytest.approx(np.linalg.norm(by), abs=3)
    assert _start.find("none", FLAT, away, *images) is None
    centres = _start.find("centres", FLAT, away, *images)
    assert centres.matrix[:, -1] == pytest.approx(by, abs=1e-9)


def test_auto_leaves_half_a_scan_where_it_lies():
    """Its centre lies elsewhere, and so does its mass."""
    whole = anatomy(FLAT)
    half = Geometry((48, 20), FLAT.spacing, tuple(FLAT.to_physical((24, 0))), FLAT.direction)
    assert _start.find("auto", FLAT, half, whole, whole[:, :, 24:]) is None
    assert _start.find("auto", half, FLAT, whole[:, :, 24:], whole) is None


def test_masses_lie_above_the_background_and_inside_the_masks():
    image = torch.full((1, 1, 44, 48), -1000.0)
    image[..., 10:20, 30:36] = 200
    moved = image.roll((9, -11), (2, 3))
    by = _start.find("masses", FLAT, FLAT, image, moved).matrix[:, -1]
    assert by == pytest.approx(FLAT.matrix @ (9, -11), abs=1.5)
    block = image.clone()
    block[..., 35:44, 2:12] = 3000  # a table that is in one of them
    mask = torch.ones_like(image)
    mask[..., 33:, :14] = 0
    by = _start.find("masses", FLAT, FLAT, block, moved, mask).matrix[:, -1]
    assert by == pytest.approx(FLAT.matrix @ (9, -11), abs=1.5)


@pytest.mark.parametrize(
    ("grid", "rotation"),
    [
        pytest.param(FLAT, turn(90), id="90"),
        pytest.param(FLAT, turn(-60), id="60"),
        pytest.param(FLAT, turn(180), id="180"),
        pytest.param(
            Geometry.of((18, 26, 24), (2.6, 1.8, 2.0)),
            turn(75, (1, 0.4, -0.5)),
            id="3d",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_search_finds_a_turn_and_rigid_refines_it(grid, rotation):
    shift = np.array([4.0, -3.0, 2.0])[: grid.nd]
    fixed, moving = anatomy(grid, size=36), anatomy(grid, rotation, shift, size=36)
    start = _start.find("search", grid, grid, fixed, moving)
    truth = motion(grid, rotation, shift)
    assert apart(start.matrix, truth, grid) < 2.5
    laid = fastreg.io.resample(moving, grid.before(start.matrix), grid, outside=None)[0]
    result = register(fixed, laid, spacing=grid.spacing_zyx, transform="rigid")
    found = grid.map_to_physical(start.after(result.affine)[0].numpy())
    assert apart(found, truth, grid) < 0.3
    assert np.abs(found[:, :-1] @ found[:, :-1].T - np.eye(grid.nd)).max() < 1e-5


def test_rigid_is_a_rotation_in_mm_where_voxels_are_not_cubes():
    grid = Geometry.of((40, 60), (1.5, 1.0))
    rotation, shift = turn(12), np.array([2.0, -1.5])
    result = register(anatomy(grid), anatomy(grid, rotation, shift), spacing=(1.5, 1.0), transform="rigid")
    found = grid.map_to_physical(result.affine[0].double().numpy())
    assert np.abs(found[:, :-1] @ found[:, :-1].T - np.eye(2)).max() < 1e-5
    assert apart(found, motion(grid, rotation, shift), grid) < 0.2
    assert torch.equal(result.displacement, fastreg.affine_displacement(result.affine, (40, 60)))
    assert {level["transform"] for level in result.levels} == {"rigid"}
    assert result.velocity is None


def test_affine_alone_is_the_affine_part():
    fixed, moving = anatomy(FLAT), anatomy(FLAT, turn(5), np.array([2.0, 1.0]))
    alone = register(fixed, moving, transform="affine", iterations=100)
    part = register(fixed, moving, affine=True, iterations=0)
    torch.testing.assert_close(alone.displacement, part.displacement)


@pytest.mark.parametrize("transform", ["rigid", "affine"])
def test_a_matrix_takes_as_few_iterations_as_one_asks_for(transform):
    """Too few to tell whether the loss is flat."""
    fixed, moving = anatomy(FLAT), anatomy(FLAT, shift=np.array([2.0, 1.0]))
    for n in (0, 1, 9, 12):
        levels = register(fixed, moving, transform=transform, iterations=n).levels
        assert {level["iterations"] for level in levels} == {n}


def test_what_follows_a_start_comes_before_it():
    """A point goes through what was found, and then through the start."""
    grid = Geometry.of((18, 26, 24), (2.6, 1.8, 2.0))
    start = _start.Start("given", grid, motion(grid, turn(50, (1, 2, 3)), np.array([4.0, 5.0, -6.0])))
    found = torch.tensor([[[1.1, 0.2, 0.0, 3.0], [0.0, 0.9, -0.3, -2.0], [0.1, 0.0, 1.0, 1.0]]]).double()
    p = np.array([7.0, 11.0, 5.0])
    between = found[0, :, :3].numpy() @ p + found[0, :, 3].numpy()
    there = start.matrix[:, :3] @ grid.to_physical(between) + start.matrix[:, 3]
    whole = start.after(found)[0].numpy()
    assert whole[:, :3] @ p + whole[:, 3] == pytest.approx(grid.to_index(there))
    u = start.then(fastreg.affine_displacement(found.float(), grid.shape))
    assert p + u[0, :, 7, 11, 5].numpy() == pytest.approx(grid.to_index(there), abs=1e-4)


@pytest.mark.parametrize("transform", ["dense", "velocity", "affine"])
@pytest.mark.parametrize("kind", ["matrix", "field"])
def test_the_motion_holds_the_start(kind, transform):
    grid = Geometry.of((44, 48), (1.0, 1.3))
    rotation, shift = turn(40), np.array([9.0, -6.0])
    fixed, moving = anatomy(grid), anatomy(grid, rotation, shift)
    near = motion(grid, turn(37), shift + 1)  # 3 degrees and a mm off
    start = torch.from_numpy(grid.map_to_index(near))[None].float()
    if kind == "field":
        start = fastreg.affine_displacement(start, grid.shape)
    result = register(
        fixed, moving, spacing=grid.spacing_zyx, start=start, transform=transform, iterations=40
    )
    assert result.start == "given"
    truth = torch.from_numpy(grid.map_to_index(motion(grid, rotation, shift)))[None].float()
    inner = (..., slice(12, -12), slice(12, -12))
    off = (result.displacement - fastreg.affine_displacement(truth, grid.shape))[inner].norm(dim=1)
    assert off.mean() < 0.3
    assert metrics.folding(result.displacement) == 0
    assert torch.equal(result.moved, fastreg.warp(moving, result.displacement))
    assert (result.affine is None) == (kind == "field")


def test_by_name_on_one_grid():
    image = anatomy(FLAT, size=30)
    away = image.roll(10, 3)
    result = register(image, away, start="auto", iterations=10)
    assert result.start == "masses"
    assert result.displacement[0, 1, 22, 24] == pytest.approx(10, abs=1)
    same = register(image, image, start="auto", iterations=3)
    assert same.start == "none"
    assert torch.equal(same.displacement, register(image, image, iterations=3).displacement)


IMAGE = torch.rand(1, 1, 8, 9)


@pytest.mark.parametrize(
    ("start", "match"),
    [
        ("center", "start must be 'auto' or .*, got 'center'"),
        (torch.zeros(1, 2, 3), "start must be invertible"),
        (torch.full((1, 2, 3), torch.nan), "start must be finite"),
        (torch.zeros(1, 2, 8, 8), r"start must have shape \(1, 2, 3\) or \(1, 2, 8, 9\), got \(1, 2, 8, 8\)"),
        (torch.eye(2, 3)[None] + 100, "start must lead into the moving image"),
    ],
)
def test_errors(start, match):
    with pytest.raises(ValueError, match=f"fastreg::register: {match}"):
        register(IMAGE, IMAGE, start=start)
    with pytest.raises(ValueError, match="affine must be False with transform 'rigid'"):
        register(IMAGE, IMAGE, transform="rigid", affine=True)
