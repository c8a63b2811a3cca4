import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastreg
from fastreg import _descent, metrics
from fastreg._adam import Adam
from fastreg._descent import TRANSFORMS, grid_shape, relaxed, transform
from fastreg.registration import _pyramid, register

QUICK = {"iterations": 40}


def texture(shape, seed=0, channels=1, grain=4):
    """Smooth noise with structure at every scale a pyramid will look at."""
    generator = torch.Generator().manual_seed(seed)
    out = 0
    for step in (grain, 2 * grain, 4 * grain):
        size = [max(2, s // step + 1) for s in shape]
        noise = torch.randn(1, channels, *size, generator=generator)
        out = out + F.interpolate(noise, size=shape, mode="trilinear" if len(shape) == 3 else "bilinear")
    return out


def bump(shape, amplitude):
    """A displacement that vanishes at the border."""
    axes = [torch.sin(torch.linspace(0, torch.pi, s)) ** 2 if s > 1 else torch.ones(1) for s in shape]
    window = axes[0]
    for a in axes[1:]:
        window = window[..., None] * a
    amplitude = torch.tensor(amplitude, dtype=torch.float32).reshape(1, -1, *[1] * len(shape))
    return amplitude * window


def pair(shape, amplitude, **kwargs):
    moving = texture(shape, **kwargs)
    u = bump(shape, amplitude)
    return fastreg.warp(moving, u, padding="border"), moving, u


def error(found, truth):
    """Mean length of the difference, voxels, away from the border."""
    inner = tuple(slice(s // 6, s - s // 6) for s in truth.shape[2:])
    return (found - truth)[(slice(None), slice(None), *inner)].norm(dim=1).mean().item()


@pytest.mark.parametrize(
    ("shape", "amplitude"),
    [
        pytest.param((40, 36, 44), (2.0, -3.0, 2.5), id="3d"),
        pytest.param((72, 60), (4.0, -3.0), id="2d"),
        pytest.param((31, 37, 29), (1.5, 1.5, -1.5), id="odd"),
    ],
)
def test_recovers_a_known_displacement(shape, amplitude):
    fixed, moving, truth = pair(shape, amplitude)
    result = register(fixed, moving, **QUICK)
    before = error(torch.zeros_like(truth), truth)
    after = error(result.displacement, truth)
    assert after < 0.35 * before, f"{before:.3f} -> {after:.3f}"
    assert metrics.folding(result.displacement) == 0


def test_direction_is_backward():
    """fixed(p) = moving(p + u): content that lies 3 voxels further along x in moving has u_x = +3."""
    wide = texture((32, 32, 42))
    moving, fixed = wide[..., 2:37], wide[..., 5:40]
    u = register(fixed, moving, **QUICK).displacement[0]
    inner = (slice(8, -8),) * 3
    assert u[2][inner].mean() == pytest.approx(3.0, abs=0.3)
    assert u[0][inner].abs().mean() < 0.3
    assert u[1][inner].abs().mean() < 0.3


def test_result_fields():
    fixed, moving, _ = pair((32, 30, 34), (1.0, 1.0, 1.0), channels=2)
    result = register(fixed, moving, spacing=(2.0, 1.0, 1.0), **QUICK)
    assert result.displacement.shape == (1, 3, 32, 30, 34)
    assert result.displacement.dtype == result.moved.dtype == torch.float32
    assert not result.displacement.requires_grad
    assert torch.equal(result.moved, fastreg.warp(moving, result.displacement))
    assert result.seconds > 0
    finest = result.levels[-1]
    assert tuple(finest["shape"]) == (32, 30, 34)
    assert finest["spacing_mm"] == pytest.approx((2.0, 1.0, 1.0))
    for level in result.levels:
        assert set(level) == {
            "transform", "shape", "spacing_mm", "iterations", "loss_first", "loss_last", "regularization", "strain", "noise",
            "intensities",
            "similarity", "regularity", "seconds",
        }  # fmt: skip
        assert level["loss_last"] <= level["loss_first"]
    json.dumps(dataclasses.asdict(result)["levels"])


def test_inputs_are_left_alone_and_runs_repeat():
    fixed, moving, _ = pair((28, 30, 26), (1.0, -1.0, 1.0))
    copies = fixed.clone(), moving.clone()
    a = register(fixed, moving, **QUICK)
    b = register(fixed, moving, **QUICK)
    assert torch.equal(fixed, copies[0])
    assert torch.equal(moving, copies[1])
    assert torch.allclose(a.displacement, b.displacement, atol=1e-4)


@pytest.mark.parametrize(("factor", "offset"), [(1e-4, 0.0), (1e4, -1000.0), (1.0, 1e3)])
def test_intensity_scale_does_not_matter(factor, offset):
    fixed, moving, truth = pair((32, 30, 28), (1.5, -1.5, 1.0))
    plain = register(fixed, moving, **QUICK).displacement
    other = register(fixed * 3, moving * factor + offset, **QUICK).displacement
    assert (plain - other).abs().max() < 0.08
    assert error(other, truth) < 0.3


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.float64, torch.float16])
def test_dtypes(dtype):
    fixed, moving, truth = pair((32, 30, 28), (1.5, -1.5, 1.0))
    low, high = moving.min(), moving.max()
    fixed, moving = (((i - low) / (high - low) * 200).clamp(0, 255).to(dtype) for i in (fixed, moving))
    result = register(fixed, moving, **QUICK)
    assert result.displacement.dtype == torch.float32
    assert error(result.displacement, truth) < 0.35


@pytest.mark.parametrize("constant", ["fixed", "moving", "both"])
def test_constant_images_do_not_move(constant):
    image = texture((26, 24, 28))
    flat = torch.full_like(image, 37.0)
    fixed = flat if constant != "moving" else image
    moving = flat if constant != "fixed" else image
    result = register(fixed, moving, iterations=5)
    assert (result.displacement == 0).all()
    assert torch.isfinite(result.moved).all()


@pytest.mark.parametrize(
    "shape", [(1, 40, 36), (40, 1, 36), (30, 32, 1), (1, 1, 40), (1, 1, 1), (1, 40), (2, 3, 2)]
)
def test_thin_images(shape):
    fixed, moving = texture(shape, seed=1), texture(shape, seed=2)
    result = register(fixed, moving, iterations=6)
    assert torch.isfinite(result.displacement).all()
    assert result.displacement.shape == (1, len(shape), *shape)


def test_a_single_slice_registers_like_2d():
    fixed, moving, truth = pair((60, 56), (3.0, -2.0))
    flat = register(fixed, moving, **QUICK).displacement
    thin = register(fixed[:, :, None], moving[:, :, None], **QUICK).displacement
    assert error(flat, truth) < 0.3
    assert error(thin[:, 1:, 0], truth) < 0.3
    assert thin[:, 0].abs().max() < 1e-3


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_anisotropic_voxels(axis):
    """10 : 1; the thick axis is never the one that is halved."""
    shape, spacing = [48, 48, 48], [1.0, 1.0, 1.0]
    shape[axis], spacing[axis] = 10, 10.0
    amplitude = [2.0, 2.0, 2.0]
    amplitude[axis] = 0.4
    fixed, moving, truth = pair(tuple(shape), amplitude, grain=3)
    result = register(fixed, moving, spacing=spacing, **QUICK)
    before = error(torch.zeros_like(truth), truth)
    assert error(result.displacement, truth) < 0.4 * before
    assert metrics.folding(result.displacement) < 1e-3
    assert {level["shape"][axis] for level in result.levels} == {10}


def test_pyramid_makes_voxels_isotropic():
    for shape, spacing in (((84, 155, 239), (2.5, 0.97, 0.97)), ((20, 256, 256), (10.0, 1.0, 1.0))):
        shapes = _pyramid(shape, spacing, None)
        assert shapes[-1] == shape
        coarse = [s * (n - 1) / (c - 1) for s, n, c in zip(spacing, shape, shapes[0], strict=True)]
        assert max(coarse) / min(coarse) < 2.1  # an axis of too few voxels may have stayed behind
        assert all(min(s) >= 12 for s in shapes)
    assert _pyramid((10, 11, 1), (1.0, 1.0, 1.0), None) == [(10, 11, 1)]
    assert len(_pyramid((64, 64, 64), (1.0, 1.0, 1.0), 2)) == 2
    assert grid_shape((64, 64, 5), (1.0, 1.0, 5.0)) == (33, 33, 5)


def test_levels_and_iterations():
    fixed, moving, _ = pair((48, 50, 52), (1.0, 1.0, 1.0))
    calls = []
    result = register(fixed, moving, levels=2, iterations=(4, 3), progress=lambda *a: calls.append(a))
    assert [level["iterations"] for level in result.levels] == [4, 3]
    assert [c[:4] for c in calls] == [(0, 2, i, 4) for i in range(4)] + [(1, 2, i, 3) for i in range(3)]
    assert all(isinstance(c[4], float) for c in calls)
    # three levels: the first number serves the two coarser ones
    counts = [level["iterations"] for level in register(fixed, moving, iterations=(2, 1)).levels]
    assert counts == [2, 2, 1]
    nothing = register(fixed, moving, iterations=0)
    assert (nothing.displacement == 0).all()


def test_flat_loss_ends_a_level():
    image = texture((32, 32, 32))
    result = register(image, image, levels=1, iterations=500)
    assert result.levels[0]["iterations"] < 100
    assert result.displacement.abs().mean() < 0.05


def test_mask_hides_what_must_not_count():
    fixed, moving, _ = pair((32, 36, 30), (1.5, -1.5, 1.5))
    mask = torch.ones_like(fixed)
    mask[..., 20:] = 0
    spoilt = torch.where(mask > 0, fixed, 40 * texture((32, 36, 30), seed=9))
    # one level: the coarser ones blur across the mask's edge
    clean, same = (register(f, moving, mask=mask, levels=1, **QUICK).displacement for f in (fixed, spoilt))
    assert torch.allclose(clean, same, atol=1e-3)
    other = register(spoilt, moving, levels=1, **QUICK).displacement
    assert (other - clean).abs().max() > 0.5
    everywhere = register(fixed, moving, mask=torch.ones_like(mask), **QUICK).displacement
    assert (everywhere - register(fixed, moving, **QUICK).displacement).abs().mean() < 1e-3
    nowhere = register(fixed, moving, mask=torch.zeros_like(mask), iterations=3)
    assert (nowhere.displacement == 0).all()


def test_stiffer_is_smoother():
    fixed, moving, _ = pair((36, 36, 36), (2.0, -2.0, 2.0))
    moving = moving + 0.3 * texture((36, 36, 36), seed=5)
    strain = [
        float(fastreg.diffusion(register(fixed, moving, regularization=r, **QUICK).displacement))
        for r in (0.1, 1.0, 10.0)
    ]
    assert strain[0] > strain[1] > strain[2]


def test_units_are_millimetres():
    """Voxels of half the size with half the smoothing: the same registration, in voxels."""
    fixed, moving, _ = pair((34, 32, 36), (1.5, -1.0, 1.0))
    a = register(fixed, moving, spacing=1.0, smoothing=2.0, **QUICK).displacement
    b = register(fixed, moving, spacing=0.5, smoothing=1.0, **QUICK).displacement
    assert (a - b).abs().max() < 1e-3


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_a_step_is_as_long_along_every_axis_in_mm(kind):
    shape = (20, 24, 28)
    level = transform(kind, torch.zeros(1, 3, 1, 1, 1), shape, shape, (3.0, 1.0, 2.0), None)
    length = level.scale.flatten() * torch.tensor(level.spacing)
    torch.testing.assert_close(length, length.min().expand(3))


def test_smoothing_is_the_finest_levels_and_twice_as_wide_at_each_coarser_one(monkeypatch):
    widths = []
    monkeypatch.setattr(_descent, "transform", lambda *a: widths.append(a[5]) or transform(*a))
    register(texture((50, 52)), texture((50, 52), seed=1), smoothing=1.5, iterations=0)
    assert widths == [6.0, 3.0, 1.5]


def test_relax_removes_folds_and_nothing_else():
    u = torch.zeros(1, 3, 24, 24, 24)
    assert torch.equal(relaxed(u), u)
    u[0, 0, 10:13] = torch.tensor([3.0, 0.0, -3.0])[:, None, None]
    assert metrics.folding(u) > 0
    smoothed = relaxed(u)
    assert metrics.folding(smoothed) == 0
    assert torch.equal(smoothed[:, :, :4], u[:, :, :4])


def test_relax_sees_the_affine_part():
    u = torch.zeros(1, 3, 24, 24, 24)
    u[0, 0, 10:13] = torch.tensor([0.7, 0.0, -0.7])[:, None, None]
    half = torch.eye(3, 4)[None] * torch.tensor([0.5, 1.0, 1.0])[:, None]
    shift = fastreg.affine_displacement(half, (24, 24, 24))
    assert torch.equal(relaxed(u), u)
    assert metrics.folding(u + shift) > 0
    assert metrics.folding(relaxed(u, shift) + shift) == 0


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_callers_grad_mode_does_not_matter(mode):
    fixed, moving, _ = pair((28, 26, 30), (1.0, 1.0, 1.0))
    plain = register(fixed, moving, mask=torch.ones_like(fixed), **QUICK).displacement
    with mode():
        inside = register(fixed * 1, moving * 1, mask=torch.ones_like(fixed), **QUICK).displacement
    assert torch.allclose(plain, inside, atol=1e-4)


def test_ctrl_c_gets_through():
    fixed, moving, _ = pair((26, 26, 26), (1.0, 1.0, 1.0))

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        register(fixed, moving, progress=interrupt)


def test_small_range_on_a_large_offset():
    fixed, moving, _ = pair((26, 26, 26), (1.0, 1.0, 1.0))
    plain = register(fixed, moving, **QUICK).displacement
    for scale, offset in ((0.02, 1e9), (1e-98, 0.0)):
        images = (t.double() * scale + offset for t in (fixed, moving))
        torch.testing.assert_close(register(*images, **QUICK).displacement, plain, atol=4e-2, rtol=0)


def test_scale_of_the_mask_does_not_matter():
    fixed, moving, _ = pair((26, 26, 26), (1.0, 1.0, 1.0))
    mask = torch.ones(1, 1, 26, 26, 26).double()
    mask[..., :6] = 0.5
    plain = register(fixed, moving, mask=mask, **QUICK).displacement
    for scale in (1e38, 1e-38):
        scaled = register(fixed, moving, mask=mask * scale, **QUICK).displacement
        torch.testing.assert_close(scaled, plain, atol=1e-3, rtol=0)


@pytest.mark.parametrize("iterations", [range(2, 4), np.array([2, 3]), np.int64(3)])
def test_whole_numbers_of_numpy(iterations):
    result = register(IMAGE, IMAGE.flip(2), window=np.int64(5), iterations=iterations)
    assert result.levels[-1]["iterations"] == 3


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        pytest.param({"transform": "velocity"}, 0.2, id="velocity"),
        pytest.param({"transform": "bspline"}, 0.2, id="bspline"),
        pytest.param({"similarity": "mse"}, 0.4, id="mse"),
        pytest.param({"similarity": "mind"}, 0.6, id="mind"),
        pytest.param({"similarity": "mi"}, 0.6, id="mi"),
        pytest.param({"affine": True}, 0.2, id="affine"),
        pytest.param({"transform": "velocity", "similarity": "mse", "affine": True}, 0.4, id="all"),
    ],
)
@pytest.mark.parametrize(
    ("shape", "amplitude"), [((26, 24, 28), (1.5, -1.5, 1.5)), ((56, 60), (3.0, -3.0))], ids=["3d", "2d"]
)
def test_similarities_and_transforms(shape, amplitude, options, limit):
    fixed, moving, truth = pair(shape, amplitude)
    result = register(fixed, moving, **QUICK, **options)
    assert error(result.displacement, truth) < limit * error(torch.zeros_like(truth), truth)
    assert metrics.folding(result.displacement) == 0
    assert (result.velocity is not None) == (options.get("transform") == "velocity")
    assert (result.affine is not None) == options.get("affine", False)
    assert torch.equal(result.moved, fastreg.warp(moving, result.displacement))


