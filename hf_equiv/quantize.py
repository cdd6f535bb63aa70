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
from hf_equiv.lattice import Lattice, left_geometry, plan_moves
from hf_equiv.matching import Encoding, ProgressHook, target_embeddings
from hf_equiv.precision import no_tf32
from hf_equiv.results import MatchResult, Progress, Status

_FORWARD = 1 / 3  # evaluations of a forward pass
_MOVES = 400  # steps of ±1/255 in the first round; later rounds adapt it to how well J predicted the last
_WORTH = 5  # times rtol: a smaller error is not worth another Jacobian
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

    Finds k (C, H, W) integer in 0…255, inside the ball, near 255·images, with ‖f(k/255) − z‖ / ‖z‖ ≤ rtol. In rounds:

        minimise ‖r + J·Δ/255‖ over integer Δ, greedily;   k ← k + Δ;   r ← f(k/255) − z;   J ← Broyden's update.

    Greedy means: always the single step that lowers the norm most. Early steps use the most sensitive pixels, so a
    round changes some hundred pixels by one level, and the linear model is good to a few per cent; each round costs one
    forward pass. A round that does not lower the error is undone, though J learns from it; after three such rounds J is
    computed afresh.

    Cost: (1 + 2D)/3 evaluations for J, a third of one for every round. Where `max_evals` does not allow a Jacobian the
    result is the rounded image. Memory: D·N numbers. Images are worked on one after the other.

    Args:
        f: the encoder, or any callable (B, C, H, W) -> (B, D).
        images: matches to round, (B, C, H, W), pixels in [0, 1].
        target: pixels (B or 1, C, H, W), or embeddings (B or 1, D).
        source: centre of the ball, (B, C, H, W); needed with `radius`.
        radius: of the ball about `source`, in pixel units; None for the box alone. Held to 1e-4 of an 8-bit step.
        norm: of the ball: "linf" or "l2".
        rtol: embedding error at which an image is done.
        max_evals: evaluations per image.
        progress: called with a `Progress` after every round; an exception raised in it ends the run.

    Returns:
        The refined images, each value k/255, with error, cost and status. `infeasible`: the ball holds no 8-bit image.

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
        41:3397 (greedy pursuit). Lattice moves guided by a Jacobian: this library.
    """
    checks.check_images(images, "images")
    checks.check_target(target, images.shape[0])
    checks.check_radius(radius, norm, images[0].numel())
    checks.check_positive(rtol, "rtol")
    checks.check_count(max_evals, "max_evals")
    if radius is not None and source is None:
        raise ValueError("`source` must be given with `radius`; got None. Pass the centre of the ball.")
    if source is not None:
        checks.check_images(source, "source")
        if source.shape != images.shape:
            raise ValueError(
                f"`source` must have the shape of `images` {tuple(images.shape)}; got {tuple(source.shape)}."
            )
    images, target = images.detach(), target.detach()
    source = None if source is None else source.detach()
    with no_tf32():
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
    levels = rounded
    scale = float(z.norm())

    def to_image(levels: Tensor) -> Tensor:
        return (levels / 255).to(image.dtype).view(image.shape)

    def residual(levels: Tensor) -> Tensor:
        with torch.no_grad():
            output = f(to_image(levels)[None])
        checks.check_output(output, 1)
        checks.check_dimension(z, output.shape[1])
        return output[0].double() - z

    def state(status: Status | None) -> _Refined:
        return _Refined(to_image(levels), error, spent, time.perf_counter() - start, status, tuple(trace))

    r = residual(levels)
    spent += _FORWARD
    error = float(r.norm()) / scale
    trace.append((spent, error))
    jacobian, failed, since, trust = None, 0, math.inf, _MOVES
    reach = whiten = torch.empty(0)
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
            reach, whiten = left_geometry(jacobian)
            failed, since, trust = 0, error, max(trust, _MOVES // 4)
        if spent + _FORWARD > max_evals:
            return state(Status.MAX_EVALS)
        moves = plan_moves(jacobian, whiten, reach @ r, levels, lattice, 0.3 * rtol * scale, trust)
        step = moves.to(jacobian.dtype)
        length2 = float(step @ step)
        if length2 == 0.0:
            failed = _STALE
            if since == error:
                return state(Status.STALLED)
            continue
        r_new = residual(levels + moves)
        spent += _FORWARD
        predicted = jacobian @ step
        surprise = (reach @ (r_new - r)).to(jacobian.dtype) - predicted
        jacobian.addr_(surprise, step, alpha=1 / length2)
        error_new = float(r_new.norm()) / scale
        promised = error - float((r + predicted.double()).norm()) / scale
        agreement = (error - error_new) / max(promised, 1e-12)
        if agreement < 0.25:
            trust = max(8, min(trust, int(moves.abs().sum())) // 3)
        elif agreement > 0.6:
            trust *= 2
        if error_new < error:
            failed = failed + 1 if error_new > 0.9 * error else 0
            levels, r, error = levels + moves, r_new, error_new
            trace.append((spent, error))
        else:
            failed += 1
        report(state(None))
    return state(Status.CONVERGED)
