"""Attack the smoothed embedding: look for the image within a ball that turns it most."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from hf_equiv import bars, checks
from hf_equiv.checks import UNIT, Bounds
from hf_equiv.conditions import Function, admit
from hf_equiv.defences.certificate import gaussian, unit, unit_embeddings
from hf_equiv.matching.feasible import FeasibleSet
from hf_equiv.passes import Work, measure_images
from hf_equiv.precision import Encoding, no_autocast, no_tf32
from hf_equiv.results import Status

_FIRST, _LAST = 0.5, 0.05  # first and last step, divided by the radius


@dataclass(frozen=True, slots=True)
class SmoothedAttack:
    """Images x′ near B images x that turn the smoothed embedding f̂.

    Attributes:
        images: x′, (B, *shape), in the ball and the box.
        cosine: estimate of the cosine of f̂(x′) and f̂(x), from fresh draws, (B,), float64; NaN if f is not finite, or
            if the noise leaves no direction.
        error: half the width of its interval, (B,), float64; 0 for sigma 0.
        confidence: coverage of the interval, for many draws.
        status: per image `completed` or `error`.
        num_evals: cost of each image, (B,), float64: (forwards + 2·cotangents) / 3.
        seconds: wall time of each image, (B,), float64.
    """

    images: Tensor
    cosine: Tensor
    error: Tensor
    confidence: float
    status: tuple[Status, ...]
    num_evals: Tensor
    seconds: Tensor

    def __repr__(self) -> str:
        """State the number of images and the least cosine in one line."""
        least = int(self.cosine.nan_to_num(2.0).argmin())
        found = f"{self.cosine[least]:.4f} ± {self.error[least]:.4f}"
        return f"SmoothedAttack({len(self.status)} images; least cosine {found})"


def attack_smoothed(
    f: Encoding,
    images: Tensor,
    sigma: float,
    radius: float,
    *,
    num_steps: int = 20,
    draws: int = 16,
    restarts: int = 2,
    n: int = 1000,
    confidence: float = 0.999,
    seed: int = 1,
    batch: int = 32,
    bounds: Bounds = UNIT,
    progress: Callable[[int, int], None] | bool | None = None,
) -> SmoothedAttack:
    """Look for the image within an L2 ball whose smoothed embedding has the least cosine with that of its centre.

    Projected steps of falling length along the normalised gradient of

        cos(Σᵢ h(x′ + σεᵢ), f̂(x)),    h = f/‖f‖ (D,),    f̂(x) = E h(x + σε),    εᵢ ~ N(0, I),

    with fresh draws εᵢ in each step, start at random points of the sphere. The best end is measured with other draws,
    the same for x and x′. Products of means are taken over pairs of different draws, which have no bias, and the
    jackknife gives the interval. The least cosine in the ball lies between the result and that of `certified_cosine`.

    Cost: `restarts`·(`num_steps`·`draws` + n/3) + n evaluations an image. Memory: the activations of `draws` images
    with their graph, and 2·n embeddings.

    Args:
        f: the encoder, or any callable (B, *shape) -> (B, D), differentiable by autograd.
        images: x, (B, *shape), within `bounds`.
        sigma: σ in pixel units; 0 attacks f itself.
        radius: R, the largest ‖x′ − x‖₂ in pixel units.
        num_steps: steps from each start.
        draws: draws of the noise in a step.
        restarts: random starts.
        n: draws of the noise for a measurement.
        confidence: coverage of the interval.
        seed: of starts and noise. All images have the same, so that results do not depend on the batch.
        batch: images per forward pass of a measurement.
        bounds: the box of x and x′; None lets x′ leave it, as the statement of `certified_cosine` does.
        progress: called with (images done, images in all); by default a bar in a terminal or notebook, False for none.

    Returns:
        The images found, with their cosines.

    Raises:
        ValueError: values outside `bounds`, or a sigma, radius, count or confidence out of range.

    Example:
        >>> import torch
        >>> from hf_equiv import attack_smoothed
        >>> f = lambda x: 2 + x.flatten(1)
        >>> found = attack_smoothed(f, torch.full((1, 2), 0.5).double(), 0, 0.5)
        >>> round(float(found.cosine), 4)  # perpendicular to f(x) = (2.5, 2.5), the angle has the sine 0.5/2.5√2
        0.9899

    References:
        Salman et al. (2019), arXiv:1906.04584, §2.2 (attacks of smoothed functions).
    """
    checks.check_images(images, bounds=bounds)
    checks.check_positive(sigma, "sigma", or_zero=True)
    checks.check_positive(radius, "radius")
    checks.check_positive(confidence, "confidence", 1)
    for name, count in {"num_steps": num_steps, "draws": draws, "restarts": restarts, "batch": batch}.items():
        checks.check_count(count, name)
    checks.check_count(n, "n", least=3)
    f = admit(f, images, bounds=bounds)
    if not sigma:
        draws, n = 1, 3  # all alike

    def measure(b: int) -> Work[dict[str, Any]]:
        yield from ()  # the passes of an image are full
        x, generator = images[b].detach(), torch.Generator().manual_seed(seed)
        for_choice, for_result = torch.randint(2**62, (2,), generator=generator).tolist()

        def sample(point: Tensor, own: int) -> Tensor:
            return torch.cat(list(unit_embeddings(f, point, sigma, n, seed=own, batch=batch)))

        toward, ball = sample(x, for_choice).mean(dim=0), FeasibleSet.around(x, radius, "l2", bounds)
        ends = [_descend(f, ball, toward, sigma, num_steps, draws, generator) for _ in range(restarts)]
        end = ends[0]
        if restarts > 1:
            means = torch.stack([sample(end, for_choice).mean(dim=0) for end in ends])
            end = ends[int(torch.cosine_similarity(means, toward[None], dim=1).argmin())]
        cosine, error = paired_cosine(sample(end, for_result), sample(x, for_result), confidence)
        return {
            "images": end,
            "cosine": cosine,
            "error": error,
            "status": Status.ERROR if math.isnan(cosine) else Status.COMPLETED,
            "num_evals": restarts * num_steps * draws + (3 + (restarts if restarts > 1 else 0)) * n / 3,
        }

    with bars.shown(progress, "attack", bars.count) as hook:
        return SmoothedAttack(**measure_images(images, measure, hook), confidence=confidence)


def _descend(
    f: Function, ball: FeasibleSet, toward: Tensor, sigma: float, num_steps: int, draws: int, generator: torch.Generator
) -> Tensor:
    """Return the end (*shape) of a descent on the cosine with `toward` (D,) from a random point of the sphere."""
    x, radius = ball.center, float(ball.l2_radius or 0.0)
    x = ball.project(x + radius * _direction(gaussian(x, 1, generator)[0]))
    for step in torch.linspace(_FIRST, _LAST, num_steps).tolist():
        point = x.clone().requires_grad_(True)
        with torch.enable_grad(), no_tf32():
            mean = unit(f(point + sigma * gaussian(x, draws, generator))).sum(dim=0)
            with no_autocast():
                (slope,) = torch.autograd.grad(torch.cosine_similarity(mean, toward, dim=0), point)
        x = ball.project(x - step * radius * _direction(slope.nan_to_num()))
    return x


def _direction(v: Tensor) -> Tensor:
    return torch.nn.functional.normalize(v.double().flatten(), dim=0, eps=1e-300).view(v.shape).to(v)


def paired_cosine(a: Tensor, b: Tensor, confidence: float) -> tuple[float, float]:
    """Return the cosine of the means of two samples with the same noise, (n, D) each, and half its interval."""

    def products(u: Tensor, v: Tensor) -> Tensor:
        """Return Σ uᵢ·vⱼ over i ≠ j, then the same without each draw in turn, (1 + n,)."""
        own, rest = (u * v).sum(dim=1), u.sum(dim=0) @ v.sum(dim=0)
        without = rest - own.sum() - u @ v.sum(dim=0) - v @ u.sum(dim=0) + 2 * own
        return torch.cat([(rest - own.sum())[None], without])

    cosines = products(a, b) / (products(a, a) * products(b, b)).sqrt()
    each = cosines[1:]
    spread = math.sqrt((len(a) - 1) / len(a) * float((each - each.mean()).square().sum()))
    return float(cosines[0]), NormalDist().inv_cdf((1 + confidence) / 2) * spread
