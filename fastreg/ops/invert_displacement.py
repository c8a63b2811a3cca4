"""The inverse of a displacement, by Newton's method at each voxel."""

import itertools

import torch
from torch import Tensor

from fastreg import _check, _ext
from fastreg.ops.warp import PADDINGS, Padding, _corner_index

MAX_ITERATIONS = 1000
_DEGENERATE = 1e-3  # |det(I + J)| below which a Newton step says nothing


def invert_displacement(
    u: Tensor,  # (N, nd, *spatial)
    *,
    points: Tensor | None = None,  # (N, nd, *spatial of any size)
    padding: Padding = "border",
    iterations: int = 20,
) -> Tensor:  # (N, nd, *spatial)
    """Inverts a displacement: v with ``u(x + v(x)) + v(x) = 0``, so that ``compose(u, v)`` is zero.

    What u sends to ``x`` lies at ``x + v(x)``: u warps the moving image onto the fixed one, v the fixed image onto the
    moving one. Newton's method on the linear interpolant of u, ``v <- v - (I + J)^-1 (u(x + v) + v)`` with J, the derivative
    of u, at x + v; halved where the residual does not fall, and half a step of the fixed point ``v <- -u(x + v)`` where
    that does not help. A voxel stops once the residual is below 1e-3 (fp64: 1e-6) and takes one step more, which mostly leaves
    1e-7. Gradient by the implicit function: ``dL/du = -scatter((I + J^T)^-1 dL/dv)`` at x + v.

    Args:
        u (Tensor): (N, nd, *spatial) in voxels, channels in axis order (z, y, x), fp64 / fp32 / fp16 / bf16.
        points (Tensor, optional): (N, nd, *spatial) of any size, x in voxels of u's grid, any of the four dtypes: where to
            invert, beyond the grid too. Every voxel when None.
        padding (str): what u is outside: "border" (nearest voxel), "zeros" or "reflection" (about the outermost voxel
            centres).
        iterations (int): steps at most, 1 to 1000. A smooth u takes 2 or 3.

    Returns:
        Tensor: v, (N, nd, *spatial) of u or of points, their wider dtype. Differentiable (once) in u and points.

    Raises:
        TypeError: a tensor is not floating, iterations not an int.
        ValueError: shapes, devices, padding or iterations do not fit.

    Notes:
        Where u folds there is no inverse: several positions can be sent to x. v is then one of them, or what came nearest
        in `iterations` steps: finite, and `metrics.inverse_residual(u, v)` tells how far off. In the gradient a determinant
        of I + J between -1e-3 and 1e-3 counts as that, so it is finite too. A NaN of u makes those voxels NaN that read it
        at x, where the iteration starts, and no other; those that meet it later keep the best that they found.
        Computed in fp32 (fp64 for fp64): halves are rounded once, at the end. Deterministic on CPU; the gradient to u is
        scattered as that of `warp` to its image.

    Example:
        >>> u = torch.tensor([0.0, -0.5, -1.0, -1.5, -2.0]).expand(1, 2, 1, 5) * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
        >>> fastreg.invert_displacement(u)[0, 1]  # x + u is x / 2: 2 x goes to x, and beyond the image u is -2
        tensor([[0., 1., 2., 2., 2.]])
    """
    optional = {} if points is None else {"points": points}
    _check.floating("invert_displacement", u=u, **optional)
    nd = _check.displacement("invert_displacement", "u", u)
    if points is not None:
        _check.displacement("invert_displacement", "points", points, batch=u.shape[0])
        if points.dim() != nd + 2:
            rule = f"have shape (N, {nd}, {_check.AXES[nd]}) as u"
            _check.fail("invert_displacement", "points", rule, tuple(points.shape))
        if points.numel() and not u.numel():
            _check.fail("invert_displacement", "u", "have voxels", tuple(u.shape))
    _check.choice("invert_displacement", "padding", padding, PADDINGS)
    iterations = _check.whole("invert_displacement", "iterations", iterations, 1, MAX_ITERATIONS)
    dtype = u.dtype if points is None else torch.promote_types(u.dtype, points.dtype)
    return torch.ops.fastreg.invert_displacement(u, points, padding, iterations).to(dtype)


