"""Project onto the set a match may lie in: a box, by default [0, 1]^N, and a ball about the source."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from hf_equiv.checks import UNIT, Bounds, check_bounds
from hf_equiv.precision import inner

_ROUNDS = 12  # steps towards the largest t
_MARGINS = (1e-3, 1e-5, 1e-6, 1e-7, 0.0)  # by which a point is drawn inwards, until its rounding is harmless


class Rows:
    """The state of a batch, whose tensors have an axis of images in front and whose lists have an item for each."""

    def keep(self, index: Tensor) -> Self:
        """Return a copy with the images `index`, in order, in all tensors, lists and states that this object holds."""
        kept = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list):
                vars(kept)[name] = [value[i] for i in index.tolist()]
            elif isinstance(value, Rows) or (isinstance(value, Tensor) and value.ndim > 0):
                vars(kept)[name] = value.keep(index) if isinstance(value, Rows) else value[index]
        return kept


@dataclass
class FeasibleSet(Rows):
    """The box [lower, upper], intersected with the ball ‖x − center‖₂ ≤ l2_radius if there is one.

    The tensors belong to one image (*shape) or, if `batched`, to the images of a batch (B, *shape), each with its own
    set. An L∞ ball is part of the box, and `linf` records it. `center` lies in the set, so the set is not empty.
    """

    lower: Tensor
    upper: Tensor
    center: Tensor
    l2_radius: float | None = None
    linf: bool = False
    batched: bool = False

    @classmethod
    def around(
        cls, center: Tensor, radius: float | None, norm: str, bounds: Bounds = UNIT, *, batched: bool = False
    ) -> FeasibleSet:
        """Return the box ∩ the ball of `radius` about `center`, rounded inwards to `center.dtype`."""
        low, high = (torch.full_like(center, end) for end in check_bounds(bounds, center))
        if radius is None or norm == "l2":
            return cls(low, high, center, radius, False, batched)
        rounded = torch.tensor(radius, dtype=center.dtype)
        step = float(rounded if float(rounded) <= radius else torch.nextafter(rounded, torch.zeros_like(rounded)))
        lower, upper = center - step, center + step
        # center ± step is rounded to nearest: step one unit inwards if that leaves the ball.
        wide, up = center.double(), torch.full_like(center, math.inf)
        lower = torch.where(wide - lower.double() > step, torch.nextafter(lower, up), lower)
        upper = torch.where(upper.double() - wide > step, torch.nextafter(upper, -up), upper)
        return cls(torch.maximum(lower, low), torch.minimum(upper, high), center, None, True, batched)

    def project(self, x: Tensor) -> Tensor:
        """Return a near point of the set: clip(c + t(x − c)) with the largest t in [0, 1] inside the ball."""
        whole = inside = torch.clamp(x, self.lower, self.upper)
        if self.l2_radius is None:
            return inside
        # As long as no further pixel is clipped, ‖clip(c + t(x − c)) − c‖² = C + t²S, and clipping only lowers it:
        # solving this for the radius again and again raises t to the one wanted, from below.
        away = (x - self.center).double()
        t = self.l2_radius / self._length(away).clamp_min(1e-300)
        for _ in range(_ROUNDS):
            there = self.center + t * away
            inside = torch.clamp(there, self.lower, self.upper)
            slope = self._length((inside == there) * away).square()
            missing = self.l2_radius**2 - self._distance(inside).square()
            t = torch.where(slope > 0, (t.square() + missing.clamp_min(0.0) / slope).sqrt(), t)
        # Take the outermost of the points c + s(clip(…) − c), all in the box, whose rounding stays in the ball.
        away, best = inside - self.center, self.center
        for margin in _MARGINS:
            trial = (self.center + (1 - margin) * away).to(x)
            best = torch.where(self._distance(trial) <= self.l2_radius, trial, best)
        return torch.where(self._distance(whole) <= self.l2_radius, whole, best)

    def _distance(self, x: Tensor) -> Tensor:
        """Return ‖x − c‖₂ of each image, float64, to broadcast over its pixels."""
        return self._length(x.double() - self.center.double())

    def _length(self, v: Tensor) -> Tensor:
        flat = v.flatten(1) if self.batched else v.flatten()[None]
        lengths = inner(flat, flat).sqrt()
        return lengths.view(-1, *[1] * (v.ndim - 1)) if self.batched else lengths[0]

    def free(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return where (bool) a small step along −gradient stays in the box."""
        return torch.clamp(x - gradient.sign(), self.lower, self.upper).ne(x).logical_or_(gradient == 0)


class SineChart(Rows):
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
        self.space = FeasibleSet(-bound, bound, self.center, batched=box.batched)

    def invert(self, x: Tensor) -> Tensor:
        """Return the w of an image, at most 0.98 of the half-width from the middle: the slope is 0 at the bound."""
        return torch.asin(torch.clamp((x - self._middle) / self._half.clamp_min(1e-30), -0.98, 0.98))

    def place(self, w: Tensor) -> Tensor:
        """Return the image x of w."""
        return torch.clamp(torch.addcmul(self._middle, self._half, torch.sin(w)), self._box.lower, self._box.upper)

    def pull_back(self, gradient: Tensor, w: Tensor) -> Tensor:
        """Return the gradient in w of a function with this gradient in x."""
        return gradient * self._half * torch.cos(w)
