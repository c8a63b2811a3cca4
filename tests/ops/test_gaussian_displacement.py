import math

import numpy as np
import pytest
import torch
from common import COMPILED, DTYPES, assert_close, check_against_reference
from contract import Case, Contract, like

import fastreg
from fastreg.ops.gaussian_displacement import SIGMA_IS, gaussian_displacement_ref

# H != W, rows of many vectors and a rest and of more than one block of sums, more and fewer Gaussians than rows, one-voxel axes.
CASES = [
    pytest.param(2, 3, (9, 13), id="n2t3h9w13"),
    pytest.param(1, 25, (7, 150), id="n1t25h7w150"),
    pytest.param(1, 1, (40, 17), id="n1t1h40w17"),
    pytest.param(1, 2, (2, 1100), id="n1t2h2w1100"),
    pytest.param(2, 2, (1, 6), id="one-row"),
    pytest.param(1, 2, (5, 1), id="one-column"),
    pytest.param(1, 2, (1, 1), id="one-voxel"),
]


def make(n, t, dtype=torch.float64, sigma_is="std"):
    """Centres in and a little outside the image, motions of one sign: the fp32 sums of a field do not cancel."""
    params = torch.rand(n, t, 7, dtype=torch.float64)
    params[..., :2] = 2.4 * params[..., :2] - 1.2
    params[..., 2:4] = (0.05 + 0.4 * params[..., 2:4]) ** (1 if sigma_is == "std" else 2)
    params[..., 4] *= math.pi
    params[..., 5:] = 0.05 + 0.2 * params[..., 5:]
    return params.to(dtype).requires_grad_()


def loops(params, shape, sigma_is):
    """The formula as written, with an inverted 2x2 matrix, one voxel and Gaussian at a time."""
    n = params.shape[0]
    h, w = shape
    out = np.zeros((n, 2, h, w))
    ys, xs = (np.linspace(-1, 1, s) if s > 1 else [0.0] for s in shape)
    for i in range(n):
        for x, y, sx, sy, alpha, vx, vy in params[i]:
            r = np.array([[np.cos(alpha), -np.sin(alpha)], [np.sin(alpha), np.cos(alpha)]])
            sigma = r @ np.diag([sx**2, sy**2] if sigma_is == "std" else [sx, sy]) @ r.T
            inverse = np.linalg.inv(sigma)
            for row in range(h):
                for column in range(w):
                    d = np.array([xs[column] - x, ys[row] - y])
                    weight = np.exp(-0.5 * d @ inverse @ d)
                    out[i, :, row, column] += weight * np.array([vy * (h - 1) / 2, vx * (w - 1) / 2])
    return out


@pytest.mark.parametrize("sigma_is", SIGMA_IS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "t", "shape"), CASES)
def test_against_reference(n, t, shape, dtype, sigma_is):
    check_against_reference(
        lambda p: fastreg.gaussian_displacement(p, shape, sigma_is=sigma_is),
        lambda p: gaussian_displacement_ref(p, shape, sigma_is),
        (make(n, t, dtype, sigma_is),),
    )


@pytest.mark.parametrize("sigma_is", SIGMA_IS)
@pytest.mark.parametrize(("n", "t", "shape"), CASES)
def test_is_the_formula_in_loops(n, t, shape, sigma_is):
    params = make(n, t, sigma_is=sigma_is).detach()
    expected = torch.from_numpy(loops(params.cpu().numpy(), shape, sigma_is))
    for out in (
        fastreg.gaussian_displacement(params, shape, sigma_is=sigma_is),
        gaussian_displacement_ref(params, shape, sigma_is),
    ):
        assert_close(out, expected, 1e-9)


def test_peak_and_units():
    """At its centre a Gaussian moves by v in units of half the grid: (size - 1) / 2 voxels, channels (y, x)."""
    params = torch.tensor([[[-0.5, 0.5, 0.1, 0.2, 0.3, 0.25, -0.125]]])
    out = fastreg.gaussian_displacement(params, (9, 17))
    assert_close(out[0, :, 6, 4], torch.tensor([-0.125 * 4, 0.25 * 8]))
    # Two voxels of x are one standard deviation along the Gaussian's first axis, or its second, turned.
    for sx, sy, alpha in ((0.25, 0.5, 0.0), (0.5, 0.25, math.pi / 2)):
        params = torch.tensor([[[0.0, 0.0, sx, sy, alpha, 1.0, 0.0]]])
        out = fastreg.gaussian_displacement(params, (9, 17))
        assert_close(out[0, 1, 4, 6], torch.tensor(8 * math.exp(-0.5)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32] if COMPILED else [torch.float64], ids=str)