class _Field:
    """u read at points + v: whole voxels and fractions apart, as in warp."""

    def __init__(self, u, points, padding):
        self.dtype = _ext.arithmetic(u, points)
        self.size, self.nd, self.padding = u.shape[2:], u.shape[1], padding
        self.flat = u.to(self.dtype).flatten(2)
        if points is None:
            self.whole, self.fraction = _voxels(u), 0
            self.shape = u.shape
        else:
            capped = points.to(self.dtype).clamp(-(2.0**29), 2.0**29)
            self.whole = capped.nan_to_num().floor()
            self.fraction = capped - self.whole
            self.shape = points.shape

    def linearised(self, v):
        """u, (N, nd, *shape), and its slopes along each axis, a list of the same."""
        at = self.fraction + v
        nan = at.isnan().any(1, keepdim=True)
        at = at.masked_fill(nan, 0).clamp(-(2.0**29), 2.0**29)
        down = at.floor()
        fraction = at - down
        carry = fraction >= 1  # of a tiny negative number
        fraction, whole = fraction.masked_fill(carry, 0), (down + self.whole + carry).long()
        ends = [
            [
                (*_corner_index(whole[:, k] + up, self.size[k], self.padding), 1 - f if up == 0 else f)
                for up in (0, 1)
            ]
            for k, f in enumerate(fraction.unbind(1))
        ]
        corner, value = {}, 0
        slope = [0] * self.nd
        for c in itertools.product((0, 1), repeat=self.nd):
            index, exists, weights = 0, True, []
            for k, up in enumerate(c):
                i, present, weight = ends[k][up]
                index, exists = index * self.size[k] + i, exists & present
                weights.append(weight)
            read = self.flat.gather(2, index.flatten(1)[:, None].expand(-1, self.nd, -1)).view(self.shape)
            corner[c] = torch.where(exists[:, None], read, 0)
            value = value + _weighted(weights, corner[c])
            for k in range(self.nd):
                if c[k]:
                    others = weights[:k] + weights[k + 1 :]
                    slope[k] = slope[k] + _weighted(others, corner[c] - corner[(*c[:k], 0, *c[k + 1 :])])
        return value.masked_fill(nan, float("nan")), slope


