from functools import partial

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from common import COMPILED, DTYPES, TOLERANCE, assert_close, check_against_reference
from contract import Case, Contract
from torch.utils._python_dispatch import TorchDispatchMode

import fastreg
from fastreg.ops.resize_displacement import resize_displacement_ref
from fastreg.ops.warp import PADDINGS, warp_ref

# The image and the grid: half of it, rows longer than a block, a ratio that is no integer and one axis finer,
# axes and grids of one voxel, the image's own grid, many voxels between two of the grid.
SHAPES = [
    pytest.param((2, 3, 7, 6, 9), (4, 3, 5), id="half"),
    pytest.param((1, 1, 4, 5, 150), (3, 2, 61), id="long"),
    pytest.param((2, 2, 19, 67), (8, 70), id="2d"),
    pytest.param((1, 2, 1, 5, 3), (2, 1, 1), id="one-voxel-axes"),
    pytest.param((1, 1, 3, 4, 5), (3, 4, 5), id="same"),
    pytest.param((1, 1, 40, 21, 33), (2, 2, 2), id="sparse"),
]


def make(shape, grid, dtype=torch.float64, amplitude=2.0):
    image = torch.rand(shape).to(dtype).requires_grad_()
    # A few voxels of the image.
    ratio = torch.tensor([max(g - 1, 1) / max(s - 1, 1) for g, s in zip(grid, shape[2:], strict=True)])
    u = amplitude * torch.randn(shape[0], len(grid), *grid) * ratio.view(-1, *[1] * len(grid))
    return image, u.to(dtype).requires_grad_()


def make_affine(n, nd, dtype=torch.float64):
    return (torch.eye(nd, nd + 1) + 0.1 * torch.randn(n, nd, nd + 1)).to(dtype).requires_grad_()


def two_ops(image, u, affine=None, padding="zeros"):
    """In plain PyTorch: u is not rounded to halves between the two."""
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    return warp_ref(image, resize_displacement_ref(u, image.shape[2:], True, None), affine, "linear", padding)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "grid"), SHAPES)
def test_against_reference(shape, grid, dtype, padding):
    image, u = make(shape, grid, dtype)
    u = (u.detach().float() if dtype in (torch.float16, torch.bfloat16) else u.detach()).requires_grad_()
    ours, theirs = (partial(f, padding=padding) for f in (fastreg.warp_coarse, two_ops))
    # fp32: where the image is read is rounded twice, in units of an axis.
    tolerance = {torch.float32: 2e-4}.get(dtype)
    check_against_reference(ours, theirs, (image.detach(), u), tolerance)
    check_against_reference(ours, theirs, (image, u), tolerance)
    affine = make_affine(shape[0], len(grid), torch.float64 if dtype == torch.float64 else torch.float32)
    ours, theirs = (
        lambda i, d, a, f=f: f(i, d, affine=a, padding=padding) for f in (fastreg.warp_coarse, two_ops)
    )
    check_against_reference(ours, theirs, (image.detach(), u, affine.detach()), tolerance)
    check_against_reference(ours, theirs, (image, u.detach(), affine), tolerance)


@pytest.mark.parametrize(("shape", "grid"), [((2, 2, 7, 9, 8), (4, 3, 5)), ((1, 1, 9, 12), (5, 4))])
def test_is_interpolation_and_scipy(shape, grid):
    image, u = (t.detach() for t in make(shape, grid))
    ratio = [(s - 1) / (g - 1) for s, g in zip(shape[2:], grid, strict=True)]
    fine = F.interpolate(u, shape[2:], mode={3: "trilinear", 2: "bilinear"}[len(grid)], align_corners=True)
    fine = fine * torch.tensor(ratio, dtype=u.dtype).view(-1, *[1] * len(grid))
    steps = np.stack(np.meshgrid(*[np.arange(s) for s in shape[2:]], indexing="ij"))
    for padding, mode in (("zeros", "grid-constant"), ("border", "nearest"), ("reflection", "mirror")):
        ours = fastreg.warp_coarse(image, u, padding=padding)
        for n in range(shape[0]):
            for c in range(shape[1]):
                moved = scipy.ndimage.map_coordinates(
                    image[n, c].numpy(), steps + fine[n].numpy(), order=1, mode=mode
                )
                assert_close(ours[n, c], torch.from_numpy(moved), 1e-9)


