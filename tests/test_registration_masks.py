import pytest
import torch

import fastreg
from fastreg import _inconsistency, _similarity
from fastreg._descent import filled, moved_weights
from fastreg.registration import register
from tests.test_registration import error, pair

SHAPE = (56, 60)


@pytest.mark.parametrize("similarity", ["lcc", "mse", "mind", "mi"])
@pytest.mark.parametrize("padding", [-3024.0, float("nan")])
def test_what_the_moving_mask_hides_is_not_looked_at(similarity, padding):
    """At every level: it must not be smoothed into its neighbours either."""
    fixed, moving, truth = pair(SHAPE, (3.0, -3.0))
    mask = torch.ones_like(moving)
    mask[..., :12] = 0
    spoilt = torch.where(mask > 0, moving, torch.full_like(moving, padding))
    options = {"similarity": similarity, "iterations": 40}
    found = register(fixed, spoilt, moving_mask=mask, **options).displacement
    inner = (..., slice(14, -8), slice(20, -8))
    before, after = (float((u - truth)[inner].norm(dim=1).mean()) for u in (0 * truth, found))
    assert after < 0.35 * before
    # what is hidden may be anything
    other = torch.where(mask > 0, moving, 100 * torch.randn_like(moving))
    assert torch.equal(register(fixed, other, moving_mask=mask > 0, **options).displacement, found)


@pytest.mark.parametrize("far", [-3024.0, 1e4, 1e30])
def test_what_is_far_outside_the_fixed_mask_is_not_spread(far):
    """Padding, metal: coarse levels would have it in what counts."""
    fixed, moving, truth = pair(SHAPE, (3.0, -3.0))
    mask = torch.zeros_like(fixed)
    mask[..., 10:-10, 10:-10] = 1
    spoilt = torch.where(mask > 0, fixed, torch.full_like(fixed, far))
    plain, found = (register(f, moving, mask=mask, iterations=40).displacement for f in (fixed, spoilt))
    inner = (..., slice(10, -10), slice(10, -10))
    before, usual, after = (float((u - truth)[inner].norm(dim=1).mean()) for u in (0 * truth, plain, found))
    assert usual < 0.3 * before
    assert after < 0.5 * before
    off = _inconsistency.measure(spoilt, moving, found, (1.0, 1.0), "lcc", mask)
    assert off.far < _inconsistency.SUSPECT
    alike = _similarity.fits("lcc", 9, spoilt, moving, found, mask, None, [SHAPE])
    assert alike[1] < 1.1 * alike[0] < 0


def test_the_moving_mask_goes_along():
    """A level compares where the image counts that it has moved, by the displacement and the affine part."""
    fixed, moving, _ = pair(SHAPE, (0.0, 0.0))
    weights = torch.ones_like(moving)
    weights[..., 20:34, 26:38] = 0
    u = torch.full((1, 2, *SHAPE), 3.0)
    matrix = torch.tensor([[[1.0, 0.0, 2.0], [0.0, 1.0, -4.0]]])
    assert torch.equal(moved_weights(weights, u, None), weights.roll((-3, -3), (2, 3)))
    assert torch.equal(moved_weights(weights, u, matrix), weights.roll((-5, 1), (2, 3)))
    assert torch.equal(moved_weights(weights, None, matrix), weights.roll((-2, 4), (2, 3)))
    assert moved_weights(None, u, matrix) is None
    # a block that is where it was found 8 voxels away
    away = moving.roll(8, -1)
    spoilt = away.masked_fill(weights == 0, 9.0)
    result = register(fixed, spoilt, moving_mask=weights, transform="affine")
    assert result.affine[0, 1, 2] == pytest.approx(8, abs=0.3)


def test_what_is_hidden_is_moved_too():
    """What the mask hides is not looked at; the image that is returned shows it."""
    fixed, moving, _ = pair(SHAPE, (3.0, -3.0))
    mask = torch.ones_like(moving)
    mask[..., 20:30, 20:30] = 0
    implant = moving.masked_fill(mask == 0, 9.0)
    result = register(fixed, implant, moving_mask=mask, iterations=10)
    assert torch.equal(result.moved, fastreg.warp(implant, result.displacement))
    hole = moving.masked_fill(mask == 0, float("nan"))
    same = register(fixed, hole, moving_mask=mask, iterations=10)
    assert torch.equal(same.displacement, result.displacement)
    assert same.moved.isfinite().all()
    known = fastreg.warp(mask, result.displacement) == 1
    assert torch.equal(same.moved[known], result.moved[known])


def test_nan_outside_the_masks_is_no_error():
    fixed, moving, truth = pair(SHAPE, (2.0, -2.0))
    mask = torch.ones_like(fixed)
    mask[..., :4, :] = 0
    nan = fixed.masked_fill(mask == 0, float("nan"))
    found = register(nan, moving, mask=mask, iterations=40).displacement
    assert error(found, truth) < 0.35 * error(0 * truth, truth)
    for images, given in (
        ((nan, moving), {}),
        ((nan, moving), {"mask": mask.roll(1, 2)}),
        ((moving, nan), {"mask": mask}),
    ):
        with pytest.raises(
            ValueError, match=r"fastreg::register: (fixed|moving) must be finite, got \d+ NaN"
        ):
            register(*images, **given)


def test_errors_name_the_mask():
    image = torch.rand(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"moving_mask must have shape \(1, 1, 8, 8\)"):
        register(image, image, moving_mask=image[..., :7])
    with pytest.raises(ValueError, match="moving_mask must be at least 0"):
        register(image, image, moving_mask=-image)


def test_filled_keeps_what_is_known_and_continues_it():
    image = torch.linspace(0, 1, 13)[:, None].expand(13, 11)[None, None].clone()
    known = torch.ones_like(image, dtype=torch.bool)
    known[..., 5:8, 2:6] = False
    spoilt = image.masked_fill(~known, float("nan"))
    out = filled(spoilt, known)
    assert torch.equal(out[known], image[known])
    assert (out - image).abs().max() < 0.2
    assert filled(image, torch.ones_like(known)) is image
    assert torch.equal(filled(spoilt, torch.zeros_like(known)), torch.zeros_like(image))
    assert fastreg.mse_loss(filled(spoilt[..., :1, :1], known[..., :1, :1]), image[..., :1, :1]) == 0
