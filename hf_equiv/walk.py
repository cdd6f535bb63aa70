"""The walk of one image along a level set: step-length control, and the record of its points."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_equiv.corrector import Corrector, Place
from hf_equiv.headings import Ahead, Heading, Plan, Toward
from hf_equiv.results import Status

_MAX_FAILURES = 10  # halvings of one step
_REFRESH_AFTER = 5  # of them, before a full Jacobian is formed anew
_SHRUNK = 0.25  # of the longest step since the last Jacobian: so short, another is worth its cost
_SNAP = 0.1  # of the step that would be allowed: so near, the descent has nothing to add
_HOPS = 50  # steps between two points


def at_rest(stop: float) -> float:
    """The stationarity up to which a walk that finds no nearer point is complete: ten times `stop`, but at most 0.1."""
    return max(stop, min(10 * stop, 0.1))


@dataclass(frozen=True, slots=True)
class WalkPoint:
    """One point of a walk: an image whose embedding is z up to `drift`.

    Attributes:
        image: index in the batch.
        step: 0 for the start.
        drift: ‖f(x) − z‖ / ‖z‖.
        arc_length: sum of the L2 distances between the points so far, pixels in [0, 1].
        l2: ‖x − origin‖₂.
        linf: ‖x − origin‖_∞.
        psnr_db: of x against the origin, −10 log₁₀ mean (x − origin)²; infinite at the origin.
        remaining: L2 distance to the destination; None where there is none.
        stationarity: ‖P_null d‖ / ‖d‖ with J on the free pixels: an upper bound for d = destination − x, the model's
            value for d = x − origin; 0 where no better point is near. None for a fixed heading.
        num_evals: evaluations spent on the walk so far.
        pixels: x, (C, H, W); None unless `keep_points`.
    """

    image: int
    step: int
    drift: float
    arc_length: float
    l2: float
    linf: float
    psnr_db: float
    remaining: float | None
    stationarity: float | None
    num_evals: float
    pixels: Tensor | None


def _left(plan: Plan, heading: Toward) -> bool:
    """Whether so much of the way is left that a walk is not at rest."""
    return (plan.stationarity or 0.0) > at_rest(heading.stop)


class Walk:
    """From one image, along one heading, by steps that the corrector can bring back.

    Args:
        index: of the image in its batch.
        corrector: for the embedding to keep.
        heading: where to go.
        origin: the image that distances are against, (C, H, W).
        step: longest step, L2 in pixel units.
        keep_points: whether the points keep their pixels.
        progress: called with every point.

    Attributes:
        path: the points so far.
        at: the pixels of the last, (C, H, W).
        status: how it ended.
        seconds: wall time.
        useless: whether the heading had no part in the null space, and not because of the box.
    """

    def __init__(
        self,
        index: int,
        corrector: Corrector,
        heading: Heading,
        origin: Tensor,
        step: float,
        keep_points: bool,
        progress: Callable[[WalkPoint], None] | None,
    ) -> None:
        self.index, self.corrector, self.heading, self.origin, self.step = index, corrector, heading, origin, step
        self.keep_points, self.progress = keep_points, progress
        self.path: list[WalkPoint] = []
        self.at = origin
        self.seconds = 0.0
        self.status = Status.ERROR
        self.useless = False
        self.end: Place | None = None  # the destination, where it lies on the level set

    def run(self, start: Tensor, num_steps: int) -> None:
        """Walk, and set `status`."""
        began = time.perf_counter()
        self.at = start
        self.status = self._walk(start, num_steps)
        self.seconds = time.perf_counter() - began
        del self.corrector.model  # D·N numbers

    def _walk(self, start: Tensor, num_steps: int) -> Status:
        corrector, heading = self.corrector, self.heading
        at: Place | None = corrector.look(start)
        assert at is not None
        corrector.refresh(at)
        if not (math.isfinite(at.drift) and corrector.model.finite):
            return Status.ERROR
        if at.drift > corrector.rtol:
            at = corrector.correct(start, math.inf)
            if at is None:
                return Status.DRIFT_EXCEEDED
        if isinstance(heading, Toward):
            end = corrector.look(heading.destination)
            self.end = end if end.drift <= corrector.rtol else None
        most = min(self.step, math.sqrt(start.numel()))  # no step is longer than the box
        h, failures, learnt = most, 0, False
        plan = heading.plan(corrector, at, h)
        self._record(at, plan)
        if plan.direction is None and plan.stationarity is None:
            self.useless = bool(((start > 0) & (start < 1)).all())
        since, hops, longest, reconsidered = 0.0, 0, 0.0, False
        while len(self.path) <= num_steps:
            if plan.direction is None and learnt and isinstance(heading, Ahead):  # as far as A knows
                corrector.refresh(at)
                learnt = False
                plan = heading.plan(corrector, at, h)
                continue
            if plan.direction is None:
                self._record(at, plan)
                return Status.COMPLETED if plan.stationarity is not None else Status.BOX_BLOCKED
            if learnt and corrector.stale and h < min(plan.length, _SHRUNK * longest):  # for want of a fresh A
                corrector.refresh(at)
                learnt, longest = False, 0.0
                plan = heading.plan(corrector, at, h)
                continue
            length = min(h, plan.length)
            there, failure = self._try(at, plan, length, max(length, _SNAP * h))
            if there is not None:
                h *= heading.pace(corrector.trials)
                h, failures, learnt, reconsidered = min(most, h), 0, True, False
                longest = max(longest, length)
                since, hops = since + float(torch.linalg.vector_norm(there.image - at.image)), hops + 1
                at = there
                plan = heading.plan(corrector, at, h)
                if plan.direction is None or since >= heading.spacing * most or hops == _HOPS:
                    if len(self.path) == num_steps and isinstance(heading, Toward) and _left(plan, heading):
                        corrector.refresh(at)  # the last point: how much is left is worth knowing well
                        plan = heading.plan(corrector, at, h)
                    self._record(at, plan)
                    since, hops = 0.0, 0
                continue
            if failure is Status.COMPLETED and not reconsidered and heading.reconsider():
                reconsidered = True
                plan = heading.plan(corrector, at, h)
                continue
            if failure is Status.DRIFT_EXCEEDED and learnt and corrector.stale:  # for want of a fresh A
                corrector.refresh(at)
                learnt = False
                plan = heading.plan(corrector, at, h)
                continue
            h, failures = length / 2, failures + 1
            if failures == _REFRESH_AFTER and learnt:
                corrector.refresh(at)
                learnt = False
                plan = heading.plan(corrector, at, h)
            if failures == _MAX_FAILURES:
                self._record(at, plan)
                if failure is Status.COMPLETED and isinstance(heading, Toward) and _left(plan, heading):
                    return Status.DRIFT_EXCEEDED  # there are nearer points, beyond what the noise of f lets through
                return failure
        return Status.COMPLETED

    def _try(self, at: Place, plan: Plan, length: float, snap: float) -> tuple[Place | None, Status]:
        """One step of the given length, or all the way to a destination on the level set that is nearer than `snap`.

        Returns:
            The place, or None and what stood in the way.
        """
        assert plan.direction is not None
        if self.end is not None and float(torch.linalg.vector_norm(self.end.image - at.image)) <= snap:
            return self.end, Status.COMPLETED
        guess = (at.image + length * plan.direction).clamp(0, 1)
        if float(torch.linalg.vector_norm(guess - at.image)) < 0.1 * length:
            return None, Status.COMPLETED if plan.stationarity is not None else Status.BOX_BLOCKED
        there = self.corrector.correct(guess, length)
        if there is None:
            return None, Status.DRIFT_EXCEEDED
        # A heading that accepts no corrected point is at the end of its way, to the accuracy of f.
        return (there if self.heading.accepts(at, there) else None), Status.COMPLETED

    def _record(self, at: Place, plan: Plan) -> None:
        """Add a point; of one that is there, say what a newer plan knows of it."""
        x = at.image
        if self.path and x is self.at:
            left, known = plan.stationarity, self.path[-1].stationarity
            if isinstance(self.heading, Toward) and left is not None and known is not None:
                left = min(left, known)  # both are bounds
            self.path[-1] = replace(self.path[-1], stationarity=left)
            return
        offset = (x - self.origin).double()
        l2 = float(torch.linalg.vector_norm(offset))
        moved = float(torch.linalg.vector_norm((x - self.at).double())) if self.path else 0.0
        remaining = None
        if isinstance(self.heading, Toward):
            remaining = float(torch.linalg.vector_norm((self.heading.destination - x).double()))
        point = WalkPoint(
            image=self.index,
            step=len(self.path),
            drift=at.drift,
            arc_length=self.path[-1].arc_length + moved if self.path else 0.0,
            l2=l2,
            linf=float(offset.abs().max()),
            psnr_db=10 * math.log10(x.numel() / l2**2) if l2 > 0 else math.inf,
            remaining=remaining,
            stationarity=plan.stationarity,
            num_evals=self.corrector.num_evals,
            pixels=x,
        )
        self.at = x
        self.path.append(point if self.keep_points else replace(point, pixels=None))
        if self.progress is not None:
            self.progress(point)
