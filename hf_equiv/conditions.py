"""Check once that a function f meets the preconditions of all verbs, and define how they call it.

`admit` tries f near one image and requires, in this order:

    eval mode       no batch norm or dropout in train mode
    a tensor        (B, D), strided, real, of a floating-point type
    deterministic   two calls give one embedding
    differentiable  the output is connected to the pixels
    no batch        an image has one embedding, alone and beside other images
    a derivative    products with J by reverse mode, by its transpose and by differences of f agree

An f that fails is refused with the two numbers that disagree. Cost: about seven evaluations, which count in no result.
An `Encoder` is frozen, so it is tried once for each image size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook

from hf_equiv import precision
from hf_equiv.checks import UNIT, Bounds, check_bounds, check_output
from hf_equiv.derivatives import PlainStrides, forward_mode, transposed, vjps
from hf_equiv.memory import unless_memory
from hf_equiv.precision import Encoding, no_autocast, no_tf32, power_of_two

_REPEAT = 100  # times the spacing of the numbers in f: largest difference of two calls, relative
_BATCH = 1000  # the same for an image alone and in a batch, and for two products with J by autograd
_COARSE, _LEAST = 0.1, 1e-6  # and the most for a coarse f, the least for a fine one
_SECANT = 0.003  # largest difference of autograd and a secant, relative, that needs no closer look
_EXACT = 0.001  # the largest for tiny steps in float64
_CLOSER = (1, 4, 16)  # shares of a step where f has no float64: noise grows, the part of kinks and curvature shrinks
_POINTS = 3  # at which such a derivative must be false
_STRETCH = 64.0  # times a cotangent, where hooks and clips that act on large gradients show
_SIGMAS = 3  # times the noise of a secant that is allowed on top
_NOISE = 4  # noise of f in units of the spacing of its numbers, until it is measured
_LONGEST = 2.0**-7  # largest step of a pixel in a secant, for a box of width 1
_VARIES = 1.5  # times the noise at one image, for that at others
_UNSEEN = 4.0  # a one-ulp change of the input repeats the random part of the rounding, not the systematic one
_TINY = 2.0**-24  # step at which float64 is smooth and float32 is not, for a box of width 1
_SMOOTH = 2.0**-30  # bend of f over its size that is no rounding of float32


class Function:
    """f as the verbs call it: on a copy of the images, with a checked copy of the embeddings in return.

    So an f that normalises in place, returns a view of its input or reuses its output spoils no tensor of the caller's.
    Other attributes are those of f.

    Args:
        plain: the function itself. It keeps the `torch.autocast` settings that hold now.
        strides: the mode that its batch norm needs, if it does.
        noise: relative rounding noise of one evaluation.
        bounds: the box of its images.
        derivable: False if autograd is known to state a false derivative.
    """

    def __init__(
        self, plain: Encoding, *, strides: PlainStrides | None = None, noise: float = 0.0, bounds: Bounds = UNIT
    ) -> None:
        self.plain, self.strides, self.noise, self.bounds, self.derivable = plain, strides, noise, bounds, True
        self._call = precision.with_autocast(plain)

    def apply(self, images: Tensor) -> Any:
        """Return the output of f as it is."""
        with self.strides or nullcontext():
            return self._call(images.clone())

    def __call__(self, images: Tensor) -> Tensor:
        """Return f(images), (B, D)."""
        z: Tensor = self.apply(images)
        check_output(z, len(images))
        return z.clone()

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of f."""
        return getattr(self.__dict__.get("plain"), name)

    def noise_near(self, image: Tensor) -> float:
        """Return the relative noise of an evaluation near an image (*shape); an Encoder has one noise for all."""
        return self.noise if hasattr(self.plain, "admitted") else _Probe(self, image).noise

    @cached_property
    def exact(self) -> Function:
        """F with all its arithmetic in float64: its twin, if it offers one."""
        return as_function(precision.float64_twin(self) or precision.in_float64(self))

    def double(self) -> Function | None:
        """Return the float64 twin of f, if it offers one."""
        twin = precision.float64_twin(self.plain)
        return None if twin is None else Function(twin, strides=self.strides, bounds=self.bounds)


