import math

import numpy as np
import pytest
import scipy.interpolate
import scipy.ndimage
import torch
from common import DTYPES, assert_close, check_against_reference, gradients, layouts

import fastreg
from fastreg.ops.bspline_displacement import bspline_displacement_ref, control_shape

# Control points on every voxel, spacings that divide the axis or not, wider than it, one per axis; rows of
# many vectors; one-voxel axes.
CASES = [
    pytest.param((2, 5, 7, 13), 3, id="n2d5h7w13"),
    pytest.param((1, 9, 8, 150), (2, 4, 5), id="n1d9h8w150"),
    pytest.param((1, 12, 70), (4, 1), id="n1h12w70"),
    pytest.param((2, 6, 40), 8, id="n2h6w40"),
    pytest.param((1, 3, 2, 5), (1, 20, 7), id="spacing-beyond-axis"),
    pytest.param((1, 1, 6, 1), (2, 2, 1), id="one-voxel-axes"),
]
ORDERS = (1, 2, 3)


def axes(spacing, shape):
    return [spacing] * (len(shape) - 1) if isinstance(spacing, int) else list(spacing)


def make(shape, spacing, order, dtype=torch.float64):
    n, *size = shape
    return torch.rand(n, len(size), *control_shape(size, spacing, order)).to(dtype).requires_grad_()


def reference(shape, spacing, order):
    return lambda c: bspline_displacement_ref(c, axes(spacing, shape), shape[1:], order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "spacing"), CASES)
def test_against_reference(shape, spacing, dtype, order):
    check_against_reference(
        lambda c: fastreg.bspline_displacement(c, spacing, shape[1:], order),
        reference(shape, spacing, order),
        (make(shape, spacing, order, dtype),),
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "spacing"), CASES)
def test_is_scipy(shape, spacing, order):
    """Cardinal B-splines with a knot at every multiple of the spacing."""
    coefficients = make(shape, spacing, order).detach()
    expected = coefficients.cpu().numpy()
    for k, (n, s) in enumerate(zip(shape[1:], axes(spacing, shape), strict=True)):
        knots = s * (np.arange(expected.shape[k + 2] + order + 1.0) - order)
        spline = scipy.interpolate.BSpline(knots, expected, order, extrapolate=False, axis=k + 2)
        expected = spline(np.arange(n))
    for function in (
        lambda c: fastreg.bspline_displacement(c, spacing, shape[1:], order),
        reference(shape, spacing, order),
    ):
        assert_close(function(coefficients), torch.from_numpy(expected), 1e-12, floor=0.1)


def test_cubic_control_points_are_where_ndimage_has_its_samples():
    """scipy.ndimage zooms by splines through coefficients on a grid: control point 1 lies on voxel 0."""
    coefficients, s = make((1, 13, 17), 4, 3).detach(), 4
    points = np.stack(np.meshgrid(np.arange(13) / s + 1, np.arange(17) / s + 1, indexing="ij"))
    out = fastreg.bspline_displacement(coefficients, s, (13, 17))
    for c in range(2):
        plane = coefficients[0, c].cpu().numpy()
        expected = scipy.ndimage.map_coordinates(plane, points, order=3, prefilter=False, mode="constant")
        inside = np.s_[: -s or None, : -s or None]  # beyond the last but one piece ndimage reads outside
        assert_close(out[0, c][inside], torch.from_numpy(expected[inside]), 1e-12, floor=0.1)


def test_linear_order_interpolates():
    coefficients = make((1, 9, 13), 4, 1).detach()
    out = fastreg.bspline_displacement(coefficients, 4, (9, 13), order=1)
    assert torch.equal(out[..., ::4, ::4], coefficients[..., :-1, :-1])
    grown = fastreg.resize_displacement(coefficients[..., :-1, :-1], (9, 13), scale=1)
    assert_close(out, grown, 1e-12, floor=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "spacing"), CASES)
def test_constant_coefficients_are_a_constant_field(shape, spacing, order, dtype):
    value = torch.tensor(60000.0, dtype=dtype)
    coefficients = torch.full_like(make(shape, spacing, order, dtype), value.item())
    out = fastreg.bspline_displacement(coefficients, spacing, shape[1:], order)
    assert_close(out, value.double().expand(out.shape))


