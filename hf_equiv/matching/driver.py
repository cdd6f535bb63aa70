"""Drive a solver on the images of a batch until the search of each has ended.

The images are worked on in lots: those that begin a phase of the solver together. All images of a lot are evaluated at
once, again and again. After each evaluation an image stays in its lot, or leaves it in one of four ways:

    ended     its search is over: it is a match, it cannot become one, or it has used up its evaluations.
    through   the solver has ended its phase. The next phase begins; after the last one the search ends.
    near      Newton steps from one Jacobian should be cheaper than the rest of the descent. If they neither end the
              search nor come nearer, without a ball the image is stuck; else the phase goes on from the image reached.
    stuck     its error no longer falls. The solver begins again, from the source with every pixel slightly changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hf_equiv import checks
from hf_equiv.conditions import Function
from hf_equiv.jacobian import jacobian_cost
from hf_equiv.matching.feasible import FeasibleSet, Rows
from hf_equiv.matching.newton import Newton
from hf_equiv.matching.search import ProgressHook, Search, reached, snapshot
from hf_equiv.matching.solvers import Descent, Evaluations, pick
from hf_equiv.memory import Parts, halved
from hf_equiv.precision import no_autocast, no_tf32, power_of_two
from hf_equiv.results import Status

NOISE = {torch.float64: 1e-15, torch.float32: 5e-7, torch.bfloat16: 5e-3, torch.float16: 5e-4}
"""Typical ‖f(x) in this dtype − f(x)‖ / ‖f(x)‖ of one evaluation, for the line search."""

CLEAR = 10  # times the noise of f: an error above it is not noise
_NEAR = 0.02  # embedding error below which Newton steps from one Jacobian reach the target
_PACE = 30  # evaluations over which the pace of a run is measured
_WORTH = 0.5, 1.5  # estimated remaining cost, in Jacobians, that justifies one; in a ball the descent slows down less
_FAR = 10  # times rtol: a smaller error takes no Jacobian in a ball
_STEPS = 10  # evaluations that must be left for Newton steps after a Jacobian
_NEARER = 0.5  # share of the error left by Newton steps, below which more follow from a new Jacobian
_SHAKE = 0.5 / 255  # change of every pixel of the source at the first restart, halved; it doubles with each


class Batch:
    """The images of one call of `match_embedding`: their targets, best images and searches."""

    def __init__(
        self, f: Function, z: Tensor, feasible: FeasibleSet, start: Tensor, rtol: float, max_evals: int,
        together: int, progress: ProgressHook | None,
    ) -> None:  # fmt: skip
        self.f, self.z, self.feasible, self.shape = f, z, feasible, start.shape
        self.rtol, self.max_evals, self.progress = rtol, max_evals, progress
        self.together = together  # most images that take Newton steps together; 0 if none may
        self.best, self.parts = start.flatten(1).clone(), Parts()
        self.searches = [Search(image) for image in start]
        self.scale = torch.linalg.vector_norm(z, dim=1)
        # In this unit, residuals and gradients neither overflow nor lose a bit.
        self.unit = self.scale.new_tensor([power_of_two(scale) for scale in self.scale.tolist()])

    @property
    def restarts(self) -> bool:
        """Whether an image that is stuck begins again: without a ball, all targets should be reached."""
        return self.together > 0 and not self.feasible.linf

    def images(self) -> Tensor:
        """Return the best images, (B, *shape)."""
        return self.best.view(self.shape)

    def settle(self, place: int, error: float, thirds: int) -> bool:
        """Note an error and its cost; return whether the search of an image has ended by it."""
        run = self.searches[place]
        run.thirds += thirds
        run.offer(error)
        run.status = reached(self.f, run, self.images()[place], self.rtol)
        if run.status is None and run.num_evals + 1 > self.max_evals:
            run.status = Status.STALLED if run.is_stuck else Status.MAX_EVALS
        return run.status is not None

    def goals(self, places: Sequence[int]) -> Tensor:
        """Return the errors at which images are done: `rtol` less the noise, if that is below it."""
        noises = [self.searches[place].noise_of(self.f) for place in places]
        return self.scale.new_tensor([self.rtol - noise if 1.5 * noise <= self.rtol else self.rtol for noise in noises])

    def report(self) -> None:
        """Call the progress hook."""
        if self.progress is not None:
            self.progress(snapshot(self.images().clone(), self.searches))


@dataclass
class _Lot:
    """Images that begin a phase of a solver together, by their places in the batch; and where those go that leave."""

    solver: Any
    places: list[int]
    phase: int = 0
    shaken: bool = False  # whether they begin beside their sources, not at their best images
    through: list[int] = field(default_factory=list)
    near: list[int] = field(default_factory=list)
    stuck: list[int] = field(default_factory=list)


def drive(batch: Batch, solver: Any) -> Iterator[list[int]]:
    """Search for the matches of all images; yield the places of those that end together, as soon as they have."""
    todo = [_Lot(solver, list(range(len(batch.searches))))]
    while todo:
        lot = todo.pop()
        yield from _descend(batch, lot)
        missed = list[int]()
        for first in range(0, len(lot.near), batch.together or 1):
            yield _end(batch, lot, lot.near[first : first + batch.together], missed)
        if lot.stuck:
            todo.append(_Lot(solver, lot.stuck, shaken=True))
        if missed:
            todo.append(_Lot(replace(lot.solver, warmup=0), missed, lot.phase))
        if lot.through:
            todo.append(_Lot(lot.solver, lot.through, lot.phase + 1))


def _descend(batch: Batch, lot: _Lot) -> Iterator[list[int]]:
    """Run one phase of a solver until all images of the lot have left it; yield those that end."""
    with torch.inference_mode(False), no_tf32():
        pool = _open(batch, lot)
    if pool is None:
        yield [place for place in lot.places if _gives_up(batch, lot, place)]
        return
    places = lot.places
    while places:
        began, ended, left = time.perf_counter(), list[int](), list[int]()
        with torch.inference_mode(False), no_tf32():  # the caller has its own rules back between two steps
            table = pool.evaluate(batch)
            batch.best[pool.places] = pool.best
            for i, (place, (error, finite, through)) in enumerate(zip(places, table, strict=True)):
                run = batch.searches[place]
                run.finite = bool(finite)
                if batch.settle(place, error, 3):
                    ended.append(place)
                elif not finite and run.error == math.inf:
                    run.status = Status.ERROR
                    ended.append(place)
                elif through:
                    lot.through.append(place)
                elif batch.restarts and run.is_stuck:
                    (lot.stuck if run.restart() else ended).append(place)
                elif batch.together and _is_worth(batch, run):
                    lot.near.append(place)
                else:
                    left.append(i)
            for place in places:
                batch.searches[place].seconds += (time.perf_counter() - began) / len(places)
            if len(left) < len(places):
                places = [places[i] for i in left]
                pool = pool.keep(torch.tensor(left, dtype=torch.long, device=pool.best.device))
            batch.report()
        if ended:
            yield ended


def _open(batch: Batch, lot: _Lot) -> _Pool | None:
    """Return the pool of a lot at the start of its phase, or None if the solver has no such phase."""
    index = torch.tensor(lot.places, device=batch.best.device)
    feasible, start = batch.feasible.keep(index), batch.best[index]
    if lot.shaken:
        signs = torch.rand(start.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
        scale = [_SHAKE * 2 ** batch.searches[place].restarts for place in lot.places]
        start = feasible.project(feasible.center + start.new_tensor(scale)[:, None] * signs.sign().to(start))
    descent = lot.solver.begin(start, feasible, lot.phase)
    return None if descent is None else _Pool(batch, lot.places, index, descent)


class _Pool(Rows):
    """The images that are left in a lot, with the state of the solver: what each evaluation needs."""

    def __init__(self, batch: Batch, places: list[int], index: Tensor, descent: Descent) -> None:
        self.places, self.descent = index, descent
        self.z, self.scale, self.unit = (part[index] for part in (batch.z, batch.scale, batch.unit))
        self.best = batch.best[index]
        self.error = self.scale.new_tensor([batch.searches[place].error for place in places])

    def evaluate(self, batch: Batch) -> list[list[float]]:
        """Evaluate the points and advance the solver; return error, finite and through of each image."""
        points = self.descent.points.detach()

        def pull(part: slice) -> tuple[Tensor, ...]:
            images = points[part].view(-1, *batch.shape[1:]).requires_grad_(True)
            with torch.enable_grad():
                z = batch.f(images)
                checks.check_dimension(self.z[0], z.shape[1])
                residual = (z.detach().double() - self.z[part]) / self.unit[part, None]
                with no_autocast():
                    (gradient,) = torch.autograd.grad(z, images, residual.to(z.dtype))
            return z.detach(), residual, gradient.flatten(1) / self.unit[part, None].to(gradient)

        z, residual, gradient = batch.parts(pull, len(points))
        with no_autocast():
            norm = torch.linalg.vector_norm(residual, dim=1)
            error = norm * self.unit / self.scale
            steepest = gradient.abs().amax(dim=1)
            finite = error.isfinite() & steepest.isfinite()
            better = error < self.error  # false for NaN
            self.best, self.error = pick(better, points, self.best), torch.where(better, error, self.error)
            slack = max(NOISE[z.dtype], NOISE[points.dtype]) * norm * self.scale / self.unit
            at = Evaluations(0.5 * norm**2, gradient, slack, error, self.unit)
            none = torch.full_like(norm, math.inf)
            at = at.where(finite, Evaluations(none, torch.zeros_like(gradient), none, none, self.unit))
            through = self.descent.advance(at) | (steepest == 0)
        return torch.stack([error, finite, through], dim=1).tolist()  # the one wait for the device


def _gives_up(batch: Batch, lot: _Lot, place: int) -> bool:
    """End the search of an image after the last phase, unless it may begin again: far from the target, without ball."""
    run = batch.searches[place]
    if batch.restarts and run.finite and run.error > CLEAR * run.noise_of(batch.f) and run.restart():
        lot.stuck.append(place)
        return False
    run.status = Status.STALLED if run.finite else Status.ERROR
    return True


def _is_worth(batch: Batch, run: Search) -> bool:
    """Whether a Jacobian is cheaper than going on: extrapolate the log error of the last evaluations to rtol."""
    if run.error > min(_NEAR, run.close) or (batch.feasible.linf and run.error < _FAR * batch.rtol):
        return False
    cost = jacobian_cost(batch.z.shape[1])
    earlier = run.earlier(_PACE)
    if earlier is None or run.num_evals + cost + _STEPS > batch.max_evals:
        return False
    left = math.log(run.error / batch.rtol) * _PACE / max(math.log(earlier / run.error), 1e-9)
    return left > _WORTH[batch.feasible.linf] * cost


def _end(batch: Batch, lot: _Lot, places: Sequence[int], missed: list[int]) -> list[int]:
    """Take Newton steps from the best images of some places; return those that end, and add others to `missed`."""
    ended, again = list[int](), list[int]()
    before = {place: batch.searches[place].error for place in places}
    for some, found in halved(partial(_newton, batch), places):
        left = some if isinstance(found, torch.OutOfMemoryError) else found
        ended += [place for place in some if place not in left]
        for place in left:
            run = batch.searches[place]
            if _is_nearer(batch, run, before[place]):
                again.append(place)
            elif batch.restarts and left is found and run.error > _NEARER * _NEAR:
                (lot.stuck if run.restart() else ended).append(place)
            else:
                missed.append(place)
    return ended + (_end(batch, lot, again, missed) if again else [])


def _newton(batch: Batch, places: Sequence[int]) -> Sequence[int]:
    """Take Newton steps from one Jacobian of each image; return the places whose search goes on."""
    began = time.perf_counter()
    runs = [batch.searches[place] for place in places]
    before = [(run.thirds, run.seconds) for run in runs]
    for run in runs:
        run.close = 0.1 * run.error
    with torch.inference_mode(False), no_tf32(), no_autocast():
        index = torch.tensor(places, device=batch.best.device)
        most = index.new_tensor([int(3 * batch.max_evals) - run.thirds for run in runs])
        start, box = batch.images()[index], batch.feasible.keep(index)
        newton = Newton(batch.f, start, batch.z[index], box, batch.goals(places), most)
        steps: Iterable[None] = chain([None], newton.run())
        while True:
            for _ in steps:
                better = newton.error < newton.error.new_tensor([run.error for run in runs])
                batch.best[index] = pick(better, newton.best, batch.best[index])
                share = (time.perf_counter() - began) / len(runs)
                table = zip(runs, newton.error.tolist(), newton.cost.tolist(), before, strict=True)
                for run, error, cost, (thirds, seconds) in table:
                    run.thirds, run.seconds = thirds + cost, seconds + share
                    run.offer(error)
                batch.report()
            missed = [place for place in places if not batch.settle(place, math.inf, 0)]
            goals = batch.goals(places)  # lower where f proved noisier near the match
            if not bool(((newton.error <= newton.goal) & (newton.error > goals)).any()):
                return missed
            newton.goal, steps = goals, newton.run()


def _is_nearer(batch: Batch, run: Search, before: float) -> bool:
    """Whether Newton steps came so much nearer that a new Jacobian will be valid for the rest of the way."""
    cost = jacobian_cost(batch.z.shape[1]) + _STEPS
    return run.error < _NEARER * before and run.num_evals + cost <= batch.max_evals
