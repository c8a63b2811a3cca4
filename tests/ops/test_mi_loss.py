import math

import numpy as np
import pytest
import torch
from common import BACKEND, DTYPES, assert_close, check_against_reference
from contract import Case, Contract
from scipy.interpolate import BSpline

import fastreg
from fastreg.ops.mi_loss import CHUNK, KERNELS

# Rows of odd length, several channels, samples of one and of several slabs.
SHAPES = [
    pytest.param((2, 3, 5, 6, 7), id="n2c3d5h6w7"),
    pytest.param((1, 1, 9, 61, 71), id="n1c1d9h61w71"),
    pytest.param((3, 2, 9, 67), id="n3c2h9w67"),
]


def make(shape, dtype=torch.float64):
    """Images that know something of each other, some values out of range."""
    fixed = torch.rand(shape)
    moved = (1 - fixed.square() + 0.2 * torch.randn(shape)).clamp(-0.1, 1.1)
    return fixed.to(dtype).requires_grad_(), moved.to(dtype).requires_grad_()


def make_mask(shape):
    """Weights with zeros among them."""
    mask = torch.rand(shape[0], 1, *shape[2:])
    return mask * (mask > 0.4) + 0.1 * (mask > 0.9)


def windows(x, bins, kernel, counted):
    """(N, values, bins), by the definition, over all bins."""
    if kernel == "gaussian":
        centres = torch.linspace(0, 1, bins, dtype=x.dtype)
        w = torch.exp(-0.5 * ((x.clamp(0, 1)[..., None] - centres) * (bins - 1) / 0.5) ** 2)
        return w / w.sum(-1, keepdim=True)
    held = x.detach()
    low = torch.where(counted, held, torch.inf).amin(1, keepdim=True)
    high = torch.where(counted, held, -torch.inf).amax(1, keepdim=True)
    t = 2 + (torch.where(x < low, low, torch.where(x > high, high, x)) - low) / (high - low) * (bins - 5)
    d = (t[..., None] - torch.arange(bins)).abs()
    return torch.where(d < 1, 2 / 3 - d**2 + d**3 / 2, torch.where(d < 2, (2 - d) ** 3 / 6, 0))


def information(p):
    q = p.sum(2, keepdim=True) * p.sum(1, keepdim=True)
    return (p * torch.log((p + 1e-7) / (q + 1e-7) + 1e-7)).sum((1, 2))


def truth(bins=32, kernel="gaussian", mask=None, reduction="mean"):
    def loss(fixed, moved):
        m = torch.ones_like(fixed) if mask is None else mask.to(fixed).expand_as(fixed)
        f, w, m = (t.flatten(1) for t in (fixed, moved, m))
        a, b = (windows(t, bins, kernel, m > 0) for t in (f, w))
        p = torch.einsum("nv,nva,nvb->nab", m, a, b) / m.sum(1).view(-1, 1, 1)
        loss = -information(p)
        return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()

    return loss


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("kernel", "bins"), [("gaussian", 32), ("bspline", 20), ("gaussian", 5), ("bspline", 7)]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_reference(shape, dtype, masked, kernel, bins):
    mask = make_mask(shape) if masked else None
    # Gradients of a mean would be subnormal halves.
    options = {"bins": bins, "kernel": kernel, "mask": mask}
    check_against_reference(
        lambda f, m: 1e5 * fastreg.mi_loss(f, m, **options),
        lambda f, m: 1e5 * truth(**options)(f, m),
        make(shape, dtype),
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_is_the_definition(kernel):
    """Voxel by voxel, bin by bin."""
    bins, shape = 8, (2, 1, 3, 4, 2)
    fixed, moved = (t.detach().clamp(0, 1) for t in make(shape))
    mask = make_mask(shape).double() + 0.1
    spline = BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)
    expected = []
    for n in range(2):
        f, w, m = (t[n].flatten().numpy() for t in (fixed, moved, mask))
        p = np.zeros((bins, bins))
        for v in range(len(f)):
            weights = []
            for x, image in ((f[v], f), (w[v], w)):
                if kernel == "gaussian":
                    row = [math.exp(-((x - b / 7) ** 2) / (2 * (0.5 / 7) ** 2)) for b in range(bins)]
                else:
                    t = 2 + (x - image.min()) / (image.max() - image.min()) * 3
                    row = [np.nan_to_num(spline(t - b)) for b in range(bins)]
                weights.append([r / sum(row) for r in row])
            for a in range(bins):
                for b in range(bins):
                    p[a, b] += m[v] * weights[0][a] * weights[1][b] / m.sum()
        pairs = [(p[a, b], p[a].sum() * p[:, b].sum()) for a in range(bins) for b in range(bins)]
        expected.append(-sum(x * math.log((x + 1e-7) / (q + 1e-7) + 1e-7) for x, q in pairs))
    options = {"bins": bins, "kernel": kernel, "mask": mask}
    ours = fastreg.mi_loss(fixed, moved, **options, reduction="none")
    assert_close(ours, torch.tensor(expected, dtype=torch.float64), 1e-12)
    assert_close(fastreg.mi_loss(fixed, moved, **options), ours.mean(), 1e-14)
    assert_close(fastreg.mi_loss(fixed, moved, **options, reduction="sum"), ours.sum(), 1e-14)


