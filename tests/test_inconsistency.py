"""Where a registration may be wrong: found where it is, and not said where it is not."""

import math

import numpy as np
import pytest
import torch

import fastreg
from fastreg import _descent, _inconsistency
from fastreg.data import phantom
from fastreg.io import Geometry

SHAPE = (56, 56, 80)


@pytest.fixture(scope="module")
def thorax():
    return phantom.thorax(SHAPE, seed=0)


def found(p, **options):
    u = fastreg.register(
        p.fixed, p.moving, spacing=p.spacing, similarity="lcc", search_range=0, **options
    ).displacement
    return u, _inconsistency.measure(p.fixed, p.moving, u, p.spacing, "lcc", search_range=0)


def errors(p, u, shape):
    """(1, 1, *shape), mm: from the truth, and where lung is."""
    mm = torch.tensor(p.spacing).reshape(1, -1, 1, 1, 1)
    wrong = fastreg.resize_displacement(u, shape) * (torch.tensor(SHAPE) - 1).reshape(1, -1, 1, 1, 1)
    true = fastreg.resize_displacement(p.displacement, shape) * (torch.tensor(SHAPE) - 1).reshape(
        1, -1, 1, 1, 1
    )
    mm = mm / (torch.tensor(shape) - 1).reshape(1, -1, 1, 1, 1)
    lung = _descent.resized((p.fixed_labels > 0).float(), shape) > 0.5
    return ((wrong - true) * mm).norm(dim=1, keepdim=True), lung


def ranks(values):
    return values.argsort().argsort().double()


def test_a_thorax_that_was_found_is_not_suspected(thorax):
    _, off = found(thorax)
    plain = off.plain(Geometry.of(SHAPE, thorax.spacing))
    assert plain["far"] < 0.02
    assert plain["median"] < 0.5 * off.voxel
    assert plain["regions"] == []
    assert off.lines(plain) == []


def test_what_is_wrong_is_found_where_it_is(thorax):
    """A penalty that keeps the motion stiff drags the wall along."""
    u, off = found(thorax, regularization=60.0)
    grid = Geometry.of(SHAPE, thorax.spacing)
    plain = off.plain(grid)
    wrong, lung = errors(thorax, u, tuple(off.mm.shape[2:]))
    seen = off.seen & lung
    order = torch.corrcoef(torch.stack([ranks(off.mm[seen]), ranks(wrong[seen])]))[0, 1]
    assert order > 0.7
    high = wrong[seen] > wrong[seen].quantile(0.9)
    assert off.mm[seen][high].mean() > 2 * off.mm[seen][~high].mean()
    assert plain["far"] > _inconsistency.SUSPECT
    assert len(off.lines(plain)) == 1
    worst = plain["regions"][0]
    place = torch.tensor(worst["worst_voxels_zyx"]).round().long()
    whole, _ = errors(thorax, u, SHAPE)
    assert whole[0, 0][tuple(place)] > 2 * whole[0, 0][lung_of(thorax)].median()
    assert np.allclose(grid.to_physical(np.array(worst["worst_voxels_zyx"])), worst["worst_lps_mm"])


def lung_of(p):
    return p.fixed_labels[0, 0] > 0


def test_where_nothing_shows_nothing_is_said():
    flat = torch.zeros(1, 1, 20, 24, 22)
    off = _inconsistency.measure(flat, flat, torch.zeros(1, 3, 20, 24, 22), (1.0, 1.0, 1.0), "lcc")
    plain = off.plain(Geometry.of((20, 24, 22), (1.0, 1.0, 1.0)))
    assert not off.seen.any()
    assert plain["far"] == 0
    assert plain["regions"] == []
    assert math.isnan(plain["median"])
    assert off.lines(plain) == []


@pytest.mark.parametrize("shape", [(40, 36), (5, 40, 44), (1, 40, 44)])
def test_masks_hide_and_shapes_are_any(shape):
    image = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    image = fastreg.smooth(image, [0.0 if n == 1 else 1.5 for n in shape])
    half = torch.ones_like(image)
    half[..., : shape[-1] // 2] = 0
    u, spacing = torch.zeros(1, len(shape), *shape), (2.0,) * len(shape)
    off = _inconsistency.measure(image, image, u, spacing, "lcc", half)
    n = off.mm.shape[-1]
    assert off.seen[..., n // 2 + 1 :].any()
    assert not off.seen[..., : n // 2 - 1].any()
    assert float(off.mm[off.seen].max()) < 2.0
    assert off.on(shape).shape == shape


def test_parts():
    mask = torch.zeros(1, 1, 6, 7, dtype=torch.bool)
    mask[0, 0, 0, :3] = mask[0, 0, 1, 3] = mask[0, 0, 5, 6] = True
    labels = _inconsistency._parts(mask)
    assert labels.unique(return_counts=True)[1].tolist() == [37, 4, 1]
    assert (labels[mask] > 0).all()
