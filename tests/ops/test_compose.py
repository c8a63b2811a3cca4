import itertools
import math
from functools import partial

import numpy as np
import pytest
import scipy.ndimage
import torch
from common import DTYPES, assert_close, check_against_reference
from contract import Case, Contract

import fastreg
from fastreg.ops.compose import compose_ref
from fastreg.ops.warp import PADDINGS

SHAPES = [
    pytest.param((2, 3, 5, 6, 7), id="n2d5h6w7"),
    pytest.param((1, 3, 4, 3, 70), id="n1d4h3w70"),
    pytest.param((2, 2, 9, 67), id="n2h9w67"),
    pytest.param((1, 3, 1, 1, 5), id="one-voxel-axes"),
]


def make(shape, dtype=torch.float64):
    u, v = torch.randn(shape), 2 * torch.randn(shape)
    # Away from integers, where the interpolant has a kink.
    v = v.floor() + 0.1 + 0.8 * (v - v.floor())
    return u.to(dtype).requires_grad_(), v.to(dtype).requires_grad_()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_reference(shape, dtype, padding):
    check_against_reference(
        lambda u, v: fastreg.compose(u, v, padding=padding),
        lambda u, v: compose_ref(u, v, padding),
        make(shape, dtype),
        # The sum of v and what is read of u cancels.
        tolerance={torch.float32: 5e-5}.get(dtype),
    )


@pytest.mark.parametrize("shape", [(2, 3, 5, 6, 7), (2, 2, 9, 12)])
def test_reference_is_scipy(shape):
    u, v = (t.detach() for t in make(shape))
    steps = np.stack(np.meshgrid(*[np.arange(s) for s in shape[2:]], indexing="ij"))
    for padding, mode in (("zeros", "grid-constant"), ("border", "nearest"), ("reflection", "mirror")):
        ours = compose_ref(u, v, padding)
        for n, k in itertools.product(range(shape[0]), range(shape[1])):
            moved = scipy.ndimage.map_coordinates(
                u[n, k].cpu().numpy(), steps + v[n].cpu().numpy(), order=1, mode=mode
            )
            assert_close(ours[n, k], v[n, k].cpu() + torch.from_numpy(moved), 1e-9)


def test_composition_is_warping_twice():
    """Exact in the interior for linear images and displacements; close for smooth ones."""
    steps = torch.stack(torch.meshgrid(*[torch.arange(12.0).double()] * 3, indexing="ij"))
    image = (steps * torch.tensor([1.0, -2.0, 0.5]).view(3, 1, 1, 1)).sum(0)[None, None]
    u, v = (
        fastreg.affine_displacement(a, (12, 12, 12))
        for a in 0.02 * torch.randn(2, 1, 3, 4).double() + torch.eye(3, 4)
    )
    twice = fastreg.warp(fastreg.warp(image, u, padding="border"), v, padding="border")
    once = fastreg.warp(image, fastreg.compose(u, v), padding="border")
    inside = (..., *[slice(3, -3)] * 3)
    assert (twice - once)[inside].abs().max() < 1e-12
    assert (fastreg.warp(image, fastreg.compose(v, u), padding="border") - once)[inside].abs().max() > 1e-3
    angle = 2 * math.pi / 24 * steps
    image = torch.sin(angle.sum(0))[None, None]
    u, v = (0.5 * torch.sin(angle + s)[None] for s in (0.3, 1.1))
    twice = fastreg.warp(fastreg.warp(image, u), v)
    assert (twice - fastreg.warp(image, fastreg.compose(u, v)))[inside].abs().max() < 0.04
    assert (twice - image)[inside].abs().max() > 0.1


@pytest.mark.usefixtures("reproducible")
def test_one_gradient_at_a_time():
    u, v = make((2, 3, 4, 5, 6))
    both = torch.autograd.grad(fastreg.compose(u, v).square().sum(), (u, v))
    for k in range(2):
        fields = [t.detach().requires_grad_(i == k) for i, t in enumerate((u, v))]
        assert torch.equal(
            torch.autograd.grad(fastreg.compose(*fields).square().sum(), fields[k])[0], both[k]
        )