@pytest.mark.parametrize("similarity", ["mind", "mi"])
def test_other_contrast_is_seen_through(similarity):
    fixed, moving, truth = pair((26, 28, 24), (1.5, -1.5, 1.5))
    # dark is bright, and everything bends
    other = torch.exp(-moving)
    found = register(fixed, other, similarity=similarity, **QUICK).displacement
    assert error(found, truth) < 0.6 * error(torch.zeros_like(truth), truth)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.0, 1.5)])
def test_affine_is_found(spacing):
    shape = (24, 40, 36)
    matrix = torch.tensor([[[1.05, 0.02, 0.0, -1.0], [-0.03, 0.95, 0.05, 1.5], [0.0, -0.04, 1.04, 0.8]]])
    moving = texture(shape)
    fixed = fastreg.warp(moving, None, affine=matrix, padding="border")
    truth = fastreg.affine_displacement(matrix, shape)
    result = register(fixed, moving, spacing=spacing, affine=True, iterations=0)
    assert torch.equal(result.displacement, fastreg.affine_displacement(result.affine, shape))
    assert error(result.displacement, truth) < 0.1 * error(torch.zeros_like(truth), truth)
    torch.testing.assert_close(result.affine, matrix, atol=0.2, rtol=0)
    affine = [level for level in result.levels if level["transform"] == "affine"]
    assert affine
    assert all(level["loss_last"] <= level["loss_first"] + 1e-4 for level in affine)


