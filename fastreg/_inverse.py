"""The inverse of a displacement that may hold a large affine part, and go beyond its grid.

What u sends to c is q = A^-1 c + w, where A is the affine map nearest to x + u(x) and w, by Newton's method, the inverse of
what u is beside it, A^-1 (x + u - A x), at A^-1 c. So the affine part is inverted exactly, and beyond its grid u goes on as
that part does, with what is beside it at the nearest border. Where c comes from inside of the grid neither matters.
"""

import torch
from torch import Tensor

from . import ops

_SINGULAR = 1e-2  # a determinant of A below which u is no map with an inverse, and A = I


class Inverse:
    """Of u (1, nd, *spatial), voxels. Called with points (1, nd, *any nd axes), voxels of u's grid: where they come from.

    matrix: (nd, nd + 1) fp64, A.
    """

    def __init__(self, u: Tensor) -> None:
        self.matrix = nearest_affine(u)
        nd = u.shape[1]
        linear, shift = self.matrix[:, :nd], self.matrix[:, nd:]
        back = torch.linalg.inv(linear)
        self._back = torch.cat([back, -back @ shift], 1)
        rest = u - ops.affine_displacement(self.matrix[None].to(u.device), u.shape[2:]).to(u.dtype)
        self._rest = _times(back, rest)

    def __call__(self, points: Tensor) -> Tensor:
        """v, (1, nd, *points): they come from points + v. In the dtype of points, at least fp32."""
        nd, exact = points.shape[1], points.double()
        start = _times(self._back[:, :nd], exact) + self._back[:, nd].to(exact.device).view(-1, *[1] * nd)
        w = ops.invert_displacement(self._rest, points=start.to(points.dtype))
        return (start - exact + w).to(w.dtype)


def _times(matrix: Tensor, field: Tensor) -> Tensor:
    """The matrix (nd, nd), on the CPU, times a field (1, nd, *spatial): in the field's dtype."""
    rows = []
    for row in matrix.tolist():
        total = row[0] * field[:, 0]
        for k in range(1, len(row)):
            total = total + row[k] * field[:, k]
        rows.append(total)
    return torch.stack(rows, 1)


def nearest_affine(u: Tensor) -> Tensor:
    """(nd, nd + 1) fp64, on the CPU: the affine map A [x, 1] least squares from x + u(x); of none that has an inverse: I."""
    nd, size = u.shape[1], u.shape[2:]
    eye = torch.eye(nd, nd + 1, dtype=torch.float64)
    linear, middle = eye[:, :nd].clone(), torch.tensor([(n - 1) / 2 for n in size], dtype=torch.float64)
    for k, n in enumerate(size):
        # Centred coordinates of a grid are orthogonal: each slope is found alone.
        others = [j + 1 for j in range(nd) if j != k]
        along = u[0].mean(others, dtype=torch.float64).cpu()
        x = torch.arange(n, dtype=torch.float64) - middle[k]
        if n > 1:
            linear[:, k] += along @ x / (x @ x)
    mean = u[0].flatten(1).mean(1, dtype=torch.float64).cpu()
    if not bool(torch.isfinite(linear).all()) or not torch.linalg.det(linear) > _SINGULAR:
        return eye
    return torch.cat([linear, (mean + middle - linear @ middle)[:, None]], 1)


def invert(u: Tensor) -> Tensor:
    """The inverse of u (1, nd, *spatial) on its own grid, in voxels."""
    axes = [torch.arange(n, dtype=u.dtype, device=u.device) for n in u.shape[2:]]
    return Inverse(u)(torch.stack(torch.meshgrid(*axes, indexing="ij"))[None])
