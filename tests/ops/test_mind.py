import itertools

import numpy as np
import pytest
import torch
from common import BACKEND, assert_close, check_against_reference
from contract import Case, Contract
from scipy import ndimage

import fastreg
from fastreg.ops.mind import _distances, channels, descriptors, mind_mean_variance_ref, mind_ref

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


# Tiles whose gradients overlap.
LARGE = ((26, 27, 30), (200, 40))


def size(shape, interpreted):
    return interpreted if INTERPRETED else shape


def make(shape, dtype=torch.float64):
    return torch.rand(shape).to(dtype).requires_grad_()


def reference(options):
    return lambda image: mind_ref(image, *options.values())


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


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_descriptors(shape, options):
    check_against_reference(lambda x: fastreg.mind(x, **options), reference(options), (make(shape),))
    image = make(shape).detach()
    assert_close(
        torch.ops.fastreg.mind_mean_variance(image, None, *options.values()),
        mind_mean_variance_ref(image, None, *options.values()),
    )


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


def test_radius_has_a_limit():
    image = torch.rand(1, 1, 5, 20)
    assert fastreg.mind(image, radius=20).isfinite().all()
    with pytest.raises(ValueError, match="radius must be at most the longest axis or 16, got 21"):
        fastreg.mind(image, radius=21)
    assert fastreg.mind(image, patch="gaussian", sigma=1e-170).isfinite().all()


def opcheck(dtype):
    ops, image = torch.ops.fastreg, make(size((2, 2, 4, 5, 6), (2, 2, 2, 3, 4)), dtype)
    f, options = image.detach(), tuple(OPTIONS.values())
    yield ops.mind_mean_variance.default, (f, None, *options)
    yield ops.mind.default, (image, *options)
    yield ops.mind_bwd.default, (torch.rand_like(ops.mind(f, *options)), f, *options)


def case(options):
    return Case(
        lambda image: fastreg.mind(image, **options),
        lambda n, spatial, dtype: (make((n, 1, *spatial), dtype),),
    )


VALID = {"image": torch.zeros(1, 1, 4, 5, 6)}
ERRORS = [
    (ValueError, r"image must have shape \(N, C, D, H, W\) or \(N, C, H, W\), got \(4, 5, 6\)", {"image": torch.zeros(4, 5, 6)}),
    (ValueError, "image must have at least one channel", {"image": torch.zeros(1, 0, 4, 5, 6)}),
    (ValueError, "radius must be at least 0, got -1", {"radius": -1}),
    (ValueError, "patch must be 'box' or 'gaussian', got 'round'", {"patch": "round"}),
]  # fmt: skip

CONTRACT = Contract(
    cases={"ssc": case(OPTIONS), "six": case(F3RNET)},
    valid=VALID,
    errors=ERRORS,
    opcheck=opcheck,
    gradcheck="the mean that bounds V counts as a constant: test_reference_gradient, test_descriptors",
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
