"""Solvers for ½‖f(x) − z‖² inside a feasible set: frozen hyper-parameters, one image's algorithm as a generator.

`solver.iterate(source, feasible)` yields points x to evaluate and is sent an `Evaluation` of each. It sees one image
only, so each image has its own history, line search and end; `matching` puts the points of all unfinished images into
one batch. A generator that returns has stalled.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hf_equiv.checks import check_count, check_positive, check_range
from hf_equiv.feasible import FeasibleSet, SineChart, dot
from hf_equiv.history import SecantHistory


@dataclass(frozen=True, slots=True)
class Evaluation:
    """f at one point, for the residual r = (f(x) − z) / unit (D,).

    Where f or its gradient is not finite: objective, noise and error are infinite, the gradient is zero.

    Attributes:
        objective: ½‖r‖², float64.
        gradient: Jᵀr / unit, (C, H, W).
        noise: what rounding in f may change the objective by: ‖r‖·ε·‖z‖ / unit, with ε the float noise of an encoder.
        error: ‖f(x) − z‖ / ‖z‖.
        unit: a power of two near ‖z‖, so that no solver sees the scale of the embedding.
    """

    objective: float
    gradient: Tensor
    noise: float
    error: float
    unit: float = 1.0


Iterates = Generator[Tensor, Evaluation, None]
"""Points out, evaluations in."""


class Solver(Protocol):
    """What `match_embedding` asks of a solver."""

    def iterate(self, source: Tensor, feasible: FeasibleSet) -> Iterates:
        """Yield the points to evaluate for one image and be sent their evaluations.

        Args:
            source: where to start, (C, H, W), pixels in [0, 1].
            feasible: the set that every point lies in.

        Returns:
            A generator of points (C, H, W). It ends when the solver can get no further.
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
        x = feasible.project(source)
        while True:
            at = yield x
            if at.objective == math.inf:
                return
            moved = feasible.project(x - self.lr * at.unit**2 * at.gradient)
            if torch.equal(moved, x):
                return
            x = moved


