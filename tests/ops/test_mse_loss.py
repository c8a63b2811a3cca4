import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, assert_close, check_against_reference, layouts

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


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    fixed, moved = make((2, 2, 3, 4))
    for mask in (None, make_mask(fixed.shape).double()):
        assert torch.autograd.gradcheck(
            lambda f, m, k=mask: fastreg.mse_loss(f, m, mask=k, reduction=reduction), (fixed, moved)
        )


@pytest.mark.parametrize("shape", [(2, 3, 5, 6, 17), (2, 2, 8, 9)])
def test_layouts(shape):
    fixed, moved, mask = torch.randn(shape), torch.randn(shape), make_mask(shape)
    plain = [t.clone().requires_grad_() for t in (fixed, moved)]
    for reduction in ("sum", "none"):
        expected = fastreg.mse_loss(*plain, mask=mask, reduction=reduction)
        expected_grads = torch.autograd.grad(expected.sum(), plain)
        for name in layouts(fixed):
            f, m = (layouts(t)[name].requires_grad_() for t in (fixed, moved))
            loss = fastreg.mse_loss(f, m, mask=layouts(mask)[name], reduction=reduction)
            assert torch.equal(loss, expected), name
            for ours, theirs in zip(torch.autograd.grad(loss.sum(), (f, m)), expected_grads, strict=True):
                assert torch.equal(ours, theirs), name


def test_deterministic():
    fixed, moved = make((2, 2, 9, 10, 70), torch.float32)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        loss = fastreg.mse_loss(fixed, moved)
        results.append((loss, *torch.autograd.grad(loss, (fixed, moved))))
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty():
    fixed, moved = torch.zeros(0, 2, 4, 5, requires_grad=True), torch.zeros(0, 2, 4, 5)
    assert fastreg.mse_loss(fixed, moved).isnan()  # the mean of nothing
    assert fastreg.mse_loss(fixed, moved, reduction="none").shape == (0, 1, 4, 5)
    loss = fastreg.mse_loss(fixed, moved, reduction="sum")
    assert loss == 0
    assert torch.autograd.grad(loss, fixed)[0].shape == fixed.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    inputs, mask = make((2, 3, 4, 5, 6), dtype), make_mask((2, 3, 4, 5, 6))
    plain = [t.detach() for t in inputs]
    for op in (torch.ops.fastreg.mse_loss.default, torch.ops.fastreg.mse_map.default):
        torch.library.opcheck(op, (*inputs, None))
        torch.library.opcheck(op, (*inputs, mask))
        grad = torch.rand_like(op(*plain, mask))
        torch.library.opcheck(torch.ops.fastreg.mse_loss_bwd.default, (grad, *plain, mask, True, False))


def test_compile():
    def step(fixed, moved):
        return fastreg.mse_loss(2 * fixed, moved, mask=moved.detach().abs()[:, :1])

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for shape in [(1, 3, 4, 5, 6), (1, 3, 7, 6, 5)]:
        inputs = make(shape, torch.float32)
        expected = torch.autograd.grad(step(*inputs), inputs)
        for ours, theirs in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
            assert_close(ours, theirs, floor=0.1)


def test_vmap():
    fixed, moved, mask = torch.rand(4, 2, 2, 5, 6), torch.rand(4, 2, 2, 5, 6), torch.rand(4, 2, 1, 5, 6)
    for reduction in ("mean", "none"):
        out = torch.vmap(lambda f, m, k, r=reduction: fastreg.mse_loss(f, m, mask=k, reduction=r))(
            fixed, moved, mask
        )
        expected = [
            fastreg.mse_loss(f, m, mask=k, reduction=reduction)
            for f, m, k in zip(fixed, moved, mask, strict=True)
        ]
        assert_close(out, torch.stack(expected), 1e-6)


def test_double_backward_raises():
    fixed, moved = make((1, 2, 4, 5))
    (grad,) = torch.autograd.grad(fastreg.mse_loss(fixed, moved), moved, create_graph=True)
    with pytest.raises(RuntimeError, match="fastreg::mse_loss: double backward is not supported"):
        grad.sum().backward()


def test_transforms_without_a_derivative_raise():
    with pytest.raises(RuntimeError, match=r"fastreg::mse_loss: torch\.func\.grad"):
        torch.func.grad(fastreg.mse_loss)(torch.rand(1, 2, 4, 5), torch.rand(1, 2, 4, 5))


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
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
    ],
)
def test_errors(error, match, change):
    arguments = {"fixed": torch.zeros(2, 3, 4, 5), "moved": torch.zeros(2, 3, 4, 5)} | change
    with pytest.raises(error, match=f"fastreg::mse_loss: {match}"):
        fastreg.mse_loss(**arguments)
