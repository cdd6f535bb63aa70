"""Descend by projected L-BFGS: the secant pairs of a batch, their directions, and the solver built on them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_equiv.checks import check_count, check_positive
from hf_equiv.matching.feasible import FeasibleSet, Rows, SineChart
from hf_equiv.matching.solvers import Descent, Evaluations, pick
from hf_equiv.precision import inner

_FIRST = 40  # evaluations whose secants are kept at first
_TRIALS = 8  # points on one line
_LOUDEST = 30.0  # times the usual noise of an objective that the line search allows
_RESETS = 3  # failures in a row, each with a new history, after which an image has stalled


class SecantHistory(Rows):
    """The secant pairs (s, y) of the last `capacity` evaluations and their inner products, for L-BFGS.

    H = γI + [S, γY] M [S, γY]ᵀ, with S and Y (N, m) of one image, so a direction costs two passes over the stored
    vectors: their products with the gradient, and their sum. All images fill the same slot at the same time; the slot
    of an image without a new pair is empty (`valid` is false), and its products count as zero.
    """

    def __init__(self, like: Tensor, capacity: int) -> None:
        batch, size = like.shape
        self.capacity, self.count = capacity, 0  # slots, and pairs offered so far
        self.pairs = like.new_zeros((batch, capacity, 2, size))
        self.valid = torch.zeros((batch, capacity), dtype=torch.bool, device=like.device)
        # sᵢ·yⱼ, needed for i not newer than j, and yᵢ·yⱼ
        self.sy = torch.zeros((batch, capacity, capacity), dtype=torch.float64, device=like.device)
        self.yy = torch.zeros_like(self.sy)

    def grow(self, capacity: int) -> None:
        """Make room for the pairs of more evaluations."""
        shift, more = self._shift(), capacity - self.capacity
        for name in ("pairs", "valid", "sy", "yy"):
            value = getattr(self, name).roll(shift, 1)
            value = torch.cat([value, value.new_zeros((len(value), more, *value.shape[2:]))], dim=1)
            setattr(self, name, value)
        for name in ("sy", "yy"):
            value = getattr(self, name).roll(shift, 2)
            setattr(self, name, torch.cat([value, value.new_zeros((*value.shape[:2], more))], dim=2))
        self.count, self.capacity = min(self.count, self.capacity), capacity

    def _shift(self) -> int:
        """Return the roll that puts the oldest pair first."""
        return -(self.count % self.capacity) if self.count > self.capacity else 0

    def add(self, s: Tensor, y: Tensor, wanted: Tensor) -> None:
        """Store steps s (B, N) and changes y of the gradient where wanted (B,), if their curvature s·y is positive."""
        slot = self.count % self.capacity
        self.count += 1
        sy, yy = inner(s, y), inner(y, y)
        wanted = wanted & (sy > 1e-10 * (inner(s, s) * yy).sqrt())
        self.pairs[:, slot, 0], self.pairs[:, slot, 1], self.valid[:, slot] = s, y, wanted
        products = self._products(y)
        used = products.shape[1]
        self.sy[:, :used, slot] = products[:, :, 0]
        self.yy[:, :used, slot] = self.yy[:, slot, :used] = products[:, :, 1]
        self.sy[:, slot, slot], self.yy[:, slot, slot] = sy, yy

    def clear(self, which: Tensor) -> None:
        """Drop the pairs of some images (B,)."""
        self.valid = self.valid & ~which[:, None]

    def direction(self, gradient: Tensor) -> Tensor:
        """Return −H·gradient (B, N), or zero without a pair."""
        if self.count == 0:
            return torch.zeros_like(gradient)
        products = self._products(gradient)
        used = products.shape[1]
        shift = self._shift()
        valid = self.valid[:, :used].roll(shift, 1)
        both = valid[:, :, None] & valid[:, None]
        identity = torch.diag_embed((~valid).double())
        sy = torch.where(both, self.sy[:, :used, :used].roll((shift, shift), (1, 2)).triu(), identity)
        yy = torch.where(both, self.yy[:, :used, :used].roll((shift, shift), (1, 2)), 0.0)
        products = torch.where(valid[:, :, None], products.roll(shift, 1), 0.0)
        newest = (valid * torch.arange(1, used + 1, device=valid.device)).argmax(dim=1, keepdim=True)
        diagonal = sy.diagonal(dim1=1, dim2=2)
        gamma = diagonal.gather(1, newest) / yy.diagonal(dim1=1, dim2=2).gather(1, newest).clamp_min(1e-300)
        gamma = (gamma * valid.any(dim=1, keepdim=True))[:, :, None]
        w = torch.linalg.solve_triangular(sy, products[:, :, :1], upper=True)
        middle = diagonal[:, :, None] * w + gamma * (yy @ w) - gamma * products[:, :, 1:]
        a = torch.linalg.solve_triangular(sy.mT, middle, upper=False)
        weights = torch.where(valid[:, :, None], torch.cat([-a, gamma * w], dim=2), 0.0).roll(-shift, 1)
        flat = self.pairs[:, :used].flatten(1, 2)
        return torch.bmm(weights.flatten(1)[:, None].to(flat), flat)[:, 0] - gamma[:, 0].to(flat) * gradient

    def _products(self, v: Tensor) -> Tensor:
        """Return (sᵢ·v, yᵢ·v) of every slot used, (B, m, 2) float64."""
        used = min(self.count, self.capacity)
        flat = self.pairs[:, :used].flatten(1, 2)
        return torch.bmm(v[:, None], flat.mT)[:, 0].view(-1, used, 2).double()  # a row: its bits do not depend on B


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
        history: most evaluations whose secant pairs are kept, two images each. 40 are kept at first, and enough without
            a ball if Newton steps may end the run; otherwise they double after four times as many evaluations.
        warmup: evaluations of the start; 0 for plain L-BFGS. In an L∞ ball at most ten times this number.
        momentum: momentum of the start, in [0, 1).
        proximity: weight of staying near the source against the remaining error; more takes more evaluations.
        release: embedding error below which the penalty is dropped.
        newton: whether `match_embedding` may end a slow run by full Jacobians and Newton steps; not in an L2 ball.

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

    def begin(self, start: Tensor, feasible: FeasibleSet, phase: int = 0) -> Descent | None:
        """Return the state of a batch: signed steps and descent in the charts in L∞ balls, else one phase."""
        if not feasible.linf:
            return None if phase else _Path(self, start, feasible, self.warmup)
        if phase == 0:
            return _Signed(start, feasible, 10 * self.warmup)
        return _Path(self, start, feasible, 0) if phase == 1 else None


class _Path(Rows):
    """Start and descent of a batch in one feasible set, or in the charts of L∞ balls."""

    def __init__(self, solver: LBFGS, start: Tensor, feasible: FeasibleSet, warmup: int) -> None:
        self.chart = SineChart(feasible) if feasible.linf else None
        self.feasible = feasible if self.chart is None else self.chart.space
        self.solver, self.warmup, self.count = solver, warmup, 0
        self.grows = not solver.newton or feasible.linf
        self.history = SecantHistory(start, min(solver.history, _FIRST))
        self.trial = self.moved = self.x = (
            self.feasible.project(start) if self.chart is None else self.chart.invert(start)
        )
        none = start.new_full((len(start),), math.inf, dtype=torch.float64)
        self.at = Evaluations(none, torch.zeros_like(start), none, none, none)  # at x; infinite until it is known
        self.here = self.at  # with the penalty
        self.best, self.best_at, self.direction, self.step = self.x, self.at, self.at.gradient, self.at.gradient
        # of the line search: weight of the penalty, slope along the step, share of the direction, points tried
        self.weight, self.slope, self.share, self.tried = none, -none, torch.ones_like(none), torch.zeros_like(none)
        self.slack, self.failures = torch.ones_like(none), torch.zeros_like(none)

    @property
    def points(self) -> Tensor:
        return self.trial if self.chart is None else self.chart.place(self.trial)

    def advance(self, at: Evaluations) -> Tensor:
        if self.chart is not None:
            at = replace(at, gradient=self.chart.pull_back(at.gradient, self.trial))
        self.count += 1
        room = self.history.capacity
        if self.grows and self.count == 4 * room and room < self.solver.history:
            self.history.grow(min(2 * room, self.solver.history))
        if self.count > self.warmup + 1:
            return self._search(at)
        self._look(at)
        if self.count <= self.warmup:
            return self._polyak(at.objective.isfinite())
        self.x, self.at = self.best, self.best_at
        return self._aim(torch.ones_like(self.slope, dtype=torch.bool), torch.ones_like(self.slope))

    def _look(self, at: Evaluations) -> None:
        """Note the best point of the start, and the secant to the last one."""
        finite = at.objective.isfinite()
        if self.count > 1:
            change = at.gradient - self.at.gradient
            self.history.add(self.trial - self.x, change, finite & self.at.objective.isfinite())
        better = at.objective < self.best_at.objective
        self.best, self.best_at = pick(better, self.trial, self.best), at.where(better, self.best_at)
        self.x, self.at = pick(finite, self.trial, self.best), at.where(finite, self.best_at)

    def _polyak(self, finite: Tensor) -> Tensor:
        """Take a Polyak step with momentum; from the best point, and ten times shorter, if f is not finite here."""
        self.share = torch.where(finite, self.share, 0.1 * self.share)
        norm2 = inner(self.at.gradient, self.at.gradient)
        # A step beyond the diagonal of the box means a flat spot, not a distant minimum.
        width = (self.feasible.upper - self.feasible.lower).amax().double()
        far = width * math.sqrt(self.x.shape[1]) / norm2.sqrt()
        step = self.share * torch.minimum(self.at.objective / norm2, far)
        step = torch.where((norm2 > 0) & step.isfinite(), step, 0.0)[:, None].to(self.x)
        momentum = self.solver.momentum
        moved = self.feasible.project(self.x - (1 - momentum) * step * self.at.gradient)
        self.trial = self.feasible.project(moved + momentum * (moved - pick(finite, self.moved, self.x)))
        self.moved = moved
        return norm2 == 0

    def _search(self, at: Evaluations) -> Tensor:
        """Test Armijo's condition at the points; go on along the line, or from there, by the next direction."""
        here, there = self.here, self._penalised(self.trial - self.feasible.center, at)
        enough = here.objective + 1e-4 * self.slope + self.slack * self.at.noise
        good = (there.objective <= enough) & (self.slope < 0)
        self.tried = self.tried + 1
        # The minimum of the parabola through both values and the slope, within [0.1, 0.5] of the step.
        excess = there.objective - here.objective - self.slope
        shrink = torch.where(there.objective.isfinite(), (-0.5 * self.slope / excess).clamp(0.1, 0.5), 0.1)
        failed = ~good & ((self.tried >= _TRIALS) | (self.slope >= 0))
        self._give_in(failed)
        self.failures = torch.where(good, 0.0, self.failures)
        self.history.add(self.step, there.gradient - here.gradient, good)
        slow = good & (at.error > 0.99 * self.at.error)
        self.weight = torch.where(slow, 0.5 * self.weight, self.weight)
        self.x, self.at = pick(good, self.trial, self.x), at.where(good, self.at)
        fresh = good | failed
        return self._aim(fresh, torch.where(fresh, 1.0, self.share * shrink))

    def _give_in(self, failed: Tensor) -> None:
        """Drop the penalty of the images whose line holds no better point, then allow noise, then drop the history."""
        penalty = failed & (self._weight() > 0)
        quiet = failed & ~penalty & (self.slack < _LOUDEST)
        lost = failed & ~penalty & ~quiet
        self.weight = torch.where(penalty, 0.0, self.weight)
        self.slack = torch.where(quiet, 6 * self.slack, self.slack)  # the encoder may be noisier here than most
        self.failures = self.failures + torch.where(self.history.valid.any(dim=1), 1.0, _RESETS) * lost
        self.history.clear(lost)

    def _aim(self, fresh: Tensor, share: Tensor) -> Tensor:
        """Choose the next points: on a new line where `fresh`, at another share of the last direction elsewhere."""
        offset = self.x - self.feasible.center
        pull = self._pull(offset)
        # The weight changes rarely, because the history belongs to the old objective.
        self.weight = torch.where(fresh & (pull < 0.5 * self.weight), pull, self.weight)
        here = self.here = self._penalised(offset, self.at)
        free = self.feasible.free(self.x, here.gradient)
        gradient = here.gradient * free
        direction = self.history.direction(gradient) * free
        norm2 = inner(gradient, gradient)
        plain = torch.where(norm2 > 0, -0.25 * here.objective / norm2, 0.0)[:, None].to(gradient) * gradient
        direction = pick(inner(direction, gradient) < 0, direction, plain)
        self.direction = pick(fresh, direction, self.direction)
        self.share, self.tried = share, torch.where(fresh, 0.0, self.tried)
        self.trial = self.feasible.project(self.x + share[:, None].to(self.x) * self.direction)
        self.step = self.trial - self.x
        self.slope = inner(here.gradient, self.step)
        return (self.failures >= _RESETS) | (self.slope == 0)

    def _weight(self) -> Tensor:
        """Return the weight in use: an infinite one is not yet known and adds nothing."""
        return torch.where(self.weight.isinf(), 0.0, self.weight)

    def _pull(self, offset: Tensor) -> Tensor:
        """Return the weight λ = proximity·‖r‖²/‖x − source‖² of the penalty: ∞ at the source, 0 near the target."""
        wanted = (self.at.error >= self.solver.release) & (self.solver.proximity > 0)
        return torch.where(wanted, self.solver.proximity * 2 * self.at.objective / inner(offset, offset), 0.0)

    def _penalised(self, offset: Tensor, at: Evaluations) -> Evaluations:
        """Return the evaluation of ½‖r‖² + ½λ‖x − source‖² at a point with this offset from the source."""
        weight = self._weight()
        objective = at.objective + 0.5 * weight * inner(offset, offset)
        return replace(at, objective=objective, gradient=at.gradient + weight[:, None].to(offset) * offset)


class _Signed(Rows):
    """Signed steps of a batch towards the corners of its L∞ balls."""

    def __init__(self, start: Tensor, feasible: FeasibleSet, most: int) -> None:
        self.feasible, self.left = feasible, most
        self.points, self.momentum = feasible.project(start), torch.zeros_like(start)
        self.radius = 0.5 * (feasible.upper - feasible.lower).amax(dim=1).double()

    def advance(self, at: Evaluations) -> Tensor:
        self.left -= 1
        gradient = at.gradient.abs()
        slope = inner(gradient, self.feasible.free(self.points, at.gradient).to(gradient))
        step = torch.where(slope > 0, 2 * at.objective / slope, 0.0)
        step = torch.minimum(step, 0.25 * self.radius).clamp_max(1 / 255)
        size = (inner(gradient, torch.ones_like(gradient)) / gradient.shape[1]).to(gradient)[:, None]
        self.momentum = 0.9 * self.momentum + torch.where(size > 0, at.gradient / size, 0.0)
        self.points = self.feasible.project(self.points - step[:, None].to(size) * self.momentum.sign())
        return (step < 0.01 * self.radius) | at.objective.isinf() | (self.left <= 0)
