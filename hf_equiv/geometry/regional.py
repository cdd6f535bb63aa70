"""Find the largest Lipschitz constant inside a ball, and estimate the rest by extreme values.

An ascent in point and direction gives a lower bound: v ← JᵀJv/‖JᵀJv‖ and x′ ← P_B(x′ + α·g) with g = ∇ₓ½‖J(x′)v‖²,
normalised (its sign for "linf"), both from one backward pass through a JVP. A step that does not increase ‖J(x′)v‖ is
undone and α halved. It starts at x and at the largest random point, which also serves where J is piecewise constant.

At a kink autograd may choose a derivative that no two points show. So the largest values are compared with secants
between points of the ball: ‖Jv‖ counts where secants tend to it, and elsewhere the largest secant less its noise does.

CLEVER takes two power iterations from the top direction of the centre at random points, uniform in the ball (then put
into the box), fits a reverse Weibull distribution to the maxima of batches and extrapolates to its end point, which may
be on either side of L. The original takes 500 batches of 1024 gradients of one output.

Weng et al. (2018), arXiv:1801.10578, §4 (CLEVER). Jordan, Dimakis (2020), arXiv:2003.01219, eq. 3 (L).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_equiv import bars, checks
from hf_equiv.checks import UNIT, Bounds
from hf_equiv.conditions import Function, admit
from hf_equiv.derivatives import forward_mode
from hf_equiv.geometry.directions import by_image
from hf_equiv.geometry.lipschitz import pixel_std, unit_factor
from hf_equiv.geometry.secants import secant_noise
from hf_equiv.geometry.singular import in_double
from hf_equiv.jacobian import Jacobian, Jacobians
from hf_equiv.matching.feasible import FeasibleSet
from hf_equiv.memory import unless_memory
from hf_equiv.passes import Work, alone, measure_images
from hf_equiv.precision import Encoding, exact_derivatives, no_autocast, no_tf32
from hf_equiv.results import Status

_SPAN = 1e4  # largest distance tried from the largest maximum to the end point, in spreads of the maxima
_GRID, _ZOOMS = 161, 6  # points and refinements in the search for the end point
_WARMUP = 20  # power iterations at the centre
_SAMPLE_POWER = 2  # power iterations at a random point
_INWARDS, _CLOSER = 2.0**-5, 4  # first distance of a secant from x′, as a part of the way inwards, and distances tried
_WITHIN = 0.9  # part of the room for a secant that it takes
_NOISY = 2e-3  # noise of a secant, as a part of the constant, that ends the approach
_AT_ONCE = 8  # most random points in a pass on a GPU, with the activations of 24 images; a CPU takes one
_STEP, _LEAST_STEP = 0.5, 1e-3  # first and last step of the ascent, divided by the radius


def fit_reverse_weibull(maxima: Tensor) -> tuple[float, float, float]:
    """Fit F(y) = exp(−((a − y)/b)^c), y ≤ a, c ≥ 1, to at least 5 maxima by maximum likelihood; return a, b, c."""
    # For a fixed end point a the distances a − y are Weibull distributed; b has a closed form and c the usual
    # one-dimensional equation, solved by bisection. The likelihood is then searched over a > max y on a grid that is
    # refined six times. For c < 1 it grows without bound as a → max y, so those fits are left out. If all maxima are
    # equal to rounding, the result is (max y, 0, ∞); if the likelihood still grows as a → ∞, the maxima show no end of
    # the tail and it is NaN. Smith (1985), Biometrika 72:67 (likelihoods with an unknown end point).
    y = maxima.detach().double().flatten().cpu()
    if len(y) < 5 or not bool(torch.isfinite(y).all()):
        raise ValueError(f"`maxima` must be at least 5 finite numbers; got {len(y)}. Draw more batches.")
    largest, spread = float(y.max()), float(y.max() - y.min())
    if spread <= 1e-9 * abs(largest):
        return largest, 0.0, math.inf
    low, high = 1e-4, _SPAN
    for zoom in range(_ZOOMS):
        gaps = torch.logspace(torch.tensor(low).log10().item(), torch.tensor(high).log10().item(), _GRID).double()
        likelihood, shape = _profile(largest + spread * gaps[:, None] - y)
        likelihood = torch.where(shape >= 1, likelihood, -torch.inf)
        best = int(likelihood.argmax())
        if not bool(likelihood[best].isfinite()) or (zoom == 0 and best == _GRID - 1):
            return math.nan, math.nan, math.nan
        low, high = float(gaps[max(0, best - 1)]), float(gaps[min(_GRID - 1, best + 1)])
    distances = largest + spread * gaps[best] - y
    c = float(shape[best])
    return float(largest + spread * gaps[best]), float(distances.pow(c).mean().pow(1 / c)), c


def _profile(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest log-likelihood over (b, c) of Weibull distances (G, M), and its c, (G,) each."""
    logs = distances.log()
    mean = logs.mean(dim=1)
    low, high = torch.full_like(mean, 1e-3), torch.full_like(mean, 1e7)
    for _ in range(80):
        c = (low * high).sqrt()
        share = torch.softmax(c[:, None] * logs, dim=1)
        rising = (share * logs).sum(dim=1) - 1 / c - mean < 0  # increases in c, 0 at the maximum
        low, high = torch.where(rising, c, low), torch.where(rising, high, c)
    # log b^c = log mean t^c
    scale = torch.logsumexp(c[:, None] * logs, dim=1) - torch.tensor(float(logs.shape[1]), dtype=logs.dtype).log()
    return logs.shape[1] * (c.log() - scale + (c - 1) * mean - 1), c


