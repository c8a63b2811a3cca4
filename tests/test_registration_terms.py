"""What `register` minimises beside similarity and smoothness."""

import pytest
import torch

import fastreg
from fastreg import metrics
from fastreg._affine import Side, around, halves
from fastreg._labels import Labels
from fastreg._terms import Landmarks
from fastreg.registration import _level, register
from tests.test_registration import bump, pair, texture

SHAPE = (56, 60)
GENERATOR = torch.Generator().manual_seed(1)
POINTS = 12 + 32 * torch.rand(8, 2, generator=GENERATOR, dtype=torch.float64)
BLANK = torch.zeros(1, 1, *SHAPE)
QUICK = {"iterations": 40}


def moved_by(u, points=POINTS):
    return metrics.move_points(points, u)


def tre(u, fixed, moving):
    return metrics.tre(metrics.move_points(fixed, u), moving, 1.0).mean


@pytest.mark.parametrize("transform", ["dense", "velocity", "bspline"])
def test_landmarks_alone_move_an_image_smoothly(transform):
    """Blank images: nothing but the points. Few of them move what lies between them."""
    u = bump(SHAPE, (5.0, -4.0))
    found = register(BLANK, BLANK, landmarks=(POINTS, moved_by(u)), transform=transform).displacement
    assert tre(found, POINTS, moved_by(u)) < 0.1 * tre(0 * u, POINTS, moved_by(u))
    among = (..., slice(16, 40), slice(16, 40))
    assert (found - u)[among].norm(dim=1).mean() < 0.3 * u[among].norm(dim=1).mean()
    assert metrics.folding(found) == 0
    assert (found[..., 1:, :] - found[..., :-1, :]).abs().max() < 1


@pytest.mark.parametrize("transform", ["dense", "velocity", "bspline", "rigid", "affine"])
def test_landmarks_are_honoured_after_an_affine_part(transform):
    matrix = torch.tensor([[[0.995, 0.0998, -5.0], [-0.0998, 0.995, 6.0]]])
    u = fastreg.affine_displacement(matrix, SHAPE)
    linear = transform in ("rigid", "affine")
    result = register(
        BLANK, BLANK, landmarks=(POINTS, moved_by(u)), transform=transform, affine=not linear, levels=2
    )
    assert tre(result.displacement, POINTS, moved_by(u)) < 0.5
    torch.testing.assert_close(
        result.affine, matrix, atol=0.6 if transform == "affine" or not linear else 0.3, rtol=0
    )


def test_landmarks_after_a_start():
    """What the start has done is not asked for again, whether it is a matrix or a displacement."""
    matrix = torch.tensor([[[0.9, 0.2, -5.0], [-0.2, 1.1, 4.0]]])
    lie = fastreg.affine_displacement(matrix, SHAPE)
    u = fastreg.compose(lie, bump(SHAPE, (2.0, -2.0)))
    for start in (matrix, lie):
        found = register(BLANK, BLANK, start=start, landmarks=(POINTS, moved_by(u))).displacement
        assert tre(found, POINTS, moved_by(u)) < 0.3
        inner = (..., slice(10, -10), slice(10, -10))
        assert (found - u)[inner].norm(dim=1).mean() < 0.5 * (lie - u)[inner].norm(dim=1).mean()


def test_landmarks_help_where_images_say_little():
    """Texture that repeats every 8 voxels, moved by 7: a descent ends at the wrong stripe."""
    x = torch.arange(80.0)
    wave = (torch.sin(x * torch.pi / 4) * torch.ones(48, 1))[None, None]
    fixed, moving = wave, wave.roll(7, -1)
    points = torch.tensor([[12.0, 20], [36.0, 20], [12.0, 50], [36.0, 50], [24.0, 35]])
    truth = torch.tensor([0.0, 7.0])
    alone = register(fixed, moving, **QUICK).displacement
    found = register(fixed, moving, landmarks=(points, points + truth), **QUICK).displacement
    middle = (0, 1, slice(14, 34), slice(22, 48))
    assert (alone[middle] - 7).abs().mean() > 4
    assert (found[middle] - 7).abs().mean() < 0.7


