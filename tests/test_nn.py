import inspect
import pickle

import pytest
import torch

import fastreg
from fastreg import nn

FIXED, MOVED = torch.rand(2, 1, 6, 7, 8), torch.rand(2, 1, 6, 7, 8)
MASK, U = torch.rand(2, 1, 6, 7, 8), torch.randn(2, 3, 6, 7, 8)
CASES = [
    pytest.param(
        nn.Warp(mode="nearest", padding="border"),
        fastreg.warp,
        (MOVED, U),
        {"mode": "nearest", "padding": "border"},
        id="warp-options",
    ),
    pytest.param(
        nn.WarpCoarse(padding="border"),
        fastreg.warp_coarse,
        (MOVED, U[..., ::2]),
        {"padding": "border"},
        id="warp-coarse",
    ),
    pytest.param(nn.Compose(padding="zeros"), fastreg.compose, (U, -U), {"padding": "zeros"}, id="compose"),
    pytest.param(
        nn.IntegrateVelocity(3, checkpoint=True),
        fastreg.integrate_velocity,
        (U, 3),
        {"checkpoint": True},
        id="integrate-options",
    ),
    pytest.param(
        nn.ResizeDisplacement((3, 9, 4)), fastreg.resize_displacement, (U, (3, 9, 4)), {}, id="resize"
    ),
    pytest.param(
        nn.ResizeDisplacement((3, 9, 4), align_corners=False, scale=2),
        fastreg.resize_displacement,
        (U, (3, 9, 4)),
        {"align_corners": False, "scale": 2},
        id="resize-options",
    ),
    pytest.param(nn.Smooth(1.5), fastreg.smooth, (U, 1.5), {}, id="smooth"),
    pytest.param(
        nn.Smooth(sigma=0.5, padding="zeros"),
        fastreg.smooth,
        (U, 0.5),
        {"padding": "zeros"},
        id="smooth-options",
    ),
    pytest.param(
        nn.AffineDisplacement((4, 5, 6)),
        fastreg.affine_displacement,
        (torch.randn(2, 3, 4), (4, 5, 6)),
        {},
        id="affine",
    ),
    pytest.param(
        nn.BSplineDisplacement(4, (10, 11, 12), order=2),
        fastreg.bspline_displacement,
        (torch.randn(2, 3, 5, 5, 5), 4, (10, 11, 12), 2),
        {},
        id="bspline",
    ),
    pytest.param(
        nn.GaussianDisplacement((10, 11), sigma_is="var"),
        fastreg.gaussian_displacement,
        (torch.rand(2, 3, 7), (10, 11)),
        {"sigma_is": "var"},
        id="gaussian",
    ),
    pytest.param(
        nn.LocalCorrelation(1, normalize=True),
        lambda f, m, u: fastreg.local_correlation(f, m, 1, displacement=u, normalize=True),
        (FIXED, MOVED, U),
        {},
        id="correlation-options",
    ),
    pytest.param(
        nn.CostVolume((2, 3, 4), 1, stride=2),
        fastreg.cost_volume,
        (FIXED, MOVED, (2, 3, 4), 1),
        {"stride": 2},
        id="cost-volume",
    ),
    pytest.param(
        nn.LCCLoss(5, reduction="none"),
        fastreg.lcc_loss,
        (FIXED, MOVED, 5),
        {"reduction": "none"},
        id="lcc-options",
    ),
    pytest.param(
        nn.MINDLoss(radius=1, neighbourhood="six", norm="l1"),
        fastreg.mind_loss,
        (FIXED, MOVED),
        {"radius": 1, "neighbourhood": "six", "norm": "l1"},
        id="mind-loss-options",
    ),
    pytest.param(
        nn.MSELoss(reduction="sum"), fastreg.mse_loss, (FIXED, MOVED), {"reduction": "sum"}, id="mse-sum"
    ),
    pytest.param(
        nn.Diffusion(norm="l1", spacing=2.0),
        fastreg.diffusion,
        (U,),
        {"norm": "l1", "spacing": 2.0},
        id="diffusion-options",
    ),
    pytest.param(
        nn.TotalVariation(isotropic=True, spacing=2.0),
        fastreg.total_variation,
        (U,),
        {"isotropic": True, "spacing": 2.0},
        id="tv-options",
    ),
    pytest.param(
        nn.BendingEnergy(spacing=2.0), fastreg.bending_energy, (U,), {"spacing": 2.0}, id="bending-options"
    ),
]


@pytest.mark.parametrize("name", nn.__all__)
def test_is_the_function_as_it_is_by_default(name):
    module = getattr(nn, name)
    needed = [p for p in inspect.signature(module).parameters.values() if p.default is p.empty]
    if needed:
        assert name in {type(case.values[0]).__name__ for case in CASES}
        return
    images = {"fixed": FIXED, "moved": MOVED, "moving": MOVED, "image": MOVED}
    required = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    tensors = [images.get(p.name, U) for p in required if p.name != "self"]
    assert torch.equal(module()(*tensors), module.op(*tensors))
    assert torch.equal(pickle.loads(pickle.dumps(module()))(*tensors), module.op(*tensors))


@pytest.mark.parametrize(("module", "function", "args", "options"), CASES)
def test_is_the_function(module, function, args, options):
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    assert torch.equal(module(*tensors), function(*args, **options))
    assert torch.equal(pickle.loads(pickle.dumps(module))(*tensors), function(*args, **options))


@pytest.mark.parametrize(
    ("module", "function"), [(nn.LCCLoss(5), fastreg.lcc_loss), (nn.MSELoss(), fastreg.mse_loss)]
)
def test_mask(module, function):
    options = {"window": 5} if function is fastreg.lcc_loss else {}
    expected = function(FIXED, MOVED, mask=MASK, **options)
    assert not torch.equal(expected, function(FIXED, MOVED, **options))
    assert torch.equal(module(FIXED, MOVED, MASK), expected)
    assert torch.equal(module(FIXED, moved=MOVED, mask=MASK), expected)


def test_affine():
    matrix = torch.eye(3, 4).expand(2, 3, 4) * 1.1
    expected = fastreg.warp(MOVED, U, affine=matrix, padding="border")
    assert torch.equal(nn.Warp(padding="border")(MOVED, U, matrix), expected)
    assert torch.equal(nn.Warp()(MOVED, None, affine=matrix), fastreg.warp(MOVED, None, affine=matrix))


def test_gradients_and_compile():
    step = torch.nn.Sequential(nn.Smooth(0.8), nn.Diffusion())
    u = U.clone().requires_grad_()
    expected = torch.autograd.grad(fastreg.diffusion(fastreg.smooth(u, 0.8)), u)[0]
    assert torch.equal(torch.autograd.grad(step(u), u)[0], expected)
    assert torch.equal(torch.autograd.grad(torch.compile(step, fullgraph=True)(u), u)[0], expected)


def test_signature_and_repr():
    assert list(inspect.signature(nn.Smooth).parameters) == ["sigma", "padding", "truncate"]
    assert repr(nn.Warp(padding="border")) == "Warp(padding='border')"


def test_errors():
    with pytest.raises(
        TypeError, match=r"Warp: got .* keyword argument 'pading'; its options: mode, padding$"
    ):
        nn.Warp(pading="border")
    with pytest.raises(TypeError, match="missing a required argument: 'sigma'"):
        nn.Smooth()
    with pytest.raises(TypeError, match="Warp takes image, displacement, affine, got 4 tensors"):
        nn.Warp()(MOVED, U, None, U)
    with pytest.raises(ValueError, match="fastreg::warp: padding must be"):
        nn.Warp(padding="wrap")(MOVED, U)
