import pytest
import torch

import fastreg
from fastreg import metrics
from fastreg._affine import AffineFit, around, halves
from fastreg.registration import register
from tests.test_registration import bump, error, pair, texture

SHAPE = (56, 60)
QUICK = {"iterations": 40}
ALL = ["dense", "velocity", "bspline", "rigid", "affine"]
INNER = (..., slice(10, -10), slice(10, -10))


def mean(u, inner=INNER):
    return u[inner].norm(dim=1).mean().item()


def masks():
    """Weights of fixed and of moving, each 0 in another corner."""
    a, b = torch.ones(1, 1, *SHAPE), torch.ones(1, 1, *SHAPE)
    a[..., :20, :14], b[..., 40:, 44:] = 0, 0.2
    return a, b


@pytest.mark.parametrize(
    ("transform", "affine"),
    [(t, a) for t in ALL for a in (False, True) if not (a and t in ("rigid", "affine"))],
)
def test_exchanged_images_give_the_inverse(transform, affine):
    fixed, moving, _ = pair(SHAPE, (3.0, -3.0))
    moving = moving.roll(2, -1)
    a, b = masks()
    points = torch.tensor([[20.0, 22.0], [33.0, 41.0]])
    more = {"transform": transform, "affine": affine, "spacing": (1.0, 1.3), "symmetric": True, **QUICK}
    there = register(fixed, moving, mask=a, moving_mask=b, landmarks=(points, points + 2), **more)
    back = register(moving, fixed, mask=b, moving_mask=a, landmarks=(points + 2, points), **more)
    found, inverse = there.displacement, there.inverse()
    assert mean(found) > 1
    assert mean(inverse - back.displacement) < 0.03
    assert metrics.inverse_residual(found, inverse)[INNER].mean() < 1e-4
    assert metrics.inverse_residual(found, back.displacement)[INNER].mean() < 0.03
    assert metrics.folding(found) == 0
    losses = [[level["loss_last"] for level in r.levels] for r in (there, back)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    if transform == "dense":  # what the option is for
        plain = [
            register(*images, **{**more, "symmetric": False}) for images in ((fixed, moving), (moving, fixed))
        ]
        assert mean(plain[0].inverse() - plain[1].displacement) > 3 * mean(inverse - back.displacement)


def test_without_an_affine_part_the_velocities_are_opposite():
    fixed, moving, _ = pair((26, 24, 28), (1.5, -1.5, 1.5))
    for transform in ("dense", "bspline"):
        more = {"transform": transform, "symmetric": True, "iterations": 10}
        a, b = register(fixed, moving, **more), register(moving, fixed, **more)
        assert a.velocity.abs().max() > 0.5
        torch.testing.assert_close(a.velocity, -b.velocity, atol=1e-3, rtol=0)


@pytest.mark.parametrize("similarity", ["lcc", "mse", "mind", "mi"])
def test_symmetric_is_as_accurate(similarity):
    fixed, moving, truth = pair(SHAPE, (3.0, -3.0))
    plain, both = (
        error(register(fixed, moving, similarity=similarity, symmetric=s, **QUICK).displacement, truth)
        for s in (False, True)
    )
    assert both < 1.3 * plain + 0.02


def test_both_directions_count():
    """What only one direction looks at: fixed has weight 0 at the left, moving nothing but texture there."""
    fixed, moving, truth = pair(SHAPE, (0.0, 3.0))
    left = torch.ones_like(fixed)
    left[..., :30] = 0
    seen = register(fixed, moving, mask=left, symmetric=True, **QUICK)
    level = seen.levels[-1]
    assert level["loss_last"] < level["loss_first"] or level["loss_first"] < -0.9
    right = (..., slice(10, -10), slice(36, -10))
    assert mean(seen.displacement - truth, right) < 0.4 * mean(truth, right)


def test_halves_of_an_affine_part():
    """A large turn and shift of scans that have a displacement too: all of the motion is both halves around it."""
    matrix = torch.tensor([[[0.96, 0.17, -4.0], [-0.15, 1.03, 5.0]]])
    u = fastreg.compose(fastreg.affine_displacement(matrix, SHAPE), bump(SHAPE, (2.0, -2.0)))
    wide = texture((96, 100))
    moving = wide[..., 20:76, 20:80]
    at = torch.nn.functional.pad(u, [20] * 4, mode="replicate")
    fixed = fastreg.warp(wide, at, padding="border")[..., 20:76, 20:80]
    for spacing in ((1.0, 1.0), (2.0, 1.5)):
        found = register(fixed, moving, affine=True, symmetric=True, spacing=spacing)
        assert mean(found.displacement - u) < 0.35
        torch.testing.assert_close(found.affine, matrix, atol=1.0, rtol=0)


def test_halves_meet():
    fit = AffineFit(SHAPE, (1.0, 1.0), symmetric=True)
    motion = torch.randn(2, 3, dtype=torch.float64) * torch.tensor([9.0, 9.0, 4.0])
    half, back = fit.matrix(motion / 2), fit.matrix(-motion / 2)
    corner = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    square, unit = torch.cat([half, corner]), torch.cat([back, corner])
    torch.testing.assert_close((square @ square)[:2], fit.matrix(motion))
    torch.testing.assert_close(square @ unit, torch.eye(3, dtype=torch.float64))
    nothing = around(torch.zeros(1, 2, *SHAPE), half[None])
    torch.testing.assert_close(
        nothing, fastreg.affine_displacement(fit.matrix(motion)[None].float(), SHAPE), atol=1e-3, rtol=1e-5
    )
    image = texture(SHAPE)
    fixed, moving, mask, weights = halves((image, image, None, None), half[None], back[None])
    assert torch.equal(moving, fastreg.warp(image, None, affine=half[None].float(), padding="border"))
    assert 0 < mask.mean() < 1
    assert 0 < weights.mean() < 1
    assert not torch.equal(fixed, moving)


def test_symmetric_thin_images_and_errors():
    for shape in ((1, 20, 22), (20, 1)):
        image = texture(shape)
        for options in ({"affine": True}, {"transform": "bspline"}):
            found = register(image.roll(1, -1), image, symmetric=True, iterations=3, **options).displacement
            assert found.isfinite().all()
            for axis, n in enumerate(shape):
                assert n > 1 or found[:, axis].abs().max() < 1e-4
    with pytest.raises(TypeError, match="fastreg::register: symmetric must be True or False, got 'both'"):
        register(texture(SHAPE), texture(SHAPE), symmetric="both")


def test_symmetric_after_a_start():
    matrix = torch.tensor([[[0.0, -1.0, 55.0], [1.0, 0.0, 0.0]]])  # a quarter turn
    shape = (56, 56)
    moving = texture(shape)
    u = fastreg.compose(fastreg.affine_displacement(matrix, shape), bump(shape, (2.0, -2.0)))
    fixed = fastreg.warp(moving, u, padding="border")
    result = register(fixed, moving, start=matrix, symmetric=True, **QUICK)
    assert mean(result.displacement - u) < 0.3
    assert metrics.inverse_residual(result.displacement, result.inverse())[INNER].mean() < 1e-3
