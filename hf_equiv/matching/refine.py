"""`refine_8bit`: an 8-bit image, k/255 in every pixel, that still has the target's embedding.

Rounding a match moves its embedding by 3e-3 to 8e-2, a hundred to ten thousand times the error of the match. But an
8-bit step of one pixel is small and there are N ≫ D of them: the Jacobian at the rounded image says which few steps
cancel the rounding error, as a sparse integer least-squares problem. See also `matching`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv import checks
from hf_equiv.jacobian import jacobian_cost, jacobian_matrix
from hf_equiv.matching.lattice import Lattice, left_geometry, plan_moves
from hf_equiv.matching.match import Encoding, ProgressHook, target_embeddings
from hf_equiv.precision import no_autocast, no_tf32
from hf_equiv.results import MatchResult, Progress, Status

_FORWARD = 1 / 3  # evaluations of a forward pass


_CAP = 3  # steps that one pixel may move in all: without it a few sensitive pixels take 20, and show as specks


_CROWDED = 0.1  # of the pixels at the cap: there are too few of them for what is left to do, so it is doubled


_MOVES = 400  # steps of ±1/255 in the first round; later rounds adapt it to how well J predicted the last


_WORTH = 5  # times rtol: a smaller error is not worth another Jacobian


_EXCURSION = 3  # times the best error: how far a round may go above it where the whitened error falls


_STALE = 3  # rounds in a row with hardly a decrease before a new Jacobian


def refine_8bit(
    f: Encoding,
    images: Tensor,
    target: Tensor,
    *,
    source: Tensor | None = None,
    radius: float | None = None,
    norm: str = "linf",
    rtol: float = 1e-5,
    max_evals: int = 1000,
    progress: ProgressHook | None = None,
) -> MatchResult:
    """Round matches to 8 bit and repair the embedding by single steps of ±1/255.

    Finds k (C, H, W) integer in 0…255, inside the ball, with ‖f(k/255) − z‖ / ‖z‖ ≤ rtol, in every pixel within 3 of
    the rounded 255·images (further only where `images` is so far from a match that a tenth of its pixels get there).
    In rounds:

        minimise ‖r + J·Δ/255‖ over integer Δ, greedily;   k ← k + Δ;   r ← f(k/255) − z;   J ← Broyden's update.

    Greedy means: always the single step that lowers the norm most. Early steps use the most sensitive pixels, so a
    round changes some hundred pixels by one level, and the linear model is good to a few per cent; each round costs one
    forward pass. A round that does not lower the error teaches J all the same. It is undone, unless the whitened error
    fell: what grew then is easily mended by the next. After three such rounds J is computed afresh.

    Cost: (1 + 2D)/3 evaluations for J, a third of one for every round. Where `max_evals` does not allow a Jacobian the
    result is the rounded image. Memory: D·N numbers. Images are worked on one after the other.

    Args:
        f: the encoder, or any callable (B, C, H, W) -> (B, D).
        images: matches to round, (B, C, H, W), pixels in [0, 1].
        target: pixels (B or 1, C, H, W), or embeddings (B or 1, D).
        source: centre of the ball, (B, C, H, W); needed with `radius`.
        radius: of the ball about `source`, in pixel units; None for the box alone. Held exactly; of a source on the
            grid k/255, in whole steps.
        norm: of the ball: "linf" or "l2".
        rtol: embedding error at which an image is done.
        max_evals: evaluations per image.
        progress: called with a `Progress` after every round; an exception raised in it ends the run.

    Returns:
        The refined images, each value k/255, with error, cost and status. `infeasible`: the ball holds no 8-bit image;
        the image is returned as it was given.

    Raises:
        TypeError: `images`, `target` or `source` is no float tensor.
        ValueError: pixels outside [0, 1], shapes that do not fit, `radius` without `source`, or a bad number.

    Example:
        >>> import torch
        >>> from hf_equiv import refine_8bit
        >>> weight = torch.randn(4, 192, generator=torch.Generator().manual_seed(0))
        >>> def encode(x):
        ...     return x.flatten(1) @ weight.T
        >>> image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        >>> exact = refine_8bit(encode, image, encode(image), rtol=1e-3)
        >>> levels = exact.images * 255
        >>> bool((levels - levels.round()).abs().max() < 1e-4), exact.converged
        (True, True)

    References:
        Broyden (1965), *Math. Comp.* 19:577 (the update of J). Mallat, Zhang (1993), *IEEE Trans. Signal Process.*
        41:3397 (greedy pursuit). Deuflhard (2004), *Newton Methods for Nonlinear Problems*, §3.3 (the natural
        monotonicity test). Lattice moves guided by a Jacobian: this library.
    """
    checks.check_images(images, "images")
    checks.check_target(target, images.shape[0])
    checks.check_radius(radius, norm, images[0].numel())
    checks.check_rtol(rtol)
    checks.check_count(max_evals, "max_evals")
    if radius is not None and source is None:
        raise ValueError("`source` must be given with `radius`; got None. Pass the centre of the ball.")
    if source is not None:
        checks.check_images(source, "source")
        if source.shape != images.shape:
            raise ValueError(
                f"`source` must have the shape of `images` {tuple(images.shape)}; got {tuple(source.shape)}."
            )
    with torch.inference_mode(False), no_tf32():
        images, target = images.detach().clone(), target.detach().clone()
        source = None if source is None else source.detach().clone()
        z = target_embeddings(f, images, target) if target.ndim == 2 else _encode(f, images, target)
        done = [_Refined(images[b], float("inf"), 0.0, 0.0, None, ()) for b in range(images.shape[0])]
        for b in range(images.shape[0]):

            def report(state: _Refined, b: int = b) -> None:
                done[b] = state
                if progress is not None:
                    progress(_progress(done))

            center = None if source is None else source[b]
            lattice = Lattice.around(images[b], center, radius, norm)
            done[b] = _refine(f, images[b], z[b], lattice, rtol, max_evals, report)
    return MatchResult(
        torch.stack([d.image for d in done]),
        torch.tensor([d.error for d in done], dtype=torch.float64),
        torch.tensor([d.num_evals for d in done], dtype=torch.float64),
        torch.tensor([d.seconds for d in done], dtype=torch.float64),
        tuple(d.status or Status.ERROR for d in done),
        tuple(d.trace for d in done),
    )


@dataclass(frozen=True, slots=True)
class _Refined:
    image: Tensor
    error: float
    num_evals: float
    seconds: float
    status: Status | None
    trace: tuple[tuple[float, float], ...]


def _progress(done: list[_Refined]) -> Progress:
    return Progress(
        torch.stack([d.image for d in done]),
        torch.tensor([d.error for d in done], dtype=torch.float64),
        torch.tensor([d.num_evals for d in done], dtype=torch.float64),
        torch.tensor([d.status is None for d in done]),
    )


def _encode(f: Encoding, images: Tensor, target: Tensor) -> Tensor:
    """Embeddings (B, D) of target pixels, float64."""
    if target.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"`target` must have the image shape of `images` {tuple(images.shape[1:])}; got {tuple(target.shape[1:])}. "
            "Preprocess both with the same encoder."
        )
    with torch.no_grad():
        z = f(target.to(images, copy=True))
    checks.check_output(z, target.shape[0])
    checks.check_embeddings(z)
    return z.double().expand(images.shape[0], -1)


def _refine(
    f: Encoding,
    image: Tensor,
    z: Tensor,
    lattice: Lattice,
    rtol: float,
    max_evals: int,
    report: Callable[[_Refined], None],
) -> _Refined:
    """Refine one image; `report` receives the state after every round."""
    start = time.perf_counter()
    spent, trace = 0.0, list[tuple[float, float]]()
    rounded = lattice.round(image)
    if rounded is None:
        return _Refined(image, math.inf, 0.0, 0.0, Status.INFEASIBLE, ())
    cap = _CAP
    unit = math.ldexp(1.0, math.frexp(float(z.norm()))[1])  # a power of two: embeddings of any scale are near 1 here
    scale = float(z.norm()) / unit

    def to_image(levels: Tensor) -> Tensor:
        return (levels / 255).to(image.dtype).view(image.shape)

    def residual(levels: Tensor) -> Tensor:
        with torch.no_grad():
            output = f(to_image(levels)[None])
        checks.check_output(output, 1)
        checks.check_dimension(z, output.shape[1])
        return (output[0].double() - z) / unit

    def state(status: Status | None) -> _Refined:
        return _Refined(to_image(levels), error, spent, time.perf_counter() - start, status, tuple(trace))

    levels, r = rounded, residual(rounded)  # the best so far
    here, r_here = levels, r  # where the next round starts
    spent += _FORWARD
    error = float(r.norm()) / scale
    trace.append((spent, error))
    jacobian, failed, since, trust = None, 0, math.inf, _MOVES
    reach = whiten = natural = torch.empty(0)
    while not error <= rtol:
        if not math.isfinite(error):
            return state(Status.ERROR)
        if jacobian is None or failed >= _STALE:
            cost = jacobian_cost(z.shape[0])
            if spent + cost + _FORWARD > max_evals:
                return state(Status.MAX_EVALS)
            if jacobian is not None and (error > 0.5 * since or error <= _WORTH * rtol):
                return state(Status.STALLED)
            jacobian = None  # free it first
            _, jacobian = jacobian_matrix(f, to_image(levels))
            spent += cost
            if not bool(torch.isfinite(jacobian).all()):
                return state(Status.ERROR)
            jacobian /= 255
            jacobian /= unit
            reach, whiten = left_geometry(jacobian)
            natural = whiten @ reach
            failed, since, trust = 0, error, max(trust, _MOVES // 4)
            here, r_here = levels, r
        if spent + _FORWARD > max_evals:
            return state(Status.MAX_EVALS)
        if float(((here - rounded).abs() >= cap).double().mean()) > _CROWDED:
            cap *= 2
        near = lattice.near(rounded, cap)
        moves = plan_moves(jacobian, whiten, reach @ r_here, here, near, 0.3 * rtol * scale, trust)
        if not bool(moves.any()):
            failed = _STALE
            if since == error:
                return state(Status.STALLED)
            continue
        r_new = residual(here + moves)
        spent += _FORWARD
        predicted = _learn(jacobian, moves, reach @ (r_new - r_here))
        error_new, error_here = float(r_new.norm()) / scale, float(r_here.norm()) / scale
        promised = error_here - float((r_here + predicted).norm()) / scale
        agreement = (error_here - error_new) / max(promised, 1e-12)
        if agreement < 0.25:
            trust = max(8, min(trust, int(moves.abs().sum())) // 3)
        elif agreement > 0.6:
            trust *= 2
        if error_new < error:
            failed = failed + 1 if error_new > 0.9 * error else 0
            levels, r, error = here + moves, r_new, error_new
            here, r_here = levels, r
            trace.append((spent, error))
        else:
            failed += 1
            onward = error_new < _EXCURSION * error and (natural @ r_new).norm() < (natural @ r_here).norm()
            here, r_here = (here + moves, r_new) if onward else (levels, r)
        report(state(None))
    return state(Status.CONVERGED)


@no_autocast()
def _learn(jacobian: Tensor, moves: Tensor, change: Tensor) -> Tensor:
    """Broyden's update of J (D, N), in place, so that J·Δ is the change seen (D,).

    Returns:
        The J·Δ of before, (D,) float64.
    """
    step = moves.to(jacobian.dtype)
    predicted = jacobian @ step
    jacobian.addr_(change.to(jacobian.dtype) - predicted, step, alpha=1 / float(step @ step))
    return predicted.double()
