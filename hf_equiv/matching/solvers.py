"""Minimise ½‖f(x) − z‖² inside a feasible set, for all images of a batch at once.

A solver has hyper-parameters; `solver.begin(start, feasible)` returns a `Descent`: the points (B, N) to evaluate next,
and a method that takes the evaluations there. Each image has its own steps, and no result depends on the other images.
A solver of your own may instead work on one image at a time (`Solver`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
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


class BatchSolver(Protocol):
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


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The fields of `Evaluations` at a point of one image: numbers, and the gradient in the shape of the image."""

    objective: float
    gradient: Tensor
    noise: float
    error: float
    unit: float = 1.0


Iterates = Generator[Tensor, Evaluation, None]  # points out, evaluations in


class Solver(Protocol):
    """Interface of a solver for `match_embedding` that works on one image at a time."""

    def iterate(self, source: Tensor, feasible: FeasibleSet) -> Iterates:
        """Yield the points to evaluate for one image and receive their evaluations.

        A step of gradient descent on ½‖f(x) − z‖² is `feasible.project(x - rate * at.unit**2 * at.gradient)`.

        Args:
            source: starting point, in the shape of one image.
            feasible: the set that every point lies in; its tensors have one image of that shape.

        Returns:
            A generator of points. It ends when the solver makes no further progress.
        """
        ...


@dataclass(frozen=True)
class OneByOne:
    """Run a `Solver` on every image (*shape) of a batch."""

    solver: Solver
    shape: torch.Size

    def begin(self, start: Tensor, feasible: FeasibleSet, phase: int = 0) -> Descent | None:
        """Start the iterates of each image; there is one phase."""
        return None if phase else _Iterates(self, start, feasible)


class _Iterates(Rows):
    """The iterates of a `Solver` on each image of a batch."""

    def __init__(self, each: OneByOne, start: Tensor, feasible: FeasibleSet) -> None:
        self.feasible, self.shape, self.iterates = feasible, each.shape, list[Iterates]()
        for x, *bounds in zip(start, feasible.lower, feasible.upper, feasible.center, strict=True):
            low, high, center = (part.view(self.shape) for part in bounds)
            own = FeasibleSet(low, high, center, feasible.l2_radius, feasible.linf)
            self.iterates.append(each.solver.iterate(x.view(self.shape), own))
        self.points = self._checked([next(iterates) for iterates in self.iterates])

    def advance(self, at: Evaluations) -> Tensor:
        """Take the evaluations at `points`, choose the next, and return the images that are through, (B,) bool."""
        numbers = torch.stack([at.objective, at.noise, at.error, at.unit], dim=1).tolist()
        points, stalled = list(self.points.view(-1, *self.shape)), []
        for i, (iterates, (objective, noise, error, unit)) in enumerate(zip(self.iterates, numbers, strict=True)):
            gradient = at.gradient[i].view(self.shape)
            try:
                points[i] = iterates.send(Evaluation(objective, gradient, noise, error, unit))
                stalled.append(False)
            except StopIteration:
                stalled.append(True)
        self.points = self._checked(points)
        return torch.tensor(stalled, device=at.objective.device)

    def _checked(self, points: list[Tensor]) -> Tensor:
        stacked = torch.stack(points).flatten(1)  # copies: a solver may reuse its image
        if not torch.equal(self.feasible.project(stacked), stacked):
            raise ValueError("`solver` must yield points of the feasible set. Use `feasible.project`.")
        return stacked
