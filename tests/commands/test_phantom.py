import pytest
import torch
from common import COMPILED

import fastreg
from fastreg import metrics, registration
from fastreg.data import phantom

SMALL = (40, 40, 56)


@pytest.fixture(scope="module")
def small():
    return phantom.thorax(SMALL)


@pytest.fixture(scope="module")
def full():
    return phantom.thorax()


def test_shapes_and_units(small):
    p = small
    for image in (p.fixed, p.moving):
        assert image.shape == (1, 1, *SMALL)
        assert image.dtype == torch.float32
        assert torch.isfinite(image).all()
    assert p.displacement.shape == (1, 3, *SMALL)
    assert p.spacing == pytest.approx((7.0, 5.6, 320 / 56))
    assert p.fixed_landmarks.shape == p.moving_landmarks.shape == (300, 3)
    assert p.near_wall.dtype == torch.bool
    assert set(p.fixed_labels.unique().tolist()) == {0, 1, 2}


def test_is_the_same_every_time(small):
    again = phantom.thorax(SMALL)
    for name in ("fixed", "moving", "fixed_labels", "displacement", "fixed_landmarks", "near_wall"):
        assert torch.equal(getattr(small, name), getattr(again, name)), name
    other = phantom.thorax(SMALL, seed=1)
    assert not torch.equal(small.fixed, other.fixed)
    assert not torch.equal(small.fixed_landmarks, other.fixed_landmarks)


@pytest.mark.parametrize("amplitude", [0.0, 45.0])
def test_moves_as_far_as_it_is_told(amplitude):
    """The two images show one anatomy at the two ends of the motion that is given."""
    p = phantom.thorax((56, 56, 80), amplitude=amplitude)
    spacing = torch.tensor(p.spacing, dtype=torch.float64)
    way = ((p.moving_landmarks - p.fixed_landmarks) * spacing).norm(dim=1)
    assert float(way.max()) <= 1.4 * amplitude + 1e-9
    assert float(way.max()) >= 0.8 * amplitude
    # what is labelled lung in one is so in the other, where the displacement says
    moved = fastreg.warp(p.moving_labels.float(), p.displacement, mode="nearest").byte()
    assert metrics.dice(p.fixed_labels, moved).mean > 0.97
    unmoved = metrics.dice(p.fixed_labels, p.moving_labels).mean
    assert unmoved < 0.93 if amplitude > 20 else unmoved > 0.9


def test_anatomy_does_not_depend_on_the_grid(small, full):
    def mm(p):
        return (p.fixed_landmarks + 0.5) * torch.tensor(p.spacing, dtype=torch.float64)

    assert torch.allclose(mm(small), mm(full), atol=1e-9)
    assert torch.equal(small.near_wall, full.near_wall)


def test_is_the_task_it_claims_to_be(full):
    result = phantom.score(full, torch.zeros_like(full.displacement))
    assert result["tre_before"] >= 8.0
    assert result["tre_after"] == pytest.approx(result["tre_before"])
    assert full.near_wall.sum() >= 40
    # anisotropic, and it slides: neighbours across the wall differ by more than 10 mm
    assert max(full.spacing) > min(full.spacing)
    jump = (full.displacement[0, 0].diff(dim=2).abs() * full.spacing[0]).max()
    assert jump > 10.0


def test_the_truth_explains_images_landmarks_and_labels(full):
    p, u = full, full.displacement
    assert phantom.failures(phantom.score(p, u)) == []
    assert phantom.score(p, u)["tre_after"] < 0.05

    lungs = p.fixed_labels > 0
    after = (fastreg.warp(p.moving, u, padding="border") - p.fixed)[lungs].square().mean()
    # what no displacement explains: lungs that darken by 50 on breathing in, and two noises of 18
    assert after < 1.2 * (50**2 + 2 * 18**2)

    moved = fastreg.warp(p.moving_labels.float(), u, mode="nearest").to(torch.uint8)
    assert metrics.dice(p.fixed_labels, moved).mean > 0.97
    assert metrics.dice(p.fixed_labels, p.moving_labels).mean < 0.93


def test_chest_wall_stays(full):
    still = (full.displacement == 0).all(dim=1, keepdim=True)
    assert not still[full.fixed_labels > 0].any()
    # two noises of 18 each
    assert (full.moving - full.fixed)[still].std() == pytest.approx(18 * 2**0.5, rel=0.05)
    assert (full.fixed[still] > 200).any()


@pytest.mark.parametrize("shape", [(112, 112), (8, 40, 40)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match="fastreg::phantom: shape must be three sizes of at least 16"):
        phantom.thorax(shape)


@pytest.mark.parametrize("amplitude", [-1.0, 60.0, float("nan")])
def test_a_motion_that_cannot_be(amplitude):
    with pytest.raises(ValueError, match=r"amplitude must be in \[0, 45\] mm"):
        phantom.thorax(SMALL, amplitude=amplitude)


def test_failures_names_every_goal():
    good = {"tre_before": 12.0, "tre_after": 1.0, "tre_wall": 2.0, "folding": 0.0, "seconds": 1.0}
    assert phantom.failures(good) == []
    limits = {"tre_before": 5.0, "tre_after": 2.0, "tre_wall": 4.0, "folding": 0.01}
    for name, value in limits.items():
        for bad in (value, float("nan")):
            missed = phantom.failures({**good, name: bad})
            assert len(missed) == 1
            assert missed[0].startswith(name)
    assert phantom.failures({**good, "seconds": 1e9}) == []


@pytest.mark.skipif(not COMPILED, reason="the reference ops take minutes for a full registration")
def test_register_meets_the_goals_and_cheating_does_not(full):
    # poisoned memory asks for deterministic algorithms, which is not what is timed
    torch.use_deterministic_algorithms(False)
    result = registration.register(full.fixed, full.moving, spacing=full.spacing)
    u = result.displacement

    def missed(displacement):
        return phantom.failures(phantom.score(full, displacement, result.seconds))

    assert missed(u) == []
    for wrong in (torch.zeros_like(u), -u, u.roll(1, dims=1), u.flip(1)):
        assert any(m.startswith("tre_after") for m in missed(wrong))
        assert any(m.startswith("tre_wall") for m in missed(wrong))