@dataclass(frozen=True, slots=True)
class Adam:
    """Projected Adam on ½‖f(x) − z‖². Quick to a rough match, and far from the source: every pixel moves by about `lr`.

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
            check_range(beta, "betas", 0.0, 1.0)
        check_range(self.eps, "eps", 0.0, math.inf)

    def iterate(self, source: Tensor, feasible: FeasibleSet) -> Iterates:
        """Yield the points to evaluate for one image."""
        x = feasible.project(source)
        mean, square, step = torch.zeros_like(x), torch.zeros_like(x), 0
        while True:
            at = yield x
            if at.objective == math.inf:
                return
            step += 1
            mean = self.betas[0] * mean + (1 - self.betas[0]) * at.gradient
            square = self.betas[1] * square + (1 - self.betas[1]) * at.gradient**2
            scale = (square / (1 - self.betas[1] ** step)).sqrt() + self.eps / at.unit**2
            moved = feasible.project(x - self.lr / (1 - self.betas[0] ** step) * mean / scale)
            if torch.equal(moved, x):
                return
            x = moved


@dataclass(frozen=True, slots=True)
class LBFGS:
    """Projected limited-memory BFGS on ½‖f(x) − z‖², started by Polyak steps and held near the source. The default.

    1. *Start.* The source lies in a narrow, strongly curved valley, where a line search creeps. Polyak's step
       ½‖r‖²/‖g‖² (the minimum of the objective is known: 0), damped by momentum, is long enough to bounce across it and
       short enough to stay near the source: `warmup` evaluations bring the error from above 1 to about 0.3.
    2. *Descent.* L-BFGS in the compact representation with backtracking along the projected path. The bounces of the
       start already fill the history. Pixels at a bound that the step pushes outwards are held. Until the error falls
       below `release`, the penalty ½λ‖x − source‖² with λ = proximity·‖r‖²/‖x − source‖² pulls back; λ only falls.
    3. *End.* The line search accepts what rounding in f can hide, so that it does not stop at the float noise. Where
       the rest would take long, `match_embedding` forms one Jacobian instead: see `newton`.

    In an L∞ ball matches lie near the corners, and the start goes there at once, by signed steps x ← P(x − α·sign(m)):
    m is a running sum of the gradients, α = ‖r‖ / ‖∇‖r‖‖₁ Polyak's step for ‖r‖ in this norm. When it is less than
    1 % of the radius, L-BFGS goes on, in w, x = m + h·sin(w) (`SineChart`): projected steps would hold pixel after
    pixel at its bound and creep.

    Args:
        history: most pairs kept; each costs two images of memory. The first 40 serve most images. The number doubles
            whenever the error has not halved in as many steps: the Jacobian's singular values span three decades, and
            where the slowest of them matter only a long history finishes.
        warmup: evaluations of the start; 0 for plain L-BFGS. In an L∞ ball the start takes what it needs, at most
            ten times as many.
        momentum: of the start, in [0, 1).
        proximity: weight of staying near the source against the remaining error; 0 for none. More ends nearer to
            the source and takes more evaluations.
        release: embedding error below which the penalty is dropped.
        newton: whether `match_embedding` may end a slow run, without a ball, by one full Jacobian and Newton steps.

    References:
        Polyak (1987), *Introduction to Optimization*, §5.3. Byrd, Nocedal, Schnabel (1994), *Math. Program.* 63:129,
        eq. 3.13 (compact representation). Bertsekas (1982), *SIAM J. Control Optim.* 20:221 (projected steps).
        Dong et al. (2018), arXiv:1710.06081, eq. 6–7 (signed steps with momentum).
    """

    history: int = 160
    warmup: int = 40
    momentum: float = 0.5
    proximity: float = 1.5
    release: float = 0.02
    newton: bool = True

    def __post_init__(self) -> None:
        """Check the hyper-parameters."""
        check_count(self.history, "history")
        check_count(self.warmup, "warmup", 0)
        check_range(self.momentum, "momentum", 0.0, 1.0)
        check_range(self.proximity, "proximity", 0.0, math.inf)
        check_range(self.release, "release", 0.0, math.inf)

    def iterate(self, source: Tensor, feasible: FeasibleSet) -> Iterates:
        """Yield the points to evaluate for one image."""
        if not feasible.linf:
            yield from self._descend(source, feasible, self.warmup)
            return
        x = yield from self._signed(source, feasible)
        chart = SineChart(feasible)
        inside = self._descend(chart.invert(x), chart.space, 0)
        w = next(inside)
        while True:
            at = yield chart.place(w)
            try:
                w = inside.send(replace(at, gradient=chart.pull_back(at.gradient, w)))
            except StopIteration:
                return

    def _signed(self, source: Tensor, feasible: FeasibleSet) -> Generator[Tensor, Evaluation, Tensor]:
        """Signed steps with momentum, of Polyak's length for ‖r‖ in the L∞ norm; returns the best point."""
        x = feasible.project(source)
        radius = 0.5 * float((feasible.upper - feasible.lower).max())
        run, best, least = torch.zeros_like(x), x, math.inf
        for _ in range(10 * self.warmup):
            at = yield x
            if at.objective < least:
                best, least = x, at.objective
            if at.objective == math.inf:
                break
            slope = float((at.gradient * feasible.free(x, at.gradient)).abs().sum(dtype=torch.float64))
            step = min(2 * at.objective / slope, 0.25 * radius, 1 / 255) if slope > 0.0 else 0.0
            if step < 0.01 * radius:
                break
            run = 0.9 * run + at.gradient / at.gradient.abs().mean()
            x = feasible.project(x - step * run.sign())
        return best

    def _descend(self, source: Tensor, feasible: FeasibleSet, warmup: int) -> Iterates:
        """Start and descent in one feasible set."""
        memory = SecantHistory(min(self.history, 40), source)
        x, raw = yield from self._polyak(source, feasible, memory, warmup)
        weight, slack, failures, steps, milestone = math.inf, 1.0, 0, 0, raw.error
        at, charged = raw, weight  # the objective at x, and the weight of the penalty in it
        while failures < 3:
            if raw.error < 0.5 * milestone:
                steps, milestone = 0, raw.error
            elif steps == memory.capacity:
                steps = 0
                memory.grow(self.history)
            steps += 1
            pull = self._pull(x, raw, feasible)
            if pull < 0.5 * weight:  # rarely: a new weight is a new objective, to which the history does not belong
                weight = pull
            if weight != charged:
                at, charged = _penalised(x, raw, feasible, weight), weight
            free = feasible.free(x, at.gradient)
            direction = memory.direction(at.gradient, free)
            if direction is None:
                norm2 = dot(at.gradient, at.gradient)
                if norm2 == 0.0:
                    return
                direction = at.gradient * free * (-0.25 * at.objective / norm2)
            found = yield from _backtrack(x, at, direction, feasible, weight, slack)
            if found is None and weight > 0.0:
                weight = 0.0  # the pull to the source, not the encoder, holds it here
            elif found is None and slack < 30.0:
                slack *= 6.0  # this encoder is noisier here than most
            elif found is None:
                failures = failures + 1 if memory.order else 3
                memory.clear()
            else:
                failures = 0
                moved, here, there = found
                memory.add(moved - x, at.gradient, there.gradient)
                if here.error > 0.99 * raw.error:
                    weight *= 0.5
                x, raw, at = moved, here, there

    def _pull(self, x: Tensor, at: Evaluation, feasible: FeasibleSet) -> float:
        """The wanted weight λ = proximity·‖r‖²/‖x − source‖² of the penalty: ∞ at the source, 0 near the target."""
        if at.error < self.release or self.proximity == 0.0:
            return 0.0
        offset = x - feasible.center
        distance2 = dot(offset, offset)
        return self.proximity * 2 * at.objective / distance2 if distance2 > 0.0 else math.inf

    def _polyak(
        self, source: Tensor, feasible: FeasibleSet, memory: SecantHistory, warmup: int
    ) -> Generator[Tensor, Evaluation, tuple[Tensor, Evaluation]]:
        """Polyak steps with momentum; returns the best point and leaves the secants in `memory`."""
        x = feasible.project(source)
        at = yield x
        best, last, previous = (x, at), (x, at), x
        for _ in range(warmup):
            norm2 = dot(at.gradient, at.gradient)
            if norm2 == 0.0:
                break
            # A step over the diagonal of the box is a flat spot, not a distance to the minimum.
            step = min(at.objective / norm2, math.sqrt(x.numel() / norm2))
            moved = feasible.project(x - (1 - self.momentum) * step * at.gradient)
            x = feasible.project(moved + self.momentum * (moved - previous))
            previous = moved
            at = yield x
            if at.objective == math.inf:
                break
            memory.add(x - last[0], last[1].gradient, at.gradient)
            last = (x, at)
            if at.objective < best[1].objective:
                best = (x, at)
        return best


