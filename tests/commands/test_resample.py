"""An image on another grid: every type, border, grid; the kernel against the reference, both against ITK."""

import itertools

import numpy as np
import pytest
import torch
from test_io import PAIRS, as_sitk, field, grid, noise, pair

from fastreg import io
from fastreg.io._resample import _position, resample_ref

sitk = pytest.importorskip("SimpleITK")

TYPES = {
    str(t).removeprefix("torch."): t
    for t in (
        *(torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64),
        *(torch.int64, torch.float16, torch.float32, torch.float64),
    )
}


def values(geometry, dtype, channels=1, seed=0):
    """Noise that fills what the type holds, at most some thousands; negative ones where it has them."""
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    noise = np.random.default_rng(seed).normal(size=(1, channels, *geometry.shape))
    noise = noise * (3000 if kind.itemsize > 1 else 40)
    return torch.from_numpy((np.abs(noise) if kind.kind == "u" else noise).astype(kind))


def compared(image, u, geometry, onto, mode, outside, dtype):
    arguments = (image, u, _position(geometry, onto, onto), onto.shape, mode, outside, dtype, True)
    result, inside = torch.ops.fastreg_io.resample(*arguments)
    truth, truth_inside = resample_ref(*arguments)
    assert result.dtype == dtype
    assert torch.equal(inside, truth_inside)
    return result.double(), truth.double()


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("of", TYPES)
def test_every_type_becomes_every_other(of, mode):
    """Two channels; fp64 of the reference. What lies on a tie of two whole numbers may go either way."""
    nd, fixed, moving = PAIRS[0 if mode == "linear" else 3].values
    fixed, moving = pair(nd, fixed, moving)
    image, u = values(moving, TYPES[of], 2), field(fixed)
    for to, outside in zip(TYPES.values(), itertools.cycle((-3.0, None, 300.0)), strict=False):
        result, truth = compared(image, u, moving, fixed, mode, outside, to)
        if to.is_floating_point:
            limit = {2: 2e-3, 4: 3e-7, 8: 1e-12 if TYPES[of].itemsize > 4 else 3e-7}[to.itemsize]
            assert (result - truth).abs().max() <= limit * truth.abs().max()
        else:
            assert (result - truth).abs().max() <= (mode == "linear")
            assert (result != truth).double().mean() < 0.01
            info = torch.iinfo(to)
            assert (result.min(), result.max()) >= (info.min, 0)


@pytest.mark.kernel
@pytest.mark.parametrize("outside", [-7.0, None], ids=str)
@pytest.mark.parametrize(("nd", "fixed", "moving"), PAIRS)
def test_the_kernel_is_the_reference(nd, fixed, moving, outside):
    fixed, moving = pair(nd, fixed, moving)
    for mode, dtype, u in itertools.product(
        ("linear", "nearest"), (torch.float32, torch.float64), (None, field(fixed), field(fixed).double())
    ):
        result, truth = compared(values(moving, dtype), u, moving, fixed, mode, outside, dtype)
        limit = 3e-7 if dtype == torch.float32 else 1e-12
        assert (result - truth).abs().max() <= limit * truth.abs().max()


@pytest.mark.kernel
def test_whole_numbers_are_rounded_and_clamped():
    geometry = io.Geometry.of((2, 2), (1, 1))
    image = torch.tensor([[[[0.5, 1.5], [-1e30, 1e30]]]])
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint64, torch.int64):
        info = torch.iinfo(dtype)
        result, _ = io.resample(image, geometry, geometry, dtype=dtype)
        low, high = (int(v) for v in result[0, 0, 1].numpy())
        assert result[0, 0, 0].tolist() == [0, 2]  # ties to even
        assert low == info.min
        assert info.max - 2**40 * (info.bits == 64) <= high <= info.max


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64, torch.uint32], ids=str)
def test_labels_are_exact_whatever_their_size(dtype):
    geometry = grid(3)
    big = torch.iinfo(dtype).max - torch.randint(0, 2**20, (1, 1, *geometry.shape))
    image = torch.from_numpy(big.numpy().astype(torch.empty(0, dtype=dtype).numpy().dtype))
    moved, _ = io.resample(image, geometry, geometry, mode="nearest")
    assert np.array_equal(moved.numpy(), image.numpy())
    u = torch.zeros(1, 3, *geometry.shape)
    u[:, 2] = 1
    moved, _ = io.resample(image, geometry, geometry, u, mode="nearest")
    assert np.array_equal(moved[..., :-1].numpy(), image[..., 1:].numpy())


