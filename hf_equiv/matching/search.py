"""Search for the matches of a batch: drive a solver, keep the best images, begin again, and decide when to end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_equiv import checks
from hf_equiv.checks import UNIT, Bounds
from hf_equiv.conditions import Function, admit
from hf_equiv.jacobian import Parts, jacobian_cost, stacked
from hf_equiv.matching.feasible import FeasibleSet, Rows
from hf_equiv.matching.lbfgs import LBFGS
from hf_equiv.matching.newton import end_by_newton
from hf_equiv.matching.solvers import BatchSolver, Descent, Evaluations, OneByOne, Solver, pick
from hf_equiv.precision import Encoding, no_autocast, no_tf32, power_of_two
from hf_equiv.results import MatchResult, Progress, Status

ProgressHook = Callable[[Progress], None]

_NOISE = {torch.float64: 1e-15, torch.float32: 5e-7, torch.bfloat16: 5e-3, torch.float16: 5e-4}
"""Typical ‖f(x) in this dtype − f(x)‖ / ‖f(x)‖ of one evaluation, for the line search."""

_FAINT = 0.01  # noise of f at a grey image, over rtol, from which it is measured at the image found too
_LOUDER = 2.0  # and how many times more must be found there to count
_NEAR = 0.02  # embedding error below which Newton steps from one Jacobian reach the target
_PACE = 30  # evaluations over which the pace of a run is measured
_WORTH = 0.5  # estimated remaining cost, in Jacobians, that justifies one; the pace falls as the error does
_STEPS = 10  # evaluations of Newton steps that are worth a Jacobian
_NEARER = 0.5  # share of the error left by Newton steps from which others follow at once
_LARGEST = 2**30  # most bytes of a Jacobian that the solver may form
_MEMORY = 2**32  # most bytes of the Jacobians that it may form at once
_ROWS = 32  # pairs of a cotangent and an image in a backward pass
_WINDOW, _PROGRESS = 150, 0.9  # evaluations over which the error should fall below this share
_RESTARTS = 3  # of an image that does not
_SHAKE = 0.5 / 255  # change of every pixel at its first restart, halved; it doubles with each
_CLEAR = 10  # times the noise of f: an error above it that falls no further is not that of noise


def each_match(
    f: Encoding,
    source: Tensor,
    target: Tensor,
    solver: Solver | BatchSolver | None = None,
    *,
    radius: float | None,
    norm: str,
    bounds: Bounds = UNIT,
    rtol: float,
    max_evals: int,
    start: MatchResult | None = None,
    progress: ProgressHook | None = None,
) -> Iterator[dict[int, Search]]:
    """Yield the searches of `match_embedding` that end together, by their place in the batch, as soon as they have."""
    checks.check_match(source, "source", target, radius, norm, rtol, max_evals, bounds)
    solver = LBFGS() if solver is None else solver
    checks.check_solver(solver)
    if start is not None and start.images.shape != source.shape:
        raise ValueError(
            f"`start` must hold images of the shape of `source` {tuple(source.shape)}; got {tuple(start.images.shape)}."
        )
    with torch.inference_mode(False), no_tf32():
        source = source.detach().clone(memory_format=torch.contiguous_format)
        _check_different(source, target)
        f = admit(f, source, noise=True, bounds=bounds)
        z = target_embeddings(f, source, target.detach())
        begin = source if start is None else start.images.to(source, copy=True)
        feasible = FeasibleSet.around(source.flatten(1), radius, norm, bounds, batched=True)
        batch = _Batch(f, z, feasible, begin, rtol, max_evals, progress)
        if start is not None:
            for run, evals, seconds in zip(
                batch.searches, start.num_evals.tolist(), start.seconds.tolist(), strict=True
            ):
                run.thirds, run.seconds = round(3 * evals), seconds
        if not checks.is_image(target, source):
            for run, least in zip(batch.searches, _least_errors(f, source, z), strict=True):
                run.least = least if least > rtol + _CLEAR * max(f.noise, _NOISE[source.dtype]) else 0.0
        if isinstance(solver, LBFGS):
            fits = z.shape[1] * begin[0].numel() * begin.element_size() <= _LARGEST
            batch.newton = solver.newton and fits and feasible.l2_radius is None
            solver = replace(solver, newton=batch.newton)
    for places in _match(batch, solver):
        for place in places:
            batch.searches[place].best = batch.images()[place].clone()
        yield {place: batch.searches[place] for place in places}


def _least_errors(f: Function, source: Tensor, z: Tensor) -> list[float]:
    """Return the errors below which no image can come, by what f knows of its embeddings; 0 if it knows nothing."""
    state: Any = getattr(f, "least_errors", None)
    own = getattr(state, "__self__", None) is f.plain  # a wrapper may lend the attributes of an Encoder
    return state(source[0], z).tolist() if own else [0.0] * len(z)


def target_embeddings(f: Encoding, images: Tensor, target: Tensor) -> Tensor:
    """Return the embeddings (B, D) to reach, float64: computed from target images, or the target itself."""
    if checks.is_image(target, images):
        with torch.no_grad():
            target = f(target.to(images))
        checks.check_embeddings(target)
    return target.detach().to(images.device, torch.float64).expand(images.shape[0], -1)


def pixels_of(target: Tensor, images: Tensor) -> Tensor | None:
    """Return a copy of the target if it is an image, for the record of a result."""
    return target.detach().clone() if checks.is_image(target, images) else None


def _check_different(source: Tensor, target: Tensor) -> None:
    if not checks.is_image(target, source):
        return
    same = (source == target.to(source)).flatten(1).all(dim=1).nonzero().flatten().tolist()
    if same:
        raise ValueError(
            f"`target` must differ from `source`; got the same pixels for {listing(same)}. "
            "Any image is a match of itself: pass another target."
        )


@dataclass(eq=False)
class Search:
    """The search for one match: the error of its best image so far, cost and status; the image once it has ended."""

    best: Tensor  # in the shape of an image
    error: float = math.inf
    least: float = 0.0  # error below which no image can come, if that is above the tolerance
    noise: float | None = None  # of f near the best image, relative; None until an error is small enough
    thirds: int = 0  # of the evaluations, an exact count
    seconds: float = 0.0
    status: Status | None = None
    trace: list[tuple[float, float]] = field(default_factory=list)
    finite: bool = True  # whether the last evaluation was
    tried: float = math.inf  # the error at the last attempt by Newton steps
    restarts: int = 0
    mark: tuple[float, float] = 0.0, math.inf  # evaluations and error at the last clear progress

    @property
    def num_evals(self) -> float:
        """Evaluations so far, a multiple of 1/3."""
        return self.thirds / 3

    def offer(self, error: float) -> None:
        """Note the error of an image if it is the best so far."""
        if error < self.error:
            self.error = error
            self.trace.append((self.num_evals, error))
            if error < _PROGRESS * self.mark[1]:
                self.mark = self.num_evals, error

    @property
    def is_stuck(self) -> bool:
        """Whether the error has hardly fallen over many evaluations."""
        return self.num_evals - self.mark[0] >= _WINDOW

    def restart(self) -> bool:
        """Count a restart and return True, or end the search as stalled if there were enough."""
        if self.restarts == _RESTARTS:
            self.status = Status.STALLED
            return False
        self.restarts, self.mark, self.tried = self.restarts + 1, (self.num_evals, self.error), math.inf
        return True

    def earlier(self, evals: float) -> float | None:
        """Return the error that the search had a number of evaluations ago, if it had any."""
        return next((error for count, error in reversed(self.trace) if count <= self.num_evals - evals), None)


def reached(f: Function, run: Search, image: Tensor, rtol: float) -> Status | None:
    """Return the status if the error reached rtol with its noise on top, or as nearly as noise allows."""
    noise = f.noise if run.noise is None else run.noise
    if run.error + noise <= rtol and run.noise is None and noise > _FAINT * rtol:
        near = f.noise_near(image)
        run.noise = noise = near if near > _LOUDER * noise else noise
    if run.error + noise <= rtol:
        return Status.CONVERGED
    return Status.STALLED if run.error <= rtol < 1.5 * noise else None


class _Batch:
    """The images of one call of `match_embedding`: their targets, best images and searches."""

    def __init__(
        self, f: Function, z: Tensor, feasible: FeasibleSet, start: Tensor, rtol: float, max_evals: int,
        progress: ProgressHook | None,
    ) -> None:  # fmt: skip
        self.f, self.z, self.feasible, self.shape = f, z, feasible, start.shape
        self.rtol, self.max_evals, self.progress = rtol, max_evals, progress
        self.newton = False  # whether Newton steps may end a search
        self.best, self.parts = start.flatten(1).clone(), Parts()
        self.searches = [Search(image) for image in start]
        self.scale = torch.linalg.vector_norm(z, dim=1)
        units = [power_of_two(scale) for scale in self.scale.tolist()]
        self.unit = self.scale.new_tensor(
            units
        )  # in this unit, residuals and gradients neither overflow nor lose a bit

    @property
    def restarts(self) -> bool:
        """Whether an image that is stuck begins again: without a ball, all targets should be reached."""
        return self.newton and not self.feasible.linf

    def images(self) -> Tensor:
        """Return the best images, (B, *shape)."""
        return self.best.view(self.shape)

    def settle(self, place: int, error: float, thirds: int) -> bool:
        """Note an error and its cost; return whether the search of an image has ended by it."""
        run = self.searches[place]
        run.thirds += thirds
        run.offer(error)
        run.status = reached(self.f, run, self.images()[place], self.rtol)
        if run.status is None and run.least > 0 and run.error < math.inf:
            run.status = Status.INFEASIBLE
        if run.status is None and run.num_evals + 1 > self.max_evals:
            run.status = Status.STALLED if run.is_stuck else Status.MAX_EVALS
        return run.status is not None

    def noise(self, run: Search) -> float:
        """Return the relative noise of f, as far as it is known near the best image."""
        return self.f.noise if run.noise is None else run.noise

    def goal(self, place: int) -> float:
        """Return the error at which an image is done: `rtol` less the noise, if that is below it."""
        noise = self.noise(self.searches[place])
        return self.rtol - noise if 1.5 * noise <= self.rtol else self.rtol

    def report(self) -> None:
        """Call the progress hook."""
        if self.progress is not None:
            self.progress(snapshot(self.images().clone(), self.searches))


class _Pool(Rows):
    """The images in one phase of a solver, evaluated together."""

    def __init__(self, batch: _Batch, places: list[int], descent: Descent) -> None:
        self.places, self.descent = torch.tensor(places, device=batch.z.device), descent
        self.z, self.scale, self.unit = (part[self.places] for part in (batch.z, batch.scale, batch.unit))
        self.best = batch.best[self.places]
        errors = [batch.searches[place].error for place in places]
        self.error = self.scale.new_tensor(errors)

    def evaluate(self, f: Encoding, shape: torch.Size, parts: Parts) -> list[list[float]]:
        """Evaluate the points and advance the solver; return error, finite and through of each image."""
        points = self.descent.points.detach()

        def pull(part: slice) -> tuple[Tensor, ...]:
            images = points[part].view(-1, *shape[1:]).requires_grad_(True)
            with torch.enable_grad():
                z = f(images)
                checks.check_dimension(self.z[0], z.shape[1])
                residual = (z.detach().double() - self.z[part]) / self.unit[part, None]
                with no_autocast():
                    (gradient,) = torch.autograd.grad(z, images, residual.to(z.dtype))
            return z.detach(), residual, gradient.flatten(1) / self.unit[part, None].to(gradient)

        z, residual, gradient = parts(pull, len(points))
        with no_autocast():
            norm = torch.linalg.vector_norm(residual, dim=1)
            error = norm * self.unit / self.scale
            steepest = gradient.abs().amax(dim=1)
            finite = error.isfinite() & steepest.isfinite()
            better = error < self.error  # false for NaN
            self.best, self.error = pick(better, points, self.best), torch.where(better, error, self.error)
            slack = max(_NOISE[z.dtype], _NOISE[points.dtype]) * norm * self.scale / self.unit
            at = Evaluations(0.5 * norm**2, gradient, slack, error, self.unit)
            none = torch.full_like(norm, math.inf)
            at = at.where(finite, Evaluations(none, torch.zeros_like(gradient), none, none, self.unit))
            through = self.descent.advance(at) | (steepest == 0)
        return torch.stack([error, finite, through], dim=1).tolist()  # the one wait for the device


@dataclass
class _Work:
    """Images that begin a phase of a solver together."""

    solver: Any
    places: list[int]
    phase: int = 0
    shaken: bool = False  # whether they begin beside their best images, not at these


def _match(batch: _Batch, solver: Any) -> Iterator[list[int]]:
    """Match all images: the phases of the solver in turn, Newton steps near the target, restarts where it is stuck."""
    todo = [_Work(solver, list(range(len(batch.searches))))]
    while todo:
        work = todo.pop()
        onward, near, stuck, lost = (list[int]() for _ in range(4))
        yield from _descend(batch, work, onward, near, stuck)
        for group in _groups(batch, near):
            yield _end(batch, group, lost)
        if stuck:
            todo.append(_Work(solver, stuck, shaken=True))
        if lost:
            todo.append(_Work(replace(work.solver, warmup=0), lost, work.phase))
        if onward:
            todo.append(_Work(work.solver, onward, work.phase + 1))


def _descend(batch: _Batch, work: _Work, onward: list[int], near: list[int], stuck: list[int]) -> Iterator[list[int]]:
    """Run one phase of a solver; yield the images that end, and note those that go on in another way."""
    with torch.inference_mode(False), no_tf32():
        pool = _open(batch, work)
    if pool is None:
        yield _give_up(batch, work.places, stuck)
        return
    places = work.places
    while places:
        began = time.perf_counter()
        ended, left = [], []
        with torch.inference_mode(False), no_tf32():  # the caller has its own rules back between two steps
            table = pool.evaluate(batch.f, batch.shape, batch.parts)
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
                    onward.append(place)
                elif batch.restarts and run.is_stuck:
                    (stuck if run.restart() else ended).append(place)
                elif batch.newton and _is_worth(batch, run):
                    near.append(place)
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


def _give_up(batch: _Batch, places: list[int], stuck: list[int]) -> list[int]:
    """End the images of a solver that sees no way on, unless one may begin again: far from the target, without ball."""
    ended = []
    for place in places:
        run = batch.searches[place]
        if batch.restarts and run.finite and run.error > _CLEAR * batch.noise(run) and run.restart():
            stuck.append(place)
        else:
            run.status = Status.STALLED if run.finite else Status.ERROR
            ended.append(place)
    return ended


def _open(batch: _Batch, work: _Work) -> _Pool | None:
    """Return the pool of some images at the start of a phase, or None if the solver has no such phase."""
    index = torch.tensor(work.places, device=batch.best.device)
    feasible, start = batch.feasible.keep(index), batch.best[index]
    if work.shaken:
        signs = torch.rand(start.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
        scale = [_SHAKE * 2 ** batch.searches[place].restarts for place in work.places]
        start = feasible.project(start + start.new_tensor(scale)[:, None] * signs.sign().to(start))
    if hasattr(work.solver, "begin"):
        descent = work.solver.begin(start, feasible, work.phase)
    else:
        descent = None if work.phase else OneByOne(work.solver, start, feasible, batch.shape[1:])
    return None if descent is None else _Pool(batch, work.places, descent)


def _is_worth(batch: _Batch, run: Search) -> bool:
    """Whether a Jacobian is cheaper than going on: extrapolate the log error of the last evaluations to rtol."""
    if run.error > min(_NEAR, 0.1 * run.tried):
        return False
    cost = jacobian_cost(batch.z.shape[1])
    earlier = run.earlier(_PACE)
    if earlier is None or run.num_evals + cost + _STEPS > batch.max_evals:
        return False
    left = math.log(run.error / batch.rtol) * _PACE / max(math.log(earlier / run.error), 1e-9)
    return left > _WORTH * cost


def _groups(batch: _Batch, places: list[int]) -> list[list[int]]:
    """Divide images into groups whose Jacobians fit into the memory for them."""
    size = batch.z.shape[1] * batch.best.shape[1] * batch.best.element_size()
    most = max(1, _MEMORY // size)
    return [places[i : i + most] for i in range(0, len(places), most)]


def _end(batch: _Batch, places: list[int], lost: list[int]) -> list[int]:
    """Take Newton steps from the best images of a group; return those that end, and note the others as lost."""
    try:
        return _newton(batch, places, lost)
    except torch.OutOfMemoryError:
        if len(places) == 1:
            lost += places
            return []
    middle = len(places) // 2  # outside the `except` block, the memory that the error kept alive is free
    return _end(batch, places[:middle], lost) + _end(batch, places[middle:], lost)


def _newton(batch: _Batch, places: list[int], lost: list[int]) -> list[int]:
    began = time.perf_counter()
    runs = [batch.searches[place] for place in places]
    before = [(run.thirds, run.seconds) for run in runs]
    for run in runs:
        run.tried = run.error
    with torch.inference_mode(False), no_tf32(), no_autocast():
        index = torch.tensor(places, device=batch.best.device)
        goal = batch.scale.new_tensor([batch.goal(place) for place in places])
        most = index.new_tensor([int(3 * batch.max_evals) - run.thirds for run in runs])
        start, box = batch.images()[index], batch.feasible.keep(index)
        for images, errors, costs in end_by_newton(batch.f, start, batch.z[index], box, goal, most, _ROWS):
            better = errors < errors.new_tensor([run.error for run in runs])
            batch.best[index] = pick(better, images, batch.best[index])
            share = (time.perf_counter() - began) / len(runs)
            for run, error, cost, (thirds, seconds) in zip(runs, errors.tolist(), costs.tolist(), before, strict=True):
                run.thirds, run.seconds = thirds + cost, seconds + share
                run.offer(error)
            batch.report()
        missed = [place for place in places if not batch.settle(place, math.inf, 0)]
    again = [place for place in missed if _is_nearer(batch, batch.searches[place])]
    lost += [place for place in missed if place not in again]
    return [place for place in places if place not in missed] + (_end(batch, again, lost) if again else [])


def _is_nearer(batch: _Batch, run: Search) -> bool:
    """Whether Newton steps came so much nearer that a new Jacobian will be valid for the rest of the way."""
    cost = jacobian_cost(batch.z.shape[1]) + _STEPS
    return run.error < _NEARER * run.tried and run.num_evals + cost <= batch.max_evals


def snapshot(images: Tensor, runs: Sequence[Search]) -> Progress:
    """Return the state of all images for a progress hook."""
    return Progress(
        images,
        stacked([run.error for run in runs]),
        stacked([run.num_evals for run in runs]),
        torch.tensor([run.status is None for run in runs], device="cpu"),
    )


def collect(runs: Sequence[Search]) -> MatchResult:
    """Return the record of finished searches."""
    end = snapshot(torch.stack([run.best for run in runs]), runs)
    return MatchResult(
        end.images,
        end.errors,
        end.num_evals,
        stacked([run.seconds for run in runs]),
        tuple(run.status or Status.ERROR for run in runs),
        tuple(tuple(run.trace) for run in runs),
    )


def listing(indices: list[int]) -> str:
    """Name some images in a message."""
    shown = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
    return f"image{'s' if len(indices) > 1 else ''} {shown}"
