"""The displacement of an affine map."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops import _linear


def affine_displacement(
    matrix: Tensor,  # (N, nd, nd + 1)
    shape: Sequence[int],
) -> Tensor:  # (N, nd, *shape)
    """The displacement of an affine map: ``out(p) = matrix [p, 1] - p``, p in voxels (z, y, x), origin at index 0.

    Computed as ``(matrix - I) [p, 1]`` in fp64: a matrix near the identity loses nothing to the size of the volume.
    Gradient: ``dL/dmatrix = sum_p g(p) [p, 1]^T``. Both are linear, each the backward of the other.

    Args:
        matrix (Tensor): (N, 3, 4) or (N, 2, 3), fp64 / fp32 / fp16 / bf16: voxels (z, y, x, 1) to voxels (z, y, x). Any
            matrix, a singular one too; what is not finite spreads over its component by the rules of arithmetic.
        shape (sequence of int): spatial shape of the result.

    Returns:
        Tensor: (N, nd, *shape) in voxels, dtype of matrix, fp32 for halves, which do not resolve voxels of a volume.
        Differentiable (any number of times) in matrix.

    Raises:
        TypeError: matrix is not floating, shape no integers.
        ValueError: the shape of matrix or `shape` does not fit.

    Notes:
        Deterministic: the gradient is summed in fp64, row by row.

    Example:
        >>> matrix = torch.tensor([[[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]])  # half a voxel down, twice as wide
        >>> fastreg.affine_displacement(matrix, (2, 3))[0, 1]  # along x
        tensor([[0., 1., 2.],
                [0., 1., 2.]])
    """
    _check.floating("affine_displacement", matrix=matrix)
    nd = _check.affine("affine_displacement", "matrix", matrix)
    shape = _check.sizes("affine_displacement", "shape", shape, nd, 0)
    return torch.ops.fastreg.affine_displacement(matrix, shape, True)


def affine_displacement_ref(matrix, shape, subtract_identity):
    nd, m = len(shape), matrix.double()
    if subtract_identity:
        m = m - torch.eye(nd, nd + 1, dtype=m.dtype, device=m.device)
    axes = [torch.arange(s, dtype=m.dtype, device=m.device) for s in shape]
    result = m[:, :, nd].view(*m.shape[:2], *[1] * nd)
    for k, p in enumerate(axes):
        slope = m[:, :, k].view(*m.shape[:2], *[1] * nd)
        result = result + slope * _linear.along(p, k, nd)
    return result.to(_ext.arithmetic(matrix))


def affine_displacement_bwd_ref(grad):
    nd, g = grad.shape[1], grad.double()
    columns = []
    for k in range(nd):
        p = torch.arange(grad.shape[k + 2], dtype=g.dtype, device=g.device)
        columns.append((g * _linear.along(p, k, nd)).flatten(2).sum(2))
    return torch.stack([*columns, g.flatten(2).sum(2)], 2).to(grad.dtype)


def _fake(matrix, shape, subtract_identity):
    return matrix.new_empty((*matrix.shape[:2], *shape), dtype=_ext.arithmetic(matrix))


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
