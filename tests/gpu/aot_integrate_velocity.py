"""What test_triton.py compiles of kernels/integrate_velocity.py."""

import torch


def calls():
    u, v = torch.zeros(1, 2, 8, 40), torch.zeros(1, 2, 8, 40, dtype=torch.bfloat16)
    yield "compose", u, v, "border"
    yield "compose_bwd", u, u, v, "border", True, True
    v = torch.zeros(1, 3, 4, 8, 40)
    yield "integrate_velocity", v, 3, "border", True
    yield "integrate_velocity_bwd", v, v, torch.zeros(1, 2, 4, 8, 40, 4), 3, "border"
