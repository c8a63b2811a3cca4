"""fastreg.register: the weight and the share of intensities that it finds by itself, its presets."""

import pytest
import torch
from test_registration import bump, error, texture

import fastreg
from fastreg import _adaptive
from fastreg.registration import _pyramid, register

SHAPE = (48, 44, 52)


def pair(amplitude, shape=SHAPE, seed=0):
    moving = texture(shape, seed=seed)
    u = bump(shape, amplitude)
    return fastreg.warp(moving, u, padding="border"), moving, u


@pytest.mark.parametrize("shape", [(7, 6, 5), (9, 8), (6, 1, 7)])
def test_strain_is_that_of_diffusion_where_the_image_is_alike_everywhere(shape):
    nd = len(shape)
    spacing = (3.0, 2.0, 1.5)[-nd:]
    slope = torch.randn(nd, nd, generator=torch.Generator().manual_seed(1))
    axes = [torch.arange(float(n)) for n in shape]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    field = torch.einsum("ij,j...->i...", slope, places)[None]
    field = field.contiguous()
    image = places.sum(0)[None, None]  # of one gradient
    found = _adaptive.strain(field, spacing, image)
    assert found == pytest.approx(float(fastreg.diffusion(field, spacing=spacing)), rel=1e-5)


def test_strain_counts_where_the_image_shows_structure():
    field = torch.zeros(1, 2, 12, 24)
    field[..., 12:] = torch.arange(12.0)  # slope 1, on the right
    image = torch.zeros(1, 1, 12, 24)
    image[..., :8] = texture((12, 8))
    assert _adaptive.strain(field, (1.0, 1.0), image) < 1e-3
    assert _adaptive.strain(field, (1.0, 1.0), image.flip(-1)) > 0.3
    assert _adaptive.strain(field[..., :1], (1.0, 1.0), image) == 0  # nothing changes along the other axis
    assert _adaptive.strain(field, (1.0, 1.0), torch.zeros_like(image)) > 0  # no structure: everywhere alike


def test_the_weight_follows_strain_and_noise():
    """Little strain alone is a small motion, which no heavy weight is to hold back; with noise it is a stiff body."""
    weights = []
    generator = torch.Generator().manual_seed(3)
    for amplitude, noise in (((1.5, -1.5, 1.5), 0.0), ((1.5, -1.5, 1.5), 0.4), ((5.0, -7.0, 6.0), 0.4)):
        fixed, moving, truth = pair(amplitude, (56, 52, 60))
        moving = moving + noise * torch.randn(moving.shape, generator=generator)
        result = register(fixed, moving, iterations=30)
        last = result.levels[-1]
        asked = min(_adaptive._STRAIN, _adaptive._NOISE * last["noise"]) / last["strain"]
        assert last["regularization"] == min(max(asked, _adaptive._FLOOR), _adaptive._MOST)
        assert result.levels[0]["regularization"] == _adaptive.LEAST
        weights.append(last["regularization"])
        assert error(result.displacement, truth) < 0.5 * error(torch.zeros_like(truth), truth)
    assert _adaptive._FLOOR <= weights[2] < weights[1] <= _adaptive._MOST
    assert weights[0] < 0.8 * weights[1]


def test_a_weight_that_is_given_stands():
    fixed, moving, _ = pair((1.0, 1.0, -1.0))
    result = register(fixed, moving, regularization=3, iterations=2)
    assert {level["regularization"] for level in result.levels} == {3.0}
    assert {level["strain"] for level in result.levels} == {None}
    assert (
        register(fixed, moving, similarity="mind", iterations=1).levels[-1]["regularization"]
        == _adaptive.OTHER
    )


def test_a_pyramid_too_short_to_find_a_weight_keeps_that_of_the_coarse_levels():
    fixed, moving, _ = pair((1.0, 1.0, -1.0))
    result = register(fixed, moving, levels=2, iterations=1)
    assert [level["regularization"] for level in result.levels] == [_adaptive.LEAST] * 2
    assert register(fixed, moving, levels=2, iterations=1, similarity="mind").levels[0]["regularization"] == 2


def test_updates_are_smoothed_the_less_the_lighter_the_weight():
    fixed, moving = texture((97, 97)), texture((97, 97), seed=1)  # displacements' grids of 2, 4 and 8 voxels
    for weight, width in ((0.5, 1.4), (1.0, 1.4), (1.5, 1.4 * 1.5**0.5), (4.0, 2.0)):
        options = {"regularization": weight, "levels": 3, "iterations": 3}
        found = register(fixed, moving, **options).displacement
        same = register(fixed, moving, smoothing=width, **options).displacement
        torch.testing.assert_close(found, same)
        other = register(fixed, moving, smoothing=1.05 * width, **options).displacement
        assert (found - other).abs().max() > 1e-3


