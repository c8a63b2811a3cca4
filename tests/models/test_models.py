"""The five methods and VoxelMorph: sizes, blocks against the concatenating form, the interface, what each paper fixes."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import stock_ops
from fastreg import mind_loss, warp
from fastreg.models import MODELS, PRDFE, R2N2, RRN, F3RNet, LinDef, VoxelMorph, blocks
from fastreg.models.f3rnet import POLICIES, VARIANTS

# Small nets of each kind; the sizes of RRN, LinDef and F3RNet are fixed, so their volumes are small.
BUILD = {
    "f3rnet": lambda **o: F3RNet(**o),
    "lindef": lambda **o: LinDef(**o),
    "prdfe": lambda **o: PRDFE(encoder=(3, 4, 4, 4), decoder=(4, 4, 4, 4, 4, 3, 3), **o),
    "prdfe2d": lambda **o: PRDFE(encoder=(3, 4, 4, 4), decoder=(4, 4, 4, 4, 4, 3, 3), ndim=2, **o),
    "r2n2": lambda **o: R2N2(steps=3, widths=(4, 6, 8, 10), **o),
    "rrn": lambda **o: RRN(**o),
    "rrn_features": lambda **o: RRN(cost_volume=False, **o),
    "voxelmorph": lambda **o: VoxelMorph(encoder=(3, 4, 4, 4), decoder=(4, 4, 4, 4, 4, 3, 3), **o),
    "voxelmorph2d": lambda **o: VoxelMorph(encoder=(3, 4, 4, 4), decoder=(4, 4, 4, 4, 3, 3), ndim=2, **o),
}


def build(name, **options):
    torch.manual_seed(0)
    model = BUILD[name](**options).eval()
    # Heads that start at (nearly) 0 would hide what comes before them.
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.02)
    return model


def pair(name, count=1, **options):
    torch.manual_seed(1)
    shape = (37, 26) if name in ("r2n2", "prdfe2d", "voxelmorph2d") else (12, 17, 16)
    if name.startswith("rrn"):
        shape = (16, 18, 16)
    return [torch.rand(count, 1, *shape, **options) for _ in range(2)]


def gradients(model, fixed, moving):
    model.zero_grad()
    loss = model.loss(fixed, moving, model(fixed, moving))
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]


def counted(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (RRN, 16_652_076),
        (lambda: RRN(cost_volume=False), 16_760_940),
        (R2N2, 3_593_611),
        (lambda: R2N2.from_preset("released"), 4_753_035),
        (LinDef, 1_767_875),
        (lambda: LinDef(affine=False), 1_764_383),
        (PRDFE, 654_887),
        (lambda: PRDFE(variant="iprdfe"), 239_375),
        (lambda: PRDFE.from_preset("simulation"), 3_800_586),
        (lambda: VoxelMorph.from_preset("vm1"), 259_675),
        (lambda: VoxelMorph.from_preset("vm2"), 300_547),
        (lambda: VoxelMorph(encoder=(24, 40, 40, 40), decoder=(40, 40, 40, 40, 40, 24, 24)), 487_043),
    ],
)
def test_number_of_parameters(model, count):
    assert counted(model()) == count


def test_number_of_parameters_of_f3rnet():
    """The paper prints 359, 204, 335, 321, 348, 243 and 288 thousand."""
    counts = {
        policy: [counted(F3RNet(variant=v, f3d_policy=policy)) for v in VARIANTS] for policy in POLICIES
    }
    order = ["none", "full", "decoder", "encoder", "fr", "ms", "mrb"]
    assert list(VARIANTS) == order
    assert counts["fit"] == [358_179, 203_699, 342_883, 312_227, 320_147, 241_731, 288_083]
    assert counts["all"] == [358_179, 159_251, 326_019, 284_643, 320_147, 197_283, 243_635]


# Blocks


def layers(nd, widths, dilations=None, kernel=3):
    torch.manual_seed(2)
    dilations = dilations or [1] * len(widths)
    return nn.ModuleList(
        blocks.conv(nd, i, o, kernel, dilation=d) for (i, o), d in zip(widths, dilations, strict=True)
    ).double()


def compare(ours, plain, inputs, module):
    """Values and gradients of two forms of one function; ours also under gradcheck."""
    parameters = [p for p in module.parameters()]
    a, b = ours(*inputs), plain(*inputs)
    weight = torch.randn_like(a)
    torch.testing.assert_close(a, b)
    wanted = [*(t for t in inputs if t.requires_grad), *parameters]
    for x, y in zip(
        torch.autograd.grad(a, wanted, weight), torch.autograd.grad(b, wanted, weight), strict=True
    ):
        torch.testing.assert_close(x, y)
    assert torch.autograd.gradcheck(lambda *_: ours(*inputs), wanted, fast_mode=True)


def volume(channels, *shape, grad=True):
    return torch.randn(2, channels, *shape, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("shape", [(3, 4, 3), (4, 3)])
def test_dense_block(shape):
    net = layers(len(shape), [(5, 3), (8, 4), (12, 2)])

    def plain(a, b):
        x = torch.cat([F.leaky_relu(a, 0.1), b], 1)
        for layer in net:
            y = F.leaky_relu(layer(x), 0.1)
            x = torch.cat([x, y], 1)
        return y

    inputs = [volume(2, *shape), volume(3, *shape)]
    compare(lambda a, b: blocks.dense_block(net, [a, b], 0.1, activate=2), plain, inputs, net)


def test_dense_block_of_constants():
    net = layers(3, [(2, 3), (5, 2)])
    x = volume(2, 3, 3, 3, grad=False)
    compare(
        lambda x: blocks.dense_block(net, [x], 0.1),
        lambda x: F.leaky_relu(net[1](torch.cat([x, F.leaky_relu(net[0](x), 0.1)], 1)), 0.1),
        [x],
        net,
    )


@pytest.mark.parametrize("slope", [0.2, None])
@pytest.mark.parametrize(("small", "shape"), [((2, 2, 3), (4, 3, 5)), ((3, 3), (5, 6)), ((4, 3), (4, 3))])
def test_concat_conv(slope, small, shape):
    (layer,) = net = layers(len(shape), [(5, 2)])

    def plain(a, b):
        y = layer(torch.cat([F.interpolate(a, size=shape), b], 1))
        return y if slope is None else F.leaky_relu(y, slope)

    inputs = [volume(2, *small), volume(3, *shape)]
    compare(lambda a, b: blocks.concat_conv(layer, (a, b), slope), plain, inputs, net)
    inputs[0].requires_grad_(False)
    compare(lambda a, b: blocks.concat_conv(layer, (a, b), slope), plain, inputs, net)


@pytest.mark.parametrize("needs", [True, False])
def test_chain(needs):
    net = layers(3, [(2, 3), (3, 2), (2, 2)], [1, 2, 1])

    def plain(x):
        parts = [x]
        for layer in net:
            parts.append(F.leaky_relu(F.instance_norm(layer(parts[-1])), 0.2))
        return torch.cat(parts, 1)

    compare(lambda x: blocks.chain(net, x, 0.2), plain, [volume(2, 4, 3, 4, grad=needs)], net)


def test_frozen_layers_get_no_gradient():
    net = layers(2, [(2, 3), (5, 2)])
    net[0].requires_grad_(False)
    x = volume(2, 4, 5)
    blocks.dense_block(net, [x], 0.1).sum().backward()
    assert net[0].weight.grad is None
    assert net[1].weight.grad is not None
    assert x.grad is not None


def test_autocast_leaves_fp64_alone():
    net = layers(2, [(2, 3), (5, 2)])
    x = volume(2, 4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(blocks.dense_block(net, [x], 0.1), blocks.dense_block(net, [x], 0.1))
        assert blocks.concat_conv(net[0], (x,), 0.1).dtype == torch.float64
        assert blocks.chain(net[:1], x, 0.1).dtype == torch.float64


def test_blocks_compile():
    dense, line = layers(2, [(2, 3), (5, 2)]), layers(2, [(2, 3), (3, 2)])

    def both(x):
        return blocks.dense_block(dense, [x], 0.1).sum() + blocks.chain(line, x, 0.2).square().sum()

    x = volume(2, 4, 5)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    wanted = [x, *dense.parameters(), *line.parameters()]
    expected = torch.autograd.grad(both(x), wanted)
    for a, b in zip(torch.autograd.grad(compiled(x), wanted), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_norm_act():
    (layer,) = net = layers(3, [(2, 3)])
    compare(
        lambda x: blocks.norm_act_(layer(x), 0.2),
        lambda x: F.leaky_relu(F.instance_norm(layer(x)), 0.2),
        [volume(2, 4, 3, 4)],
        net,
    )


@pytest.mark.parametrize("kernel", [(3, 1, 1), (1, 3, 3), (3, 3, 3)])
def test_activated_and_residual(kernel):
    """Also of a convolution along the slices alone, which is made in 2D."""
    padding = tuple(n // 2 for n in kernel)
    net = nn.ModuleList([nn.Conv3d(3, 3, kernel, padding=padding)]).double()
    (layer,) = net

    def plain(x, z):
        return z + F.leaky_relu(layer(x), 0.2)

    inputs = [volume(3, 3, 4, 5), volume(3, 3, 4, 5)]
    compare(lambda x, z: z + blocks.activated(layer, x, 0.2), plain, inputs, net)
    compare(lambda x, z: blocks.residual(layer, x, z, 0.2), plain, inputs, net)
    with torch.no_grad():
        torch.testing.assert_close(blocks.residual(layer, *inputs, 0.2), plain(*inputs))


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3)])
@pytest.mark.parametrize("need_x", [True, False])
def test_a_small_volume_is_convolved_in_halves(kernel, need_x):
    layer = nn.Conv3d(4, 5, kernel, padding=tuple(n // 2 for n in kernel))
    x = torch.randn(1, 4, 12, 11, 13, requires_grad=need_x)
    assert blocks._halvable(x, layer)
    for odd in (x[:, :, 1:], x.expand(2, -1, -1, -1, -1), x.double(), x[..., :5, :5]):
        assert not blocks._halvable(odd, layer)
    concat = [blocks.concat_conv(layer, (x[:, :2], x[:, 2:]), None), blocks.convolved(layer, x)]
    expected = layer(x)
    weight = torch.randn_like(expected)
    wanted = [*layer.parameters(), *[x] * need_x]
    truth = torch.autograd.grad(expected, wanted, weight)
    for found in concat:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for a, b in zip(torch.autograd.grad(found, wanted, weight), truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["max", "mean"])
@pytest.mark.parametrize("size", [2, 4])
def test_pooled(kind, size):
    stock = F.max_pool3d if kind == "max" else F.avg_pool3d
    x = volume(3, 8, 4, 12)
    compare(lambda x: blocks.pooled(x, size, kind), lambda x: stock(x, size), [x], nn.ModuleList())
    flat = torch.zeros(1, 1, 4, 4, 4, requires_grad=True)  # all are the maximum: one of them gets it all
    grads = [
        torch.autograd.grad(f(flat).sum(), flat)[0]
        for f in (lambda x: blocks.pooled(x, 2, kind), lambda x: stock(x, 2))
    ]
    assert torch.equal(*grads)


@pytest.mark.parametrize("mode", ["trilinear", "nearest"])
@pytest.mark.parametrize("factor", [2, 3])
def test_upsampled(mode, factor):
    corners = {} if mode == "nearest" else {"align_corners": False}
    compare(
        lambda x: blocks.upsampled(x, factor, mode),
        lambda x: F.interpolate(x, scale_factor=factor, mode=mode, **corners),
        [volume(3, 1, 4, 5)],
        nn.ModuleList(),
    )


@pytest.mark.parametrize("size", [2, 4, 3])
def test_pooled_where_nobody_asks_for_a_gradient(size):
    x = volume(3, 12, 24, 12, grad=False)
    with torch.no_grad():
        assert torch.equal(blocks.pooled(x, size), F.max_pool3d(x, size))


def saved(function, *inputs):
    """Bytes kept for the backward, and the result."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = function(*inputs)
    return sum(kept.values()), output