@pytest.mark.parametrize("image_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("u_dtype", DTYPES, ids=str)
def test_mixed_dtypes(image_dtype, u_dtype):
    image, u = make((1, 2, 4, 7, 6), (3, 4, 3))
    image, u = image.detach().to(image_dtype), u.detach().to(u_dtype).requires_grad_()
    tolerance = max(2e-4, TOLERANCE[image_dtype], TOLERANCE[u_dtype])
    if torch.float64 in (image_dtype, u_dtype):
        tolerance = None
    check_against_reference(fastreg.warp_coarse, two_ops, (image, u), tolerance)


def test_zero_is_the_identity():
    image = torch.rand(1, 2, 5, 6, 70)
    assert torch.equal(fastreg.warp_coarse(image, torch.zeros(1, 3, 3, 2, 9)), image)


def test_nan_of_a_sparse_grid():
    """Whose rows are fetched one by one: 70 voxels lie between two of the grid."""
    u = torch.zeros(1, 2, 2, 3)
    u[..., 2] = float("nan")
    out = fastreg.warp_coarse(torch.rand(1, 1, 2, 141), u)
    assert out.isnan().all((0, 1, 2)).nonzero().flatten().tolist() == list(range(71, 141))
    u, weight = torch.zeros(1, 2, 2, 3, requires_grad=True), torch.ones(1, 1, 2, 141)
    weight[..., 100] = float("inf")  # of the last two; the first is padded with shares of 0
    (grad,) = torch.autograd.grad(fastreg.warp_coarse(torch.rand(1, 1, 2, 141), u), u, weight)
    assert grad[0, 1].isfinite().tolist() == [[True, False, False]] * 2


def test_nan_reaches_its_neighbours_only():
    image, u = make((1, 1, 7, 9), (4, 5), torch.float32, 0.1)
    with torch.no_grad():
        u[0, 0, 1, 2] = float("nan")  # positions at every half voxel of the grid
    out = fastreg.warp_coarse(image.detach(), u, padding="border")
    there = [[0, 0, y, x] for y in (1, 2, 3) for x in (3, 4, 5)]
    assert out.isnan().nonzero().tolist() == there
    (grad,) = torch.autograd.grad(out.nan_to_num().sum(), u)
    assert grad.isfinite().all()
    # What is not finite in the gradient that comes in goes to the voxels that the pixel reads.
    u = u.detach().nan_to_num().requires_grad_()
    weight = torch.ones(1, 1, 7, 9)
    weight[0, 0, 2, 4] = float("inf")
    (grad,) = torch.autograd.grad(fastreg.warp_coarse(image.detach(), u, padding="border"), u, weight)
    assert (~grad[0, 1].isfinite()).nonzero().tolist() == [[1, 2]]


@pytest.mark.skipif(not COMPILED, reason="of the CPU kernel")
def test_no_displacement_of_the_images_size():
    class Ops(TorchDispatchMode):
        called = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.called = (*self.called, function.__name__)
            return function(*args, **(kwargs or {}))

    image, u = make((1, 1, 8, 9, 10), (4, 5, 5), torch.float32)
    with Ops() as mode:
        fastreg.warp_coarse(image.detach(), u).sum().backward()
    assert {"warp_coarse.default", "warp_coarse_bwd.default"} <= set(mode.called)
    assert not [name for name in mode.called if "resize" in name or name.startswith("warp.")]


def opcheck(dtype):
    op, bwd = torch.ops.fastreg.warp_coarse.default, torch.ops.fastreg.warp_coarse_bwd.default
    image, u = make((2, 2, 4, 5, 6), (2, 3, 4), dtype)
    yield op, (image, u, None, "zeros")
    yield op, (image.detach(), u, None, "border")
    image, u = make((2, 2, 4, 5), (2, 3), dtype)
    affine = make_affine(2, 2, dtype)
    yield op, (image, u, affine, "zeros")
    yield bwd, (torch.rand_like(image), image.detach(), u.detach(), affine.detach(), "zeros")
    # The double backward, which takes long to trace, once.
    yield bwd, (torch.rand_like(image), image.detach(), u, None, "border")


def made(n, spatial, dtype):
    return make((n, 2, *spatial), [s // 2 + 1 for s in spatial], dtype)


def fixed(n, spatial, dtype):
    image, u = made(n, spatial, dtype)
    return image.detach(), u


CASES = {padding: Case(partial(fastreg.warp_coarse, padding=padding), fixed) for padding in PADDINGS} | {
    "both": Case(fastreg.warp_coarse, made),
    "affine": Case(
        lambda image, u, affine: fastreg.warp_coarse(image, u, affine=affine, padding="border"),
        lambda n, spatial, dtype: (*made(n, spatial, dtype), make_affine(n, len(spatial), dtype)),
    ),
    "fixed-affine": Case(
        lambda image, u, affine: fastreg.warp_coarse(image, u, affine=affine, padding="border"),
        lambda n, spatial, dtype: (
            *fixed(n, spatial, dtype),
            make_affine(n, len(spatial), dtype).detach(),
        ),
    ),
}
VALID = {"image": torch.zeros(2, 1, 5, 6, 7), "displacement": torch.zeros(2, 3, 3, 4, 5)}
ERRORS = [
    (TypeError, "image must be a tensor, got list", {"image": [1]}),
    (TypeError, "image must be fp64, fp32, fp16 or bf16, got torch.int64", {"image": torch.zeros(2, 1, 3, 4, 5).long()}),
    (TypeError, "displacement must be a tensor, got NoneType", {"displacement": None}),
    (ValueError, r"image must have shape \(N, C, D, H, W\) or \(N, C, H, W\), got \(3, 4, 5\)", {"image": torch.zeros(3, 4, 5)}),
    (ValueError, r"displacement must have shape \(N, 3, D, H, W\), got \(2, 2, 3, 4, 5\)", {"displacement": torch.zeros(2, 2, 3, 4, 5)}),
    (ValueError, r"displacement must have shape \(N, 3, D, H, W\), got \(2, 2, 4, 5\)", {"displacement": torch.zeros(2, 2, 4, 5)}),
    (ValueError, "displacement must not have an empty axis", {"displacement": torch.zeros(2, 3, 3, 0, 5)}),
    (ValueError, "with N = 2, got", {"displacement": torch.zeros(1, 3, 3, 4, 5)}),
    (TypeError, "affine must be a tensor, got list", {"affine": [1]}),
    (ValueError, r"affine must have shape \(N, 3, 4\), got \(2, 3, 3\)", {"affine": torch.zeros(2, 3, 3)}),
    (ValueError, "padding must be 'zeros' or 'border' or 'reflection', got 'wrap'", {"padding": "wrap"}),
]  # fmt: skip

CONTRACT = Contract(
    cases=CASES,
    valid=VALID,
    errors=ERRORS,
    opcheck=opcheck,
    gradcheck=True,
    double_backward=True,
    layouts=True,
    vmap=True,
    compiled=True,
    empty_batch=True,
    empty_axes="refused for the grid, which has no voxel to interpolate",
    empty_channels={
        "": Case(
            fastreg.warp_coarse,
            lambda n, spatial, dtype: (
                make((n, 0, *spatial), spatial, dtype)[0],
                make((n, 2, *spatial), [s // 2 + 1 for s in spatial], dtype)[1],
            ),
        )
    },
    repeats=True,
    large=((33, 20, 40), (133, 70)),
)