def test_velocity_is_integrated():
    fixed, moving, _ = pair((26, 26, 26), (1.5, 1.5, 1.5))
    result = register(fixed, moving, transform="velocity", **QUICK)
    forward = fastreg.integrate_velocity(result.velocity, 5)
    backward = fastreg.integrate_velocity(-result.velocity, 5)
    inner = (..., slice(3, -3), slice(3, -3), slice(3, -3))
    assert fastreg.compose(forward, backward)[inner].abs().max() < 0.1 * forward.abs().max()
    torch.testing.assert_close(fastreg.resize_displacement(forward, (26, 26, 26)), result.displacement)


def test_velocity_comes_before_the_affine_part():
    matrix = torch.tensor([[[1.1, 0.1, -4.0], [-0.2, 0.8, 5.0]]])
    velocity = 3 * F.interpolate(torch.randn(1, 2, 8, 8), size=(48, 48), mode="bilinear", align_corners=True)
    moving = texture((48, 48))
    u = fastreg.integrate_velocity(velocity)
    u = torch.einsum("nij,nj...->ni...", matrix[..., :2], u) + fastreg.affine_displacement(matrix, (48, 48))
    fixed = fastreg.warp(moving, u, padding="border")
    result = register(fixed, moving, transform="velocity", affine=True, regularization=0.1, **QUICK)
    assert metrics.folding(result.displacement) == 0
    before, after = ((fixed - t).square().mean() for t in (moving, result.moved))
    assert after < 0.35 * before
    u = fastreg.resize_displacement(fastreg.integrate_velocity(result.velocity, 5), (48, 48))
    u = torch.einsum("nij,nj...->ni...", result.affine[..., :2], u)
    torch.testing.assert_close(
        result.displacement, u + fastreg.affine_displacement(result.affine, (48, 48)), atol=1e-4, rtol=1e-4
    )


