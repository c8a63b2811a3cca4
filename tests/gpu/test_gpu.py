"""What only a GPU can show: CUDA graphs, streams, devices, volumes of more than 2^31 elements.

The numbers are checked by the tests of each op, run with FASTREG_TEST_BACKEND=cuda.
"""

import functools

import pytest
import torch

import fastreg
from fastreg.ops.mind_loss import mind_loss_ref

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE = (2, 2, 20, 21, 37)


def inputs(device="cuda"):
    generator = torch.Generator(device).manual_seed(0)
    f, m = (torch.rand(SHAPE, device=device, generator=generator) for _ in range(2))
    u = 2 * torch.randn((2, 3, *SHAPE[2:]), device=device, generator=generator)
    return f, m, u


# Each takes (fixed, moving, displacement) and gives a scalar that depends on what requires a gradient.
STEPS = {
    "warp": lambda f, m, u: (f * fastreg.warp(m, u)).sum(),
    "warp_affine": lambda f, m, u: (f * fastreg.warp(m, u, affine=torch.eye(3, 4, device=m.device).expand(2, 3, 4))).sum(),
    "warp_border": lambda f, m, u: (f * fastreg.warp(m, 9 * u, padding="border")).sum(),
    "warp_reflection": lambda f, m, u: (f * fastreg.warp(m, 9 * u, padding="reflection")).sum(),
    "warp_half": lambda f, m, u: fastreg.warp(m.bfloat16(), u).float().square().sum(),
    "warp_nearest": lambda f, m, u: (f * fastreg.warp(m, u, mode="nearest")).sum(),
    "warp_2d": lambda f, m, u: fastreg.warp(m[:, :, 0], u[:, :2, 0]).square().sum(),
    "warp_coarse": lambda f, m, u: (f * fastreg.warp_coarse(m, u[..., ::2, ::3, ::2].contiguous())).sum(),
    "lcc_loss": lambda f, m, u: fastreg.lcc_loss(f, fastreg.warp(m, u), 9),
    "lcc_loss_masked": lambda f, m, u: fastreg.lcc_loss(f, fastreg.warp(m, u), 5, mask=(f[:, :1] > 0.2).float()),
    "lcc_loss_2d": lambda f, m, u: fastreg.lcc_loss(f[:, :, 0], m[:, :, 0], 7),
    "lcc_loss_gaussian": lambda f, m, u: fastreg.lcc_loss(f, fastreg.warp(m, u), 21, kernel="gaussian", sigma=5.0),
    "lcc_loss_long": lambda f, m, u: fastreg.lcc_loss(f, fastreg.warp(m, u), 23),
    "lcc_loss_fp64": lambda f, m, u: fastreg.lcc_loss(f.double(), fastreg.warp(m.double(), u), 5).float(),
    "lcc_loss_map": lambda f, m, u: fastreg.lcc_loss(f, fastreg.warp(m, u), 5, reduction="none").square().sum(),
    "local_correlation": lambda f, m, u: fastreg.local_correlation(
        f, m, 2, displacement=u, normalize=True
    ).square().mean(),
    "local_correlation_border": lambda f, m, u: fastreg.local_correlation(
        f, m, 1, displacement=9 * u, padding="border"
    ).square().mean(),
    "local_correlation_2d": lambda f, m, u: fastreg.local_correlation(f[:, :, 0], m[:, :, 0], 3).square().mean(),
    "cost_volume": lambda f, m, u: fastreg.cost_volume(f, m, 4, 2, stride=2).square().mean(),
    "cost_volume_2d": lambda f, m, u: fastreg.cost_volume(f[:, :, 0], m[:, :, 0], 3, 3).square().mean(),
    "mind": lambda f, m, u: fastreg.mind(fastreg.warp(m, u)).square().sum(),
    "mind_loss_six": lambda f, m, u: fastreg.mind_loss(f, fastreg.warp(m, u), neighbourhood="six"),
    "mind_loss_2d": lambda f, m, u: fastreg.mind_loss(f[:, :, 0], m[:, :, 0]),
    "mind_loss_map": lambda f, m, u: fastreg.mind_loss(f, fastreg.warp(m, u), reduction="none").square().sum(),
    "mse_loss_map": lambda f, m, u: fastreg.mse_loss(f, fastreg.warp(m, u), reduction="none").square().sum(),
    "compose": lambda f, m, u: fastreg.compose(u, u).square().mean(),
    "integrate_velocity": lambda f, m, u: fastreg.integrate_velocity(u).square().mean(),
    "invert_displacement": lambda f, m, u: fastreg.invert_displacement(fastreg.smooth(u, 2.0)).square().mean(),
    "smooth": lambda f, m, u: fastreg.smooth(u, 1.5).square().mean(),
    "resize_displacement": lambda f, m, u: fastreg.resize_displacement(u, (10, 30, 20)).square().mean(),
    "jacobian_determinant": lambda f, m, u: fastreg.jacobian_determinant(u).square().mean(),
    "integrate_gradients": lambda f, m, u: fastreg.integrate_gradients(u).square().mean(),
    "diffusion": lambda f, m, u: fastreg.diffusion(u),
    "total_variation": lambda f, m, u: fastreg.total_variation(u),
    "bending_energy": lambda f, m, u: fastreg.bending_energy(u),
    "affine_displacement": lambda f, m, u: fastreg.affine_displacement(
        u[..., 0, 0, :4].mean(-1, keepdim=True) + torch.eye(3, 4, device=u.device), SHAPE[2:]
    ).square().mean(),
    "bspline_displacement": lambda f, m, u: fastreg.bspline_displacement(u, 2, (34, 36, 68)).square().mean(),
    "gaussian_displacement": lambda f, m, u: fastreg.gaussian_displacement(
        u[:, 0, 0, :5, :7].sigmoid(), (20, 37)
    ).square().mean(),
}  # fmt: skip
# Of a loss of two images that says no more.
for _module in (getattr(fastreg.nn, name) for name in fastreg.nn.__all__):
    if _module.inputs[:2] == ("fixed", "moved"):
        STEPS.setdefault(_module.op.__name__, lambda f, m, u, loss=_module.op: loss(f, fastreg.warp(m, u)))