def _penalised(x: Tensor, at: Evaluation, feasible: FeasibleSet, weight: float) -> Evaluation:
    """The evaluation of ½‖r‖² + ½·weight·‖x − source‖²; an infinite weight stands for one not yet known."""
    if weight in (0.0, math.inf):
        return at
    offset = x - feasible.center
    objective = at.objective + 0.5 * weight * dot(offset, offset)
    return replace(at, objective=objective, gradient=torch.add(at.gradient, offset, alpha=weight))


def _backtrack(
    x: Tensor, at: Evaluation, direction: Tensor, feasible: FeasibleSet, weight: float, slack: float
) -> Generator[Tensor, Evaluation, tuple[Tensor, Evaluation, Evaluation] | None]:
    """Armijo backtracking along the projected path; None when no step decreases the objective."""
    step = 1.0
    for _ in range(8):
        trial = feasible.project(torch.add(x, direction, alpha=step))
        slope = dot(at.gradient, trial - x)
        if slope >= 0.0:
            return None
        here = yield trial
        there = _penalised(trial, here, feasible, weight)
        if there.objective <= at.objective + 1e-4 * slope + slack * at.noise:
            return trial, here, there
        if there.objective == math.inf:
            step *= 0.1
            continue
        # Minimum of the parabola through both values and the slope, kept within [0.1, 0.5] of the step.
        excess = there.objective - at.objective - slope
        step *= min(0.5, max(0.1, -0.5 * slope / excess))
    return None