def test_one_wrong_pair_among_landmarks_is_let_go_of():
    fixed, moving, u = pair(SHAPE, (2.0, -2.0))
    right = moved_by(u)
    wrong = right.clone()
    wrong[3] += torch.tensor([20.0, 15.0])
    others = [k for k in range(len(right)) if k != 3]
    plain, spoilt = (
        register(fixed, moving, landmarks=(POINTS, m), regularization=2.0, **QUICK).displacement
        for m in (right, wrong)
    )
    assert tre(spoilt, POINTS[others], right[others]) < tre(plain, POINTS[others], right[others]) + 0.2
    assert tre(spoilt, POINTS[3:4], right[3:4]) < 2
    assert metrics.folding(spoilt) == 0


def test_landmarks_in_mm():
    """The size of a voxel is nothing but a unit (but for the search, which is in mm), the weight a share of the image's size; thick voxels count as much as they are."""
    fixed, moving, u = pair(SHAPE, (2.0, -2.0))
    target = moved_by(u) + torch.tensor([0.5, -0.5])
    stiff = {**QUICK, "regularization": 2.0}  # roundings grow less
    one, other = (
        register(
            fixed, moving, spacing=s, landmarks=(POINTS, target), landmark_weight=0.1, search_range=0, **stiff
        ).displacement
        for s in (1.0, 7.0)
    )
    torch.testing.assert_close(one, other, atol=2e-2, rtol=0)
    term = Landmarks(POINTS, target, SHAPE, (2.0, 1.0), 1.0)
    here = metrics.move_points(POINTS, u)
    expected = (here - target) * torch.tensor([2.0, 1.0])
    torch.testing.assert_close(term.apart(u.double(), (2.0, 1.0), None), expected, atol=1e-6, rtol=0)


def test_gradient_of_landmarks():
    u = torch.randn(1, 2, 7, 9, dtype=torch.float64, generator=GENERATOR, requires_grad=True)
    matrix = torch.tensor([[1.1, 0.2, 3.0], [-0.1, 0.9, 1.0]], dtype=torch.float64, requires_grad=True)
    # far less than the median from where it is: the limit, which has no gradient, stays at its least
    near = moved_by(torch.zeros(1, 2, *SHAPE)) @ matrix.detach()[:, :2].T + matrix.detach()[:, 2]
    term = Landmarks(POINTS, near, SHAPE, (1.0, 1.0), 3.0)
    assert torch.autograd.gradcheck(lambda u, m: term(0.1 * u, (2.0, 3.0), m), (u, matrix))
    sparse = torch.autograd.grad(term(u, (8.0, 8.0)), u)[0]
    assert 0 < (sparse != 0).sum() <= 2 * 4 * len(POINTS)


def test_weight_of_landmarks():
    fixed, moving, u = pair(SHAPE, (2.0, -2.0))
    target = moved_by(u) + torch.tensor([1.5, 1.5])
    alone = register(fixed, moving, **QUICK)
    unused = register(fixed, moving, landmarks=(POINTS, target), landmark_weight=0, **QUICK)
    assert torch.equal(alone.displacement, unused.displacement)
    apart = [
        tre(
            register(fixed, moving, landmarks=(POINTS, target), landmark_weight=w, **QUICK).displacement,
            POINTS,
            target,
        )
        for w in (0.0, 0.05, 1.0)
    ]
    assert apart[0] > apart[1] + 0.1 > apart[2] + 0.2


