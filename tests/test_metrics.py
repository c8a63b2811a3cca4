import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from fastreg import metrics


def test_dice_counts():
    fixed = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 3]])
    moved = torch.tensor([[0, 1, 1, 0], [2, 2, 0, 4]])
    result = metrics.dice(fixed, moved)
    assert result.per_label == {1: 2 * 1 / 4, 2: 2 * 2 / 5, 3: 0.0, 4: 0.0}
    assert result.mean == pytest.approx((0.5 + 0.8) / 4)
    # Label 9 is in neither image and does not count; the background counts where it is asked for.
    chosen = metrics.dice(fixed, moved, labels=[0, 2, 9])
    assert chosen.per_label == {0: 2 * 1 / 5, 2: 0.8}


def test_dice_types_and_empty():
    ones = torch.ones(3, 4, dtype=torch.bool)
    assert metrics.dice(ones, ones) == (1.0, {1: 1.0})
    nothing = metrics.dice(torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(3, 4, dtype=torch.int16))
    assert nothing.per_label == {}
    assert math.isnan(nothing.mean)
    assert metrics.dice(torch.full((2, 2), -3), torch.full((2, 2), -3)).per_label == {-3: 1.0}
    assert metrics.dice(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)).per_label == {}


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((torch.zeros(2), torch.zeros(2)), TypeError, "fastreg::dice: fixed_labels must be integer or bool"),
        ((torch.ones(2).int(), torch.ones(3).int()), ValueError, r"moved_labels must have the shape \(2,\)"),
        ((torch.ones(2).int(), np.ones(2)), TypeError, "moved_labels must be a tensor, got ndarray"),
    ],
)
def test_dice_errors(args, error, match):
    with pytest.raises(error, match=match):
        metrics.dice(*args)


def surfaces(mask, spacing):
    """mm positions of the voxels that have a face neighbour outside."""
    padded = np.pad(mask, 1)
    inner = padded.copy()
    for axis in range(mask.ndim):
        for step in (1, -1):
            inner &= np.roll(padded, step, axis)
    return np.argwhere(padded & ~inner) * np.asarray(spacing)


@pytest.mark.parametrize("shape", [(9, 11, 10), (12, 15)])
def test_surface_distances_by_definition(shape):
    pytest.importorskip("SimpleITK")
    spacing = (2.5, 1.0, 0.75)[-len(shape) :]
    grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    ball = [sum((g - c) ** 2 for g, c in zip(grid, centre, strict=False)) for centre in ((4,) * 3, (4, 6, 5))]
    fixed, moved = (np.where(b < r, 2, 0) for b, r in zip(ball, (10, 13), strict=True))
    fixed[:2], moved[:3] = 7, 7  # at the end of the image
    moved[0, 0] = 0
    a, b = torch.from_numpy(fixed), torch.from_numpy(moved)
    found = metrics.assd(a, b, spacing), metrics.hd95(a[None, None], b[None, None], spacing)
    for label in (2, 7):
        p, q = surfaces(fixed == label, spacing), surfaces(moved == label, spacing)
        apart = np.linalg.norm(p[:, None] - q[None], axis=2)
        there, back = apart.min(1), apart.min(0)
        assert found[0].per_label[label] == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-5)
        expected = max(np.percentile(there, 95), np.percentile(back, 95))
        assert found[1].per_label[label] == pytest.approx(expected, rel=1e-5)
    assert found[0].mean == pytest.approx(sum(found[0].per_label.values()) / 2)
    assert metrics.assd(a, a, 1.0).mean == 0


def test_surface_distances_of_absent_labels():
    pytest.importorskip("SimpleITK")
    a, b = torch.zeros(4, 5, 6, dtype=torch.long), torch.zeros(4, 5, 6, dtype=torch.long)
    assert metrics.assd(a, b, 1.0).per_label == {}
    a[1, 2, 3] = 4
    assert metrics.hd95(a, b, 1.0).per_label == {4: math.inf}
    assert metrics.assd(a, b, 1.0, labels=[3]).per_label == {}
    with pytest.raises(ValueError, match="fastreg::assd: spacing must be 1 or 3 positive numbers"):
        metrics.assd(a, b, (1.0, 2.0))
    with pytest.raises(TypeError, match="fastreg::hd95: fixed_labels must be integer or bool"):
        metrics.hd95(a.float(), b, 1.0)