def as_function(f: Encoding) -> Function:
    """Return f as a `Function`, without any condition."""
    return f if isinstance(f, Function) else Function(f)


def admit(
    f: Encoding, images: Tensor, *, gradient: bool = True, noise: bool = False, each: bool = False,
    bounds: Bounds = UNIT
) -> Function:  # fmt: skip
    """Require the conditions of f near the first image on which it is finite, and return it as a `Function`.

    Args:
        f: the encoder, or any callable (B, *shape) -> (B, D); a `Function` was admitted before.
        images: (B, *shape), within the bounds.
        gradient: whether to refuse a false derivative; False only notes it, for values that come from secants.
        noise: whether to measure the noise of f.
        each: whether to try a callable near every image, where a verb costs far more.
        bounds: the box of the images; for None f is tried near the values as they are.

    Returns:
        f, to be called in place of the function given.

    Raises:
        ValueError: f fails a condition.
    """
    if isinstance(f, Function):
        return f
    known: dict[Any, Function] = getattr(f, "admitted", {})  # an Encoder has one
    key = images.shape[1:], images.dtype, gradient, noise, check_bounds(bounds, images)
    if key not in known or known[key].plain is not f:  # a wrapper may lend the attributes of an Encoder
        known[key] = _admit(f, images, gradient, noise, each and not hasattr(f, "admitted"), bounds)
    return known[key]


def _admit(f: Encoding, images: Tensor, gradient: bool, noise: bool, each: bool, bounds: Bounds) -> Function:
    strides = PlainStrides()
    call = Function(f, strides=strides, bounds=bounds)
    grey = 0.0 if bounds is None else sum(bounds) / 2
    with torch.inference_mode(False), no_tf32(), register_module_forward_pre_hook(_refuse_training):
        for image in images.detach():
            probe = _Probe(call, image)
            if probe.finite:
                try:
                    _run(probe, image)
                except _FalseDerivativeError:
                    if gradient:
                        raise
                    call.derivable = False
                    probe.beside(probe.longest)
                # at a grey image, so that no result depends on the other images of a batch
                call.noise = _Probe(call, torch.full_like(image, grey)).noise if noise else 0.0
                if not each:
                    break
    call.strides = strides if strides.used else None
    return call


def _run(probe: _Probe, image: Tensor) -> None:
    """Require the conditions; without float64, kinks beside one point prove nothing against a derivative."""
    for seed in range(1, _POINTS + 1):
        try:
            return probe.run()
        except _FalseDerivativeError:
            if probe.smooth or seed == _POINTS:
                raise
            probe = _Probe(probe.call, image, seed)


def _refuse_training(module: torch.nn.Module, args: Any) -> None:
    """Refuse a call of batch norm or dropout in train mode, before it changes its statistics."""
    acts = isinstance(module, _BatchNorm) or (isinstance(module, _DropoutNd) and module.p > 0)
    if acts and module.training:
        raise ValueError(f"`f` must be in eval mode; got {module} in train mode. Call `model.eval()` first.")
    if isinstance(module, _BatchNorm) and module.running_mean is None:
        raise ValueError(f"`f` must map each image for itself; {module} has no statistics but those of the batch.")


class _FalseDerivativeError(ValueError):
    """Differences of f, or another product with J, contradict autograd."""


