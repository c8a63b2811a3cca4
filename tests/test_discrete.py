"""The discrete start of `register`: motion along a wall that the descent does not find."""

import math

import pytest
import torch

import fastreg
from fastreg import _discrete, metrics
from fastreg.registration import register


def texture(shape, seed, sigma):
    noise = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))
    smooth = fastreg.smooth(noise, sigma)
    return smooth / smooth.std()


def sliding(shape, shift, sigma, noise=0.1):
    """An organ, of high x, that slides by shift voxels along the first axis, beside a wall that rests.

    Returns: fixed, moving, truth (1, nd, *shape) in voxels, organ: bool (*shape).
    """
    organ, wall = texture((shape[0] + 2 * shift, *shape[1:]), 0, sigma), texture(shape, 1, sigma)
    inside = (torch.arange(shape[-1]) >= shape[-1] // 2).expand(shape)
    images = [
        torch.where(inside, organ[:, :, first : first + shape[0]], wall)
        + noise * torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))
        for first, seed in ((shift, 2), (0, 3))
    ]
    truth = torch.zeros(1, len(shape), *shape)
    truth[:, 0] = shift * inside
    return *images, truth, inside


def errors(u, truth, organ, shift):
    """Mean distances in the organ and in the wall, voxels, where both images show them."""
    seen = (slice(shift + 2, -shift - 2), *[slice(2, -2)] * (u.dim() - 3))
    distance, organ = (u - truth).norm(dim=1)[0][seen], organ[seen]
    return float(distance[organ].mean()), float(distance[~organ].mean())


PAIRS = {"2d": ((80, 72), 13, 1.5, 2.0), "3d": ((36, 28, 36), 8, 1.2, 3.5)}  # shape, voxels, grain, mm


@pytest.mark.parametrize("kind", PAIRS)
def test_sliding_is_found_and_was_not(kind):
    shape, shift, grain, spacing = PAIRS[kind]
    fixed, moving, truth, organ = sliding(shape, shift, grain)
    descended = register(fixed, moving, spacing=spacing, search_range=0)
    assert errors(descended.displacement, truth, organ, shift)[0] > 0.5 * shift
    found = register(fixed, moving, spacing=spacing)
    inner, outer = errors(found.displacement, truth, organ, shift)
    assert inner < 0.2 * shift
    assert outer < 0.1 * shift
    assert metrics.folding(found.displacement) < 1e-3
    assert found.discrete["used"]
    assert found.discrete["range_mm"] == _discrete.RANGE
    assert 0.3 < found.discrete["share"] <= 1
    assert found.discrete["moved_mm"] > 1
    assert found.discrete["far_share"] > 0.1
    assert found.discrete["far_gain"] > 0.1
    # the level before the finest is left out, and what is penalised is not all of the motion
    assert [tuple(level["shape"]) for level in found.levels][-1] == shape
    assert len(found.levels) == len(descended.levels) - 1
    everything = float(fastreg.diffusion(found.displacement, spacing=spacing))
    assert found.levels[-1]["regularity"] < 0.65 * everything
    assert descended.levels[-1]["regularity"] < 2 * float(
        fastreg.diffusion(descended.displacement, spacing=spacing)
    )


@pytest.mark.parametrize(
    "options",
    [{"transform": "bspline"}, {"similarity": "mind"}, {"similarity": "mi"}, {"levels": 1}, {"levels": 2}],
)
def test_sliding_with_other_options(options):
    shape, shift, grain, spacing = PAIRS["2d"]
    fixed, moving, truth, organ = sliding(shape, shift, grain)
    found = register(fixed, moving, spacing=spacing, **options)
    assert found.discrete["used"]
    inner, outer = errors(found.displacement, truth, organ, shift)
    assert inner < 0.25 * shift
    assert outer < 0.2 * shift


def test_affine_part_comes_first():
    """The field that is found after a matrix is that of the images it leaves."""
    shape, shift, grain, spacing = PAIRS["2d"]
    fixed, moving, truth, organ = sliding(shape, shift, grain)
    c, s = 1.04 * math.cos(0.06), 1.04 * math.sin(0.06)
    matrix = torch.tensor([[[c, -s, 2.0], [s, c, -5.0]]])
    inverse = torch.linalg.inv(torch.cat([matrix[0], torch.tensor([[0.0, 0.0, 1.0]])]))[None, :2]
    turned = fastreg.warp(moving, None, affine=inverse, padding="border")
    truth = fastreg.compose(fastreg.affine_displacement(matrix, shape), truth)
    begin = register(fixed, turned, spacing=spacing, start=matrix)
    assert begin.discrete["used"]
    assert errors(begin.displacement, truth, organ, shift)[0] < 0.3 * shift
    # half a radian, which no descent would leave to be found
    c, s = math.cos(0.5), math.sin(0.5)
    linear = torch.tensor([[c, -s], [s, c]])
    middle = torch.tensor([[n / 2] for n in shape])
    matrix = torch.cat([linear, middle - linear @ middle], 1)[None]
    inverse = torch.cat([linear.T, middle - linear.T @ middle], 1)[None]
    images = (fixed, fastreg.warp(moving, None, affine=inverse, padding="border"), None, None)
    millimetres = matrix[0].double() * torch.tensor([1.0, 1.0, spacing])
    zero = torch.zeros(1, 2, 1, 1)
    after = _discrete.start(images, (spacing, spacing), zero, millimetres, (40.0, "")).field
    u = fastreg.resize_displacement(after, shape) + fastreg.affine_displacement(matrix, shape)
    truth = torch.einsum("ij,njyx->niyx", linear, sliding(shape, shift, grain)[2])
    truth = truth + fastreg.affine_displacement(matrix, shape)
    distance = (u - truth).norm(dim=1)[0, 28:52]
    assert float(distance[:, 46:58].median()) < 0.2 * shift
    assert float(distance[:, 14:26].median()) < 0.2 * shift


