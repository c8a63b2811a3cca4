import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, assert_close, check_against_reference, gradients
from contract import Case, Contract

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_round_to_even(dtype):
    """What lies half-way between two of them, in vectors and at the end of a row alike."""
    u = (1 + torch.finfo(dtype).eps * torch.randint(0, 16, (1, 2, 5, 37))).to(dtype)
    out, wide = (fastreg.resize_displacement(t, (5, 73), scale=1.0) for t in (u, u.float()))
    assert torch.equal(out, wide.to(dtype))


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


def opcheck(dtype):
    u = make((2, 3, 4, 5, 6), dtype)
    yield torch.ops.fastreg.resize_displacement.default, (u, [3, 7, 8], True, None)
    yield torch.ops.fastreg.resize_displacement_bwd.default, (u, [3, 7, 8], False, [1.0, 2.0, 3.0])


def case(**options):
    """To a larger size along the first axis, to smaller ones along the others."""

    def call(u):
        return fastreg.resize_displacement(u, (2 * u.shape[2] + 1, *(s - 1 for s in u.shape[3:])), **options)

    return Case(call, lambda n, spatial, dtype: (make((n, len(spatial), *spatial), dtype),))


VALID = {"u": torch.zeros(1, 3, 3, 4, 5), "size": (3, 4, 5)}
ERRORS = [
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
]  # fmt: skip

CONTRACT = Contract(
    cases={"corners": case(), "faces": case(align_corners=False), "scale": case(scale=2)},
    valid=VALID,
    errors=ERRORS,
    opcheck=opcheck,
    gradcheck=True,
    double_backward=True,
    layouts=True,
    vmap=True,
    compiled=True,
    empty_batch=True,
    empty_axes="refused: nothing to interpolate",
    empty_channels="a displacement has a component an axis",
    repeats=True,
)
