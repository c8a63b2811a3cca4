"""Calls whose Triton kernels tests/gpu/test_triton.py compiles."""

import torch


def calls():
    for dtype, shape, radius, displaced, normalize, padding in (
        (torch.float32, (1, 32, 8, 8, 16), [2, 2, 2], False, False, "zeros"),
        (torch.float64, (1, 8, 4, 8, 16), [1, 0, 2], True, True, "border"),
        (torch.float16, (2, 3, 8, 33), [4, 3], False, True, "border"),
        (torch.bfloat16, (1, 16, 8, 8, 16), [3, 1, 1], True, True, "zeros"),
    ):
        fixed, moving = torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
        u = torch.zeros(shape[0], len(shape) - 2, *shape[2:]) if displaced else None
        options = (radius, u, normalize, "mean", padding)
        yield "local_correlation", fixed, moving, *options
        grad = torch.ones(shape[0], torch.Size(2 * r + 1 for r in radius).numel(), *shape[2:], dtype=dtype)
        statistics = torch.ones((shape[0], 4) if normalize else 0, dtype=torch.float64)
        yield "local_correlation_bwd", grad, fixed, moving, statistics, *options, True, True
