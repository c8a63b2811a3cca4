"""How parallel slices lie in space: evenly, with gaps, sheared."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDED = 2e-2  # of a step: what positions of two decimals lose of half a millimetre


@dataclass(frozen=True)
class Lie:
    """Of n slices, sorted: origin and step (3,), mm, from one to the next; off: mm of the one that lies farthest from that."""

    origin: np.ndarray
    step: np.ndarray
    off: float

    @classmethod
    def of(cls, points: np.ndarray) -> "Lie":
        """points (n, 3): the slices' origins, n >= 2."""
        n = len(points)
        step = (points[-1] - points[0]) / (n - 1)
        away = points - points[0] - np.arange(n)[:, None] * step
        return cls(points[0], step, float(np.linalg.norm(away, axis=1).max()))

    @property
    def tolerance(self) -> float:
        """mm: a thousandth of a step, or what positions of three decimals lose."""
        step = float(np.linalg.norm(self.step))
        return max(1e-3 * step, min(2e-3, 1e-2 * step))

    @property
    def even(self) -> bool:
        """Even, or as good as: what is off by more than the tolerance, but less than a fiftieth of a step, is worth a word."""
        return self.off <= max(self.tolerance, ROUNDED * float(np.linalg.norm(self.step)))

    def sideways(self, normal: np.ndarray) -> np.ndarray:
        """(3,) mm: the part of a step that lies in the slice."""
        return np.asarray(self.step - (self.step @ normal) * normal)

    def tilt(self, normal: np.ndarray) -> float:
        """Degrees between a step and the normal."""
        return float(np.degrees(np.arctan2(np.linalg.norm(self.sideways(normal)), self.step @ normal)))


def grouped(depths: np.ndarray) -> list[np.ndarray]:
    """Indices of slices by their depth (mm along the normal), ascending; those of one depth together, in their order."""
    order = np.argsort(depths, kind="stable")
    steps = np.diff(depths[order])
    same = max(1e-3 * float(np.median(steps[steps > 1e-6])), 1e-6) if (steps > 1e-6).any() else np.inf
    return np.split(order, np.flatnonzero(steps > same) + 1)


def at(depth: float, normal: np.ndarray) -> str:
    """A depth along the normal, as one says it."""
    axis = int(np.abs(normal).argmax())
    if abs(normal[axis]) > 1 - 1e-6:
        return f"{'xyz'[axis]} = {depth * np.sign(normal[axis]) + 0.0:.6g} mm"
    return f"{depth:.6g} mm along the normal"


def complaint(points: np.ndarray, normal: np.ndarray, thickness: Sequence[float] = ()) -> str:
    """What slices that are not even look like; points (n, 3), sorted along the normal."""
    depths = points @ normal
    steps = np.diff(depths)
    step = float(np.median(steps))
    odd = np.flatnonzero(np.abs(steps - step) > 2 * ROUNDED * step)
    if not len(odd):
        lateral = Lie.of(points - depths[:, None] * normal).off
        along = Lie.of(depths[:, None] * normal).off
        if lateral < along:
            return f"slices lie up to {along:.3g} mm off even steps of {step:.6g} mm"
        return f"slices are shifted sideways against each other, unevenly, by up to {lateral:.3g} mm"
    where = f"between {at(depths[odd[0]], normal)} and {at(depths[odd[0] + 1], normal)}"
    kinds = [f"{t:g}" for t in sorted(set(thickness)) if np.isfinite(t)]
    if len(kinds) > 1:
        return f"slices of {' and '.join(kinds)} mm thickness are mixed: the step is {step:.6g} mm, but {steps[odd[0]]:.6g} mm {where}"
    if len(odd) > 1 and np.ptp(odd) == len(odd) - 1 and np.ptp(steps[odd]) < 1e-2 * step:
        return f"slices have two steps, {step:.6g} mm and {steps[odd[0]]:.6g} mm, which begins {where}"
    times = np.rint(steps / step).astype(int)
    if times.min() >= 1 and np.abs(steps - times * step).max() <= 2 * ROUNDED * step:
        number = 1 + np.concatenate([[0], np.cumsum(times)])
        gaps = [(number[k] + 1, number[k + 1] - 1) for k in odd]
        named = [f"{a} to {b}" if a < b else f"{a}" for a, b in gaps[:3]]
        missing = int(sum(b - a + 1 for a, b in gaps))
        more = f" and {len(gaps) - 3} more gaps" if len(gaps) > 3 else ""
        verb = "is" if missing == 1 else "are"
        return (
            f"slice{'s' * (missing > 1)} {', '.join(named)}{more} of {number[-1]} {verb} missing: the step is {step:.6g} mm "
            f"but for {'one' if len(odd) == 1 else 'the first'} of {steps[odd[0]]:.6g} mm {where}"
        )
    return f"slices are not one even step apart: it is {steps.min():.6g} to {steps.max():.6g} mm, and leaves {step:.6g} mm first {where}"
