"""Solvers for ½‖f(x) − z‖² inside a feasible set: frozen hyper-parameters, one image's algorithm as a generator.

`solver.iterate(source, feasible)` yields points x to evaluate and is sent an `Evaluation` of each. It sees one image
only, so each image has its own history, line search and end; `matching` puts the points of all unfinished images into
one batch. A generator that returns has stalled.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_equiv.checks import check_count, check_positive, check_range
from hf_equiv.feasible import FeasibleSet, dot


@dataclass(frozen=True, slots=True)
class Evaluation:
    """f at one point, for the residual r = f(x) − z (D,).

    Attributes:
        objective: ½‖r‖², float64.
        gradient: Jᵀr, (C, H, W).
        noise: what rounding in f may change the objective by: ‖r‖·ε·‖z‖, with ε the float noise of an encoder.
        error: ‖r‖ / ‖z‖.
    """

    objective: float
    gradient: Tensor
    noise: float
    error: float


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
            x = feasible.project(x - self.lr * at.gradient)


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
            step += 1
            mean = self.betas[0] * mean + (1 - self.betas[0]) * at.gradient
            square = self.betas[1] * square + (1 - self.betas[1]) * at.gradient**2
            scale = (square / (1 - self.betas[1] ** step)).sqrt() + self.eps
            x = feasible.project(x - self.lr / (1 - self.betas[0] ** step) * mean / scale)


@dataclass(frozen=True, slots=True)
class LBFGS:
    """Projected limited-memory BFGS on ½‖f(x) − z‖², started by Polyak steps and held near the source. The default.

    1. *Start.* The source lies in a narrow, strongly curved valley, where a line search creeps. Polyak's step
       ½‖r‖²/‖g‖² (the minimum of the objective is known: 0), damped by momentum, is long enough to bounce across it and
       short enough to stay near the source: `warmup` evaluations bring the error from above 1 to about 0.3.
    2. *Descent.* L-BFGS in the compact representation with backtracking along the projected path. The bounces of the
       start already fill the history. Pixels at a bound that the step pushes outwards are held. Until the error falls
       below `release`, the penalty ½λ‖x − source‖² with λ = proximity·‖r‖²/‖x − source‖² pulls back; λ only falls.
    3. *End.* The line search accepts what rounding in f can hide, so that it does not stop at the float noise.

    Args:
        history: pairs kept; each costs two images of memory. The Jacobian's singular values span three decades, so a
            long history pays: one DeiT-Tiny match went from 1e-2 to 1e-5 in 104 evaluations with 120, in 153 with 20.
        warmup: evaluations of the start; 0 for plain L-BFGS.
        momentum: of the start, in [0, 1).
        proximity: weight of staying near the source against the remaining error; 0 for none. More ends nearer to
            the source and takes more evaluations.
        release: embedding error below which the penalty is dropped.

    References:
        Polyak (1987), *Introduction to Optimization*, §5.3. Byrd, Nocedal, Schnabel (1994), *Math. Program.* 63:129,
        eq. 3.13 (compact representation). Bertsekas (1982), *SIAM J. Control Optim.* 20:221 (projected steps).
    """

    history: int = 100
    warmup: int = 40
    momentum: float = 0.6
    proximity: float = 0.3
    release: float = 0.02

    def __post_init__(self) -> None:
        """Check the hyper-parameters."""
        check_count(self.history, "history")
        check_count(self.warmup, "warmup", 0)
        check_range(self.momentum, "momentum", 0.0, 1.0)
        check_range(self.proximity, "proximity", 0.0, math.inf)
        check_range(self.release, "release", 0.0, math.inf)

    def iterate(self, source: Tensor, feasible: FeasibleSet) -> Iterates:
        """Yield the points to evaluate for one image."""
        memory = _Secants(self.history, source)
        x, raw = yield from self._polyak(source, feasible, memory)
        weight, failures = math.inf, 0
        while failures < 3:
            offset = x - feasible.center
            distance2 = dot(offset, offset)
            wanted = self.proximity * 2 * raw.objective / distance2 if distance2 > 0.0 else 0.0
            if raw.error < self.release:
                wanted = 0.0
            if wanted < 0.5 * weight:
                weight = wanted
            at = _penalised(raw, offset, weight)
            free = feasible.free(x, at.gradient)
            direction = memory.direction(at.gradient, free)
            if direction is not None:
                blocked = free & ~feasible.free(x, -direction)
                if bool(blocked.any()):
                    direction = memory.direction(at.gradient, free & ~blocked)
            if direction is None:
                norm2 = dot(at.gradient, at.gradient)
                if norm2 == 0.0:
                    return
                direction = torch.where(free, at.gradient, 0.0) * (-0.25 * at.objective / norm2)
            found = yield from _backtrack(x, at, direction, feasible, weight)
            if found is None and weight > 0.0:
                weight = 0.0  # the pull to the source, not the encoder, holds it here
                continue
            if found is None:
                failures = failures + 1 if memory.order else 3
                memory.clear()
                continue
            failures = 0
            moved, here = found
            stuck, raw = here.error > 0.99 * raw.error, here
            there = raw.gradient + weight * (moved - feasible.center)
            memory.add(moved - x, there - at.gradient)
            x = moved
            if stuck:
                weight *= 0.5

    def _polyak(
        self, source: Tensor, feasible: FeasibleSet, memory: _Secants
    ) -> Generator[Tensor, Evaluation, tuple[Tensor, Evaluation]]:
        """Polyak steps with momentum; returns the best point and leaves the secants in `memory`."""
        x = feasible.project(source)
        at = yield x
        best, last, previous = (x, at), (x, at), x
        for _ in range(self.warmup):
            norm2 = dot(at.gradient, at.gradient)
            if norm2 == 0.0:
                break
            step = (1 - self.momentum) * at.objective / norm2
            moved = feasible.project(x - step * at.gradient)
            x = feasible.project(moved + self.momentum * (moved - previous))
            previous = moved
            at = yield x
            memory.add(x - last[0], at.gradient - last[1].gradient)
            last = (x, at)
            if at.objective < best[1].objective:
                best = (x, at)
        return best


def _penalised(at: Evaluation, offset: Tensor, weight: float) -> Evaluation:
    """The evaluation of ½‖r‖² + ½·weight·‖offset‖²."""
    objective = at.objective + 0.5 * weight * dot(offset, offset)
    return Evaluation(objective, at.gradient + weight * offset, at.noise, at.error)


def _backtrack(
    x: Tensor, at: Evaluation, direction: Tensor, feasible: FeasibleSet, weight: float
) -> Generator[Tensor, Evaluation, tuple[Tensor, Evaluation] | None]:
    """Armijo backtracking along the projected path; None when no step decreases the objective."""
    step = 1.0
    for _ in range(8):
        trial = feasible.project(x + step * direction)
        slope = dot(at.gradient, trial - x)
        if slope >= 0.0:
            return None
        here = yield trial
        offset = trial - feasible.center
        objective = here.objective + 0.5 * weight * dot(offset, offset)
        if objective <= at.objective + 1e-4 * slope + at.noise:
            return trial, here
        # Minimum of the parabola through both values and the slope, kept within [0.1, 0.5] of the step.
        excess = objective - at.objective - slope
        step *= min(0.5, max(0.1, -0.5 * slope / excess)) if math.isfinite(excess) else 0.1
    return None


class _Secants:
    """The last `size` secant pairs (s, y) of one image and their inner products, for the L-BFGS direction.

    H = γI + [S, γY] M [S, γY]ᵀ costs two passes over the 2·`size` vectors. The products with a new y follow from those
    with the gradients at both its ends, so nothing else touches the long axis N.
    """

    def __init__(self, capacity: int, like: Tensor) -> None:
        self.capacity = capacity
        self.shape = like.shape
        self.pairs = like.new_empty((0, 2, like.numel()))  # grows in blocks: memory follows use
        self.order: list[int] = []
        self.sy = torch.zeros((capacity, capacity), dtype=torch.float64)  # sᵢ·yⱼ, valid for i not newer than j
        self.yy = torch.zeros((capacity, capacity), dtype=torch.float64)
        self.unsettled: int | None = None  # the newest slot, while its products are still missing

    def clear(self) -> None:
        """Forget all pairs."""
        self.order, self.unsettled = [], None

    def add(self, s: Tensor, y: Tensor) -> None:
        """Store a pair unless its curvature s·y is not safely positive."""
        sy, yy, ss = dot(s, y), dot(y, y), dot(s, s)
        if not sy > 1e-10 * math.sqrt(ss * yy):
            return
        self._settle()
        slot = self.order.pop(0) if len(self.order) == self.capacity else len(self.order)
        if slot >= self.pairs.shape[0]:
            grown = self.pairs.new_empty((min(self.capacity, slot + 20), 2, s.numel()))
            grown[: self.pairs.shape[0]] = self.pairs
            self.pairs = grown
        self.pairs[slot, 0], self.pairs[slot, 1] = s.flatten(), y.flatten()
        self.order.append(slot)
        self.sy[slot, slot], self.yy[slot, slot] = sy, yy
        self.unsettled = slot

    def _settle(self, g: Tensor | None = None) -> Tensor:
        """Fill in the newest pair's products; with g (N,), return (sᵢ·g, yᵢ·g) (pairs, 2) from the same pass."""
        vectors = [] if g is None else [g]
        if self.unsettled is not None:
            vectors.append(self.pairs[self.unsettled, 1])
        count = len(self.order)
        if not vectors:
            return torch.empty((count, 2), dtype=torch.float64)
        flat = self.pairs[:count].view(2 * count, -1)
        products = (flat @ torch.stack(vectors, dim=1)).double().view(count, 2, len(vectors))
        if self.unsettled is not None:
            slot, last = self.unsettled, products[:, :, -1]
            self.sy[:count, slot] = torch.where(torch.arange(count) == slot, self.sy[:count, slot], last[:, 0].cpu())
            self.yy[:count, slot] = self.yy[slot, :count] = last[:, 1].cpu()
            self.unsettled = None
        return products[:, :, 0].cpu()

    def direction(self, gradient: Tensor, free: Tensor) -> Tensor | None:
        """−H·gradient on the free pixels, or None without a history or without descent."""
        if not self.order:
            return None
        g = torch.where(free, gradient, 0.0).flatten()
        index = torch.tensor(self.order)
        products = self._settle(g)[index]
        newest = self.order[-1]
        gamma = float(self.sy[newest, newest] / self.yy[newest, newest])
        r = torch.triu(self.sy[index][:, index])
        w = torch.linalg.solve_triangular(r, products[:, :1], upper=True)
        middle = (torch.diag(r.diagonal()) + gamma * self.yy[index][:, index]) @ w - gamma * products[:, 1:]
        a = torch.linalg.solve_triangular(r.T, middle, upper=False)
        weights = torch.empty((len(self.order), 2), dtype=torch.float64)
        weights[index] = torch.cat([a, -gamma * w], dim=1)
        flat = self.pairs[: len(self.order)].view(weights.numel(), -1)
        step = gamma * g + weights.flatten().to(g) @ flat
        step = torch.where(free.flatten(), -step, 0.0)
        if not dot(step, g) < 0.0:
            return None
        return step.view(self.shape)
