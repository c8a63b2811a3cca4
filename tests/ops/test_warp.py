from functools import partial

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from common import BACKEND, COMPILED, DTYPES, assert_close, check_against_reference
from contract import Case, Contract

import fastreg
from fastreg.ops.warp import MODES, PADDINGS, warp_ref

SHAPES = [
    pytest.param((2, 3, 5, 6, 7), id="n2c3d5h6w7"),
    pytest.param((1, 1, 4, 3, 70), id="n1c1d4h3w70"),
    pytest.param((2, 2, 9, 67), id="n2c2h9w67"),
    pytest.param((1, 2, 1, 1, 5), id="one-voxel-axes"),
]


def make(shape, dtype=torch.float64, amplitude=2.0):
    image = torch.rand(shape).to(dtype).requires_grad_()
    u = amplitude * torch.randn(shape[0], len(shape) - 2, *shape[2:])
    # Away from integers, where the interpolant has a kink.
    u = u.floor() + 0.1 + 0.8 * (u - u.floor())
    return image, u.to(dtype).requires_grad_()


def reference(mode, padding):
    return lambda image, u: warp_ref(image, u, None, mode, padding)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_reference(shape, dtype, padding):
    image, u = make(shape, dtype)
    u = (u.detach().float() if dtype in (torch.float16, torch.bfloat16) else u.detach()).requires_grad_()
    check_against_reference(
        lambda i, d: fastreg.warp(i, d, padding=padding), reference("linear", padding), (image, u)
    )


@pytest.mark.parametrize("shape", [(1, 19, 3, 5, 33), (2, 5, 3, 40)])
def test_many_channels(shape):
    check_against_reference(fastreg.warp, reference("linear", "zeros"), make(shape, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 6, 37), (2, 2, 9, 67)])
def test_reproducible_image_gradient(shape, dtype):
    torch.use_deterministic_algorithms(True, warn_only=True)
    image, u = (t.detach() for t in make(shape, amplitude=4.0))
    image, u = image.to(dtype).requires_grad_(), u.to(dtype if dtype == torch.float64 else torch.float32)
    # Samples whose gradients differ in scale, and within one.
    grad = torch.randn(shape, dtype=torch.float64)
    grad[0] *= 0.1
    grad[1, :, 0] *= 30
    grad = grad.to(dtype)
    runs = [
        torch.autograd.grad(fastreg.warp(image, u, padding="border"), image, grad)[0].detach()
        for _ in range(3)
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    exact = image.detach().double().requires_grad_()
    truth = torch.autograd.grad(warp_ref(exact, u.double(), None, "linear", "border"), exact, grad.double())[
        0
    ]
    for ours, theirs in zip(runs[0], truth, strict=True):
        assert_close(ours, theirs, floor=0.1 if dtype == torch.float32 else 1e-3)


@pytest.mark.skipif(BACKEND != "cpu" or not COMPILED, reason="of the CPU's one pass for both gradients")
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("shape", "size"),
    [((2, 3, 7, 5, 33), (9, 6, 70)), ((3, 1, 6, 4, 9), (2, 3, 5)), ((2, 2, 9, 31), (12, 67))],
)
def test_gradients_together_are_those_alone(shape, size, padding):
    image, u = torch.rand(shape), 3 * torch.randn(shape[0], len(size), *size)
    u[0, 0].flatten()[:2] = torch.tensor([float("nan"), 1e30])
    grad = torch.randn(*shape[:2], *size)
    before = torch.get_num_threads()

    def gradients(*wanted):
        return torch.ops.fastreg.warp_bwd(grad, image, u, None, "linear", padding, *wanted, False)[:2]

    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            both = gradients(True, True)
            assert torch.equal(both[0], gradients(True, False)[0])
            assert torch.equal(both[1], gradients(False, True)[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(
    BACKEND == "cpu" and not COMPILED, reason="the reference multiplies infinite gradients by weights of 0"
)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 4, 5, 34), (1, 2, 5, 34)])
def test_gradients_that_are_not_finite_reach_what_they_touch(shape, deterministic):
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    image, grad = torch.rand(shape, requires_grad=True), torch.rand(shape)
    u = torch.zeros(1, len(shape) - 2, *shape[2:])
    u[:, -1, ..., 31] = 0.5
    exact = image.detach().double().requires_grad_()
    expected = torch.autograd.grad(
        warp_ref(exact, u.double(), None, "linear", "zeros"), exact, grad.double()
    )[0]
    grad[0, 0, ..., 3, 7], grad[0, 1, ..., 1, 31] = float("inf"), float("nan")
    touched = torch.zeros(shape, dtype=torch.bool)
    touched[0, 0, ..., 3, 7] = touched[0, 1, ..., 1, 31:33] = True
    ours = torch.autograd.grad(fastreg.warp(image, u), image, grad)[0]
    assert torch.equal(ours.isfinite(), ~touched)
    assert_close(ours.masked_fill(touched, 0), expected.masked_fill(touched, 0))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nearest(shape, padding):
    image, u = make(shape)
    check_against_reference(lambda i, d: fastreg.warp(i, d, mode="nearest", padding=padding) + 0 * d.sum(),
                            lambda i, d: warp_ref(i, d, None, "nearest", padding) + 0 * d.sum(), (image, u))  # fmt: skip
    assert (
        torch.autograd.grad(fastreg.warp(image, u, mode="nearest", padding=padding).sum(), u)[0].abs().max()
        == 0
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 6, 7), (2, 2, 9, 12)])
def test_reference_is_grid_sample(shape, padding, mode):
    image, u = make(shape)
    nd, size = u.shape[1], torch.tensor(shape[2:])
    steps = torch.stack(torch.meshgrid(*[torch.arange(s) for s in shape[2:]], indexing="ij"))
    grid = (2 * (steps + u).movedim(1, -1) / (size - 1) - 1).flip(-1)
    stock = F.grid_sample(image, grid, {"linear": "bilinear"}.get(mode, mode), padding, align_corners=True)
    ours = warp_ref(image, u, None, mode, padding)
    assert_close(ours, stock, 1e-9)
    weight = torch.randn_like(stock)
    expected = torch.autograd.grad((stock * weight).sum(), (image, u))
    assert_close(torch.autograd.grad((ours * weight).sum(), image, retain_graph=True)[0], expected[0], 1e-9)
    if mode == "linear":
        inside = torch.ones_like(expected[1], dtype=torch.bool)
        if (
            padding == "border"
        ):  # grid_sample's gradient stops at the last voxel; ours is one-sided there, too
            position = steps + u
            inside = (position > 0) & (position < (size - 1).view(1, -1, *[1] * nd))
        ours_u = torch.autograd.grad((ours * weight).sum(), u)[0]
        assert_close(ours_u * inside, expected[1] * inside, 1e-9)