NAN = POINTS.clone()
NAN[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("kind", "match", "options"),
    [
        (TypeError, "landmarks must be a pair, fixed and moving points, got Tensor", {"landmarks": POINTS}),
        (TypeError, "landmarks must be a pair, fixed and moving points, got 3 of them", {"landmarks": (POINTS,) * 3}),
        (TypeError, "the fixed landmarks must be a tensor, got list", {"landmarks": ([[1, 2]], POINTS)}),
        (ValueError, r"the moving landmarks must have shape \(K, 2\)", {"landmarks": (POINTS, POINTS.T)}),
        (ValueError, "the fixed landmarks must have shape", {"landmarks": (POINTS[:0], POINTS[:0])}),
        (ValueError, "landmarks must be as many in moving as in fixed, got 8 and 7", {"landmarks": (POINTS, POINTS[1:])}),
        (ValueError, "the moving landmarks must be finite", {"landmarks": (POINTS, NAN)}),
        (TypeError, "the fixed landmarks must be dense and real", {"landmarks": (POINTS + 1j, POINTS)}),
        (ValueError, r"the fixed landmarks must lie in the image .*got 8 of 8 outside", {"landmarks": (POINTS + 60, POINTS)}),
        (ValueError, r"the moving landmarks must lie in the image", {"landmarks": (POINTS, POINTS * 10)}),
        (ValueError, "landmarks must be given with landmark_weight", {"landmark_weight": 2.0}),
        (ValueError, "landmark_weight must be a number >= 0", {"landmarks": (POINTS, POINTS), "landmark_weight": -1.0}),
    ],
)  # fmt: skip
def test_errors_of_landmarks(kind, match, options):
    image = texture(SHAPE)
    with pytest.raises(kind, match=f"fastreg::register: {match}"):
        register(image, image, **options)


def test_landmarks_lead_instead_of_the_search():
    """Which compares the images alone, and would undo what the points say of large motion."""
    image = texture(SHAPE)
    options = {"spacing": 2.0, "iterations": 1}
    assert "range_mm" in register(image, image, **options).discrete  # it was searched
    found = register(image, image, landmarks=(POINTS, POINTS), **options).discrete
    assert found == {"used": False, "why": "landmarks or labels lead"}
    asked = register(image, image, landmarks=(POINTS, POINTS), search_range=10, **options)
    assert asked.discrete["why"] == "asked for"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("transform", ["dense", "velocity", "bspline"])
def test_a_level_with_terms_stays_on_the_device_of_the_images(transform, symmetric):
    """On the meta device, which as a GPU takes no tensor of the CPU; the matrices of the affine part come from there."""
    with pytest.raises(RuntimeError):
        torch.empty(2, device="meta") + torch.empty(2)
    points, maps = torch.empty(5, 2, device="meta"), torch.empty(1, 6, 28, 30, device="meta")
    both = Landmarks(points, points, SHAPE, (1.0, 1.0), 1.0), Labels(maps, maps, SHAPE, (1.0, 1.0), 1.0)
    matrix = torch.eye(2, 3, dtype=torch.float64)
    terms = *both, *(term.laid(matrix, matrix) for term in both)
    image = torch.empty(1, 6, *SHAPE, device="meta")
    images = image, image, None, image[:, :1]
    field = torch.zeros(1, 2, 1, 1, device="meta")
    where = (28, 30), (1.0, 1.0), field, transform, None, "lcc", 9, 2.0, None if symmetric else matrix
    level = _level(images, *where, terms, symmetric, [1 / 6] * 6)
    parameter = level.transform.parameter()
    (gradient,) = torch.autograd.grad(level.objective(parameter)[0], parameter)
    assert gradient.device.type == "meta"
    assert {t.device.type for t in halves(images, matrix[None], matrix[None])} == {"meta"}
    assert around(image[:, :2], matrix[None]).device.type == "meta"
    level = _level(images, *where, terms, symmetric, [1 / 6] * 6)
    side = Side(level.moving, None, level.similarity, level.terms)
    assert side(matrix, (1.0, 1.0)).device.type == "meta"
