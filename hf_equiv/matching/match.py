"""Drive the solvers of `match_embedding`: batch their points, keep the best iterates, and decide when to end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_equiv import checks
from hf_equiv.conditions import Function, admit
from hf_equiv.jacobian import jacobian_cost, stacked
from hf_equiv.matching import bars
from hf_equiv.matching.corrector import Corrector
from hf_equiv.matching.feasible import FeasibleSet
from hf_equiv.matching.lbfgs import LBFGS
from hf_equiv.matching.solvers import Adam, Evaluation, GradientDescent, Iterates, Solver
from hf_equiv.precision import Encoding, no_autocast, no_tf32, power_of_two
from hf_equiv.results import ConvergenceError, MatchResult, Progress, Status

ProgressHook = Callable[[Progress], None]

_NOISE = {torch.float64: 1e-15, torch.float32: 5e-7, torch.bfloat16: 5e-3, torch.float16: 5e-4}
"""Typical ‖f(x) in this dtype − f(x)‖ / ‖f(x)‖ of one evaluation, for the line search."""

_FAINT = 0.01  # noise of f at a grey image, over rtol, from which it is measured at the image found too
_LOUDER = 2.0  # and how many times more must be found there to count
_NEAR = 3e-3  # embedding error below which Newton steps from one Jacobian reach the target
_PACE = 30  # evaluations over which the pace of a run is measured
_WORTH = 1.5  # estimated remaining cost, in Jacobians, that justifies one
_STEPS = (10, 40)  # Newton steps: the fewest that are worth a Jacobian, and the most
_LARGEST = 2**30  # most bytes of a Jacobian that the solver may form


def match_embedding(
    f: Encoding,
    source: Tensor,
    target: Tensor,
    solver: Solver | None = None,
    *,
    radius: float | None = None,
    norm: str = "linf",
    rtol: float = 1e-5,
    max_evals: int = 1000,
    raise_on_failure: bool = True,
    start: MatchResult | None = None,
    progress: ProgressHook | bool | None = None,
) -> MatchResult:
    """Find an image near `source` with the embedding of `target` (a *match*, or metamer).

    Minimises ½‖f(x) − z‖² from x = source over [0, 1]^N ∩ {‖x − source‖ ≤ radius}, for each image b of the batch:

        xᵇ (C, H, W), z = f(target) or target (D,), error ‖f(xᵇ) − zᵇ‖ / ‖zᵇ‖ ≤ rtol.

    Every iterate lies in the feasible set. f runs in the dtype of `source`, with TF32 off. If f does not depend on the
    batch, neither does the result of an image.

    Cost: one evaluation is one forward and one backward pass of one image. The default solver keeps 2·`history` images
    of memory per image. Encoding the target once and the check of f (`conditions`) are not counted.

    Args:
        f: the encoder, or any callable (B, C, H, W) -> (B, D).
        source: starting images to stay near, (B, C, H, W), pixels in [0, 1]: photos, constants or noise.
        target: pixels (B or 1, C, H, W), or embeddings (B or 1, D).
        solver: `LBFGS()` by default; `Adam()` and `GradientDescent()` (the paper's) serve comparisons.
        radius: radius of the ball about the source, in pixel units; None for the box alone.
        norm: norm of the ball, "linf" or "l2".
        rtol: embedding error, with the float noise of f added, at which an image is done. Below about 3e-6 float32
            noise ends most runs.
        max_evals: evaluations per image.
        raise_on_failure: raise if an image misses `rtol`; False returns it with its status.
        start: an earlier result for the same images to continue from; its evaluations and seconds count.
        progress: called with a `Progress` after every batched evaluation; an exception raised in it ends the run.
            By default a bar in a terminal or notebook; False for none.

    Returns:
        The best iterate of each image with its error, cost and status.

    Raises:
        ValueError: pixels outside [0, 1], a bad shape or number, a target that equals its source, or an f that fails a
            condition, such as a false gradient.
        ConvergenceError: some image missed `rtol`; `.result` holds all of them.

    Example:
        >>> import torch
        >>> from hf_equiv import match_embedding
        >>> weight = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
        >>> source, target = torch.full((1, 3, 4, 4), 0.4), torch.full((1, 3, 4, 4), 0.6)
        >>> match_embedding(lambda x: x.flatten(1) @ weight.T, source, target, radius=0.2).converged
        True

    References:
        Salman, Shams, Liu (2024), arXiv:2401.15568, §3. Mahendran, Vedaldi (2015), arXiv:1412.0035, eq. 1.
        Sabour et al. (2016), arXiv:1511.05122, eq. 1–2 (matching inside an L∞ ball).
    """
    with bars.shown(progress, "match", bars.errors_to(rtol)) as hook:
        searches = each_match(
            f, source, target, solver, radius=radius, norm=norm, rtol=rtol, max_evals=max_evals, start=start,
            progress=hook,
        )  # fmt: skip
        found = dict(searches)
    with torch.inference_mode(False):
        result = collect([found[place] for place in range(len(found))])
        result = replace(result, source=source.detach().clone(), target=pixels_of(target))
    if raise_on_failure and not result.converged:
        raise ConvergenceError(_describe_failure(result, rtol, max_evals), result)
    return result


def each_match(
    f: Encoding,
    source: Tensor,
    target: Tensor,
    solver: Solver | None = None,
    *,
    radius: float | None,
    norm: str,
    rtol: float,
    max_evals: int,
    start: MatchResult | None = None,
    progress: ProgressHook | None = None,
) -> Iterator[tuple[int, Search]]:
    """Yield the place in the batch and the search of each image of `match_embedding`, as soon as it has ended."""
    checks.check_match(source, "source", target, radius, norm, rtol, max_evals)
    solver = LBFGS() if solver is None else solver
    checks.check_solver(solver)
    if start is not None and start.images.shape != source.shape:
        raise ValueError(
            f"`start` must hold images of the shape of `source` {tuple(source.shape)}; got {tuple(start.images.shape)}."
        )
    with torch.inference_mode(False), no_tf32():
        source = source.detach().clone(memory_format=torch.contiguous_format)
        _check_different(source, target)
        f = admit(f, source, noise=True)
        z = target_embeddings(f, source, target.detach(), "source")
        runs = []
        for i, (image, embedding) in enumerate(zip(source, z, strict=True)):
            feasible = FeasibleSet.around(image, radius, norm)
            keeps_bounds = isinstance(solver, LBFGS | Adam | GradientDescent)
            begin = image if start is None else start.images[i].to(image, copy=True)
            run = _Run(f, solver.iterate(begin, feasible), embedding, begin, None if keeps_bounds else feasible)
            if start is not None:
                run.num_evals, run.seconds = float(start.num_evals[i]), float(start.seconds[i])
            runs.append(run)
    newton = isinstance(solver, LBFGS) and solver.newton and radius is None
    yield from _drive(f, runs, rtol, max_evals, progress, newton=newton)


def target_embeddings(f: Encoding, images: Tensor, target: Tensor, name: str) -> Tensor:
    """Return the embeddings (B, D) to reach, float64: computed from target pixels, or the target itself."""
    if target.ndim == 4:
        if target.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"`target` must have the image shape of `{name}` {tuple(images.shape[1:])}; "
                f"got {tuple(target.shape[1:])}. Preprocess both with the same encoder."
            )
        with torch.no_grad():
            target = f(target.to(images))
        checks.check_embeddings(target)
    return target.detach().to(images.device, torch.float64).expand(images.shape[0], -1)


def pixels_of(target: Tensor) -> Tensor | None:
    """Return a copy of the target if it is pixels, for the record of a result."""
    return target.detach().clone() if target.ndim == 4 else None


def _check_different(source: Tensor, target: Tensor) -> None:
    if target.shape[1:] != source.shape[1:]:
        return  # embeddings, or pixels that `target_embeddings` refuses
    same = (source == target.to(source)).flatten(1).all(dim=1).nonzero().flatten().tolist()
    if same:
        raise ValueError(
            f"`target` must differ from `source`; got the same pixels for {_listing(same)}. "
            "Any image is a match of itself: pass another target."
        )


@dataclass(eq=False)
class Search:
    """State of the search for one match: its best image so far, cost and status."""

    best: Tensor
    f: Function
    error: float = math.inf
    noise: float | None = None  # of f near the best image, relative; None until an error is small enough
    thirds: int = 0  # of the evaluations, an exact count
    seconds: float = 0.0
    status: Status | None = None
    trace: list[tuple[float, float]] = field(default_factory=list)

    @property
    def num_evals(self) -> float:
        """Evaluations so far, a multiple of 1/3."""
        return self.thirds / 3

    @num_evals.setter
    def num_evals(self, count: float) -> None:
        self.thirds = round(3 * count)

    def reached(self, rtol: float) -> Status | None:
        """Return the status if the error reached rtol with its noise on top, or as nearly as noise allows."""
        noise = self.f.noise if self.noise is None else self.noise
        if self.error + noise <= rtol and self.noise is None and noise > _FAINT * rtol:
            near = self.f.noise_near(self.best)
            self.noise = noise = near if near > _LOUDER * noise else noise
        if self.error + noise <= rtol:
            return Status.CONVERGED
        return Status.STALLED if self.error <= rtol < 1.5 * noise else None

    def offer(self, image: Tensor, error: float) -> None:
        """Keep an image if it is the best so far."""
        if error < self.error:
            self.error, self.best = error, image
            self.trace.append((self.num_evals, error))


class _Run(Search):
    """One image, its solver and the point to evaluate next."""

    def __init__(
        self, f: Function, iterates: Iterates, target: Tensor, start: Tensor, bounds: FeasibleSet | None
    ) -> None:
        super().__init__(start, f)
        self.iterates, self.target = iterates, target
        self.bounds = bounds  # solvers from outside the package may leave them
        self.tried = math.inf  # the error at the last attempt by Newton steps
        self.scale = float(target.norm())
        self.unit = power_of_two(self.scale)  # in this unit, residuals and gradients neither overflow nor lose a bit
        self.point = next(iterates)

    def offer(self, image: Tensor, error: float) -> None:
        """Keep an image if it is the best so far; an unknown solver may reuse its image, so check and copy it."""
        if error < self.error and self.bounds is not None:
            if not torch.equal(self.bounds.project(image), image):
                raise ValueError("`solver` must yield points of the feasible set. Use `feasible.project`.")
            image = image.clone()
        super().offer(image, error)

    def finish(self, status: Status) -> None:
        self.status = status
        self.iterates.close()


def _drive(
    f: Encoding, runs: list[_Run], rtol: float, max_evals: int, progress: ProgressHook | None, *, newton: bool
) -> Iterator[tuple[int, Search]]:
    """Evaluate the points of all unfinished images in one batch until none is left; yield each that has ended."""
    left = dict(enumerate(runs))
    while left:
        start = time.perf_counter()
        with torch.inference_mode(False), no_tf32():  # the caller has its own rules back between two steps
            active = list(left.values())
            residuals, gradients, noise = _evaluate(f, active)
            with no_autocast():
                for run, residual, gradient in zip(active, residuals, gradients, strict=True):
                    _advance(run, residual, gradient, noise, rtol, max_evals)
                    if newton and _is_slow(run, rtol, max_evals):
                        _newton(f, run, rtol, max_evals)
            share = (time.perf_counter() - start) / len(active)
            for run in active:
                run.seconds += share
            if progress is not None:
                progress(snapshot(runs))
        for place in [place for place, run in left.items() if run.status is not None]:
            yield place, left.pop(place)


def _evaluate(f: Encoding, runs: list[_Run]) -> tuple[Tensor, Tensor, float]:
    """Return residuals r = (f(x) − z)/unit (B, D), gradients Jᵀr/unit (B, C, H, W), and the relative noise of f."""
    points = torch.stack([run.point for run in runs]).requires_grad_(True)
    units = points.new_tensor([run.unit for run in runs], dtype=torch.float64)[:, None]
    with torch.enable_grad():
        z = f(points)
        checks.check_dimension(runs[0].target, z.shape[1])
        residuals = (z.detach().double() - torch.stack([run.target for run in runs])) / units
        with no_autocast():
            (gradients,) = torch.autograd.grad(z, points, residuals.to(z.dtype))
    gradients = (gradients / units[:, :, None, None].to(gradients)).contiguous()
    return residuals, gradients, max(_NOISE[z.dtype], _NOISE[points.dtype])


def _advance(run: _Run, residual: Tensor, gradient: Tensor, noise: float, rtol: float, max_evals: int) -> None:
    """Count one evaluation of an image and ask its solver for the next point."""
    run.num_evals += 1.0
    norm = float(residual.norm())
    error = norm * run.unit / run.scale
    run.offer(run.point, error)
    finite = math.isfinite(error) and all(math.isfinite(float(end)) for end in torch.aminmax(gradient))
    if (ended := run.reached(rtol)) is not None:
        run.finish(ended)
    elif not finite and run.error == math.inf:
        run.finish(Status.ERROR)
    elif run.num_evals + 1 > max_evals:
        run.finish(Status.MAX_EVALS)
    else:
        slack = noise * norm * run.scale / run.unit
        at = Evaluation(0.5 * norm**2, gradient, slack, error, run.unit)
        if not finite:
            at = Evaluation(math.inf, torch.zeros_like(gradient), math.inf, math.inf, run.unit)
        try:
            run.point = run.iterates.send(at)
        except StopIteration:
            run.finish(Status.STALLED if finite else Status.ERROR)


def _is_slow(run: _Run, rtol: float, max_evals: int) -> bool:
    """Whether a Jacobian is cheaper than going on: extrapolate the log error of the last evaluations to rtol."""
    if run.status is not None or run.error > min(_NEAR, 0.1 * run.tried):
        return False
    jacobian = jacobian_cost(len(run.target))
    size = len(run.target) * run.best.numel() * run.best.element_size()
    if run.num_evals + jacobian + _STEPS[0] > max_evals or size > _LARGEST:
        return False
    earlier = next((error for count, error in reversed(run.trace) if count <= run.num_evals - _PACE), None)
    if earlier is None:
        return False
    left = math.log(run.error / rtol) * _PACE / max(math.log(earlier / run.error), 1e-9)
    return left > _WORTH * jacobian


def _newton(f: Encoding, run: _Run, rtol: float, max_evals: int) -> None:
    """Bring the best image of a run nearer to the target by a full Jacobian and Newton steps; the solver continues."""
    run.tried = run.error
    corrector = Corrector(f, run.target, rtol)
    start = corrector.look(run.best)
    corrector.refresh(start)
    place = corrector.newton(start, min(_STEPS[1], int(max_evals - run.num_evals - corrector.num_evals)))
    run.num_evals += corrector.num_evals
    run.offer(place.image, place.drift)
    if (ended := run.reached(rtol)) is not None:
        run.finish(ended)
    elif run.num_evals + 1 > max_evals:
        run.finish(Status.MAX_EVALS)


def snapshot(runs: Sequence[Search]) -> Progress:
    """Return the state of all images for a progress hook."""
    return Progress(
        stacked([run.best for run in runs]),
        stacked([run.error for run in runs]),
        stacked([run.num_evals for run in runs]),
        torch.tensor([run.status is None for run in runs], device="cpu"),
    )


def collect(runs: Sequence[Search]) -> MatchResult:
    """Return the record of finished searches."""
    end = snapshot(runs)
    return MatchResult(
        end.images,
        end.errors,
        end.num_evals,
        stacked([run.seconds for run in runs]),
        tuple(run.status or Status.ERROR for run in runs),
        tuple(tuple(run.trace) for run in runs),
    )


def _describe_failure(result: MatchResult, rtol: float, max_evals: int) -> str:
    missed = [i for i, status in enumerate(result.status) if status is not Status.CONVERGED]
    best = min(float(result.errors[i]) for i in missed)
    statuses = sorted({result.status[i] for i in missed})
    advice = " ".join(status.advice for status in statuses)
    return (
        f"{len(missed)} of {len(result.status)} images did not reach rtol={rtol:g} in {max_evals} evaluations "
        f"({_listing(missed)}; best {best:.1e}; {', '.join(statuses)}). {advice} "
        "Or pass `raise_on_failure=False`."
    )


def _listing(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
    return f"image{'s' if len(indices) > 1 else ''} {shown}"
