import itertools
import math

import numpy as np
import pytest
import torch
from common import (
    COMPILED,
    DTYPES,
    assert_close,
    check_against_reference,
    double,
    gradients,
    skip_where_the_interpreter_truncates,
)
from contract import Case, Contract
from scipy.ndimage import map_coordinates

import fastreg
from fastreg.ops.local_correlation import PADDINGS, SCALES, local_correlation_ref

# Odd sizes, rows of more than one vector, a single channel, one-voxel axes, radii that differ or exceed the image.
CASES = [
    pytest.param((2, 3, 4, 5, 6), 1, id="n2c3d4h5w6"),
    pytest.param((1, 5, 3, 4, 37), 2, id="c5w37"),
    pytest.param((1, 2, 5, 4, 9), (0, 1, 3), id="radius-per-axis"),
    pytest.param((2, 4, 7, 21), 2, id="2d"),
    pytest.param((1, 1, 6, 3), (3, 0), id="2d-radius-per-axis"),
    pytest.param((1, 3, 1, 4, 1), 1, id="one-voxel-axes"),
    pytest.param((1, 2, 2, 1, 3), 3, id="radius-beyond-image"),
    pytest.param((1, 2, 3, 4, 5), 0, id="radius-0"),
]


def make(shape, dtype=torch.float64, displaced=False):
    """Maps of different mean and contrast; displacements keep away from whole numbers, where two gradients meet."""
    fixed = (0.3 + torch.randn(shape)).to(dtype)
    moving = (2 * torch.randn(shape) - 0.5).to(dtype)
    tensors = [fixed, moving]
    if displaced:
        u = torch.randint(-2, 3, (shape[0], len(shape) - 2, *shape[2:])) + 0.1
        u = (u + 0.8 * torch.rand_like(u)).to(torch.promote_types(dtype, torch.float32))
        tensors.append(u)
    return [t.requires_grad_() for t in tensors]


def per_axis(radius, shape):
    return list(radius) if isinstance(radius, tuple) else [radius] * (len(shape) - 2)


def reference(radius, shape, normalize=False, scale="mean", padding="zeros"):
    return lambda f, m, u=None: local_correlation_ref(
        f, m, per_axis(radius, shape), u, normalize, scale, padding
    )[0]


def correlate(radius, **options):
    return lambda f, m, u=None: fastreg.local_correlation(f, m, radius, displacement=u, **options)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