class _Probe:
    """f at a point x near an image, inside the box and off the kinks that a black, grey or 8-bit image may have.

    Without a box, two standard deviations of the image about its mean stand in for it, and only its width counts.
    Embeddings and derivatives are in `unit`, float64. Two directions `ways` (2, *shape) change each pixel by ±1; their
    secants (f(x + step·way) − f(x − step·way)) / 2 step are (2, D).
    """

    def __init__(self, call: Function, image: Tensor, seed: int = 0) -> None:
        self.call, self.generator = call, torch.Generator("cpu").manual_seed(seed)
        wide, (low, high) = image.detach().double(), check_bounds(call.bounds, image)
        self.low, self.high = low, high
        if call.bounds is None:
            mean = float(wide.mean())
            half = 2 * float(wide.std(correction=0)) or abs(mean) or 1.0
            self.low, self.high = mean - half, mean + half
        width = self.high - self.low
        span = power_of_two(width) / 2
        self.longest, self.tiny = _LONGEST * span, _TINY * span
        near = wide.clamp(low + 3 / 16 * width, high - 3 / 16 * width)
        near = near + (self._uniform(image.shape).to(image.device) - 0.5) * (width / 4)
        size = max(float(near.abs().max()), 15 / 16 * width)
        grid = 2 * torch.finfo(image.dtype).eps * power_of_two(size)  # x ± step is exact for multiples of it
        self.shortest = 4 * grid
        self.x = ((near / grid).round() * grid).to(image)[None].requires_grad_(True)
        signs = (self._uniform(image.shape) - 0.5).sign().to(image)
        self.ways = torch.stack([signs, torch.ones_like(signs)])  # the mean of many signs is near 0
        with torch.enable_grad(), precision.Recorded() as seen:
            self.z = call(self.x)
        self.finite = bool(self.z.isfinite().all())
        self.eps = max(seen.eps, torch.finfo(self.z.dtype).eps, torch.finfo(image.dtype).eps)
        self.unit = power_of_two(float(self.z.detach().double().abs().max())) if self.finite else 1.0
        self.here = self._in_unit(self.z)[0]
        self.size = float(self.here.norm()) or 1.0

    def run(self) -> None:
        """Require the conditions."""
        again = self.x.detach().clone().requires_grad_(True)  # an f that keeps results has no gradient for it
        with torch.enable_grad():
            second = self.call(again)
        off = float((self._in_unit(second)[0] - self.here).norm())
        if off > min(_REPEAT * self.eps, _COARSE) * self.size:
            raise ValueError(
                f"`f` must be deterministic; two calls on one image differ by {off / self.size:.3g} of the embedding. "
                "Switch dropout, sampling and counters off, for example with `model.eval()`."
            )
        self._find_rows(second, again)
        # If f is exactly zero by cancellation, J is zero up to its rounding.
        zero = 0.0 if bool(self.here.any()) else _BATCH * self.eps * math.sqrt(self.x.numel())
        if not bool(self.rows.isfinite().all()):
            self.beside(self.longest)
        elif float(self.rows.norm()) <= zero:
            self._check_flat()
        else:
            self._find_product()
            self._check_secants()

    @property
    def noise(self) -> float:
        """Return the relative noise of an evaluation: from float64, or else from pixels changed by an ulp."""
        if not self.finite:
            return 0.0
        exact, gap = self.exact
        hidden = exact is None or (self.x.dtype == torch.float64 and not self.smooth)
        return max(_VARIES * gap, _UNSEEN * self._jitter if hidden else 0.0)

    @no_autocast()
    def _find_rows(self, second: Tensor, again: Tensor) -> None:
        """Set the rows Jᵀu (K, N) of random cotangents u (K, D), and the first of them from a second call of f."""
        self.u = torch.randn(2, self.z.shape[1], generator=self.generator, dtype=torch.float64, device="cpu").to(self.z)
        found, factor = None, _STRETCH if self.eps <= torch.finfo(torch.float32).eps else 1.0
        if second.requires_grad:
            try:
                (found,) = torch.autograd.grad(second, again, factor * self.u[:1], allow_unused=True)
            except unless_memory(RuntimeError) as error:
                raise ValueError(
                    "`f` must be differentiable; got an error in its backward pass "
                    f"({' '.join(str(error).split())[:160]}). Change no tensor in place that its gradient needs."
                ) from error
        if found is None:
            raise ValueError(
                "`f` must be differentiable and use its input; got no gradient. Drop no_grad or detach, and do not "
                "round, compare, sort or keep results of earlier calls."
            )
        found = found / factor
        try:
            rows = vjps(self.z[0], self.x, self.u)
        except RuntimeError:  # a backward pass of f takes one cotangent at a time
            rows = torch.cat([found, vjps(self.z[0], self.x, self.u[1:])[0]])
        self.rows, self.alone = self._in_unit(rows).flatten(1), self._in_unit(found).flatten()

    def _find_product(self) -> None:
        """Set J v (D,), or None without second order and forward mode; require that all products with J agree."""
        self.product = None
        with no_autocast(), precision.exact_derivatives():
            try:
                u, gradient = transposed(self.call, self.x)
                self.product = self._in_unit(vjps(gradient, u, self.ways[:1, None]))[0, 0]
            except RuntimeError:
                with suppress(RuntimeError):
                    self.product = self._in_unit(forward_mode(self.call, self.x.detach(), self.ways[:1]))[0]
        along = self.ways[0].double().flatten()
        pairs = [(self.rows[0] @ along, self.alone @ along)]
        if self.product is not None:
            pairs += zip(self.rows @ along, self.u.double() @ self.product, strict=True)
        size = float(self.rows.norm())
        for first, second in pairs:
            if not self._is_noise(float((first - second).abs()) / (8 * size)):
                self._refuse("another product with J", float(first), float(second))

    def _is_noise(self, gap: float) -> bool:
        """Whether the rounding of f explains a relative difference of one thing computed in two ways."""
        limit = max(min(_BATCH * self.eps, _COARSE), _LEAST)
        return gap <= limit or gap <= 2 * _UNSEEN * max(self._jitter, self.exact[1])

    def _check_secants(self) -> None:
        """Require that differences of f agree with autograd at a step where neither noise nor curvature hides it."""
        slope, misses = float(self.rows.norm()) / math.sqrt(len(self.rows)), []
        for secants, noise, rtol in self._tries(slope):
            compared = (self._compare(k, secant, slope) for k, secant in enumerate(secants))
            misses.append(max((abs(a - b) - rtol * size - noise, a, b) for a, b, size in compared))
            if not misses[-1][0] > 0:
                return
        self._refuse("differences of f", *min(misses)[1:])

    def _tries(self, slope: float) -> Iterator[tuple[Tensor, float, float]]:
        """Yield the secants of one step after another, the noise in them, and the relative difference allowed."""
        noise = _NOISE * self.eps * self.size
        step = self._step(noise, slope)
        yield self.beside(step), _SIGMAS * noise / step, _SECANT
        # f may be noisier than its numbers, or curved, or have many kinks
        exact, gap = self.exact
        if exact is not None and self.smooth:
            for tiny in (16 * self.tiny, self.tiny / 4):
                yield self._secants(tiny, exact), 0.0, _EXACT + 8 * max(self.eps, gap)
            return
        noise = max(self.eps / 2, self._jitter) * self.size
        for share in _CLOSER:
            closer = max(self._step(noise, slope) / share, self.shortest)
            yield self._secants(closer), _SIGMAS * noise / closer, _SECANT

    @cached_property
    def exact(self) -> tuple[Encoding | None, float]:
        """Return f in float64 and its relative distance from f; None and 0 if it cannot be had."""
        try:
            exact = precision.float64_twin(self.call) or precision.in_float64(self.call.plain)
            with torch.enable_grad():  # as for `here`
                z = self._in_unit(exact(self.x.detach().double()))[0]
        except Exception:  # f may raise any error on float64, or memory may run out
            return None, 0.0
        gap = float((z - self.here).norm()) / self.size
        return (exact, gap) if gap <= _COARSE else (None, 0.0)

    @cached_property
    def smooth(self) -> bool:
        """Whether f in float64 bends at the smallest steps as it must: code that torch does not show may be coarser."""
        exact = self.exact[0]
        if exact is None or hasattr(self.call.plain, "admitted"):
            return exact is not None
        bend = self._bend(exact, self.tiny)
        return bend <= _SMOOTH or bend / 100 <= self._bend(exact, self.tiny / 8) <= bend / 40

    def _bend(self, f: Encoding, step: float) -> float:
        """Return ‖f(x + h) − 2 f(x) + f(x − h)‖ / ‖f(x)‖ for a float64 step h along the first direction."""
        x, h = self.x.detach().double(), step * self.ways[0].double()
        with torch.no_grad():
            after, here, before = (self._in_unit(f(point))[0] for point in (x + h, x, x - h))
        return float((after - 2 * here + before).norm()) / self.size

    def _check_flat(self) -> None:
        """Require that f hardly moves where its derivative is zero, unlike a function that is constant by pieces."""
        step = self.longest
        near, far = (float(secants[0].norm()) for secants in (self.beside(step), self._secants(4 * step)))
        if 2 * step * min(near, 4 * far) > _SIGMAS * _NOISE * self.eps * self.size:
            self._refuse("differences of f", 0.0, near)

    def _compare(self, k: int, secant: Tensor, slope: float) -> tuple[float, float, float]:
        """Return one number by autograd and by the secant (D,) along direction k, and the size to judge it by."""
        if k == 0 and self.product is not None:
            apart = self.product - secant
            along = apart / (apart.norm() or 1.0)  # where the two differ most
            size = float(torch.maximum(self.product.norm(), secant.norm()))
            return float(along @ self.product), float(along @ secant), size
        stated, seen = self.rows @ self.ways[k].double().flatten(), self.u.double() @ secant
        worst = int((stated - seen).abs().argmax())
        size = max(slope, float(stated[worst].abs()), float(seen[worst].abs()))
        return float(stated[worst]), float(seen[worst]), size

    def beside(self, step: float) -> Tensor:
        """Return the secants, from a batch with other images in it; require that they do not change f(x)."""
        low, high = self.x.new_tensor([self.low, self.high])
        first = (self._uniform(self.x.shape) < 0.5).to(self.x.device)
        other, inverse = torch.where(first, high, low), torch.where(first, low, high)
        points = torch.cat([other, self.x.detach(), self._ends(step).to(self.x), inverse, other])
        try:
            with torch.no_grad():
                values = self.call.apply(points)
        except Exception:  # f takes one image at a time
            return self._secants(step)
        check_output(values, len(points))
        values = self._in_unit(values)
        off = float((values[1] - self.here).norm()) / self.size
        if math.isnan(off):  # the other images are not in the domain of f
            return self._secants(step)
        if not self._is_noise(off):
            raise ValueError(
                f"`f` must map each image for itself; beside another image, an embedding changes by {off:.3g} of its "
                "length. Call `model.eval()`, and take no statistics over the batch."
            )
        return (values[2:4] - values[4:6]) / (2 * step)

    def _secants(self, step: float, exact: Encoding | None = None) -> Tensor:
        """Return the secants of f, or of f in float64, from one image at a time."""
        ends = self._ends(step).to(self.x) if exact is None else self._ends(step)
        with torch.no_grad():
            values = self._in_unit(torch.cat([(exact or self.call)(end) for end in ends.split(1)]))
        return (values[:2] - values[2:]) / (2 * step)

    def _ends(self, step: float) -> Tensor:
        """Return x + step·way of both directions, then x − step·way, (4, *shape), float64."""
        return self.x.detach().double() + step * torch.cat([self.ways, -self.ways]).double()

    def _step(self, noise: float, slope: float) -> float:
        """Return the power of two that keeps noise below 0.05 % of a secant."""
        return min(max(power_of_two(2000 * noise / slope), self.shortest), self.longest)

    @cached_property
    def _jitter(self) -> float:
        """Return the relative difference of f between two images a unit in the last place away."""
        change = self.eps * self.ways[0]
        with torch.no_grad():
            ends = [self._in_unit(self.call(self.x.detach() * (1 + sign * change)))[0] for sign in (1, -1)]
        change = float((ends[0] - ends[1]).norm()) / math.sqrt(2) / self.size
        hidden = self.x.dtype == torch.float64 and not self.smooth
        return max(change, self._bend(self.call, self.tiny)) if hidden else change

    def _in_unit(self, values: Tensor) -> Tensor:
        return values.detach().double() / self.unit

    def _uniform(self, shape: torch.Size) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def _refuse(self, other: str, stated: float, seen: float) -> None:
        raise _FalseDerivativeError(
            f"`f` must have the derivative that autograd states; got {stated * self.unit:.4g} from autograd and "
            f"{seen * self.unit:.4g} from {other}, along one direction. Take rounding, detach, straight-through "
            "estimators, gradient hooks and wrong custom backward passes out of f."
        )
