"""What test_triton.py compiles of kernels/warp.py."""

import torch


def calls():
    def tensors(nd, image, u):
        shape = (1, 2, *(4, 8, 40)[3 - nd :])
        displacement = None if u is None else torch.zeros(1, nd, *shape[2:], dtype=u)
        affine = torch.zeros(1, nd, nd + 1, dtype=torch.float32) if u in (None, torch.float64) else None
        return torch.zeros(shape, dtype=image), displacement, affine

    cases = (
        (3, torch.float32, torch.float32, "linear", "zeros"),
        (3, torch.bfloat16, torch.float32, "linear", "border"),
        (3, torch.float16, torch.float64, "linear", "reflection"),
        (2, torch.float32, None, "linear", "zeros"),
        (2, torch.float64, torch.float32, "nearest", "reflection"),
    )
    for nd, image, u, mode, padding in cases:
        arguments = (*tensors(nd, image, u), mode, padding)
        yield "warp", *arguments
        yield "warp_bwd", arguments[0], *arguments, True, u is not None, arguments[2] is not None
    arguments = (*tensors(3, torch.float32, torch.float32), "linear", "zeros")
    yield "warp_bwd", arguments[0], *arguments, False, True, False