@pytest.mark.parametrize("displaced", [False, True], ids=["still", "displaced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "radius"), CASES)
def test_against_reference(shape, radius, dtype, displaced, normalize, padding):
    options = {"normalize": normalize, "padding": padding, "scale": "sqrt"}
    # Signed sums cancel: their last digits are those of the largest terms.
    tolerance = 1e-4 if dtype == torch.float32 else None
    inputs = make(shape, dtype, displaced)
    check_against_reference(
        correlate(radius, **options), reference(radius, shape, **options), inputs, tolerance
    )


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
def test_across_tiles(normalize, padding):
    """More channels, planes and voxels of a plane than a tile of a GPU kernel, offsets in pieces of unequal size."""
    shape, radius = (1, 19, 6, 2, 67), (3, 0, 1)
    options = {"normalize": normalize, "padding": padding, "scale": "mean"}
    check_against_reference(
        correlate(radius, **options), reference(radius, shape, **options), make(shape, torch.float32), 1e-4
    )


@pytest.mark.parametrize("padding", PADDINGS)
def test_offsets_in_pieces_pass_on_no_nan(padding):
    shape, radius = (1, 2, 9, 2, 5), (3, 0, 1)
    for i, place in itertools.product(range(2), ((0, 0, 0), (4, 1, 2), (8, 0, 4))):
        given = make(shape, torch.float32)
        with torch.no_grad():
            given[i][(0, 1, *place)] = math.nan
        out, grads = gradients(correlate(radius, padding=padding), given)
        truth, truth_grads = gradients(reference(radius, shape, padding=padding), [double(t) for t in given])
        for a, b in zip((out, *grads), (truth, *truth_grads), strict=True):
            assert torch.equal(a.isnan(), b.isnan())


# Kernels cut images, channels and offsets into pieces: sizes and radii beyond one piece, and not multiples of it.
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("shape", "radius", "dtype"),
    [
        pytest.param((1, 19, 3, 17, 35), 2, torch.float32, id="c19d3h17w35"),
        pytest.param((1, 37, 18, 33), (2, 4), torch.float32, id="2d-c37"),
        pytest.param((1, 18, 2, 9, 33), (1, 3, 1), torch.float64, id="c18-fp64"),
        pytest.param((1, 3, 5, 2, 3), (4, 3, 3), torch.float32, id="offsets"),
    ],
)
def test_beyond_one_tile(shape, radius, dtype, padding):
    options = {"normalize": padding == "border", "padding": padding}
    inputs = make(shape, dtype, displaced=padding == "border")
    tolerance = 1e-4 if dtype == torch.float32 else None
    check_against_reference(
        correlate(radius, **options), reference(radius, shape, **options), inputs, tolerance
    )


def by_loops(fixed, moving, radius, displacement, normalize, scale, padding):
    n, channels, *size = fixed.shape
    out = np.zeros((n, int(np.prod([2 * r + 1 for r in radius])), *size))
    for i in range(n):
        f, m = fixed[i], moving[i]
        if displacement is not None:
            positions = np.indices(size) + displacement[i]
            m = np.stack([map_coordinates(c, positions, order=1, mode="grid-constant") for c in m])
        if normalize:
            mu, sigma = (f.mean() + m.mean()) / 2, (f.std(ddof=1) + m.std(ddof=1)) / 2
            f, m = (f - mu) / (sigma + 1e-6), (m - mu) / (sigma + 1e-6)
        factor = {"mean": 1 / channels, "sum": 1, "sqrt": channels**-0.5}[scale]
        for k, offset in enumerate(itertools.product(*[range(-r, r + 1) for r in radius])):
            for p in itertools.product(*[range(s) for s in size]):
                q = tuple(a + b for a, b in zip(p, offset, strict=True))
                inside = tuple(min(max(a, 0), s - 1) for a, s in zip(q, size, strict=True))
                if q == inside or padding == "border":
                    out[(i, k, *p)] = factor * f[(slice(None), *p)] @ m[(slice(None), *inside)]
    return torch.from_numpy(out)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
@pytest.mark.parametrize("displaced", [False, True], ids=["still", "displaced"])
@pytest.mark.parametrize(("shape", "radius"), [((2, 3, 3, 4, 5), (1, 0, 2)), ((1, 2, 5, 6), (3, 1))])
def test_is_the_definition(shape, radius, displaced, normalize, padding):
    for scale in SCALES:
        tensors = [t.detach() for t in make(shape, displaced=displaced)]
        f, m, u = [*[t.cpu().numpy() for t in tensors], None][:3]
        expected = by_loops(f, m, radius, u, normalize, scale, padding)
        options = {"normalize": normalize, "scale": scale, "padding": padding}
        assert_close(correlate(radius, **options)(*tensors), expected, 1e-11)
        assert_close(reference(radius, shape, **options)(*tensors), expected, 1e-11)


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
def test_displacement_is_warp_then_correlation(normalize):
    fixed, moving, u = make((2, 3, 6, 7, 20), displaced=True)
    warped = fastreg.warp(moving, u)
    assert_close(
        fastreg.local_correlation(fixed, moving, displacement=u, normalize=normalize),
        fastreg.local_correlation(fixed, warped, normalize=normalize),
        1e-12,
    )


def test_centre_of_a_map_with_itself():
    fixed = torch.rand(1, 4, 5, 6, 7)
    out = fastreg.local_correlation(fixed, fixed, 2)
    assert_close(out[:, 62], fixed.double().square().mean(1), 1e-6)
    assert torch.equal(out[:, 0, 2:, 2:, 2:], out[:, 124, :-2, :-2, :-2])


def test_finds_a_shift():
    moving = torch.randn(1, 32, 9, 10, 11)
    fixed = torch.roll(moving, (-1, 2, -2), (2, 3, 4))  # fixed(x) = moving(x + (1, -2, 2))
    best = fastreg.local_correlation(fixed, moving, 2, normalize=True)[:, :, 3:-3, 3:-3, 3:-3].argmax(1)
    assert best.eq(3 * 25 + 0 * 5 + 4).all()


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalize"])
@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3))[1:])
def test_any_choice_of_gradients(wanted, normalize):
    inputs = make((2, 3, 4, 5, 9), torch.float32, displaced=True)
    out = correlate(1, normalize=normalize)(*inputs)
    weight = torch.randn_like(out)
    every = torch.autograd.grad(out, inputs, weight)
    some = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    grads = iter(
        torch.autograd.grad(correlate(1, normalize=normalize)(*some), [t for t in some if t.requires_grad], weight)
    )  # fmt: skip
    for expected, w in zip(every, wanted, strict=True):
        assert not w or torch.equal(next(grads), expected)


