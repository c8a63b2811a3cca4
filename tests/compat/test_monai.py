"""fastreg.compat.monai against MONAI where it is installed, and against formulas and stored numbers everywhere."""

import pytest
import torch
from torch.testing import assert_close

from fastreg import warp
from fastreg.compat import monai as ours

DTYPES = (torch.float64, torch.float32)
SHAPES = ((7, 9), (6, 7, 8))


def close(a, b):
    """fp64 to 2e-6 of the largest value: their windows, bins and sizes are fp32."""
    size = b.detach().abs().max().item()
    assert_close(a, b, atol=size * (2e-6 if a.dtype == torch.float64 else 1e-4), rtol=0)


def both(a, b, *tensors):
    """Values and gradients of two modules."""
    results = []
    for module in (a, b):
        inputs = [t.clone().requires_grad_() for t in tensors]
        out = module(*inputs)
        weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for x, y in zip(*results, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        close(x, y)


def images(shape, dtype, channels=2, n=2):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, n, channels, *shape, generator=generator, dtype=dtype)


def field(shape, dtype, size=1.0):
    generator = torch.Generator().manual_seed(1)
    return size * torch.randn(2, len(shape), *shape, generator=generator, dtype=dtype)


@pytest.fixture(scope="module")
def losses():
    return pytest.importorskip("monai.losses")


@pytest.fixture(scope="module")
def blocks():
    return pytest.importorskip("monai.networks.blocks")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": 5, "kernel_type": "triangular"},
        {"kernel_size": 7, "kernel_type": "gaussian", "smooth_nr": 1e-3, "smooth_dr": 1e-2},
    ],
)
def test_lncc_is_theirs(losses, dtype, shape, reduction, options):
    make = dict(options, spatial_dims=len(shape), reduction=reduction)
    name = "LocalNormalizedCrossCorrelationLoss"
    both(getattr(losses, name)(**make), getattr(ours, name)(**make), *images(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9,), *SHAPES])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ["BendingEnergyLoss", "DiffusionLoss"])
def test_regularisers_are_theirs(losses, dtype, shape, reduction, normalize, name):
    theirs, mine = (getattr(m, name)(normalize=normalize, reduction=reduction) for m in (losses, ours))
    both(theirs, mine, field(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(40,), *SHAPES])
def test_mutual_information_is_theirs(losses, dtype, reduction, shape):
    make = {"reduction": reduction, "num_bins": 11}
    pair = images(shape, dtype, channels=1) * 1.2 - 0.1  # some beyond [0, 1]
    both(
        losses.GlobalMutualInformationLoss(**make),
        ours.GlobalMutualInformationLoss(**make),
        *pair,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options", [{}, {"padding_mode": "zeros"}, {"padding_mode": "reflection"}, {"mode": "nearest"}]
)
def test_warps_are_theirs(blocks, dtype, shape, options):
    both(blocks.Warp(**options), ours.Warp(**options), images(shape, dtype)[0], field(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"num_steps": 2, "padding_mode": "border"}, {"mode": "nearest"}])
def test_integration_is_theirs(blocks, dtype, shape, options):
    both(blocks.DVF2DDF(**options), ours.DVF2DDF(**options), field(shape, dtype))


@pytest.mark.parametrize(
    ("name", "options", "shapes"),
    [
        ("LocalNormalizedCrossCorrelationLoss", {"spatial_dims": 4}, ()),
        ("LocalNormalizedCrossCorrelationLoss", {"kernel_size": 4}, ()),
        ("LocalNormalizedCrossCorrelationLoss", {"kernel_type": "square"}, ()),
        ("LocalNormalizedCrossCorrelationLoss", {"reduction": "max"}, ()),
        ("LocalNormalizedCrossCorrelationLoss", {}, [(1, 1, 5, 5)] * 2),
        ("LocalNormalizedCrossCorrelationLoss", {}, [(1, 1, 5, 5, 5), (1, 1, 5, 5, 6)]),
        ("GlobalMutualInformationLoss", {"num_bins": 0}, ()),
        ("GlobalMutualInformationLoss", {"kernel_type": "box"}, ()),
        ("GlobalMutualInformationLoss", {}, [(1, 1, 5, 5), (1, 1, 5, 6)]),
        ("BendingEnergyLoss", {}, [(1, 2, 2, 5)]),
        ("BendingEnergyLoss", {}, [(1, 3, 5, 5)]),
        ("DiffusionLoss", {}, [(1, 2, 5, 2)]),
        ("DiffusionLoss", {}, [(2, 5)]),
        ("DiffusionLoss", {"reduction": None}, ()),
        ("Warp", {}, [(1, 1, 5), (1, 1, 5)]),
        ("Warp", {}, [(1, 1, 5, 5), (1, 3, 5, 5)]),
        ("DVF2DDF", {"num_steps": 0}, ()),
    ],
)
def test_what_theirs_refuses_is_refused(name, options, shapes):
    def call(module):
        made = getattr(module, name)(**options)
        made(*(torch.zeros(s) for s in shapes))

    with pytest.raises((ValueError, NotImplementedError), match=r"fastreg::compat\.monai") as mine:
        call(ours)
    try:
        from monai import losses
        from monai.networks import blocks
    except ImportError:
        return
    theirs = blocks if hasattr(blocks, name) else losses
    with pytest.raises((ValueError, NotImplementedError)) as other:
        call(theirs)
    assert isinstance(mine.value, other.type)


