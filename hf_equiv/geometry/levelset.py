"""Walk along the images that share an embedding, with every point corrected back to f(x) = z.

A step has a predictor x + h·t, with t = P_null v the part of the heading v that J maps to zero, and a corrector
(`Corrector`). Pixels on a bound that would leave the box are taken out of J. The length h is halved when the
corrector fails or the heading rejects the point, and grows again after easy corrections. The linear model of the
corrector learns single rows on the way; a full Jacobian is formed again only after failures that its age may explain.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_equiv import bars, checks
from hf_equiv.checks import UNIT, Bounds, is_image
from hf_equiv.conditions import admit
from hf_equiv.geometry.corrector import Corrector, Place
from hf_equiv.geometry.headings import Ahead, Heading, Plan, Toward
from hf_equiv.memory import MEMORY
from hf_equiv.passes import Work, at_once, measure_images
from hf_equiv.precision import Encoding, no_autocast, no_tf32
from hf_equiv.results import Status

STOP = 0.01  # default stationarity at which a walk to an image ends
TO_AN_IMAGE = ("toward", "nearest", "connect")  # headings that lead to an image
HEADINGS = ("random", "away", *TO_AN_IMAGE)  # names of the headings
_MAX_FAILURES = 10  # halvings of one step
_REFRESH_AFTER = 5  # halvings before a full Jacobian is formed anew
_SHRUNK = 0.25  # share of the longest step since the last Jacobian below which another is worth its cost
_SNAP = 0.1  # share of the allowed step within which a walk jumps to its destination
_HOPS = 50  # most steps between two points


def at_rest(stop: float) -> float:
    """Return the stationarity at which a walk without a nearer point is complete: ten times `stop`, at most 0.1."""
    return max(stop, min(10 * stop, 0.1))


@dataclass(frozen=True, slots=True)
class WalkPoint:
    """A point of a walk: an image whose embedding is z up to `drift`."""

    image: int  # index in the batch
    step: int  # 0 for the start
    drift: float  # ‖f(x) − z‖ / ‖z‖
    arc_length: float  # sum of the L2 distances between the points so far
    l2: float  # ‖x − origin‖₂
    linf: float  # ‖x − origin‖_∞
    # PSNR of x against the origin, −10 log₁₀ mean (x − origin)² / (upper − lower)²; infinite at the origin. Without a
    # box the range is taken as 1.
    psnr_db: float
    remaining: float | None  # L2 distance to the destination; None without one
    # ‖P_null d‖ / ‖d‖: a bound for d = destination − x, the model's value for d = x − origin; None for a fixed heading
    stationarity: float | None
    num_evals: float  # evaluations spent on the walk so far
    pixels: Tensor | None = field(repr=False)  # x, (*shape); None unless `keep_points`


@dataclass(eq=False)
class Walk:
    """A walk from one image: `path` has the points so far, `at` the pixels of the last, and `status` the end."""

    index: int  # index of the image in its batch
    corrector: Corrector
    heading: Heading
    origin: Tensor
    step: float
    keep_points: bool
    progress: Callable[[WalkPoint], None] | None
    path: list[WalkPoint] = field(default_factory=list)
    end: Place | None = None  # the destination if it lies on the level set
    at: Tensor = field(init=False)
    width: float = field(init=False)  # of the box
    most: float = 0.0  # longest step
    h: float = 0.0  # length of the next step
    failures: int = 0
    learnt: bool = False  # whether A changed since the last full Jacobian
    longest: float = 0.0  # longest step since then
    reconsidered: bool = False  # whether the heading has replaced its plan after a rejected step

    def run(self, start: Tensor, num_steps: int) -> Work[Status]:
        """Bring the start to the level set and step from point to point until all are made or no step succeeds."""
        self.at, self.width = start, self.corrector.bounds[1] - self.corrector.bounds[0]
        self.h = self.most = min(self.step, self.width * math.sqrt(start.numel()))  # no step is longer than the box
        if self.corrector.f.noise > self.corrector.rtol:  # no drift that f states is below rtol for certain
            return Status.DRIFT_EXCEEDED
        corrector, heading, (low, high) = self.corrector, self.heading, self.corrector.bounds
        if isinstance(heading, Toward):
            end = yield from corrector.look(heading.destination)
            self.end = end if end.drift <= corrector.rtol else None
        at = yield from corrector.look(start)
        yield from corrector.refresh(at)
        if not (math.isfinite(at.drift) and corrector.model.finite):
            return Status.ERROR
        if at.drift > corrector.rtol:
            corrected = yield from corrector.correct(start, math.inf)
            if corrected is None:
                return Status.DRIFT_EXCEEDED
            at = corrected
        plan = yield from self._plan(at)
        self._record(at, plan)
        if plan.direction is None and plan.stationarity is None:
            if bool(((start > low) & (start < high)).all()):  # otherwise the box may be the cause
                raise ValueError(
                    "`heading` must have a part in the null space of J; got less than 0.1 % of it for image "
                    f"{self.index}. Directions in the row space change the embedding; for D ≥ N there may be no others."
                )
        since, hops = 0.0, 0  # length and steps since the last point
        while len(self.path) <= num_steps:
            if plan.direction is None and self.learnt and isinstance(heading, Ahead):  # A may be wrong
                plan = yield from self._renew(at)
                continue
            if plan.direction is None:
                self._record(at, plan)
                return Status.COMPLETED if plan.stationarity is not None else Status.BOX_BLOCKED
            if self.learnt and corrector.stale and self.h < min(plan.length, _SHRUNK * self.longest):
                self.longest = 0.0
                plan = yield from self._renew(at)
                continue
            length = min(self.h, plan.length)
            there, failure = yield from self._try(at, plan, length, max(length, _SNAP * self.h))
            if there is None:
                plan, ended = yield from self._fail(at, plan, length, failure)
                if ended is not None:
                    return ended
                continue
            self.h = min(self.most, self.h * heading.pace(corrector.trials))
            self.failures, self.learnt, self.reconsidered = 0, True, False
            self.longest = max(self.longest, length)
            since, hops = since + float(torch.linalg.vector_norm(there.image - at.image)), hops + 1
            at = there
            plan = yield from self._plan(at)
            if plan.direction is None or since >= heading.spacing * self.most or hops == _HOPS:
                if len(self.path) == num_steps and self._unfinished(plan):  # the last point gets a good estimate
                    plan = yield from self._renew(at)
                self._record(at, plan)
                since, hops = 0.0, 0
        return Status.COMPLETED

    def _plan(self, at: Place) -> Work[Plan]:
        return (yield from self.heading.plan(self.corrector, at, self.h))

    def _renew(self, at: Place) -> Work[Plan]:
        """Plan again with a full Jacobian."""
        yield from self.corrector.refresh(at)
        self.learnt = False
        return (yield from self._plan(at))

    def _unfinished(self, plan: Plan) -> bool:
        """Whether the walk to an image is not at rest: too much of the way is left."""
        return isinstance(self.heading, Toward) and (plan.stationarity or 0.0) > at_rest(self.heading.stop)

    def _fail(self, at: Place, plan: Plan, length: float, failure: Status) -> Work[tuple[Plan, Status | None]]:
        """Return the plan after a failed step, and the status of the walk if it ends here."""
        if failure is Status.COMPLETED and not self.reconsidered and isinstance(self.heading, Toward):
            self.reconsidered = self.heading.reconsider()
            if self.reconsidered:
                return (yield from self._plan(at)), None
        if failure is Status.DRIFT_EXCEEDED and self.learnt and self.corrector.stale:
            return (yield from self._renew(at)), None
        self.h, self.failures = length / 2, self.failures + 1
        if self.failures == _REFRESH_AFTER and self.learnt:
            plan = yield from self._renew(at)
        if self.failures < _MAX_FAILURES:
            return plan, None
        self._record(at, plan)
        if failure is Status.COMPLETED and self._unfinished(plan):
            failure = Status.DRIFT_EXCEEDED  # nearer points exist, but the noise of f hides them
        return plan, failure

    def _try(self, at: Place, plan: Plan, length: float, snap: float) -> Work[tuple[Place | None, Status]]:
        """Make one step, or jump to a destination within `snap`; return the place, or None and the reason."""
        assert plan.direction is not None
        if self.end is not None and float(torch.linalg.vector_norm(self.end.image - at.image)) <= snap:
            return self.end, Status.COMPLETED
        guess = (at.image + length * plan.direction).clamp(*self.corrector.bounds)
        if float(torch.linalg.vector_norm(guess - at.image)) < 0.1 * length:
            return None, Status.COMPLETED if plan.stationarity is not None else Status.BOX_BLOCKED
        there = yield from self.corrector.correct(guess, length)
        if there is None:
            return None, Status.DRIFT_EXCEEDED
        # If the heading rejects every corrected point, the walk has arrived, to the accuracy of f.
        return (there if self.heading.accepts(at, there) else None), Status.COMPLETED

    def _record(self, at: Place, plan: Plan) -> None:
        """Add a point; if it is there already, update its stationarity from a newer plan."""
        x = at.image
        if self.path and x is self.at:
            left, known = plan.stationarity, self.path[-1].stationarity
            if isinstance(self.heading, Toward) and left is not None and known is not None:
                left = min(left, known)  # both are bounds
            self.path[-1] = replace(self.path[-1], stationarity=left)
            return
        offset = (x - self.origin).double()
        l2, peak = float(torch.linalg.vector_norm(offset)), self.width if math.isfinite(self.width) else 1.0
        moved = _distance(x, self.at) if self.path else 0.0
        point = WalkPoint(
            image=self.index,
            step=len(self.path),
            drift=at.drift,
            arc_length=self.path[-1].arc_length + moved if self.path else 0.0,
            l2=l2,
            linf=float(offset.abs().max()),
            psnr_db=10 * math.log10(x.numel() * peak**2 / l2**2) if l2 > 0 else math.inf,
            remaining=_distance(self.heading.destination, x) if isinstance(self.heading, Toward) else None,
            stationarity=plan.stationarity,
            num_evals=self.corrector.num_evals,
            pixels=x,
        )
        self.at = x
        self.path.append(point if self.keep_points else replace(point, pixels=None))
        if self.progress is not None:
            self.progress(point)


def _distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm((a - b).double()))


@dataclass(frozen=True, slots=True)
class WalkResult:
    """Walks along level sets, one per image of the batch.

    Attributes:
        images: last point of each walk, (B, *shape); the start if no point was reached.
        paths: points of each walk in order; every one has drift ≤ rtol.
        num_evals: cost of each walk, (B,), float64: (forwards + 2·cotangents) / 3, full Jacobians included.
        num_jacobians: full Jacobians among them, (B,), int64.
        seconds: wall time of each walk, (B,), float64, with an equal part of the time of each shared pass.
        status: per image: completed (all steps made, or no further one is wanted), drift_exceeded, box_blocked, error.
    """

    images: Tensor
    paths: tuple[tuple[WalkPoint, ...], ...]
    num_evals: Tensor
    num_jacobians: Tensor
    seconds: Tensor
    status: tuple[Status, ...]

    @property
    def completed(self) -> bool:
        """Whether every walk is complete."""
        return all(s is Status.COMPLETED for s in self.status)

    def __repr__(self) -> str:
        """State the number of walks, their statuses, distance and drift in one line."""
        ends = ", ".join(f"{n} {status}" for status, n in Counter(map(str, self.status)).items())
        reach = max((path[-1].l2 for path in self.paths if path), default=0.0)
        drift = max((point.drift for path in self.paths for point in path), default=math.nan)
        return f"WalkResult({ends}; L2 up to {reach:.3g}; drift up to {drift:.1e}; {self.num_evals.sum():.0f} evals)"


def trace_level_set(
    f: Encoding,
    images: Tensor,
    *,
    heading: str | Tensor,
    step: float = 1.0,
    num_steps: int = 100,
    rtol: float = 1e-5,
    target: Tensor | None = None,
    origin: Tensor | None = None,
    stop: float = STOP,
    generator: torch.Generator | None = None,
    keep_points: bool = False,
    batch: int = 32,
    memory: int = MEMORY,
    bounds: Bounds = UNIT,
    progress: Callable[[WalkPoint], None] | bool | None = None,
) -> WalkResult:
    """Walk from each image through the images with the same embedding, {x in the box : f(x) = z}.

        heading   v                 from          z                       ends early
        random    Gaussian, fixed   any image     f(images)               -
        (tensor)  as given          any image     f(images)               -
        away      x − origin        any image     f(images)               no farther image near
        toward    target − x        any image     f(images)               no nearer image near
        nearest   origin − x        a match       f(images), or target's  no nearer image near
        connect   target − x        a match       target's                no nearer image near, or there

    Cost: one full Jacobian, (1 + 2D)/3 evaluations; then, on a trained DeiT-Tiny, about 12 evaluations per unit of L2
    length, more towards an image. Memory of a walk: D·N numbers, the activations of two images, and 40 images for a
    destination; its Jacobian takes the activations of `batch` images. On a GPU walks go side by side in shared passes:
    at most `batch`, with Jacobians of at most `memory` bytes. A pass that runs out of memory is halved, and a walk that
    fails alone has the status `error` if there are others.

    Args:
        f: the encoder, or any callable (B, *shape) -> (B, D), differentiable in reverse mode.
        images: starting points, (B, *shape), float32 or float64, within `bounds`.
        heading: "random", "away", "toward", "nearest" or "connect"; or directions (B or 1, *shape).
        step: longest predictor step, L2 in pixel units. Points of walks to an image are `step`/4 or 50 steps apart.
        num_steps: most points after the start.
        rtol: largest ‖f(x) − z‖/‖z‖ of any point. Below about 5e-6 float32 noise ends most walks (`drift_exceeded`),
            and below the measured noise of f none starts.
        target: destination of toward and connect, (B or 1, *shape); else the pixels or embedding of the level set.
        origin: reference of l2, linf and psnr_db, (B or 1, *shape); default: the start.
        stop: ‖P_null d‖/‖d‖ at which a walk to an image ends. On a trained ViT 0.01 may be out of reach.
        generator: source of the random heading, on the CPU; None for one with seed 0.
        keep_points: whether the points keep their pixels.
        batch: most cotangents per pass, and most walks side by side; a CPU takes at most 8, and one walk.
        memory: most bytes of the Jacobians held at once; at least one image is worked on, and on a CPU one.
        bounds: the box of all points, which all images must lie in; None for none. By default pixels in [0, 1].
        progress: receives every `WalkPoint` with its pixels; an exception raised in it ends the walks. By default a
            bar in a terminal or notebook; False for none.

    Returns:
        The points of every walk with its cost and status.

    Raises:
        TypeError: `images` is not a float32 or float64 tensor.
        ValueError: an unknown heading, one in the row space, no target or origin, or a Jacobian too large to hold.

    Example:
        >>> import torch
        >>> from hf_equiv import trace_level_set
        >>> x = torch.tensor([0.9, 0.5], dtype=torch.float64).view(1, 1, 1, 2)
        >>> trace_level_set(lambda x: (x.flatten(1) - 0.5).norm(dim=1)[:, None], x, heading="away", step=0.1).completed
        True

    References:
        Allgower, Georg (1990), Numerical Continuation Methods, ch. 2-3. Salman et al. (2024), arXiv:2401.15568, §4.
    """
    checks.check_images(images, bounds=bounds)
    if images.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"`images` must be float32 or float64; got {images.dtype}. Walks need that accuracy.")
    checks.check_positive(step, "step")
    checks.check_positive(rtol, "rtol")
    checks.check_positive(stop, "stop", 1)
    checks.check_count(num_steps, "num_steps")
    checks.check_count(batch, "batch")
    checks.check_count(memory, "memory")
    if heading == "nearest" and origin is None:
        raise ValueError("`origin` must be given for heading 'nearest'. Pass the source of the match.")
    images = images.detach().clone(memory_format=torch.contiguous_format)
    home = images if origin is None else _pixels(origin, images, "origin", bounds)
    aims = _aims(heading, images, home, target, generator, bounds)
    goal = images if target is None or heading == "toward" else target  # its embedding is z
    checks.check_target(goal, images, bounds=bounds)
    box = checks.check_bounds(bounds, images)
    with torch.inference_mode(False), no_tf32():
        f = admit(f, images, noise=True, bounds=bounds)
        z = _embeddings(f, images, goal.detach())

        def measure(b: int) -> Work[dict[str, Any]]:
            corrector = Corrector(f, z[b], rtol, box)
            corrector.num_evals = 1 / 3 if is_image(goal, images) else 0.0  # of z
            way: Heading
            if heading in TO_AN_IMAGE:
                way = Toward(aims[b], stop)
            else:
                way = Ahead(aims[b], home[b] if heading == "away" else None)
            walk = Walk(b, corrector, way, home[b], step, keep_points, hook)
            try:
                status = yield from walk.run(images[b], num_steps)
            except torch.OutOfMemoryError:
                if len(images) == 1:
                    raise
                status = Status.ERROR
            return {
                "images": walk.at,
                "paths": tuple(walk.path),
                "num_evals": corrector.num_evals,
                "num_jacobians": torch.tensor(corrector.num_jacobians, device="cpu"),
                "status": status,
            }

        steps = [0] * len(images)

        def read(point: WalkPoint) -> tuple[float, str]:
            steps[point.image] = point.step
            done = sum(steps) / (num_steps * len(images))
            return done, f"L2 {point.l2:.3g}, drift {point.drift:.1e}, {point.num_evals:.0f} evaluations"

        with bars.shown(progress, "walk", read) as hook, no_autocast():
            return WalkResult(**measure_images(images, measure, count=at_once(f, images, batch, memory), most=batch))


def _embeddings(f: Encoding, images: Tensor, goal: Tensor) -> Tensor:
    """Return the embeddings z (B, D) of the level sets, float64: those of images, from one at a time, or as given."""
    if is_image(goal, images):
        with torch.no_grad():
            goal = torch.cat([f(one) for one in goal.to(images).split(1)])
        checks.check_embeddings(goal)
    return goal.to(images.device, torch.float64).expand(len(images), -1)


def _aims(
    heading: str | Tensor, images: Tensor, home: Tensor, target: Tensor | None, generator: torch.Generator | None,
    bounds: Bounds
) -> Tensor:  # fmt: skip
    """Return the direction or destination of each walk, (B, *shape)."""
    if isinstance(heading, Tensor):
        shape = heading.shape
        if shape[:1] not in ((1,), images.shape[:1]) or shape[1:] != images.shape[1:]:
            raise ValueError(f"`heading` must have the shape of `images` {tuple(images.shape)}; got {tuple(shape)}.")
        norms = heading.detach().flatten(1).norm(dim=1)
        if not bool((torch.isfinite(norms) & (norms > 0)).all()):
            raise ValueError("`heading` must be finite and not zero: a zero vector has no direction.")
        return heading.detach().to(images).expand_as(images)
    if heading not in HEADINGS:
        raise ValueError(f"`heading` must be one of {', '.join(HEADINGS)}, or a tensor; got {heading!r}.")
    if heading == "random":
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        return torch.randn(images.shape, generator=generator, dtype=torch.float64, device="cpu").to(images)
    if heading == "away":
        return torch.where(home <= (0.0 if bounds is None else sum(bounds) / 2), 1.0, -1.0).to(images)
    if heading == "nearest":
        return home
    if target is None or not is_image(target, images):
        raise ValueError(f"`target` must be images (B, *shape) for heading {heading!r}. Pass the image to walk to.")
    return _pixels(target, images, "target", bounds)


def _pixels(value: Tensor, images: Tensor, name: str, bounds: Bounds) -> Tensor:
    checks.check_like(value, images, name, bounds=bounds)
    return value.detach().to(images).expand_as(images)