@pytest.mark.parametrize("bins", [8, 23, 64])
def test_same_number_as_monai(bins):
    losses = pytest.importorskip("monai.losses")
    fixed, moved = make((2, 1, 9, 10, 11))
    with torch.no_grad():
        fixed.clamp_(0, 1), moved.clamp_(0, 1)
    loss = losses.GlobalMutualInformationLoss("gaussian", num_bins=bins)
    expected = loss(moved, fixed)
    ours = fastreg.mi_loss(fixed, moved, bins=bins)
    assert_close(ours, expected, 1e-6)
    grads = [torch.autograd.grad(value, moved)[0] for value in (ours, expected)]
    assert_close(grads[0], grads[1], 1e-4, floor=0.1)


def test_many_chunks_of_the_reference_and_slabs_of_the_kernel():
    shape = (1, 1, 227, 301)  # in slabs of which the last is shorter
    assert shape[2] * shape[3] > 2 * CHUNK
    check_against_reference(fastreg.mi_loss, truth(), make(shape))


def test_what_tells_more_is_less():
    fixed, moved = (t.detach() for t in make((1, 1, 20, 20, 20)))
    noise = torch.rand_like(fixed)
    losses = [fastreg.mi_loss(fixed, m) for m in (1 - fixed, moved, noise)]
    assert losses[0] < losses[1] < losses[2] < 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
def test_constant_images_and_masks_of_zeros(kernel):
    fixed, moved = make((2, 2, 4, 30), torch.float32)
    constant = torch.full_like(moved, 0.3).requires_grad_()
    for a, b in ((fixed, constant), (constant, constant), (constant, fixed)):
        loss = fastreg.mi_loss(a, b, kernel=kernel)
        assert abs(loss) < 1e-5
        grads = torch.autograd.grad(loss, (a, b) if a is not b else (a,))
        assert all(g.abs().max() < 1e-5 for g in grads)
    for reduction in ("mean", "sum", "none"):
        options = {"kernel": kernel, "mask": torch.zeros(2, 1, 4, 30), "reduction": reduction}
        loss = fastreg.mi_loss(fixed, moved, **options)
        assert loss.eq(0).all()
        assert all(g.eq(0).all() for g in torch.autograd.grad(loss.sum(), (fixed, moved)))


@pytest.mark.kernel
@pytest.mark.parametrize("extent", [1e-290, 1e-310, 5e-324])
def test_a_range_of_next_to_nothing(extent):
    """Whose inverse is infinite in the end, and then a single value."""
    _, moved = make((1, 1, 4, 30))
    tiny = extent * (moved > 0.5).double()
    loss = fastreg.mi_loss(tiny, moved, bins=8, kernel="bspline")
    assert (loss < -1e-2) == (extent > 1e-300)
    assert abs(loss) < 2
    assert torch.autograd.grad(loss, moved)[0].isfinite().all()


@pytest.mark.kernel
@pytest.mark.parametrize("kernel", KERNELS)
def test_nan(kernel):
    fixed, moved = make((3, 2, 4, 30), torch.float32)
    with torch.no_grad():
        fixed[1, 0, 2, 13] = float("nan")
        moved[2, 1, 3, 29] = float("inf")
    loss = fastreg.mi_loss(fixed, moved, kernel=kernel, reduction="none")
    # An infinity is out of range, a range none.
    assert loss.isfinite().tolist() == [True, False, kernel == "gaussian"]
    mask = torch.ones(3, 1, 4, 30)
    mask[1, 0, 2, 13] = mask[2, 0, 3, 29] = 0
    loss = fastreg.mi_loss(fixed, moved, kernel=kernel, mask=mask, reduction="none")
    assert loss.isfinite().all()
    grads = torch.autograd.grad(loss.sum(), (fixed, moved))
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][1, :, 2, 13].tolist() == grads[1][2, :, 3, 29].tolist() == [0, 0]
    # A weight that is none is not ignored.
    mask[0, 0, 0, 0] = float("nan")
    loss = fastreg.mi_loss(fixed, moved, kernel=kernel, mask=mask, reduction="none")
    assert loss.isnan().tolist() == [True, False, False]


def test_values_out_of_range_are_clamped_without_a_gradient():
    fixed, moved = make((1, 1, 9, 70))
    loss = fastreg.mi_loss(fixed, moved)
    grad = torch.autograd.grad(loss, moved)[0]
    outside = (moved < 0) | (moved > 1)
    assert 0 < outside.sum() < outside.numel() / 2
    assert torch.equal(grad == 0, outside)
    assert torch.equal(loss, fastreg.mi_loss(fixed, moved.clamp(0, 1)))


