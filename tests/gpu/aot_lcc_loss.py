"""Calls whose Triton kernels tests/gpu/test_triton.py compiles."""

import torch


def calls():
    def images(shape, dtype):
        return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    volume, plane = (1, 2, 4, 5, 6), (1, 1, 5, 6)
    box = (9, "box", None, True, "zeros", 0.0, 1e-5, "product")
    gaussian = (11, "gaussian", 1.7, False, "valid", 0.0, 1e-5, "each")
    mask = torch.zeros(1, 1, 4, 5, 6)
    yield "lcc_loss", *images(volume, torch.float32), None, *box, False, True
    yield "lcc_loss", *images(volume, torch.float16), mask.half(), *gaussian, True, True
    yield "lcc_loss", *images(volume, torch.float64), None, *box, True, True
    yield "lcc_loss", *images(volume, torch.float32), mask, 21, *gaussian[1:], True, False
    yield "lcc_map", *images(plane, torch.bfloat16), None, *box[:-1], "clamp"
    yield "lcc_map_bwd", mask, *images(volume, torch.float32), mask, *gaussian, False, True
