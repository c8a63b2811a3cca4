"""fastreg.register: which similarity it takes for which contrasts, and that it is the right one."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_registration import error

import fastreg
from fastreg import _channels, _descent, _similarity
from fastreg.data import phantom
from fastreg.registration import _pyramid

DATA = os.environ.get("FASTREG_DATA")


def scan(shape, seed=0, width=2.0):
    """Soft blobs in [0, 1]."""
    noise = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))
    image = fastreg.smooth(noise, width)
    return ((image - image.mean()) / (4 * image.std()) + 0.5).clamp(0, 1)


def pair(shape=(44, 40, 48), amplitude=2.0, seed=0):
    moving = scan(shape, seed)
    u = torch.zeros(1, len(shape), *shape)
    grids = [torch.sin(torch.linspace(0, math.pi, n)) for n in shape]
    u[:] = amplitude * math.prod(g.reshape(-1, *[1] * (len(shape) - 1 - a)) for a, g in enumerate(grids))
    return fastreg.warp(moving, u, padding="border"), moving, u


def noisy(image, seed=1):
    return image + 0.05 * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))


def shaded(image):
    """With a bias field of a factor of 2 from end to end."""
    return image * torch.linspace(0.7, 1.4, image.shape[-1])


def folded(image):
    return (image - 0.5).abs()


def choose(fixed, moving, mask=None, moving_mask=None, asked="auto"):
    images = _descent.rescaled(fixed, mask), _descent.rescaled(moving, moving_mask)
    shapes = _pyramid(fixed.shape[2:], (1.0,) * (fixed.ndim - 2), None)
    return _similarity.choose(asked, *images, mask, moving_mask, shapes)


ONE = {
    "as it is": lambda x: x,
    "inverted": lambda x: 1 - x,
    "scaled": lambda x: 1000 + 70 * x,
    "gamma": lambda x: x**2,
    "noisy": noisy,
    "shaded": shaded,
}
OTHER = {
    "folded": folded,
    "folded, noisy": lambda x: noisy(folded(x)),
    "folded, shaded": lambda x: shaded(folded(x)),
}


@pytest.mark.parametrize("shape", [(44, 40, 48), (26, 30, 24), (96, 110)], ids=["3d", "small", "2d"])
@pytest.mark.parametrize("contrast", [*ONE, *OTHER])
def test_contrasts(contrast, shape):
    fixed, moving, _ = pair(shape)
    of = {**ONE, **OTHER}[contrast]
    for choice in (choose(fixed, of(moving)), choose(of(moving), fixed)):
        if contrast in ONE:
            assert choice.taken == "lcc"
            assert choice.consistency > 0.5
        else:
            assert choice.taken == "mind"
            assert choice.consistency < -0.1
            assert choice.unlike


@pytest.mark.parametrize("seed", range(3))
def test_a_thorax_that_slides_is_of_one_contrast(seed):
    p = phantom.thorax((48, 48, 64), seed=seed)
    for moving in (p.moving, -p.moving):
        assert choose(p.fixed, moving).consistency > 0.9


def test_only_what_counts_is_looked_at():
    fixed, moving, _ = pair()
    half = torch.ones_like(moving)
    half[..., :24] = 0
    mixed = torch.where(half > 0, moving, folded(moving))
    assert choose(fixed, mixed).taken == "mind"
    assert choose(fixed, mixed, half).taken == "lcc"
    assert choose(fixed, mixed, None, half).taken == "lcc"
    assert choose(fixed, mixed, half, 1 - half).taken == "lcc"  # nothing
    assert math.isnan(choose(fixed, mixed, half, 1 - half).consistency)


def test_channels_count_by_what_they_show():
    fixed, moving, _ = pair()
    flat = torch.zeros_like(fixed)
    of_one = choose(fixed, folded(moving))
    of_two = choose(torch.cat([fixed, flat], 1), torch.cat([folded(moving), flat], 1))
    assert of_two.consistency == pytest.approx(of_one.consistency, abs=1e-6)
    like = choose(torch.cat([fixed, fixed], 1), torch.cat([moving, 1 - moving], 1))
    assert like.taken == "lcc"
    assert like.consistency > 0.9


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 40, 44), (7, 90), (12, 12, 12)])
def test_where_nothing_tells_it_is_lcc(shape):
    fixed, moving = torch.zeros(1, 1, *shape), torch.rand(1, 1, *shape)
    choice = choose(fixed, moving)
    assert choice.taken == "lcc"
    assert math.isnan(choice.consistency)
    assert not choice.unlike
    assert "too few" in choice.why
    assert fastreg.register(fixed, moving, iterations=1).similarity == "lcc"


def test_what_is_asked_for_is_taken():
    fixed, moving, _ = pair((26, 30, 24))
    for asked in ("lcc", "mse", "mind", "mi"):
        result = fastreg.register(fixed, folded(moving), similarity=asked, iterations=1)
        assert result.similarity == asked
        assert (result.consistency is None) == (asked in ("mind", "mi"))
        assert asked in ("mind", "mi") or result.consistency < _similarity.LEAST


def test_the_choice_is_the_better_one():
    fixed, moving, truth = pair()
    before, options = error(torch.zeros_like(truth), truth), {"iterations": (60, 30)}
    other = fastreg.register(fixed, folded(moving), **options)
    assert other.similarity == "mind"
    assert error(other.displacement, truth) < 0.6 * before
    # within a few voxels of a texture as smooth as this a fold is a line, which T1 and T2 are not
    by_lcc = fastreg.register(fixed, folded(moving), similarity="lcc", window=9, **options)
    assert error(by_lcc.displacement, truth) > 1.5 * error(other.displacement, truth)
    same = fastreg.register(fixed, moving, **options)
    assert same.similarity == "lcc"
    assert error(same.displacement, truth) < 0.4 * before


def test_mutual_information_of_a_folded_contrast():
    """Each intensity of fixed tells the other's, if not the other way around; so it does for a matrix alone."""
    fixed, moving, truth = pair((44, 40, 48))
    before = error(torch.zeros_like(truth), truth)
    found = fastreg.register(fixed, folded(moving), similarity="mi", iterations=(60, 30))
    assert error(found.displacement, truth) < 0.6 * before
    shape = (48, 52)
    matrix = torch.tensor([[[1.03, 0.04, -2.0], [-0.05, 0.98, 2.5]]])
    moving = scan(shape)
    fixed = fastreg.warp(moving, None, affine=matrix, padding="border")
    truth = fastreg.affine_displacement(matrix, shape)
    found = fastreg.register(fixed, folded(moving), similarity="mi", transform="affine")
    assert error(found.displacement, truth) < 0.3 * error(torch.zeros_like(truth), truth)