def test_far_from_zero_mean():
    # The expanded form (sum f m - mu sum f - ...) loses all digits here.
    fixed, moving = (1000 + torch.randn(1, 4, 6, 7, 8) for _ in range(2))
    limit = 1e-5 if COMPILED else 1e-3  # the reference rounds its mean to fp32
    expected = reference(1, fixed.shape, normalize=True)(fixed.double(), moving.double())
    assert_close(fastreg.local_correlation(fixed, moving, 1, normalize=True), expected, limit, floor=0.1)


@pytest.mark.parametrize("tiny", [1e-36, 1e-40, 1e-44])
def test_maps_that_are_nearly_constant_are_finite(tiny):
    """The slope of their deviation lies beyond fp32."""
    fixed = torch.rand(1, 2, 4, 5, 6).requires_grad_()
    moving = torch.zeros(1, 2, 4, 5, 6)
    moving.view(-1)[::7] = tiny
    moving.requires_grad_()
    for pair in ((fixed, moving), (moving, fixed)):
        out = fastreg.local_correlation(*pair, 1, normalize=True)
        grads = torch.autograd.grad(out, pair, torch.randn_like(out))
        assert all(t.isfinite().all() for t in (out, *grads))


def test_a_result_that_does_not_fit_is_refused_in_words(monkeypatch):
    def full(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(torch.ops.fastreg, "local_correlation", full)
    maps = torch.zeros(1, 1, 100, 100, 100)
    with pytest.raises(
        ValueError,
        match=r"radius must leave a result that fits into memory, got .*\(1, 8120601, 100, 100, 100\), 32482 GB",
    ):
        fastreg.local_correlation(maps, maps, 100)


@pytest.mark.parametrize("displaced", [False, True], ids=["still", "displaced"])
@pytest.mark.parametrize(("a", "b"), [(0.1, 0.1), (0.0, 0.0), (3.0, -2.0)])
def test_constant_maps_are_finite(a, b, displaced):
    inputs = make((2, 3, 4, 5, 9), torch.float32, displaced)
    with torch.no_grad():
        inputs[0].fill_(a), inputs[1].fill_(b)
        if displaced:
            inputs[2].fill_(0)
    out = correlate(1, normalize=True)(*inputs)
    assert out.isfinite().all()
    if a == b:
        assert out.eq(0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs))


