import numpy as np
import pytest
import torch
from common import DTYPES, assert_close, check_against_reference
from contract import REGULARISER, REGULARISER_ERRORS, Case, Contract, spaced

import fastreg
from fastreg.ops.bending_energy import bending_energy_ref

# Odd sizes, rows of several vectors and of more than one block of sums, each axis too short in turn.
SHAPES = [
    pytest.param((2, 3, 6, 7, 9), id="n2d6h7w9"),
    pytest.param((1, 3, 5, 4, 70), id="n1d5h4w70"),
    pytest.param((3, 2, 9, 1100), id="n3h9w1100"),
    pytest.param((1, 3, 3, 3, 3), id="one-inside"),
    pytest.param((1, 3, 3, 5, 4), id="n1d3h5w4"),
    pytest.param((2, 3, 1, 6, 37), id="one-slice"),
    pytest.param((1, 3, 7, 2, 37), id="two-rows"),
    pytest.param((1, 3, 6, 7, 2), id="two-columns"),
    pytest.param((1, 3, 1, 2, 40), id="one-line"),
    pytest.param((1, 2, 40, 1), id="one-column"),
]


def make(shape, dtype=torch.float64):
    return torch.randn(shape).to(dtype).requires_grad_()


def by_loops(u, spacing):
    nd, size, total, count = len(spacing), u.shape[2:], 0.0, 0
    axes = [k for k in range(nd) if size[k] > 2]
    for n in range(u.shape[0]):
        for i in range(nd):
            values = u[n, i].cpu().numpy()
            for p in np.ndindex(*size):
                if any(p[k] in (0, size[k] - 1) for k in axes):
                    continue
                count += 1

                def at(*steps, p=p, values=values):
                    return values[tuple(p[k] + sum(s for axis, s in steps if axis == k) for k in range(nd))]

                for j in axes:
                    for k in axes:
                        if j == k:
                            d = at((k, 1)) - 2 * at() + at((k, -1))
                        else:
                            d = at((j, 1), (k, 1)) - at((j, 1), (k, -1))
                            d = (d - at((j, -1), (k, 1)) + at((j, -1), (k, -1))) / 4
                        total += (d * spacing[i] / spacing[j] / spacing[k]) ** 2
    return torch.tensor(total / count, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_reference(shape, dtype):
    spacing = [0.7, 1.3, 2.5][: len(shape) - 2]
    gain = np.prod(shape) / 100  # gradients of a mean would be subnormal halves
    for given, used in ((None, [1.0] * len(spacing)), (spacing, spacing)):
        check_against_reference(
            lambda u, s=given: gain * fastreg.bending_energy(u, spacing=s),
            lambda u, s=used: gain * bending_energy_ref(u, s).mean(),
            (make(shape, dtype),),
        )


@pytest.mark.parametrize("shape", [s.values[0] for s in SHAPES if np.prod(s.values[0]) < 1000])
def test_is_the_definition(shape):
    u, spacing = make(shape).detach(), [0.7, 1.3, 2.5][: len(shape) - 2]
    expected = by_loops(u, spacing)
    assert_close(fastreg.bending_energy(u, spacing=spacing), expected, 1e-12)
    assert_close(bending_energy_ref(u, spacing).mean(), expected, 1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 6, 7, 9), (1, 3, 3, 3, 3), (2, 2, 5, 37)])
def test_is_monai(shape):
    losses = pytest.importorskip("monai.losses")
    u = make(shape)
    expected = losses.BendingEnergyLoss()(u)
    (expected_grad,) = torch.autograd.grad(expected, u)
    for loss in (fastreg.bending_energy(u), bending_energy_ref(u, [1.0] * (len(shape) - 2)).mean()):
        assert_close(loss, expected, 1e-12)
        assert_close(torch.autograd.grad(loss, u)[0], expected_grad, 1e-9)


def test_quadratic_field():
    z, y, x = torch.meshgrid(*[torch.arange(6.0)] * 3, indexing="ij")
    u = torch.stack([1.5 * z * z, 2 * y * x, torch.zeros(6, 6, 6)])[None]
    # d2/dz2 = 3; d2/dydx = 2, twice; over three components.
    assert fastreg.bending_energy(u).item() == pytest.approx((9 + 2 * 4) / 3)
    # s_z / s_z^2 and s_y / (s_y s_x)
    assert fastreg.bending_energy(u, spacing=(2, 3, 5)).item() == pytest.approx((9 / 4 + 2 * 4 / 25) / 3)


