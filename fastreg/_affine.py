"""The affine part of `fastreg.register`, or all of it: twelve numbers (2D: six), found as a level is (_descent.py)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _check, _descent
from . import ops as _fused


@dataclass
class Side:
    """A direction in which images are compared: what is moved, its weights or None, to what it is compared, and terms besides."""

    moving: Tensor
    weights: Tensor | None
    similarity: Any  # of _channels
    terms: Sequence[Callable[..., Tensor]] = ()

    def __call__(self, matrix: Tensor, spacing: Sequence[float]) -> Tensor:
        """matrix: (nd, nd + 1), mm."""
        voxels = _descent.affine_in_voxels(matrix, spacing).to(self.moving)
        weights = _descent.moved_weights(self.weights, None, voxels.detach())

        def move(image: Tensor, affine: Tensor) -> Tensor:
            return _fused.warp(image, None, affine=affine, padding="border")

        value: Tensor = self.similarity.compare(self.moving, move, voxels, weights=weights)
        for term in self.terms:
            value = value + term(None, spacing, matrix) / self.similarity.share
        return value


class AffineFit:
    """Minimises a similarity over x -> M x + b, mm; rigid: M a rotation. A unit of the parameter moves the rim by one voxel.

    symmetric: (M, b) is the exponential of a generator, of which the opposite makes the inverse.
    """

    def __init__(
        self, full: Sequence[int], spacing: Sequence[float], rigid: bool = False, symmetric: bool = False
    ):
        self.spacing, self.rigid, self.symmetric = spacing, rigid, symmetric
        extent = torch.tensor([s * (n - 1) for s, n in zip(spacing, full, strict=True)], dtype=torch.float64)
        self.centre, self.radius = extent / 2, max(float(extent.max()) / 2, 1e-30)
        free = (extent > 0).double()  # nothing moves along an axis of one voxel
        self.free = torch.cat([free[:, None] * free, free[:, None]], 1)
        self.motion = torch.zeros(len(full), len(full) + 1, dtype=torch.float64)  # mm at the rim; mm

    def matrix(self, motion: Tensor) -> Tensor:
        """(nd, nd + 1), mm."""
        linear, shift = motion[:, :-1] / self.radius, motion[:, -1]
        if self.rigid:
            linear = (linear - linear.T) / 2
        if self.symmetric:
            generator = torch.cat(
                [torch.cat([linear, shift[:, None]], 1), motion.new_zeros(1, len(motion) + 1)]
            )
            whole = torch.linalg.matrix_exp(generator)
            linear, shift = whole[:-1, :-1], whole[:-1, -1]
        elif self.rigid:
            linear = torch.linalg.matrix_exp(linear)
        else:
            linear = torch.eye(len(motion), dtype=motion.dtype) + linear
        return torch.cat([linear, (self.centre - linear @ self.centre + shift)[:, None]], 1)

    def descend(
        self,
        sides: Sequence[Side],
        spacing: Sequence[float],
        n_iterations: int,
        learning_rate: float,
        report: Callable[..., object] | None,
    ) -> dict[str, Any]:
        """sides: there, and where it is symmetric back."""
        finest = _descent._finest(spacing, sides[0].moving.shape[2:])
        parameter = torch.zeros_like(self.motion, requires_grad=True)
        adam = _descent.Adam(parameter, learning_rate)
        slower = 0.99 * learning_rate / max(n_iterations - 1, 1)  # an iteration, down to a hundredth

        def step() -> tuple[Tensor, Tensor, Tensor]:
            adam.zero_grad()
            motion = self.motion + finest * self.free * parameter
            matrices = (self.matrix(m) for m in (motion, -motion))
            values = [side(matrix, spacing) for side, matrix in zip(sides, matrices, strict=False)]
            value = sum(values[1:], values[0]) / len(values)
            value.backward()
            adam.step()
            adam.learning_rate -= slower
            return value.detach(), value.detach(), value.new_zeros(())

        # Adam overshoots at first, which looks flat.
        record = _descent._minimise(step, n_iterations, report, least=n_iterations // 2)
        with torch.no_grad():
            self.motion += finest * self.free * parameter
        _descent._finite(float(self.motion.square().sum()))
        if torch.linalg.det(self.matrix(self.motion)[:, :-1]) <= 0:
            _check.fail("register", "the affine part", "keep its orientation", "a determinant of 0 or less")
        return record


def halves(
    images: tuple[Tensor, Tensor, Tensor | None, Tensor | None], half: Tensor, back: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fixed, moving and their weights (or None), each laid half of the way: moving by `half`, fixed by its inverse, (1, nd, nd + 1)
    in voxels. Weights are 0 where the image does not reach."""
    fixed, moving, mask, moving_mask = images

    def laid(image: Tensor, weight: Tensor | None, matrix: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.ones_like(image[:, :1]) if weight is None else weight
        matrix = matrix.to(image)
        inside = _fused.warp(weight, None, affine=matrix, padding="zeros")
        return _fused.warp(image, None, affine=matrix, padding="border"), inside

    (fixed, mask), (moving, moving_mask) = laid(fixed, mask, back), laid(moving, moving_mask, half)
    return fixed, moving, mask, moving_mask


def around(u: Tensor, half: Tensor) -> Tensor:
    """p -> H(x + u(x)) - p with x = H p: what was found between halves that `halves` laid, with both. u: voxels, as half is."""
    shift = _fused.affine_displacement(half.to(u.device), u.shape[2:]).to(u)
    linear = half[..., :-1].to(u)
    return torch.einsum("nij,nj...->ni...", linear, _fused.compose(u, shift)) + shift