def test_reference_is_scipy():
    image, u = make((1, 1, 6, 7, 8))
    steps = np.stack(np.meshgrid(*[np.arange(s) for s in image.shape[2:]], indexing="ij"))
    for padding, mode in (("zeros", "grid-constant"), ("border", "nearest"), ("reflection", "mirror")):
        expected = scipy.ndimage.map_coordinates(
            image[0, 0].detach().cpu().numpy(), steps + u[0].detach().cpu().numpy(), order=1, mode=mode
        )
        assert_close(warp_ref(image, u, None, "linear", padding)[0, 0], torch.from_numpy(expected), 1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_displacement_is_the_identity(dtype):
    rows = 66 if BACKEND == "cpu" else 6
    image = torch.randn(2, 3, 5, rows, 67).to(dtype)
    image[0, 0, 2, 3, 4] = float("nan")
    image[0, 1, 2, 3, 4] = float("inf")
    for u_dtype in {dtype, torch.float32}:
        u = torch.zeros(2, 3, 5, rows, 67, dtype=u_dtype)
        for padding in PADDINGS:
            assert torch.equal(fastreg.warp(image, u, padding=padding).nan_to_num(7), image.nan_to_num(7))


def test_gradient_at_zero_displacement_is_one_sided():
    image = torch.rand(1, 1, 5, 6, 7, dtype=torch.float64)
    u = torch.zeros(1, 3, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    grad = torch.autograd.grad(fastreg.warp(image, u, padding="border").sum(), u)[0]
    for axis in range(3):
        last = image.select(axis + 2, -1).unsqueeze(axis + 2)
        assert_close(grad[:, axis], torch.diff(image, dim=axis + 2, append=last)[:, 0], 1e-12)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("shape", [(1, 2, 5, 6, 7), (1, 2, 6, 37), (1, 1, 1, 5, 4)])
def test_nothing_changes_beyond_the_border(shape, offset):
    """Along an axis that has been left the slope is 0, to the last bit; along the others it is that of the border."""
    nd, size = len(shape) - 2, shape[2:]
    image = (torch.rand(shape) + offset).requires_grad_()
    for axis in range(nd):
        _, u = make(shape, torch.float32, 0.5)
        far = u.detach().clone()
        far[:, axis] = torch.where(torch.rand(1, *size) < 0.5, -1.0, 1.0) * (size[axis] + 0.3)
        far.requires_grad_()
        weight = torch.randn(shape)
        (grad,) = torch.autograd.grad(fastreg.warp(image, far, padding="border"), far, weight)
        assert grad[:, axis].eq(0).all()
        truth = far.detach().double().requires_grad_()
        out = reference("linear", "border")(image.detach().double(), truth)
        (expected,) = torch.autograd.grad(out, truth, weight.double())
        # The reference adds up products, and Triton subtracts interpolated values: their offset has to cancel.
        exact = BACKEND == "emulation" or (BACKEND == "cpu" and COMPILED) or not offset
        assert_close(grad, expected, 1e-5 if exact else 1e-2, floor=0.1)
        matrix = torch.eye(nd, nd + 1)[None].requires_grad_()
        moved = fastreg.warp(image, far.detach(), affine=matrix, padding="border")
        (to_matrix,) = torch.autograd.grad(moved, matrix, weight)
        assert to_matrix[:, axis].eq(0).all()
        (to_v,) = torch.autograd.grad(
            fastreg.compose(far.detach(), far, padding="border"), far, weight[:, :1].expand_as(far)
        )
        assert torch.equal(to_v[:, axis], weight[:, 0])


def test_a_single_voxel_has_no_slope():
    image = (torch.rand(1, 1, 1, 1, 1) + 1000).requires_grad_()
    for padding in ("border", "reflection"):
        u = torch.full((1, 3, 1, 1, 1), 0.3, requires_grad=True)
        assert torch.autograd.grad(fastreg.warp(image, u, padding=padding), u)[0].eq(0).all()


@pytest.mark.parametrize("padding", PADDINGS)
def test_non_finite_and_far_displacements(padding):
    image, u = make((1, 2, 5, 6, 70))
    with torch.no_grad():
        u[0, 1, 2, 3, 4] = float("nan")
        u[0, 0, 1, 1, 1] = float("inf")
        u[0, 2, 3, 2, 66] = -1e30
        u[0, 2, 4, 2, 6] = 1e7
    check_against_reference(lambda i, d: fastreg.warp(i, d, padding=padding).nan_to_num(),
                            lambda i, d: warp_ref(i, d, None, "linear", padding).nan_to_num(), (image, u))  # fmt: skip
    assert fastreg.warp(image, u, padding=padding).isnan().nonzero().tolist() == [
        [0, 0, 2, 3, 4],
        [0, 1, 2, 3, 4],
    ]


def make_affine(shape, dtype=torch.float64, amount=0.2):
    nd = len(shape) - 2
    return (torch.eye(nd, nd + 1) + amount * torch.randn(shape[0], nd, nd + 1)).to(dtype).requires_grad_()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_affine_against_reference(shape, dtype, padding):
    image, u = make(shape, dtype)
    u = (u.detach().float() if dtype in (torch.float16, torch.bfloat16) else u.detach()).requires_grad_()
    # Halves of a matrix are exact in fp32 and fp64.
    affine = make_affine(shape, torch.float16).detach().to(u.dtype).requires_grad_()
    check_against_reference(
        lambda i, d, a: fastreg.warp(i, d, affine=a, padding=padding),
        lambda i, d, a: warp_ref(i, d, a, "linear", padding),
        (image, u, affine),
    )
    check_against_reference(
        lambda i, a: fastreg.warp(i, None, affine=a, padding=padding),
        lambda i, a: warp_ref(i, None, a, "linear", padding),
        (image, affine),
    )


@pytest.mark.parametrize("shape", [(2, 3, 5, 6, 7), (2, 2, 9, 67)])
def test_affine_is_its_displacement(shape):
    image, u = (t.detach() for t in make(shape))
    affine = make_affine(shape).detach()
    moved = fastreg.affine_displacement(affine, shape[2:])
    assert_close(fastreg.warp(image, u, affine=affine), fastreg.warp(image, u + moved), 1e-9)
    assert_close(fastreg.warp(image, None, affine=affine), fastreg.warp(image, moved), 1e-9)
    # The raw op takes an image of another grid.
    for mode in MODES:
        ours = torch.ops.fastreg.warp(image[..., 1:], u, affine, mode, "border")
        assert_close(ours, torch.ops.fastreg.warp(image[..., 1:], u + moved, None, mode, "border"), 1e-9)


def test_affine_is_affine_grid():
    image, affine = make((2, 3, 5, 6, 7))[0].detach(), make_affine((2, 3, 5, 6, 7)).detach()
    # From [-1, 1] coordinates (x, y, z) to voxels (z, y, x) and back.
    half = torch.tensor([(n - 1) / 2 for n in (5, 6, 7)], dtype=torch.float64)
    to_voxels = torch.eye(4, dtype=torch.float64)
    to_voxels[:3, :3], to_voxels[:3, 3] = torch.diag(half).flip(1), half
    bottom = torch.tensor([[[0.0, 0, 0, 1]]], dtype=torch.float64).expand(2, 1, 4)
    theta = (torch.linalg.inv(to_voxels) @ torch.cat([affine, bottom], 1) @ to_voxels)[:, :3]
    grid = F.affine_grid(theta, image.shape, align_corners=True)
    expected = F.grid_sample(image, grid, align_corners=True)
    assert_close(fastreg.warp(image, None, affine=affine), expected, 1e-9)


def test_affine_accuracy_does_not_depend_on_the_size():
    n = 3000
    image = torch.rand(1, 1, 4, n)
    affine = torch.eye(2, 3)[None].clone()
    affine[0, 1, 2] = 1 / 512
    out = fastreg.warp(image, None, affine=affine, padding="border")
    expected = image[..., :-1] + image.diff(dim=-1) / 512
    assert_close(out[:, :, :-1, :-1], expected[:, :, :-1].double(), 1e-6)
    affine = affine + torch.tensor([[0, 0, 0], [0, 2.0**-22, 0]])
    assert_close(
        fastreg.warp(image, None, affine=affine), warp_ref(image.double(), None, affine, "linear", "zeros")
    )


def test_identity_matrix_is_the_identity():
    image = torch.randn(2, 2, 4, 5, 66)
    image[0, 0, 2, 3, 4] = float("nan")
    out = fastreg.warp(image, None, affine=torch.eye(3, 4).expand(2, 3, 4))
    assert torch.equal(out.nan_to_num(7), image.nan_to_num(7))


def test_singular_affine():
    image, affine = torch.rand(1, 2, 4, 5, 6).double().requires_grad_(), torch.zeros(1, 3, 4).double()
    affine[0, :, 3] = torch.tensor([1.0, 2.5, 3.0])
    affine.requires_grad_()
    out = fastreg.warp(image, None, affine=affine)
    expected = (image[0, :, 1, 2, 3] + image[0, :, 1, 3, 3]) / 2
    assert_close(out, expected.view(1, 2, 1, 1, 1).expand_as(image), 1e-12)
    grads = torch.autograd.grad(out.sum(), (image, affine))
    truth = torch.autograd.grad(warp_ref(image, None, affine, "linear", "zeros").sum(), (image, affine))
    for ours, theirs in zip(grads, truth, strict=True):
        assert_close(ours, theirs, 1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_affine_is_a_nan_sample(value):
    image, u = make((2, 2, 4, 5, 6))
    affine = make_affine((2, 2, 4, 5, 6)).detach()
    affine[1, 0, 2] = value
    affine.requires_grad_()
    for function in (fastreg.warp, lambda i, d, affine: warp_ref(i, d, affine, "linear", "zeros")):
        out = function(image, u, affine=affine)
        assert out[1].isnan().all()
        assert out[0].isfinite().all()
        for grad in torch.autograd.grad(out.nan_to_num().sum(), (image, u, affine)):
            assert grad[1].eq(0).all()
            assert grad[0].isfinite().all()


def test_far_affine():
    image, affine = torch.rand(1, 1, 4, 5), 1e30 * torch.eye(2, 3)[None]
    out = fastreg.warp(image, None, affine=affine, padding="border")
    expected = image[:, :, [0, 3, 3, 3]][..., [0, 4, 4, 4, 4]]
    assert torch.equal(out, expected)
    assert torch.equal(fastreg.warp(image, None, affine=affine)[0, 0, 1:], torch.zeros(3, 5))


def test_composition():
    grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 3, 24)] * 3, indexing="ij"))
    image = torch.sin(grid.sum(0))[None, None].double()
    u, v = (0.8 * torch.sin(grid + s)[None].double() for s in (0.3, 1.1))
    twice = fastreg.warp(fastreg.warp(image, u), v)
    once = fastreg.warp(image, v + fastreg.warp(u, v))
    assert (twice - once)[..., 3:-3, 3:-3, 3:-3].abs().max() < 0.02 * image.abs().max()
    assert (twice - image)[..., 3:-3, 3:-3, 3:-3].abs().max() > 0.1


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 3, 9, 40), (1, 3, 19, 40)])
def test_tiles(shape, wide, monkeypatch):
    """Voxels that share corners with their neighbours, across the borders of what kernels take together."""
    if BACKEND == "triton":
        for name, value in (("_TILE", (1, 8, 32)), ("_ENOUGH", 2), ("_WIDE_FROM", 0 if wide else 2**31)):
            monkeypatch.setattr(f"fastreg.kernels.warp.{name}", value)
    image, u = make(shape, torch.float32)
    rough = torch.rand(shape[0], 1, *shape[2:]) < 0.2
    u = torch.where(rough, u.detach(), 0.3 - 0.01 * torch.arange(shape[-1])).requires_grad_()
    padding = "border" if wide else "zeros"
    check_against_reference(
        lambda i, d: fastreg.warp(i, d, padding=padding), reference("linear", padding), (image, u)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_image_gradients_of_any_size(dtype):
    """What sums in fixed point must allow for: all samples in one voxel, large, small and no gradients."""
    image = torch.rand(3, 1, 6, 70).to(dtype).requires_grad_()
    u = torch.full((3, 2, 6, 70), -1e3, dtype=dtype)
    grad = torch.randn(image.shape).to(dtype) * torch.tensor([1e30, 1e-30, 0]).view(3, 1, 1, 1)
    ours = torch.autograd.grad(fastreg.warp(image, u, padding="border"), image, grad)[0].double()
    for n, scale in enumerate((1e30, 1e-30)):
        truth = torch.zeros(6, 70).double()
        truth[0, 0] = grad[n].double().sum() / scale
        assert_close(ours[n, 0] / scale, truth, 1e-4 if dtype == torch.float32 else 1e-9)
    assert ours[2].eq(0).all()


@pytest.mark.parametrize("image_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("u_dtype", DTYPES, ids=str)
def test_mixed_dtypes(image_dtype, u_dtype):
    image, u = make((1, 2, 4, 5, 6))
    image, u = image.detach().to(image_dtype).requires_grad_(), u.detach().to(u_dtype).requires_grad_()
    check_against_reference(fastreg.warp, reference("linear", "zeros"), (image, u))


def opcheck(dtype):
    op, bwd = torch.ops.fastreg.warp.default, torch.ops.fastreg.warp_bwd.default
    image, u = make((2, 2, 4, 5, 6), dtype)
    yield op, (image, u, None, "linear", "zeros")
    yield (
        bwd,
        (torch.rand_like(image), image.detach(), u.detach(), None, "linear", "border", True, True, False),
    )
    image, u = make((2, 2, 4, 5), dtype)
    # The double backward, which takes long to trace, once.
    yield bwd, (torch.rand_like(image), image, u, None, "linear", "border", True, True, False)
    for given in (True, False):
        image, u = make((2, 2, 4, 5), dtype)
        u, affine = u if given else None, make_affine(image.shape, dtype)
        yield op, (image, u, affine, "linear", "zeros")
        tensors = [t if t is None else t.detach() for t in (torch.rand_like(image), image, u, affine)]
        # Alone too: results that were not asked for must not be one tensor.
        for needs in ((True, given, True), (True, False, False), (False, given, False), (False, False, True)):
            yield bwd, (*tensors, "linear", "zeros", *needs)


def made(n, spatial, dtype, amplitude=2.0):
    return make((n, 2, *spatial), dtype, amplitude)


def made_affine(n, spatial, dtype):
    return make_affine((n, 2, *spatial), dtype)


CASES = {padding: Case(partial(fastreg.warp, padding=padding), made) for padding in PADDINGS} | {
    "nearest": Case(partial(fastreg.warp, mode="nearest"), made),
    **{
        f"affine-{padding}": Case(lambda image, u, affine, p=padding: fastreg.warp(image, u, affine=affine, padding=p),
                                  lambda *size: (*made(*size), made_affine(*size)))
        for padding in PADDINGS
    },
    "affine-alone": Case(lambda image, affine: fastreg.warp(image, None, affine=affine, padding="reflection"),
                         lambda *size: (made(*size)[0], made_affine(*size))),
    "affine-of-a-fixed-field": Case(lambda image, u, affine: fastreg.warp(image, u, affine=affine),
                                    lambda *size: (made(*size)[0], made(*size)[1].detach(), made_affine(*size))),
}  # fmt: skip
VALID = {"image": torch.zeros(2, 1, 3, 4, 5), "displacement": torch.zeros(2, 3, 3, 4, 5)}
ERRORS = [
    (TypeError, "image must be a tensor, got list", {"image": [1]}),
    (TypeError, "image must be fp64, fp32, fp16 or bf16, got torch.int64", {"image": torch.zeros(2, 1, 3, 4, 5).long()}),
    (TypeError, "displacement must be fp64", {"displacement": torch.zeros(2, 3, 3, 4, 5, dtype=torch.complex64)}),
    (ValueError, r"image must have shape \(N, C, D, H, W\) or \(N, C, H, W\), got \(3, 4, 5\)", {"image": torch.zeros(3, 4, 5)}),
    (ValueError, r"displacement must have shape \(N, 3, D, H, W\), got \(2, 2, 3, 4, 5\)", {"displacement": torch.zeros(2, 2, 3, 4, 5)}),
    (ValueError, r"with the spatial shape \(3, 4, 5\), got \(2, 3, 3, 4, 6\)", {"displacement": torch.zeros(2, 3, 3, 4, 6)}),
    (ValueError, "with N = 2, got", {"displacement": torch.zeros(1, 3, 3, 4, 5)}),
    (ValueError, "must be on [a-z:0-9]+ as the other tensors, got meta", {"displacement": torch.zeros(2, 3, 3, 4, 5, device="meta")}),
    (ValueError, "displacement must be a dense tensor", {"displacement": torch.zeros(2, 3, 3, 4, 5).to_sparse()}),
    (TypeError, "displacement must be a tensor, got NoneType", {"displacement": None}),
    (TypeError, "affine must be a tensor, got list", {"affine": [1]}),
    (ValueError, r"affine must have shape \(N, 3, 4\), got \(2, 3, 3\)", {"affine": torch.zeros(2, 3, 3)}),
    (ValueError, r"affine must have shape \(N, 3, 4\) with N = 2, got \(1, 3, 4\)", {"affine": torch.zeros(1, 3, 4)}),
    (ValueError, "mode must be 'linear' or 'nearest', got 'cubic'", {"mode": "cubic"}),
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
    empty_axes=True,
    empty_channels={
        "": Case(
            fastreg.warp,
            lambda n, spatial, dtype: (make((n, 0, *spatial), dtype)[0], make((n, 2, *spatial), dtype)[1]),
        )
    },
    repeats={
        "far": Case(fastreg.warp, lambda *size: made(*size, 6.0)),
        "affine": CASES["affine-border"],
        "affine-alone": CASES["affine-alone"],
    },
    large=((33, 20, 40), (33, 70)),
)


LABELS = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
]


@pytest.mark.parametrize("dtype", LABELS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("padding", PADDINGS)
def test_labels(dtype, padding):
    largest = 1 if dtype == torch.bool else min(torch.iinfo(dtype).max, 2**53)
    labels = (torch.rand(2, 2, 5, 6, 7, dtype=torch.float64) * largest).round().long()
    labels[0, 0, 0, 0, 0] = largest
    displacement = 3 * torch.randn(2, 3, 5, 6, 7)
    displacement[0, :, 0, 0, 0] = 0
    matrix = torch.eye(3, 4).expand(2, 3, 4) * 1.1
    for affine in (None, matrix):
        options = {"affine": affine, "mode": "nearest", "padding": padding}
        moved = fastreg.warp(labels.to(dtype), displacement.clone().requires_grad_(), **options)
        assert moved.dtype == dtype
        assert not moved.requires_grad
        # Equal numbers are found in the label image itself.
        assert torch.equal(moved.long(), fastreg.warp(labels.double(), displacement, **options).long())
    displacement[0, 0, 1, 1, 1] = float("nan")
    assert fastreg.warp(labels.to(dtype), displacement, mode="nearest")[0, :, 1, 1, 1].tolist() == [0, 0]