def test_intensities_count_where_they_agree():
    fixed, moving, truth = pair((1.5, -2.0, 1.5))
    same = register(fixed, moving, iterations=30)
    assert same.levels[-1]["intensities"] == pytest.approx(_adaptive._SHARE)
    assert error(same.displacement, truth) < 0.4 * error(torch.zeros_like(truth), truth)
    # an inverted contrast explains nothing, nor do intensities that nobody asked for
    assert register(fixed, -moving, iterations=10).levels[-1]["intensities"] == 0
    assert register(fixed, moving, similarity="lcc", iterations=10).levels[-1]["intensities"] == 0
    assert register(fixed, moving, similarity="mse", iterations=2).levels[-1]["intensities"] == 0


def test_intensities_where_a_mask_counts():
    fixed, moving, _ = pair((1.0, 1.0, -1.0))
    moving = moving.clone()
    moving[..., :20] *= -1
    mask = torch.ones_like(fixed)
    mask[..., :24] = 0
    assert register(fixed, moving, similarity="auto", iterations=15).levels[-1]["intensities"] == 0
    shares = [
        register(fixed, moving, iterations=15, **{name: mask}).levels[-1]["intensities"]
        for name in ("mask", "moving_mask")
    ]
    assert min(shares) > 0.8 * _adaptive._SHARE


def test_a_constant_image_explains_nothing_and_is_explained_by_nothing():
    flat, image = torch.ones(1, 1, 24, 24), texture((24, 24))
    for fixed, moving in ((flat, image), (image, flat), (flat, flat)):
        result = register(fixed, moving, iterations=3)
        assert {level["intensities"] for level in result.levels} == {0.0}
        assert result.displacement.isfinite().all()


def test_an_axis_that_becomes_short_does_not_hold_the_others_up():
    assert _pyramid((26, 176, 144), (1.0,) * 3, None)[0] == (13, 23, 19)
    assert _pyramid((13, 88, 72), (1.0,) * 3, None)[0] == (13, 23, 19)
    assert _pyramid((40, 56, 40), (1.0,) * 3, None) == [(21, 29, 21), (40, 56, 40)]  # most of them have


def test_levels_without_iterations_tell_nothing():
    """A field that nobody sought has no strain, which is not that of a stiff body."""
    fixed, moving, _ = pair((1.5, -1.5, 1.5), (56, 52, 60))
    for plan in ((0, 0, 3), (3, 0, 3), (0, 3, 3)):
        last = register(fixed, moving, iterations=plan).levels[-1]
        assert (last["strain"], last["regularization"]) == (None, _adaptive.LEAST)
    assert register(fixed, moving, iterations=3).levels[-1]["strain"] > 0


def test_fast_of_an_image_of_one_level_registers_it():
    fixed, moving, truth = pair((1.0, -1.5, 1.5), (20, 22, 18))
    result = register(fixed, moving, preset="fast")
    assert [level["iterations"] for level in result.levels] == [20]
    assert error(result.displacement, truth) < 0.6 * error(torch.zeros_like(truth), truth)
    assert not register(fixed, moving, preset="fast", iterations=0).displacement.any()


def test_small_images_take_more_iterations():
    fixed, moving, _ = pair((1.0, -1.5, 1.5), (28, 30, 26))
    plan = [level["iterations"] for level in register(fixed, moving).levels]
    assert len(plan) == 2
    assert 30 < plan[-1] <= 60
    written_out = register(fixed, moving, iterations=tuple([100, 100, 60, 30]))
    assert written_out.levels[-1]["iterations"] <= 30
    assert register(fixed, moving, preset="fast").levels[-1]["iterations"] == 0


def test_presets_are_defaults():
    fixed, moving, truth = pair((1.0, -1.5, 1.5))
    fast = register(fixed, moving, preset="fast")
    assert fast.levels[-1]["iterations"] == 0
    same = register(fixed, moving, iterations=_adaptive.PRESETS["fast"]["iterations"])
    assert torch.equal(fast.displacement, same.displacement)
    assert error(fast.displacement, truth) < 0.4 * error(torch.zeros_like(truth), truth)
    given = register(fixed, moving, preset="fast", iterations=(2, 1, 1))
    assert given.levels[-1]["iterations"] == 1
    assert register(fixed, moving, preset="fast", spacing=3.0).discrete["why"] == "search_range is 0"
    searched = register(fixed, moving, preset="fast", spacing=3.0, search_range=20)
    assert searched.discrete["range_mm"] == 20
    written_out = register(fixed, moving, preset="fast", iterations=tuple([100, 100, 60, 30]))
    assert written_out.levels[-1]["iterations"] > 0
    with pytest.raises(ValueError, match="register: preset must be"):
        register(fixed, moving, preset="slow")