def test_mutual_information_of_channels_is_that_of_each():
    fixed, moving, _ = pair((26, 24, 28))
    fixed, moving = torch.cat([fixed, 1 - fixed], 1), torch.cat([moving, folded(moving)], 1)
    both = _channels.similarity("mi", fixed, None, 5, None)
    alone = [_descent.Similarity("mi", fixed[:, k : k + 1], None, 5)(moving[:, k : k + 1]) for k in (0, 1)]
    found = both.compare(moving, lambda image, by: image + 0 * by, torch.zeros(()))
    torch.testing.assert_close(found, sum(alone) / 2)


@pytest.mark.skipif(not DATA, reason="FASTREG_DATA, the folder with the scans, is not set")
def test_t1_and_t2_of_a_cord():
    scans = np.load(Path(DATA) / "spinalmr_t1t2_sct.npz")
    fixed, moving, of_fixed, of_moving = (
        torch.from_numpy(scans[k].astype(np.float32))[None, None] for k in ("t2", "t1", "t2_seg", "t1_seg")
    )
    result = fastreg.register(fixed, moving)
    assert result.similarity == "mind"
    moved = fastreg.warp(of_moving, result.displacement, mode="nearest", padding="border")
    assert fastreg.metrics.dice(of_fixed.long(), moved.long()).mean > 0.925
