"""What test_triton.py compiles of kernels/invert_displacement.py."""

import torch


def calls():
    for u in (torch.zeros(1, 2, 8, 40, dtype=torch.bfloat16), torch.zeros(1, 3, 4, 8, 40)):
        for points in (None, torch.zeros(*u.shape[:2], *[3] * (u.dim() - 2), dtype=u.dtype)):
            yield "invert_displacement", u, points, "border", 20
            v = torch.zeros(u.shape if points is None else points.shape)
            yield "invert_displacement_adjoint", v, v, u, points, "border"
