import numpy as np
import pytest
import torch
from common import DTYPES, assert_close, check_against_reference
from contract import REGULARISER, REGULARISER_ERRORS, Case, Contract, spaced

import fastreg
from fastreg.ops.total_variation import total_variation_ref

# Odd sizes, rows of several vectors and of more than one block of sums, axes of one voxel.
SHAPES = [
    pytest.param((2, 3, 5, 6, 7), id="n2d5h6w7"),
    pytest.param((1, 3, 4, 3, 70), id="n1d4h3w70"),
    pytest.param((3, 2, 9, 1100), id="n3h9w1100"),
    pytest.param((1, 3, 1, 5, 1), id="one-voxel-axes"),
    pytest.param((2, 3, 2, 1, 35), id="short-axes"),
]
ISOTROPIC = pytest.mark.parametrize("isotropic", [False, True], ids=["anisotropic", "isotropic"])


def make(shape, dtype=torch.float64):
    return torch.randn(shape).to(dtype).requires_grad_()


@ISOTROPIC
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_reference(shape, dtype, isotropic):
    spacing = [0.7, 1.3, 2.5][: len(shape) - 2]
    for given, used in ((None, [1.0] * len(spacing)), (spacing, spacing)):
        check_against_reference(
            lambda u, s=given: 1e3 * fastreg.total_variation(u, isotropic=isotropic, spacing=s),
            lambda u, s=used: 1e3 * total_variation_ref(u, isotropic, s).mean(),
            (make(shape, dtype),),
        )


@ISOTROPIC
@pytest.mark.parametrize("shape", [(2, 3, 3, 4, 5), (1, 2, 6, 5), (1, 3, 1, 5, 1), (1, 3, 2, 1, 4)])
def test_is_the_definition(shape, isotropic):
    u, spacing = make(shape).detach(), [0.7, 1.3, 2.5][: len(shape) - 2]
    nd, size, values = len(spacing), shape[2:], u.cpu().numpy()
    axes = [k for k in range(nd) if size[k] > 1]
    total = count = 0
    for n in range(shape[0]):
        for i in range(nd):
            for p in np.ndindex(*size):
                steps = []
                for k in axes:
                    if p[k] + 1 < size[k]:
                        q = tuple(p[j] + (j == k) for j in range(nd))
                        steps.append((values[n, i][q] - values[n, i][p]) * spacing[i] / spacing[k])
                if not isotropic:
                    total, count = total + sum(map(abs, steps)), count + 1
                elif len(steps) == len(axes):
                    total, count = total + np.linalg.norm(steps), count + 1
    # Anisotropic: the sum over components, averaged over voxels and axes.
    expected = torch.tensor(total / count, dtype=torch.float64)
    assert_close(fastreg.total_variation(u, isotropic=isotropic, spacing=spacing), expected, 1e-12)
    assert_close(total_variation_ref(u, isotropic, spacing).mean(), expected, 1e-12)


def test_equations_of_the_papers():
    u = make((2, 3, 5, 6, 7)).detach()
    # RRN, eq. 5: 1 / (3 |Omega|) of the sum of all absolute forward differences.
    total = sum(u.diff(dim=k).abs().sum() for k in (2, 3, 4)) / (3 * 5 * 6 * 7) / 2
    assert_close(fastreg.total_variation(u), total, 1e-12)
    # R2N2's differences go backward: those of the flipped displacement.
    f = make((1, 2, 8, 9)).detach()
    here = f[..., 1:, 1:]
    r2n2 = ((here - f[..., :-1, 1:]) ** 2 + (here - f[..., 1:, :-1]) ** 2).sqrt().mean()
    assert_close(fastreg.total_variation(f.flip(2, 3), isotropic=True), r2n2, 1e-12)


def test_linear_field():
    steps = torch.meshgrid(*[torch.arange(5.0)] * 3, indexing="ij")
    u = torch.stack([3 * steps[0] + 4 * steps[1], 2 * steps[2], torch.zeros(5, 5, 5)])[None]
    # 4 of 5 voxels of a line have a difference; nine sums over three axes.
    assert fastreg.total_variation(u).item() == pytest.approx(0.8 * 9 / 3)
    assert fastreg.total_variation(u, isotropic=True).item() == pytest.approx((5 + 2) / 3)
    # The second component runs along y, so its derivative along x is scaled by s_y / s_x.
    expected = (5 + 2 * 3 / 2) / 3
    spacing = (1, 3, 2)
    u[0, 0] = 3 * steps[0] + 12 * steps[1]
    assert fastreg.total_variation(u, isotropic=True, spacing=spacing).item() == pytest.approx(expected)