@pytest.mark.parametrize("u_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v_dtype", DTYPES, ids=str)
def test_mixed_dtypes(u_dtype, v_dtype):
    u, v = (t.detach() for t in make((1, 3, 4, 5, 6)))
    u, v = u.to(u_dtype).requires_grad_(), v.to(v_dtype).requires_grad_()
    assert fastreg.compose(u, v).dtype == torch.promote_types(u_dtype, v_dtype)
    check_against_reference(fastreg.compose, lambda *f: compose_ref(*f, "border"), (u, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_is_neutral(dtype):
    u = torch.randn(2, 3, 4, 5, 66).to(dtype)
    assert torch.equal(fastreg.compose(u, torch.zeros_like(u)), u)
    assert torch.equal(fastreg.compose(torch.zeros_like(u), u), u)


@pytest.mark.parametrize("padding", PADDINGS)
def test_non_finite_and_far(padding):
    u, v = make((1, 3, 5, 6, 70))
    with torch.no_grad():
        v[0, 1, 2, 3, 4] = float("nan")
        v[0, 2, 3, 2, 66] = -1e30
        v[0, 2, 4, 2, 6] = 1e7
    check_against_reference(lambda *f: fastreg.compose(*f, padding=padding).nan_to_num(),
                            lambda *f: compose_ref(*f, padding).nan_to_num(), (u, v))  # fmt: skip
    assert fastreg.compose(u, v).isnan().any(1).nonzero().tolist() == [[0, 2, 3, 4]]
    with torch.no_grad():
        v.zero_()
        u[0, 1, 2, 3, 4] = float("inf")
    assert torch.equal(fastreg.compose(u, v), u)


def opcheck(dtype):
    u, v = make((2, 2, 4, 5), dtype)
    yield torch.ops.fastreg.compose.default, (u, v, "border")
    # Without requires_grad: gradgradcheck has the double backward, which takes long to trace.
    tensors = [t.detach() for t in (torch.rand_like(u), u, v)]
    for needs in ((True, True), (False, True)):
        yield torch.ops.fastreg.compose_bwd.default, (*tensors, "zeros", *needs)


def far(shape, dtype):
    return torch.randn(shape).to(dtype).requires_grad_(), (6 * torch.randn(shape)).to(dtype).requires_grad_()


VALID = {"u": torch.zeros(1, 2, 4, 5), "v": torch.zeros(1, 2, 4, 5)}
ERRORS = [
    (TypeError, "u must be a tensor, got list", {"u": [1]}),
    (TypeError, "v must be fp64, fp32, fp16 or bf16, got torch.int64", {"v": torch.zeros(1, 2, 4, 5).long()}),
    (ValueError, r"u must have shape \(N, 2, H, W\), got \(1, 3, 4, 5\)", {"u": torch.zeros(1, 3, 4, 5)}),
    (ValueError, r"v must have the shape \(1, 2, 4, 5\) of u, got \(1, 2, 4, 6\)", {"v": torch.zeros(1, 2, 4, 6)}),
    (ValueError, "v must be on [a-z:0-9]+ as the other tensors, got meta", {"v": torch.zeros(1, 2, 4, 5, device="meta")}),
    (ValueError, "padding must be 'zeros' or 'border' or 'reflection', got 'wrap'", {"padding": "wrap"}),
]  # fmt: skip

CONTRACT = Contract(
    cases={
        padding: Case(
            partial(fastreg.compose, padding=padding),
            lambda n, spatial, dtype: make((n, len(spatial), *spatial), dtype),
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
    empty_channels="a displacement has a component an axis",
    repeats={"far": Case(fastreg.compose, lambda n, spatial, dtype: far((n, len(spatial), *spatial), dtype))},
    large=((17, 9, 40), (33, 70)),
)
