"""Calls whose Triton kernels tests/gpu/test_triton.py compiles."""

import torch


def calls():
    for dtype, shape, cell, radius, stride, masked in (
        (torch.float32, (1, 12, 12, 12, 16), [4, 4, 4], [6, 6, 6], [2, 2, 2], False),
        (torch.float64, (1, 2, 4, 8, 16), [2, 3, 4], [1, 0, 2], [1, 1, 1], True),
        (torch.float16, (2, 3, 8, 33), [4, 3], [2, 3], [1, 1], False),
        (torch.bfloat16, (1, 4, 8, 8, 16), [3, 3, 3], [3, 3, 3], [1, 2, 1], True),
    ):
        fixed, moving = torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
        mask = torch.ones((shape[0], 1, *shape[2:]), dtype=torch.float32) if masked else None
        yield "cost_volume", fixed, moving, mask, cell, radius, stride
