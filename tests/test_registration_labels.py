import pytest
import torch

import fastreg
from fastreg import metrics
from fastreg._labels import Labels, labels_of
from fastreg.registration import register
from tests.test_registration import texture

SHAPE = (56, 60)
BLANK = torch.zeros(1, 1, *SHAPE)
QUICK = {"iterations": 40}


def discs(*places, shape=SHAPE):
    """(y, x, radius, label)"""
    y, x = torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij")
    out = torch.zeros(1, 1, *shape, dtype=torch.int64)
    for b, a, radius, label in places:
        out[0, 0][(y - b) ** 2 + (x - a) ** 2 < radius**2] = label
    return out


FIXED = discs((18, 20, 7, 3), (38, 40, 3.5, 5), (40, 14, 4, 8))
MOVING = discs((20, 24, 8, 3), (35, 43, 3.5, 5), (6, 50, 4, 9))  # 8 and 9 have no other


def dice(u, fixed=FIXED, moving=MOVING):
    moved = fastreg.warp(moving.float(), u, mode="nearest", padding="border").long()
    return metrics.dice(fixed, moved, (3, 5)).per_label


@pytest.mark.parametrize("transform", ["dense", "velocity", "bspline", "affine"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_labels_alone_move_an_image(transform, symmetric):
    """Blank images. Both labels come to lie on each other, a small one as a large one; those without another pull nothing."""
    options = {"transform": transform, "symmetric": symmetric, **QUICK}
    found = register(BLANK, BLANK, labels=(FIXED, MOVING), **options).displacement
    least = 0.8 if transform == "affine" else 0.9
    assert min(dice(found).values()) > least > 0.7 > max(dice(0 * found).values())
    assert metrics.folding(found) == 0
    if transform == "dense" and not symmetric:
        without = [torch.where(m > 5, 0, m) for m in (FIXED, MOVING)]
        assert torch.equal(register(BLANK, BLANK, labels=without, **options).displacement, found)


def test_labels_and_exchanged_images():
    options = {"symmetric": True, "affine": True, **QUICK}
    there = register(BLANK, BLANK, labels=(FIXED, MOVING), **options)
    back = register(BLANK, BLANK, labels=(MOVING, FIXED), **options).displacement
    inner = (..., slice(10, -10), slice(10, -10))
    assert back[inner].norm(dim=1).mean() > 1
    assert (there.inverse() - back)[inner].norm(dim=1).mean() < 0.1


def test_labels_after_a_start():
    matrix = torch.tensor([[[1.0, 0.0, 9.0], [0.0, 1.0, -7.0]]])
    away = MOVING.roll((9, -7), (2, 3))
    lie = fastreg.affine_displacement(matrix, SHAPE)
    for start in (matrix, lie):
        found = register(BLANK, BLANK, start=start, labels=(FIXED, away), **QUICK).displacement
        assert min(dice(found, FIXED, away).values()) > 0.85


def test_weight_of_labels():
    images = texture(SHAPE), texture(SHAPE)
    alone = register(*images, **QUICK).displacement
    unused = register(*images, labels=(FIXED, MOVING), label_weight=0, **QUICK).displacement
    assert torch.equal(alone, unused)
    means = [
        sum(dice(register(*images, labels=(FIXED, MOVING), label_weight=w, **QUICK).displacement).values())
        for w in (0.0, 0.3, 10.0)
    ]
    assert means[0] + 0.1 < means[1] < means[2] - 0.1


def term(weight=2.0, spacing=(1.0, 1.5)):
    (found,) = labels_of((FIXED, MOVING), weight, BLANK, spacing, None)
    return found


def test_term_is_one_minus_dice():
    found = term()
    assert found.fixed.shape[1] == 2
    assert found.fixed.shape[2] < SHAPE[0]
    size = torch.tensor(found.fixed.shape[2:])
    u = torch.randn(1, 2, *size.tolist(), generator=torch.Generator().manual_seed(0))
    moved = fastreg.warp(found.moving, u, padding="border")
    f, m = found.fixed[0].flatten(1), moved[0].flatten(1)
    expected = 2.0 * (1 - 2 * (f * m).sum(1) / ((f * f).sum(1) + (m * m).sum(1))).mean()
    torch.testing.assert_close(found(u, (1.0, 1.0)), expected, atol=1e-4, rtol=1e-4)
    # finer displacements are in voxels of their own
    torch.testing.assert_close(
        found(fastreg.resize_displacement(u, SHAPE), (1.0, 1.0)), expected, atol=5e-2, rtol=0
    )
    coarse = found.at((28, 30))
    assert coarse.fixed.shape[2] < found.fixed.shape[2]
    torch.testing.assert_close(coarse.fixed.mean(), found.fixed.mean(), atol=0.01, rtol=0)


@pytest.mark.parametrize("n", [1, 7])
def test_gradient_of_labels(n):
    generator = torch.Generator().manual_seed(2)
    fixed, moving = (torch.rand(1, n, 6, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    one = Labels(fixed, moving, (11, 13), (1.0, 2.0), 3.0)
    u = (0.3 + 0.2 * torch.rand(1, 2, 6, 7, dtype=torch.float64, generator=generator)).requires_grad_()
    matrix = torch.tensor([[0.93, 0.011, 0.9], [-0.013, 0.91, 1.4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: one(u, (2.0, 4.0)), u)
    assert torch.autograd.gradcheck(lambda u: one(u, (2.0, 4.0), matrix.detach()), u)
    assert torch.autograd.gradcheck(lambda m: one(None, (2.0, 4.0), m), matrix)


def test_kinds_of_labels():
    images = texture(SHAPE), texture(SHAPE, seed=1)
    found = [
        register(*images, labels=(FIXED.to(kind), MOVING.to(kind)), **QUICK).displacement
        for kind in (torch.int64, torch.uint8, torch.int16)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    register(*images, labels=(FIXED > 0, MOVING > 0), iterations=1)


@pytest.mark.parametrize(
    ("kind", "match", "options"),
    [
        (TypeError, "labels must be a pair, fixed and moving label maps, got Tensor", {"labels": FIXED}),
        (TypeError, "the moving labels must be a tensor, got list", {"labels": (FIXED, [1])}),
        (TypeError, "the fixed labels must be integer or bool", {"labels": (FIXED.float(), MOVING)}),
        (ValueError, r"the moving labels must have shape \(1, 1, 56, 60\)", {"labels": (FIXED, MOVING[..., 1:])}),
        (ValueError, "labels must have one in both images that is not 0", {"labels": (FIXED, 0 * MOVING)}),
        (ValueError, "labels must be given with label_weight", {"label_weight": 2.0}),
        (ValueError, "label_weight must be a number >= 0", {"labels": (FIXED, MOVING), "label_weight": -1.0}),
    ],
)  # fmt: skip
def test_errors_of_labels(kind, match, options):
    with pytest.raises(kind, match=f"fastreg::register: {match}"):
        register(BLANK, BLANK, **options)
