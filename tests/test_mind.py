import itertools

import numpy as np
import pytest
import torch
from common import assert_close
from scipy import ndimage

import fastreg
from fastreg.ops.mind import _descriptors, _distances, channels, mind_map_ref, mind_ref

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
# Rows longer than a vector and shorter, several samples and channels, axes of one voxel, patches beyond the image.
SHAPES = [
    pytest.param((2, 1, 9, 10, 37), id="n2d9h10w37"),
    pytest.param((1, 3, 7, 12, 11), id="c3d7h12w11"),
    pytest.param((2, 2, 15, 40), id="n2c2h15w40"),
    pytest.param((1, 1, 1, 6, 18), id="d1"),
    pytest.param((1, 1, 6, 1, 17), id="h1"),
    pytest.param((1, 1, 5, 4, 1), id="w1"),
    pytest.param((1, 1, 3, 2, 4), id="d3h2w4"),
    pytest.param((1, 1, 2, 3), id="h2w3"),
]


def make(shape, dtype=torch.float64):
    return torch.rand(shape).to(dtype).requires_grad_()


def pair(shape, dtype=torch.float64):
    fixed = torch.rand(shape)
    return fixed.to(dtype).requires_grad_(), (fixed + 0.3 * torch.rand(shape)).to(dtype).requires_grad_()


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
    expected = torch.from_numpy(with_scipy(image.detach().numpy(), **options))
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
    for options, shape in ((OPTIONS, (1, 1, 3, 4, 5)), (F3RNET, (2, 2, 4, 5))):
        # Finite differences move the mean that bounds V, which counts as a constant: given, not computed.
        image = make(shape)
        mean = torch.full((shape[0],), 1e-3, dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda x, o=options, m=mean: _descriptors(x, m, *o.values()), image, fast_mode=True
        )


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("options", SETTINGS[:2])
def test_prepared(options, norm):
    fixed, moved = pair((2, 1, 9, 10, 20), torch.float32)
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