def test_field_of_cells():
    cells = torch.arange(3.0).view(1, 1, 1, 3).expand(1, 2, 2, 3)
    units = _discrete._spread(cells, (2, 4), (3, 11))
    assert units.shape == (1, 2, 3, 11)
    # in the middle of cells, and between them: in units of that axis
    torch.testing.assert_close((units[0, 1, 0, 1] + units[0, 1, 0, 2]) / 2, torch.tensor(0.25))
    torch.testing.assert_close(units[0, 1, 0, 5:7].mean(), torch.tensor(4.0))
    torch.testing.assert_close(units[0, 0, 0, 5:7].mean(), torch.tensor(2.0))


def test_masks_leave_out_what_misleads():
    shape, shift, grain, spacing = PAIRS["2d"]
    fixed, moving, truth, organ = sliding(shape, shift, grain)
    # an implant in both images that stays where it is, brighter than all else
    mask = torch.ones(1, 1, *shape)
    mask[..., 34:46, 42:62] = 0
    broken = [x.masked_fill(mask == 0, 0) + (1 - mask) * 20 * texture(shape, 7, 1.0) for x in (fixed, moving)]
    options = {"spacing": spacing, "iterations": 20}
    found = register(*broken, mask=mask, moving_mask=mask, **options)
    assert found.discrete["used"]
    with_masks = errors(found.displacement, truth, organ, shift)[0]
    assert with_masks < 0.4 * shift
    without = register(*broken, **options).displacement
    assert with_masks < 0.7 * errors(without, truth, organ, shift)[0]
    # one that lets nothing be seen moves nothing
    nothing = register(fixed, moving, mask=torch.zeros(1, 1, *shape), **options).displacement
    assert nothing.isfinite().all()
    assert nothing.abs().max() < 1e-3


@pytest.mark.parametrize(
    ("shape", "options", "most"),
    [
        ((64, 70), {}, 0.02),
        ((30, 34, 32), {"window": 5}, 0.02),
        # of windows below the noise floor LCC grows with the contrast of what they fetch, and many of 3 voxels are below it
        ((30, 34, 32), {}, 0.3),
    ],
)
def test_no_motion_stays_none(shape, options, most):
    image = texture(shape, 0, 1.5)
    found = register(image, image, spacing=4.0, **options).displacement
    assert found.abs().max() < most
    assert found.abs().mean() < 0.1 * most
    flat = register(torch.zeros(1, 1, *shape), torch.ones(1, 1, *shape), spacing=4.0)
    assert torch.equal(flat.displacement, torch.zeros_like(flat.displacement))


def test_small_motion_is_that_of_the_descent():
    """Nothing slides: what the search adds stays within a fraction of a voxel."""
    shape = (72, 80)
    moving = texture(shape, 0, 2.0)
    y = torch.sin(torch.linspace(0, math.pi, shape[0]))[:, None] * torch.sin(
        torch.linspace(0, math.pi, shape[1])
    )
    truth = torch.stack([2.0 * y, -1.5 * y])[None]
    fixed = fastreg.warp(moving, truth, padding="border")
    with_search, without = (
        (register(fixed, moving, spacing=2.0, search_range=r).displacement - truth)[..., 8:-8, 8:-8]
        .norm(dim=1)
        .mean()
        for r in (None, 0)
    )
    assert with_search < without + 0.1
    assert with_search < 0.4


def test_what_is_too_small_or_cannot_take_it_is_as_without():
    image = texture((40, 44), 0, 1.5)
    for options, why in (
        ({}, "longest side"),
        ({"spacing": 5.0}, "voxels"),
        ({"spacing": 4.0, "transform": "velocity"}, "velocity"),
        ({"spacing": 4.0, "transform": "affine"}, "affine"),
        ({"spacing": 4.0, "symmetric": True}, "symmetric"),
        ({"spacing": 4.0, "iterations": 0}, "iterations"),
        ({"spacing": 4.0, "search_range": 0}, "search_range"),
    ):
        result = register(image.roll(1, -1), image, **{"iterations": 3, **options})
        assert not result.discrete["used"]
        assert why in result.discrete["why"]
        off = register(image.roll(1, -1), image, **{"iterations": 3, **options, "search_range": 0})
        assert torch.equal(result.displacement, off.displacement)


