"""Calls whose kernels tests/gpu/test_triton.py compiles."""

import torch

SSC = (2, 2, "ssc", "box", 0.5)
SIX = (1, 1, "six", "gaussian", 0.5)


def calls():
    volume, plane, mask = torch.zeros(1, 1, 16, 16, 64), torch.zeros(1, 2, 16, 300), torch.ones(1, 1, 16, 300)
    yield "mind_loss", volume, volume, None, None, *SSC, "l2", False, True
    yield "mind_loss", volume.bfloat16(), volume.bfloat16(), None, None, *SIX, "l1", True, True
    yield "mind_loss", plane.double(), plane.double(), None, mask.double(), *SSC, "l2", False, True
    yield "mind_map", volume.half(), volume.half(), None, None, 3, *SSC[1:], "l2"
    yield "mind_map_bwd", mask, plane, plane, None, None, 3, *SSC[1:], "l2", False, True
    yield "mind", volume, *SSC
    yield "mind_bwd", torch.zeros(1, 12, 16, 16, 64), volume, *SSC
    yield "mind_mean_variance", plane, None, *SSC