def test_blocks_keep_signs_and_places():
    """Of a residual's activation a byte a value beside its input; of a pooled map where the maxima are."""
    (layer,) = layers(3, [(4, 4)]).requires_grad_(False)
    x, z = volume(4, 8, 8, 8), volume(4, 8, 8, 8)
    values = x.numel()
    assert saved(lambda x, z: blocks.residual(layer, x, z, 0.1), x, z)[0] <= values + 8 * values + 20_000
    assert saved(lambda x: blocks.pooled(x, 2), x)[0] <= 4 * values / 8
    assert saved(lambda x: blocks.pooled(x, 2, "mean"), x)[0] == 0


def test_blocks_keep_no_concatenation():
    """Bytes saved for the backward: the buffer, outputs and sources, not a concatenation for each convolution."""
    net = layers(3, [(4, 4), (8, 4), (12, 4)]).requires_grad_(False)
    x = volume(4, 8, 8, 8)
    voxels = 2 * 8**3 * 8
    assert saved(lambda x: blocks.dense_block(net, [x], 0.1), x)[0] <= (4 + 4 + 4 + 4 + 1) * voxels + 80_000
    small = volume(8, 4, 4, 4)
    (layer,) = layers(3, [(12, 2)]).requires_grad_(False)
    assert (
        saved(lambda a, b: blocks.concat_conv(layer, (a, b), 0.1), small, x)[0]
        <= (1 + 4 + 2) * voxels + 20_000
    )