def test_affine_fields_do_not_bend():
    z, y, x = torch.meshgrid(*[torch.arange(s, dtype=torch.float32) for s in (6, 7, 35)], indexing="ij")
    u = torch.stack([100 + 3 * z - 7 * x, 0.5 * y + z, 1000 - x])[None].requires_grad_()
    loss = fastreg.bending_energy(u)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, u)[0].eq(0).all()
    for dtype, value in ((torch.float16, 60000.0), (torch.float32, 1e30)):
        u = torch.full((1, 3, 4, 5, 19), value, dtype=dtype, requires_grad=True)
        loss = fastreg.bending_energy(u)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, u)[0].eq(0).all()


def test_smooth_fields_keep_their_digits():
    """Second derivatives are small differences of large values."""
    z, y, x = torch.meshgrid(*[torch.arange(s, dtype=torch.float64) for s in (8, 9, 40)], indexing="ij")
    u = torch.stack([torch.sin(0.1 * (z + k * y - x)) for k in range(3)])[None] * 5 + 20
    check_against_reference(
        lambda t: 1e3 * fastreg.bending_energy(t),
        lambda t: 1e3 * bending_energy_ref(t, [1.0] * 3).mean(),
        (u.float().requires_grad_(),),
    )


def test_half_differences_do_not_overflow():
    u = torch.zeros(1, 2, 4, 6, dtype=torch.float16)
    u[..., 3] = 60000.0
    u[0, 0, :, 2] = -60000.0
    assert_close(fastreg.bending_energy(u), bending_energy_ref(u.double(), [1.0, 1.0]).mean(), 1e-5)


def test_long_sums_keep_their_digits():
    u = torch.rand(1, 2, 600, 700)
    assert_close(fastreg.bending_energy(u), bending_energy_ref(u.double(), [1.0, 1.0]).mean(), 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "at",
    [(3, 3, 12), (0, 0, 0), (0, 3, 0), (0, 3, 20), (1, 1, 1), (5, 6, 39), (5, 2, 38), (3, 0, 39)],
    ids=str,
)
def test_what_is_not_finite_reaches_its_derivatives_and_its_sample(at, value):
    u = make((2, 3, 6, 7, 40), torch.float32)
    with torch.no_grad():
        u[(1, 1, *at)] = value
    losses = torch.ops.fastreg.bending_energy(u, [1.0] * 3)
    corner = at in ((0, 0, 0), (5, 6, 39))  # part of no derivative
    assert losses.isfinite().tolist() == [True, corner]
    grad = torch.autograd.grad(losses.sum(), u)[0]
    wide = u.detach().double().requires_grad_()
    truth_grad = torch.autograd.grad(bending_energy_ref(wide, [1.0] * 3).sum(), wide)[0]
    assert torch.equal(grad.isfinite(), truth_grad.isfinite())
    assert_close(grad[grad.isfinite()], truth_grad[grad.isfinite()], floor=0.1)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 1, 2)])
def test_nothing_bends_on_short_axes(size):
    u = torch.full((1, 3, *size), float("nan"), requires_grad=True)
    loss = fastreg.bending_energy(u)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, u)[0].eq(0).all()


def test_one_slice_is_a_plane():
    u = make((1, 3, 1, 6, 20), torch.float32)
    plane = fastreg.bending_energy(u[:, 1:, 0])
    u = torch.cat([torch.zeros_like(u[:, :1]), u[:, 1:]], 1)
    assert_close(fastreg.bending_energy(u), plane * 2 / 3, 1e-6)


def opcheck(dtype):
    u, grad = make((2, 3, 4, 5, 6), dtype), torch.ones(2, dtype=torch.promote_types(dtype, torch.float32))
    yield torch.ops.fastreg.bending_energy.default, (u, [1.0, 2.0, 3.0])
    yield torch.ops.fastreg.bending_energy_bwd.default, (grad, u.detach(), [1.0, 2.0, 3.0])


def made(n, spatial, dtype):
    return (make((n, len(spatial), *spatial), dtype),)


CONTRACT = Contract(
    cases={
        "": Case(fastreg.bending_energy, made),
        "spacing": Case(lambda u: fastreg.bending_energy(u, spacing=spaced(u)), made),
    },
    valid=REGULARISER,
    errors=REGULARISER_ERRORS,
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