@pytest.mark.parametrize(
    ("name", "options"),
    [("Warp", {"jitter": True}), ("GlobalMutualInformationLoss", {"kernel_type": "b-spline"})]
    + [("GlobalMutualInformationLoss", {k: 0.25}) for k in ("sigma_ratio", "smooth_nr", "smooth_dr")],
)
def test_what_is_not_built_says_so(name, options):
    with pytest.raises(NotImplementedError, match=r"fastreg::compat\.monai"):
        getattr(ours, name)(**options)


@pytest.mark.parametrize("options", [{"kernel_size": 3, "kernel_type": "triangular"}, {"kernel_size": 1}])
def test_a_window_of_one_voxel_warns(options):
    with pytest.warns(UserWarning, match="one voxel"):
        ours.LocalNormalizedCrossCorrelationLoss(**options)


def test_regularisers_by_formula():
    x = torch.arange(6.0, dtype=torch.float64)
    u = torch.stack([torch.zeros(6, 6).double(), x.square().expand(6, 6)])[
        None
    ]  # u_x = x^2: u'' = 2, u' = 2 x
    assert ours.BendingEnergyLoss()(u) == 2
    assert ours.BendingEnergyLoss(reduction="sum")(u) == 2 * 2 * 16
    assert_close(ours.BendingEnergyLoss(normalize=True)(u), torch.tensor(2.0 * 36).double())
    slopes = (2 * x[1:-1]).square()
    assert_close(ours.DiffusionLoss()(u), slopes.mean() / 2)
    assert_close(ours.DiffusionLoss(reduction="none")(u)[0, 1], slopes.expand(4, 4))


def test_lncc_by_formula():
    """One window of 3 x 3 inside a 5 x 5 image, its sums by hand; the rest by the layout."""
    pred, target = images((5, 5), torch.float64, channels=2)
    loss = ours.LocalNormalizedCrossCorrelationLoss(spatial_dims=2, reduction="none")
    per_channel = loss(pred, target)
    assert per_channel.shape == pred.shape
    p, t = (x[0, 1, 1:4, 1:4] - x[0, 1, 1:4, 1:4].mean() for x in (pred, target))
    expected = -((p * t).sum() ** 2) / (p.square().sum() * t.square().sum())
    assert_close(per_channel[0, 1, 2, 2], expected)
    mean = ours.LocalNormalizedCrossCorrelationLoss(spatial_dims=2)(pred, target)
    assert_close(mean, per_channel.mean())


def test_flat_windows_count_as_nothing():
    image = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0)) * 255
    image[..., 12:] = 200.0
    value = ours.LocalNormalizedCrossCorrelationLoss(spatial_dims=2, kernel_size=5)(image, image)
    assert -1 <= value < -0.5


def test_defaults_of_the_warps():
    image, u = torch.ones(1, 1, 4, 4), torch.full((1, 2, 4, 4), 9.0)
    assert_close(ours.Warp()(image, u), image)  # border
    assert ours.Warp(padding_mode="zeros")(image, u).count_nonzero() == 0
    v = field((8, 8), torch.float64)
    expected = v / 2**7
    for _ in range(7):
        expected = expected + warp(expected, expected)  # zeros
    assert_close(ours.DVF2DDF()(v), expected)