@pytest.mark.parametrize("order", ORDERS)
def test_linear_coefficients_are_a_linear_field(order):
    """Control point k sits at voxel (k - (order - 1) / 2) s."""
    s, shape = 3, (7, 16)
    x = (torch.arange(control_shape(shape, s, order)[1], dtype=torch.float64) - (order - 1) / 2) * s
    coefficients = x.expand(1, 2, control_shape(shape, s, order)[0], -1)
    out = fastreg.bspline_displacement(coefficients, s, shape, order)
    assert_close(out, torch.arange(16.0).double().expand(1, 2, *shape), 1e-12, floor=0.1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "spacing"), CASES)
def test_backward_is_the_transpose(shape, spacing, order):
    c, g = make(shape, spacing, order), torch.randn(shape[0], len(shape) - 1, *shape[1:], dtype=torch.float64)
    out, (grad,) = gradients(lambda t: fastreg.bspline_displacement(t, spacing, shape[1:], order), (c,), g)
    assert_close((grad * c).sum(), (out * g).sum(), 1e-11)


@pytest.mark.parametrize("order", ORDERS)
def test_nan_reaches_its_support_only(order):
    s, shape = 4, (3, 17)
    c = torch.randn(1, 2, *control_shape(shape, s, order), requires_grad=True)
    bad = c.detach().clone()
    bad[0, 0, :, 2] = math.nan
    out = fastreg.bspline_displacement(bad, s, shape, order)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, 0, :, max((2 - order) * s + 1, 0) : 3 * s] = True  # the open interval ((2 - order) s, 3 s)
    assert torch.equal(out.isnan(), expected)
    grad = torch.zeros_like(out)
    grad[0, 1, 0, 8] = math.inf  # the first voxel of piece 2: control points 2 ... 1 + order
    got = torch.autograd.grad(fastreg.bspline_displacement(c, s, shape, order), c, grad)[0]
    expected = torch.zeros_like(c, dtype=torch.bool)
    expected[0, 1, :order, 2 : 2 + order] = True
    assert torch.equal(~got.isfinite(), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "spacing"), [((1, 3, 1, 4), 2), ((1, 4, 3), (3, 1))])
def test_gradcheck(shape, spacing, order):
    c = make(shape, spacing, order)

    def field(t):
        return fastreg.bspline_displacement(t, spacing, shape[1:], order)

    assert torch.autograd.gradcheck(field, c, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda t: field(t).square(), c, fast_mode=True)


@pytest.mark.parametrize("shape", [(2, 5, 6, 17), (2, 8, 9)])
def test_layouts(shape):
    c = make(shape, 3, 3, torch.float32).detach()
    grad = torch.randn(shape[0], len(shape) - 1, *shape[1:])
    plain = c.clone().requires_grad_()
    expected = fastreg.bspline_displacement(plain, 3, shape[1:])
    (expected_grad,) = torch.autograd.grad(expected, plain, grad)
    for name in layouts(c):
        t = layouts(c)[name].requires_grad_()
        out = fastreg.bspline_displacement(t, 3, shape[1:])
        assert torch.equal(out, expected), name
        assert torch.equal(torch.autograd.grad(out, t, layouts(grad)[name])[0], expected_grad), name
    # A gradient of stride 0.
    ours = torch.autograd.grad(fastreg.bspline_displacement(plain, 3, shape[1:]).sum(), plain)[0]
    dense = torch.autograd.grad(
        fastreg.bspline_displacement(plain, 3, shape[1:]), plain, torch.ones_like(grad)
    )[0]
    assert torch.equal(ours, dense)


