import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import BACKEND, DTYPES, assert_close, check_against_reference, double
from contract import Case, Contract

import fastreg
from fastreg.ops.lcc_loss import DENOMINATORS, KERNELS, PADDINGS, lcc_loss_ref, lcc_map_ref

QUICK = (
    BACKEND != "cpu"
)  # lanes that take a second for what the CPU kernels do in a millisecond: smaller images, fewer cases
OPTIONS = {
    "window": 5,
    "kernel": "box",
    "sigma": None,
    "squared": True,
    "padding": "zeros",
    "smooth_nr": 0.0,
    "smooth_dr": 1e-5,
    "denominator": "product",
}


def windows(x, window):
    """(N, C, *spatial, samples of the window), zeros outside."""
    nd, r = x.dim() - 2, window // 2
    x = F.pad(x, [r, r] * nd)
    for axis in range(nd):
        x = x.unfold(2 + axis, window, 1)
    return x.flatten(-nd)


def window_weights(window, kernel, sigma, nd):
    """(samples of the window,) in the order of `windows`."""
    along = np.ones(window)
    if kernel == "gaussian":
        along = np.exp(-((np.arange(window) - window // 2) ** 2) / (2 * (sigma or window / 3) ** 2))
    if kernel == "triangular":
        f = max(n for n in range(1, (window + 1) // 2 + 1) if n % 2)
        box = np.pad(np.full(f, 1 / f), (window - f) // 2)
        along = np.convolve(box, np.full(f, 1 / f), "same")
    product = along
    for _ in range(nd - 1):
        product = np.multiply.outer(product, along)
    return torch.from_numpy(product.reshape(-1)).to(torch.get_default_device())


def two_pass(fixed, moved, mask=None, **options):
    """-LCC averaged over channels, straight from the definition: means first, then deviations from them."""
    o = OPTIONS | options
    ones = torch.ones_like(fixed)
    weights = window_weights(o["window"], o["kernel"], o["sigma"], fixed.dim() - 2)
    inside, k = windows(ones, o["window"]), windows(ones if mask is None else mask * ones, o["window"])
    if o["padding"] == "zeros":
        k = k + 1 - inside
    k = k * weights
    f, m, n = windows(fixed, o["window"]), windows(moved, o["window"]), k.sum(-1, keepdim=True)

    def deviation(x):
        flat = torch.where(k > 0, x, -torch.inf).amax(-1) == torch.where(k > 0, x, torch.inf).amin(-1)
        return x - (k * x).sum(-1, keepdim=True) / n.clamp_min(1e-300), flat

    (f, flat_f), (m, flat_m) = deviation(f), deviation(m)
    few = n[..., 0] < 2 * weights.max()
    skip = flat_f | flat_m | few
    v, w, c = (torch.where(skip, 0, (k * x).sum(-1)) for x in (f * f, m * m, f * m))
    dr = o["smooth_dr"]
    d = {"product": v * w + dr, "clamp": v.clamp_min(dr) * w.clamp_min(dr), "each": (v + dr) * (w + dr)}[
        o["denominator"]
    ]
    lcc = (c**2 + o["smooth_nr"]) / d if o["squared"] else c / d.sqrt()
    return -torch.where(few, 0, lcc.clamp_max(1)).mean(1, keepdim=True)


def op_options(**options):
    """Options in the order of the ops, the default sigma filled in."""
    o = OPTIONS | options
    return tuple(
        (o | {"sigma": (o["sigma"] or o["window"] / 3) if o["kernel"] == "gaussian" else None}).values()
    )


def reference(**options):
    return lambda f, m, mask=None: lcc_map_ref(f, m, mask, *op_options(**options))


def ours(**options):
    return lambda f, m, mask=None: fastreg.lcc_loss(f, m, mask=mask, reduction="none", **(OPTIONS | options))


def pair(shape, dtype=torch.float64, noise=0.3):
    fixed = torch.rand(shape)
    moved = fixed + noise * torch.rand(shape)
    return fixed.to(dtype).requires_grad_(), moved.to(dtype).requires_grad_()


WEIGHTED = [{"kernel": "gaussian"}, {"kernel": "gaussian", "sigma": 1.3}, {"kernel": "triangular"}]
SHAPES = [(2, 2, 7, 9, 8), (1, 1, 3, 5, 21), (2, 1, 11, 13), (1, 1, 1, 1, 9), (1, 1, 9, 8, 1), (1, 1, 9, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_reference_is_the_definition(shape, padding, masked):
    fixed, moved = pair(shape)
    mask = (torch.rand(shape[0], 1, *shape[2:]).double() - 0.3).clamp_min(0) if masked else None
    kernels = [{"kernel": "box"}] * 6 + WEIGHTED
    for denominator, squared, window, kernel in zip(
        DENOMINATORS * 3, (True, False, False) * 3, (3, 5, 3, 5, 3, 5, 5, 3, 7), kernels, strict=True
    ):
        o = kernel | {
            "denominator": denominator,
            "squared": squared,
            "window": window,
            "padding": padding,
            "smooth_dr": 1e-3,
        }
        check_against_reference(
            lambda f, m, o=o: reference(**o)(f, m, mask),
            lambda f, m, o=o: two_pass(f, m, mask, **o),
            (fixed, moved),
            1e-8,
        )


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 71, 4, 5), (1, 1, 4, 69, 5), (1, 1, 80, 6)], ids=str)
def test_against_reference(shape, padding, masked):
    """Every option, each gradient alone and both, maps and sums; shapes beyond one chunk of planes and one reseed of rows."""
    fixed, moved = pair(shape)
    mask = (torch.rand(shape[0], 1, *shape[2:]).double() - 0.3).clamp_min(0) if masked else None
    kernels = [{"kernel": "box"}] * 6 + WEIGHTED * 2
    options = zip(
        DENOMINATORS * 4,
        (True, False, False, True, False, True) * 2,
        (3, 9, 21, 9, 3, 5) * 2,
        kernels,
        strict=True,
    )
    # Other lanes: each shape takes its own quarter of the options.
    for i, (denominator, squared, window, kernel) in list(enumerate(options))[
        slice(sum(shape) % 4, None, 4) if QUICK else slice(None)
    ]:
        o = kernel | {
            "denominator": denominator,
            "squared": squared,
            "window": window,
            "padding": padding,
            "smooth_nr": 1e-4,
        }
        f, m = ((fixed, moved), (fixed.detach(), moved), (fixed, moved.detach()))[(i + i // 6) % 3]
        check_against_reference(
            lambda f, m, o=o: ours(**o)(f, m, mask), lambda f, m, o=o: reference(**o)(f, m, mask), (f, m)
        )
        needs = (f.requires_grad, m.requires_grad)
        truth = lcc_loss_ref(f.detach(), m.detach(), mask, *op_options(**o), *needs)
        loss = fastreg.lcc_loss(f, m, mask=mask, reduction="sum", **(OPTIONS | o))
        assert_close(loss, truth[0].sum())
        grads = torch.autograd.grad(loss, [x for x in (f, m) if x.requires_grad])
        for grad, expected in zip(
            grads, [g for g, need in zip(truth[1:], needs, strict=True) if need], strict=True
        ):
            assert_close(grad, expected)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    ("shape", "window", "kernel", "squared", "padding", "denominator"),
    [
        ((1, 1, 34, 3, 5), 3, "box", True, "zeros", "product"),
        ((1, 1, 3, 35, 4), 5, "gaussian", False, "valid", "each"),
        ((1, 2, 3, 3, 67), 7, "triangular", True, "zeros", "clamp"),
        ((2, 1, 67, 3, 3), 5, "box", True, "valid", "clamp"),
        ((1, 1, 34, 34), 11, "box", False, "zeros", "each"),
        ((1, 1, 66, 3), 5, "gaussian", True, "valid", "product"),
        ((1, 1, 4, 3, 5), 13, "gaussian", True, "zeros", "product"),
    ],
    ids=str,
)
def test_fp32_across_tiles(shape, window, kernel, squared, padding, denominator, masked):
    """Shapes a little beyond 32 and 64 voxels an axis, whose tiles lie at different values, wherever an implementation cuts."""
    fixed, moved = (x.detach() for x in pair(shape))
    for axis in range(2, len(shape)):
        step = (torch.arange(shape[axis]) // 32 * 0.5).view(
            [-1 if k == axis else 1 for k in range(len(shape))]
        )
        fixed, moved = fixed + step, moved - step
    mask = (torch.rand(shape[0], 1, *shape[2:]) - 0.3).clamp_min(0) if masked else None
    options = (
        window,
        kernel,
        1.5 if kernel == "gaussian" else None,
        squared,
        padding,
        0.0,
        1e-3,
        denominator,
    )
    fixed, moved = fixed.float(), moved.float()
    images = fixed.double(), moved.double(), None if mask is None else mask.double()
    for needs in ((True, True), (False, True)) if window < 7 else ((True, False),):
        out = torch.ops.fastreg.lcc_loss(fixed, moved, mask, *options, *needs)
        truth = lcc_loss_ref(*images, *options, *needs)
        for actual, expected in zip(out, truth, strict=True):
            assert_close(actual, expected, floor=0.1)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_dtypes(dtype, padding, kernel):
    fixed, moved = pair((1, 2, 5, 6, 20) if QUICK else (2, 2, 9, 11, 20), dtype)
    o = {"padding": padding, "kernel": kernel}
    out = ours(**o)(fixed, moved)
    assert out.dtype == torch.float32
    assert_close(out, two_pass(double(fixed), double(moved), **o))
    truth = [double(fixed), double(moved)]
    for reduction, expected in (
        ("mean", two_pass(*truth, **o).mean()),
        ("sum", 2 * two_pass(*truth, **o).sum()),
    ):
        loss = fastreg.lcc_loss(fixed, moved, 5, reduction=reduction, **o)
        assert loss.dtype == torch.float32
        assert_close(loss, expected)
        grads = torch.autograd.grad(loss * 1024, (fixed, moved))
        for grad, true in zip(grads, torch.autograd.grad(expected * 1024, truth), strict=True):
            assert grad.dtype == dtype
            assert_close(grad, true, floor=0.1 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize(
    ("shape", "window", "kernel"),
    [
        ((1, 2, 35, 17, 18), 3, "box"),
        ((1, 1, 33, 35, 17), 7, "box"),
        ((1, 1, 38, 17, 34), 9, "box"),
        ((2, 1, 20, 17, 18), 11, "box"),
        ((1, 1, 35, 7, 18), 13, "box"),
        ((1, 1, 20, 18, 17), 21, "box"),
        ((1, 1, 70, 9, 18), 5, "triangular"),
        ((1, 1, 18, 17, 20), 21, "gaussian"),
        ((1, 1, 34, 7, 19), 23, "gaussian"),
        # Rows and planes inside, between those near the faces.
        ((1, 1, 9, 35, 17), 5, "gaussian"),
        ((1, 1, 9, 27, 18), 7, "triangular"),
        ((1, 1, 40, 6, 18), 25, "box"),
        ((1, 1, 5, 40, 6), 99, "box"),
        ((2, 2, 35, 50), 9, "box"),
        ((3, 1, 18, 33), 15, "gaussian"),
    ],
    ids=str,
)
@pytest.mark.skipif(BACKEND == "triton", reason="minutes; test_fp32_across_tiles crosses its borders")
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_fp32_across_segments(shape, window, kernel, masked):
    """Borders of tiles and segments in every axis; windows that have kernels of their own, that share one, and beyond."""
    fixed, moved = pair(shape, torch.float32)
    mask = (torch.rand(shape[0], 1, *shape[2:]) + 0.1) * (torch.rand(shape[0], 1, *shape[2:]) > 0.2)
    mask = mask if masked else None
    padding, squared = PADDINGS[window // 2 % 2], window % 4 == 1
    o = {"window": window, "kernel": kernel, "padding": padding, "squared": squared}
    one = (fixed.detach(), moved) if masked else (fixed, moved.detach())
    for f, m in ((fixed, moved), one):
        needs = (f.requires_grad, m.requires_grad)
        got = torch.ops.fastreg.lcc_loss(f.detach(), m.detach(), mask, *op_options(**o), *needs)
        true = lcc_loss_ref(
            f.detach().double(),
            m.detach().double(),
            None if mask is None else mask.double(),
            *op_options(**o),
            *needs,
        )
        for x, expected in zip(got, true, strict=True):
            assert_close(x, expected, 1e-5, floor=0.2)
    assert_close(ours(**o)(fixed, moved, mask), reference(**o)(double(fixed), double(moved), mask))


@pytest.mark.parametrize("kernel", KERNELS)
def test_distant_levels_in_one_image(kernel):
    """Tiles 1000 apart in level: each is summed against its own, and their gradients meet at the border."""
    shape = (1, 1, 7, 9, 40)
    level = 1000 * (torch.arange(40) >= 32)
    texture = torch.rand(shape)
    fixed = (level + texture).float().requires_grad_()
    moved = (level + texture + 0.1 * torch.rand(shape)).float().requires_grad_()
    for padding in PADDINGS:
        o = OPTIONS | {"kernel": kernel, "padding": padding}
        truth = lcc_loss_ref(
            fixed.detach().double(), moved.detach().double(), None, *op_options(**o), True, True
        )
        loss = fastreg.lcc_loss(fixed, moved, **(o | {"reduction": "sum"}))
        assert abs(loss.item() - truth[0].item()) < 1e-5 * fixed.numel()
        for grad, expected in zip(torch.autograd.grad(loss, (fixed, moved)), truth[1:], strict=True):
            assert (grad - expected).norm() <= 1e-5 * expected.norm()


HALVES = [(axis, last) for axis in range(3) for last in (False, True)]
SCALES = {
    "unit": (1, 0),
    "offset1": (1, 1),
    "offset100": (1, 100),
    "offset1000": (1, 1000),
    "x255": (255, 0),
    "hu": (2000, -1000),
}


@pytest.mark.parametrize(
    ("kernel", "axis", "flat_last", "scale"),
    # A Latin square: every two of kernel, half and scale meet.
    [(KERNELS[(i + j) % 3], *half, scale) for i, half in enumerate(HALVES) for j, scale in enumerate(SCALES)][
        :: 4 if QUICK else 1
    ],
)
def test_half_flat_volumes(axis, flat_last, scale, kernel):
    """fp32 against the two-pass truth where half the volume is exactly flat, before or after the texture along each axis."""
    factor, offset = SCALES[scale]
    n = 12 if QUICK else 16
    position = torch.arange(n).view([-1 if k == axis else 1 for k in range(3)])
    textured = (position < n // 2 if flat_last else position >= n // 2).expand(1, 1, n, n, n)
    texture = torch.rand(1, 1, n, n, n)
    fixed = torch.where(textured, texture, 0.5)
    moved = torch.where(textured, texture + 0.02 * torch.randn(texture.shape), 0.5)
    fixed, moved = ((factor * x + offset).float().requires_grad_() for x in (fixed, moved))
    truth_inputs = double(fixed), double(moved)
    window = 5 if QUICK else 7
    for padding in PADDINGS:
        o = {"window": window, "kernel": kernel, "padding": padding}
        truth = two_pass(*truth_inputs, **o)
        out = ours(**o)(fixed, moved)
        assert (out - truth).abs().max() < 1e-5
        box = windows(textured.double(), window).sum(-1)
        whole = windows(torch.ones_like(texture), window).sum(-1) == window**3
        flat = (box == 0) & (whole | (padding == "valid"))
        assert flat.any()
        assert out[flat].abs().max() < 1e-6
        loss = fastreg.lcc_loss(fixed, moved, **o)
        assert abs(loss.item() - truth.mean().item()) < 1e-5
        for grad, expected in zip(
            torch.autograd.grad(loss, (fixed, moved)),
            torch.autograd.grad(truth.mean(), truth_inputs),
            strict=True,
        ):
            assert (grad - expected).norm() <= 1e-5 * expected.norm()
            assert F.cosine_similarity(grad.double().flatten(), expected.flatten(), 0) > 1 - 1e-9
            untouched = windows(torch.where(flat, 0.0, 1.0), window).sum(-1) == 0
            assert grad[untouched].abs().max() <= 1e-9 * grad.abs().max() if untouched.any() else True


@pytest.mark.parametrize("kernel", KERNELS)
def test_offset_does_not_change_valid(kernel):
    fixed, moved = (x.detach().float() for x in pair((1, 1, 7, 8, 36) if QUICK else (1, 1, 14, 12, 40)))
    o = {"window": 7, "kernel": kernel, "padding": "valid"}
    plain = fastreg.lcc_loss(fixed.double(), moved.double(), **o)
    for offset in (1.0, 2.0**10, 2.0**20):
        # Offsets by powers of two: rounding the images is then the only change, and the truth sees it too.
        f, m = fixed + offset, moved + offset
        assert_close(
            fastreg.lcc_loss(f, m, reduction="none", **o), two_pass(f.double(), m.double(), **o), floor=1
        )
        if offset <= 2.0**10:
            assert abs(fastreg.lcc_loss(f, m, **o) - plain) < 1e-4


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_non_finite_stays_in_its_windows(padding, bad, masked, kernel):
    o = {"window": 5, "padding": padding, "kernel": kernel}
    # Quick: its windows lie in two tiles.
    shape, (z, y, x) = ((1, 1, 9, 9, 38), (4, 4, 31)) if QUICK else ((2, 1, 40, 20, 30), (17, 9, 20))
    fixed, moved = (x.detach().float() for x in pair(shape))
    mask = torch.rand(shape) + 0.1 if masked else None
    f = fixed.clone()
    f[0, 0, z, y, x] = bad
    f.requires_grad_()
    clean_f = fixed.clone().requires_grad_()
    out, clean = ours(**o)(f, moved, mask), ours(**o)(clean_f, moved, mask)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, 0, z - 2 : z + 3, y - 2 : y + 3, x - 2 : x + 3] = True
    assert torch.equal(out.isnan(), expected)
    assert_close(out[~expected], clean[~expected].double())
    (grad,) = torch.autograd.grad(out.nan_to_num().sum(), f)
    assert torch.equal(out.isnan().any(), torch.tensor(True))
    touched = torch.zeros_like(expected)
    touched[0, 0, z - 4 : z + 5, y - 4 : y + 5, x - 4 : x + 5] = True
    assert not grad[~touched].isnan().any()
    (clean_grad,) = torch.autograd.grad(clean.sum(), clean_f)
    assert_close(grad[~touched], clean_grad[~touched].double(), floor=0.1)
    assert fastreg.lcc_loss(f, moved, mask=mask, **o).isnan()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_weight_that_is_not_finite_is_such_a_sample(kernel, bad):
    """Its windows are NaN, and no others, whatever the reduction: never a number without them."""
    o = {"window": 5, "kernel": kernel, "padding": "valid"}
    shape, (z, y, x) = ((1, 1, 9, 9, 38), (4, 4, 31)) if QUICK else ((2, 1, 40, 20, 30), (17, 9, 20))
    fixed, moved = (t.detach().float().requires_grad_() for t in pair(shape))
    clean = torch.rand(shape) + 0.1
    mask = clean.clone()
    mask[0, 0, z, y, x] = bad
    out, expected = ours(**o)(fixed, moved, mask), ours(**o)(fixed, moved, clean)
    holds = torch.zeros_like(out, dtype=torch.bool)
    holds[0, 0, z - 2 : z + 3, y - 2 : y + 3, x - 2 : x + 3] = True
    assert torch.equal(out.isnan(), holds)
    assert_close(out[~holds], expected[~holds].double())
    for reduction in ("mean", "sum"):
        assert fastreg.lcc_loss(fixed, moved, **o, mask=mask, reduction=reduction).isnan()
    touched = torch.zeros_like(holds)
    touched[0, 0, z - 4 : z + 5, y - 4 : y + 5, x - 4 : x + 5] = True
    for grad in torch.autograd.grad(
        fastreg.lcc_loss(fixed, moved, **o, mask=mask, reduction="sum"), (fixed, moved)
    ):
        assert not grad[~touched].isnan().any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_mask_excludes(kernel):
    fixed, moved = pair((1, 2, 12, 10, 14))
    ones = torch.ones(1, 1, 12, 10, 14)
    for padding in PADDINGS:
        plain = fastreg.lcc_loss(fixed, moved, 5, kernel=kernel, padding=padding)
        assert_close(fastreg.lcc_loss(fixed, moved, 5, kernel=kernel, mask=ones, padding=padding), plain)
    # With valid padding a mask that cuts is a crop, and what it hides is not looked at.
    mask = ones.clone()
    mask[..., 8:] = 0
    spoiled = moved.detach().clone()
    spoiled[..., 8:] = float("nan")
    spoiled.requires_grad_()
    loss = fastreg.lcc_loss(fixed, spoiled, 5, kernel=kernel, mask=mask, padding="valid")
    assert_close(loss, fastreg.lcc_loss(fixed[..., :8], moved[..., :8], 5, kernel=kernel, padding="valid"))
    (grad,) = torch.autograd.grad(loss, spoiled)
    assert grad[..., 8:].abs().max() == 0
    crop = moved.detach()[..., :8].requires_grad_()
    assert_close(
        grad[..., :8],
        torch.autograd.grad(fastreg.lcc_loss(fixed[..., :8], crop, 5, kernel=kernel, padding="valid"), crop)[
            0
        ],
    )
    zero = fastreg.lcc_loss(fixed, moved, 5, kernel=kernel, mask=torch.zeros_like(ones))
    assert zero == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(zero, (fixed, moved)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, 1000.0])
def test_constant_images(dtype, value):
    shape, window = ((1, 1, 3, 4, 5), 5) if QUICK else ((1, 1, 9, 10, 11), 9)
    texture = torch.rand(shape).to(dtype).requires_grad_()
    constant = torch.full(shape, value, dtype=dtype, requires_grad=True)
    cases = zip(DENOMINATORS, KERNELS, strict=True) if QUICK else itertools.product(DENOMINATORS, KERNELS)
    for denominator, kernel in cases:
        for f, m in ((constant, texture), (texture, constant), (constant, constant)):
            loss = fastreg.lcc_loss(f, m, window, kernel=kernel, padding="valid", denominator=denominator)
            assert abs(loss) < 1e-6
            for grad in torch.autograd.grad(loss, {f, m}):
                assert grad.eq(0).all()


def test_identical_images_reach_one():
    image = torch.rand(1, 1, *[5 if QUICK else 12] * 3)
    for denominator, squared, kernel in itertools.product(DENOMINATORS, (True, False), KERNELS):
        o = {"kernel": kernel, "denominator": denominator, "squared": squared, "smooth_dr": 1e-8}
        out = fastreg.lcc_loss(image, image, reduction="none", **o)
        assert (out >= -1).all()
        assert out.mean() < -0.999


def test_smooth_nr_in_flat_windows():
    flat = torch.zeros(1, 1, 6, 6, 6)
    assert_close(fastreg.lcc_loss(flat, flat, 3, smooth_nr=1e-6, smooth_dr=1e-5), torch.tensor(-0.1).double())
    assert fastreg.lcc_loss(flat, flat, 3, smooth_nr=1.0, smooth_dr=1e-5) == -1
    assert fastreg.lcc_loss(flat, flat, 3, smooth_dr=0.0) == 0


def test_window_one_and_windows_beyond_the_image():
    fixed, moved = pair((1, 1, 4, 5, 6))
    for padding, kernel in itertools.product(PADDINGS, KERNELS):
        assert fastreg.lcc_loss(fixed, moved, 1, kernel=kernel, padding=padding) == 0
        for window in (11, 31) if kernel == "box" else (13,):
            o = {"window": window, "padding": padding, "kernel": kernel}
            check_against_reference(ours(**o), lambda f, m, o=o: two_pass(f, m, **o), (fixed, moved), 1e-8)


def test_a_single_sample_has_no_correlation():
    """A triangle of window 3 and a Gaussian that has left its neighbours; its weights underflow to 0."""
    fixed, moved = pair((1, 1, 4, 5, 6))
    for o in (
        {"kernel": "triangular"},
        {"kernel": "gaussian", "sigma": 0.3},
        {"kernel": "gaussian", "sigma": 1e-3},
    ):
        for padding in PADDINGS:
            loss = fastreg.lcc_loss(fixed, moved, 3, padding=padding, **o)
            assert loss == 0
            assert all(g.eq(0).all() for g in torch.autograd.grad(loss, (fixed, moved)))
    # The sample of weight 0 is not in the window.
    spoiled = fixed.detach().clone()
    spoiled[0, 0, 1, 1, 1] = float("nan")
    out = fastreg.lcc_loss(spoiled, moved, 3, kernel="gaussian", sigma=1e-3, reduction="none")
    assert out.isnan().sum() == 1


def test_same_numbers_as_the_dense_convolution():
    """The formula of VoxelMorph up to 0.2 and TransMorph, in fp64."""
    fixed, moved = pair((1, 1, 14, 15, 16))
    ones = torch.ones(1, 1, 9, 9, 9, dtype=torch.float64)
    f, m, ff, mm, fm = (
        F.conv3d(x, ones, padding=4) for x in (fixed, moved, fixed**2, moved**2, fixed * moved)
    )
    n = 9**3
    cross, v, w = fm - f * m / n, ff - f * f / n, mm - m * m / n
    expected = -(cross**2 / (v * w + 1e-5)).mean()
    assert_close(fastreg.lcc_loss(fixed, moved), expected)


@pytest.mark.parametrize(
    ("kernel", "theirs"), [("box", "rectangular"), ("gaussian", "gaussian"), ("triangular", "triangular")]
)
def test_same_numbers_as_monai(kernel, theirs):
    losses = pytest.importorskip("monai.losses")
    for shape, window in (((2, 3, 12, 13, 14), 7), ((2, 1, 24, 25), 9)):
        fixed, moved = (x.detach() for x in pair(shape))
        loss = losses.LocalNormalizedCrossCorrelationLoss(
            len(shape) - 2, kernel_size=window, kernel_type=theirs, smooth_dr=1e-5
        )
        ours = fastreg.lcc_loss(fixed, moved, window, kernel=kernel, denominator="clamp")
        assert_close(ours, loss(moved, fixed), 1e-6)


def test_same_numbers_as_icon():
    """ICON's LNCC(sigma): local means by a normalised Gaussian of 4 sigma + 1 samples, zeros outside, unsquared."""
    sigma, window = 2, 9
    fixed, moved = pair((1, 1, 14, 15, 16))
    x = torch.arange(window, dtype=torch.float64) - window // 2
    taps = torch.exp(-(x**2) / (2 * sigma**2))

    def blur(image):
        for axis in range(3):
            shape = [window if k == axis else 1 for k in range(3)]
            image = F.conv3d(image, (taps / taps.sum()).view(1, 1, *shape), padding=[k // 2 for k in shape])
        return image

    def variance(a):
        return (blur(a * a) - blur(a) ** 2).relu() + 1e-5

    covariance = blur(fixed * moved) - blur(fixed) * blur(moved)
    theirs = 1 - (covariance / (variance(fixed) * variance(moved)).sqrt()).mean()
    o = {"kernel": "gaussian", "sigma": sigma, "squared": False, "denominator": "each"}
    ours = 1 + fastreg.lcc_loss(fixed, moved, window, smooth_dr=1e-5 * taps.sum().item() ** 3, **o)
    assert_close(ours, theirs)
    for grad, expected in zip(
        torch.autograd.grad(ours, (fixed, moved)), torch.autograd.grad(theirs, (fixed, moved)), strict=True
    ):
        assert_close(grad, expected, 1e-7)


def test_mixed_dtypes_are_promoted():
    fixed, moved = pair((1, 1, 8, 8, 8))
    f, m = fixed.detach().bfloat16().requires_grad_(), moved.detach().float().requires_grad_()
    loss = fastreg.lcc_loss(f, m)
    assert torch.equal(loss, fastreg.lcc_loss(f.float(), m))
    assert [g.dtype for g in torch.autograd.grad(loss, (f, m))] == [torch.bfloat16, torch.float32]


def test_numpy_numbers_and_odd_masks():
    fixed, moved = (x.detach() for x in pair((1, 1, 8, 9, 10)))
    assert fastreg.lcc_loss(fixed, moved, np.int64(5), smooth_dr=np.float32(0.5)) == fastreg.lcc_loss(
        fixed, moved, 5, smooth_dr=0.5
    )
    mask = torch.ones(1, 1, 8, 9, 10)
    mask[..., 0] = float("nan")
    assert fastreg.lcc_loss(fixed, moved, 5, mask=mask).isnan()


def test_the_shift_ignores_what_the_mask_hides():
    fixed, moved = (x.detach().float() for x in pair((1, 1, 12, 14, 40)))
    mask = torch.ones(1, 1, 12, 14, 40)
    mask[..., 8:30] = 0
    expected = fastreg.lcc_loss(fixed, moved, 5, mask=mask, padding="valid")
    filled = fixed.masked_fill(mask == 0, 1e30)
    assert_close(fastreg.lcc_loss(filled, moved, 5, mask=mask, padding="valid"), expected.double(), 1e-6)


def test_the_shift_of_an_image_without_a_middle(monkeypatch):
    """Far from 0, and masked out amid the image and in all of a tile whose windows reach beyond it."""
    if BACKEND == "triton":
        monkeypatch.setattr("fastreg.kernels.lcc_shift._PER_PART", 1024)
    fixed, moved = (torch.randint(0, 1024, (2, 1, 6, 7, 72)).double() / 1024 for _ in range(2))
    mask = torch.ones(2, 1, 6, 7, 72)
    mask[..., 16:64] = 0
    expected = two_pass(fixed, moved, mask.double(), padding="valid")
    for dtype in (torch.float32, torch.float64):
        far = ((1e3 + x).to(dtype) for x in (fixed, moved))
        got = fastreg.lcc_loss(*far, 5, mask=mask.to(dtype), padding="valid", reduction="none")
        assert_close(got, expected, 1e-4)


@pytest.mark.parametrize("kernel", ["box", "gaussian"])
def test_windows_that_pass_nothing_back_pass_no_nan(kernel):
    fixed, moved = torch.rand(2, 1, 1, 1, 12).requires_grad_().unbind(0)
    fixed = fixed.detach().clone()
    fixed[..., 6] = float("nan")
    fixed.requires_grad_()
    lcc = fastreg.lcc_loss(fixed, moved, 3, kernel=kernel, reduction="none")
    grads = torch.autograd.grad(lcc[~lcc.isnan()].sum(), (fixed, moved))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("contrast", [1e7, 1e9, 1e12])
def test_a_contrast_beyond_the_arithmetic_gives_nan_or_the_lcc(contrast, squared):
    fixed, moved = (contrast * torch.randn(2, 1, 1, 7, 9)).unbind(0)
    options = {"squared": squared, "padding": "valid", "reduction": "none"}
    lcc = fastreg.lcc_loss(fixed, moved, 5, **options)
    truth = fastreg.lcc_loss(fixed.double(), moved.double(), 5, **options)
    assert_close(lcc, truth.masked_fill(lcc.isnan(), float("nan")), 1e-4)
    if contrast < 1e8:
        assert lcc.isfinite().all()


def test_no_channels_average_to_nan():
    empty = torch.rand(1, 0, 4, 5)
    assert fastreg.lcc_loss(empty, empty, 3, reduction="none").isnan().all()


def test_weighted_windows_have_a_limit():
    image = torch.rand(1, 1, 4, 4)
    with pytest.raises(ValueError, match="window must be at most 65537"):
        fastreg.lcc_loss(image, image, 2**16 + 3, kernel="gaussian")


def opcheck(dtype):
    fixed, moved = pair((2, 1, 4, 5, 6), dtype)
    mask = torch.rand(2, 1, 4, 5, 6)
    for m, kernel in ((None, "box"), (mask, "gaussian"), (None, "triangular")):
        options = op_options(kernel=kernel)
        plain = fixed.detach(), moved.detach()
        yield torch.ops.fastreg.lcc_map.default, (fixed, moved, m, *options)
        yield torch.ops.fastreg.lcc_map_bwd.default, (torch.rand_like(mask), *plain, m, *options, True, False)
        # The unit gradients it also returns have no derivative: asking for one raises.
        arguments = (fixed, plain[1], m, *options, True, False)
        yield torch.ops.fastreg.lcc_loss.default, arguments, ("test_schema", "test_faketensor")


def case(masked=False, empty=math.nan, **options):
    def make(n, spatial, dtype):
        images = pair((n, 2, *spatial), dtype)
        return (*images, torch.rand(n, 1, *spatial).to(dtype)) if masked else images

    return Case(lambda f, m, mask=None: fastreg.lcc_loss(f, m, 5, mask=mask, **options), make, empty)


VALID = {"fixed": torch.zeros(1, 1, 4, 5, 6), "moved": torch.zeros(1, 1, 4, 5, 6)}
ERRORS = [
    (TypeError, "fixed must be fp64, fp32, fp16 or bf16, got torch.int16", {"fixed": torch.zeros(1, 1, 4, 5, 6).short()}),
    (TypeError, "window must be an int, got 9.0", {"window": 9.0}),
    (ValueError, "window must be odd and positive, got 8", {"window": 8}),
    (ValueError, "window must be odd and positive, got -1", {"window": -1}),
    (ValueError, r"fixed must have shape \(N, C, D, H, W\) or \(N, C, H, W\), got \(4, 5, 6\)", {"fixed": torch.zeros(4, 5, 6)}),
    (ValueError, r"moved must have the shape \(1, 1, 4, 5, 6\) of fixed, got \(1, 1, 4, 5, 7\)", {"moved": torch.zeros(1, 1, 4, 5, 7)}),
    (ValueError, r"mask must have shape \(1, 1, 4, 5, 6\), got \(1, 4, 5, 6\)", {"mask": torch.zeros(1, 4, 5, 6)}),
    (ValueError, "mask must not require a gradient", {"mask": torch.zeros(1, 1, 4, 5, 6, requires_grad=True)}),
    (ValueError, "padding must be 'zeros' or 'valid', got ", {"padding": np.array(["zeros", "valid"])}),
    (TypeError, "smooth_dr must be a number", {"smooth_dr": "1"}),
    (ValueError, "padding must be 'zeros' or 'valid', got 'border'", {"padding": "border"}),
    (ValueError, "kernel must be 'box' or 'gaussian' or 'triangular', got 'rectangular'", {"kernel": "rectangular"}),
    (ValueError, "window must be odd and positive, got 6", {"kernel": "triangular", "window": 6}),
    (ValueError, "sigma must be a number > 0, got 0", {"kernel": "gaussian", "sigma": 0}),
    (ValueError, "sigma must be a number > 0, got -2.0", {"kernel": "gaussian", "sigma": -2.0}),
    (ValueError, "sigma must be a number > 0, got nan", {"kernel": "gaussian", "sigma": float("nan")}),
    (TypeError, "sigma must be a number", {"kernel": "gaussian", "sigma": "2"}),
    (ValueError, "sigma must be None for kernel 'box', got 2.0", {"sigma": 2.0}),
    (ValueError, "sigma must be None for kernel 'triangular', got 2.0", {"kernel": "triangular", "sigma": 2.0}),
    (ValueError, "denominator must be", {"denominator": "sum"}),
    (ValueError, "reduction must be 'mean' or 'sum' or 'none', got None", {"reduction": None}),
    (ValueError, "smooth_dr must be a number >= 0, got -1", {"smooth_dr": -1}),
]  # fmt: skip

CONTRACT = Contract(
    cases={
        "box": case(),
        "gaussian": case(kernel="gaussian", reduction="sum", empty=0.0),
        "triangular-masked": case(True, 0.0, kernel="triangular"),
        "map": case(reduction="none"),
        "gaussian-map-masked": case(True, kernel="gaussian", reduction="none", padding="valid"),
        "triangular-map": case(kernel="triangular", reduction="none"),
    },
    valid=VALID,
    errors=ERRORS,
    opcheck=opcheck,
    gradcheck={
        "-".join(str(o) for o in options.values()): case(
            mask, padding="valid" if mask else "zeros", smooth_dr=1e-2, **options
        )
        for mask in (False, True)
        for options in [
            {"squared": squared, "denominator": denominator, "kernel": kernel, "reduction": reduction}
            for squared, denominator, kernel, reduction in itertools.product(
                (True, False), DENOMINATORS, KERNELS, ("mean", "none")
            )
        ][:: 5 if QUICK else 1]
    },
    double_backward=False,
    layouts=True,
    vmap=True,
    compiled=True,
    empty_batch=True,
    empty_axes=True,
    empty_channels="NaN, the mean of no channels: test_no_channels_average_to_nan",
    repeats=True,
    tolerance=1e-6,
    large=((70, 16, 23), (140, 123)),
)