def _voxels(u):
    axes = [torch.arange(s, dtype=u.dtype, device=u.device) for s in u.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand_as(u).to(torch.float64)


def _weighted(weights, value):
    """Product with weights; what has no weight passes nothing on that is not finite."""
    weight = 1
    for w in weights:
        weight = weight * w
    return torch.where(weight[:, None] != 0, weight[:, None] * value, 0)


def _adjugate(slope):
    """Rows and determinant: (I + J)^-1 = rows / determinant."""
    nd = len(slope)
    columns = [[slope[k][:, i] + float(k == i) for i in range(nd)] for k in range(nd)]
    if nd == 2:
        (a, b), (c, d) = columns
        rows = [[d, -c], [-b, a]]
    else:
        rows = []
        for k in range(3):
            p, q = columns[(k + 1) % 3], columns[(k + 2) % 3]
            rows.append([p[(i + 1) % 3] * q[(i + 2) % 3] - p[(i + 2) % 3] * q[(i + 1) % 3] for i in range(3)])
    determinant = sum(columns[0][i] * rows[0][i] for i in range(nd))
    return rows, determinant


def invert_displacement_ref(u, points, padding, iterations):
    """csrc/common/invert_displacement.h, all voxels at once: `active` are those that still iterate."""
    field = _Field(u, points, padding)
    nd, good = field.nd, 1e-6 if field.dtype == torch.float64 else 1e-3
    guess = torch.zeros(field.shape, dtype=field.dtype, device=u.device)
    v = torch.full_like(guess, float("nan"))
    if v.numel() == 0:
        return v
    base, step = guess, guess
    share = torch.ones_like(guess[:, :1])
    fall = least = torch.full_like(share, float("inf"))
    active = torch.ones_like(share, dtype=torch.bool)
    for i in range(iterations + 1):
        value, slope = field.linearised(guess)
        residual = value + guess
        largest = residual.abs().amax(1, keepdim=True)
        rows, determinant = _adjugate(slope)
        newton = torch.stack(
            [sum(row[i] * residual[:, i] for i in range(nd)) / determinant for row in rows], 1
        )
        regular = (determinant.abs() >= _DEGENERATE)[:, None]
        falls = largest < fall
        better, done = active & falls & (largest < least), falls & (largest <= good)
        halve = ~falls & (share > 1 / 8)
        again = ~falls & ~halve
        dead = (halve & least.isinf()) | (again & ~largest.isfinite())
        step = torch.where(
            falls & regular, newton, torch.where(falls, residual, torch.where(again, residual / 2, step))
        )
        v = torch.where(better, torch.where(done & regular, guess - step, guess), v)
        least = torch.where(better, largest, least)
        active = active & ~done & ~dead
        if i == iterations or not active.any():
            return v
        base = torch.where(falls | again, guess, base)
        fall = torch.where(falls, largest, torch.where(again, float("inf"), fall))
        share = torch.where(halve, share / 2, 1)
        guess = torch.where(active, base - share * step, guess)
    return v


def invert_displacement_adjoint_ref(grad, v, u, points, padding):
    """``-(I + J^T)^-1 grad`` with J at x + v: what is then scattered."""
    field = _Field(u, points, padding)
    grad, v = grad.to(field.dtype), v.to(field.dtype)
    if v.numel() == 0:
        return torch.zeros_like(v)
    value, slope = field.linearised(v)
    rows, determinant = _adjugate(slope)
    limit = torch.where(determinant < 0, -_DEGENERATE, _DEGENERATE)
    determinant = torch.where(determinant.abs() < _DEGENERATE, limit, determinant)
    nd = field.nd
    q = torch.stack([-sum(grad[:, k] * rows[k][i] for k in range(nd)) / determinant for i in range(nd)], 1)
    return q.masked_fill(value[:, :1].isnan(), float("nan"))


def _fake(u, points, padding, iterations):
    like = u if points is None else points
    return like.new_empty(like.shape, dtype=_ext.arithmetic(u, points))


def _adjoint_fake(grad, v, u, points, padding):
    return v.new_empty(v.shape)


_ext.define(
    "invert_displacement(Tensor u, Tensor? points, str padding, int iterations) -> Tensor",
    invert_displacement_ref,
    _fake,
)
_ext.define(
    "invert_displacement_adjoint(Tensor grad, Tensor v, Tensor u, Tensor? points, str padding) -> Tensor",
    invert_displacement_adjoint_ref,
    _adjoint_fake,
)


def _setup(ctx, inputs, output):
    u, points, ctx.padding, _ = inputs
    ctx.save_for_backward(u, points, output)


def _backward(ctx, grad):
    u, points, v = ctx.saved_tensors
    q = torch.ops.fastreg.invert_displacement_adjoint(grad, v, u, points, ctx.padding)
    to_u = to_points = None
    if ctx.needs_input_grad[0]:
        # As a displacement of the grid that q lies on; in fp64 where points make it long.
        at = v if points is None else v + points.double() - _voxels(points)
        arguments = (u.to(at.dtype), at, None, "linear", ctx.padding, True, False, False)
        to_u = torch.ops.fastreg.warp_bwd(q.to(at.dtype), *arguments)[0].to(u.dtype)
    if ctx.needs_input_grad[1]:
        to_points = (-grad - q).to(points.dtype)  # J^T q
    return to_u, to_points, None, None


_ext.autograd("invert_displacement", _setup, _backward)
_ext.once_differentiable("invert_displacement_adjoint")
_ext.batched("invert_displacement", "invert_displacement_adjoint")
