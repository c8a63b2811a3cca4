import itertools
import math

import pytest
import torch
from common import BACKEND, DTYPES, assert_close, check_against_reference, double
from contract import Case, Contract
from test_mind import F3RNET, INTERPRETED, LARGE, OPTIONS, SETTINGS, SHAPES, make, reference, size

import fastreg
from fastreg.ops.mind import _distances, channels
from fastreg.ops.mind_loss import mind_loss_prepared, mind_map_ref


def pair(shape, dtype=torch.float64):
    fixed = torch.rand(shape)
    moved = fixed + 0.3 * torch.rand(shape)
    return fixed.to(dtype).requires_grad_(), moved.to(dtype).requires_grad_()


def make_mask(shape):
    mask = torch.rand(shape[0], 1, *shape[2:])
    mask[mask < 0.3] = 0
    mask.view(-1)[0] = 0.5
    return mask


def loss_reference(options, norm="l2", mask=None, reduction="mean"):
    def loss(fixed, moved):
        error = mind_map_ref(fixed, moved, None, None, *options.values(), norm)
        if reduction == "none":
            return error if mask is None else error * mask.double()
        n_channels = len(channels(options["neighbourhood"], fixed.dim() - 2))
        weight = torch.ones_like(error) if mask is None else mask.double()
        total = n_channels * (error * weight).sum()
        return total if reduction == "sum" else total / (n_channels * weight.sum())

    return loss


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("options", SETTINGS[:2])
def test_prepared(options, norm):
    fixed, moved = pair(size((2, 1, 9, 10, 20), (2, 1, 3, 4, 5)), torch.float32)
    mask = make_mask(fixed.shape)
    for reduction in ("mean", "none"):
        module = fastreg.nn.MINDLoss(**options, norm=norm, reduction=reduction)
        prepared = module.prepare(fixed)
        for m in (None, mask):
            expected, loss = module(fixed, moved, m), prepared(moved, mask=m)
            assert torch.equal(loss, expected)
            grads = [torch.autograd.grad(x.sum(), moved)[0] for x in (loss, expected)]
            assert torch.equal(*grads)
    # One number a sample beside the image itself.
    assert [b.numel() for b in prepared.buffers()] == [fixed.numel(), 2]
    assert not prepared.fixed.requires_grad
    with pytest.raises(ValueError, match="fastreg::mind_loss: moved must have the shape"):
        prepared(moved[:1])


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_losses(shape, options, masked):
    fixed, moved = pair(shape)
    mask = make_mask(shape) if masked else None
    wants = itertools.cycle([(fixed, moved), (fixed.detach(), moved), (fixed, moved.detach())])
    cases = list(itertools.product(("l2", "l1"), ("mean", "sum", "none")))
    if INTERPRETED:
        cases = [cases[sum(shape) % 3 + 3 * masked]]
    for norm, reduction in cases:
        check_against_reference(
            lambda f, m, n=norm, r=reduction: fastreg.mind_loss(f, m, **options, norm=n, mask=mask, reduction=r),
            loss_reference(options, norm, mask, reduction),
            next(wants),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("options", SETTINGS[:2])
@pytest.mark.parametrize(
    "shape", [size((2, 1, 9, 17, 70), (2, 1, 2, 3, 9)), size((2, 2, 20, 66), (2, 2, 5, 6))], ids=str
)
def test_dtypes(shape, options, dtype):
    """Tiles whole and cut, rows longer than a tile.

    V is a difference of distances: where it is small beside them, fp32 loses a digit (the reference in fp32 does, too).
    """
    tolerance = {torch.float32: 5e-5, torch.float16: 3e-3}.get(dtype)
    check_against_reference(
        lambda x: fastreg.mind(x, **options), reference(options), (make(shape, dtype),), tolerance
    )
    fixed, moved = pair(shape, dtype)
    inputs = double(fixed), double(moved)
    for norm, reduction in (("l2", "sum"), ("l2", "none"), ("l1", "mean")):
        gain = 1e3 if reduction == "mean" else 1.0  # gradients of a mean would be subnormal halves
        loss = gain * fastreg.mind_loss(fixed, moved, **options, norm=norm, reduction=reduction)
        assert loss.dtype == torch.float32
        truth = gain * loss_reference(options, norm, None, reduction)(*inputs)
        assert_close(loss, truth, 3e-5 if reduction == "none" else 1e-6, floor=0.1)
        grads = torch.autograd.grad(loss.sum(), (fixed, moved))
        for grad, true in zip(grads, torch.autograd.grad(truth.sum(), inputs), strict=True):
            assert grad.dtype == dtype
            limit = {torch.float32: 3e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
            assert (grad - true).norm() < limit * true.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, 1000.0])
