"""Calls whose kernels tests/test_triton.py compiles."""

import torch

SSC = (2, 2, "ssc", "box", 0.5)
SIX = (1, 1, "six", "gaussian", 0.5)


def calls():
    volume, plane = torch.zeros(1, 1, 16, 16, 64), torch.zeros(1, 2, 16, 300)
    mask = torch.ones(1, 1, 16, 16, 64)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = volume.to(dtype)
        yield "mind_loss", x, x, None, mask, *SSC, "l2", False, True
    yield "mind_loss", plane.half(), plane.half(), None, None, *SIX, "l1", True, True
    yield "mind_loss", volume, volume, None, None, *SIX, "l1", False, False
    yield "mind_map", volume, volume, None, 3, *SSC[1:], "l2"
    yield "mind_map_bwd", mask, volume, volume, None, 3, *SSC[1:], "l2", False, True
    yield "mind", volume, *SSC
    yield "mind_bwd", torch.zeros(1, 12, 16, 16, 64), volume, *SSC
    yield "mind_mean_variance", plane, *SSC
