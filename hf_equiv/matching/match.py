"""Match embeddings: find an image near a source that has the embedding of a target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_equiv import bars, checks
from hf_equiv.checks import UNIT, Bounds
from hf_equiv.conditions import Function, admit
from hf_equiv.matching.driver import CLEAR, NOISE, Batch, drive
from hf_equiv.matching.feasible import FeasibleSet
from hf_equiv.matching.lbfgs import LBFGS
from hf_equiv.matching.search import ProgressHook, Search, collect
from hf_equiv.matching.solvers import BatchSolver, OneByOne, Solver
from hf_equiv.memory import MEMORY, images_within
from hf_equiv.precision import Encoding, no_tf32
from hf_equiv.results import ConvergenceError, MatchResult, Status


def match_embedding(
    f: Encoding,
    source: Tensor,
    target: Tensor,
    solver: Solver | BatchSolver | None = None,
    *,
    radius: float | None = None,
    norm: str = "linf",
    bounds: Bounds = UNIT,
    rtol: float = 1e-5,
    max_evals: int = 1000,
    memory: int = MEMORY,
    raise_on_failure: bool = True,
    start: MatchResult | None = None,
    progress: ProgressHook | bool | None = None,
) -> MatchResult:
    """Find an image near `source` with the embedding of `target` (a *match*, or metamer).

    Minimises ½‖f(x) − z‖² from x = source over the box ∩ {‖x − source‖ ≤ radius}, for each image b of the batch:

        xᵇ (*shape), z = f(target) or target (D,), error ‖f(xᵇ) − zᵇ‖ / ‖zᵇ‖ ≤ rtol.

    Every iterate lies in the feasible set. f runs in the dtype of `source`, with TF32 off. If f does not depend on the
    batch, neither does the result of an image. Without a ball, an image that comes no nearer begins again from a
    slightly changed source, at most three times. If `f.least_errors` shows that no image has a target embedding, its
    search ends as `infeasible` after one evaluation.

    Cost: one evaluation is one forward and one backward pass of one image. The default solver keeps 2·`history` images
    of memory per image. Newton steps take D·N numbers and 64 images more; `memory` bounds how many images share them.
    Encoding the target once and the check of f (`conditions`) are not counted.

    Args:
        f: the encoder, or any callable (B, *shape) -> (B, D).
        source: starting images to stay near, (B, *shape), such as pixels (B, C, H, W): photos, constants or noise.
        target: images (B or 1, *shape), or embeddings (B or 1, D).
        solver: `LBFGS()` by default; `Adam()` and `GradientDescent()` (the paper's) serve comparisons. One of your own
            has the method of `hf_equiv.matching.solvers.Solver` or `BatchSolver`.
        radius: radius of the ball about the source, in pixel units; None for the box alone.
        norm: norm of the ball, "linf" or "l2".
        bounds: smallest and largest value of a pixel, or None for no box.
        rtol: embedding error, with the float noise of f added, at which an image is done. Below about 3e-6 float32
            noise ends most runs.
        max_evals: evaluations per image.
        memory: most bytes of the Jacobians held at once; an image whose own is larger takes no Newton steps.
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
        ends = each_match(
            f, source, target, solver, radius=radius, norm=norm, bounds=bounds, rtol=rtol, max_evals=max_evals,
            memory=memory, start=start, progress=hook,
        )  # fmt: skip
        found = {place: run for together in ends for place, run in together.items()}
    with torch.inference_mode(False):
        searches = [found[place] for place in range(len(found))]
        result = collect(searches, source, target)
    if raise_on_failure and not result.converged:
        least = [f"{run.least:.3g} for image {i}" for i, run in enumerate(searches) if run.least > 0]
        raise ConvergenceError(_describe_failure(result, least, rtol, max_evals), result)
    return result


def _describe_failure(result: MatchResult, least: list[str], rtol: float, max_evals: int) -> str:
    missed = [i for i, status in enumerate(result.status) if status is not Status.CONVERGED]
    best = min(float(result.errors[i]) for i in missed)
    statuses = sorted({result.status[i] for i in missed})
    advice = " ".join(status.advice for status in statuses)
    if least:
        advice += f" The least possible error is {', '.join(least[:8])}."
    return (
        f"{len(missed)} of {len(result.status)} images did not reach rtol={rtol:g} in {max_evals} evaluations "
        f"({_listing(missed)}; best {best:.1e}; {', '.join(statuses)}). {advice} "
        "Or pass `raise_on_failure=False`."
    )


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
    memory: int = MEMORY,
    start: MatchResult | None = None,
    progress: ProgressHook | None = None,
) -> Iterator[dict[int, Search]]:
    """Yield the searches of `match_embedding` that end together, by their place in the batch, as soon as they have."""
    checks.check_match(source, "source", target, radius, norm, rtol, max_evals, bounds)
    solver = LBFGS() if solver is None else solver
    checks.check_solver(solver)
    if not hasattr(solver, "begin"):
        solver = OneByOne(solver, source.shape[1:])
    checks.check_count(memory, "memory")
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
        together = 0
        if isinstance(solver, LBFGS):
            if solver.newton and feasible.l2_radius is None:
                together = images_within(memory, z.shape[1], begin[0])
            solver = replace(solver, newton=together > 0)
        batch = Batch(f, z, feasible, begin, rtol, max_evals, together, progress)
        if start is not None:
            spent = zip(start.num_evals.tolist(), start.seconds.tolist(), strict=True)
            for run, (evals, seconds) in zip(batch.searches, spent, strict=True):
                run.thirds, run.seconds = round(3 * evals), seconds
        note_least(batch.searches, f, source, target, z, rtol)
    for places in drive(batch, solver):
        for place in places:
            batch.searches[place].best = batch.images()[place].clone()
        yield {place: batch.searches[place] for place in places}


def note_least(runs: Sequence[Search], f: Function, images: Tensor, target: Tensor, z: Tensor, rtol: float) -> None:
    """Note the errors below which no image can come, by what f knows of its embeddings, if they are clearly > rtol."""
    state: Any = getattr(f, "least_errors", None)
    own = getattr(state, "__self__", None) is f.plain  # a wrapper may pass on the attributes of its Encoder
    if own and not checks.is_image(target, images):
        for run, least in zip(runs, state(images[0], z).tolist(), strict=True):
            run.least = least if least > rtol + CLEAR * max(f.noise, NOISE[images.dtype]) else 0.0


def target_embeddings(f: Encoding, images: Tensor, target: Tensor) -> Tensor:
    """Return the embeddings (B, D) to reach, float64: computed from target images, or the target itself."""
    if checks.is_image(target, images):
        with torch.no_grad():
            target = f(target.to(images))
        checks.check_embeddings(target)
    return target.detach().to(images.device, torch.float64).expand(images.shape[0], -1)


def _check_different(source: Tensor, target: Tensor) -> None:
    if not checks.is_image(target, source):
        return
    if same := (source == target.to(source)).flatten(1).all(dim=1).nonzero().flatten().tolist():
        raise ValueError(
            f"`target` must differ from `source`; got the same pixels for {_listing(same)}. "
            "Any image is a match of itself: pass another target."
        )


def _listing(indices: list[int]) -> str:
    """Name some images in a message."""
    shown = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
    return f"image{'s' if len(indices) > 1 else ''} {shown}"