def step(name, f, m, u):
    """Loss and the gradients to moving and displacement, where it depends on them."""
    m, u = m.detach().requires_grad_(), u.detach().requires_grad_()
    loss = STEPS[name](f, m, u)
    return [
        loss.detach(),
        *(g for g in torch.autograd.grad(loss, (m, u), allow_unused=True) if g is not None),
    ]


def assert_same(results, expected):
    for a, b in zip(results, expected, strict=True):
        # Atomic sums differ in their last bits from run to run.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("name", STEPS)
def test_steps_without_a_gpu(name):
    """So that an error in the steps themselves is not found where device time is spent."""
    results = step(name, *inputs("cpu"))
    assert len(results) > 1
    assert all(t.isfinite().all() for t in results)


def test_every_op_has_a_step():
    assert set(fastreg.ops.__all__) <= set(STEPS)


@needs_gpu
@pytest.mark.parametrize("name", STEPS)
def test_replays_in_a_graph(name):
    static = [t.clone() for t in inputs()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(name, *static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(name, *static)
    f, m, u = inputs()
    for t, fresh in zip(static, (m, f, 0.5 * u), strict=True):
        t.copy_(fresh)
    graph.replay()
    assert_same(results, step(name, m, f, 0.5 * u))


@needs_gpu
@pytest.mark.parametrize("name", STEPS)
def test_runs_on_the_current_stream(name):
    f, m, u = inputs()
    expected = step(name, f, m, u)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # What the op must wait for takes longer than the op.
        torch.cuda._sleep(int(2e7))
        late = [t.clone() for t in (f, m, u)]
        results = step(name, *late)
    side.synchronize()
    assert_same(results, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", STEPS)
def test_runs_on_a_device_that_is_not_current(name):
    expected = step(name, *inputs())
    results = step(name, *(t.to("cuda:1") for t in inputs()))
    assert all(t.device == torch.device("cuda:1") for t in results)
    assert_same([t.to("cuda:0") for t in results], expected)


@needs_gpu
def test_mixed_devices_are_refused():
    f, m, u = inputs()
    with pytest.raises(ValueError, match="device"):
        fastreg.warp(m, u.cpu())
    with pytest.raises(ValueError, match="device"):
        fastreg.lcc_loss(f, m.cpu())


@needs_gpu
def test_deterministic_warp():
    f, m, u = inputs()
    torch.use_deterministic_algorithms(True)
    first, second = step("warp", f, m, u), step("warp", f, m, u)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_gpu
@pytest.mark.parametrize("both", [False, True])
def test_mind_in_several_slabs(both):
    """So large that its scratch memory is cut into slabs, as at the sizes that people run."""
    f, m = (torch.rand(1, 1, 128, 192, 192, device="cuda") for _ in range(2))
    f.requires_grad_(both), m.requires_grad_()
    loss = fastreg.mind_loss(f, m)
    grads = torch.autograd.grad(loss, (f, m) if both else (m,))
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (f, m)]
    sums, *units = mind_loss_ref(*exact, None, None, 2, 2, "ssc", "box", 0.5, "l2", both, True)
    count = 12 * f.numel()
    torch.testing.assert_close(loss.double(), sums.sum() / count, rtol=1e-5, atol=0)
    for grad, unit in zip(grads, units[not both :], strict=True):
        # Where two channels tie for the minimum fp32 may choose the other: a few voxels differ.
        error = (grad.double() - unit / count).abs() > 1e-3 * unit.abs().max() / count
        assert error.double().mean() < 1e-3


def enough_memory(gigabytes):
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > gigabytes * 2**30


def assert_same_at_corners(op, inputs, margin, more_than=2**32, **tolerance):
    """Two corners of a huge volume against the same corners by themselves, further in than an op reaches."""
    whole = op(*inputs)
    assert whole.numel() > more_than
    for corner in (slice(0, 24), slice(-24, None)):
        at = (..., corner, corner, corner)
        part = op(*(t[at].contiguous() for t in inputs))
        inner = (..., *[slice(margin, -margin)] * 3)
        torch.testing.assert_close(whole[at][inner], part[inner], **tolerance)
    return whole


@needs_gpu
@pytest.mark.skipif(not enough_memory(60), reason="needs 60 GB")
def test_more_than_2_31_elements():
    """And a displacement of more than 2^32."""
    shape = (1296, 1296, 1296)
    m = torch.rand((1, 1, *shape), device="cuda", dtype=torch.bfloat16)
    u = torch.empty((1, 3, *shape), device="cuda").uniform_(-2, 2)
    warped = assert_same_at_corners(fastreg.warp, (m, u), 3, 2**31)
    del u
    planes = zip(m[0, 0].split(81), warped[0, 0].split(81), strict=True)
    squares = sum((a.float() - b.float()).square().sum(dtype=torch.float64) for a, b in planes)
    torch.testing.assert_close(fastreg.mse_loss(m, warped).double(), squares / m.numel(), rtol=1e-4, atol=0)
    lcc = functools.partial(fastreg.lcc_loss, window=5, reduction="none")
    assert_same_at_corners(lcc, (m, warped), 3, 2**31, rtol=1e-4, atol=1e-5)


def gradient(op, image, *others):
    """The gradient of op to an image, upstream the op's output itself: as local as the op."""
    image = image.detach().requires_grad_()
    output = op(image, *others)
    return torch.autograd.grad(output, image, output.detach())[0]


@needs_gpu
@pytest.mark.skipif(not enough_memory(40), reason="needs 40 GB")
@pytest.mark.parametrize(
    ("op", "size", "count", "reach"),
    [
        (functools.partial(fastreg.local_correlation, radius=2), 328, 2, 2),  # 125 channels
        (fastreg.mind, 712, 1, 4),  # 12 channels
    ],
)
def test_more_than_2_32_elements_in_the_channels(op, size, count, reach):
    images = [torch.rand((1, 1, size, size, size), device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    assert_same_at_corners(op, images, reach + 1, rtol=1e-2, atol=1e-2)
    backward = functools.partial(gradient, op)
    assert_same_at_corners(backward, images, 2 * reach + 1, 0, rtol=2e-2, atol=2e-2)
