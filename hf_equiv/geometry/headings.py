"""Choose the next tangent direction of a level set, ahead or towards an image, and correct the step along it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv.geometry.corrector import Corrector, Place
from hf_equiv.passes import Work
from hf_equiv.precision import dot

MAX_PRODUCTS = 40  # most products with the Hessian in one Newton step
_MEMORY = 20  # secant pairs of the descent towards an image
_SMALLEST = 1e-3  # least share of a wish that projection must leave
_ROUNDS = 10  # most rows learnt at one point before its tangent is used as it is
_ACTIVE = 60  # most Newton steps in a projection on the tangent cone
_LEAST = 2.0**-20  # least step length of that projection
_ROUNDING = 30  # in eps times the length of a wish: a shorter tangent is rounding
_CLOSE = 1.1  # largest ‖e‖ / ‖t‖ at which a tangent counts as true
_EASY, _HARD, _FAIR = 8, 25, 16  # corrector trials for an easy, a hard and a fair step
_NEAR = 0.12  # stationarity below which Newton steps are worth their products with the Hessian
_PROBE = 0.01  # L2 length of the differences that replace products with the Hessian
_ACCURACY = 0.2  # accuracy of a Newton step
_POOR, _FINE = 0.4, 0.75  # the radius shrinks below and grows above these shares of the predicted gain


@dataclass(frozen=True, slots=True)
class Step:
    """A step p and its figures in the quadratic model."""

    step: Tensor  # p, with the shape of the gradient
    slope: float  # ⟨g, p⟩
    curvature: float  # ⟨p, H p⟩
    bound: bool  # whether p ends on the sphere ‖p‖ = radius

    def gain(self, share: float) -> float:
        """Return the gain of `share`·p in the model: share·⟨g, p⟩ − ½·share²·⟨p, H p⟩."""
        return share * self.slope - 0.5 * share**2 * self.curvature


def newton_step(
    hessian: Callable[[Tensor], Work[Tensor]], gradient: Tensor, radius: float, accuracy: float
) -> Work[Step]:
    """Maximise ⟨g, p⟩ − ½⟨p, H p⟩ over ‖p‖ ≤ radius by truncated conjugate gradients, at least as far as along g."""
    # The iteration ends where ‖g − H p‖ ≤ accuracy·‖g‖ or on the sphere; along directions of negative curvature it goes
    # on to the sphere. H is symmetric up to noise, and g is not zero. Steihaug (1983), SIAM J. Numer. Anal. 20,
    # 626–637; Nocedal, Wright (2006), Numerical Optimization, alg. 7.2.
    p, image = torch.zeros_like(gradient), torch.zeros_like(gradient)
    residual = gradient.clone()
    search, size = residual.clone(), dot(residual, residual)
    enough, bound = accuracy**2 * size, False
    for _ in range(MAX_PRODUCTS):
        bent = yield from hessian(search)
        curvature = dot(search, bent)
        length = size / curvature if curvature > 0 else math.inf
        ahead = _to_sphere(p, search, radius)
        bound = not length < ahead
        length = min(length, ahead)
        p, image = p + length * search, image + length * bent
        if bound:
            break
        residual = residual - length * bent
        before, size = size, dot(residual, residual)
        if size <= enough:
            break
        search = residual + (size / before) * search
    return Step(p, dot(gradient, p), dot(p, image), bound)


def _to_sphere(p: Tensor, v: Tensor, radius: float) -> float:
    """Return the t ≥ 0 with ‖p + t v‖ = radius."""
    a, b, c = dot(v, v), dot(p, v), dot(p, p) - radius**2
    root = math.sqrt(max(0.0, b * b - a * c))
    return (root - b) / a if b <= 0 else -c / (root + b)


@dataclass(frozen=True, slots=True)
class Plan:
    """The next move from a point."""

    direction: Tensor | None  # tangent t (*shape) of unit length: A t = 0 on the free pixels; None at the end
    length: float  # the step that the heading would take without other limits
    stationarity: float | None = None  # ‖P_null d‖ / ‖d‖, see `WalkPoint`


class Ahead:
    """Follow the projection of a fixed direction v, or go away from an image as fast as the distance grows.

    With an `origin`, v = x − origin once that is not zero. Points are at least `spacing` longest steps apart.
    """

    spacing = 0.0

    def __init__(self, direction: Tensor, origin: Tensor | None = None) -> None:
        self.direction, self.origin = direction, origin

    def plan(self, corrector: Corrector, at: Place, reach: float) -> Work[Plan]:
        """Project the heading, after A has learnt the row along the last drift: the bend of the level set there."""
        wish = self.direction
        if self.origin is not None and bool((at.image != self.origin).any()):
            wish = at.image - self.origin
        yield from corrector.learn(at, corrector.bend)
        tangent, _ = _tangent(corrector, at, wish)
        length = _norm(tangent)
        share = length / _norm(wish)
        direction = tangent / length if share > _SMALLEST else None
        return Plan(direction, math.inf, None if self.origin is None else share)

    def accepts(self, at: Place, there: Place) -> bool:
        """Whether a corrected point is a step of this heading: any for a fixed direction, else a farther one."""
        if self.origin is None:
            return True
        moved = there.image - at.image
        return dot(moved, (at.image + there.image) / 2 - self.origin) > 0.0

    def pace(self, trials: int) -> float:
        """Return the factor for the next step; many corrector trials mean that A has reached its limits."""
        return 1.5 if trials <= _EASY else 0.7 if trials > _HARD else 1.0


class Toward:
    """Descend ½‖x − destination‖² inside the level set: by L-BFGS from afar, by Newton steps near a stationary point.

    The gradient on the level set in the box is −P d with d = destination − x and P the projection on its tangent cone,
    {t : J t = 0, t inwards or zero on the bounds}. Once A has learnt the row along λ, e = d − Jᵀλ is exact, and
    ‖P d‖ ≤ ‖e without its outward parts on the bounds‖ for any λ (Moreau): that over ‖d‖ certifies a stationary point
    without the full Jacobian there, and below `stop` the search for a nearer image ends.

    A point is off the level set by r = f(x) − z, so gains are measured in the Lagrangian ½‖d‖² + λᵀr (Nocedal, Wright
    2006, §18.1). L-BFGS learns its Hessian H = P (I + ∇²(λᵀf)) P from the steps so far; a Newton step computes products
    with it as differences of Jᵀλ, for an evaluation each.
    """

    spacing = 0.25

    def __init__(self, destination: Tensor, stop: float) -> None:
        self.destination, self.stop = destination, stop
        self.pairs: list[tuple[Tensor, Tensor, float]] = []
        self.last: tuple[Tensor, Tensor] | None = None
        self.slope = 0.0
        self.multipliers: Tensor
        self.newton: Step | None = None
        self.radius = math.inf

    def plan(self, corrector: Corrector, at: Place, reach: float) -> Work[Plan]:
        """Find the descent direction, if there is one."""
        wish = self.destination - at.image
        distance, model = _norm(wish), corrector.model
        if distance == 0.0:
            return Plan(None, 0.0, 0.0)
        bound = 1.0
        yield from corrector.learn(at, corrector.bend)
        tangent, multipliers = _tangent(corrector, at, wish)
        for _ in range(_ROUNDS):
            yield from corrector.learn(at, multipliers)
            rest = wish - model.transpose(multipliers)
            bound = min(bound, _norm(rest * _inwards(at.image, rest, corrector.bounds)) / distance)
            tangent, multipliers = _tangent(corrector, at, wish)
            if bound <= max(self.stop, _CLOSE * _norm(tangent) / distance):
                break
        self.multipliers = multipliers
        if self.stop < bound <= (_NEAR if self.newton is None else 2 * _NEAR):
            return (yield from self._newton(corrector, at, tangent, multipliers, reach, bound))
        self.newton = None
        if bound <= self.stop or _norm(tangent) == 0.0:
            return Plan(None, 0.0, bound)
        if self.last is not None:
            s, y = at.image - self.last[0], self.last[1] - tangent
            curvature = dot(s, y)
            if curvature > 1e-8 * _norm(s) * _norm(y):
                self.pairs = [*self.pairs[1 - _MEMORY :], (s, y, curvature)]
        self.last = at.image, tangent
        direction = model.project_null(self._descent(tangent))
        self.slope = dot(direction, tangent)
        if not self.slope > 0.1 * _norm(direction) * _norm(tangent):
            self.pairs.clear()
            direction, self.slope = tangent, dot(tangent, tangent)
        length = _norm(direction)
        self.slope /= length
        return Plan(direction / length, length, bound)

    def accepts(self, at: Place, there: Place) -> bool:
        """Whether a corrected point achieves a share of the predicted gain."""
        moved = there.image - at.image
        # ½‖x − P‖² − ½‖y − P‖² = ⟨y − x, P − (x + y)/2⟩ avoids the difference of two large numbers
        gain = dot(moved, self.destination - (at.image + there.image) / 2)
        gain -= float(self.multipliers @ (there.residual - at.residual))
        if self.newton is None:
            self.radius = 2 * _norm(moved)
            return gain >= 1e-4 * self.slope * _norm(moved)
        length, whole = _norm(moved), _norm(self.newton.step)
        ratio = gain / self.newton.gain(min(1.0, length / whole))
        if ratio < _POOR:
            self.radius = 0.5 * length
        elif ratio > _FINE and self.newton.bound and length > 0.9 * whole:
            self.radius = 2 * length
        return ratio > 0.1

    def pace(self, trials: int) -> float:
        """Return the factor for the next step, which aims at 16 corrector trials for each step."""
        return min(1.5, max(0.7, math.sqrt(_FAIR / max(1, trials))))

    def reconsider(self) -> bool:
        """Whether a plan without the curvature learnt so far may help after a rejected step."""
        if self.newton is not None or not self.pairs:
            return False
        self.pairs.clear()
        self.last = None
        return True

    def _newton(
        self, corrector: Corrector, at: Place, tangent: Tensor, multipliers: Tensor, reach: float, bound: float
    ) -> Work[Plan]:
        """Plan the step to the stationary point of the quadratic model of the Lagrangian."""
        here = yield from corrector.pull(at, multipliers)

        def hessian(v: Tensor) -> Work[Tensor]:
            probe = _PROBE / _norm(v)
            beside = yield from corrector.look(at.image + probe * v)
            there = yield from corrector.pull(beside, multipliers)
            return corrector.model.project_null(v + (there - here) / probe)

        self.pairs.clear()
        self.last = None
        self.newton = yield from newton_step(hessian, tangent, min(reach, self.radius), _ACCURACY)
        length = _norm(self.newton.step)
        return Plan(self.newton.step / length, length, bound)

    def _descent(self, tangent: Tensor) -> Tensor:
        """Return H·tangent by the two loops of L-BFGS."""
        q, weights = tangent.clone(), []
        for s, y, curvature in reversed(self.pairs):
            weights.append(dot(s, q) / curvature)
            q.add_(y, alpha=-weights[-1])
        if self.pairs:
            q *= self.pairs[-1][2] / dot(self.pairs[-1][1], self.pairs[-1][1])
        for (s, y, curvature), weight in zip(self.pairs, reversed(weights), strict=True):
            q.add_(s, alpha=weight - dot(y, q) / curvature)
        return q


Heading = Ahead | Toward


def _tangent(corrector: Corrector, at: Place, wish: Tensor) -> tuple[Tensor, Tensor]:
    """Project a wish on the tangent cone of the level set in the box; return the tangent t and multipliers λ (D,)."""
    # t = C(wish − Aᵀλ), where C removes what leads outwards on the bounds, and λ minimises the convex ½‖C(wish −
    # Aᵀλ)‖², whose gradient is −A t. Semismooth Newton steps λ + G_F⁺ A t, with F the pixels that C lets move, are
    # halved until they descend (Qi, Sun 2006, SIAM J. Matrix Anal. Appl. 28:360). They end when a whole step changes no
    # such pixel: then t is exact.
    x, model, box = at.image, corrector.model, corrector.bounds
    rest, multipliers = wish, wish.new_zeros(len(model.A), dtype=torch.float64)
    free, nothing = _inwards(x, wish, box), _ROUNDING * torch.finfo(x.dtype).eps * _norm(wish)
    for _ in range(_ACTIVE):
        model.hold(free)
        step = model.multipliers(rest)
        change = model.transpose(step)
        there, share = rest - change, 1.0
        now = _inwards(x, there, box)
        if not bool((free ^ now).any()):
            rest, multipliers = there, multipliers + step
            break
        height = _norm(rest * free)
        slope = dot(rest * free, change)
        while _norm(there * now) ** 2 > height**2 - 2e-4 * share * slope and share > _LEAST:
            share /= 2
            there = rest - share * change
            now = _inwards(x, there, box)
        rest, multipliers, free = there, multipliers + share * step, now
        if share <= _LEAST or _norm(rest * free) <= nothing:
            break
    model.hold(free)
    tangent = model.project_null(rest)
    blocked = free & ~_inwards(x, tangent, box)  # these pixels result from rounding or unfinished steps
    if bool(blocked.any()):
        model.hold(free & ~blocked)
        tangent = model.project_null(rest)
        tangent = tangent * _inwards(x, tangent, box)
    return (tangent if _norm(tangent) > nothing else torch.zeros_like(tangent)), multipliers


def _inwards(x: Tensor, step: Tensor, box: tuple[float, float]) -> Tensor:
    """Return the pixels off the bounds, and those that a step leads off them."""
    return ((x > box[0]) | (step > 0)) & ((x < box[1]) | (step < 0))


def _norm(v: Tensor) -> float:
    return math.sqrt(dot(v, v))
