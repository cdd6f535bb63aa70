"""Certify that no image within a distance turns the smoothed embedding of an image by more than an angle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_equiv import bars, checks
from hf_equiv.checks import UNIT, Bounds
from hf_equiv.conditions import admit
from hf_equiv.defences.confidence import mean_at_least, variance_at_most
from hf_equiv.defences.shifts import largest_mean
from hf_equiv.memory import MEMORY, Parts
from hf_equiv.passes import Work, measure_images
from hf_equiv.precision import Encoding, inner, no_tf32
from hf_equiv.results import Status


@dataclass(frozen=True, slots=True)
class CosineCertificate:
    """Certified cosines of the smoothed embeddings f̂ of B images.

    All radii of an image hold together with the stated confidence. Lengths are L2 norms in pixel units.

    Attributes:
        cosine: the cosine of f̂(x′) and f̂(x) is at least this for every x′ within the radius, (B,) for a number as
            radius, else (B, R), float64; −1 where nothing is certified, NaN if f is not finite.
        norm: estimate of ‖f̂(x)‖, (B,), float64: 1 if noise does not turn the embedding, 0 if nothing is left of it.
        norm_bound: lower confidence bound of ‖f̂(x)‖, (B,), float64.
        variance_bound: upper confidence bound of the largest variance of uᵀf/‖f‖ over unit vectors u, (B,), float64.
        embeddings: estimate of f̂(x), (B, D), float64.
        radii: the radius, (), or the radii, (R,), float64.
        sigma: standard deviation of the noise, in pixel units.
        n: draws of the noise.
        confidence: probability, for each image, that its statement holds.
        status: per image `completed` or `error`.
        num_evals: cost of each image, (B,), float64: n / 3.
        seconds: wall time of each image, (B,), float64.
    """

    cosine: Tensor
    norm: Tensor
    norm_bound: Tensor
    variance_bound: Tensor
    embeddings: Tensor
    radii: Tensor
    sigma: float
    n: int
    confidence: float
    status: tuple[Status, ...]
    num_evals: Tensor
    seconds: Tensor

    def __repr__(self) -> str:
        """State the images, the smoothing and the median certified cosine of each radius in one line."""
        medians = self.cosine.reshape(len(self.status), -1).quantile(0.5, dim=0).tolist()
        told = ", ".join(f"{r:g}: {c:.3f}" for r, c in zip(self.radii.reshape(-1).tolist(), medians, strict=True))
        how = f"sigma {self.sigma:g}, n {self.n}, confidence {self.confidence:g}"
        return f"CosineCertificate({len(self.status)} images; median cosine by radius: {told}; {how})"


def certified_cosine(
    f: Encoding,
    images: Tensor,
    sigma: float,
    radius: float | Sequence[float],
    n: int = 10_000,
    confidence: float = 0.999,
    *,
    seed: int = 0,
    batch: int = 32,
    bounds: Bounds = UNIT,
    progress: Callable[[int, int], None] | bool | None = None,
) -> CosineCertificate:
    """Bound the cosine between the smoothed embeddings of an image and of any other within a radius, with confidence.

    The smoothed embedding is the mean of the normalised one under Gaussian noise on the pixels,

        f̂(x) = E h(x + σε),    h = f/‖f‖ (D,),    ε ~ N(0, I),

    and with the stated confidence every x′ with ‖x′ − x‖₂ ≤ R has

        cos(f̂(x′), f̂(x)) ≥ √(1 − (μ/ρ)²),    ρ ≤ ‖f̂(x)‖,    μ = largest_mean(R/σ, λ),    λ ≥ max over u of Var uᵀh.

    If f̂(x′) is turned further, by an angle θ from w = f̂(x)/‖f̂(x)‖ towards v ⟂ w, then g = (sin θ w − cos θ v)ᵀh has
    the mean sin θ ‖f̂(x)‖ around x and none around x′. That mean is at most μ: for any variance it is 2Φ(R/σ) − 1, by
    the lemma of Neyman and Pearson, and a variance of λ < 1 leaves much less of it. f enters by ρ and λ alone, which
    are bounded from samples, so that the statement is about the true f̂(x), although its direction is not known. All
    radii follow from the same ρ and λ and hold together.

    The statement is about the smoothed encoder, not about f, and of no use where noise makes all images alike: compare
    `embeddings` of different images. The proof needs noise that is not clipped to the box, so f must take values
    outside. It leaves out of account that f is computed in floating point.

    Cost: n / 3 evaluations an image. Memory: the activations of `batch` images, and two D × D matrices.

    Args:
        f: the encoder, or any callable (B, *shape) -> (B, D).
        images: x, (B, *shape), within `bounds`.
        sigma: σ, standard deviation of the noise, in pixel units.
        radius: R in pixel units (L2), a number or several.
        n: draws of the noise for each image.
        confidence: probability that the statement about an image holds; half of the rest is for ρ, half for λ.
        seed: of the noise. All images have the same draws, so that results do not depend on the batch.
        batch: images per forward pass.
        bounds: the box that `images` must lie in; None for none.
        progress: called with (draws done, draws in all); by default a bar in a terminal or notebook, False for none.

    Returns:
        Certified cosines, with the norms of the smoothed embeddings.

    Raises:
        ValueError: values outside `bounds`, a sigma, radius or confidence out of range, or too few draws.

    Example:
        >>> import torch
        >>> from hf_equiv import certified_cosine
        >>> found = certified_cosine(lambda x: 2 + x.flatten(1), torch.full((1, 2), 0.5), 0.25, [0.125, 0.25])
        >>> [round(cosine, 2) for cosine in found.cosine[0].tolist()]
        [1.0, 0.99]

    References:
        Salman et al. (2019), arXiv:1906.04584, lemma 2. Cohen, Rosenfeld, Kolter (2019), arXiv:1902.02918. Kumar et al.
        (2020), arXiv:2009.08061 (means of bounded functions). arXiv:2601.16200 (features).
    """
    checks.check_images(images, bounds=bounds)
    checks.check_positive(sigma, "sigma")
    radii = _checked_radii(radius)
    _check_draws(n, confidence)
    checks.check_count(batch, "batch")
    f = admit(f, images, gradient=False, bounds=bounds)

    def measure(b: int) -> Work[dict[str, Any]]:
        yield from ()  # the passes of an image are full

        def told(done: int) -> None:
            if hook is not None:
                hook(b * n + done, len(images) * n)

        draws = unit_embeddings(f, images[b].detach(), sigma, n, seed=seed, batch=batch, told=told)
        return _bound(draws, n, radii / sigma, (1 - confidence) / 2)

    with bars.shown(progress, "smoothing", bars.count) as hook:
        fields = measure_images(images, measure)
    return CosineCertificate(**fields, radii=radii, sigma=sigma, n=n, confidence=confidence)


def unit_embeddings(
    f: Encoding,
    image: Tensor,
    sigma: float,
    n: int,
    *,
    seed: int,
    batch: int,
    told: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """Yield f(x + σε)/‖f(x + σε)‖ of n draws of ε, at most `batch` at a time, (at most `batch`, D), float64."""
    generator, parts = torch.Generator().manual_seed(seed), Parts()
    for start in range(0, n, batch):
        points = image + sigma * gaussian(image, min(batch, n - start), generator)
        with torch.no_grad(), no_tf32():
            (z,) = parts(lambda part: (f(points[part]),), len(points))  # noqa: B023
        yield unit(z)
        if told is not None:
            told(start + len(points))


def gaussian(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return draws of N(0, I) in the shape of an image, (count, *shape), the same for every split into counts."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    draws = [torch.randn(image.shape, generator=generator, dtype=dtype) for _ in range(count)]
    return torch.stack(draws).to(image)


def unit(z: Tensor) -> Tensor:
    """Return embeddings (B, D) at unit length, float64; zero stays zero."""
    return torch.nn.functional.normalize(z.double(), dim=1, eps=1e-300)


def _bound(draws: Iterator[Tensor], n: int, shifts: Tensor, alpha: float) -> dict[str, Any]:
    """Return the fields of an image from its unit embeddings h (n, D); each of two bounds fails with `alpha`."""
    total, moment, values = torch.zeros(()), torch.zeros(()), []
    for h in draws:
        _check_dimension(h.shape[1])
        sums = total.to(h) + h.cumsum(dim=0)
        earlier = torch.cat([total.to(h).expand(1, h.shape[1]), sums[:-1]])
        # A direction u from earlier draws alone: the mean of uᵀh, given these, is at most ‖f̂(x)‖.
        values.append(inner(unit(earlier), h))
        total, moment = sums[-1], moment.to(h) + h.T @ h
    covariance = (moment - torch.outer(total, total) / n) / (n - 1)
    if not bool(covariance.isfinite().all()):
        cosine, norm, norm_bound, variance = torch.full_like(shifts, math.nan), *[math.nan] * 3
    else:
        norm = math.sqrt(max(0.0, float(total.square().sum() - moment.trace())) / (n * (n - 1)))
        norm_bound = mean_at_least(torch.cat(values), alpha)
        variance = variance_at_most(float(torch.linalg.eigvalsh(covariance)[-1]), n, alpha)
        variance = min(variance, 1 - norm_bound**2)  # the sum of the variances in all directions
        sine = largest_mean(shifts, shifts.new_tensor(variance)) / (norm_bound or math.nan)
        cosine = torch.where(sine < 1, (1 - sine.square()).sqrt(), -1.0)
    return {
        "cosine": cosine,
        "norm": norm,
        "norm_bound": norm_bound,
        "variance_bound": variance,
        "embeddings": total / n,
        "status": Status.ERROR if math.isnan(norm) else Status.COMPLETED,
        "num_evals": n / 3,
    }


def _check_dimension(dimension: int) -> None:
    most = math.isqrt(MEMORY // 32)  # four matrices in float64, two of them inside the solver of eigenvalues
    if dimension > most:
        raise ValueError(
            f"`f` must have embeddings of at most {most} numbers, whose covariance fits into memory; got {dimension}. "
            "Use a readout with fewer dimensions, such as 'cls' or 'mean'."
        )


def _checked_radii(radius: float | Sequence[float]) -> Tensor:
    found = radius if isinstance(radius, Sequence) else [radius]
    for one in found:
        checks.check_positive(one, "radius", or_zero=True)
    if not found:
        raise ValueError("`radius` must be a number or several; got none. Pass 0.5, or [0.25, 0.5].")
    return torch.tensor(radius, dtype=torch.float64, device="cpu")


def _check_draws(n: int, confidence: float) -> None:
    checks.check_positive(confidence, "confidence", 1)
    checks.check_count(n, "n")
    least = math.ceil(math.log2(2 / (1 - confidence))) + 1
    if n < least:
        raise ValueError(
            f"`n` must be at least {least} for confidence {confidence:g}; got {n}. Fewer draws say nothing even of a "
            "constant f; 10000 are usual."
        )
