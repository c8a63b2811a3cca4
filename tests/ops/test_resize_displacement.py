import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, assert_close, check_against_reference, gradients, layouts

import fastreg
from fastreg.ops.resize_displacement import resize_displacement_ref

# Up, down, both, to and from one voxel, the same size, rows longer than a vector, outputs that no input voxel
# reaches.
CASES = [
    pytest.param((2, 3, 4, 5, 6), (7, 9, 11), id="up"),
    pytest.param((1, 3, 9, 8, 67), (4, 3, 33), id="down"),
    pytest.param((2, 2, 5, 40), (9, 13), id="2d-mixed"),
    pytest.param((1, 3, 1, 4, 1), (3, 1, 5), id="one-voxel-axes"),
    pytest.param((1, 2, 3, 70), (3, 70), id="same-size"),
    pytest.param((1, 2, 31, 50), (3, 4), id="sparse"),
]


def make(shape, dtype=torch.float64):
    return torch.rand(shape).to(dtype).requires_grad_()


def stock(u, size, align_corners, factor=None):
    """F.interpolate times the exact factor or the one given."""
    mode = "trilinear" if u.dim() == 5 else "bilinear"
    resized = F.interpolate(u, size, mode=mode, align_corners=align_corners)
    if factor is not None:
        return resized * factor
    exact = [
        (o - 1) / (i - 1) if align_corners and i > 1 else 1.0 if align_corners else o / i
        for i, o in zip(u.shape[2:], size, strict=True)
    ]
    return resized * torch.tensor(exact, dtype=u.dtype).view(-1, *[1] * len(size))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "size"), CASES)
def test_against_reference(shape, size, dtype, align_corners):
    check_against_reference(
        lambda u: fastreg.resize_displacement(u, size, align_corners=align_corners),
        lambda u: resize_displacement_ref(u, size, align_corners, None),
        (make(shape, dtype),),
    )


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("shape", "size"), CASES)
def test_is_interpolate_times_factor(shape, size, align_corners):
    u, weight = make(shape), torch.randn(*shape[:2], *size, dtype=torch.float64)
    expected, expected_grad = gradients(lambda t: stock(t, size, align_corners), (u,), weight)
    for function in (
        lambda t: fastreg.resize_displacement(t, size, align_corners=align_corners),
        lambda t: resize_displacement_ref(t, size, align_corners, None),
    ):
        out, grad = gradients(function, (u,), weight)
        assert_close(out, expected, 1e-12)
        assert_close(grad[0], expected_grad[0], 1e-12, floor=0.1)


def test_resized_linear_map_is_the_same_map():
    """u(p) = B p about the first corner, resized, is B in the voxels of the new grid."""
    matrix = torch.randn(3, 3, dtype=torch.float64)

    def field(shape, b):
        p = torch.stack(torch.meshgrid(*[torch.arange(s, dtype=torch.float64) for s in shape], indexing="ij"))
        return torch.einsum("ij,jzyx->izyx", b, p)[None]

    factor = torch.tensor([(7 - 1) / (4 - 1), (3 - 1) / (5 - 1), (11 - 1) / (6 - 1)], dtype=torch.float64)
    expected = field((7, 3, 11), factor[:, None] * matrix / factor)
    assert_close(
        fastreg.resize_displacement(field((4, 5, 6), matrix), (7, 3, 11)), expected, 1e-12, floor=0.1
    )


