"""R2N2: weights it starts with, noise, pooling, its parameters, its loss; which image of a series is the fixed one."""

import doctest
import math

import pytest
import torch
from test_models import build, gradients, pair
from torch import nn

import fastreg
from fastreg import gaussian_displacement, smooth
from fastreg.data import fixed_of_series, series
from fastreg.models import R2N2, r2n2

# The weights it starts with


def textures(count, size=96):
    """As R2N2 is given images: mean 0, deviation 1, cut at two."""
    image = smooth(torch.randn(count, 1, size, size), 2.0)
    deviation, mean = torch.std_mean(image, (1, 2, 3), keepdim=True)
    return ((image - mean) / deviation).clamp(-2, 2).split(1)


@torch.no_grad()
def pooled(model, fixed, moving):
    """The vector that shape and motion are read from, in the first step."""
    seen = []
    handle = model.shape.hidden.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(fixed, moving)
    handle.remove()
    return seen[0]


def change(model):
    fixed, first, second = textures(3)
    a, b = (pooled(model, fixed, moving) for moving in (first, second))
    return float((b - a).norm() / a.norm())


def convolutions(model):
    """Those whose weights are the authors' before the activation: all but the GRU's and the positions'."""
    yield model.stem
    for unit in model.units:
        yield from (layer for block in unit.blocks for layer in block)
        yield unit.down


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("seed", range(3))
def test_sees_the_moving_image(preset, seed):
    torch.manual_seed(seed)
    assert change(R2N2.from_preset(preset, steps=1).eval()) > 0.1


def test_with_pytorchs_weights_a_net_of_tanh_is_blind():
    torch.manual_seed(0)
    model = R2N2(steps=1).eval()
    for layer in (*convolutions(model), model.shape.first, *(u.position for u in model.units)):
        layer.reset_parameters()
    assert change(model) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("activation", ["tanh", "leaky_relu"])
def test_weights_it_starts_with(activation):
    torch.manual_seed(0)
    model = R2N2(activation=activation)

    def deviation(layer, gain):
        outputs, inputs, *kernel = layer.weight.shape
        if activation == "tanh":
            return gain * math.sqrt(2 / ((inputs + outputs) * math.prod(kernel)))
        return math.sqrt(2 / (inputs * math.prod(kernel)))

    for layer, gain in (*((c, 5 / 3) for c in convolutions(model)), (model.shape.first, 1)):
        assert float(layer.weight.std()) == pytest.approx(deviation(layer, gain), rel=0.05)
        assert abs(float(layer.weight.mean())) < 0.05 * deviation(layer, gain)
    for unit in model.units:
        width = unit.position.weight.shape[1]
        assert float(unit.position.weight.std()) == pytest.approx(math.sqrt(2 / (width + 1)), rel=0.4)
        # Xavier's of each of the GRU's six, gain 1.
        for layer in (unit.gates.input, unit.gates.state, unit.gates.reset):
            for part in layer.weight.split(width):
                assert float(part.std()) == pytest.approx(1 / math.sqrt(9 * width), rel=0.05)
        assert unit.gates.input.bias.view(3, width).tolist() == [[0.0] * width] * 2 + [[1.0] * width]
    shape = model.shape
    assert not any(t.any() for t in (shape.hidden.bias, shape.out.weight, shape.out.bias))


# Noise


def gru(gates, x, h, times):
    """Equations 10 to 13, with factors of the weights and of the output."""
    wr, wz, w = gates.input.weight.chunk(3)
    ur, uz = gates.state.weight.chunk(2)
    br, bz, b = gates.input.bias.chunk(3)

    def convolved(image, weight, bias=None):
        return nn.functional.conv2d(image, weight, bias, padding=1)

    r = torch.sigmoid(convolved(x, wr, br) + convolved(h, times.get("gates", 1) * ur))
    z = torch.sigmoid(convolved(x, wz, bz) + convolved(h, times.get("gates", 1) * uz))
    u = times.get("candidate U", 1) * gates.reset.weight
    candidate = torch.tanh(convolved(x, times.get("candidate W", 1) * w, b) + convolved(r * h, u))
    return times.get("output", 1) * ((1 - z) * h + z * candidate)


@pytest.mark.parametrize(
    ("noise", "multiplied"),
    [
        ("paper", ("candidate W", "candidate U", "output")),
        ("released", ("gates", "candidate U")),
        ("none", ()),
    ],
)
def test_what_the_noise_multiplies(noise, multiplied, monkeypatch):
    torch.manual_seed(0)
    gates = r2n2._Gates(4, noise).double()
    x, h = torch.randn(2, 2, 4, 5, 6, dtype=torch.float64)
    monkeypatch.setattr(r2n2, "_noisy", lambda t: 3 * t)
    torch.testing.assert_close(gates(x, h), gru(gates, x, h, dict.fromkeys(multiplied, 3)))
    torch.testing.assert_close(gates(x, None), gru(gates, x, 0 * x, dict.fromkeys(multiplied, 3)))
    torch.testing.assert_close(gates.eval()(x, h), gru(gates, x, h, {}))


def test_what_the_noise_is():
    torch.manual_seed(0)
    t = torch.full((100_000,), 2.0)
    first, second = r2n2._noisy(t) / 2, r2n2._noisy(t) / 2
    for factor in (first, second):
        assert float(factor.mean()) == pytest.approx(1, abs=0.02)
        assert float(factor.std()) == pytest.approx(math.sqrt(0.5) / 0.5, rel=0.01)
        assert float(((factor - 1) ** 3).mean()) == pytest.approx(0, abs=0.2)
    # Drawn anew.
    assert abs(float(((first - 1) * (second - 1)).mean())) < 0.02