@dataclass(frozen=True, slots=True)
class RegionalResult:
    """The largest constants found inside a ball about each of B images.

    Lengths are L2 norms in pixel units whatever the norm of the ball; constants are embedding length per pixel length.

    Attributes:
        lower_bound: largest ‖J(x′)v‖ found that secants in the ball confirm, or the largest secant less noise, (B,),
            float64: the Lipschitz constant of f in the ball is at least this.
        at_center: ‖J(x)v‖ at the image itself after power iterations, a lower bound of its σ₁, or `lower_bound` if that
            is less, as at a kink, (B,), float64.
        images: x′ where the bound is attained, (B, *shape), in the ball and the box.
        directions: the unit v there, (B, *shape).
        clever: extreme-value estimate of the largest σ₁ in the ball, (B,), float64; neither an upper nor a lower bound;
            NaN if the sample shows no end point, or none was asked for.
        sample_maxima: largest constant of each batch of random points, (B, num_batches), float64.
        unit_factor: factor from `lower_bound` to normalised-pixel units, (B,), float64; NaN without std.
        status: per image `completed` or `error`.
        num_evals: cost of each image, (B,), float64: (forwards + 2·cotangents + 2·tangents) / 3.
        seconds: wall time of each image, (B,), float64.
    """

    lower_bound: Tensor
    at_center: Tensor
    images: Tensor
    directions: Tensor
    clever: Tensor
    sample_maxima: Tensor
    unit_factor: Tensor
    status: tuple[Status, ...]
    num_evals: Tensor
    seconds: Tensor

    def __repr__(self) -> str:
        """State the number of images, and the largest constants in the ball and at its centre, in one line."""
        found, center = (
            ", ".join(f"{v:.4g}" for v in values.tolist()) for values in (self.lower_bound, self.at_center)
        )
        return f"RegionalResult({len(self.status)} images: at least {found}; at the centre {center})"