def test_tre():
    a = torch.tensor([[0.0, 0, 0], [1, 2, 3], [4, 4, 4], [0, 0, 1]])
    b = torch.tensor([[0.0, 0, 4], [1, 2, 3], [4, 3, 4], [1, 0, 1]])
    distance = np.linalg.norm((a - b).numpy().astype(float) * [2.5, 1, 0.5], axis=1)
    result = metrics.tre(a, b, (2.5, 1, 0.5))
    expected = (distance.mean(), distance.std(), *np.percentile(distance, [25, 50, 75]), distance.max())
    assert result[:6] == pytest.approx(expected)
    # Three points are off along one axis each: (z, y, x), mm.
    assert result.per_axis == pytest.approx((2.5 / 4, 1 / 4, 0.5 * 4 / 4))
    assert metrics.tre(a[:1], b[:1], 1.0)[:6] == pytest.approx((4, 0, 4, 4, 4, 4))
    assert metrics.tre(a.long(), b.long(), 2).mean == pytest.approx(2 * (4 + 0 + 1 + 1) / 4)


def test_tre_snapped_to_voxels():
    """A landmark that lands within half a voxel of where an expert clicked is right (DIR-Lab)."""
    moved = torch.tensor([[3.4, 7.0, 1.0], [3.6, 7.0, 1.0], [3.0, 7.0, 2.9], [2.5, 6.5, 1.0]])
    truth = torch.tensor([[3.0, 7.0, 1.0]]).expand(4, 3)
    found = metrics.tre(moved, truth, (2.5, 1.0, 0.5), snap=True)
    distance = np.array([0, 2.5, 2 * 0.5, np.hypot(2.5, 1)])  # 2.5 -> 2, 6.5 -> 6
    assert (found.mean, found.max) == pytest.approx((distance.mean(), distance.max()))
    assert found.per_axis == pytest.approx((2 * 2.5 / 4, 1 / 4, 1 / 4))
    assert metrics.tre(moved, truth, 1.0).max == pytest.approx(1.9)


def test_errors_per_slice():
    found = metrics.per_slice([1, 3, 2.0, 5], [7, 2, 7, 2])
    assert list(found) == [7, 2]
    assert found == {7: (1.5, 2.0), 2: (4.0, 5.0)}
    assert metrics.per_slice([], []) == {}
    with pytest.raises(ValueError, match="fastreg::per_slice: slices must be as many as errors, 2, got 1"):
        metrics.per_slice([1.0, 2.0], ["a"])


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((torch.zeros(2, 3), torch.zeros(3, 3), 1.0), "fastreg::tre: points_b must have the shape"),
        ((torch.zeros(0, 3), torch.zeros(0, 3), 1.0), r"points_a must have shape \(P, nd\)"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), (1.0, 2.0)), "spacing must be 1 or 3 positive numbers"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), (1.0, 0.0, 1.0)), "spacing"),
    ],
)
def test_tre_errors(args, match):
    with pytest.raises(ValueError, match=match):
        metrics.tre(*args)


@pytest.mark.parametrize("shape", [(9, 11), (6, 7, 8)])
def test_folding_and_sdlogj_of_a_scaling(shape):
    nd = len(shape)
    grid = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in shape], indexing="ij"))
    assert metrics.folding(0.1 * grid[None]) == 0
    assert metrics.sdlogj(0.1 * grid[None]) == pytest.approx(0, abs=1e-6)
    assert metrics.folding(-1.5 * grid[None]) == (1 if nd == 3 else 0)
    mirror = torch.zeros_like(grid[None])
    mirror[0, 0] = -2 * grid[0]
    assert metrics.folding(mirror) == 1


