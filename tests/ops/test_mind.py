import itertools

import numpy as np
import pytest
import torch
from common import BACKEND, DTYPES, assert_close, check_against_reference, double, layouts
from scipy import ndimage

import fastreg
from fastreg.ops.mind import _distances, channels, descriptors, mind_mean_variance_ref, mind_ref
from fastreg.ops.mind_loss import mind_loss_prepared, mind_map_ref

OPTIONS = {"radius": 2, "dilation": 2, "neighbourhood": "ssc", "patch": "box", "sigma": 0.5}
F3RNET = {"radius": 1, "dilation": 1, "neighbourhood": "six", "patch": "gaussian", "sigma": 0.5}
SETTINGS = [
    pytest.param(OPTIONS, id="ssc"),
    pytest.param(F3RNET, id="f3rnet"),
    pytest.param(
        OPTIONS | {"radius": 1, "dilation": 3, "patch": "gaussian", "sigma": 1.5}, id="ssc-gaussian"
    ),
    pytest.param(OPTIONS | {"radius": 0, "dilation": 1}, id="ssc-r0"),
    pytest.param(OPTIONS | {"radius": 3, "neighbourhood": "six"}, id="six-r3"),
]
# One tile and several along each axis, several samples and channels, axes of one voxel, patches beyond the image.
SHAPES = [
    pytest.param((2, 1, 9, 10, 37), id="n2d9h10w37"),
    pytest.param((1, 3, 7, 12, 11), id="c3d7h12w11"),
    pytest.param((1, 1, 17, 26, 9), id="d17h26w9"),
    pytest.param((1, 1, 2, 3, 101), id="d2h3w101"),
    pytest.param((2, 2, 15, 40), id="n2c2h15w40"),
    pytest.param((1, 1, 70, 7), id="h70w7"),
    pytest.param((1, 1, 1, 6, 18), id="d1"),
    pytest.param((1, 1, 6, 1, 17), id="h1"),
    pytest.param((1, 1, 5, 4, 1), id="w1"),
    pytest.param((1, 1, 3, 2, 4), id="d3h2w4"),
    pytest.param((1, 1, 2, 3), id="h2w3"),
]
# Interpreted kernels take a millisecond a statement: the same edges, of their tiles, in few of them.
INTERPRETED = BACKEND == "triton"
if INTERPRETED:
    SHAPES = [
        pytest.param((1, 1, 1, 9, 33), id="d1h9w33"),
        pytest.param((1, 2, 3, 4, 5), id="c2d3h4w5"),
        pytest.param((2, 1, 2, 1, 3), id="n2d2h1w3"),
        pytest.param((1, 1, 17, 2, 1), id="d17h2w1"),
        pytest.param((2, 2, 2, 257), id="n2c2h2w257"),
        pytest.param((1, 1, 18, 3), id="h18w3"),
    ]


def size(shape, interpreted):
    return interpreted if INTERPRETED else shape


def make(shape, dtype=torch.float64):
    return torch.rand(shape).to(dtype).requires_grad_()


def pair(shape, dtype=torch.float64):
    fixed = torch.rand(shape)
    moved = fixed + 0.3 * torch.rand(shape)
    return fixed.to(dtype).requires_grad_(), moved.to(dtype).requires_grad_()


def make_mask(shape):
    mask = torch.rand(shape[0], 1, *shape[2:])
    mask[mask < 0.3] = 0
    mask.view(-1)[0] = 0.5
    return mask


def reference(options):
    return lambda image: mind_ref(image, *options.values())


def loss_reference(options, norm="l2", mask=None, reduction="mean"):
    def loss(fixed, moved):
        error = mind_map_ref(fixed, moved, None, *options.values(), norm)
        if reduction == "none":
            return error if mask is None else error * mask.double()
        n_channels = len(channels(options["neighbourhood"], fixed.dim() - 2))
        weight = torch.ones_like(error) if mask is None else mask.double()
        total = n_channels * (error * weight).sum()
        return total if reduction == "sum" else total / (n_channels * weight.sum())

    return loss