def test_constant_images(dtype, value):
    constant = torch.full(size((2, 1, 9, 10, 11), (2, 1, 3, 4, 5)), value, dtype=dtype, requires_grad=True)
    texture = make(constant.shape, dtype)
    descriptors = fastreg.mind(constant)
    assert descriptors.eq(1).all()
    assert torch.autograd.grad(descriptors.sum(), constant)[0].eq(0).all()
    for reduction in ("mean", "none"):
        loss = fastreg.mind_loss(constant, constant.detach().clone().requires_grad_(), reduction=reduction)
        assert loss.eq(0).all()
        assert torch.autograd.grad(loss.sum(), constant)[0].eq(0).all()
        loss = fastreg.mind_loss(constant, texture, mask=100 * make_mask(texture.shape), reduction=reduction)
        grads = torch.autograd.grad(loss.sum(), (constant, texture))
        assert grads[0].eq(0).all()
        assert grads[1].isfinite().all()
        assert grads[1].abs().max() > 0


def test_flat_regions():
    """Half the volume is exactly flat: V is at its lower bound there and at the edge within it."""
    for axis, options in itertools.product(range(2, 5), (OPTIONS, F3RNET)):
        fixed, moved = (x.detach() for x in pair(size((1, 1, 18, 18, 18), (1, 1, 6, 6, 6))))
        for image in (fixed, moved):
            half = image.shape[axis] // 2
            image.narrow(axis, half, half).fill_(0.25)
        inputs = [x.float().requires_grad_() for x in (fixed, moved)]
        truth_inputs = [double(x) for x in inputs]
        loss = fastreg.mind_loss(*inputs, **options, reduction="sum")
        truth = loss_reference(options, reduction="sum")(*truth_inputs)
        assert_close(loss, truth)
        for grad, expected in zip(
            torch.autograd.grad(loss, inputs), torch.autograd.grad(truth, truth_inputs), strict=True
        ):
            assert (grad - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_non_finite_stays_in_its_sample(bad):
    fixed, moved = pair(size((3, 1, 9, 10, 70), (3, 1, 3, 4, 5)), torch.float32)
    with torch.no_grad():
        fixed[1, 0, 2, 3, 4] = bad
    for options in (OPTIONS, F3RNET, OPTIONS | {"radius": 0, "dilation": 1}):
        descriptors = fastreg.mind(fixed, **options)
        assert descriptors[1].isnan().all()
        assert descriptors[::2].isfinite().all()
        for reduction in ("sum", "none"):
            loss = fastreg.mind_loss(fixed, moved, **options, reduction=reduction)
            grads = torch.autograd.grad(loss.sum(), (fixed, moved))
            alone = fastreg.mind_loss(fixed[::2], moved[::2], **options, reduction=reduction)
            expected = torch.autograd.grad(alone.sum(), (fixed, moved))
            for grad, true in zip(grads, expected, strict=True):
                assert grad[1].isnan().any()
                assert torch.equal(grad[::2], true[::2])
        assert loss[1].isnan().all()
        assert torch.equal(loss[::2], alone)


def test_masks():
    fixed, moved = pair(size((2, 1, 9, 10, 20), (2, 1, 2, 3, 4)), torch.float32)
    ones = torch.ones(fixed.shape)
    assert_close(fastreg.mind_loss(fixed, moved, mask=ones), fastreg.mind_loss(fixed, moved).double(), 1e-6)
    for reduction in ("mean", "sum", "none"):
        loss = fastreg.mind_loss(fixed, moved, mask=0 * ones - 1, reduction=reduction)
        assert loss.eq(0).all()
        assert all(g.eq(0).all() for g in torch.autograd.grad(loss.sum(), (fixed, moved)))
        # A hidden sample does not count even where it is NaN; a NaN weight does.
        spoiled, hides = moved.detach().clone(), ones.clone()
        spoiled[1, 0, 0, 0, 0] = float("nan")
        hides[1] = 0
        loss = fastreg.mind_loss(fixed, spoiled, mask=hides, reduction=reduction)
        assert_close(loss, fastreg.mind_loss(fixed, moved, mask=hides, reduction=reduction).double(), 1e-6)
        hides[0, 0, 0, 0, 0] = float("nan")
        assert fastreg.mind_loss(fixed, moved, mask=hides, reduction=reduction).isnan().any()


@pytest.mark.parametrize(
    "shape", [(1, 1, 4, 5, 6), (1, 1, 5, 3), size((1, 1, 38, 3, 4), (1, 1, 17, 2, 1))], ids=str
)
def test_radius_and_dilation_beyond_the_image(shape):
    for radius, dilation in ((9, 1), (1, 11), (8, 13), (0, 2000)):
        options = OPTIONS | {"radius": radius, "dilation": dilation}
        check_against_reference(lambda x, o=options: fastreg.mind(x, **o), reference(options), (make(shape),))
        check_against_reference(
            lambda f, m, o=options: fastreg.mind_loss(f, m, **o), loss_reference(options), pair(shape)
        )


@pytest.mark.skipif(BACKEND == "triton", reason="minutes; test_slabs has slabs of a few planes")
@pytest.mark.parametrize(
    "options", [OPTIONS, F3RNET, OPTIONS | {"radius": 3, "dilation": 5}, OPTIONS | {"radius": 5}]
)
@pytest.mark.parametrize("shape", [(1, 2, 45, 5, 6), (2, 1, 61, 7)], ids=str)
def test_many_slabs(shape, options):
    """Deep images: kernels that go slab by slab reuse their scratch memory several times over."""
    mask = make_mask(shape)
    inputs = pair(shape)
    check_against_reference(
        lambda f, m: fastreg.mind_loss(f, m, **options, mask=mask), loss_reference(options, mask=mask), inputs
    )
    check_against_reference(lambda x: fastreg.mind(x, **options), reference(options), inputs[:1])


@pytest.mark.skipif(INTERPRETED, reason="of tiles of the CPU's kernels")
@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        F3RNET,
        OPTIONS | {"radius": 1, "dilation": 5},
        OPTIONS | {"radius": 3, "neighbourhood": "six"},
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, 28, 27, 5), (1, 2, 27, 30, 17), (1, 1, 132, 163)], ids=str)
def test_tiles_inside_the_image(shape, options):
    """Where no patch leaves the image along z and y, two channels share what is summed."""
    mask = make_mask(shape)
    inputs = pair(shape)
    check_against_reference(
        lambda f, m: fastreg.mind_loss(f, m, **options, mask=mask), loss_reference(options, mask=mask), inputs
    )


