"""Minimise ½‖f(x) − z‖² inside a feasible set; a solver has hyper-parameters and a generator for one image.

`solver.iterate(source, feasible)` yields points x to evaluate and receives an `Evaluation` of each. Every image has its
own history and line search, and `match_embedding` batches the points. A generator that returns has stalled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_equiv.checks import check_positive
from hf_equiv.matching.feasible import FeasibleSet


@dataclass(frozen=True, slots=True)
class Evaluation:
    """f at one point, for the residual r = (f(x) − z) / unit (D,).

    If f or its gradient is not finite, objective, noise and error are infinite and the gradient is zero.
    """

    objective: float  # ½‖r‖², float64
    gradient: Tensor  # Jᵀr / unit, (C, H, W)
    noise: float  # change of the objective that rounding in f can explain: ‖r‖·ε·‖z‖ / unit, ε the float noise of f
    error: float  # ‖f(x) − z‖ / ‖z‖
    unit: float = 1.0  # a power of two near ‖z‖, so that solvers do not depend on the scale of the embedding


Iterates = Generator[Tensor, Evaluation, None]  # points out, evaluations in


class Solver(Protocol):
    """Interface of a solver for `match_embedding`."""

    def iterate(self, source: Tensor, feasible: FeasibleSet) -> Iterates:
        """Yield the points to evaluate for one image and receive their evaluations.

        Args:
            source: starting point, (C, H, W), pixels in [0, 1].
            feasible: the set that every point lies in.

        Returns:
            A generator of points (C, H, W). It ends when the solver makes no further progress.
        """
        ...


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

    def iterate(self, source: Tensor, feasible: FeasibleSet) -> Iterates:
        """Yield the points to evaluate for one image."""
        return _steps(source, feasible, lambda at: self.lr * at.unit**2 * at.gradient)


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

    def iterate(self, source: Tensor, feasible: FeasibleSet) -> Iterates:
        """Yield the points to evaluate for one image."""
        mean, square, step = torch.zeros_like(source), torch.zeros_like(source), 0

        def change(at: Evaluation) -> Tensor:
            nonlocal mean, square, step
            step += 1
            mean = self.betas[0] * mean + (1 - self.betas[0]) * at.gradient
            square = self.betas[1] * square + (1 - self.betas[1]) * at.gradient**2
            scale = (square / (1 - self.betas[1] ** step)).sqrt() + self.eps / at.unit**2
            return self.lr / (1 - self.betas[0] ** step) * mean / scale

        return _steps(source, feasible, change)


def _steps(source: Tensor, feasible: FeasibleSet, change: Callable[[Evaluation], Tensor]) -> Iterates:
    """Take the steps x ← P(x − change) until x stays where it is."""
    x = feasible.project(source)
    while True:
        at = yield x
        if at.objective == math.inf:
            return
        moved = feasible.project(x - change(at))
        if torch.equal(moved, x):
            return
        x = moved
