"""Find an 8-bit image, k/255 in every pixel, that still has the target's embedding.

Rounding a match moves its embedding by 3e-3 to 1e-1. Pixels are rounded in turn instead, while the others repair the
embedding (`rounding`), which leaves about 1e-4. But an 8-bit step of one pixel is small, and there are N ≫ D of them: J
tells which few steps cancel the rest, as a sparse integer least-squares problem (`lattice`). A round of steps that does
not lower the error is undone, but still updates J. After six rounds with hardly a decrease J is computed afresh.

Models of a joint encoder that see the image through a resize to 8 bit come first: what they see is refined by itself,
and the image is rounded so that they see it. Later steps leave it alone, unless its error is the largest.

Broyden (1965), Math. Comp. 19:577. Mallat, Zhang (1993), IEEE Trans. Signal Process. 41:3397 (greedy pursuit).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_equiv import bars, checks
from hf_equiv.checks import UNIT, Bounds
from hf_equiv.conditions import Function, admit, as_function
from hf_equiv.jacobian import VECTORS, jacobians
from hf_equiv.matching.feasible import Rows
from hf_equiv.matching.lattice import WORKSPACE, Lattice, plan_moves
from hf_equiv.matching.match import note_least, target_embeddings
from hf_equiv.matching.rounding import num_turns, round_in_turn
from hf_equiv.matching.search import ProgressHook, Search, collect, reached, snapshot
from hf_equiv.matching.solvers import pick
from hf_equiv.matching.steps import JointSteps, Steps
from hf_equiv.memory import MEMORY, Parts, halved, images_within
from hf_equiv.precision import Encoding, no_autocast, no_tf32, times
from hf_equiv.results import MatchResult, Status

_CAP = 3  # most steps of one pixel in all; otherwise a few sensitive pixels take 20 and show as specks
_CROWDED = 0.1  # share of pixels at the cap that doubles the cap, because too few others are left
_MOVES = 400  # steps of ±1/255 in the first round; later rounds adapt it to the accuracy of J in the last
_WORTH = 10  # times rtol: a smaller error does not justify another Jacobian
_GAIN = 0.5  # share of the error of the rounded image, from which an image counts as refined
_STALE = 6  # rounds in a row with hardly a decrease before a new Jacobian; by then they have few moves
_SINCE = 0.8  # share of the error left since the last Jacobian, above which another does not help


def refine_8bit(
    f: Encoding,
    images: Tensor,
    target: Tensor,
    *,
    source: Tensor | None = None,
    radius: float | None = None,
    norm: str = "linf",
    held: Tensor | None = None,
    bounds: Bounds = UNIT,
    rtol: float = 1e-5,
    max_evals: int = 1000,
    memory: int = MEMORY,
    progress: ProgressHook | bool | None = None,
) -> MatchResult:
    """Round matches to 8 bit: the sensitive pixels first, while the others repair the embedding.

    Finds k (C, H, W) integer in 0…255, inside the ball, with ‖f(k/255) − z‖ / ‖z‖ ≤ rtol. Half of the pixels are
    rounded at a time, and Newton steps of the rest bring f back to z. Rounds of single steps of ±1/255 follow:

        minimise ‖r + J·Δ/255‖ over integer Δ, greedily;   k ← k + Δ;   r ← f(k/255) − z;   J ← Broyden's update.

    Cost: (1 + 2D)/3 evaluations for J, and about ten for Newton steps and rounds; a few hundred near black or white.
    Memory: D·N numbers and 26 MB an image; `memory` bounds each, by refining fewer images together.

    Args:
        f: the encoder, or any callable (B, C, H, W) -> (B, D).
        images: matches to round, (B, C, H, W), pixels in [0, 1].
        target: pixels (B or 1, C, H, W), or embeddings (B or 1, D).
        source: centre of the ball, (B, C, H, W); needed with `radius`.
        radius: radius of the ball about `source`, in pixel units (whole steps if k/255); None for the box alone.
        norm: norm of the ball, "linf" or "l2".
        held: pixels that keep their level, (B, C, H, W) bool; None for no such pixels.
        bounds: (0, 1), the only box of 8-bit images.
        rtol: embedding error at which an image is done.
        max_evals: evaluations per image; too few for a Jacobian leave the rounded image.
        memory: most bytes of the Jacobians held at once; at least one image is worked on.
        progress: called with a `Progress` after every round; an exception raised in it ends the run. By default a
            bar in a terminal or notebook; False for none.

    Returns:
        Images with values k/255, errors, costs and statuses: `refined` if the error is above `rtol` and at most half
        that of rounding; `infeasible` and only rounded if no image has the target embedding; `infeasible` and unchanged
        if the ball has no 8-bit image.

    Raises:
        ValueError: pixels or bounds other than [0, 1], shapes that do not fit, `radius` without `source`, or a bad
            number.

    Example:
        >>> import torch
        >>> from hf_equiv import refine_8bit
        >>> image = torch.linspace(0, 1, 192).view(1, 3, 8, 8)
        >>> refine_8bit(lambda x: x.mean((2, 3)), image, image.mean((2, 3)), rtol=1e-3).converged
        True
    """
    if bounds not in (UNIT, list(UNIT)):
        raise ValueError(
            f"`bounds` must be (0, 1) for 8-bit images k/255; got {bounds}. Match within (0, 1), or do not refine."
        )
    checks.check_match(images, "images", target, radius, norm, rtol, max_evals)
    checks.check_count(memory, "memory")
    if radius is not None and source is None:
        raise ValueError("`source` must be given with `radius`; got None. Pass the centre of the ball.")
    if source is not None:
        checks.check_like(source, images, "source", one=False)
    if held is not None and (held.dtype != torch.bool or held.shape != images.shape):
        raise ValueError(
            f"`held` must be a bool tensor of the shape of `images` {tuple(images.shape)}; got {held.dtype} "
            f"{tuple(held.shape)}."
        )
    with torch.inference_mode(False), no_tf32():
        images, target = images.detach().clone(), target.detach().clone()
        f = admit(f, images, noise=True)
        z = target_embeddings(_of_files(f)[1], images, target)
        runs = [_Run(image) for image in images]
        note_least(runs, f, images, target, z, rtol)
        count = max(1, min(images_within(memory, z.shape[1], images[0]), memory // WORKSPACE))
        with bars.shown(progress, "refine", bars.errors_to(rtol)) as hook:
            for part in (slice(start, start + count) for start in range(0, len(images), count)):
                lattice = Lattice.around(images[part], None if source is None else source[part], radius, norm)
                if held is not None:
                    lattice = lattice.holding(lattice.nearest(images[part].flatten(1)), held[part].flatten(1))
                group = _Group(f, runs[part], z[part], lattice, rtol, max_evals)
                _refine(group.active(), lambda: None if hook is None else hook(snapshot(images, runs)))
        return collect(runs, source, target)


def _of_files(f: Function) -> tuple[Any, Function]:
    """Return a joint encoder of models whose views round to 8 bit, or None, and f as it embeds 8-bit images."""
    plain: Any = f.plain
    if not any(plain.views if hasattr(plain, "with_views") else ()):
        return None, f
    return plain, as_function(plain.of_files())


@dataclass(eq=False)
class _Run(Search):
    """The rounds of one image, which is written into `best`."""

    J: Steps | JointSteps | None = None  # the effects of single steps; None if the next round needs new ones
    failed: int = 0  # rounds in a row with hardly a decrease
    since: float = math.inf  # the error when J was formed

    def note(self, image: Tensor, error: float, evaluated: bool) -> None:
        """Note the best image and the error of a round; without moves there was nothing to evaluate."""
        self.thirds += evaluated
        self.failed = _STALE if not evaluated else 0 if error <= 0.9 * self.error else self.failed + 1
        self.offer(error)
        self.best.copy_(image)

    def settle(self, f: Function, rtol: float, max_evals: int, cost: int) -> None:
        """Set the status of an image that is done; drop a J that helps no longer. Another takes `cost` thirds."""
        renew = self.J is None or self.failed >= _STALE
        if not math.isfinite(self.error):
            self.status = Status.ERROR
        elif (status := reached(f, self, self.best, rtol)) is not None:
            self.status = status
        elif renew and self.J is not None and (self.error > _SINCE * self.since or self.error <= _WORTH * rtol):
            self.status = Status.REFINED if self.error <= _GAIN * self.trace[0][1] else Status.STALLED
        elif self.thirds + renew * cost + 1 > 3 * max_evals:
            self.status = Status.MAX_EVALS
        if renew or self.status is not None:
            self.J = None  # D·N numbers


def _refine(group: _Group, report: Callable[[], None]) -> None:
    """Refine the images of a group and set their statuses; call `report` after every round."""
    began, spent = time.perf_counter(), 0
    if group.runs:
        group.begin()
    while runs := group.runs:
        group = group.settle(report)
        seconds, began = time.perf_counter() - began, time.perf_counter()
        for run in runs:
            run.seconds += seconds / len(runs)
        if sum(run.thirds for run in runs) > spent:
            report()
        if group.runs:
            spent = sum(run.thirds for run in group.runs)
            group.round()


class _Group(Rows):
    """Images refined together that have no status yet, N pixels each. Operations on J are made for each image alone.

    Args:
        f: the encoder, admitted.
        runs: records of the images; `best` holds the matches to round.
        z: targets, (B, D).
        lattice: the 8-bit images allowed.
        rtol: embedding error at which an image is done.
        max_evals: evaluations per image.
    """

    def __init__(self, f: Function, runs: list[_Run], z: Tensor, lattice: Lattice, rtol: float, max_evals: int) -> None:
        self.f, self.runs, self.z, self.lattice, self.parts = f, runs, z, lattice, Parts()
        self.rtol, self.max_evals = rtol, max_evals
        self.matches = torch.stack([run.best for run in runs]).flatten(1)
        self.rounded, inside = lattice.round(self.matches)
        for run, feasible in zip(runs, inside.tolist(), strict=True):
            run.status = None if feasible else Status.INFEASIBLE
        self.size = z.norm(dim=1, keepdim=True)  # the unit of r and J
        self.cap, self.trust = torch.full_like(self.size, _CAP), torch.full_like(self.size, _MOVES)  # (B, 1)
        self.shape, self.dtype = runs[0].best.shape, runs[0].best.dtype
        self.joint, self.of_files = _of_files(f)
        self.reach, self.whiten = z.new_zeros((2, len(z), z.shape[1], z.shape[1]))  # `left_geometry` of J

    def active(self) -> _Group:
        """Return the images that have no status yet."""
        kept = [k for k, run in enumerate(self.runs) if run.status is None]
        if len(kept) == len(self.runs):
            return self
        return self.keep(torch.tensor(kept, dtype=torch.long, device=self.z.device))

    def begin(self) -> None:
        """Evaluate the rounded images."""
        self.levels = self.rounded  # the best points, (B, N)
        self.r = self._residuals(slice(None), self.rounded)  # (f(x) − z)/‖z‖, (B, D)
        self.error = self.r.norm(dim=1)
        self._note(self.error, torch.ones_like(self.error))

    def settle(self, report: Callable[[], None]) -> _Group:
        """Set statuses, form the Jacobians that are due, and return the images that have no status yet."""
        first = all(run.since == math.inf for run in self.runs)
        cost = 1 + 2 * self.z.shape[1] + first * (2 + num_turns(self.levels.shape[1]))
        for run in self.runs:
            run.settle(self.f, self.rtol, self.max_evals, cost)
        group = self.active()
        if first and group.runs:
            (group._round_in_turn if self.joint is None else group._round_views)(report)
        for i, run in enumerate(group.runs):
            if run.J is None and run.status is None:
                group._model(i, self._steps(run.best, group.size[i]))
                run.thirds += cost
        return group.active()

    @no_autocast()
    def _round_in_turn(self, report: Callable[[], None]) -> None:
        """Round the pixels of the matches in turn; keep the result where it is better than rounding them at once."""
        spent, levels, r = [run.thirds for run in self.runs], self.levels.clone(), self.r.clone()

        def turn(places: Sequence[int]) -> None:
            index = torch.tensor(places, device=self.z.device)
            most = index.new_tensor([3 * self.max_evals - spent[i] - 1 for i in places])
            images, lattice = self.matches[index].view(-1, *self.shape), self.lattice.keep(index)
            for newton in round_in_turn(self.f, images, self.z[index], lattice, self.rtol, most):
                for i, cost in zip(places, newton.cost.tolist(), strict=True):
                    self.runs[i].thirds = spent[i] + cost
                report()
            levels[index] = lattice.round(newton.best)[0]
            r[index] = self._residuals(index, levels[index])
            for i, model in zip(places, newton.models, strict=True):
                self._model(i, Steps(model.A.div_(255)))

        for places, lack in halved(turn, range(len(self.runs))):
            if lack is not None:
                self.runs[places[0]].status = Status.ERROR
        self._take(levels, r)
        self.rounded = self.levels
        self._note(self.error, torch.ones_like(self.error))

    def _round_views(self, report: Callable[[], None]) -> None:
        """Refine what smaller models see, and round the matches so that they see it."""
        joint = self.joint
        for i, (run, image) in enumerate(zip(self.runs, self.matches.view(-1, *self.shape), strict=True)):
            wanted, place = list[Tensor | None](), torch.tensor([i], device=self.z.device)
            parts = zip(joint.parts, joint.views, joint.seen(image[None]), joint.split(self.z[place]), strict=True)
            for f, view, x, z in parts:
                found = None
                if view is not None:
                    found = refine_8bit(f, x, z, rtol=self.rtol, max_evals=self.max_evals, progress=False)
                    run.thirds += round(3 * float(found.num_evals[0]))
                wanted.append(None if found is None else found.images[0])
            (self.levels[i],), _ = self.lattice.keep(place).round(joint.with_views(image, wanted)[None])
            self.r[i] = self._residuals(place, self.levels[place])[0]
            run.error = math.inf  # what it refines may be worse as yet
        self.error, self.rounded = self.r.norm(dim=1), self.levels.clone()
        self._note(self.error, torch.ones_like(self.error))
        report()

    @no_autocast()
    def round(self) -> None:
        """Make the moves that J predicts to help, learn from the result, and keep it where it is better."""
        full = ((self.levels - self.rounded).abs() >= self.cap).double().mean(dim=1, keepdim=True) > _CROWDED
        self.cap = self.cap * (1 + full.double())
        models = [run.J for run in self.runs if run.J is not None]
        moves = plan_moves(
            models, self.whiten, times(self.reach, self.r), self.levels, self.lattice.near(self.rounded, self.cap),
            0.3 * self.rtol, self.trust,
        )  # fmt: skip
        count = moves.steps.abs().sum(dim=1, keepdim=True)
        moved = count[:, 0] > 0
        there = self.levels.scatter_add(1, moves.index, moves.steps)
        r, predicted = self.r.clone(), times(moves.columns, moves.steps)
        if len(places := moved.nonzero().flatten()):
            r[places] = self._residuals(places, there[places])
        missed = times(self.reach, r - self.r) - predicted
        missed = torch.where(missed.isfinite().all(dim=1, keepdim=True), missed, 0.0)
        for model, *seen in zip(models, self.levels, moves.index, moves.steps, missed, strict=True):
            model.learn(*seen)
        error, promised = r.norm(dim=1), (self.r + predicted).norm(dim=1)
        share = ((self.error - error) / (self.error - promised).clamp_min(1e-12))[:, None]
        fewer, more = (torch.minimum(self.trust, count) / 3).floor().clamp_min(8), torch.where(share > 0.6, 2, 1)
        self.trust = torch.where((share < 0.25) & (count > 0), fewer, more * self.trust)
        self._take(there, r)
        self._note(error, moved)

    def _take(self, levels: Tensor, r: Tensor) -> None:
        """Make other points the best where their error is less."""
        better = r.norm(dim=1) < self.error
        self.levels, self.r = pick(better, levels, self.levels), pick(better, r, self.r)
        self.error = self.r.norm(dim=1)

    def _pixels(self, levels: Tensor) -> Tensor:
        return (levels / 255).to(self.dtype).view(-1, *self.shape)

    def _residuals(self, places: Tensor | slice, levels: Tensor) -> Tensor:
        """Evaluate points of some images of the group."""
        with torch.no_grad():
            (output,) = self.parts(lambda part: (self.of_files(self._pixels(levels[part])),), len(levels))
        checks.check_dimension(self.z[0], output.shape[1])
        return (output.double() - self.z[places]) / self.size[places]

    def _steps(self, image: Tensor, size: Tensor) -> Steps | JointSteps:
        """Return the effects of single steps at an image, over the length of its target."""
        count = 4 * VECTORS if self.z.is_cuda else VECTORS
        if self.joint is None:
            (J,) = jacobians(self.f, image[None], count)
            return Steps(J.div_((255 * size).to(J)))
        seen = self.joint.of_files().seen(image[None])
        found = [jacobians(as_function(one), x, count)[0] for one, x in zip(self.joint.parts, seen, strict=True)]
        parts = [Steps(J.div_((255 * scale * size).to(J))) for J, scale in zip(found, self.joint.scales, strict=True)]
        return JointSteps(parts, self.joint.views, self.shape)

    def _note(self, errors: Tensor, evaluated: Tensor) -> None:
        table = torch.stack([errors, evaluated.to(errors)], dim=1).tolist()
        for run, image, (error, spent) in zip(self.runs, self._pixels(self.levels), table, strict=True):
            run.note(image, error, bool(spent))

    def _model(self, i: int, model: Steps | JointSteps) -> None:
        """Go on with new effects of the steps of an image; the image ends if they are not finite."""
        run = self.runs[i]
        run.J, run.failed, run.since = model, 0, run.error
        self.reach[i], self.whiten[i] = model.geometry()
        self.trust[i].clamp_min_(_MOVES // 4)
        if not model.finite:
            run.status = Status.ERROR
