"""Match embeddings: find an image near a source that has the embedding of a target."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hf_equiv import bars
from hf_equiv.checks import UNIT, Bounds
from hf_equiv.matching.search import ProgressHook, collect, each_match, listing, pixels_of
from hf_equiv.matching.solvers import BatchSolver, Solver
from hf_equiv.precision import Encoding
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
    raise_on_failure: bool = True,
    start: MatchResult | None = None,
    progress: ProgressHook | bool | None = None,
) -> MatchResult:
    """Find an image near `source` with the embedding of `target` (a *match*, or metamer).

    Minimises ½‖f(x) − z‖² from x = source over the box ∩ {‖x − source‖ ≤ radius}, for each image b of the batch:

        xᵇ (*shape), z = f(target) or target (D,), error ‖f(xᵇ) − zᵇ‖ / ‖zᵇ‖ ≤ rtol.

    Every iterate lies in the feasible set. f runs in the dtype of `source`, with TF32 off. If f does not depend on the
    batch, neither does the result of an image. Without a ball, an image that comes no nearer begins again from a
    slightly changed image, at most three times. If `f.least_errors` shows that no image can have a target embedding,
    that image ends as `infeasible` after one evaluation.

    Cost: one evaluation is one forward and one backward pass of one image. The default solver keeps 2·`history` images
    of memory per image, and for its Newton steps D·N numbers and 64 images, of at most 4 GiB of images at a time.
    Encoding the target once and the check of f (`conditions`) are not counted.

    Args:
        f: the encoder, or any callable (B, *shape) -> (B, D).
        source: starting images to stay near, (B, *shape), such as pixels (B, C, H, W): photos, constants or noise.
        target: images (B or 1, *shape), or embeddings (B or 1, D).
        solver: `LBFGS()` by default; `Adam()` and `GradientDescent()` (the paper's) serve comparisons.
        radius: radius of the ball about the source, in pixel units; None for the box alone.
        norm: norm of the ball, "linf" or "l2".
        bounds: smallest and largest value of a pixel, or None for no box.
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
        ends = each_match(
            f, source, target, solver, radius=radius, norm=norm, bounds=bounds, rtol=rtol, max_evals=max_evals,
            start=start, progress=hook,
        )  # fmt: skip
        found = {place: run for together in ends for place, run in together.items()}
    with torch.inference_mode(False):
        searches = [found[place] for place in range(len(found))]
        result = collect(searches)
        result = replace(result, source=source.detach().clone(), target=pixels_of(target, source))
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
        f"({listing(missed)}; best {best:.1e}; {', '.join(statuses)}). {advice} "
        "Or pass `raise_on_failure=False`."
    )