def test_noise_of_each_step_is_its_own(monkeypatch):
    drawn = []

    def noisy(t):
        drawn.append(t.shape)
        return t

    monkeypatch.setattr(r2n2, "_noisy", noisy)
    fixed, moving = pair("r2n2")
    # 3 steps of 3 units: candidate W and output in each, U from the second on.
    for noise, count in (("paper", 9 * 2 + 6), ("released", 6 * 2), ("none", 0)):
        drawn.clear()
        build("r2n2", noise=noise).train()(fixed, moving)
        assert len(drawn) == count


@pytest.mark.parametrize("noise", ["paper", "released"])
def test_noise_is_of_training_only(noise):
    fixed, moving = pair("r2n2")
    model = build("r2n2", noise=noise)
    assert torch.equal(model(fixed, moving).displacement, model(fixed, moving).displacement)
    model.train()
    first, second = model(fixed, moving), model(fixed, moving)
    assert not torch.equal(first.displacement, second.displacement)
    assert first.displacement.isfinite().all()
    # Recomputed with the noise that was drawn.
    kept, again = (
        gradients(build("r2n2", noise=noise, checkpoint=c).train(), fixed, moving) for c in ("none", "blocks")
    )
    assert all(torch.equal(a, b) for a, b in zip(kept[1], again[1], strict=True))


def test_noise_of_the_presets():
    assert R2N2.from_preset("paper", steps=1).arguments["noise"] == "paper"
    assert R2N2.from_preset("released", steps=1).arguments["noise"] == "released"


# What it says


def test_pooling():
    """A mean is the sum over the pixels of the coarsest map, 3 x 2 for 37 x 26."""
    fixed, moving = pair("r2n2", 2)
    mean, total = (pooled(build("r2n2", pool=p), fixed, moving) for p in ("mean", "sum"))
    torch.testing.assert_close(6 * mean, total)


def test_is_its_parameters():
    model = build("r2n2")
    fixed, moving = pair("r2n2", 2)
    prediction = model(fixed, moving)
    assert prediction.parameters.shape == (2, 3, 7)
    again = gaussian_displacement(prediction.parameters, fixed.shape[2:])
    torch.testing.assert_close(again, prediction.displacement, rtol=1e-4, atol=1e-5)
    _, _, sx, sy, alpha, vx, vy = prediction.parameters.unbind(2)
    assert all((0 < s).all() and (s <= 0.3 + 1e-4).all() for s in (sx, sy))
    assert (0 <= alpha).all()
    assert (torch.stack([vx, vy]).abs() < 1).all()


def test_with_normalisation_it_needs_more_than_a_pixel_at_the_end():
    model = R2N2(norm=True, steps=1, widths=(2, 2, 4, 4)).eval()
    image = torch.rand(1, 1, 16, 17)
    assert model(image, image).displacement.shape == (1, 2, 16, 17)
    with pytest.raises(ValueError, match="with norm, images must be larger than 16 pixels"):
        model(image[..., :16], image[..., :16])


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu"},
        {"noise": "weights"},
        {"pool": "max"},
        {"sigma_is": "stdev"},
        {"steps": 0},
        {"widths": (4, 4, 4, 5)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        R2N2(**options)


# Its loss


def test_counts_pixels_sampled_inside():
    u = torch.zeros(1, 2, 4, 5)
    u[:, 0] = 1
    assert torch.equal(r2n2._inside(u)[0, 0], torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None].expand(4, 5))


def test_averages_images_alike():
    """However many of their pixels are sampled inside, and counted: a batch's loss is the mean of its images'."""
    model = build("r2n2")
    fixed, moving = pair("r2n2", 2)
    mask = torch.ones_like(fixed)
    mask[1, ..., 3:] = 0
    with torch.no_grad():
        whole = model.loss(fixed, moving, model(fixed, moving), mask)
        alone = [
            model.loss(f, m, model(f, m), weights)
            for f, m, weights in zip(fixed.split(1), moving.split(1), mask.split(1), strict=True)
        ]
    torch.testing.assert_close(whole, torch.stack(alone).mean(), rtol=1e-6, atol=0)


# Its data


def test_fixed_image_of_a_series():
    images = torch.tensor([0, 1, 2, 10], dtype=torch.uint8).view(4, 1, 1).expand(4, 3, 3)
    assert fixed_of_series(images) == 2  # mean 3.25
    assert fixed_of_series(images, torch.tensor([0.0, 0.0, 1.0, 0.4])) == 3
    assert fixed_of_series(images, torch.tensor([1, 0, 1, 0])) == 0  # all as near
    assert doctest.testmod(series, extraglobs={"torch": torch, "fastreg": fastreg}).failed == 0


@pytest.mark.parametrize(
    ("images", "phases", "error", "match"),
    [
        (torch.rand(1, 1, 4, 4), None, ValueError, "a series of at least 2 along axis 0, got .1, 1, 4, 4."),
        (torch.rand(0, 1, 4, 4), None, ValueError, "at least 2"),
        (torch.rand(4), None, ValueError, "at least 2"),
        (torch.rand(3, 0), None, ValueError, "at least 2"),
        (torch.rand(3, 4, 4), torch.rand(2), ValueError, r"phases must have shape \(3,\), got \(2,\)"),
        (torch.rand(3, 4, 4), torch.tensor([0, 1, torch.nan]), ValueError, "must be finite"),
        (torch.full((3, 4, 4), torch.inf), None, ValueError, "must be finite"),
        ([1, 2], None, TypeError, "images must be a tensor, got list"),
        (torch.rand(3, 4, 4), [0, 1, 2], TypeError, "phases must be a tensor, got list"),
    ],
)
def test_what_is_no_series(images, phases, error, match):
    with pytest.raises(error, match=match):
        fixed_of_series(images, phases)
