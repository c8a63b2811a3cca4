import numpy as np
import pytest
import torch
from common import DTYPES, assert_close, check_against_reference
from contract import REGULARISER, REGULARISER_ERRORS, Case, Contract, spaced

import fastreg
from fastreg.ops.diffusion import NORMS, diffusion_ref

# Odd sizes, rows of several vectors and of more than one block of sums, axes of one voxel.
SHAPES = [
    pytest.param((2, 3, 5, 6, 7), id="n2d5h6w7"),
    pytest.param((1, 3, 4, 3, 70), id="n1d4h3w70"),
    pytest.param((3, 2, 9, 1100), id="n3h9w1100"),
    pytest.param((1, 3, 1, 5, 1), id="one-voxel-axes"),
]


def make(shape, dtype=torch.float64):
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_reference(shape, dtype, norm):
    spacing = [0.7, 1.3, 2.5][: len(shape) - 2]
    for given, used in ((None, [1.0] * len(spacing)), (spacing, spacing)):
        check_against_reference(
            lambda u, s=given: 1e3 * fastreg.diffusion(u, norm=norm, spacing=s),
            lambda u, s=used: 1e3 * diffusion_ref(u, norm, s).mean(),
            (make(shape, dtype),),
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_definition(shape, norm):
    u, spacing = make(shape).detach(), [0.7, 1.3, 2.5][: len(shape) - 2]
    total = 0.0
    for axis, s in enumerate(spacing):
        difference = (
            np.diff(u.cpu().numpy(), axis=axis + 2) * np.array(spacing).reshape(-1, *[1] * len(spacing)) / s
        )
        if difference.size:
            total += (difference**2 if norm == "l2" else abs(difference)).mean() / len(spacing)
    expected = torch.tensor(total, dtype=torch.float64)
    assert_close(fastreg.diffusion(u, norm=norm, spacing=spacing), expected, 1e-12)
    assert_close(diffusion_ref(u, norm, spacing).mean(), expected, 1e-12)


def test_linear_field():
    steps = torch.meshgrid(*[torch.arange(5.0)] * 3, indexing="ij")
    u = torch.stack([0.5 * steps[0], 2 * steps[2], torch.zeros(5, 5, 5)])[None]
    # Squared derivatives 0.25 along z and 4 along x, over three components and three axes.
    assert fastreg.diffusion(u).item() == pytest.approx(4.25 / 9)
    assert fastreg.diffusion(u, norm="l1").item() == pytest.approx(2.5 / 9)
    # The second component runs along y, so its derivative along x is scaled by s_y / s_x.
    assert fastreg.diffusion(u, spacing=(1, 3, 2)).item() == pytest.approx((0.25 + 4 * 9 / 4) / 9)


@pytest.mark.parametrize("norm", NORMS)
def test_constant_field_has_no_loss_and_no_gradient(norm):
    for dtype, value in ((torch.float16, 60000.0), (torch.float32, 1e30), (torch.float32, float(2**24))):
        u = torch.full((1, 3, 4, 5, 19), value, dtype=dtype, requires_grad=True)
        loss = fastreg.diffusion(u, norm=norm)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, u)[0].eq(0).all()


def test_half_differences_do_not_overflow():
    u = torch.zeros(1, 2, 4, 6, dtype=torch.float16)
    u[..., 3] = 60000.0
    u[0, 0, :, 2] = -60000.0
    assert_close(fastreg.diffusion(u), diffusion_ref(u.double(), "l2", [1.0, 1.0]).mean(), 1e-5)


def test_long_sums_keep_their_digits():
    u = torch.rand(1, 2, 600, 700)
    expected = diffusion_ref(u.double(), "l2", [1.0, 1.0]).mean()
    assert_close(fastreg.diffusion(u), expected, 1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_nan_reaches_its_neighbours_and_its_sample(norm):
    u = make((2, 2, 6, 30), torch.float32)
    with torch.no_grad():
        u[1, 0, 3, 12] = float("nan")
    losses = torch.ops.fastreg.diffusion(u, norm, [1.0, 1.0])
    assert losses.isnan().tolist() == [False, True]
    grad = torch.autograd.grad(losses.sum(), u)[0]
    expected = [[1, 0, y, x] for y, x in ((2, 12), (3, 11), (3, 12), (3, 13), (4, 12))]
    # As in torch.abs, l1 has slope 0 at NaN.
    assert grad.isnan().nonzero().tolist() == (expected if norm == "l2" else [])


def test_slope_of_l1_at_zero_is_zero():
    u = torch.zeros(1, 2, 3, 20, requires_grad=True)
    assert torch.autograd.grad(fastreg.diffusion(u, norm="l1"), u)[0].eq(0).all()


def opcheck(dtype):
    u, grad = make((2, 3, 4, 5, 6), dtype), torch.ones(2, dtype=torch.promote_types(dtype, torch.float32))
    yield torch.ops.fastreg.diffusion.default, (u, "l2", [1.0, 2.0, 3.0])
    yield torch.ops.fastreg.diffusion_bwd.default, (grad, u.detach(), "l1", [1.0, 2.0, 3.0])


def made(n, spatial, dtype):
    return (make((n, len(spatial), *spatial), dtype),)


CONTRACT = Contract(
    cases={
        "l2": Case(fastreg.diffusion, made),
        "l1": Case(lambda u: fastreg.diffusion(u, norm="l1", spacing=spaced(u)), made),
    },
    valid=REGULARISER,
    errors=[*REGULARISER_ERRORS, (ValueError, "norm must be 'l1' or 'l2', got 'huber'", {"norm": "huber"})],
    opcheck=opcheck,
    gradcheck=True,
    double_backward=False,
    layouts=True,
    vmap=True,
    compiled=True,
    empty_batch=True,
    empty_axes=True,
    empty_channels="a displacement has a component an axis",
    repeats=True,
)