@pytest.mark.kernel
def test_what_is_not_finite_reaches_those_that_touch_it_alone():
    geometry = io.Geometry.of((4, 5, 6), (1, 1, 1))
    image = torch.zeros(1, 1, 4, 5, 6)
    image[0, 0, 2, 2, 2] = torch.nan
    u = torch.zeros(1, 3, 4, 5, 6)
    assert torch.equal(io.resample(image, geometry, geometry, u)[0].isnan(), image.isnan())
    u[:, 0] = 0.5
    assert io.resample(image, geometry, geometry, u)[0].isnan()[0, 0, :, 2, 2].tolist() == [0, 1, 1, 0]
    u[0, 1, 0, 0, 0] = torch.nan
    moved, inside = io.resample(image, geometry, geometry, u, outside=-1.0)
    assert not inside[0, 0, 0, 0, 0]
    assert moved[0, 0, 0, 0, 0] == -1
    assert io.resample(image, geometry, geometry, u, outside=None)[0][0, 0, 0, 0, 0].isnan()


@pytest.mark.kernel
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 4, 1), (3, 1, 5)], ids=str)
def test_an_axis_of_one_voxel(size):
    geometry = io.Geometry.of(size, (1, 1, 1))
    u = torch.randn(1, 3, *size)
    for mode in ("linear", "nearest"):
        result, truth = compared(
            values(geometry, torch.int16), u, geometry, geometry, mode, None, torch.float32
        )
        assert (result - truth).abs().max() <= 1e-2


@pytest.mark.kernel
def test_bits_do_not_depend_on_threads():
    geometry = grid(3, size=(70, 20, 30))
    image, u = values(geometry, torch.int16), field(geometry)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(io.resample(image, geometry, geometry, u, dtype=torch.float32)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32], ids=lambda d: d.__name__)
@pytest.mark.parametrize(("nd", "fixed", "moving"), PAIRS[:4])
def test_a_field_on_another_grid_is_itks(monkeypatch, nd, fixed, moving, dtype, mode):
    """Of the result, the field and the image none shares a grid; beyond the field ITK does not displace. Integers: ITK cuts, we round."""
    monkeypatch.setattr(io._resample, "SLAB", 500)
    fixed, moving = pair(nd, fixed, moving)
    origin = fixed.to_physical(np.full(nd, 1.3))
    own = io.Geometry(tuple(n - 4 for n in fixed.size), fixed.spacing, tuple(origin), fixed.direction)
    onto = io.Geometry(tuple(n + 3 for n in fixed.size), fixed.spacing, (0.0,) * nd, moving.direction)
    middles = [g.to_physical((np.array(g.shape) - 1) / 2) for g in (fixed, onto)]
    onto = io.Geometry(onto.size, onto.spacing, tuple(middles[0] - middles[1]), onto.direction)
    u = field(own, size=1.5)
    image = values(moving, {np.int16: torch.int16, np.uint8: torch.uint8, np.float32: torch.float32}[dtype])
    vectors = u[0].double().movedim(0, -1).numpy() @ own.matrix.T
    transform = sitk.DisplacementFieldTransform(as_sitk(vectors, own, isVector=True))
    interpolator = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor}[mode]
    truth = sitk.Resample(
        as_sitk(image[0, 0].numpy(), moving),
        as_sitk(noise(onto), onto),
        transform,
        interpolator,
        99.0,
        sitk.sitkFloat64,
    )
    truth = sitk.GetArrayFromImage(truth)
    result, inside = io.resample(image, moving, onto, u, u_geometry=own, mode=mode, outside=99.0)
    assert 0.05 < inside.double().mean() < 1
    wrong = np.abs(result[0, 0].double().numpy() - truth) > (
        0 if mode == "nearest" else 0.5001 if dtype != np.float32 else 1e-3 * np.abs(truth).max()
    )
    assert wrong.mean() < 2e-3  # points on the very edge of image or field


@pytest.mark.kernel
@pytest.mark.parametrize("shift", [0.5, -0.5, 1.5])
def test_a_tie_of_two_voxels_goes_as_itks(shift):
    geometry = io.Geometry.of((4, 8), (1, 1))
    image = torch.arange(32, dtype=torch.int16).view(1, 1, 4, 8)
    u = torch.zeros(1, 2, 4, 8)
    u[:, 1] = shift
    moved, inside = io.resample(image, geometry, geometry, u, mode="nearest", outside=-1.0)
    transform = sitk.TranslationTransform(2, (shift, 0))
    itks = sitk.GetImageFromArray(image[0, 0].numpy())
    truth = sitk.GetArrayFromImage(sitk.Resample(itks, itks, transform, sitk.sitkNearestNeighbor, -1.0))
    seen = torch.from_numpy(truth >= 0)
    assert torch.equal(moved[0, 0][seen], torch.from_numpy(truth)[seen])
    assert inside[0, 0][seen].all()
