"""Minimise ½‖f(x) − z‖² inside a feasible set, for all images of a batch at once.

A solver has hyper-parameters; `solver.begin(start, feasible)` returns a `Descent`: the points (B, N) to evaluate next,
and a method that takes the evaluations there. Each image has its own steps, and no result depends on the other images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol, Self

import torch
from torch import Tensor

from hf_equiv.checks import check_positive
from hf_equiv.matching.feasible import FeasibleSet, Rows


@dataclass
class Evaluations(Rows):
    """Hold f at a point of each image, by the residual r = (f(x) − z) / unit (D,), in float64 tensors (B,).

    If f or its gradient is not finite, objective, noise and error are infinite and the gradient is zero.
    """

    objective: Tensor  # ½‖r‖²
    gradient: Tensor  # Jᵀr / unit, (B, N), in the dtype of the images
    noise: Tensor  # change of the objective that rounding in f can explain: ‖r‖·ε·‖z‖ / unit, ε the float noise of f
    error: Tensor  # ‖f(x) − z‖ / ‖z‖
    unit: Tensor  # a power of two near ‖z‖, so that solvers do not depend on the scale of the embedding

    def where(self, chosen: Tensor, other: Evaluations) -> Evaluations:
        """Return these evaluations for the chosen images (B,) bool, the other ones elsewhere."""
        return Evaluations(*(pick(chosen, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


class Solver(Protocol):
    """Interface of a solver for `match_embedding`: a frozen dataclass of hyper-parameters."""

    def begin(self, start: Tensor, feasible: FeasibleSet, phase: int = 0) -> Descent | None:
        """Return the state of a batch at the start of a phase, or None after the last.

        Args:
            start: first points, (B, N).
            feasible: the sets of these images.
            phase: 0, 1, …

        Returns:
            The state, whose first points are to be evaluated.
        """
        ...


class Descent(Protocol):
    """One phase of a solver on the images of a batch."""

    @property
    def points(self) -> Tensor:
        """The points to evaluate next, (B, N)."""
        ...

    def keep(self, index: Tensor) -> Self:
        """Return the state of the images `index`, in order."""
        ...

    def advance(self, at: Evaluations) -> Tensor:
        """Take the evaluations at `points`, choose the next, and return the images that are through, (B,) bool."""
        ...


def pick(chosen: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the rows of `first` where `chosen` (B,) bool is true, those of `second` elsewhere."""
    return torch.where(chosen.view(-1, *[1] * (first.ndim - 1)), first, second)


@dataclass(frozen=True, slots=True)
class GradientDescent:
    """Projected gradient descent x ← P(x − lr·∇½‖f(x) − z‖²) with a fixed step: the paper's procedure.

    Args:
        lr: step size, in squared pixels per squared embedding unit.

    References:
        Salman, Shams, Liu (2024), arXiv:2401.15568, §3.
    """

    lr: float = 1e-3

    def __post_init__(self) -> None:
        """Check the hyper-parameters."""
        check_positive(self.lr, "lr")

    def begin(self, start: Tensor, feasible: FeasibleSet, phase: int = 0) -> Descent | None:
        """Return the state of a batch at the start of a phase; there is one."""

        def change(at: Evaluations, _: _Steps) -> Tensor:
            return self.lr * at.unit[:, None].square().to(start) * at.gradient

        return None if phase else _Steps(start, feasible, change)


@dataclass(frozen=True, slots=True)
class Adam:
    """Projected Adam on ½‖f(x) − z‖²: quick to a rough match, but far from the source. Each step is about `lr`.

    Args:
        lr: step size, in pixels.
        betas: decay of the running mean and of the running square.
        eps: added to the root of the running square.

    References:
        Kingma, Ba (2015), arXiv:1412.6980, algorithm 1.
    """

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Check the hyper-parameters."""
        check_positive(self.lr, "lr")
        for beta in self.betas:
            check_positive(beta, "betas", 1, or_zero=True)
        check_positive(self.eps, "eps", or_zero=True)

    def begin(self, start: Tensor, feasible: FeasibleSet, phase: int = 0) -> Descent | None:
        """Return the state of a batch at the start of a phase; there is one."""

        def change(at: Evaluations, state: _Steps) -> Tensor:
            state.mean = self.betas[0] * state.mean + (1 - self.betas[0]) * at.gradient
            state.square = self.betas[1] * state.square + (1 - self.betas[1]) * at.gradient**2
            eps = (self.eps / at.unit.square()).to(start)[:, None]
            scale = (state.square / (1 - self.betas[1] ** state.count)).sqrt() + eps
            return self.lr / (1 - self.betas[0] ** state.count) * state.mean / scale

        return None if phase else _Steps(start, feasible, change)


class _Steps(Rows):
    """Take the steps x ← P(x − change) until x stays where it is."""

    def __init__(self, start: Tensor, feasible: FeasibleSet, change: Callable[[Evaluations, _Steps], Tensor]) -> None:
        self.feasible, self.change, self.count = feasible, change, 0
        self.points = feasible.project(start)
        self.mean, self.square = torch.zeros_like(start), torch.zeros_like(start)

    def advance(self, at: Evaluations) -> Tensor:
        self.count += 1
        moved = self.feasible.project(self.points - self.change(at, self))
        still = (moved == self.points).all(dim=1) | at.objective.isinf()
        self.points = moved
        return still
