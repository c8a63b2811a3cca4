import itertools

import pytest
import torch
from common import DTYPES, assert_close
from contract import Case, Contract, like

import fastreg
from fastreg.ops.affine_displacement import affine_displacement_bwd_ref, affine_displacement_ref

SHAPES = [
    pytest.param((5, 6, 7), id="d5h6w7"),
    pytest.param((2, 3, 67), id="d2h3w67"),
    pytest.param((9, 130), id="h9w130"),
    pytest.param((1, 1, 4), id="one-voxel-axes"),
]


def make(nd, dtype=torch.float64, n=2):
    matrix = torch.eye(nd, nd + 1) + 0.2 * torch.randn(n, nd, nd + 1)
    return matrix.to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 3)])
def test_reference_is_the_formula(shape):
    matrix = make(len(shape)).detach()
    result = affine_displacement_ref(matrix, shape, True)
    grad = torch.randn_like(result)
    expected = torch.zeros_like(matrix)
    for n, p in itertools.product(range(2), itertools.product(*map(range, shape))):
        point = torch.tensor([*p, 1.0], dtype=torch.float64)
        assert torch.allclose(result[(n, slice(None), *p)], matrix[n] @ point - point[:-1], atol=1e-12)
        expected[n] += torch.outer(grad[(n, slice(None), *p)], point)
    assert_close(affine_displacement_bwd_ref(grad), expected, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_reference(shape, dtype):
    matrix = make(len(shape), dtype)
    result = fastreg.affine_displacement(matrix, shape)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(result, affine_displacement_ref(matrix.double(), shape, True))
    weight = torch.randn_like(result)
    grad = torch.autograd.grad(result, matrix, weight)[0]
    assert grad.dtype == dtype
    assert_close(grad, affine_displacement_bwd_ref(weight.double()))


def test_a_matrix_near_the_identity_keeps_its_digits():
    matrix = torch.eye(3, 4)[None]
    matrix[0, 2, 2] += 2.0**-22
    result = fastreg.affine_displacement(matrix, (1, 1, 4000))
    assert torch.equal(result[0, 2, 0, 0], torch.arange(4000) * 2.0**-22)
    assert result[0, :2].eq(0).all()


def test_is_what_warp_samples():
    image, matrix = torch.rand(2, 1, 5, 6, 7).double(), make(3).detach()
    displaced = fastreg.warp(image, fastreg.affine_displacement(matrix, (5, 6, 7)))
    assert_close(fastreg.warp(image, None, affine=matrix), displaced, 1e-9)


def test_non_finite_stays_in_its_component():
    matrix = torch.eye(3, 4)[None].clone()
    matrix[0, 1, 3] = float("nan")
    result = fastreg.affine_displacement(matrix, (2, 3, 4))
    assert result[0, 1].isnan().all()
    assert result[0, ::2].eq(0).all()


def test_singular_matrix():
    result = fastreg.affine_displacement(torch.zeros(1, 2, 3), (3, 4))
    assert torch.equal(
        result[0], -torch.stack(torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij"))
    )


def opcheck(dtype):
    yield torch.ops.fastreg.affine_displacement.default, (make(3, dtype), (2, 3, 4), True)
    grad = torch.rand(2, 3, 2, 3, 4, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    yield torch.ops.fastreg.affine_displacement_bwd.default, (grad,)


VALID = {"matrix": torch.zeros(1, 3, 4), "shape": (3, 4, 5)}
ERRORS = [
    (TypeError, "matrix must be a tensor, got list", {"matrix": [1], "shape": (3, 4)}),
    (TypeError, "matrix must be fp64, fp32, fp16 or bf16, got torch.int64", {"matrix": torch.zeros(1, 2, 3).long(), "shape": (3, 4)}),
    (ValueError, r"matrix must have shape \(N, 3, 4\) or \(N, 2, 3\), got \(2, 3\)", {"matrix": torch.zeros(2, 3), "shape": (3, 4)}),
    (ValueError, r"matrix must have shape \(N, 3, 4\), got \(1, 3, 3\)", {"matrix": torch.zeros(1, 3, 3), "shape": (3, 4, 5)}),
    (ValueError, r"matrix must have shape \(N, 3, 4\) or \(N, 2, 3\), got \(1, 4, 5\)", {"matrix": torch.zeros(1, 4, 5), "shape": (3, 4)}),
    (ValueError, r"shape must be 3 integers >= 0, got \(3, 4\)", {"matrix": torch.zeros(1, 3, 4), "shape": (3, 4)}),
    (ValueError, r"shape must be 2 integers >= 0, got \(3, -1\)", {"matrix": torch.zeros(1, 2, 3), "shape": (3, -1)}),
    (TypeError, r"shape must be 2 integers, got \(3, 1.5\)", {"matrix": torch.zeros(1, 2, 3), "shape": (3, 1.5)}),
    (TypeError, "shape must be 2 integers, got 3", {"matrix": torch.zeros(1, 2, 3), "shape": 3}),
]  # fmt: skip

CONTRACT = Contract(
    cases={
        "": Case(
            lambda matrix, like: fastreg.affine_displacement(matrix, like.shape[2:]),
            lambda n, spatial, dtype: (make(len(spatial), dtype, n), like(n, spatial)),
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
