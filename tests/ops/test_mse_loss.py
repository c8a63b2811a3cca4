import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, assert_close, check_against_reference
from contract import Case, Contract

import fastreg
from fastreg.ops.mse_loss import mse_loss_ref, mse_map_ref

# Rows of odd length, several channels, samples of more than one block of sums.
SHAPES = [
    pytest.param((2, 3, 5, 6, 7), id="n2c3d5h6w7"),
    pytest.param((1, 1, 4, 3, 270), id="n1c1d4h3w270"),
    pytest.param((3, 2, 9, 67), id="n3c2h9w67"),
    pytest.param((1, 1, 1, 1), id="one-voxel"),
]


def make(shape, dtype=torch.float64):
    return torch.rand(shape).to(dtype).requires_grad_(), torch.rand(shape).to(dtype).requires_grad_()


def make_mask(shape):
    """Weights with zeros among them."""
    mask = torch.rand(shape[0], 1, *shape[2:])
    return mask * (mask > 0.4) + 0.1 * (mask > 0.9)


def reference(mask, reduction):
    mask = None if mask is None else mask.double()

    def loss(fixed, moved):
        if reduction == "none":
            return mse_map_ref(fixed, moved, mask)
        total = mse_loss_ref(fixed, moved, mask).sum()
        weight = fixed[:, :1].numel() if mask is None else mask.sum()
        return total / (weight * fixed.shape[1]) if reduction == "mean" else total

    return loss


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_reference(shape, dtype, masked, reduction):
    # A random mask may be zero on a single voxel.
    mask = (make_mask(shape) + (torch.tensor(shape[2:]).prod() == 1)) if masked else None
    # Gradients of a mean would be subnormal halves.
    gain = 1e3 if reduction == "mean" else 1.0
    check_against_reference(
        lambda f, m: gain * fastreg.mse_loss(f, m, mask=mask, reduction=reduction),
        lambda f, m: gain * reference(mask, reduction)(f, m),
        make(shape, dtype),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_definition(shape):
    fixed, moved = make(shape)
    mask = make_mask(shape).double() + 0.1
    difference = (fixed - moved).detach()
    assert_close(fastreg.mse_loss(fixed, moved), F.mse_loss(fixed, moved), 1e-12)
    assert_close(
        fastreg.mse_loss(fixed, moved, reduction="sum"), F.mse_loss(fixed, moved, reduction="sum"), 1e-12
    )
    expected = (mask * difference**2).sum() / mask.expand_as(fixed).sum()
    assert_close(fastreg.mse_loss(fixed, moved, mask=mask), expected, 1e-12)
    per_voxel = fastreg.mse_loss(fixed, moved, mask=mask, reduction="none")
    assert_close(per_voxel, (mask * difference**2).mean(1, keepdim=True), 1e-12)
    ours = torch.autograd.grad(fastreg.mse_loss(fixed, moved, mask=mask), (fixed, moved))
    assert_close(ours[0], 2 * mask * difference / mask.expand_as(fixed).sum(), 1e-12)
    assert torch.equal(ours[1], -ours[0])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_gradient_of_one_input(frozen, reduction):
    inputs = make((2, 2, 4, 5, 6))
    weight = torch.rand(2, 1, 4, 5, 6) if reduction == "none" else 1.0
    expected = torch.autograd.grad((weight * fastreg.mse_loss(*inputs, reduction=reduction)).sum(), inputs)
    inputs = [t.detach() if i == frozen else t for i, t in enumerate(inputs)]
    loss = (weight * fastreg.mse_loss(*inputs, reduction=reduction)).sum()
    assert torch.equal(torch.autograd.grad(loss, inputs[1 - frozen])[0], expected[1 - frozen])


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float64)], ids=str)
def test_mixed_dtypes(dtypes):
    fixed, moved = (
        t.detach().to(d).requires_grad_() for t, d in zip(make((1, 2, 4, 5, 6)), dtypes, strict=True)
    )
    assert fastreg.mse_loss(fixed, moved).dtype == torch.promote_types(*dtypes)
    check_against_reference(fastreg.mse_loss, reference(None, "mean"), (fixed, moved))


def test_masks_of_zeros():
    fixed, moved = make((2, 2, 4, 30))
    mask = torch.zeros(2, 1, 4, 30)
    for reduction in ("mean", "sum", "none"):
        loss = fastreg.mse_loss(fixed, moved, mask=mask, reduction=reduction)
        assert loss.eq(0).all()
        assert all(g.eq(0).all() for g in torch.autograd.grad(loss.sum(), (fixed, moved)))
    mask[1] = 1  # one sample masked out: the mean of the other
    assert_close(fastreg.mse_loss(fixed, moved, mask=mask), F.mse_loss(fixed[1], moved[1]), 1e-12)