def regional_lipschitz(
    f: Encoding,
    images: Tensor,
    radius: float,
    norm: str = "l2",
    *,
    num_steps: int = 40,
    num_batches: int = 12,
    batch_size: int = 4,
    std: Tensor | Sequence[float] | None = None,
    generator: torch.Generator | None = None,
    bounds: Bounds = UNIT,
    progress: Callable[[int, int], None] | bool | None = None,
) -> RegionalResult:
    """Search a ball for the largest local Lipschitz constant of f, a lower bound of the constant on the whole ball.

    The Lipschitz constant of f over the convex set B = {x′ in the box: ‖x′ − x‖ ≤ radius} is

        L = max over x′ in B, ‖v‖₂ = 1 of ‖J(x′)v‖ ≥ the value found.

    Cost: 5/3 evaluations a step of each of two ascents, 11/3 a random point. Memory: `num_batches` ·
    `batch_size` images, and the activations of 24, on a CPU of three.

    Args:
        f: the encoder, or any callable (B, *shape) -> (B, D), twice differentiable by autograd.
        images: x, (B, *shape), within `bounds`.
        radius: radius of the ball, in pixel units of `norm`.
        norm: "l2" or "linf".
        num_steps: steps of each ascent.
        num_batches: maxima for the extreme-value fit, 0 for none, else at least 5.
        batch_size: random points behind each maximum.
        std: standard deviations by which f normalises, (C,), one for each entry of the first axis of an image; default
            from the encoder.
        generator: source of the random points, on the CPU; None for one with seed 0.
        bounds: the box of all points, which `images` must lie in; None for none. By default pixels in [0, 1].
        progress: called with (images done, images in all); by default a bar in a terminal or notebook, False for none.

    Returns:
        Bounds with their points and directions, and estimates.

    Raises:
        ValueError: values outside `bounds`, a bad radius, norm or count.
        RuntimeError: f has no forward-mode or no second derivative.

    Example:
        >>> import torch
        >>> from hf_equiv import regional_lipschitz
        >>> x = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)  # |slope| = 2|x|, at most 1.4 for x in [0.3, 0.7]
        >>> round(float(regional_lipschitz(lambda x: x.flatten(1).square(), x, 0.2).lower_bound), 10)
        1.4
    """
    checks.check_images(images, bounds=bounds)
    checks.check_radius(radius, norm, images[0].numel(), bounds=bounds)
    _check(radius, num_steps, num_batches, batch_size)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    scale = pixel_std(f, images, std)
    f = admit(f, images, bounds=bounds)

    def measure(b: int) -> Work[dict[str, Any]]:
        yield from ()  # random points share passes, images do not
        J = Jacobian(f, images[b].detach())
        J.check_deterministic()
        found = _Search(f, J, FeasibleSet.around(J.image, radius, norm, bounds), radius, norm, generator).run(
            num_steps, num_batches, batch_size
        )
        return {**found, "unit_factor": unit_factor(found["directions"][None], scale)[0].cpu()}

    with bars.shown(progress, "regional", bars.count) as hook:
        return RegionalResult(**measure_images(images, measure, hook))


def _check(radius: float, num_steps: int, num_batches: int, batch_size: int) -> None:
    if radius is None:
        raise ValueError("`radius` must be a number; got None. A ball of pixels, such as 0.5 for norm 'l2'.")
    checks.check_count(num_steps, "num_steps", least=0)
    checks.check_count(batch_size, "batch_size")
    checks.check_count(num_batches, "num_batches", least=0)
    if 0 < num_batches < 5:
        raise ValueError(f"`num_batches` must be 0 or at least 5; got {num_batches}. The fit has three parameters.")


class _Found(NamedTuple):
    """A constant with its point and direction."""

    value: float
    place: Tensor
    direction: Tensor


def _value(found: _Found) -> float:
    return found.value