def test_concat_conv_holds_no_output_in_its_backward():
    """The output is freed with the activation's node, before the convolution's gradients are made."""
    (layer,) = layers(3, [(5, 2)])
    y = blocks.concat_conv(layer, (volume(2, 2, 2, 2), volume(3, 4, 4, 4)), 0.1)
    ((convolution, _),) = y.grad_fn.next_functions
    assert "LeakyRelu" in y.grad_fn.name()
    assert not any(t is not None and t.shape == y.shape for t in convolution.saved_tensors)


# Interface


@pytest.mark.parametrize("name", BUILD)
def test_predicts_the_shape_of_the_images(name):
    fixed, moving = pair(name, 2)
    model = build(name)
    prediction = model(fixed, moving)
    nd = fixed.ndim - 2
    assert prediction.displacement.shape == (2, nd, *fixed.shape[2:])
    assert prediction.displacement.dtype == torch.float32
    assert prediction.displacement.abs().max() > 1e-4
    terms = model.terms(fixed, moving, prediction)
    assert all(t.shape == () for t in terms.values())
    assert "similarity" in terms
    # A batch is its samples.
    alone = model(fixed[1:], moving[1:]).displacement
    torch.testing.assert_close(prediction.displacement[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BUILD)
def test_each_parameter_gets_a_gradient(name):
    model = build(name)
    _, grads = gradients(model, *pair(name))
    assert all(g is not None and g.isfinite().all() for g in grads)
    # Biases before a normalisation have none but of rounding.
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(g.abs().max() > 0 for n, g in zip(names, grads, strict=True) if not n.endswith("bias"))


@pytest.mark.parametrize("name", BUILD)
def test_checkpointing_changes_nothing(name):
    kept, again = (gradients(build(name, checkpoint=c), *pair(name)) for c in ("none", "blocks"))
    assert torch.equal(kept[0], again[0])
    for a, b in zip(kept[1], again[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", BUILD)
def test_against_stock_ops(name):
    """The same net on grid_sample, sliced differences, torch.cat and so on."""
    inputs = [t.double() for t in pair(name, 2)]
    ours = gradients(build(name).double(), *inputs)
    with stock_ops.installed(layers=True):
        stock = gradients(build(name).double(), *inputs)
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-6, atol=1e-7)
    for a, b in zip(ours[1], stock[1], strict=True):
        # LCC calls windows flat where stock ops have rounding.
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9


@pytest.mark.parametrize("name", [n for n in BUILD if build(n)._encode is not None])
def test_fixed_features(name):
    model = build(name)
    fixed, moving = pair(name)
    features = model.encode_fixed(fixed)
    assert torch.equal(
        model(fixed, moving, fixed_features=features).displacement, model(fixed, moving).displacement
    )


@pytest.mark.parametrize("name", BUILD)
def test_autocast(name):
    """bf16 convolutions, fp32 flow heads and displacements."""
    model = build(name)
    if name.startswith("rrn"):
        pytest.skip("minutes without bf16 arithmetic: its layers are those of the others")
    fixed, moving = pair(name)
    if name == "lindef":
        fixed, moving = (t[:, :, :5, :6, :5] for t in (fixed, moving))
    exact = model(fixed, moving).displacement
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = model(fixed, moving)
        loss = model.loss(fixed, moving, prediction)
    assert prediction.displacement.dtype == torch.float32
    assert loss.dtype == torch.float32
    loss.backward()
    error = (prediction.displacement - exact).abs().max() / exact.abs().max()
    assert error < 0.2
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["voxelmorph"])
def test_compiles(name):
    """In one graph, forward and backward; what a backend makes of it is the backend's."""
    model = build(name)
    fixed, moving = pair(name)
    _, expected = gradients(model, fixed, moving)
    prediction = torch.compile(model, fullgraph=True, backend="aot_eager")(fixed, moving)
    model.zero_grad()
    model.loss(fixed, moving, prediction).backward()
    for a, b in zip([p.grad for p in model.parameters() if p.requires_grad], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_arguments_build_it_again(name):
    model = MODELS[name].from_preset("paper", checkpoint="blocks")
    assert model.arguments["checkpoint"] == "blocks"
    assert MODELS[name](**model.arguments).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", BUILD)
def test_bad_input(name):
    model = build(name)
    fixed, moving = pair(name)
    with pytest.raises(ValueError, match="moving must have the shape"):
        model(fixed, moving[..., :-1])
    with pytest.raises(ValueError, match="fixed must have shape"):
        model(fixed[0], moving)
    with pytest.raises(
        TypeError, match=r"moving must have the dtype of the weights, torch.float32 .*got torch.int64"
    ):
        model(fixed, moving.long())
    with pytest.raises(TypeError, match="fixed must have the dtype of the weights"):
        model(fixed.double(), moving)
    with pytest.raises(TypeError, match="fixed must be a tensor, got ndarray"):
        model(fixed.numpy(), moving)
    if model._encode is None:
        with pytest.raises(TypeError, match="takes no fixed_features"):
            model(fixed, moving, fixed_features=fixed)
        with pytest.raises(TypeError, match="has no features"):
            model.encode_fixed(fixed)
    else:
        with pytest.raises(ValueError, match="fixed must have shape"):
            model.encode_fixed(fixed[0])
    with pytest.raises(ValueError, match="padding must be one of"):
        build(name, padding="zero")
    with pytest.raises(
        TypeError, match=r"fastreg.models.*unexpected keyword argument 'paddin'; presets: .*'paper'"
    ):
        build(name, paddin="zeros")
    with pytest.raises(ValueError, match="checkpoint must be one of"):
        build(name, checkpoint="all")
    with pytest.raises(ValueError, match="preset must be one of"):
        type(model).from_preset("none such")


def test_bad_options_of_mind():
    for mind in ({"sigm": 1}, "ssc", {"mask": None}):
        with pytest.raises(
            TypeError, match="mind must be a dict of dilation, neighbourhood, norm, patch, radius, sigma"
        ):
            F3RNet(mind=mind)
        with pytest.raises(TypeError, match="mind must be a dict of dilation"):
            VoxelMorph(similarity="mind", mind=mind)
    with pytest.raises(ValueError, match='mind is for similarity="mind"'):
        VoxelMorph(mind={"radius": 1})


def test_voxelmorph_takes_the_options_of_mind():
    fixed, moving = torch.rand(2, 1, 1, 16, 16, 16)
    options = {"radius": 1, "dilation": 1, "neighbourhood": "six", "patch": "gaussian", "norm": "l1"}
    models = [VoxelMorph(similarity="mind", **o) for o in ({}, {"mind": options})]
    with torch.no_grad():
        seen = [float(m.terms(fixed, moving, m(fixed, moving))["similarity"]) for m in models]
    assert seen[1] == pytest.approx(float(mind_loss(fixed, moving, **options)), rel=1e-2)
    assert abs(seen[0] - seen[1]) > 0.1 * seen[1]


def test_bad_arguments():
    for build_it, match in (
        (lambda: RRN(regularizer="l1"), "regularizer"),
        (lambda: RRN(radius=-1), "radius"),
        (lambda: RRN(window=4), "window odd"),
        (lambda: RRN(refine=(1, 2)), "refine 6"),
        (lambda: LinDef(encoder=(4, 4)), "encoder"),
        (lambda: LinDef(order="three_pass"), "order"),
        (lambda: F3RNet(variant="best"), "variant"),
        (lambda: PRDFE(variant="best"), "variant"),
        (lambda: PRDFE(encoder=(1, 2)), "encoder"),
        (lambda: PRDFE(halving="average"), "halving"),
        (lambda: VoxelMorph(decoder=(1, 2)), "decoder"),
        (lambda: VoxelMorph(similarity="ssd"), "similarity"),
        (lambda: VoxelMorph(ndim=4), "ndim"),
    ):
        with pytest.raises(ValueError, match=match):
            build_it()


# What each paper fixes


@pytest.mark.parametrize(
    ("model", "exact"), [(LinDef, True), (R2N2, True), (PRDFE, False), (F3RNet, False), (VoxelMorph, False)]
)
def test_starts_at_the_identity(model, exact):
    torch.manual_seed(0)
    net = model()
    shape = (1, 1, 16, 16) if net.ndim == 2 else (1, 1, 16, 16, 16)
    displacement = net(torch.rand(shape), torch.rand(shape)).displacement
    assert displacement.abs().max() <= (0 if exact else 1e-2)


def test_lindef_orders():
    """One map: G_N after G_A, in one interpolation or two; "legacy": the other way round."""
    fixed, moving = pair("lindef")
    models = {order: build("lindef", order=order) for order in ("two_pass", "single_pass", "legacy")}
    predictions = {order: model(fixed, moving) for order, model in models.items()}
    a, b, c = (predictions[o].displacement for o in ("two_pass", "single_pass", "legacy"))
    assert torch.equal(a, b)
    assert (a - c).abs().max() > 1e-3
    u, matrix = predictions["two_pass"].fields[1], predictions["two_pass"].affine
    # A ramp is interpolated exactly, once or twice, away from the border.
    ramp = sum(
        k * t
        for k, t in enumerate(
            torch.meshgrid(*(torch.arange(float(n)) for n in u.shape[2:]), indexing="ij"), 1
        )
    )
    twice = warp(warp(ramp[None, None], u, padding="border"), None, affine=matrix, padding="border")
    once = warp(ramp[None, None], a, padding="border")
    inner = (..., *[slice(4, -4)] * 3)
    assert (once - ramp)[inner].abs().max() > 0.1
    torch.testing.assert_close(twice[inner], once[inner], rtol=1e-4, atol=1e-4)
    point = torch.tensor([3.0, 4.0, 5.0, 1.0])
    index = (0, slice(None), 3, 4, 5)
    expected = (matrix[0] @ (point + F.pad(u[index], (0, 1)))) - point[:3]
    torch.testing.assert_close(c[index], expected, rtol=1e-4, atol=1e-4)
    # Also at the border, where p + u lies outside.
    p = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in u.shape[2:]), indexing="ij"))
    moved = torch.einsum("ij,j...->i...", matrix[0, :, :3], p + u[0]) + matrix[0, :, 3].view(3, 1, 1, 1)
    torch.testing.assert_close(c[0], moved - p, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        similarities = {o: m.terms(fixed, moving, predictions[o])["similarity"] for o, m in models.items()}
    assert similarities["two_pass"] != similarities["single_pass"]


def test_lindef_keeps_no_features_under_checkpointing():
    """The 290 channels go; the pair, 128 channels and the last map stay."""
    from bench.models import Subject, saved_bytes

    lindef = Subject("", LinDef, (), ())
    none, blocks = (saved_bytes(lindef, form, (8, 12, 12)) for form in ("fastreg", "fastreg, blocks"))
    assert blocks < 0.2 * none


def test_lindef_affine_is_about_the_centre():
    """A scaling in [-1, 1] keeps the middle of the image where it is, and its L1 term is that of the scaling."""
    from fastreg.models.lindef import _to_unit, _to_voxels

    step = torch.zeros(1, 3, 4, dtype=torch.float64)
    step[0, 0, 0], step[0, 1, 3] = 0.5, 0.25
    shape = (9, 11, 5)
    matrix = _to_voxels(step, shape)
    middle = torch.tensor([4.0, 5.0, 2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        matrix[0] @ middle, torch.tensor([4.0, 5.0 + 0.25 * 5, 2.0], dtype=torch.float64)
    )
    torch.testing.assert_close(_to_unit(matrix, shape), step)


def test_lindef_sees_25_voxels():
    model = build("lindef")
    x = torch.zeros(1, 1, 1, 1, 41)
    x.requires_grad_()
    # Normalisation and mean see everything: the convolutions alone.
    y = x.expand(1, 2, -1, -1, -1)
    for layer in model.encoder:
        y = layer(y)
    (grad,) = torch.autograd.grad(y[..., 20].sum(), x)
    reached = grad.flatten().nonzero().flatten()
    assert (reached[0], reached[-1]) == (20 - 12, 20 + 12)


def test_prdfe_sums_residuals():
    """Recursive doubling and one resize agree on fields that are linear in space."""
    from fastreg import resize_displacement

    line = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 2, 4, 4).contiguous()
    options = {"align_corners": False, "scale": "exact"}
    direct = resize_displacement(line, (16, 16), **options)
    recursive = resize_displacement(resize_displacement(line, (8, 8), **options), (16, 16), **options)
    torch.testing.assert_close(direct[:, :, 4:-4], recursive[:, :, 4:-4])
    fixed, moving = pair("prdfe2d")
    model = build("prdfe2d", direct=True)
    one = model(fixed, moving)
    assert len(one.fields) == 5
    assert torch.equal(one.fields[-1], one.displacement)
    assert [tuple(f.shape[2:]) for f in one.fields] == [(3, 2), (5, 4), (10, 7), (19, 13), (37, 26)]


def test_pdfe_warps_by_the_field_before_alone():
    """Its fields are whole ones, which "direct" must not sum."""
    fixed, moving = pair("prdfe2d")
    a, b = (build("prdfe2d", variant="pdfe", direct=d)(fixed, moving).displacement for d in (False, True))
    assert torch.equal(a, b)


@pytest.mark.parametrize("halving", ["max", "mean"])
def test_prdfe_pools_after_its_convolutions(halving):
    """Sizes and parameters are those of strided convolutions, odd halves included; the pooling is what it says."""
    fixed, moving = pair("prdfe2d")
    strided, pooled = build("prdfe2d"), build("prdfe2d", halving=halving)
    assert counted(pooled) == counted(strided)
    a, b = (m(fixed, moving) for m in (strided, pooled))
    assert [f.shape for f in a.fields] == [f.shape for f in b.fields]
    with torch.no_grad():
        x, y = fixed, pooled.encode_fixed(fixed)
        for layer, found in zip(pooled.encoder, y[-2::-1], strict=True):
            x = F.leaky_relu(layer(x), 0.2)
            missing = [n % 2 for n in x.shape[2:]]
            # A window that sticks out counts what is in the image.
            padded = F.pad(x, (0, missing[1], 0, missing[0]), value=float("nan"))
            windows = padded.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
            mean = windows.nanmean(-1)
            x = mean if halving == "mean" else windows.nan_to_num(nan=-float("inf")).amax(-1)
            torch.testing.assert_close(found, x)
    gradients(pooled, fixed, moving)


def test_f3rnets_weight_is_the_papers_of_each_variant():
    assert {v: F3RNet(variant=v).weight for v in VARIANTS} == {
        "none": 1.5, "full": 1.5, "decoder": 1.5, "encoder": 2, "fr": 1.5, "ms": 2, "mrb": 1.5,
    }  # fmt: skip
    assert F3RNet(variant="ms", weight=0.1).weight == 0.1


def test_prdfe_variants_differ():
    fixed, moving = pair("prdfe2d")
    results = [
        build("prdfe2d", **o)(fixed, moving).displacement
        for o in ({}, {"variant": "pdfe"}, {"unet_skip": False})
    ]
    results.append(build("prdfe2d", variant="iprdfe")(fixed, moving).displacement)
    for k, a in enumerate(results):
        for b in results[k + 1 :]:
            assert (a - b).abs().max() > 1e-4


def test_rrn_fields_are_refined_level_by_level():
    model = build("rrn")
    fixed, moving = pair("rrn")
    prediction = model(fixed, moving)
    assert [tuple(f.shape[2:]) for f in prediction.fields] == [(1, 2, 1), (2, 4, 2), (4, 8, 4), (4, 8, 4)]
    released = RRN.from_preset("released")
    assert (released.regularizer, released.weight) == ("diffusion", 1.25)


def test_rrn_can_be_narrower():
    narrow = RRN(pyramid=(2, 3, 4, 5), dense=(6, 5, 4), refine=(4, 4, 3, 3, 2, 2))
    prediction = narrow(*pair("rrn"))
    narrow.loss(*pair("rrn"), prediction).backward()
    assert counted(narrow) < 200_000
    assert all(p.grad is not None for p in narrow.parameters())


def test_f3rnets_paper_size_has_its_slices_first():
    """Its 144x144x128 are x, y and z, as the 128x128x160 of its lung CT are."""
    from fastreg.training import PAPER

    assert PAPER["f3rnet"]["size"] == (128, 144, 144)


def test_docs_say_how_large_they_are():
    text = (Path(__file__).parents[2] / "docs/methods/index.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\(\w+\.md\) \|.*\| ([\d,]+) \|$", text, re.M))
    assert rows == {cls.__name__: f"{counted(cls()):,}" for cls in MODELS.values()}
