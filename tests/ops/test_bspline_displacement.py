import math

import numpy as np
import pytest
import scipy.interpolate
import scipy.ndimage
import torch
from common import DTYPES, assert_close, check_against_reference, gradients
from contract import Case, Contract, like

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


def opcheck(dtype):
    c = make((2, 4, 5, 6), (1, 2, 3), 3, dtype)
    yield torch.ops.fastreg.bspline_displacement.default, (c, [1, 2, 3], [4, 5, 6], 3)
    grad = torch.randn(2, 3, 4, 5, 6).to(dtype).requires_grad_()
    yield torch.ops.fastreg.bspline_displacement_bwd.default, (grad, [1, 2, 3], list(c.shape[2:]), 3)


def case(order, *spacing):
    """Spacings of the last axes."""
    return Case(
        lambda c, like: fastreg.bspline_displacement(c, spacing[5 - c.dim() :], like.shape[2:], order),
        lambda n, size, dtype: (make((n, *size), spacing[3 - len(size) :], order, dtype), like(n, size)),
    )


VALID = {
    "coefficients": torch.zeros(1, 3, 4, 5, 6),
    "spacing": 2,
    "shape": (1, 4, 6),
    "order": 3,
}
ERRORS = [
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
]  # fmt: skip

CONTRACT = Contract(
    cases={"linear": case(1, 2, 3, 1), "quadratic": case(2, 1, 2, 3), "cubic": case(3, 3, 3, 3)},
    valid=VALID,
    errors=ERRORS,
    opcheck=opcheck,
    gradcheck=True,
    double_backward=True,
    layouts=True,
    vmap=True,
    compiled=True,
    empty_batch=True,
    empty_axes="refused: a field of control points has a voxel",
    empty_channels="a displacement has a component an axis",
    repeats=True,
)