def test_nan():
    fixed, moved = make((2, 2, 4, 30), torch.float32)
    with torch.no_grad():
        fixed[1, 0, 2, 13] = float("nan")
        moved[1, 1, 3, 29] = float("inf")
    sums = torch.ops.fastreg.mse_loss(fixed, moved, None)
    assert sums.isfinite().tolist() == [True, False]
    grad = torch.autograd.grad(sums.sum(), moved)[0]
    assert (~grad.isfinite()).nonzero().tolist() == [[1, 0, 2, 13], [1, 1, 3, 29]]
    # Masked out, neither counts.
    mask = torch.ones(2, 1, 4, 30)
    mask[1, 0, 2, 13] = mask[1, 0, 3, 29] = 0
    for reduction in ("mean", "none"):
        loss = fastreg.mse_loss(fixed, moved, mask=mask, reduction=reduction)
        assert loss.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), (fixed, moved)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_below_zero_count_as_zero(reduction):
    inputs, mask = make((2, 3, 5, 6, 7)), make_mask((2, 3, 5, 6, 7))
    below = torch.where(mask == 0, -1.0, mask)
    a, b = (fastreg.mse_loss(*inputs, mask=m, reduction=reduction) for m in (below, mask))
    assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_nan_weight_is_not_ignored(reduction):
    fixed, moved = make((2, 2, 4, 30), torch.float32)
    mask = torch.ones(2, 1, 4, 30)
    mask[1, 0, 2, 13] = float("nan")
    loss = fastreg.mse_loss(fixed, moved, mask=mask, reduction=reduction)
    grads = torch.autograd.grad(loss.sum(), (fixed, moved))
    if reduction == "none":
        assert loss.isnan().nonzero().tolist() == [[1, 0, 2, 13]]
    else:
        assert loss.isnan()
    if reduction != "mean":
        expected = [[1, 0, 2, 13], [1, 1, 2, 13]]
        assert all(g.isnan().nonzero().tolist() == expected for g in grads)
        truth = [t.detach().double().requires_grad_() for t in (fixed, moved)]
        truth_grads = torch.autograd.grad(mse_map_ref(*truth, mask.double()).sum(), truth)
        assert all(torch.equal(g.isnan(), t.isnan()) for g, t in zip(grads, truth_grads, strict=True))


def test_half_differences_do_not_overflow():
    fixed, moved = torch.full((1, 1, 8, 40), 60000.0).half(), torch.full((1, 1, 8, 40), -60000.0).half()
    assert_close(fastreg.mse_loss(fixed, moved), torch.tensor(120000.0**2))


def test_long_sums_keep_their_digits():
    fixed, moved = (t.detach().float() for t in make((1, 1, 900, 1000)))
    assert_close(fastreg.mse_loss(fixed, moved), F.mse_loss(fixed.double(), moved.double()), 1e-6)


def opcheck(dtype):
    inputs, mask = make((2, 3, 4, 5, 6), dtype), make_mask((2, 3, 4, 5, 6))
    plain = [t.detach() for t in inputs]
    for op in (torch.ops.fastreg.mse_loss.default, torch.ops.fastreg.mse_map.default):
        yield op, (*inputs, None)
        yield op, (*inputs, mask)
        grad = torch.rand_like(op(*plain, mask))
        yield torch.ops.fastreg.mse_loss_bwd.default, (grad, *plain, mask, True, False)


def case(reduction, masked=False):
    def make_(n, spatial, dtype):
        images = make((n, 2, *spatial), dtype)
        return (*images, make_mask((n, 2, *spatial)).to(dtype)) if masked else images

    return Case(
        lambda f, m, mask=None: fastreg.mse_loss(f, m, mask=mask, reduction=reduction),
        make_,
        math.nan if reduction == "mean" and not masked else 0.0,
    )


VALID = {"fixed": torch.zeros(2, 3, 4, 5), "moved": torch.zeros(2, 3, 4, 5)}
ERRORS = [
    (
        TypeError,
        "fixed must be fp64, fp32, fp16 or bf16, got torch.int64",
        {"fixed": torch.zeros(2, 3, 4, 5).long()},
    ),
    (
        ValueError,
        r"fixed must have shape \(N, C, D, H, W\) or \(N, C, H, W\)",
        {"fixed": torch.zeros(4, 5)},
    ),
    (
        ValueError,
        r"moved must have the shape \(2, 3, 4, 5\) of fixed",
        {"moved": torch.zeros(2, 3, 4, 6)},
    ),
    (
        ValueError,
        r"mask must have shape \(2, 1, 4, 5\), got \(2, 3, 4, 5\)",
        {"mask": torch.zeros(2, 3, 4, 5)},
    ),
    (
        ValueError,
        "mask must not require a gradient",
        {"mask": torch.zeros(2, 1, 4, 5, requires_grad=True)},
    ),
    (ValueError, "reduction must be 'mean' or 'sum' or 'none', got 'max'", {"reduction": "max"}),
]  # fmt: skip

CONTRACT = Contract(
    cases={
        f"{reduction}{'-masked' if masked else ''}": case(reduction, masked)
        for reduction, masked in itertools.product(("mean", "sum", "none"), (False, True))
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
    empty_channels="NaN, the mean of no channels",
    repeats=True,
)
