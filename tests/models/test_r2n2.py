"""R2N2: the weights it starts with."""

import math

import pytest
import torch

from fastreg import smooth
from fastreg.models import R2N2

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
