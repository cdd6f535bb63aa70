"""Project onto the set a match may lie in: a box, by default [0, 1]^N, and a ball about the source."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv.checks import UNIT, Bounds, check_bounds


@dataclass(frozen=True, slots=True)
class FeasibleSet:
    """The box [lower, upper], intersected with the ball ‖x − center‖₂ ≤ l2_radius if there is one.

    An L∞ ball is part of the box, and `linf` records it. `center` lies in the set, so the set is not empty.
    """

    lower: Tensor
    upper: Tensor
    center: Tensor
    l2_radius: float | None = None
    linf: bool = False

    @classmethod
    def around(cls, center: Tensor, radius: float | None, norm: str, bounds: Bounds = UNIT) -> FeasibleSet:
        """Return the box ∩ the ball of `radius` about `center` (*shape), rounded inwards to `center.dtype`."""
        low, high = (torch.full_like(center, end) for end in check_bounds(bounds, center))
        if radius is None or norm == "l2":
            return cls(low, high, center, radius)
        rounded = torch.tensor(radius, dtype=center.dtype)
        step = float(rounded if float(rounded) <= radius else torch.nextafter(rounded, torch.zeros_like(rounded)))
        lower, upper = center - step, center + step
        # center ± step is rounded to nearest: step one unit inwards if that leaves the ball.
        wide, up = center.double(), torch.full_like(center, math.inf)
        lower = torch.where(wide - lower.double() > step, torch.nextafter(lower, up), lower)
        upper = torch.where(upper.double() - wide > step, torch.nextafter(upper, -up), upper)
        return cls(torch.maximum(lower, low), torch.minimum(upper, high), center, None, True)

    def project(self, x: Tensor) -> Tensor:
        """Return the nearest point of the set: clip(c + t(x − c)) with the largest t in [0, 1] inside the ball."""
        inside = torch.clamp(x, self.lower, self.upper)
        if self.l2_radius is None or _distance(inside, self.center) <= self.l2_radius:
            return inside
        low, high, best = 0.0, 1.0, self.center
        for _ in range(50):
            t = 0.5 * (low + high)
            trial = torch.clamp(self.center + t * (x - self.center), self.lower, self.upper)
            distance = _distance(trial, self.center)
            if distance <= self.l2_radius:
                low, best = t, trial
                if distance >= self.l2_radius * (1 - 1e-6):
                    break
            else:
                high = t
        return best

    def free(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return the pixels (*shape) bool where a small step along −gradient stays in the box."""
        return torch.clamp(x - gradient.sign(), self.lower, self.upper).ne(x).logical_or_(gradient == 0)


class SineChart:
    """Chart of the inside of a box as all of R^N: x = m + h·sin(w), with m the middle and h the half-width of a pixel.

    In a small L∞ ball most pixels end near a bound. A projected step fixes each pixel that reaches a bound, so progress
    is slow. In w the step of a pixel shrinks near its bound, and the pixel can move away again.
    """

    def __init__(self, box: FeasibleSet) -> None:
        self._box = box
        self._middle = (box.lower + box.upper) / 2
        self._half = (box.upper - box.lower) / 2
        self.center = self.invert(box.center)
        bound = torch.full_like(self.center, torch.inf)
        self.space = FeasibleSet(-bound, bound, self.center)

    def invert(self, x: Tensor) -> Tensor:
        """Return the w of an image, at most 0.98 of the half-width from the middle: the slope is 0 at the bound."""
        return torch.asin(torch.clamp((x - self._middle) / self._half.clamp_min(1e-30), -0.98, 0.98))

    def place(self, w: Tensor) -> Tensor:
        """Return the image x of w."""
        return torch.clamp(torch.addcmul(self._middle, self._half, torch.sin(w)), self._box.lower, self._box.upper)

    def pull_back(self, gradient: Tensor, w: Tensor) -> Tensor:
        """Return the gradient in w of a function with this gradient in x."""
        return gradient * self._half * torch.cos(w)


def _distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm((a.double() - b.double()).flatten()))
