"""Affine displacement: ``out(p) = A [p, 1] - p``, p in voxels (z, y, x), origin at index 0.

Computed as ``(A - I) [p, 1]`` in fp64: a matrix near the identity loses nothing to the size of the volume. Gradient:
``dL/dA = sum_p g(p) [p, 1]^T``. Both are linear, each the backward of the other.
"""

import operator

import torch

from fastreg import _ext
from fastreg.ops import _check


def affine_displacement(matrix, shape):
    """The displacement of an affine map: ``out(p) = matrix [p, 1] - p``.

    Args:
        matrix (Tensor): (N, 3, 4) or (N, 2, 3), fp64 / fp32 / fp16 / bf16: voxels (z, y, x, 1) to voxels (z, y, x). Any
            matrix, a singular one too; what is not finite spreads over its component by the rules of arithmetic.
        shape (sequence of int): spatial shape of the result.

    Returns:
        Tensor: (N, nd, *shape) in voxels, dtype of matrix, fp32 for halves, which do not resolve voxels of a volume.
        Differentiable (any number of times) in matrix.

    Raises:
        TypeError: matrix is not floating, shape no integers. ValueError: the shape of matrix or `shape` does not fit.

    Notes:
        Deterministic: the gradient is summed in fp64, row by row.
    """
    _check.floating("affine_displacement", matrix=matrix)
    nd = _check.affine("affine_displacement", "matrix", matrix)
    try:
        shape = [s if isinstance(s, (int, torch.SymInt)) else operator.index(s) for s in shape]
    except TypeError:
        _check.fail("affine_displacement", "shape", f"be {nd} integers", repr(shape), TypeError)
    if len(shape) != nd or not all(s >= 0 for s in shape):
        _check.fail("affine_displacement", "shape", f"be {nd} integers >= 0", tuple(shape))
    return torch.ops.fastreg.affine_displacement(matrix, shape, True)


def affine_displacement_ref(matrix, shape, subtract_identity):
    nd, m = len(shape), matrix.double()
    if subtract_identity:
        m = m - torch.eye(nd, nd + 1, dtype=m.dtype, device=m.device)
    axes = [torch.arange(s, dtype=m.dtype, device=m.device) for s in shape]
    result = m[:, :, nd].view(*m.shape[:2], *[1] * nd)
    for k, p in enumerate(axes):
        slope = m[:, :, k].view(*m.shape[:2], *[1] * nd)
        result = result + slope * p.view([-1 if j == k else 1 for j in range(nd)])
    return result.to(torch.promote_types(matrix.dtype, torch.float32))


def affine_displacement_bwd_ref(grad):
    nd, g = grad.shape[1], grad.double()
    columns = []
    for k in range(nd):
        p = torch.arange(grad.shape[k + 2], dtype=g.dtype, device=g.device)
        columns.append((g * p.view([-1 if j == k else 1 for j in range(nd)])).flatten(2).sum(2))
    return torch.stack([*columns, g.flatten(2).sum(2)], 2).to(grad.dtype)


def _fake(matrix, shape, subtract_identity):
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    return matrix.new_empty((*matrix.shape[:2], *shape), dtype=dtype)


def _bwd_fake(grad):
    return grad.new_empty((*grad.shape[:2], grad.shape[1] + 1))


_ext.define(
    "affine_displacement(Tensor matrix, SymInt[] shape, bool subtract_identity) -> Tensor",
    affine_displacement_ref,
    _fake,
)
_ext.define("affine_displacement_bwd(Tensor grad) -> Tensor", affine_displacement_bwd_ref, _bwd_fake)


def _setup(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype


def _backward(ctx, grad):
    return torch.ops.fastreg.affine_displacement_bwd(grad).to(ctx.dtype), None, None


def _setup_bwd(ctx, inputs, output):
    ctx.shape = inputs[0].shape[2:]


def _backward_bwd(ctx, grad):
    return torch.ops.fastreg.affine_displacement(grad, ctx.shape, False)


_ext.autograd("affine_displacement", _setup, _backward)
_ext.autograd("affine_displacement_bwd", _setup_bwd, _backward_bwd)
_ext.batched("affine_displacement", "affine_displacement_bwd")