@pytest.mark.parametrize("shape", [(1, 60, 64), (3, 60, 64), (64, 1), (7, 5, 90), (33, 2, 31)])
def test_thin_images(shape):
    image = texture(shape, 0, 1.0)
    result = register(image.roll(1, -1), image, spacing=4.0, iterations=3)
    assert result.displacement.isfinite().all()
    for axis, n in enumerate(shape):
        if n == 1:
            assert result.displacement[:, axis].abs().max() == 0


def test_several_channels_and_iterations_of_zero():
    shape, shift, grain, spacing = PAIRS["2d"]
    fixed, moving, truth, organ = sliding(shape, shift, grain)
    plain = torch.zeros_like(fixed)
    images = torch.cat([plain, fixed], 1), torch.cat([plain, moving], 1)
    found = register(*images, spacing=spacing)
    assert errors(found.displacement, truth, organ, shift)[0] < 0.25 * shift
    # one that says that all rests, and counts nothing
    images = tuple(torch.cat([10 * texture(shape, 9, 1.0), x], 1) for x in (fixed, moving))
    found = register(*images, spacing=spacing, channel_weights=(0, 1))
    assert errors(found.displacement, truth, organ, shift)[0] < 0.25 * shift
    # the finest level is left out: the level before it begins where the search ended
    found = register(fixed, moving, spacing=spacing, iterations=(20, 20, 0))
    assert [level["iterations"] > 0 for level in found.levels][-2:] == [True, False]
    assert errors(found.displacement, truth, organ, shift)[0] < 0.4 * shift


def test_bits_do_not_depend_on_threads():
    shape, shift, grain, spacing = PAIRS["3d"]
    images = sliding(shape, shift, grain)[:2]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            zero = torch.zeros(1, 3, 1, 1, 1)
            found.append(_discrete.start((*images, None, None), (spacing,) * 3, zero, None, (40.0, "")).field)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[1], found[2])
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=0)


def test_range_says_how_far():
    shape, shift, grain, spacing = PAIRS["2d"]
    fixed, moving, truth, organ = sliding(shape, shift, grain)
    near = register(fixed, moving, spacing=spacing, search_range=1.0)
    assert near.discrete["range_mm"] == 1.0
    far = register(fixed, moving, spacing=spacing, search_range=140)  # features grow, not the radius
    assert far.discrete["used"]
    assert errors(far.displacement, truth, organ, shift)[0] < 0.4 * shift


def test_progress_counts_it():
    shape, shift, grain, spacing = PAIRS["2d"]
    fixed, moving, *_ = sliding(shape, shift, grain)
    calls = []
    result = register(fixed, moving, spacing=spacing, iterations=3, progress=lambda *a: calls.append(a))
    levels = [c[0] for c in calls]
    assert levels == sorted(levels)
    assert {c[1] for c in calls} == {levels[-1] + 1}
    assert len({*levels}) == len(result.levels) + 1
    assert all(0 <= i < n and math.isfinite(loss) for _, _, i, n, loss in calls)


def test_search_ends_where_its_first_level_finds_nothing_new():
    """Unless it was asked for; then all four levels search."""
    image = texture((80, 72), 0, 1.5)
    for asked, levels in ((None, 1), (40, 4)):
        calls = []
        options = {"spacing": 2.0, "iterations": 3, "search_range": asked}
        result = register(image.roll(1, -1), image, progress=lambda *a, c=calls: c.append(a), **options)
        assert len([c for c in calls if c[3] == 4]) == levels
        assert result.discrete["used"] == (asked is not None)
        assert ("share" in result.discrete) == (asked is not None)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (
            ValueError,
            "search_range must be at most the longest side of the image, 252 mm, got 300",
            {"search_range": 300},
        ),
        (ValueError, "search_range must be a number >= 0", {"search_range": -1}),
        (ValueError, "search_range must be a number >= 0", {"search_range": math.nan}),
        (TypeError, "search_range must be a number", {"search_range": "far"}),
        (
            ValueError,
            "search_range must be 0 or left out with transform 'velocity', got 20",
            {"search_range": 20, "transform": "velocity"},
        ),
        (
            ValueError,
            "search_range must be 0 or left out with symmetric, got 20",
            {"search_range": 20, "symmetric": True},
        ),
    ],
)
def test_errors(error, message, options):
    image = torch.rand(1, 1, 64, 50)
    with pytest.raises(error, match=message):
        register(image, image, spacing=4.0, **options)
