from functools import partial

import numpy as np
import pytest
import scipy.ndimage
import torch
from common import (
    BACKEND,
    DTYPES,
    assert_close,
    check_against_reference,
    skip_where_the_interpreter_truncates,
)
from contract import Case, Contract

import fastreg
from fastreg.metrics import inverse_residual
from fastreg.ops.invert_displacement import invert_displacement_ref
from fastreg.ops.warp import PADDINGS, warp_ref

SHAPES = [
    pytest.param((2, 3, 5, 6, 7), id="n2d5h6w7"),
    pytest.param((1, 3, 4, 3, 70), id="n1d4h3w70"),
    pytest.param((2, 2, 9, 67), id="n2h9w67"),
    pytest.param((1, 3, 1, 1, 5), id="one-voxel-axes"),
]

not_interpreted = pytest.mark.skipif(BACKEND == "triton", reason="minutes under the interpreter")


def make(shape, dtype=torch.float64):
    """Positions end away from integers, where the interpolant has a kink."""
    whole = torch.randint(-2, 2, (*shape[:2], *[1] * (len(shape) - 2)))
    return (whole + 0.5 + 0.15 * (2 * torch.rand(shape) - 1)).to(dtype).requires_grad_()


def make_points(shape, dtype=torch.float64):
    """Some of them outside, none of them on a voxel."""
    size = torch.tensor(shape[2:]).view(-1, *[1] * (len(shape) - 2))
    points = torch.rand(*shape[:2], *[3, 2, 4][: len(shape) - 2]) * (size + 4) - 2
    return (points.floor() + 0.5 + 0.1 * torch.rand_like(points)).to(dtype).requires_grad_()


def smooth(shape, sigma, most):
    u = fastreg.smooth(torch.randn(1, len(shape), *shape).double(), sigma)
    return u * (most / u.abs().max())


def voxels(shape):
    return torch.stack(torch.meshgrid(*[torch.arange(s).double() for s in shape], indexing="ij"))[None]


class Implicit(torch.autograd.Function):
    """Of v: dL/dv is g and what flows back through -u(x + v) to v, until it stands; to u what then flows through it."""

    @staticmethod
    def forward(ctx, u, v, padding):
        ctx.save_for_backward(u, v)
        ctx.padding = padding
        return v.clone()

    @staticmethod
    def backward(ctx, grad):
        u, v = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            moved = -warp_ref(u, v, None, "linear", ctx.padding)
        flow = grad
        for _ in range(200):
            flow = grad + torch.autograd.grad(moved, v, flow, retain_graph=True)[0]
        return torch.autograd.grad(moved, u, flow)[0], None, None


