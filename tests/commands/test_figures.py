import numpy as np
import pytest
import torch

import fastreg
from fastreg.data.figures import DEFORMATIONS, KINDS, _depth, figures

SIZES = ("small", "medium", "large")


@pytest.fixture(scope="module")
def pairs():
    return {name: [figures((7, k), deformation=name) for k in range(6)] for name in SIZES}


def test_shapes_and_range(pairs):
    for p in (p for some in pairs.values() for p in some):
        for image in (p.fixed, p.moving):
            assert image.shape == (1, 1, 128, 128)
            assert image.dtype == torch.float32
            assert 0 <= image.min()
            assert image.max() <= 1
            assert image.std() > 0.1
        assert p.displacement.shape == (1, 2, 128, 128)
        assert p.displacement.dtype == torch.float32
        for labels in (p.fixed_labels, p.moving_labels):
            assert labels.shape == (1, 1, 128, 128)
            assert labels.dtype == torch.uint8
            assert 0 < labels.max() <= len(KINDS)


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_the_truth_warps_moving_into_fixed(pairs, padding):
    for p in (p for some in pairs.values() for p in some):
        moved = fastreg.warp(p.moving, p.displacement, padding=padding)
        assert torch.allclose(moved, p.fixed, atol=1e-6)
        assert (p.fixed - p.moving).square().mean() > 50 * (p.fixed - moved).square().mean()


def test_labels_move_with_their_figures(pairs):
    p = pairs["medium"][0]
    moved = fastreg.warp(p.moving_labels.float(), p.displacement, mode="nearest")
    assert torch.equal(moved, p.fixed_labels.float())


@pytest.mark.parametrize("name", SIZES)
def test_motion_has_its_size_and_does_not_fold(pairs, name):
    for p in pairs[name]:
        rms = p.displacement.square().sum(1).mean().sqrt()
        assert float(rms) == pytest.approx(DEFORMATIONS[name], rel=1e-4)
        assert fastreg.jacobian_determinant(p.displacement).min() > 0
        # nonlinear: not an affine motion
        y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
        basis = torch.stack([torch.ones_like(y), y, x]).flatten(1).T
        u = p.displacement[0].flatten(1).T
        left = u - basis @ torch.linalg.lstsq(basis, u).solution
        assert left.square().sum(1).mean().sqrt() > 0.05 * DEFORMATIONS[name]


def test_the_seed_decides(pairs):
    p, again, other = (
        pairs["small"][1],
        figures((7, 1), deformation="small"),
        figures((7, 2), deformation="small"),
    )
    for name in vars(p):
        assert torch.equal(getattr(p, name), getattr(again, name)), name
        assert not torch.equal(getattr(p, name), getattr(other, name)), name
    # one seed, another size of motion: the same figures, the same kind of motion
    large = pairs["large"][1]
    assert torch.equal(p.moving, large.moving)


def test_sizes_and_numbers():
    p = figures(3, size=48, deformation=8.0)
    assert p.fixed.shape == (1, 1, 48, 48)
    assert float(p.displacement.square().sum(1).mean().sqrt()) == pytest.approx(3.0, rel=1e-4)
    still = figures(3, deformation=0)
    assert torch.equal(still.fixed, still.moving)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_a_figure_of_its_own(kind):
    y, x = np.mgrid[-1.2:1.2:97j, -1.2:1.2:97j]
    inside = _depth(kind, y, x) > 0
    assert 0.05 < inside.mean() < 0.75
    assert all((inside != (_depth(other, y, x) > 0)).mean() > 0.01 for other in KINDS if other != kind)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deformation": "huge"}, "deformation must be one of"),
        ({"deformation": 99}, r"deformation must be in \[0, 32\]"),
        ({"deformation": float("nan")}, r"deformation must be in"),
        ({"size": 8}, "size must be at least 32"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"fastreg::figures: {message}"):
        figures(**arguments)
