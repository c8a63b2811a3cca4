from functools import partial

import numpy as np
import pytest
import scipy.ndimage
import torch
from common import DTYPES, assert_close, check_against_reference, gradients
from contract import Case, Contract

import fastreg
from fastreg.ops.smooth import smooth_ref
from fastreg.ops.warp import PADDINGS

# Radii below, equal to and beyond the axes; rows of many vectors; an axis left alone.
CASES = [
    pytest.param((2, 3, 9, 11, 13), 0.8, id="n2c3d9h11w13"),
    pytest.param((1, 1, 5, 6, 150), (0.5, 0.0, 2.3), id="n1c1d5h6w150"),
    pytest.param((1, 2, 33, 70), (4.0, 1.0), id="n1c2h33w70"),
    pytest.param((2, 1, 4, 3), 3.0, id="radius-beyond-axis"),
    pytest.param((1, 2, 1, 7, 1), 1.0, id="one-voxel-axes"),
    # Planes and rows are made four at a time: groups at the border, amid, and across the end of what is alike.
    pytest.param((1, 2, 15, 18, 70), 0.8, id="groups-of-four"),
]
SCIPY = {"zeros": "constant", "border": "nearest", "reflection": "mirror"}


def make(shape, dtype=torch.float64):
    return torch.rand(shape).to(dtype).requires_grad_()


def sigmas(sigma, shape):
    return [float(sigma)] * (len(shape) - 2) if isinstance(sigma, float) else list(sigma)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "sigma"), CASES)
def test_against_reference(shape, sigma, dtype, padding):
    def reference(u):
        return smooth_ref(u, sigmas(sigma, shape), padding, 4.0)

    check_against_reference(
        lambda u: fastreg.smooth(u, sigma, padding=padding), reference, (make(shape, dtype),)
    )


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("shape", "sigma"), CASES)
def test_is_scipy(shape, sigma, padding):
    u = make(shape).detach()
    expected = u.cpu().numpy()
    for k, s in enumerate(sigmas(sigma, shape)):
        if s > 0:
            x = np.arange(-np.ceil(4 * s), np.ceil(4 * s) + 1)
            weight = np.exp(-(x**2) / (2 * s**2))
            expected = scipy.ndimage.correlate1d(expected, weight / weight.sum(), k + 2, mode=SCIPY[padding])
    for out in (fastreg.smooth(u, sigma, padding=padding), smooth_ref(u, sigmas(sigma, shape), padding, 4.0)):
        assert_close(out, torch.from_numpy(expected), 1e-12)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("shape", "sigma"), CASES)
def test_backward_is_the_transpose(shape, sigma, padding):
    u, g = make(shape), make(shape).detach()
    out, (grad,) = gradients(lambda t: fastreg.smooth(t, sigma, padding=padding), (u,), g)
    assert_close((grad * u).sum(), (out * g).sum(), 1e-12)
    if padding == "zeros":  # a symmetric matrix
        assert_close(grad, fastreg.smooth(g, sigma, padding=padding), 1e-12)


def test_truncate_sets_the_radius():
    u = torch.zeros(1, 1, 3, 41, dtype=torch.float64)
    u[..., 20] = 1
    for truncate, sigma, radius in ((4.0, 2.0, 8), (3, 1.1, 4), (1.0, 0.3, 1)):
        out = fastreg.smooth(u, (0, sigma), truncate=truncate)
        assert out[0, 0, 1].nonzero().flatten().tolist() == list(range(20 - radius, 21 + radius))
        assert_close(out.sum((-1, -2)), u.sum((-1, -2)), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigma_zero_is_the_identity(dtype):
    u = torch.randn(2, 1, 4, 5, 67).to(dtype)
    u[0, 0, 1, 2, 3], u[1, 0, 0, 0, 0] = float("nan"), float("inf")
    out = fastreg.smooth(u, 0)
    assert torch.equal(out.nan_to_num(7), u.nan_to_num(7))
    assert out.data_ptr() != u.data_ptr()


def test_constant_and_extreme_halves():
    for dtype, value in ((torch.float16, 65504.0), (torch.bfloat16, 3e38), (torch.float32, 1e30)):
        u = torch.full((1, 1, 5, 6, 40), value).to(dtype)
        for padding in ("border", "reflection"):
            assert_close(fastreg.smooth(u, 1.0, padding=padding), u.double())


@pytest.mark.parametrize("padding", PADDINGS)
def test_nan_reaches_its_window_only(padding):
    u = torch.rand(1, 1, 9, 10, 40, requires_grad=True)
    bad = u.detach().clone()
    bad[0, 0, 4, 1, 20] = float("nan")
    out = fastreg.smooth(bad, (0.25, 0.5, 1.0), padding=padding)
    expected = torch.zeros_like(u, dtype=torch.bool)
    expected[0, 0, 3:6, :4, 16:25] = True
    assert torch.equal(out.isnan(), expected)
    grad = torch.autograd.grad(fastreg.smooth(u, (0.25, 0.5, 1.0), padding=padding), u, bad)[0]
    assert torch.equal(grad.isnan(), expected)


def opcheck(dtype):
    u = make((2, 1, 4, 5, 6), dtype)
    yield torch.ops.fastreg.smooth.default, (u, [1.0, 0.5, 0.0], "border", 4.0)
    yield torch.ops.fastreg.smooth_bwd.default, (u, [1.0, 0.5, 0.0], "reflection", 3.0)


VALID = {"u": torch.zeros(1, 3, 3, 4, 5), "sigma": 1.0}
ERRORS = [
    (
        TypeError,
        "u must be fp64, fp32, fp16 or bf16, got torch.int64",
        {"u": torch.zeros(1, 3, 4, 5).long()},
    ),
    (
        ValueError,
        r"u must have shape .N, C, D, H, W. or .N, C, H, W., got .3, 4, 5.",
        {"u": torch.zeros(3, 4, 5)},
    ),
    (ValueError, "sigma must be a number >= 0, or one per axis", {"sigma": -1.0}),
    (ValueError, "sigma must be a number >= 0, or one per axis", {"sigma": (1.0, 2.0)}),
    (TypeError, "sigma must be a number or 3 numbers", {"sigma": "wide"}),
    (ValueError, "sigma must have truncate", {"sigma": 1e9}),
    (ValueError, "truncate must be a number > 0", {"truncate": 0}),
    (ValueError, "padding must be 'zeros' or 'border' or 'reflection', got 'wrap'", {"padding": "wrap"}),
]  # fmt: skip

CONTRACT = Contract(
    cases={
        padding: Case(
            partial(fastreg.smooth, sigma=0.7, padding=padding),
            lambda n, spatial, dtype: (make((n, 2, *spatial), dtype),),
        )
        for padding in PADDINGS
    },
    valid=VALID,
    errors=ERRORS,
    opcheck=opcheck,
    gradcheck=True,
    double_backward=True,
    layouts=True,
    vmap=True,
    compiled=True,
    empty_batch=True,
    empty_axes=True,
    empty_channels={
        "": Case(
            partial(fastreg.smooth, sigma=0.7), lambda n, spatial, dtype: (make((n, 0, *spatial), dtype),)
        )
    },
    repeats=True,
)