def with_scipy(image, radius, dilation, neighbourhood, patch, sigma):
    """The formula in numpy, sample by sample, patches by scipy; the 3D pairs typed from the definition."""
    z, y, x = np.eye(3, dtype=int)
    pairs = {
        ("ssc", 3): [(z, -y), (y, -z), (-y, -z), (y, z), (-y, -x), (y, x), (-x, -z), (z, x), (y, -x), (x, -y), (z, -x), (x, -z)],
        ("six", 3): [(0 * z, s * e) for e in (z, y, x) for s in (-1, 1)],
        ("ssc", 2): [(-y, -x), (x, -y), (y, -x), (x, y)],
        ("six", 2): [(0 * y, s * e) for e in (y, x) for s in (-1, 1)],
    }  # fmt: skip
    nd = image.ndim - 2
    k = np.arange(-radius, radius + 1)
    weights = np.exp(-(k**2) / (2 * sigma**2)) if patch == "gaussian" else np.ones(2 * radius + 1)
    weights = weights / weights.sum()
    descriptors = []
    for sample in image:
        distances = []
        for a, b in pairs[neighbourhood, nd]:
            moved = []
            for offset in (a, b):
                shifted = sample
                for axis in range(nd):
                    index = np.arange(sample.shape[axis + 1]) + dilation * offset[3 - nd + axis]
                    shifted = np.take(shifted, index, axis + 1, mode="clip")
                moved.append(shifted)
            difference = ((moved[0] - moved[1]) ** 2).sum(0)
            for axis in range(nd):
                difference = ndimage.correlate1d(difference, weights, axis, mode="nearest")
            distances.append(difference)
        d = np.stack(distances)
        least = d - d.min(0)
        v = (least if neighbourhood == "ssc" else d).mean(0)
        v = np.clip(
            v, max(1e-3 * v.mean(), np.finfo(d.dtype).tiny), max(1e3 * v.mean(), np.finfo(d.dtype).tiny)
        )
        descriptors.append(np.exp(-least / v))
    return np.stack(descriptors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", SETTINGS)
def test_reference_is_the_definition(shape, options):
    image = make(shape)
    with torch.no_grad():
        image[..., : shape[-1] // 2] *= 1e-3  # V below its bound there
    expected = torch.from_numpy(with_scipy(image.detach().cpu().numpy(), **options))
    assert_close(reference(options)(image), expected, 1e-9)


def test_one_voxel_by_hand():
    """Distances by loops straight from the formula, border voxels included."""
    image = make((1, 2, 4, 5, 6)).detach()
    d = _distances(image, 1, 2, "ssc", "box", 0.5)
    size = (4, 5, 6)

    def clamp(p):
        return tuple(min(max(i, 0), n - 1) for i, n in zip(p, size, strict=True))

    for p in ((0, 0, 0), (2, 2, 3), (3, 4, 5), (0, 4, 2)):
        for k, (a, b) in enumerate(channels("ssc", 3)):
            total = 0.0
            for q in itertools.product((-1, 0, 1), repeat=3):
                centre = clamp([i + j for i, j in zip(p, q, strict=True)])
                at = [clamp([i + 2 * j for i, j in zip(centre, o, strict=True)]) for o in (a, b)]
                total += ((image[(0, slice(None), *at[0])] - image[(0, slice(None), *at[1])]) ** 2).sum() / 27
            assert abs(d[(0, k, *p)] - total) < 1e-12


@pytest.mark.parametrize(("radius", "dilation"), [(2, 2), (1, 2), (0, 1), (3, 1)])
def test_same_numbers_as_convexadam(radius, dilation):
    peer = pytest.importorskip("convexAdam.convex_adam_utils").MINDSSC
    image = make((1, 1, 13, 12, 11))
    torch.set_default_dtype(torch.float64)
    try:
        theirs = peer(image, radius, dilation, "cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    ours = reference(OPTIONS | {"radius": radius, "dilation": dilation})(image)
    assert_close(ours, theirs, 1e-9)
    weight = torch.randn(ours.shape, dtype=torch.float64)
    # Theirs lets nothing flow through the bounds of V either: it reads them with .item().
    assert_close(
        *(torch.autograd.grad((o * weight).sum(), image, retain_graph=True)[0] for o in (ours, theirs)), 1e-8
    )


def test_reference_gradient():
    for options, shape in ((OPTIONS, size((1, 1, 3, 4, 5), (1, 1, 4, 3))), (F3RNET, (2, 2, 4, 5))):
        # Finite differences move the mean that bounds V, which counts as a constant: given, not computed.
        image = make(shape)
        mean = torch.full((shape[0],), 1e-3, dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda x, o=options, m=mean: descriptors(x, m, *o.values()), image, fast_mode=True
        )


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


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def testdescriptors(shape, options):
    check_against_reference(lambda x: fastreg.mind(x, **options), reference(options), (make(shape),))
    image = make(shape).detach()
    assert_close(
        torch.ops.fastreg.mind_mean_variance(image, *options.values()),
        mind_mean_variance_ref(image, *options.values()),
    )


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


def test_offset_and_scale_change_nothing():
    image = (256 * torch.rand(size((1, 1, 9, 10, 20), (1, 1, 4, 5, 20)))).round()
    expected = fastreg.mind(image)
    assert torch.equal(fastreg.mind(image + 1024), expected)
    assert torch.equal(fastreg.mind(8 * image), expected)


def test_equal_minima_share():
    """Images of few values tie; the reference is torch.amin, which shares evenly."""
    image = (3 * torch.rand(2, 1, 4, 7, 20)).floor().double().requires_grad_()
    weight = torch.rand(2, 12, 4, 7, 20, dtype=torch.float64)
    options = OPTIONS | {"radius": 0, "dilation": 1}
    grads = [
        torch.autograd.grad((d * weight).sum(), image)[0]
        for d in (fastreg.mind(image, **options), reference(options)(image))
    ]
    assert_close(*grads)


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


def test_statistics_are_of_a_sample():
    images = make(size((3, 2, 9, 10, 11), (3, 2, 3, 4, 5))).detach() * torch.tensor([1.0, 100.0, 1e-3]).view(
        3, 1, 1, 1, 1
    )
    for sample in range(3):
        assert torch.equal(fastreg.mind(images)[sample], fastreg.mind(images[sample : sample + 1])[0])


def test_half_squares_do_not_overflow():
    image = torch.where(torch.rand(1, 1, 9, 10, 11) > 0.5, 60000.0, -60000.0)
    assert_close(fastreg.mind(image.half()), reference(OPTIONS)(image.double()))
    # Squares beyond the arithmetic type make the sample NaN.
    assert fastreg.mind(1e18 * image).isnan().all()


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


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    for options, shape in ((OPTIONS, size((1, 1, 3, 4, 5), (1, 1, 4, 3))), (F3RNET, (2, 2, 4, 5))):
        # The mean that bounds V counts as a constant, so it is given.
        mean = torch.full((shape[0],), 1e-3, dtype=torch.float64)
        moved = make(shape).detach()
        for norm in ("l2", "l1"):
            assert torch.autograd.gradcheck(
                lambda f, o=options, k=mean, m=moved, n=norm: mind_loss_prepared(
                    f, k, m, **o, norm=n, reduction=reduction
                ),
                make(shape),
                fast_mode=True,
            )


@pytest.mark.parametrize("shape", [size((2, 2, 5, 6, 17), (2, 2, 2, 3, 4)), (2, 2, 8, 9)])
def test_layouts(shape):
    fixed, moved = (x.detach() for x in pair(shape, torch.float32))
    mask = make_mask(shape)
    plain = [x.clone().requires_grad_() for x in (fixed, moved)]

    def run(f, m, k):
        return (
            fastreg.mind_loss(f, m, mask=k, reduction="sum"),
            fastreg.mind_loss(f, m, mask=k, reduction="none"),
            fastreg.mind(f),
        )

    expected = run(*plain, mask)
    expected_grads = torch.autograd.grad(sum(x.sum() for x in expected), plain)
    for name in layouts(fixed):
        inputs = [layouts(x)[name].requires_grad_() for x in (fixed, moved)]
        outputs = run(*inputs, layouts(mask)[name])
        grads = torch.autograd.grad(sum(x.sum() for x in outputs), inputs)
        for ours, theirs in zip((*outputs, *grads), (*expected, *expected_grads), strict=True):
            assert_close(ours, theirs.double(), 1e-6, floor=1)


def test_deterministic():
    """Tiles whose gradients overlap, on one and several threads."""
    for shape, options in (
        (size((2, 1, 26, 27, 30), (2, 1, 1, 3, 10)), OPTIONS),
        (size((1, 1, 200, 40), (1, 1, 20, 4)), OPTIONS | {"radius": 1}),
    ):
        fixed, moved = pair(shape, torch.float32)
        results = []
        for threads in (1, 2) if INTERPRETED else (1, 2, 3, 2):
            torch.set_num_threads(threads)
            loss, descriptors = fastreg.mind_loss(fixed, moved, **options), fastreg.mind(fixed, **options)
            results.append(
                (loss, descriptors, *torch.autograd.grad(loss + descriptors.sum(), (fixed, moved)))
            )
        torch.set_num_threads(2)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_mixed_dtypes_are_promoted():
    fixed, moved = pair(size((1, 1, 8, 8, 8), (1, 1, 3, 4, 5)))
    f, m = fixed.detach().bfloat16().requires_grad_(), moved.detach().float().requires_grad_()
    loss = fastreg.mind_loss(f, m)
    assert torch.equal(loss, fastreg.mind_loss(f.float(), m))
    assert [g.dtype for g in torch.autograd.grad(loss, (f, m))] == [torch.bfloat16, torch.float32]


def test_empty():
    fixed = torch.zeros(0, 1, 4, 5, 6, requires_grad=True)
    assert fastreg.mind(fixed).shape == (0, 12, 4, 5, 6)
    assert fastreg.mind_loss(fixed, fixed.detach()).isnan()  # the mean of nothing
    assert fastreg.mind_loss(fixed, fixed.detach(), reduction="none").shape == (0, 1, 4, 5, 6)
    loss = fastreg.mind_loss(fixed, fixed.detach(), reduction="sum")
    assert loss == 0
    assert torch.autograd.grad(loss, fixed)[0].shape == fixed.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    fixed, moved = pair(size((2, 2, 4, 5, 6), (2, 2, 2, 3, 4)), dtype)
    f, m = fixed.detach(), moved.detach()
    options, mask = tuple(OPTIONS.values()), make_mask(f.shape)
    ops = torch.ops.fastreg
    mean = ops.mind_mean_variance(f, *options)
    torch.library.opcheck(ops.mind_mean_variance.default, (f, *options))
    torch.library.opcheck(ops.mind.default, (fixed, *options))
    torch.library.opcheck(ops.mind_bwd.default, (torch.rand_like(ops.mind(f, *options)), f, *options))
    torch.library.opcheck(ops.mind_map.default, (fixed, moved, None, *options, "l2"))
    grad = torch.rand_like(ops.mind_map(f, m, mean, *options, "l1"))
    torch.library.opcheck(ops.mind_map_bwd.default, (grad, f, m, mean, *options, "l1", True, False))
    for k in (None, mask):
        torch.library.opcheck(
            ops.mind_loss.default, (fixed, m, mean, k, *options, "l2", True, False),
            # The unit gradients it also returns have no derivative: asking for one raises.
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_compile():
    def step(fixed, moved):
        return (
            fastreg.mind_loss(fixed, moved * 2)
            + fastreg.mind_loss(fixed, moved, reduction="none").mean()
            + fastreg.mind(moved, radius=1).mean()
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for shape in (size((1, 1, 6, 7, 8), (1, 1, 3, 4, 5)), size((1, 1, 9, 8, 7), (1, 1, 4, 3, 2))):
        inputs = pair(shape, torch.float32)
        assert_close(compiled(*inputs), step(*inputs).double())
        expected = torch.autograd.grad(step(*inputs), inputs)
        for grad, true in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
            assert_close(grad, true.double(), floor=0.1)


def test_vmap():
    fixed, moved = pair(size((3, 2, 1, 6, 7), (3, 2, 1, 3, 4)))
    functions = [
        lambda f, m: fastreg.mind_loss(f, m, radius=1),
        lambda f, m: fastreg.mind_loss(f, m, reduction="none"),
        lambda f, m: fastreg.mind(m),
    ]
    for function in functions:
        out = torch.vmap(function)(fixed, moved)
        expected = torch.stack([function(f, m) for f, m in zip(fixed, moved, strict=True)])
        assert_close(out, expected, 1e-12)
        grads, true = (torch.autograd.grad(x.sum(), moved)[0] for x in (out, expected))
        assert_close(grads, true, 1e-9)
        shared = torch.vmap(function, in_dims=(None, 0))(fixed[0], moved)
        assert_close(shared, torch.stack([function(fixed[0], m) for m in moved]), 1e-12)


def test_double_backward_raises():
    fixed, moved = pair((1, 1, 2, 3, 4))
    for result in (
        fastreg.mind_loss(fixed, moved),
        fastreg.mind_loss(fixed, moved, reduction="none").sum(),
        fastreg.mind(moved).sum(),
    ):
        (grad,) = torch.autograd.grad(result, moved, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(grad.sum(), moved)


def test_transforms_without_a_derivative_raise():
    with pytest.raises(RuntimeError, match=r"fastreg::mind: torch\.func\.grad"):
        torch.func.grad(lambda x: fastreg.mind(x).sum())(torch.rand(1, 2, 4, 5))


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
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
    ],
)  # fmt: skip
def test_errors(error, match, change):
    arguments = {"fixed": torch.zeros(1, 1, 4, 5, 6), "moved": torch.zeros(1, 1, 4, 5, 6)} | change
    with pytest.raises(error, match=f"fastreg::mind_loss: {match}"):
        fastreg.mind_loss(arguments.pop("fixed"), arguments.pop("moved"), **arguments)
    with pytest.raises(ValueError, match="fastreg::mind: image must have shape"):
        fastreg.mind(torch.zeros(4, 5, 6))


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


def test_radius_has_a_limit():
    image = torch.rand(1, 1, 5, 20)
    assert fastreg.mind(image, radius=20).isfinite().all()
    with pytest.raises(ValueError, match="radius must be at most the longest axis or 16, got 21"):
        fastreg.mind(image, radius=21)
    assert fastreg.mind(image, patch="gaussian", sigma=1e-170).isfinite().all()


def test_prepared_loss_is_of_the_image_it_saw():
    fixed, moved = (torch.rand(size((1, 1, 8, 9, 10), (1, 1, 3, 4, 5))) for _ in range(2))
    expected = fastreg.mind_loss(fixed, moved)
    buffer = fixed.clone()
    prepared = fastreg.nn.MINDLoss().prepare(buffer)
    buffer.mul_(100)
    assert torch.equal(prepared(moved), expected)


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