def test_deterministic():
    c, grad = make((1, 17, 19, 70), 3, 3, torch.float32), torch.randn(1, 3, 17, 19, 70)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        out = fastreg.bspline_displacement(c, 3, (17, 19, 70))
        results.append((out, *torch.autograd.grad(out, c, grad)))
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty_batch():
    c = torch.zeros(0, 3, 5, 5, 6, requires_grad=True)
    out = fastreg.bspline_displacement(c, 4, (7, 8, 9))
    assert out.shape == (0, 3, 7, 8, 9)
    assert torch.autograd.grad(out.sum(), c)[0].shape == c.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    c = make((2, 4, 5, 6), (1, 2, 3), 3, dtype)
    torch.library.opcheck(torch.ops.fastreg.bspline_displacement.default, (c, [1, 2, 3], [4, 5, 6], 3))
    grad = torch.randn(2, 3, 4, 5, 6).to(dtype).requires_grad_()
    torch.library.opcheck(
        torch.ops.fastreg.bspline_displacement_bwd.default, (grad, [1, 2, 3], list(c.shape[2:]), 3)
    )


def test_compile():
    def step(c, moving):
        field = fastreg.bspline_displacement(2 * c, 2, moving.shape[2:])
        return fastreg.warp(moving, field).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for shape in [(1, 4, 5, 6), (1, 7, 6, 5)]:
        c, moving = make(shape, 2, 3, torch.float32), torch.rand(1, 1, *shape[1:])
        expected = torch.autograd.grad(step(c, moving), c)[0]
        assert_close(torch.autograd.grad(compiled(c, moving), c)[0], expected, floor=0.1)


def test_vmap():
    c = torch.randn(4, 2, 2, 5, 6, requires_grad=True)

    def field(t):
        return fastreg.bspline_displacement(t, 3, (5, 9))

    out = torch.vmap(field, in_dims=2)(c.movedim(0, 2))
    assert torch.equal(out, torch.stack([field(t) for t in c]))
    vectors = torch.randn(5, *out.shape[1:])
    single = field(c[0])
    batched = torch.autograd.grad(single, c, vectors, is_grads_batched=True, retain_graph=True)[0]
    assert torch.equal(
        batched, torch.stack([torch.autograd.grad(single, c, v, retain_graph=True)[0] for v in vectors])
    )


def test_transforms_without_a_derivative_raise():
    with pytest.raises(RuntimeError, match=r"fastreg::bspline_displacement: torch\.func\.grad"):
        torch.func.grad(lambda c: fastreg.bspline_displacement(c, 2, (4, 4)).sum())(torch.rand(1, 2, 5, 5))


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (
            TypeError,
            "coefficients must be fp64, fp32, fp16 or bf16, got torch.int64",
            {"coefficients": torch.zeros(1, 3, 4, 5, 6).long()},
        ),
        (
            ValueError,
            r"coefficients must have shape \(N, 3, D, H, W\), got \(1, 2, 4, 5, 6\)",
            {"coefficients": torch.zeros(1, 2, 4, 5, 6)},
        ),
        (
            ValueError,
            r"coefficients must have ceil\(n / spacing\) \+ 3 control points per axis, \(4, 5, 6\) for the shape "
            r"\(1, 4, 6\), got \(1, 3, 4, 5, 5\)",
            {"coefficients": torch.zeros(1, 3, 4, 5, 5)},
        ),
        (ValueError, "spacing must be an integer or 3 integers >= 1, got", {"spacing": 0}),
        (ValueError, "spacing must be an integer or 3 integers >= 1, got", {"spacing": (2, 2)}),
        (TypeError, "spacing must be an integer or 3 integers, got 2.5", {"spacing": 2.5}),
        (ValueError, r"shape must be 3 integers >= 1, got \(3, 0, 4\)", {"shape": (3, 0, 4)}),
        (ValueError, r"shape must be 3 integers >= 1, got \(3, 4\)", {"shape": (3, 4)}),
        (TypeError, "shape must be 3 integers, got 4", {"shape": 4}),
        (ValueError, "order must be 1, 2 or 3, got 4", {"order": 4}),
        (ValueError, "order must be 1, 2 or 3, got 'cubic'", {"order": "cubic"}),
    ],
)
def test_errors(error, match, change):
    arguments = {
        "coefficients": torch.zeros(1, 3, 4, 5, 6),
        "spacing": 2,
        "shape": (1, 4, 6),
        "order": 3,
    } | change
    with pytest.raises(error, match=rf"fastreg::bspline_displacement: {match}"):
        fastreg.bspline_displacement(**arguments)