def test_progress_counts_the_affine_levels():
    fixed, moving, _ = pair((26, 26), (1.0, 1.0))
    calls = []
    result = register(fixed, moving, affine=True, iterations=2, progress=lambda *a: calls.append(a[:2]))
    assert sorted({level for level, _ in calls}) == list(range(len(result.levels)))
    assert {n for _, n in calls} == {len(result.levels)}


@pytest.mark.parametrize("transform", ["velocity", "bspline"])
def test_thin_images_with_every_transform(transform):
    for shape in ((1, 20, 22), (20, 1), (3, 18, 17)):
        moving = texture(shape)
        result = register(moving.roll(1, -1), moving, transform=transform, affine=True, iterations=3)
        assert result.displacement.isfinite().all()
        for axis, n in enumerate(shape):
            if n == 1:
                assert result.displacement[:, axis].abs().max() < 1e-4


IMAGE = torch.rand(1, 1, 8, 8, 8)
TWO = IMAGE.repeat(2, 1, 1, 1, 1)
NAN = IMAGE.clone()
NAN[0, 0, 1, 2, 3] = float("nan")


@pytest.mark.parametrize(
    ("kind", "match", "arguments", "options"),
    [
        (TypeError, "fixed must be a tensor, got ndarray", (IMAGE.numpy(), IMAGE), {}),
        (TypeError, "moving must have a real dtype", (IMAGE, IMAGE > 0.5), {}),
        (ValueError, r"fixed must have shape .*got \(8, 8, 8\)", (IMAGE[0, 0], IMAGE), {}),
        (ValueError, r"fixed must have shape .*got \(2, 1, 8, 8, 8\)", (TWO, IMAGE), {}),
        (ValueError, "fixed must not be empty", (IMAGE[..., :0], IMAGE[..., :0]), {}),
        (ValueError, r"moving must have the shape \(1, 1, 8, 8, 8\) of fixed", (IMAGE, IMAGE[..., :7]), {}),
        (ValueError, "moving must be finite, got 1 NaN or infinite value", (IMAGE, NAN), {}),
        (ValueError, "spacing must be a number > 0, or one per axis", (IMAGE, IMAGE), {"spacing": 0.0}),
        (
            ValueError,
            "spacing must be a number > 0, or one per axis",
            (IMAGE, IMAGE),
            {"spacing": (1.0, -1.0, 1.0)},
        ),
        (
            ValueError,
            r"spacing must be a number > 0, or one per axis \(3\)",
            (IMAGE, IMAGE),
            {"spacing": (1.0, 1.0)},
        ),
        (TypeError, "spacing must be a number or 3 numbers, got 'wide'", (IMAGE, IMAGE), {"spacing": "wide"}),
        (
            ValueError,
            "spacing must be a number > 0, or one per axis",
            (IMAGE, IMAGE),
            {"spacing": float("nan")},
        ),
        (ValueError, "mask must have shape", (IMAGE, IMAGE), {"mask": IMAGE[..., :7]}),
        (ValueError, "mask must be at least 0", (IMAGE, IMAGE), {"mask": -IMAGE}),
        (ValueError, "mask must be finite", (IMAGE, IMAGE), {"mask": NAN}),
        (
            ValueError,
            "similarity must be 'auto' or 'lcc' or 'mind' or 'mi' or 'mse', got 'ncc'",
            (IMAGE, IMAGE),
            {"similarity": "ncc"},
        ),
        (ValueError, "transform must be 'dense' or 'velocity'", (IMAGE, IMAGE), {"transform": None}),
        (TypeError, "affine must be True or False, got 1", (IMAGE, IMAGE), {"affine": 1}),
        (ValueError, "window must be odd and positive, got 6", (IMAGE, IMAGE), {"window": 6}),
        (TypeError, "window must be an int, got 7.0", (IMAGE, IMAGE), {"window": 7.0}),
        (ValueError, "regularization must be a number >= 0", (IMAGE, IMAGE), {"regularization": -1.0}),
        (
            ValueError,
            "regularization must be 'auto' or a number, got 'Auto'",
            (IMAGE, IMAGE),
            {"regularization": "Auto"},
        ),
        (ValueError, "smoothing must be a number >= 0", (IMAGE, IMAGE), {"smoothing": -1.0}),
        (ValueError, "levels must be at least 1", (IMAGE, IMAGE), {"levels": 0}),
        (ValueError, "iterations must be at least 0", (IMAGE, IMAGE), {"iterations": -1}),
        (ValueError, "iterations must hold at least one number", (IMAGE, IMAGE), {"iterations": ()}),
        (TypeError, "iterations must be an int, got 2.5", (IMAGE, IMAGE), {"iterations": (10, 2.5)}),
        (ValueError, "learning_rate must be a number > 0", (IMAGE, IMAGE), {"learning_rate": 0.0}),
        (
            TypeError,
            "fixed must be a dense tensor with data, got a sparse_coo",
            (IMAGE.to_sparse(), IMAGE),
            {},
        ),
        (TypeError, "moving must be a dense tensor with data, got a meta", (IMAGE, IMAGE.to("meta")), {}),
        (ValueError, "the loss must stay finite, got", (IMAGE, TWO[:1].flip(2)), {"regularization": 1e38}),
        (ValueError, "the loss must stay finite, got", (IMAGE, IMAGE.flip(2)), {"learning_rate": 1e30}),
        (TypeError, "progress must be callable", (IMAGE, IMAGE), {"progress": 3}),
    ],
)
def test_errors(kind, match, arguments, options):
    with pytest.raises(kind, match=f"fastreg::register: {match}"):
        register(*arguments, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_optimiser_is_that_of_torch(dtype):
    ours = torch.linspace(-2, 3, 50, dtype=dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    adam, reference = Adam(ours, 0.3, 1e-2), torch.optim.Adam([theirs], lr=0.3, eps=1e-2)
    for step in range(20):
        for parameter, optimizer in ((ours, adam), (theirs, reference)):
            optimizer.zero_grad()
            (parameter - 1).pow(4).sum().backward()
            optimizer.step()
        if step == 10:
            adam.learning_rate = reference.param_groups[0]["lr"] = 0.05
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