@pytest.mark.parametrize("padding", ["border", "reflection"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_reference(shape, dtype, padding):
    skip_where_the_interpreter_truncates(dtype)
    check_against_reference(
        lambda u: fastreg.invert_displacement(u, padding=padding),
        lambda u: Implicit.apply(u, invert_displacement_ref(u.detach(), None, padding, 20), padding),
        (make(shape, dtype),),
        tolerance={torch.float32: 5e-5}.get(dtype),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_zeros_against_reference(shape):
    """Where u ends with a jump there is often no inverse, and what comes nearest depends on roundings: fp64 alone."""
    u = make(shape).detach()
    v = fastreg.invert_displacement(u, padding="zeros")
    assert_close(v, invert_displacement_ref(u, None, "zeros", 20), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_points_against_reference(shape, dtype):
    u, points = make(shape, dtype), make_points(shape, dtype)
    v = fastreg.invert_displacement(u, points=points)
    truth = invert_displacement_ref(u.detach().double(), points.detach().double(), "border", 20)
    assert_close(v, truth, {torch.float32: 5e-5}.get(dtype))


@not_interpreted
@pytest.mark.parametrize("shape", [(9, 12, 10), (20, 31)])
def test_is_scipys_fixed_point(shape):
    """v <- -u(x + v) until it stands, of a field whose slopes are below 1."""
    u = smooth(shape, 3.0, 1.5)
    steps, v = voxels(shape)[0].numpy(), np.zeros(u.shape[1:])
    for _ in range(200):
        v = -np.stack(
            [scipy.ndimage.map_coordinates(c, steps + v, order=1, mode="nearest") for c in u[0].cpu().numpy()]
        )
    assert_close(fastreg.invert_displacement(u), torch.from_numpy(v)[None], 1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_translation(dtype):
    u = torch.tensor([3.25, -1.5, 40.0]).view(1, 3, 1, 1, 1).expand(1, 3, 4, 5, 6).to(dtype)
    assert torch.equal(fastreg.invert_displacement(u), -u)
    assert torch.equal(fastreg.invert_displacement(torch.zeros_like(u)), torch.zeros_like(u))


@not_interpreted
@pytest.mark.parametrize("shape", [(12, 14, 10), (16, 18)])
def test_affine(shape):
    """Exact where the inverse lies inside: linear interpolation of a linear field is that field."""
    nd = len(shape)
    matrix = torch.eye(nd, nd + 1).double() + 0.1 * torch.randn(nd, nd + 1).double()
    inverse = torch.linalg.inv(matrix[:, :nd])
    centre = (torch.tensor(shape).double() - 1) / 2
    matrix[:, nd] = centre - matrix[:, :nd] @ centre + 0.3
    u = fastreg.affine_displacement(matrix[None], shape)
    back = fastreg.affine_displacement(torch.cat([inverse, -inverse @ matrix[:, nd:]], 1)[None], shape)
    source = voxels(shape) + back
    last = torch.tensor(shape).view(1, -1, *[1] * nd) - 1
    inside = ((source >= 0) & (source <= last)).all(1, keepdim=True).expand_as(u)
    assert inside.double().mean() > 0.3
    assert (fastreg.invert_displacement(u) - back)[inside].abs().max() < 1e-9


@not_interpreted
def test_a_map_of_known_inverse():
    """x + u = n sinh(x / n): v = n asinh(x / n) - x, to the error of interpolating u."""
    n = 40.0
    x = voxels((60, 60))
    u = n * torch.sinh(x / n) - x
    v = n * torch.asinh(x / n) - x
    assert (fastreg.invert_displacement(u) - v).abs().max() < 4e-3
    # And the other way, to the border: x + v stays inside.
    inside = voxels((60, 60)) + u <= 59
    assert (fastreg.invert_displacement(v) - u)[inside].abs().max() < 5e-3


@pytest.mark.skipif(BACKEND in ("triton", "emulation"), reason="many voxels")
@pytest.mark.parametrize(
    ("shape", "sigma", "most"),
    [((40, 44, 48), 8.0, 10.0), ((12, 60, 60), 6.0, 5.0), ((90, 80), 9.0, 10.0)],
    ids=["ten-voxels", "thin", "2d"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_residual(shape, sigma, most, dtype):
    """Motion of many voxels, to the border and across it."""
    u = smooth(shape, sigma, most)
    while fastreg.metrics.folding(u) > 0 or fastreg.jacobian_determinant(u).min() < 0.05:
        u = 0.9 * u
    assert u.abs().max() > most / 4
    v = fastreg.invert_displacement(u.to(dtype))
    residual = inverse_residual(u, v.double())
    assert residual.max() < 1e-3
    assert residual.mean() < 1e-5
    assert inverse_residual(u, -u).max() > 0.3  # what a first step would leave


@not_interpreted
def test_points_are_positions():
    u = smooth((12, 14, 10), 4.0, 2.0)
    every = voxels((12, 14, 10))
    v = fastreg.invert_displacement(u)
    assert torch.equal(fastreg.invert_displacement(u, points=every), v)
    points = 8 * torch.rand(1, 3, 1, 1, 40).double() + 1
    back = points + fastreg.invert_displacement(u, points=points)
    moved = fastreg.metrics.move_points(back[0].flatten(1).T, u)
    assert (moved.T - points[0].flatten(1)).abs().max() < 1e-9
    assert fastreg.invert_displacement(u.float(), points=points).dtype == torch.float64
    # Far outside u is that of the border.
    far = torch.full((1, 3, 1, 1, 1), 1e4).double()
    v = fastreg.invert_displacement(u, points=far).flatten()
    assert (v + u[0, :, -1, -1, -1]).abs().max() < 1e-15


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_folds_are_finite(dtype):
    u = (6 * torch.randn(1, 3, 10, 11, 12)).to(dtype).requires_grad_()
    v = fastreg.invert_displacement(u)
    (grad,) = torch.autograd.grad(v.sum(), u)
    assert fastreg.metrics.folding(u) > 0.1
    assert v.isfinite().all()
    assert grad.isfinite().all()
    residual = inverse_residual(u, v).detach()
    assert residual.max() > 1e-3  # there is no inverse
    assert residual.mean() < 0.3 * inverse_residual(u, -u).mean()
    # A mirror and a projection: det(I + J) = -1 and 0.
    x = voxels((6, 7))
    for factor in (-2.0, -1.0):
        u = (factor * (x - 3) * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)).to(dtype).requires_grad_()
        v = fastreg.invert_displacement(u)
        assert v.isfinite().all()
        assert torch.autograd.grad(v.sum(), u)[0].isfinite().all()
    assert inverse_residual(u, v)[:, :, 3].max() == 0


def test_no_voxel_is_left_where_steps_do_not_fall():
    """A kink between two cells at which Newton's steps lead back and forth: x + u has slopes 1.9 and 0.1."""
    slope = torch.where(torch.arange(24) % 2 == 0, 0.9, -0.9).double()
    u = torch.cat([torch.zeros(1).double(), slope.cumsum(0)])
    u = torch.stack([torch.zeros_like(u), u])[None, :, None]
    v = fastreg.invert_displacement(u)
    assert inverse_residual(u, v).max() < 1e-6


@not_interpreted
def test_iterations_are_steps():
    u = smooth((20, 22), 4.0, 3.0)
    residuals = [
        inverse_residual(u, fastreg.invert_displacement(u, iterations=i)).max() for i in (1, 2, 3, 20)
    ]
    assert residuals[0] > 10 * residuals[1] > 0
    assert residuals[3] < 1e-6
    with pytest.raises(ValueError, match="iterations"):
        fastreg.invert_displacement(u, iterations=0)


def test_nan_and_far():
    u = make((1, 3, 6, 7, 8)).detach()
    u[0, 1, 3, 3, 3] = float("nan")
    v = fastreg.invert_displacement(u)
    assert v.isnan().any(1).nonzero().tolist() == [[0, 3, 3, 3]]
    assert v[0, :, 3, 3, 3].isnan().all()
    u[0, 1, 3, 3, 3] = 0.5
    near = (fastreg.invert_displacement(u) - v).abs().nan_to_num()
    assert (near.amax(1) > 1e-6).sum() <= 27  # those that read it on their way
    u[0, 2, 1, 1, 1] = float("inf")
    assert fastreg.invert_displacement(u).isfinite().all(1).sum() >= 6 * 7 * 8 - 1
    assert fastreg.invert_displacement(torch.full((1, 2, 3, 4), 1e30)).eq(-1e30).all()
    points = make_points((1, 3, 6, 7, 8)).detach()
    points[0, 0, 0, 0, 0] = float("nan")
    v = fastreg.invert_displacement(make((1, 3, 6, 7, 8)).detach(), points=points)
    assert v.isnan().any(1).nonzero().tolist() == [[0, 0, 0, 0]]


@pytest.mark.usefixtures("reproducible")
def test_gradient_is_that_of_the_implicit_function():
    """By the dense Jacobian of u(x + v) + v to v and to u."""
    u = make((1, 2, 4, 5))
    v = fastreg.invert_displacement(u)
    weight = torch.randn_like(v)
    (grad,) = torch.autograd.grad(v, u, weight)
    to_u, to_v = torch.autograd.functional.jacobian(fastreg.compose, (u.detach(), v.detach()))
    n = v.numel()
    q = torch.linalg.solve(to_v.reshape(n, n).T, weight.flatten())
    assert_close(grad, -(to_u.reshape(n, n).T @ q).view_as(grad), 1e-6)


def test_memory_of_the_backward_is_u_and_v():
    u = make((1, 3, 6, 7, 8), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fastreg.invert_displacement(u)
    assert sum(t.numel() for t in saved) == 2 * u.numel()


def opcheck(dtype):
    u, points = make((2, 2, 4, 5), dtype), make_points((2, 2, 4, 5), dtype)
    for at in (None, points):
        yield torch.ops.fastreg.invert_displacement.default, (u, at, "border", 20)
        at = at if at is None else at.detach()
        v = torch.ops.fastreg.invert_displacement(u.detach(), at, "zeros", 20)
        arguments = (torch.rand_like(v), v, u.detach(), at, "zeros")
        yield torch.ops.fastreg.invert_displacement_adjoint.default, arguments


VALID = {"u": torch.zeros(1, 2, 4, 5), "points": torch.zeros(1, 2, 3, 3)}
ERRORS = [
    (TypeError, "u must be a tensor, got list", {"u": [1]}),
    (TypeError, "u must be fp64, fp32, fp16 or bf16, got torch.int64", {"u": torch.zeros(1, 2, 4, 5).long()}),
    (ValueError, r"u must have shape \(N, 2, H, W\), got \(1, 3, 4, 5\)", {"u": torch.zeros(1, 3, 4, 5)}),
    (ValueError, r"points must have shape \(N, 2, H, W\) with N = 1, got \(2, 2, 3, 3\)", {"points": torch.zeros(2, 2, 3, 3)}),
    (ValueError, r"points must have shape \(N, 2, H, W\) as u, got \(1, 3, 3, 3, 3\)", {"points": torch.zeros(1, 3, 3, 3, 3)}),
    (ValueError, "points must be on [a-z:0-9]+ as the other tensors, got meta", {"points": torch.zeros(1, 2, 3, 3, device="meta")}),
    (ValueError, r"u must have voxels, got \(1, 2, 0, 5\)", {"u": torch.zeros(1, 2, 0, 5)}),
    (ValueError, "padding must be 'zeros' or 'border' or 'reflection', got 'wrap'", {"padding": "wrap"}),
    (ValueError, "iterations must be from 1 to 1000, got 0", {"iterations": 0}),
    (TypeError, "iterations must be an int, got 2.0", {"iterations": 2.0}),
]  # fmt: skip

CASES = {
    **{
        padding: Case(
            partial(fastreg.invert_displacement, padding=padding),
            lambda n, spatial, dtype: (make((n, len(spatial), *spatial), dtype),),
        )
        for padding in PADDINGS
    },
    "points": Case(
        lambda u, points: fastreg.invert_displacement(u, points=points),
        lambda n, spatial, dtype: (
            make((n, len(spatial), *spatial), dtype),
            make_points((n, len(spatial), *spatial), dtype),
        ),
    ),
}

CONTRACT = Contract(
    cases=CASES,
    valid=VALID,
    errors=ERRORS,
    opcheck=opcheck,
    # With zeros there is no inverse beside the jump at the border.
    gradcheck={name: case for name, case in CASES.items() if name != "zeros"},
    double_backward=False,
    layouts=True,
    vmap=True,
    compiled=True,
    empty_batch=True,
    empty_axes={name: case for name, case in CASES.items() if name != "points"},
    empty_channels="a displacement has a component an axis",
    repeats=True,
    large=((17, 9, 40), (33, 70)),
)