def test_mixed_dtypes_are_promoted():
    fixed, moved = pair(size((1, 1, 8, 8, 8), (1, 1, 3, 4, 5)))
    f, m = fixed.detach().bfloat16().requires_grad_(), moved.detach().float().requires_grad_()
    loss = fastreg.mind_loss(f, m)
    assert torch.equal(loss, fastreg.mind_loss(f.float(), m))
    assert [g.dtype for g in torch.autograd.grad(loss, (f, m))] == [torch.bfloat16, torch.float32]


def test_prepared_loss_keeps_its_mean_through_casts():
    fixed, moved = (3000 * torch.rand(size((1, 1, 8, 9, 10), (1, 1, 3, 4, 5))) for _ in range(2))
    prepared = fastreg.nn.MINDLoss().prepare(fixed)
    expected = prepared(moved)
    cast = prepared.half()(moved.half())
    assert cast.isfinite()
    assert (cast - expected).abs() < 0.01 * expected


@pytest.mark.skipif(not INTERPRETED, reason="of the Triton launcher")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 19, 2), OPTIONS | {"radius": 1}),
        ((1, 1, 7, 2, 3), OPTIONS | {"dilation": 1}),
        ((1, 1, 12, 3, 2), F3RNET | {"radius": 3}),
    ],
    ids=["2d", "3d", "wide"],
)
def test_slabs(monkeypatch, shape, options):
    """Planes of the scratch are used again and again, stage after stage."""
    from fastreg.kernels import mind as launchers

    fixed, moved = pair(shape)
    whole = fastreg.mind_loss(fixed, moved, **options)
    expected = torch.autograd.grad(whole, (fixed, moved))
    monkeypatch.setattr(launchers, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(launchers, "_LEAST_PLANES", 2)
    loss = fastreg.mind_loss(fixed, moved, **options)
    assert_close(loss, whole.detach(), 1e-12)
    for grad, true in zip(torch.autograd.grad(loss, (fixed, moved)), expected, strict=True):
        assert torch.equal(grad, true)


def test_prepared_loss_is_of_the_image_it_saw():
    fixed, moved = (torch.rand(size((1, 1, 8, 9, 10), (1, 1, 3, 4, 5))) for _ in range(2))
    expected = fastreg.mind_loss(fixed, moved)
    buffer = fixed.clone()
    prepared = fastreg.nn.MINDLoss().prepare(buffer)
    buffer.mul_(100)
    assert torch.equal(prepared(moved), expected)


@pytest.mark.parametrize("options", SETTINGS[:2])
@pytest.mark.parametrize("shape", [(1, 2, 7, 6, 9), (1, 1, 17, 16)])
def test_what_no_counted_descriptor_reads_counts_as_zero(shape, options):
    """Of voxels one by one, where not finite; read by a counted one's distances they make the sample NaN."""
    shape = size(shape, (1, 1, 3, 4, 5))
    fixed, moved = (t.detach().float() for t in pair(shape))
    mask = torch.zeros(1, 1, *shape[2:])
    mask[0, 0].view(-1)[:: max(mask.numel() // 3, 1)][:2] = 0.7
    counted, kinds = mask > 0, set()

    def distances(image):
        return _distances(image, *options.values()).masked_select(counted)

    def run(image, **o):
        image = image.clone().requires_grad_()
        loss = fastreg.mind_loss(fixed, image, **options, mask=mask, **o)
        return loss, torch.autograd.grad(loss.sum(), image)[0]

    for voxel in torch.randperm(mask.numel())[: 2 if BACKEND == "triton" else 12].tolist():
        images = []
        for value in (float("nan") if voxel % 2 else -float("inf"), 0.0, 9.0):
            images.append(moved.clone())
            images[-1][:, -1].view(-1)[voxel] = value
        spoiled, zero, other = images
        read = not torch.equal(distances(zero), distances(other))
        kinds.add(read)
        for reduction in ("mean", "none"):
            loss, grad = run(spoiled, reduction=reduction)
            expected, expected_grad = run(zero, reduction=reduction)
            assert loss.isnan().any() if read else torch.equal(loss, expected)
            assert read or torch.equal(grad, expected_grad)
        prepared = fastreg.nn.MINDLoss(**options).prepare(spoiled, mask)
        theirs = fastreg.mind_loss(spoiled, fixed, **options, mask=mask)
        assert torch.equal(prepared(fixed, mask), theirs) or (read and theirs.isnan())
    assert BACKEND == "triton" or kinds == {False, True}


@pytest.mark.parametrize(
    ("options", "fixed"), [({}, None), ({}, "a"), ({"norm": "x"}, torch.rand(1, 1, 4, 5))]
)
def test_prepare_refuses_at_once(options, fixed):
    with pytest.raises((TypeError, ValueError), match=r"fastreg::mind_loss: (fixed|norm) must"):
        fastreg.nn.MINDLoss(**options).prepare(fixed)


@pytest.mark.parametrize("loss", [fastreg.mind_loss, fastreg.lcc_loss, fastreg.mse_loss])
def test_mask_with_a_gradient_is_refused_under_vmap(loss):
    images, mask = torch.rand(2, 1, 1, 9, 9), torch.rand(2, 1, 1, 9, 9, requires_grad=True)
    with pytest.raises(ValueError, match="mask must not require a gradient"):
        torch.vmap(lambda f, m: loss(f, f, mask=m))(images, mask)


def opcheck(dtype):
    ops, (fixed, moved) = torch.ops.fastreg, pair(size((2, 2, 4, 5, 6), (2, 2, 2, 3, 4)), dtype)
    f, m, options = fixed.detach(), moved.detach(), tuple(OPTIONS.values())
    mean = ops.mind_mean_variance(f, None, *options)
    mask = make_mask(f.shape)
    yield ops.mind_map.default, (fixed, moved, None, mask, *options, "l2")
    grad = torch.rand_like(ops.mind_map(f, m, mean, mask, *options, "l1"))
    yield ops.mind_map_bwd.default, (grad, f, m, mean, mask, *options, "l1", True, False)
    for weights in (None, mask):
        # The unit gradients it also returns have no derivative: asking for one raises.
        arguments = (fixed, m, mean, weights, *options, "l2", True, False)
        yield ops.mind_loss.default, arguments, ("test_schema", "test_faketensor")


def case(masked=False, empty=math.nan, **options):
    def made(n, spatial, dtype):
        images = pair((n, 2, *spatial), dtype)
        return (*images, torch.rand(n, 1, *spatial).to(dtype)) if masked else images

    return Case(lambda f, m, mask=None: fastreg.mind_loss(f, m, mask=mask, **options), made, empty)


def prepared(options, norm, reduction):
    """The mean that bounds V counts as a constant, so it is given."""

    def call(fixed, moved):
        mean = torch.full((len(fixed),), 1e-3, dtype=torch.float64)
        return mind_loss_prepared(fixed, mean, moved, **options, norm=norm, reduction=reduction)

    return Case(
        call,
        lambda n, spatial, dtype: (make((n, 1, *spatial), dtype), make((n, 1, *spatial), dtype).detach()),
    )


VALID = {"fixed": torch.zeros(1, 1, 4, 5, 6), "moved": torch.zeros(1, 1, 4, 5, 6)}
ERRORS = [
    (TypeError, "fixed must be fp64, fp32, fp16 or bf16, got torch.int16", {"fixed": torch.zeros(1, 1, 4, 5, 6).short()}),
    (ValueError, r"fixed must have shape \(N, C, D, H, W\) or \(N, C, H, W\), got \(4, 5, 6\)", {"fixed": torch.zeros(4, 5, 6)}),
    (ValueError, "fixed must have at least one channel", dict.fromkeys(("fixed", "moved"), torch.zeros(1, 0, 4, 5, 6))),
    (ValueError, r"moved must have the shape \(1, 1, 4, 5, 6\) of fixed, got \(1, 1, 4, 5, 7\)", {"moved": torch.zeros(1, 1, 4, 5, 7)}),
    (ValueError, r"mask must have shape \(1, 1, 4, 5, 6\), got \(1, 4, 5, 6\)", {"mask": torch.zeros(1, 4, 5, 6)}),
    (ValueError, "mask must not require a gradient", {"mask": torch.zeros(1, 1, 4, 5, 6, requires_grad=True)}),
    (TypeError, "radius must be an int, got 1.0", {"radius": 1.0}),
    (TypeError, "dilation must be an int, got True", {"dilation": True}),
    (ValueError, "radius must be at least 0, got -1", {"radius": -1}),
    (ValueError, "dilation must be at least 1, got 0", {"dilation": 0}),
    (ValueError, "neighbourhood must be 'ssc' or 'six', got 'eight'", {"neighbourhood": "eight"}),
    (ValueError, "patch must be 'box' or 'gaussian', got 'round'", {"patch": "round"}),
    (ValueError, "sigma must be a number > 0", {"patch": "gaussian", "sigma": 0}),
    (ValueError, "norm must be 'l2' or 'l1', got 2", {"norm": 2}),
    (ValueError, "reduction must be 'mean' or 'sum' or 'none', got None", {"reduction": None}),
]  # fmt: skip

CONTRACT = Contract(
    cases={
        "ssc": case(radius=1),
        "six-masked": case(True, 0.0, **F3RNET, norm="l1", reduction="sum"),
        "map": case(reduction="none"),
        "map-masked": case(True, **F3RNET, reduction="none"),
    },
    valid=VALID,
    errors=ERRORS,
    opcheck=opcheck,
    gradcheck={
        f"{name}-{norm}-{reduction}": prepared(options, norm, reduction)
        for (name, options), norm, reduction in itertools.product(
            (("ssc", OPTIONS), ("six", F3RNET)), ("l2", "l1"), ("mean", "none")
        )
    },
    double_backward=False,
    layouts=True,
    vmap=True,
    compiled=True,
    empty_batch=True,
    empty_axes=True,
    empty_channels="refused",
    repeats=True,
    tolerance=1e-6,
    large=LARGE,
)
