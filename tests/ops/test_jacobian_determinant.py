import numpy as np
import pytest
import torch
from common import DTYPES, assert_close, check_against_reference
from contract import Case, Contract

import fastreg
from fastreg.ops.jacobian_determinant import jacobian_determinant_ref

SHAPES = [
    pytest.param((2, 3, 5, 6, 7), id="n2d5h6w7"),
    pytest.param((1, 3, 4, 3, 70), id="n1d4h3w70"),
    pytest.param((3, 2, 9, 67), id="n3h9w67"),
    pytest.param((2, 3, 2, 1, 3), id="short-axes"),
    pytest.param((1, 2, 20, 2), id="two-columns"),
]


def make(shape, dtype=torch.float64, amplitude=0.1):
    """Determinants around 1, far from 0 where relative errors have no meaning."""
    return (amplitude * torch.randn(shape)).to(dtype).requires_grad_()


def affine(matrix, shape):
    """u(p) = (A - I) p."""
    steps = torch.stack(
        torch.meshgrid(*[torch.arange(s, dtype=torch.float64) for s in shape], indexing="ij")
    ).flatten(1)
    return ((matrix - torch.eye(len(shape), dtype=torch.float64)) @ steps).view(1, -1, *shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_reference(shape, dtype):
    u = make(shape, dtype)
    assert fastreg.jacobian_determinant(u).dtype == torch.promote_types(dtype, torch.float32)
    check_against_reference(fastreg.jacobian_determinant, jacobian_determinant_ref, (u,))


@pytest.mark.parametrize("shape", SHAPES)
def test_is_numpy_gradient(shape):
    u = make(shape, amplitude=2.0).detach()
    nd = u.shape[1]
    jacobian = np.zeros((shape[0], *shape[2:], nd, nd))
    for c in range(nd):
        for k in range(nd):
            if shape[k + 2] > 1:
                jacobian[..., c, k] = np.gradient(u[:, c].cpu().numpy(), axis=k + 1)
    expected = torch.from_numpy(np.linalg.det(jacobian + np.eye(nd))).unsqueeze(1)
    for out in (fastreg.jacobian_determinant(u), jacobian_determinant_ref(u)):
        assert_close(out, expected, 1e-9)


@pytest.mark.parametrize("shape", [(4, 5, 19), (7, 21)])
def test_affine_map_has_the_determinant_of_its_matrix(shape):
    for seed in range(4):
        matrix = torch.randn(
            len(shape),
            len(shape),
            dtype=torch.float64,
            generator=torch.Generator(torch.get_default_device()).manual_seed(seed),
        )
        out = fastreg.jacobian_determinant(affine(matrix, shape))
        assert_close(out, torch.linalg.det(matrix).expand(out.shape), 1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_displacement(dtype):
    u = torch.full((1, 3, 4, 5, 19), 1234.5).to(dtype).requires_grad_()
    out = fastreg.jacobian_determinant(u)
    assert out.eq(1).all()
    assert torch.autograd.grad(out.sum(), u)[0].isfinite().all()


def test_one_voxel_has_determinant_one():
    u = torch.full((2, 3, 1, 1, 1), 7.0, requires_grad=True)
    out = fastreg.jacobian_determinant(u)
    assert out.eq(1).all()
    assert torch.autograd.grad(out.sum(), u)[0].eq(0).all()


def test_nan_reaches_its_differences_only():
    u = make((1, 2, 7, 30), torch.float32)
    with torch.no_grad():
        u[0, 0, 3, 12] = float("nan")
    out = fastreg.jacobian_determinant(u)
    expected = [[0, 0, y, x] for y, x in ((2, 12), (3, 11), (3, 13), (4, 12))]
    assert out.isnan().nonzero().tolist() == expected
    truth = jacobian_determinant_ref(u.double())
    grad, truth_grad = (torch.autograd.grad(o.sum(), u)[0] for o in (out, truth))
    assert_close(grad, truth_grad, floor=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(1, 3, 1, 5, 30), (1, 3, 4, 1, 30), (1, 3, 4, 30, 1), (1, 2, 1, 30)])
def test_no_difference_along_an_axis_of_one_voxel(shape, value):
    """Not even of what is not finite."""
    u = make(shape, torch.float32)
    with torch.no_grad():
        u[0, 0][tuple(s // 2 for s in shape[2:])] = value
    wide = u.detach().double().requires_grad_()
    out, truth = fastreg.jacobian_determinant(u), jacobian_determinant_ref(wide)
    assert torch.equal(out.isfinite(), truth.isfinite())
    assert out.isfinite().any()
    grad, truth_grad = (torch.autograd.grad(o.sum(), t)[0] for o, t in ((out, u), (truth, wide)))
    assert torch.equal(grad.isfinite(), truth_grad.isfinite())
    alone = torch.full((1, 3, 1, 1, 1), value, requires_grad=True)
    out = fastreg.jacobian_determinant(alone)
    assert out.item() == 1
    assert torch.autograd.grad(out.sum(), alone)[0].eq(0).all()


def opcheck(dtype):
    u = make((2, 3, 4, 5, 6), dtype)
    yield torch.ops.fastreg.jacobian_determinant.default, (u,)
    grad = torch.rand_like(fastreg.jacobian_determinant(u).detach())
    yield torch.ops.fastreg.jacobian_determinant_bwd.default, (grad, u.detach())


VALID = {"u": torch.zeros(1, 3, 3, 4, 5)}
ERRORS = [
    (TypeError, "u must be fp64, fp32, fp16 or bf16, got torch.int64", {"u": torch.zeros(1, 2, 4, 5).long()}),
    (TypeError, "u must be a tensor, got list", {"u": [[0.0]]}),
    (ValueError, r"u must have shape \(N, 3, D, H, W\), got \(1, 2, 3, 4, 5\)", {"u": torch.zeros(1, 2, 3, 4, 5)}),
]  # fmt: skip

CONTRACT = Contract(
    cases={
        "": Case(
            fastreg.jacobian_determinant,
            lambda n, spatial, dtype: (make((n, len(spatial), *spatial), dtype, 1.0),),
        )
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
    empty_channels="a displacement has a component an axis",
    repeats=True,
)
