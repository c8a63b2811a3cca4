import numpy as np
import pytest
import torch
from common import DTYPES, assert_close, check_against_reference
from contract import Case, Contract

import fastreg
from fastreg.ops.integrate_gradients import integrate_gradients_bwd_ref, integrate_gradients_ref

# Rows of several vectors and groups of rows, planes of more than one block, axes of one voxel.
SHAPES = [
    pytest.param((2, 3, 5, 6, 7), id="n2d5h6w7"),
    pytest.param((1, 3, 4, 3, 1100), id="n1d4h3w1100"),
    pytest.param((3, 2, 9, 67), id="n3h9w67"),
    pytest.param((1, 3, 1, 5, 1), id="one-voxel-axes"),
    pytest.param((1, 3, 3, 90, 33), id="n1d3h90w33"),
]


def make(shape, dtype=torch.float64):
    """Derivatives around 1."""
    return (1 + 0.3 * torch.randn(shape)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_reference(shape, dtype):
    phi = make(shape, dtype)
    assert fastreg.integrate_gradients(phi).dtype == dtype
    check_against_reference(fastreg.integrate_gradients, integrate_gradients_ref, (phi,))


@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_definition(shape):
    phi, grad = make(shape), torch.randn(shape, dtype=torch.float64)
    sums, reverse = np.empty(shape), np.empty(shape)
    for i in range(len(shape) - 2):
        sums[:, i] = np.cumsum(phi.detach().cpu().numpy()[:, i] - 1, axis=i + 1)
        reverse[:, i] = np.flip(np.cumsum(np.flip(grad.cpu().numpy()[:, i], i + 1), axis=i + 1), i + 1)
    for out in (fastreg.integrate_gradients(phi), integrate_gradients_ref(phi)):
        assert_close(out, torch.from_numpy(sums), 1e-12)
        assert_close(torch.autograd.grad(out, phi, grad)[0], torch.from_numpy(reverse), 1e-12)
    assert_close(integrate_gradients_bwd_ref(grad, True), torch.from_numpy(reverse), 1e-12)


def test_each_component_along_its_own_axis():
    phi = torch.ones(1, 3, 4, 5, 6)
    for i in range(3):
        phi[0, i, 1, 2, 3] += i + 1
    out = fastreg.integrate_gradients(phi)
    expected = torch.zeros_like(phi)
    expected[0, 0, 1:, 2, 3], expected[0, 1, 1, 2:, 3], expected[0, 2, 1, 2, 3:] = 1, 2, 3
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ones_are_exactly_the_identity(dtype):
    assert fastreg.integrate_gradients(torch.ones(1, 3, 5, 6, 37, dtype=dtype)).eq(0).all()


@pytest.mark.parametrize("shape", [(1, 2, 5, 30000), (1, 2, 30000, 5), (1, 3, 9000, 2, 3)])
def test_long_axes_keep_their_digits(shape):
    phi = make(shape, torch.float32)
    check_against_reference(fastreg.integrate_gradients, integrate_gradients_ref, (phi,), 1e-6)
    # Half sums are not taken in half precision: 1.5 per voxel reaches 3000, whose neighbours are 2 apart.
    phi = torch.full((1, 2, 2, 2000), 2.5, dtype=torch.float16)
    assert fastreg.integrate_gradients(phi)[0, 1, 0, -1] == 3000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_what_follows_on_its_line(value):
    phi, grad = make((2, 3, 4, 5, 40), torch.float32), torch.randn(2, 3, 4, 5, 40)
    at = (1, slice(None), 2, 3, 20)
    with torch.no_grad():
        phi[at] = value
    grad[at] = value
    after, before = torch.zeros(phi.shape, dtype=torch.bool), torch.zeros(phi.shape, dtype=torch.bool)
    after[1, 0, 2:, 3, 20], after[1, 1, 2, 3:, 20], after[1, 2, 2, 3, 20:] = True, True, True
    before[1, 0, :3, 3, 20], before[1, 1, 2, :4, 20], before[1, 2, 2, 3, :21] = True, True, True
    out = fastreg.integrate_gradients(phi)
    assert torch.equal(~out.isfinite(), after)
    assert torch.equal(~torch.autograd.grad(out, phi, grad)[0].isfinite(), before)


def opcheck(dtype):
    phi = make((2, 3, 4, 5, 6), dtype)
    yield torch.ops.fastreg.integrate_gradients.default, (phi,)
    for reverse in (True, False):
        yield torch.ops.fastreg.integrate_gradients_bwd.default, (phi, reverse)


VALID = {"phi": torch.zeros(1, 3, 3, 4, 5)}
ERRORS = [
    (TypeError, "phi must be fp64, fp32, fp16 or bf16, got torch.int64", {"phi": torch.zeros(1, 2, 4, 5).long()}),
    (TypeError, "phi must be a tensor, got list", {"phi": [[0.0]]}),
    (ValueError, r"phi must have shape \(N, 3, D, H, W\), got \(1, 2, 3, 4, 5\)", {"phi": torch.zeros(1, 2, 3, 4, 5)}),
]  # fmt: skip

CONTRACT = Contract(
    cases={
        "": Case(
            fastreg.integrate_gradients,
            lambda n, spatial, dtype: (make((n, len(spatial), *spatial), dtype),),
        )
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
    empty_channels="a displacement has a component an axis",
    repeats=True,
)