@pytest.mark.parametrize("align_corners", [True, False])
def test_scale(align_corners):
    u = make((1, 3, 4, 5, 6))
    plain = fastreg.resize_displacement(u, (8, 5, 3), align_corners=align_corners, scale=1)
    assert_close(plain, stock(u, (8, 5, 3), align_corners, 1), 1e-12)
    for scale in (2, (2.0, -0.5, 0.0)):
        factor = torch.tensor(scale, dtype=torch.float64).expand(3).view(3, 1, 1, 1)
        check_against_reference(
            lambda t, s=scale: fastreg.resize_displacement(
                t, (8, 5, 3), align_corners=align_corners, scale=s
            ),
            lambda t, f=factor: stock(t, (8, 5, 3), align_corners, f),
            (u,),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_size_is_the_identity(dtype):
    u = torch.randn(2, 3, 4, 5, 67).to(dtype)
    u[0, 0, 1, 2, 3], u[1, 2, 0, 0, 0] = float("nan"), float("inf")
    for align_corners in (True, False):
        out = fastreg.resize_displacement(u, u.shape[2:], align_corners=align_corners)
        assert torch.equal(out.nan_to_num(7), u.nan_to_num(7))
        assert out.data_ptr() != u.data_ptr()


def test_nan_reaches_its_neighbours_only():
    u = torch.rand(1, 2, 4, 5)
    u[0, 0, 1, 2] = float("nan")
    out = fastreg.resize_displacement(u, (7, 9))  # positions at every half voxel
    expected = [[0, 0, y, x] for y in (1, 2, 3) for x in (3, 4, 5)]
    assert out.isnan().nonzero().tolist() == expected


def test_large_halves_do_not_overflow():
    u = torch.full((1, 2, 8, 8), 60000.0, dtype=torch.float16)
    assert_close(fastreg.resize_displacement(u, (4, 4), scale=1), torch.full((1, 2, 4, 4), 60000.0))


def test_one_voxel_axes():
    u = torch.rand(1, 3, 1, 4, 6, dtype=torch.float64)
    up = fastreg.resize_displacement(u, (5, 4, 1))
    # Constant along z, and that component unchanged; one voxel left along x: no room to move.
    assert torch.equal(up[:, 0], u[:, 0, ..., :1].expand(1, 5, 4, 1))
    assert up[:, 2].eq(0).all()
    faces = fastreg.resize_displacement(u, (5, 4, 6), align_corners=False)
    assert_close(faces[:, 0], 5 * u[:, 0].expand(1, 5, 4, 6))


@pytest.mark.parametrize("shape", [(1, 3, 2, 1, 3), (1, 2, 3, 2)])
@pytest.mark.parametrize("align_corners", [True, False])
def test_gradcheck(shape, align_corners):
    u, size = make(shape), [s + 1 for s in shape[2:]]

    def resize(t):
        return fastreg.resize_displacement(t, size, align_corners=align_corners)

    assert torch.autograd.gradcheck(resize, u)
    assert torch.autograd.gradgradcheck(lambda t: resize(t).square(), u, fast_mode=True)


@pytest.mark.parametrize("shape", [(2, 3, 5, 6, 7), (2, 2, 8, 9)])
def test_layouts(shape):
    u, size = torch.randn(shape), [11, 4, 9][: len(shape) - 2]
    grad = torch.randn(*shape[:2], *size)
    plain = u.clone().requires_grad_()
    expected = fastreg.resize_displacement(plain, size)
    (expected_grad,) = torch.autograd.grad(expected, plain, grad)
    for name in layouts(u):
        t = layouts(u)[name].requires_grad_()
        out = fastreg.resize_displacement(t, size)
        assert torch.equal(out, expected), name
        assert torch.equal(torch.autograd.grad(out, t, layouts(grad)[name])[0], expected_grad), name
    # A gradient of stride 0.
    ours = torch.autograd.grad(fastreg.resize_displacement(plain, size).sum(), plain)[0]
    dense = torch.autograd.grad(fastreg.resize_displacement(plain, size), plain, torch.ones_like(grad))[0]
    assert torch.equal(ours, dense)


def test_deterministic():
    u, grad = torch.randn(1, 3, 9, 10, 37, requires_grad=True), torch.randn(1, 3, 17, 19, 70)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        out = fastreg.resize_displacement(u, (17, 19, 70))
        results.append((out, *torch.autograd.grad(out, u, grad)))
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty_batch():
    u = torch.zeros(0, 3, 4, 5, 6, requires_grad=True)
    out = fastreg.resize_displacement(u, (2, 3, 4))
    assert out.shape == (0, 3, 2, 3, 4)
    assert torch.autograd.grad(out.sum(), u)[0].shape == u.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    u = make((2, 3, 4, 5, 6), dtype)
    torch.library.opcheck(torch.ops.fastreg.resize_displacement.default, (u, [3, 7, 8], True, None))
    torch.library.opcheck(
        torch.ops.fastreg.resize_displacement_bwd.default, (u, [3, 7, 8], False, [1.0, 2.0, 3.0])
    )


def test_compile():
    def step(u):
        return fastreg.resize_displacement(2 * u, [2 * s for s in u.shape[2:]]).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for shape in [(1, 3, 4, 5, 6), (1, 3, 7, 6, 5)]:
        u = make(shape, torch.float32)
        assert_close(torch.autograd.grad(compiled(u), u)[0], torch.autograd.grad(step(u), u)[0], floor=0.1)


def test_vmap():
    u = torch.rand(4, 2, 2, 5, 6, requires_grad=True)

    def resize(t):
        return fastreg.resize_displacement(t, (8, 9))

    out = torch.vmap(resize, in_dims=2)(u.movedim(0, 2))
    assert torch.equal(out, torch.stack([resize(t) for t in u]))
    basis = torch.randn(5, *out.shape[1:])
    single = resize(u[0])
    batched = torch.autograd.grad(single, u, basis, is_grads_batched=True, retain_graph=True)[0]
    assert torch.equal(
        batched, torch.stack([torch.autograd.grad(single, u, b, retain_graph=True)[0] for b in basis])
    )


def test_transforms_without_a_derivative_raise():
    with pytest.raises(RuntimeError, match=r"fastreg::resize_displacement: torch\.func\.grad"):
        torch.func.grad(lambda u: fastreg.resize_displacement(u, (3, 4)).sum())(torch.rand(1, 2, 4, 5))


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (
            TypeError,
            "u must be fp64, fp32, fp16 or bf16, got torch.int64",
            {"u": torch.zeros(1, 3, 3, 4, 5).long()},
        ),
        (
            ValueError,
            r"u must have shape \(N, 3, D, H, W\), got \(1, 2, 3, 4, 5\)",
            {"u": torch.zeros(1, 2, 3, 4, 5)},
        ),
        (ValueError, "u must not have an empty axis", {"u": torch.zeros(1, 3, 3, 0, 5)}),
        (ValueError, r"size must be 3 integers >= 1, got \(3, 4\)", {"size": (3, 4)}),
        (ValueError, r"size must be 3 integers >= 1, got \(3, 0, 4\)", {"size": (3, 0, 4)}),
        (TypeError, "size must be 3 integers, got", {"size": (3, 4, 4.5)}),
        (TypeError, "size must be 3 integers, got 4", {"size": 4}),
        (ValueError, "scale must be 'exact', got 'near'", {"scale": "near"}),
        (ValueError, "scale must be a", {"scale": (1.0, 2.0)}),
        (ValueError, "scale must be a", {"scale": float("nan")}),
    ],
)
def test_errors(error, match, change):
    arguments = {"u": torch.zeros(1, 3, 3, 4, 5), "size": (3, 4, 5)} | change
    with pytest.raises(error, match=rf"fastreg::resize_displacement: {match}"):
        fastreg.resize_displacement(**arguments)
