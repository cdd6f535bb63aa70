"""Descend by projected L-BFGS: the secant pairs of one image, their direction, and the solver built on them."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_equiv.checks import check_count, check_positive
from hf_equiv.matching.feasible import FeasibleSet, SineChart
from hf_equiv.matching.solvers import Evaluation, Iterates
from hf_equiv.precision import dot


class SecantHistory:
    """The last `capacity`, at most `most`, secant pairs (s, y) of one image and their inner products, for L-BFGS.

    H = γI + [S, γY] M [S, γY]ᵀ, so a direction costs two passes over the stored vectors: their products with the
    gradient, and their sum. Products with the newest y = g′ − g are differences of those with g′ and with g.
    """

    def __init__(self, capacity: int, like: Tensor, most: int = 0) -> None:
        self.capacity = capacity
        self.shape = like.shape
        self.pairs = like.new_empty((0, 2, like.numel()))  # grows in blocks, so that memory follows use
        self.order: list[int] = []
        # sᵢ·yⱼ, valid for i not newer than j, and yᵢ·yⱼ
        size = max(capacity, most)
        self.sy, self.yy = torch.zeros((2, size, size), dtype=torch.float64, device="cpu")
        self.unsettled: list[int] = []  # slots without products, oldest first
        self.newest: tuple[Tensor, Tensor] | None = None  # the two gradients of the newest y
        self.seen: tuple[Tensor, Tensor] | None = None  # the gradient of the last direction and its products

    def clear(self) -> None:
        """Drop all pairs."""
        self.order, self.unsettled, self.newest, self.seen = [], [], None, None

    def add(self, s: Tensor, before: Tensor, after: Tensor) -> None:
        """Store a step s and the change y of the gradient, unless their curvature s·y is not safely positive."""
        y = after - before
        sy, yy, ss = dot(s, y), dot(y, y), dot(s, s)
        if not sy > 1e-10 * math.sqrt(ss * yy):
            return
        slot = self.order.pop(0) if len(self.order) == self.capacity else len(self.order)
        if slot >= self.pairs.shape[0]:
            grown = self.pairs.new_empty((min(self.capacity, slot + 20), 2, s.numel()))
            grown[: self.pairs.shape[0]] = self.pairs
            self.pairs = grown
        self.pairs[slot, 0], self.pairs[slot, 1] = s.flatten(), y.flatten()
        self.order.append(slot)
        self.sy[slot, slot], self.yy[slot, slot] = sy, yy
        self.unsettled = [other for other in self.unsettled if other != slot] + [slot]
        self.newest = (before, after)

    def direction(self, gradient: Tensor, free: Tensor) -> Tensor | None:
        """Return −H·gradient on the free pixels, or None without a history or without descent."""
        if not self.order:
            return None
        products = self._products(gradient.flatten())
        self._settle(gradient, products)
        self.seen = (gradient, products)
        g = (gradient * free).flatten()
        index = torch.tensor(self.order, device="cpu")
        products = self._without_held(products, gradient, g, free)[index]
        newest = self.order[-1]
        gamma = float(self.sy[newest, newest] / self.yy[newest, newest])
        r = torch.triu(self.sy[index][:, index])
        w = torch.linalg.solve_triangular(r, products[:, :1], upper=True)
        middle = (torch.diag(r.diagonal()) + gamma * self.yy[index][:, index]) @ w - gamma * products[:, 1:]
        a = torch.linalg.solve_triangular(r.T, middle, upper=False)
        weights = torch.empty((len(self.order), 2), dtype=torch.float64, device="cpu")
        weights[index] = torch.cat([a, -gamma * w], dim=1)
        step = torch.addmv(g, self._flat().T, weights.flatten().to(g), beta=-gamma, alpha=-1).view(self.shape) * free
        return step if dot(step, gradient) < 0.0 else None

    def _flat(self) -> Tensor:  # rows s₀, y₀, s₁, y₁, …
        return self.pairs[: len(self.order)].view(2 * len(self.order), -1)

    def _products(self, v: Tensor) -> Tensor:
        """Return (sᵢ·v, yᵢ·v) of every slot, float64 on the CPU: (slots, 2), or (slots, 2, columns) for several v."""
        return (self._flat() @ v).view(len(self.order), 2, *v.shape[1:]).to("cpu", torch.float64)

    def _settle(self, gradient: Tensor, products: Tensor) -> None:
        """Fill in the products of the pairs added since the last direction."""
        slots, self.unsettled = self.unsettled, []
        if not slots:
            return
        ends = (None, None) if self.newest is None else self.newest
        if len(slots) == 1 and self.seen is not None and ends[0] is self.seen[0] and ends[1] is gradient:
            earlier = torch.zeros_like(products)
            earlier[: len(self.seen[1])] = self.seen[1]
            columns = (products - earlier)[:, :, None]
        else:
            columns = self._products(self.pairs[slots, 1].T)
        count = len(self.order)
        for slot, column in zip(slots, columns.unbind(dim=2), strict=True):
            own = self.sy[slot, slot].item(), self.yy[slot, slot].item()
            self.sy[:count, slot] = column[:, 0]
            self.yy[:count, slot] = self.yy[slot, :count] = column[:, 1]
            self.sy[slot, slot], self.yy[slot, slot] = own

    def _without_held(self, products: Tensor, gradient: Tensor, g: Tensor, free: Tensor) -> Tensor:
        """Return the products with g, the gradient on the free pixels, from those with the whole gradient."""
        held = (~free).flatten().nonzero().flatten()
        if len(held) == 0:
            return products
        if 16 * len(held) > len(g):
            return self._products(g)
        part = self._flat()[:, held] @ gradient.flatten()[held]
        return products - part.view(-1, 2).to("cpu", torch.float64)


@dataclass(frozen=True, slots=True)
class LBFGS:
    """Projected limited-memory BFGS on ½‖f(x) − z‖², started by Polyak steps and held near the source. The default.

    1. *Start.* The source lies in a narrow, strongly curved valley. Polyak's step ½‖r‖²/‖g‖², damped by momentum,
       bounces across it and stays near the source: `warmup` evaluations bring the error to about 0.3.
    2. *Descent.* L-BFGS in the compact representation backtracks along the projected path. Pixels at a bound that the
       step pushes outwards are held. Until the error falls below `release`, the penalty ½λ‖x − source‖² with λ =
       proximity·‖r‖²/‖x − source‖² pulls back; λ only falls.
    3. *End.* The line search accepts increases that rounding in f can explain, so it does not stop at the float noise.

    In an L∞ ball matches lie near the corners, and the start goes there at once, by signed steps x ← P(x − α·sign(m)):
    m is a running sum of the gradients, α = ‖r‖ / ‖∇‖r‖‖₁ Polyak's step for ‖r‖ in this norm. Once α is below 1 % of
    the radius, L-BFGS continues in w, x = m + h·sin(w) (`SineChart`).

    Args:
        history: most pairs kept, two images each; they start at 40 and double if the error does not halve in as many.
        warmup: evaluations of the start; 0 for plain L-BFGS. In an L∞ ball at most ten times this number.
        momentum: momentum of the start, in [0, 1).
        proximity: weight of staying near the source against the remaining error; more takes more evaluations.
        release: embedding error below which the penalty is dropped.
        newton: whether `match_embedding` may end a slow run without a ball by one full Jacobian and Newton steps.

    References:
        Polyak (1987), *Introduction to Optimization*, §5.3. Bertsekas (1982), *SIAM J. Control Optim.* 20:221.
        Byrd, Nocedal, Schnabel (1994), *Math. Program.* 63:129, eq. 3.13 (compact representation).
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
        check_positive(self.momentum, "momentum", 1, or_zero=True)
        check_positive(self.proximity, "proximity", or_zero=True)
        check_positive(self.release, "release", or_zero=True)

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
        """Take signed steps with momentum and Polyak's length for ‖r‖ in the L∞ norm; return the best point."""
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
        """Run start and descent in one feasible set."""
        memory = SecantHistory(min(self.history, 40), source, self.history)
        x, raw = yield from self._polyak(source, feasible, memory, warmup)
        weight, slack, failures, steps, milestone = math.inf, 1.0, 0, 0, raw.error
        at, charged = raw, weight  # the objective at x, and the weight of the penalty in it
        while failures < 3:
            if raw.error < 0.5 * milestone:
                steps, milestone = 0, raw.error
            elif steps == memory.capacity:
                steps, memory.capacity = 0, min(2 * memory.capacity, self.history)
            steps += 1
            pull = self._pull(x, raw, feasible)
            if pull < 0.5 * weight:  # change it rarely, because the history belongs to the old objective
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
                weight = 0.0  # the penalty, not the encoder, stopped the descent
            elif found is None and slack < 30.0:
                slack *= 6.0  # the encoder may be noisier here than most
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
        """Return the weight λ = proximity·‖r‖²/‖x − source‖² of the penalty: ∞ at the source, 0 near the target."""
        if at.error < self.release or self.proximity == 0.0:
            return 0.0
        offset = x - feasible.center
        distance2 = dot(offset, offset)
        return self.proximity * 2 * at.objective / distance2 if distance2 > 0.0 else math.inf

    def _polyak(
        self, source: Tensor, feasible: FeasibleSet, memory: SecantHistory, warmup: int
    ) -> Generator[Tensor, Evaluation, tuple[Tensor, Evaluation]]:
        """Take Polyak steps with momentum; return the best point and leave the secants in `memory`."""
        x = feasible.project(source)
        at = yield x
        best, last, previous = (x, at), (x, at), x
        for _ in range(warmup):
            norm2 = dot(at.gradient, at.gradient)
            if norm2 == 0.0:
                break
            # A step beyond the diagonal of the box means a flat spot, not a distant minimum.
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
    """Return the evaluation of ½‖r‖² + ½·weight·‖x − source‖²; an infinite weight is not yet known and adds nothing."""
    if weight in (0.0, math.inf):
        return at
    offset = x - feasible.center
    objective = at.objective + 0.5 * weight * dot(offset, offset)
    return replace(at, objective=objective, gradient=torch.add(at.gradient, offset, alpha=weight))


def _backtrack(
    x: Tensor, at: Evaluation, direction: Tensor, feasible: FeasibleSet, weight: float, slack: float
) -> Generator[Tensor, Evaluation, tuple[Tensor, Evaluation, Evaluation] | None]:
    """Backtrack along the projected path to Armijo's condition; return None if no step decreases the objective."""
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
        # The minimum of the parabola through both values and the slope, within [0.1, 0.5] of the step.
        excess = there.objective - at.objective - slope
        step *= min(0.5, max(0.1, -0.5 * slope / excess))
    return None