def test_single_number_per_sample():
    fixed = torch.full((2, 1, 1, 1), 3.0, requires_grad=True)
    out = fastreg.local_correlation(fixed, fixed, 1, normalize=True)
    assert out.eq(0).all()
    assert torch.autograd.grad(out.sum(), fixed)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_do_not_overflow_inside(dtype):
    skip_where_the_interpreter_truncates(dtype)
    inputs = [torch.full((1, 64, 3, 4, 5), 30.0, dtype=dtype, requires_grad=True) for _ in range(2)]
    out = fastreg.local_correlation(*inputs, 1)  # the sum over channels is 57600, of the gradient 1620
    assert_close(out, reference(1, inputs[0].shape)(*[i.double() for i in inputs]))
    big = torch.full((1, 2, 3, 4, 5), 300.0, dtype=dtype)
    out = fastreg.local_correlation(big, big / 2, 1, scale="sum")[:, 13]
    assert torch.equal(out, torch.full(out.shape, 90000.0).to(dtype))  # infinite in fp16: the formula's value
    sign = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1, 1).to(dtype)
    assert fastreg.local_correlation(big, big * sign, 1).eq(0).all()
    spread = 60000 * torch.randn(1, 2, 3, 4, 5).sign().to(torch.float16)
    assert fastreg.local_correlation(spread, spread, 1, normalize=True).isfinite().all()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("displaced", [False, True], ids=["still", "displaced"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_reaches_what_reads_it(bad, displaced, padding):
    shape = (2, 3, 5, 6, 21)
    inputs = make(shape, torch.float32, displaced)
    for i in range(2):
        given = [t.detach().clone() for t in inputs]
        given[i][1, 1, 2, 0, 9] = bad
        check_non_finite(given, shape, {"padding": padding})
    given = [t.detach().clone() for t in inputs]
    given[0][1, 1, 2, 3, 9] = given[1][1, 1, 2, 3, 9] = bad
    out = correlate(1, normalize=True)(*given)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def check_non_finite(given, shape, options):
    given = [t.requires_grad_() for t in given]
    out = correlate(1, **options)(*given)
    weight = torch.randn_like(out)
    truth_inputs = [t.detach().double().requires_grad_() for t in given]
    truth = reference(1, shape, **options)(*truth_inputs)
    assert torch.equal(out.isnan(), truth.isnan())
    assert torch.equal(out.isinf(), truth.isinf())
    assert not out.isfinite().all()
    for g, t in zip(
        torch.autograd.grad(out, given, weight)[:2],
        torch.autograd.grad(truth, truth_inputs, weight.double())[:2],
        strict=True,
    ):
        assert torch.equal(g.isfinite(), t.isfinite())


@pytest.mark.parametrize("padding", PADDINGS)
def test_nan_gradient_reaches_what_made_it(padding):
    given = make((1, 2, 4, 5, 21), torch.float32)
    out = correlate(1, padding=padding)(*given)
    weight = torch.randn_like(out)
    weight[0, 8, 1, 2, 10] = weight[0, 26, 3, 4, 20] = math.nan  # offsets (-1, 1, 1) and (1, 1, 1)
    grad_fixed, grad_moving = torch.autograd.grad(out, given, weight)
    places = [[1, 2, 10], [3, 4, 20]]
    assert grad_fixed[0, 0].isnan().nonzero().tolist() == places
    reached = [[0, 3, 11]] + ([[3, 4, 20]] if padding == "border" else [])
    assert grad_moving[0, 0].isnan().nonzero().tolist() == reached


def test_mixed_dtypes():
    fixed, moving, u = make((1, 2, 4, 5, 6), torch.float32, displaced=True)
    out = fastreg.local_correlation(fixed.bfloat16(), moving, 1)
    assert out.dtype == torch.float32
    assert torch.equal(out, fastreg.local_correlation(fixed.bfloat16().float(), moving, 1))
    halves = [fixed.detach().half().requires_grad_(), moving.detach().half().requires_grad_()]
    wide = u.detach().double().requires_grad_()
    check_against_reference(correlate(1), reference(1, fixed.shape), (*halves, wide))
    narrow = u.detach().half().requires_grad_()
    out = fastreg.local_correlation(*halves, 1, displacement=narrow)
    assert out.dtype == torch.float16
    assert [g.dtype for g in torch.autograd.grad(out.sum(), (*halves, narrow))] == [torch.float16] * 3


@pytest.mark.parametrize("apart", [100.0, 1000.0])
def test_gradients_of_maps_with_means_apart(apart):
    fixed, moving = torch.rand(1, 3, 5, 6, 7), torch.rand(1, 3, 5, 6, 7) + apart
    inputs = [t.requires_grad_() for t in (fixed, moving)]
    truth_inputs = [t.detach().double().requires_grad_() for t in inputs]
    weight = torch.randn(1, 125, 5, 6, 7)
    grads = torch.autograd.grad((fastreg.local_correlation(*inputs, normalize=True) * weight).sum(), inputs)
    truth = fastreg.local_correlation(*truth_inputs, normalize=True) * weight.double()
    for grad, true in zip(grads, torch.autograd.grad(truth.sum(), truth_inputs), strict=True):
        assert (grad - true).norm() < 2e-6 * true.norm()


def test_statistics_are_of_what_is_read():
    """The first voxel of moving is never read, whatever it holds."""
    fixed, moving = torch.rand(1, 1, 6, 6), torch.rand(1, 1, 6, 6)
    u = torch.zeros(1, 2, 6, 6)
    u[:, 0] = 1.5
    outputs = []
    for value in (0.5, 1e7, float("nan")):
        moving[0, 0, 0, 0] = value
        outputs.append(fastreg.local_correlation(fixed, moving, displacement=u, normalize=True))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_radius_far_beyond_the_image_costs_what_it_writes():
    image = torch.rand(1, 1, 1, 6, requires_grad=True)
    out = fastreg.local_correlation(image, image.detach(), (0, 4000))
    assert torch.autograd.grad(out.sum(), image)[0].shape == image.shape
    assert out.count_nonzero() == 36


def opcheck(dtype):
    op, bwd = torch.ops.fastreg.local_correlation, torch.ops.fastreg.local_correlation_bwd
    for displaced, normalize in ((False, False), (False, True), (True, True)):
        fixed, moving, *u = make((2, 2, 3, 4, 5), dtype, displaced)
        options = ([1, 0, 1], u[0] if displaced else None, normalize, "mean", "border")
        yield op.default, (fixed, moving, *options)
        out, statistics = (t.detach() for t in op(fixed, moving, *options))
        tensors = (torch.rand_like(out), fixed.detach(), moving.detach(), statistics)
        options = (options[0], u[0].detach() if displaced else None, *options[2:])
        for needs in ((True, True), (False, True)):
            yield bwd.default, (*tensors, *options, *needs)


VALID = {"fixed": torch.zeros(1, 2, 3, 4, 5), "moving": torch.zeros(1, 2, 3, 4, 5)}
ERRORS = [
    (TypeError, "fixed must be fp64, fp32, fp16 or bf16", {"fixed": torch.zeros(1, 2, 3, 4, 5).long()}),
    (ValueError, r"fixed must have shape \(N, C, D, H, W\)", {"fixed": torch.zeros(2, 3, 4)}),
    (ValueError, "moving must have the shape", {"moving": torch.zeros(1, 2, 3, 4, 6)}),
    (ValueError, "moving must be on", {"moving": torch.zeros(1, 2, 3, 4, 5, device="meta")}),
    (ValueError, r"displacement must have shape \(N, 3, D, H, W\)", {"displacement": torch.zeros(1, 2, 3, 4, 5)}),
    (ValueError, "displacement must have .* N = 1", {"displacement": torch.zeros(2, 3, 3, 4, 5)}),
    (TypeError, "displacement must be a tensor", {"displacement": 1.0}),
    (ValueError, "radius must be an int >= 0 and below 32768, or one per axis", {"radius": -1}),
    (ValueError, "radius must be an int >= 0 and below 32768, or one per axis", {"radius": (1, 2)}),
    (ValueError, "radius must be an int >= 0 and below 32768, or one per axis", {"radius": 2**40}),
    (TypeError, "radius must be an int or 3 ints", {"radius": 1.5}),
    (TypeError, "radius must be an int or 3 ints", {"radius": True}),
    (TypeError, "radius must be an int or 3 ints", {"radius": "two"}),
    (ValueError, "scale must be 'mean' or 'sum' or 'sqrt', got 'max'", {"scale": "max"}),
    (ValueError, "padding must be 'zeros' or 'border', got 'reflection'", {"padding": "reflection"}),
]  # fmt: skip

CONTRACT = Contract(
    cases={
        f"{'displaced' if displaced else 'still'}-{'normalize' if normalize else 'raw'}-{padding}": Case(
            correlate(1, normalize=normalize, padding=padding),
            lambda n, spatial, dtype, d=displaced: make((n, 3, *spatial), dtype, d),
        )
        for displaced, normalize, padding in itertools.product((False, True), (False, True), PADDINGS)
    },
    valid=VALID,
    errors=ERRORS,
    opcheck=opcheck,
    gradcheck=True,
    double_backward=False,
    layouts=True,
    vmap=True,
    compiled=True,
    empty_batch=True,
    empty_axes=True,
    empty_channels={"": Case(correlate(1), lambda n, spatial, dtype: make((n, 0, *spatial), dtype, True))},
    repeats=True,
)