@ISOTROPIC
def test_constant_field_has_no_loss_and_no_gradient(isotropic):
    for dtype, value in ((torch.float16, 60000.0), (torch.float32, 1e30), (torch.float32, float(2**24))):
        u = torch.full((1, 3, 4, 5, 19), value, dtype=dtype, requires_grad=True)
        loss = fastreg.total_variation(u, isotropic=isotropic)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, u)[0].eq(0).all()


@ISOTROPIC
def test_half_flat_field(isotropic):
    """Slope 0 where nothing changes, next to where something does."""
    u = torch.zeros(1, 3, 6, 7, 40, dtype=torch.float64)
    u[..., 20:] = torch.randn(1, 3, 6, 7, 20, dtype=torch.float64)
    u.requires_grad_()
    grad = torch.autograd.grad(fastreg.total_variation(u, isotropic=isotropic), u)[0]
    truth = torch.autograd.grad(total_variation_ref(u, isotropic, [1.0] * 3).mean(), u)[0]
    assert_close(grad, truth)
    assert grad[..., :19].eq(0).all()
    assert grad[..., 19].ne(0).any()


@ISOTROPIC
def test_half_differences_do_not_overflow(isotropic):
    u = torch.zeros(1, 2, 4, 6, dtype=torch.float16)
    u[..., 3] = 60000.0
    u[0, 0, :, 2] = -60000.0
    expected = total_variation_ref(u.double(), isotropic, [1.0, 1.0]).mean()
    assert_close(fastreg.total_variation(u, isotropic=isotropic), expected, 1e-5)


@ISOTROPIC
def test_long_sums_keep_their_digits(isotropic):
    u = torch.rand(1, 2, 600, 700)
    expected = total_variation_ref(u.double(), isotropic, [1.0, 1.0]).mean()
    assert_close(fastreg.total_variation(u, isotropic=isotropic), expected, 1e-6)


@ISOTROPIC
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [(0, 3, 12), (0, 0, 0), (1, 5, 29), (1, 2, 29), (0, 5, 3)], ids=str)
def test_what_is_not_finite_reaches_its_differences_and_its_sample(at, value, isotropic):
    u = make((2, 2, 6, 30), torch.float32)
    with torch.no_grad():
        u[(1, *at)] = value
    losses = torch.ops.fastreg.total_variation(u, isotropic, [1.0, 1.0])
    assert losses.isfinite().tolist()[0]
    grad = torch.autograd.grad(losses.sum(), u)[0]
    wide = u.detach().double().requires_grad_()
    truth = total_variation_ref(wide, isotropic, [1.0, 1.0])
    assert torch.equal(losses.isnan(), truth.isnan())
    assert torch.equal(losses.isinf(), truth.isinf())
    # As in torch.abs, an absolute value has slope 0 at NaN.
    assert_close(grad, torch.autograd.grad(truth.sum(), wide)[0], floor=0.1)
    assert grad.isnan().any() == (
        isotropic and at != (1, 5, 29)
    )  # the last voxel is in no cropped difference


@ISOTROPIC
def test_one_voxel_is_constant(isotropic):
    u = torch.full((1, 3, 1, 1, 1), float("nan"), requires_grad=True)
    loss = fastreg.total_variation(u, isotropic=isotropic)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, u)[0].eq(0).all()


def opcheck(dtype):
    u, grad = make((2, 3, 4, 5, 6), dtype), torch.ones(2, dtype=torch.promote_types(dtype, torch.float32))
    yield torch.ops.fastreg.total_variation.default, (u, False, [1.0, 2.0, 3.0])
    yield torch.ops.fastreg.total_variation_bwd.default, (grad, u.detach(), True, [1.0, 2.0, 3.0])


def made(n, spatial, dtype):
    return (make((n, len(spatial), *spatial), dtype),)


CONTRACT = Contract(
    cases={
        "anisotropic": Case(lambda u: fastreg.total_variation(u, spacing=spaced(u)), made),
        "isotropic": Case(lambda u: fastreg.total_variation(u, isotropic=True, spacing=spaced(u)), made),
    },
    valid=REGULARISER,
    errors=[*REGULARISER_ERRORS, (TypeError, "isotropic must be True or False, got 1", {"isotropic": 1})],
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
