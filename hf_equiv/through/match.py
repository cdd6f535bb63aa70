"""Search for an image that embeds as the target, before and after transformations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_equiv.conditions import Function, admit
from hf_equiv.matching.feasible import FeasibleSet
from hf_equiv.precision import Encoding, no_autocast, no_tf32
from hf_equiv.results import MatchResult, Progress, Status
from hf_equiv.through.surrogates import rounded
from hf_equiv.through.transformations import Transformation

SHARE = 0.75  # of the allowed evaluations, spent here; bringing the image itself to `rtol` takes the others
_STEP, _STEP_LINF = 1 / 255, 4 / 255  # first steps, root mean square
_OF_RADIUS = 0.25  # largest first step in a ball, over its radius
_LAST = 0.05  # last step over the first
_MEAN, _SQUARE = 0.9, 0.99  # decay of the running means of gradients and of their squares


def match_through(
    f: Encoding,
    source: Tensor,
    z: Tensor,
    transformations: Sequence[Transformation],
    generators: Sequence[torch.Generator],
    *,
    radius: float | None,
    norm: str,
    max_evals: int,
    itself: bool = True,
    start: Tensor | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> MatchResult:
    """Lower the embedding errors of an image near `source` and of its transforms together.

    Minimises over the box ∩ the ball the mean, over T = identity (if asked for) and each of the `transformations`, of

        E ‖f(T(x)) − z‖² / ‖z‖².

    Each step draws every T anew, and a dither of ±½/255 before T, so that a later rounding of x changes little. Steps
    are those of Adam; outside L∞ balls one scale for all pixels of an image keeps x nearer to its source.

    Cost: an evaluation for each T a step, up to `SHARE` of `max_evals`.

    Args:
        f: the encoder.
        source: images to stay near, (B, 3, H, W).
        z: embeddings to reach, (B, D).
        transformations: what the match should survive.
        generators: random numbers of each image, so that no result depends on the other images.
        radius: radius of the ball about the source, in pixel units; None for the box alone.
        norm: norm of the ball, "linf" or "l2".
        max_evals: evaluations per image of the whole match.
        itself: whether the image should match without a transformation too.
        start: images to start from, (B, 3, H, W), if not from the source.
        progress: called with a `Progress` after every step.

    Returns:
        The last images, from which `match_embedding` can start, with the root of the mean above at the last step.
    """
    began, cost = time.perf_counter(), itself + len(transformations)
    steps, N = int(SHARE * max_evals / cost), source[0].numel()
    with torch.inference_mode(False), no_tf32(), no_autocast():
        f, z = admit(f, source, noise=True), z.detach().double()
        feasible = FeasibleSet.around(source.detach().flatten(1), radius, norm, batched=True)
        x = (source if start is None else start).detach().clone()
        mean, square, error = torch.zeros_like(x), torch.zeros_like(x), x.new_full((len(x),), math.inf)
        first = _STEP_LINF if feasible.linf else _STEP
        if radius is not None:
            first = min(first, _OF_RADIUS * radius / (1 if feasible.linf else math.sqrt(N)))
        for k in range(steps):
            error, gradient = _evaluate(f, x, z, transformations, generators, itself)
            size = gradient.square() if feasible.linf else gradient.square().mean((1, 2, 3), keepdim=True)
            mean = _MEAN * mean + (1 - _MEAN) * gradient
            square = _SQUARE * square + (1 - _SQUARE) * size
            scale = (square / (1 - _SQUARE ** (k + 1))).sqrt().clamp_min(1e-30)
            rate = first * (_LAST + (1 - _LAST) * (1 + math.cos(math.pi * k / steps)) / 2)
            moved = x - rate / (1 - _MEAN ** (k + 1)) * mean / scale
            x = feasible.project(moved.flatten(1)).view_as(x)
            if progress is not None:
                progress(_state(x, error, (k + 1) * cost))
    end = _state(x, error, steps * cost)
    seconds = torch.full_like(end.errors, (time.perf_counter() - began) / len(x))
    return MatchResult(x, end.errors, end.num_evals, seconds, (Status.MAX_EVALS,) * len(x), ((),) * len(x), source)


def _state(x: Tensor, error: Tensor, evals: int) -> Progress:
    error = error.detach().double().cpu()
    return Progress(x, error, torch.full_like(error, evals), torch.ones_like(error, dtype=torch.bool))


def _evaluate(
    f: Function, x: Tensor, z: Tensor, transformations: Sequence[Transformation],
    generators: Sequence[torch.Generator], itself: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the root of the mean square error of fresh draws (B,), and the gradient of the mean square."""
    x, scale = x.detach().requires_grad_(True), torch.linalg.vector_norm(z, dim=1)
    dither = [torch.rand(one.shape, generator=generator) - 0.5 for one, generator in zip(x, generators, strict=True)]
    draws = [[one.draw(generator) for one in transformations] for generator in generators]
    total, gradient = torch.zeros_like(scale), torch.zeros_like(x)
    for k in range(-itself, len(transformations)):  # one at a time: memory for B images
        with torch.enable_grad():
            y = x
            if k >= 0:
                levels = rounded(255 * x + torch.stack(dither).to(x)).clamp(0, 255)
                y = torch.stack([own[k].surrogate(one) for own, one in zip(draws, levels, strict=True)]) / 255
            out = f(y)
            residual = (out.detach().double() - z) / scale[:, None]
            (own,) = torch.autograd.grad(out, x, (2 * residual / scale[:, None]).to(out))
        finite = (residual.isfinite().all(dim=1) & own.flatten(1).isfinite().all(dim=1))[:, None, None, None]
        gradient += torch.where(finite, own, 0.0)
        total += residual.square().sum(dim=1)
    count = itself + len(transformations)
    return (total / count).sqrt(), gradient / count