def test_narrow_and_elongated(dtype):
    """Extents from a tenth of a voxel to far beyond the image, and needles across it: digits do not cancel."""
    params = torch.tensor(
        [
            [0.013, -0.371, 0.002, 0.003, 0.5, 0.3, 0.4],
            [0.7, 0.2, 1e-3, 0.9, 0.7853, 0.3, 0.4],
            [-0.4, 0.9, 30.0, 50.0, 1.0, 0.3, 0.4],
            [3.0, 0.1, 0.3, 0.2, 2.0, 0.3, 0.4],
        ],
        dtype=dtype,
    )
    for p in params:
        p = p.view(1, 1, 7).clone().requires_grad_()
        check_against_reference(
            lambda t: fastreg.gaussian_displacement(t, (90, 131)),
            lambda t: gaussian_displacement_ref(t, (90, 131), "std"),
            (p,),
            1e-9 if dtype == torch.float64 else 1e-5,
        )


def test_without_motion_or_gaussians():
    params = make(2, 3).detach()
    params[..., 5:] = 0
    assert fastreg.gaussian_displacement(params, (4, 5)).eq(0).all()
    for n, t in ((2, 0), (0, 3)):
        empty = torch.zeros(n, t, 7, requires_grad=True)
        out = fastreg.gaussian_displacement(empty, (4, 5))
        assert out.shape == (n, 2, 4, 5)
        assert out.eq(0).all()
        assert torch.autograd.grad(out.sum(), empty)[0].shape == empty.shape


@pytest.mark.parametrize("sigma_is", SIGMA_IS)
@pytest.mark.parametrize("value", [0.0, -0.2, math.nan])
def test_extent_that_is_not_positive_makes_its_sample_nan(value, sigma_is):
    params = make(3, 2, torch.float32).detach()
    params[1, 1, 3] = value
    params.requires_grad_()
    out = fastreg.gaussian_displacement(params, (6, 20), sigma_is=sigma_is)
    assert out[1].isnan().all()
    assert out[::2].isfinite().all()
    grad = torch.autograd.grad(out, params, torch.ones_like(out))[0]
    expected = torch.zeros_like(grad, dtype=torch.bool)
    expected[1, 1] = True
    assert torch.equal(grad.isnan(), expected)


@pytest.mark.parametrize("index", [0, 1, 2, 4, 5])
def test_nan_parameter(index):
    params = make(2, 2, torch.float32).detach()
    params[0, 1, index] = math.nan
    out = fastreg.gaussian_displacement(params, (6, 20))
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, 1 if index == 5 else slice(None)] = True
    assert torch.equal(out.isnan(), expected)


def test_nan_gradient_reaches_its_sample():
    params, grad = make(2, 3, torch.float32), torch.rand(2, 2, 6, 20)
    grad[1, 1, 2, 3] = math.nan
    got = torch.autograd.grad(fastreg.gaussian_displacement(params, (6, 20)), params, grad)[0]
    expected = torch.zeros_like(got, dtype=torch.bool)
    expected[1, :, :6] = True  # vy takes no part in the motion along x
    assert torch.equal(got.isnan(), expected)


def test_infinite_extent_is_a_translation():
    params = torch.tensor([[[0.3, 0.1, math.inf, math.inf, 0.4, 0.25, -0.5]]])
    out = fastreg.gaussian_displacement(params, (9, 17))
    assert torch.equal(out, torch.tensor([-2.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 9, 17))


def opcheck(dtype):
    params = make(2, 3, dtype)
    yield torch.ops.fastreg.gaussian_displacement.default, (params, [4, 5], "std")
    grad = torch.randn(2, 2, 4, 5).to(dtype)
    yield torch.ops.fastreg.gaussian_displacement_bwd.default, (grad, params.detach(), "var")


VALID = {"params": torch.zeros(1, 2, 7), "shape": (4, 5)}
ERRORS = [
    (
        TypeError,
        "params must be fp64, fp32, fp16 or bf16, got torch.int64",
        {"params": torch.zeros(1, 2, 7).long()},
    ),
    (
        ValueError,
        r"params must have shape \(N, T, 7\), got \(1, 2, 6\)",
        {"params": torch.zeros(1, 2, 6)},
    ),
    (ValueError, r"params must have shape \(N, T, 7\), got \(2, 7\)", {"params": torch.zeros(2, 7)}),
    (ValueError, r"shape must be 2 integers >= 1, got \(3, 0\)", {"shape": (3, 0)}),
    (ValueError, r"shape must be 2 integers >= 1, got \(3, 4, 5\)", {"shape": (3, 4, 5)}),
    (TypeError, "shape must be 2 integers, got 4", {"shape": 4}),
    (TypeError, "shape must be 2 integers, got", {"shape": (4.5, 3)}),
    (ValueError, "sigma_is must be 'std' or 'var', got 'sd'", {"sigma_is": "sd"}),
]  # fmt: skip

CONTRACT = Contract(
    cases={
        sigma_is: Case(
            lambda p, like, s=sigma_is: fastreg.gaussian_displacement(p, like.shape[2:], sigma_is=s),
            lambda n, size, dtype, s=sigma_is: (make(n, 3, dtype, s), like(n, size)),
        )
        for sigma_is in SIGMA_IS
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
    empty_axes="refused: an image has a voxel",
    empty_channels="a Gaussian has seven numbers",
    repeats=True,
    dimensions=(2,),
    large=((37, 70),),
)