class _Search:
    """The largest ‖J(x′)v‖ found so far in each part of the search of one ball."""

    def __init__(
        self, f: Function, at: Jacobian, box: FeasibleSet, radius: float, norm: str, generator: torch.Generator
    ) -> None:
        self.f, self.center, self.radius, self.norm, self.generator = f, at.image, radius, norm, generator
        self.box, self.at_once = box, _at_once(self.center)
        self.eps, self.num_evals = at.eps, at.num_evals
        self.found = [_Found(math.nan, self.center, _unit(self._gaussian()))]  # the largest of each part of the search

    def run(self, num_steps: int, num_batches: int, batch_size: int) -> dict[str, Any]:
        tops, constants = self._power(self.center[None], self.found[0].direction, _WARMUP)
        top, at_center = tops[0], float(constants)
        self._ascend(self.center, top, num_steps)
        self.found.append(_Found(math.nan, self.center, top))
        maxima, clever = torch.empty(0, dtype=torch.float64, device="cpu"), math.nan
        if num_batches:
            points = torch.stack([self._draw() for _ in range(num_batches * batch_size)])
            constants = self._power(points, top, _SAMPLE_POWER)[1].view(num_batches, batch_size)
            maxima = constants.nan_to_num(-math.inf, math.inf).amax(dim=1)
            maxima = torch.where(maxima.isfinite(), maxima, torch.nan)
            self._ascend(self.found[-1].place, self.found[-1].direction, num_steps)
            if bool(maxima.isfinite().all()):
                clever = fit_reverse_weibull(maxima)[0]
        best = self._rounded_down(self._confirmed())
        return {
            "lower_bound": best.value,
            "at_center": min(at_center, best.value),
            "images": best.place,
            "directions": best.direction,
            "clever": clever,
            "sample_maxima": maxima,
            "status": Status.COMPLETED if math.isfinite(best.value) else Status.ERROR,
            "num_evals": self.num_evals,
        }

    def _power(self, points: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Return the directions (K, *shape) after power iterations from `start` at K points, and ‖Jv‖ there, (K,)."""
        directions, constants = [], []
        for some in points.split(self.at_once):
            J, v = Jacobians(self.f, some), start.expand_as(some)
            for _ in range(steps):
                v = _units(J.pull(_units(J.push(v[None])[0])[None])[0], v)  # unit length keeps squares from overflowing
            directions.append(v)
            constants.append(J.push(v[None])[0].double().norm(dim=1))
            self.num_evals += J.num_evals
        found = torch.cat(directions), torch.cat(constants).cpu()
        for value, x, v in zip(found[1].tolist(), points, found[0], strict=True):
            self._offer(value, x, v)
        return found

    def _ascend(self, x: Tensor, v: Tensor, steps: int) -> None:
        """Climb on ‖J(x)v‖ from (x, v), inside the ball."""
        step, here = _STEP * self.radius, None
        trial = (x, v)
        for _ in range(steps + 1):
            value, slope, power = self._slopes(*trial)
            self._offer(value, *trial)
            if here is None or value > here[0]:
                here = (value, *trial, slope, power)
            else:
                step /= 2
            if not math.isfinite(here[0]) or step < _LEAST_STEP * self.radius:
                break
            _, x, v, slope, power = here
            heading = slope.sign() if self.norm == "linf" else _unit(slope)
            trial = (self._inside(x + step * heading), _unit(power, v))

    def _slopes(self, x: Tensor, v: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return φ = ‖J(x)v‖, and its gradients in x and in v."""
        with torch.inference_mode(False), torch.enable_grad(), exact_derivatives(), no_tf32(), no_autocast():
            place, along = (t.clone()[None].requires_grad_(True) for t in (x, v))
            moved = forward_mode(self.f, place, along)
            unit = _unit(moved.detach())  # gradients of ½‖Jv‖² without the factor ‖Jv‖, which might overflow
            try:
                slopes = torch.autograd.grad(moved, (place, along), unit, allow_unused=True)
            except unless_memory(RuntimeError) as error:
                raise RuntimeError(
                    "`f` must be twice differentiable for a regional constant; its derivative has no gradient. Use a "
                    "smooth f without rounding, detach or checkpointing."
                ) from error
        self.num_evals += 5 / 3
        slope, power = (torch.zeros_like(x) if g is None else g[0] for g in slopes)
        return float(moved.detach().double().norm()), slope, power

    def _offer(self, value: float, x: Tensor, v: Tensor) -> None:
        if math.isfinite(value) and not value <= self.found[-1].value:
            self.found[-1] = _Found(value, x, v)

    def _confirmed(self) -> _Found:
        """Return the largest constant that secants in the ball confirm."""
        best: _Found | None = None
        for one in sorted((one for one in self.found if one.value > 0), key=lambda one: -one.value):
            if best is not None and best.value >= one.value:
                break
            attained = self._attained(one)
            if attained is not one:  # take the derivative where the secant is
                J = Jacobian(self.f, attained.place)
                beside = attained._replace(value=float(J.mv(attained.direction[None]).double().norm()))
                self.num_evals += J.num_evals
                attained = beside if self._attained(beside) is beside else attained
            best = attained if best is None else max(best, attained, key=_value)
        return best or next((one for one in self.found if math.isfinite(one.value)), self.found[0])

    def _rounded_down(self, best: _Found) -> _Found:
        """Return a constant of a coarse f without its rounding, if that raised it."""
        coarse = self.eps > torch.finfo(torch.float32).eps
        exact = alone(in_double(self.f, best.place)) if coarse and math.isfinite(best.value) else None
        if exact is None:
            return best
        direction = best.direction.double()
        value = float(alone(exact.mv(direction[None])).norm()) / float(direction.norm())
        self.num_evals += exact.num_evals
        return best._replace(value=min(best.value, value))

    def _attained(self, one: _Found) -> _Found:
        """Return a constant found if secants near x′ along v tend to it, else the largest of them less its noise."""
        # The secant of p ± hv, with p off x′ by a part ε of the way to a point inside the ball, tends to ‖J(x′)v‖ in
        # proportion to ε if J is continuous, so its last change tells the rest.
        lower: list[_Found] = []
        noise, part = math.inf, min(self.eps**0.25, _INWARDS)
        for closer in range(_CLOSER):
            (near, length), (far, _) = self._secant(one, part), self._secant(one, 2 * part)
            if not math.isfinite(near.value):
                break
            if closer == 0:
                floor, _, passes = secant_noise(
                    self.f, one.place, torch.tensor([length], device="cpu").to(self.center.dtype).double()
                )
                noise = float(floor) * length
                self.num_evals += passes / 3
            slack = noise / length
            if slack == math.inf or (lower and slack > _NOISY * one.value):
                break
            if one.value <= near.value + 2 * abs(near.value - far.value) + slack:
                return one
            lower.append(near._replace(value=max(near.value - slack, 0.0)))
            part /= 16
        return max(lower, key=_value, default=one._replace(value=0.0))

    def _secant(self, one: _Found, part: float) -> tuple[_Found, float]:
        """Return a secant ‖f(a) − f(b)‖ / ‖a − b‖ near x′ along v with a and b in the ball, and half ‖a − b‖."""
        point, v = torch.lerp(one.place.double(), self._interior, part), one.direction.double()
        room = torch.minimum(point - self.box.lower.double(), self.box.upper.double() - point)
        h = float((room / v.abs().clamp_min(1e-300)).min())
        if self.norm != "linf":
            h = min(h, self.radius - float((point - self.center.double()).norm()))
        a, b = ((point + sign * _WITHIN * h * v).to(self.center) for sign in (1, -1))
        with torch.no_grad(), no_tf32():
            moved = float((self.f(a[None]).double() - self.f(b[None]).double()).norm())
        self.num_evals += 2 / 3
        length = float((a.double() - b.double()).norm())
        value = moved / length if h > 0 and length > 0 else math.nan
        return _Found(value, point.to(self.center), one.direction), length / 2

    @cached_property
    def _interior(self) -> Tensor:
        """A point well inside the ball, and off the kinks that a centre of even colour may have, float64."""
        low, high, center = (x.double() for x in (self.box.lower, self.box.upper, self.center))
        room = self.radius / 2 if self.norm == "linf" else self.radius / 2 / math.sqrt(center.numel())
        draw = torch.rand(center.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(center)
        middle = ((low + high) / 2).nan_to_num(0.0)  # of no box: any point
        return center + (middle - center).clamp(-room, room) + room / 4 * (2 * draw - 1)

    def _draw(self) -> Tensor:
        """Return a uniform point of the ball, put into the box."""
        if self.norm == "linf":
            share = torch.rand(self.center.shape, generator=self.generator, dtype=torch.float64).to(self.center)
            return torch.clamp(torch.lerp(self.box.lower, self.box.upper, share), self.box.lower, self.box.upper)
        length = float(torch.rand((), generator=self.generator, dtype=torch.float64)) ** (1 / self.center.numel())
        return self._inside(self.center + self.radius * length * _unit(self._gaussian()))

    def _inside(self, x: Tensor) -> Tensor:
        """Move x towards the centre into the ball, then clip it to the box, which only brings it nearer."""
        step = x.double() - self.center.double()
        length = math.inf if self.norm == "linf" else self.radius
        shrink = min(1.0, length / max(float(step.norm()), 1e-300))
        while True:
            point = torch.clamp((self.center.double() + shrink * step).to(x), self.box.lower, self.box.upper)
            if float((point.double() - self.center.double()).norm()) <= length:
                return point
            shrink *= 1 - 1e-15 if x.dtype == torch.float64 else 1 - 1e-7

    def _gaussian(self) -> Tensor:
        return torch.randn(self.center.shape, generator=self.generator, dtype=torch.float64).to(self.center)


def _at_once(image: Tensor) -> int:
    return _AT_ONCE if image.is_cuda else 1


def _unit(v: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """Return v / ‖v‖; for a zero v `otherwise`, or v itself."""
    return _units(v[None], None if otherwise is None else otherwise[None])[0]


def _units(vectors: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """Return v / ‖v‖ of each of K vectors (K, …); for a zero v `otherwise`, or v itself."""
    lengths = by_image(vectors.double().flatten(1).norm(dim=1), vectors)
    return torch.where(
        lengths == 0, vectors if otherwise is None else otherwise, (vectors.double() / lengths).to(vectors)
    )