def test_folding_share_and_sdlogj_values():
    # Only the last coordinate moves, so the determinant is 1 + du/dx, constant over lines.
    u = torch.zeros(1, 2, 4, 6)
    u[0, 1] = torch.tensor([0.0, 0.0, -3.0, -3.0, -3.0, -3.0])
    slope = np.gradient(u[0, 1, 0].numpy().astype(float))
    assert metrics.folding(u) == pytest.approx((1 + slope <= 0).mean())
    assert metrics.sdlogj(u) == pytest.approx(np.log(np.maximum(1 + slope, 1e-9)).std())
    u[0, 1, 1, 3] = float("nan")
    assert metrics.folding(u) > (1 + slope <= 0).mean()
    assert math.isnan(metrics.sdlogj(u))


@pytest.mark.parametrize("shape", [(5, 9), (4, 5, 9)])
def test_jacobian_values(shape):
    """As F3RNet's tables: how many voxels fold, and the deviation of the determinant."""
    u = torch.zeros(2, len(shape), *shape)
    u[1, -1] = torch.tensor([0.0, 0.0, -3.0, -3.0, -3.0, 1.0, 1.0, 1.5, 1.5])
    determinant = 1 + np.gradient(u[:, -1].numpy().astype(float), axis=-1)
    found = metrics.jacobian(u)
    lines = int(np.prod(shape[:-1]))
    assert found.folded_voxels == (determinant <= 0).sum() == 2 * lines
    assert found.folding == pytest.approx(metrics.folding(u)) == found.folded_voxels / determinant.size
    assert found.sdj == pytest.approx(determinant.std(), rel=1e-6)
    assert found.sdlogj == pytest.approx(metrics.sdlogj(u))
    u[0, 0, 1] = float("nan")
    found = metrics.jacobian(u)
    assert found.folded_voxels > 2 * lines
    assert math.isnan(found.sdj)
    assert metrics.jacobian(torch.zeros(1, len(shape), *shape)) == (0, 0, 0, 0)


@pytest.mark.parametrize("shape", [(9, 11), (6, 7, 8)])
@pytest.mark.parametrize("batched", [True, False])
def test_move_points_is_linear_interpolation(shape, batched):
    generator = torch.Generator().manual_seed(0)
    nd = len(shape)
    u = torch.randn(nd, *shape, generator=generator, dtype=torch.float64)
    # Some points lie outside, where the border value counts, some on voxel centres and on the far faces.
    points = torch.rand(40, nd, generator=generator, dtype=torch.float64) * (torch.tensor(shape) + 4) - 2
    points = torch.cat([points, torch.zeros(1, nd), torch.tensor([shape]) - 1.0])
    expected = points.numpy() + np.stack(
        [map_coordinates(c, points.numpy().T, order=1, mode="nearest") for c in u.numpy()], axis=1
    )
    result = metrics.move_points(points, u[None] if batched else u)
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-12)


def test_move_points_dtypes_and_nan():
    u = torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16)
    assert metrics.move_points(torch.tensor([[1, 2]]), u).dtype == torch.float32
    assert metrics.move_points(torch.tensor([[1.0, 2.0]]).double(), u).dtype == torch.float64
    moved = metrics.move_points(torch.tensor([[float("nan"), 1.0], [1.5, float("inf")]]), u)
    assert moved.isnan().tolist() == [[True, True], [False, False]]
    assert metrics.move_points(torch.zeros(0, 2), u).shape == (0, 2)


@pytest.mark.parametrize(
    ("points", "u", "error", "match"),
    [
        (torch.zeros(3, 2), torch.zeros(1, 3, 4, 4, 4), ValueError, r"points must have shape \(P, 3\)"),
        (torch.zeros(3, 3), torch.zeros(2, 3, 4, 4, 4), ValueError, "move_points: u must have shape"),
        (torch.zeros(3, 3), torch.zeros(3, 4, 4, 4).long(), TypeError, "u must be floating point"),
    ],
)
def test_move_points_errors(points, u, error, match):
    with pytest.raises(error, match=match):
        metrics.move_points(points, u)