def test_gradient_of_bsplines_is_that_with_the_range_as_it_is():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 2)
    inputs = [(0.05 + 0.9 * torch.rand(1, 1, 1, 9, dtype=torch.float64)).requires_grad_() for _ in range(2)]

    def loss(*free):
        return fastreg.mi_loss(*(torch.cat([t, ends], -1) for t in free), bins=9, kernel="bspline")

    assert torch.autograd.gradcheck(loss, inputs)
    # Its unit and offset do not matter.
    fixed, moved = (t.detach() for t in make((2, 1, 6, 7)))
    ours = [
        fastreg.mi_loss(f, m, kernel="bspline") for f, m in ((fixed, moved), (1000 * fixed - 400, 3 - moved))
    ]
    assert_close(ours[1], ours[0], 1e-9)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float64)], ids=str)
def test_mixed_dtypes(dtypes):
    fixed, moved = (
        t.detach().to(d).requires_grad_() for t, d in zip(make((1, 2, 4, 5, 6)), dtypes, strict=True)
    )
    assert fastreg.mi_loss(fixed, moved).dtype == torch.promote_types(*dtypes)
    check_against_reference(fastreg.mi_loss, truth(), (fixed, moved))


@pytest.mark.parametrize("frozen", [0, 1])
def test_gradient_of_one_input(frozen):
    inputs = make((2, 2, 4, 5, 6))
    expected = torch.autograd.grad(fastreg.mi_loss(*inputs), inputs)
    inputs = [t.detach() if i == frozen else t for i, t in enumerate(inputs)]
    assert torch.equal(
        torch.autograd.grad(fastreg.mi_loss(*inputs), inputs[1 - frozen])[0], expected[1 - frozen]
    )


@pytest.mark.skipif(BACKEND != "cpu", reason="no other kernels")
def test_keeps_the_images_alone():
    fixed, moved = make((1, 1, 30, 30, 30), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fastreg.mi_loss(fixed, moved)
    assert sum(t.numel() for t in kept if t.numel() == fixed.numel()) == 2 * fixed.numel()
    assert sum(t.numel() for t in kept if t.numel() != fixed.numel()) <= 12 * 32**2


def opcheck(dtype):
    inputs, mask = make((2, 3, 4, 5, 6), dtype), make_mask((2, 3, 4, 5, 6))
    plain = [t.detach() for t in inputs]
    ranges = torch.arange(2, dtype=torch.float64).repeat(2, 2, 1)
    for kernel, given in (("gaussian", None), ("bspline", mask)):
        yield torch.ops.fastreg.mi_loss.default, (*inputs, given, ranges, 8, kernel)
        grad = torch.rand(2, 8, 8, dtype=torch.float64)
        yield torch.ops.fastreg.mi_loss_bwd.default, (grad, *plain, given, ranges, 8, kernel, True, False)


def case(masked=False, channels=2, empty=0.0, **options):
    def make_(n, spatial, dtype):
        images = make((n, channels, *spatial), dtype)
        return (*images, make_mask((n, channels, *spatial)).to(dtype)) if masked else images

    return Case(lambda f, m, mask=None: fastreg.mi_loss(f, m, mask=mask, **options), make_, empty)


VALID = {"fixed": torch.zeros(2, 3, 4, 5), "moved": torch.zeros(2, 3, 4, 5)}
ERRORS = [
    (TypeError, "fixed must be fp64, fp32, fp16 or bf16, got torch.int64", {"fixed": torch.zeros(2, 3, 4, 5).long()}),
    (ValueError, r"moved must have the shape \(2, 3, 4, 5\) of fixed", {"moved": torch.zeros(2, 3, 4, 6)}),
    (ValueError, r"mask must have shape \(2, 1, 4, 5\), got \(2, 3, 4, 5\)", {"mask": torch.zeros(2, 3, 4, 5)}),
    (ValueError, "mask must not require a gradient", {"mask": torch.zeros(2, 1, 4, 5, requires_grad=True)}),
    (ValueError, "bins must be from 2 to 1024, got 1", {"bins": 1}),
    (ValueError, "bins must be from 6 to 1024, got 5", {"bins": 5, "kernel": "bspline"}),
    (TypeError, "bins must be an int, got 8.0", {"bins": 8.0}),
    (ValueError, "kernel must be 'gaussian' or 'bspline', got 'box'", {"kernel": "box"}),
    (ValueError, "reduction must be 'mean' or 'sum' or 'none', got 'max'", {"reduction": "max"}),
]  # fmt: skip
CASES = {"mean": case(), "masked": case(True, bins=9), "none": case(reduction="none", bins=9)}
CONTRACT = Contract(
    cases=CASES | {"bspline": case(True, kernel="bspline")},
    valid=VALID,
    errors=ERRORS,
    opcheck=opcheck,
    gradcheck=CASES,  # not of B-splines, whose range counts as constant
    double_backward=False,
    layouts={name: CASES[name] for name in ("mean", "masked")},
    vmap=True,
    compiled=True,
    # A mean over no samples; of no voxels nothing is known.
    empty_batch={"mean": case(empty=math.nan), "masked": case(True, empty=math.nan), "none": CASES["none"]},
    empty_axes=True,
    empty_channels={"mean": case(channels=0), "bspline": case(True, channels=0, kernel="bspline")},
    repeats=True,
    large=((33, 40, 40), (233, 190)),
)
