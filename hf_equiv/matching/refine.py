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
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hf_equiv import checks
from hf_equiv.conditions import Function, admit
from hf_equiv.jacobian import Jacobian, jacobian_cost
from hf_equiv.matching import bars
from hf_equiv.matching.lattice import Lattice, left_geometry, plan_moves
from hf_equiv.matching.match import ProgressHook, Search, collect, pixels_of, snapshot, target_embeddings
from hf_equiv.precision import Encoding, no_autocast, no_tf32, power_of_two
from hf_equiv.results import MatchResult, Status

_FORWARD = 1 / 3  # evaluations of a forward pass
_ROWS = 32  # cotangents per pass of a Jacobian
_CAP = 3  # most steps of one pixel in all; otherwise a few sensitive pixels take 20 and show as specks
_CROWDED = 0.1  # share of pixels at the cap that doubles the cap, because too few others are left
_MOVES = 400  # steps of ±1/255 in the first round; later rounds adapt it to the accuracy of J in the last
_WORTH = 5  # times rtol: a smaller error does not justify another Jacobian
_EXCURSION = 3  # times the best error: limit of a round that raises the error but lowers the whitened one
_GAIN = 0.5  # share of the error of the rounded image, from which an image counts as refined
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
    progress: ProgressHook | bool | None = None,
) -> MatchResult:
    """Round matches to 8 bit and repair the embedding by single steps of ±1/255.

    Finds k (C, H, W) integer in 0…255, inside the ball, with ‖f(k/255) − z‖ / ‖z‖ ≤ rtol, in rounds:

        minimise ‖r + J·Δ/255‖ over integer Δ, greedily;   k ← k + Δ;   r ← f(k/255) − z;   J ← Broyden's update.

    Cost: (1 + 2D)/3 evaluations for J, a third of one for every round. Memory: D·N numbers.

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
        centers = [None] * len(images) if source is None else source
        z = target_embeddings(f, images, target, "images")
        runs = [_Refinement(f, image, embedding) for image, embedding in zip(images, z, strict=True)]
        with bars.shown(progress, "refine", bars.errors_to(rtol)) as hook:
            for run, center in zip(runs, centers, strict=True):
                lattice = Lattice.around(run.best, center, radius, norm)
                run.run(lattice, rtol, max_evals, lambda: None if hook is None else hook(snapshot(runs)))
    return replace(collect(runs), source=source, target=pixels_of(target))


class _Refinement(Search):
    """Rounds of one image: `levels` and `r` are the best point, `here` and `r_here` the start of the next round."""

    # J per 8-bit step in `unit`, the matrices of `left_geometry` and their product
    model: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def __init__(self, f: Function, image: Tensor, z: Tensor) -> None:
        super().__init__(image, f)
        self.z = z
        self.unit = power_of_two(float(z.norm()))  # in this unit, embeddings of any scale are near 1
        self.scale = float(z.norm()) / self.unit
        self.cap, self.trust, self.failed, self.since = _CAP, _MOVES, 0, math.inf

    def run(self, lattice: Lattice, rtol: float, max_evals: int, report: Callable[[], None]) -> None:
        """Refine the image and set its status; call `report` after every round."""
        start = time.perf_counter()
        rounded = lattice.round(self.best)
        if rounded is None:
            self.status = Status.INFEASIBLE
            return
        self.lattice, self.rounded, self.levels = lattice, rounded, rounded
        self.r = self._residual(rounded)
        self.here, self.r_here = self.levels, self.r
        self.best, self.error = self._image(rounded), self._error(self.r)
        self.trace.append((self.num_evals, self.error))
        while self.status is None:
            self.status = self._ready(rtol, max_evals)
            if self.status is None and self._round(rtol):
                report()
        self.seconds = time.perf_counter() - start
        self.model = None  # D·N numbers
        del self.lattice, self.rounded, self.levels, self.r, self.here, self.r_here

    def _image(self, levels: Tensor) -> Tensor:
        return (levels / 255).to(self.best.dtype).view(self.best.shape)

    def _error(self, r: Tensor) -> float:
        return float(r.norm()) / self.scale

    def _residual(self, levels: Tensor) -> Tensor:
        with torch.no_grad():
            output = self.f(self._image(levels)[None])
        checks.check_dimension(self.z, output.shape[1])
        self.num_evals += _FORWARD
        return (output[0].double() - self.z) / self.unit

    def _ready(self, rtol: float, max_evals: int) -> Status | None:
        """Return the status that ends the rounds, or None with a usable Jacobian and evaluations for a round."""
        if (ended := self.reached(rtol)) is not None:
            return ended
        if not math.isfinite(self.error):
            return Status.ERROR
        if self.model is None or self.failed >= _STALE:
            cost = jacobian_cost(self.z.shape[0])
            if self.num_evals + cost + _FORWARD > max_evals:
                return Status.MAX_EVALS
            if self.model is not None and (self.error > 0.5 * self.since or self.error <= _WORTH * rtol):
                return self._ended()
            self._renew()
            self.num_evals += cost
            if self.model is None:
                return Status.ERROR
        return Status.MAX_EVALS if self.num_evals + _FORWARD > max_evals else None

    def _ended(self) -> Status:
        """Return the status of an image that no further step improves."""
        rounded = self.trace[0][1]
        return Status.REFINED if self.error <= _GAIN * rounded else Status.STALLED

    def _renew(self) -> None:
        """Form J at the best point; leave no model if it is not finite."""
        self.model = None  # free the old one first
        jacobian = Jacobian(self.f, self._image(self.levels)).as_matrix(_ROWS)
        if not bool(torch.isfinite(jacobian).all()):
            return
        jacobian /= 255
        jacobian /= self.unit
        reach, whiten = left_geometry(jacobian)
        self.model = jacobian, reach, whiten, whiten @ reach
        self.failed, self.since, self.trust = 0, self.error, max(self.trust, _MOVES // 4)
        self.here, self.r_here = self.levels, self.r

    def _round(self, rtol: float) -> bool:
        """Make the moves that J predicts to help and update J from the result; return False if there are none."""
        assert self.model is not None
        jacobian, reach, whiten, natural = self.model
        if float(((self.here - self.rounded).abs() >= self.cap).double().mean()) > _CROWDED:
            self.cap *= 2
        near = self.lattice.near(self.rounded, self.cap)
        goal = 0.3 * rtol * self.scale
        moves = plan_moves(jacobian, whiten, reach @ self.r_here, self.here, near, goal, self.trust)
        if not bool(moves.any()):
            self.failed = _STALE
            if self.since == self.error:
                self.status = self._ended()
            return False
        r_new = self._residual(self.here + moves)
        step, change = moves.to(jacobian.dtype), (reach @ (r_new - self.r_here)).to(jacobian.dtype)
        with no_autocast():  # Broyden's rule makes J·Δ the observed change
            predicted = jacobian @ step
            jacobian.addr_(change - predicted, step, alpha=1 / float(step @ step))
        error, error_here = self._error(r_new), self._error(self.r_here)
        promised = error_here - self._error(self.r_here + predicted.double())
        agreement = (error_here - error) / max(promised, 1e-12)
        if agreement < 0.25:
            self.trust = max(8, min(self.trust, int(moves.abs().sum())) // 3)
        elif agreement > 0.6:
            self.trust *= 2
        if error < self.error:
            self.failed = self.failed + 1 if error > 0.9 * self.error else 0
            self.levels, self.r = self.here + moves, r_new
            self.here, self.r_here = self.levels, self.r
            self.offer(self._image(self.levels), error)
        else:
            self.failed += 1
            falls = (natural @ r_new).norm() < (natural @ self.r_here).norm()
            onward = error < _EXCURSION * self.error and falls
            self.here, self.r_here = (self.here + moves, r_new) if onward else (self.levels, self.r)
        return True
