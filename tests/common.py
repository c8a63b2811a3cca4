"""What the op tests share: tolerances, layouts, derivative checks."""

import pytest
import torch
from backends import BACKEND as BACKEND

from fastreg import _ext

COMPILED = BACKEND == "cpu" and _ext._state["extension"] == "loaded"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Relative to max(|value|, 1e-3 max|tensor|). Halves: 2 ulp of the value; fp32 results: 1e-5.
# Gradients of fp32 are sums whose terms cancel: their floor is 0.1 max|tensor|.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.float16: 2 * 2.0**-10,
    torch.bfloat16: 2 * 2.0**-7,
}


def skip_where_the_interpreter_truncates(dtype):
    """Triton's interpreter cuts fp32 to bf16; a GPU rounds."""
    if BACKEND == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not round to bf16")


def assert_close(actual, truth, tolerance=None, floor=1e-3):
    """`truth` is fp64 on the same rounded inputs; the tolerance is that of actual's dtype unless given."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    actual_, truth = actual.detach().double(), truth.detach().to(actual.device, torch.float64)
    assert torch.equal(actual_.isnan(), truth.isnan()), "NaN in other places"
    actual_, truth = actual_[~truth.isnan()], truth[~truth.isnan()]
    if truth.numel() == 0:
        return
    scale = truth.abs().clamp_min(floor * truth.abs().max()).clamp_min(torch.finfo(torch.float32).tiny)
    worst = ((actual_ - truth).abs() / scale).max().item()
    limit = tolerance or TOLERANCE[actual.dtype]
    assert worst <= limit, f"relative error {worst:.3g} > {limit:.3g}"
    if truth.abs().max() > 0:
        assert actual_.abs().max() > 0, "all zero"


def double(t):
    return t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t


def gradients(function, inputs, weight=None):
    """Output and gradients of sum(output * weight); None for inputs that require none."""
    output = function(*inputs)
    weight = torch.ones_like(output) if weight is None else weight.to(output.dtype)
    wanted = [i for i in inputs if isinstance(i, torch.Tensor) and i.requires_grad]
    return output, torch.autograd.grad((output * weight).sum(), wanted)


def check_against_reference(op, reference, inputs, tolerance=None):
    """Forward and every gradient of `op` against `reference` in fp64 on the same (rounded) inputs."""
    truth_inputs = [double(i) for i in inputs]
    truth = reference(*truth_inputs)
    weight = torch.randn(truth.shape, dtype=torch.float64).to(op(*inputs).dtype)
    output, grads = gradients(op, inputs, weight)
    truth, truth_grads = gradients(reference, truth_inputs, weight.double())
    assert_close(output, truth, tolerance)
    for grad, truth_grad, i in zip(
        grads, truth_grads, [i for i in inputs if getattr(i, "requires_grad", False)], strict=True
    ):
        assert grad.dtype == i.dtype
        assert_close(grad, truth_grad, tolerance, floor=0.1 if grad.dtype == torch.float32 else 1e-3)


def layouts(t):
    """The same values in other memory: id -> tensor."""
    padded = torch.nn.functional.pad(t, (1, 2, 1, 1))
    return {
        "transposed": t.transpose(-1, -2).contiguous().transpose(-1, -2),
        "sliced": padded[..., 1:-1, 1:-2],
        "channels_last": t.movedim(1, -1).contiguous().movedim(-1, 1),
        "strided": t.repeat_interleave(2, -1)[..., ::2],
    }
