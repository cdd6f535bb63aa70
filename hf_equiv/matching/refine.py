"""Find an 8-bit image, k/255 in every pixel, that still has the target's embedding.

Rounding a match moves its embedding by 3e-3 to 8e-2. But an 8-bit step of one pixel is small, and there are N ≫ D of
them: the Jacobian at the rounded image tells which few steps cancel the rounding error, as a sparse integer
least-squares problem (`lattice`). A round that does not lower the error still updates J, and is undone unless the
whitened error fell, since the next round easily repairs such a rise. After three such rounds J is computed afresh.

Broyden (1965), Math. Comp. 19:577. Mallat, Zhang (1993), IEEE Trans. Signal Process. 41:3397 (greedy pursuit).
Deuflhard (2004), Newton Methods for Nonlinear Problems, §3.3 (the natural monotonicity test).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_equiv import bars, checks
from hf_equiv.conditions import Function, admit
from hf_equiv.jacobian import Parts, jacobians, stacked
from hf_equiv.matching.lattice import Lattice, Moves, apply, left_geometry, plan_moves
from hf_equiv.matching.search import ProgressHook, pixels_of, target_embeddings
from hf_equiv.precision import Encoding, no_autocast, no_tf32
from hf_equiv.results import MatchResult, Progress, Status

_PAIRS = 128  # most pairs of a cotangent and an image in a backward pass; a quarter of it on a CPU
_BYTES = 2 * 2**30  # most bytes of the Jacobians of the images refined together
_CAP = 3  # most steps of one pixel in all; otherwise a few sensitive pixels take 20 and show as specks
_CROWDED = 0.1  # share of pixels at the cap that doubles the cap, because too few others are left
_MOVES = 400  # steps of ±1/255 in the first round; later rounds adapt it to the accuracy of J in the last
_WORTH = 5  # times rtol: a smaller error does not justify another Jacobian
_EXCURSION = 3  # times the best error: limit of a round that raises the error but lowers the whitened one
_GAIN = 0.5  # share of the error of the rounded image, from which an image counts as refined
_STALE = 3  # rounds in a row with hardly a decrease before a new Jacobian

_FAINT, _LOUDER = 0.01, 2.0  # noise of f over rtol from which it is measured at the image found; the rise that counts
_VERDICTS = ((True, True), (False, True), (False, False))  # of `_Run.judge`


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
    progress: ProgressHook | bool | None = None,
) -> MatchResult:
    """Round matches to 8 bit and repair the embedding by single steps of ±1/255.

    Finds k (C, H, W) integer in 0…255, inside the ball, with ‖f(k/255) − z‖ / ‖z‖ ≤ rtol, in rounds:

        minimise ‖r + J·Δ/255‖ over integer Δ, greedily;   k ← k + Δ;   r ← f(k/255) − z;   J ← Broyden's update.

    Cost: (1 + 2D)/3 evaluations for J, a third of one for every round. Memory: D·N numbers an image; as many images
    are refined together as 2 GiB hold, up to twice that while some of them form J afresh.

    Args:
        f: the encoder, or any callable (B, C, H, W) -> (B, D).
        images: matches to round, (B, C, H, W), pixels in [0, 1].
        target: pixels (B or 1, C, H, W), or embeddings (B or 1, D).
        source: centre of the ball, (B, C, H, W); needed with `radius`.
        radius: radius of the ball about `source`, in pixel units (whole steps if k/255); None for the box alone.
        norm: norm of the ball, "linf" or "l2".
        rtol: embedding error at which an image is done.
        max_evals: evaluations per image; too few for a Jacobian leave the rounded image.
        progress: called with a `Progress` after every round; an exception raised in it ends the run. By default a
            bar in a terminal or notebook; False for none.

    Returns:
        Images with values k/255, errors, costs and statuses: `refined` if the error is above `rtol` and at most half
        that of rounding; unchanged and `infeasible` if the ball has no 8-bit image.

    Raises:
        ValueError: pixels outside [0, 1], shapes that do not fit, `radius` without `source`, or a bad number.

    Example:
        >>> import torch
        >>> from hf_equiv import refine_8bit
        >>> image = torch.linspace(0, 1, 192).view(1, 3, 8, 8)
        >>> refine_8bit(lambda x: x.mean((2, 3)), image, image.mean((2, 3)), rtol=1e-3).converged
        True
    """
    checks.check_match(images, "images", target, radius, norm, rtol, max_evals)
    if radius is not None and source is None:
        raise ValueError("`source` must be given with `radius`; got None. Pass the centre of the ball.")
    if source is not None:
        checks.check_like(source, images, "source", one=False)
    with torch.inference_mode(False), no_tf32():
        images, target = images.detach().clone(), target.detach().clone()
        source = None if source is None else source.detach().clone()
        f = admit(f, images, noise=True)
        z = target_embeddings(f, images, target)
        runs = [_Run() for _ in images]
        count = max(1, _BYTES // (z.shape[1] * images[0].numel() * images.element_size()))
        with bars.shown(progress, "refine", bars.errors_to(rtol)) as hook:
            for part in (slice(start, start + count) for start in range(0, len(images), count)):
                lattice = Lattice.around(images[part], None if source is None else source[part], radius, norm)
                group = _Group(f, images[part], z[part], lattice, runs[part])
                group.refine(rtol, max_evals, lambda: None if hook is None else hook(_snapshot(images, runs)))
    end = _snapshot(images, runs)
    return MatchResult(
        images,
        end.errors,
        end.num_evals,
        stacked([run.seconds for run in runs]),
        tuple(run.status or Status.ERROR for run in runs),
        tuple(tuple(run.trace) for run in runs),
        source,
        pixels_of(target, images),
    )


@dataclass(eq=False)
class _Run:
    """Cost, status and course of the rounds of one image."""

    thirds: int = 0  # of the evaluations, an exact count
    seconds: float = 0.0
    status: Status | None = None
    error: float = math.inf  # of the best image
    trace: list[tuple[float, float]] = field(default_factory=list)
    model: tuple[Tensor, Tensor, Tensor] | None = None  # J (D, N) per 8-bit step in `unit`; its `left_geometry`
    trust: int = _MOVES
    failed: int = 0
    since: float = math.inf  # the error when J was formed

    def improve(self, error: float) -> None:
        """Record the error of a new best image."""
        self.error = error
        self.trace.append((self.thirds / 3, error))

    def wants_jacobian(self, rtol: float, max_evals: int, cost: int) -> bool:
        """Return whether the next round needs a Jacobian, of `cost` thirds; set the status if it is not worth one."""
        renew = self.model is None or self.failed >= _STALE
        if not math.isfinite(self.error):
            self.status = Status.ERROR
        elif self.thirds + renew * cost + 1 > 3 * max_evals:
            self.status = Status.MAX_EVALS
        elif renew and self.model is not None and (self.error > 0.5 * self.since or self.error <= _WORTH * rtol):
            self.end()
        return renew and self.status is None

    def end(self) -> None:
        """Set the status of an image that no further step improves."""
        self.status = Status.REFINED if self.error <= _GAIN * self.trace[0][1] else Status.STALLED

    def judge(self, error: float, here: float, promised: float, moves: float, falls: float) -> tuple[bool, bool]:
        """Adapt to the errors of a round; return whether it found the best image, and whether the next starts there."""
        agreement = (here - error) / max(here - promised, 1e-12)
        if agreement < 0.25:
            self.trust = max(8, min(self.trust, int(moves)) // 3)
        elif agreement > 0.6:
            self.trust *= 2
        self.failed = 0 if error <= 0.9 * self.error else self.failed + 1
        best = error < self.error
        onward = best or (error < _EXCURSION * self.error and bool(falls))
        if best:
            self.improve(error)
        return best, onward


class _Group:
    """Images refined together, in tensors (B, N) and (B, D): each round deals with those that have no status yet.

    `levels`, `r` are the best points, `here`, `r_here` the starts of the next rounds. Operations on J are made for each
    image alone.
    """

    def __init__(self, f: Function, images: Tensor, z: Tensor, lattice: Lattice, runs: Sequence[_Run]) -> None:
        self.f, self.images, self.z, self.lattice, self.runs, self.parts = f, images, z, lattice, runs, Parts()
        length = z.norm(dim=1, keepdim=True)
        self.unit = torch.ldexp(torch.ones_like(length), torch.frexp(length).exponent)  # z of any scale is near 1 in it
        self.scale, self.cap = length / self.unit, torch.full_like(length, _CAP)

    def refine(self, rtol: float, max_evals: int, report: Callable[[], None]) -> None:
        """Refine the images and set their statuses; call `report` after every round."""
        start = time.perf_counter()
        self.rounded, inside = self.lattice.round(self.images)
        for run, feasible in zip(self.runs, inside.tolist(), strict=True):
            run.status = None if feasible else Status.INFEASIBLE
        self.levels, self.here, self.norms2 = self.rounded.clone(), self.rounded.clone(), torch.zeros_like(self.rounded)
        self.r, self.r_here = torch.zeros_like(self.z), torch.zeros_like(self.z)
        if active := self._active():
            r = self._residuals(active, self.rounded[active])
            self._keep(active, self.rounded[active], r)
            for i, error in zip(active, self._errors(active, r).tolist(), strict=True):
                self.runs[i].improve(error)
                self.runs[i].status = self._reached(i, rtol)
        while active := self._active():
            spent = sum(run.thirds for run in self.runs)
            cost = 1 + 2 * self.z.shape[1]
            self._renew([i for i in self._active() if self.runs[i].wants_jacobian(rtol, max_evals, cost)], cost)
            if left := self._active():
                self._round(left, rtol)
            for i in self._active():
                self.runs[i].status = self._reached(i, rtol)
            seconds, start = time.perf_counter() - start, time.perf_counter()
            for i in active:
                self.runs[i].seconds += seconds / len(active)
            if sum(run.thirds for run in self.runs) > spent:
                report()
        for run in self.runs:
            run.model = None  # D·N numbers

    def _active(self) -> list[int]:
        return [i for i, run in enumerate(self.runs) if run.status is None]

    def _reached(self, i: int, rtol: float) -> Status | None:
        """Return the status if the error reached rtol with its noise on top, or as nearly as noise allows."""
        noise, error = self.f.noise, self.runs[i].error
        if error + noise <= rtol < noise / _FAINT:
            near = self.f.noise_near(self.images[i])
            noise = near if near > _LOUDER * noise else noise
        if error + noise <= rtol:
            return Status.CONVERGED
        return Status.STALLED if error <= rtol < 1.5 * noise else None

    def _pixels(self, levels: Tensor) -> Tensor:
        return (levels / 255).to(self.images.dtype).view(-1, *self.images.shape[1:])

    def _residuals(self, at: list[int], levels: Tensor) -> Tensor:
        with torch.no_grad():
            (output,) = self.parts(lambda part: (self.f(self._pixels(levels[part])),), len(levels))
        checks.check_dimension(self.z[0], output.shape[1])
        for i in at:
            self.runs[i].thirds += 1
        return (output.double() - self.z[at]) / self.unit[at]

    def _errors(self, at: list[int], r: Tensor) -> Tensor:
        return r.norm(dim=1) / self.scale[at, 0]

    def _keep(self, at: list[int], levels: Tensor, r: Tensor) -> None:
        """Make these the best points, from which the next rounds start."""
        self.levels[at], self.r[at], self.images[at] = levels, r, self._pixels(levels)
        self.here[at], self.r_here[at] = levels, r

    def _renew(self, at: list[int], cost: int) -> None:
        """Form J at the best points; an image whose J is not finite ends."""
        if not at:
            return
        for i in at:
            self.runs[i].model = None  # free the old ones first
        try:
            matrices = jacobians(self.f, self._pixels(self.levels[at]), _PAIRS if self.z.is_cuda else _PAIRS // 4)
        except torch.OutOfMemoryError:
            if len(at) == 1:
                raise
            self._renew(at[: len(at) // 2], cost)
            return self._renew(at[len(at) // 2 :], cost)
        matrices /= (255 * self.unit[at, :, None]).to(matrices)
        norms2 = torch.stack([matrix.square().sum(dim=0) for matrix in matrices])
        geometry = left_geometry(matrices)
        self.norms2[at], self.here[at], self.r_here[at] = norms2.double(), self.levels[at], self.r[at]
        for i, finite, *model in zip(at, norms2.sum(dim=1).isfinite().tolist(), matrices, *geometry, strict=True):
            run = self.runs[i]
            run.model, run.thirds, run.status = (*model,), run.thirds + cost, None if finite else Status.ERROR
            run.failed, run.since, run.trust = 0, run.error, max(run.trust, _MOVES // 4)

    @no_autocast()
    def _round(self, at: list[int], rtol: float) -> None:
        """Make the moves that J predicts to help, learn from the result, and choose where the next round starts."""
        at, here, r, moves = self._plan(at, rtol)
        if not at:
            return
        runs, there = [self.runs[i] for i in at], here.scatter_add(1, moves.index, moves.steps)
        r_new, predicted = self._residuals(at, there), apply(moves.columns, moves.steps)
        reach, whiten = (torch.stack([run.model[n] for run in runs if run.model]) for n in (1, 2))
        self._learn(at, moves, apply(reach, r_new - r) - predicted)
        falls = apply(whiten @ reach, r_new).norm(dim=1) < apply(whiten @ reach, r).norm(dim=1)
        told = [*(self._errors(at, v) for v in (r_new, r, r + predicted)), moves.steps.abs().sum(dim=1), falls]
        verdicts = [run.judge(*row) for run, row in zip(runs, torch.stack(told, dim=1).tolist(), strict=True)]
        best, onward, back = ([k for k, v in enumerate(verdicts) if v == wanted] for wanted in _VERDICTS)
        self._keep([at[k] for k in best], there[best], r_new[best])
        on, off = [at[k] for k in onward], [at[k] for k in back]
        self.here[on], self.r_here[on] = there[onward], r_new[onward]
        self.here[off], self.r_here[off] = self.levels[off], self.r[off]

    def _plan(self, at: list[int], rtol: float) -> tuple[list[int], Tensor, Tensor, Moves]:
        """Return the images that have moves to make, their points and residuals, and these moves."""
        runs, here, r, rounded = [self.runs[i] for i in at], self.here[at], self.r_here[at], self.rounded[at]
        full = ((here - rounded).abs() >= self.cap[at]).double().mean(dim=1, keepdim=True) > _CROWDED
        self.cap[at] *= 1 + full.double()
        matrices, reach, whiten = zip(*(run.model for run in runs if run.model), strict=True)
        moves = plan_moves(
            matrices, self.norms2[at], torch.stack(whiten), apply(torch.stack(reach), r), here,
            self.lattice.of(at).near(rounded, self.cap[at]), 0.3 * rtol * self.scale[at],
            r.new_tensor([[run.trust] for run in runs]),
        )  # fmt: skip
        moving = moves.steps.any(dim=1).tolist()
        for run, moves_any in zip(runs, moving, strict=True):
            if not moves_any:
                run.failed = _STALE
                if run.since == run.error:
                    run.end()
        kept = [k for k, moves_any in enumerate(moving) if moves_any]
        moves = Moves(moves.index[kept], moves.columns[kept], moves.steps[kept])
        return [at[k] for k in kept], here[kept], r[kept], moves

    def _learn(self, at: list[int], moves: Moves, missed: Tensor) -> None:
        """Update J in the moved pixels by Broyden's rule J ← J + missed·Δᵀ / ‖Δ‖²: J·Δ becomes the observed change."""
        missed = torch.where(missed.isfinite().all(dim=1, keepdim=True), missed, 0.0)
        steps = moves.steps / moves.steps.square().sum(dim=1, keepdim=True)
        columns = torch.addcmul(moves.columns, missed[:, :, None], steps[:, None])
        for i, index, new in zip(at, moves.index, columns, strict=True):
            if (model := self.runs[i].model) is not None:
                model[0].index_copy_(1, index, new.to(model[0]))
        self.norms2[at] = self.norms2[at].scatter(1, moves.index, columns.square().sum(dim=1))


def _snapshot(images: Tensor, runs: Sequence[_Run]) -> Progress:
    active = torch.tensor([run.status is None for run in runs], device="cpu")
    return Progress(images, stacked([run.error for run in runs]), stacked([run.thirds / 3 for run in runs]), active)
