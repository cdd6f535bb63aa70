"""Bound how far the mean of a bounded function of Gaussian noise can lie from zero, if a shift of the noise undoes it.

Among all g with |g| ≤ 1 and Var g ≤ λ under N(0, I) whose mean under N(δ, I), ‖δ‖ = r, is at most 0, the one of largest
mean under N(0, I) is a function of z = ⟨ε, δ⟩/r alone, a mean over the rest of ε being no less admissible. It maximises
a linear functional on a convex set. By its multipliers it is

    g(z) = clip(b·(Λ₀ − Λ(z)), −1, 1),    Λ(z) = exp(rz − r²/2),

with Λ the ratio of the densities. For λ = 1 it is the step of Neyman and Pearson, with mean 2Φ(r) − 1. Without the clip
it is linear in Λ, with mean √(λ(exp r² − 1)). All moments have closed forms: E[Λᵖ; z < t] = exp(p(p−1)r²/2)·Φ(t − pr).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST, _MOST = 1e-3, 5.0  # shifts in between are solved; below them the clip hardly acts, above them nothing is left
_SLOPE = 12.0  # largest |log b|
_HALVINGS, _STEPS = 45, 15  # of the search for b, and for Λ₀ at each


def largest_mean(shifts: Tensor, variance: Tensor) -> Tensor:
    """Return the largest mean of g under N(0, I) that a shift of length r can bring to 0.

    Args:
        shifts: r ≥ 0, in standard deviations of the noise, float64.
        variance: λ in [0, 1], the most variance of g, float64, to broadcast with `shifts`.

    Returns:
        The mean, in [0, 1], float64; 1 for shifts above 5.
    """
    shifts, variance = torch.broadcast_tensors(shifts, variance)
    r = shifts.clamp(_LEAST, _MOST)
    low, high = torch.full_like(r, -_SLOPE), torch.full_like(r, _SLOPE)
    for _ in range(_HALVINGS):  # the slope b at which the variance is λ, from above
        middle = (low + high) / 2
        mean, square = _moments(r, middle.exp())
        enough = square - mean.square() >= variance
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    solved = _moments(r, high.exp())[0]
    step, line = 2 * torch.special.ndtr(shifts) - 1, (variance * torch.expm1(shifts.square())).sqrt()
    found = torch.minimum(torch.minimum(step, line), torch.where(shifts < _LEAST, line, solved))
    return torch.where(shifts > _MOST, 1.0, found)


def _moments(r: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return E g and E g² under N(0, I) of the g of slope b whose mean under N(δ, I), E[gΛ], is 0."""
    low, high, zero = torch.zeros_like(r), 2 * r + 1, 1.25 * r
    for _ in range(_STEPS):  # Newton steps for z₀, Λ(z₀) = Λ₀, within a bracket: E[gΛ] rises with it
        top, parts = _parts(r, slope, zero)
        value = parts[1][0] - parts[1][2] + slope * (top * parts[1][1] - parts[2][1])
        low, high = torch.where(value < 0, zero, low), torch.where(value < 0, high, zero)
        near = zero - value / (slope * r * top * parts[1][1])
        zero = torch.where((near > low) & (near < high), near, (low + high) / 2)
    top, parts = _parts(r, slope, zero)
    (below, first, above), second, third = parts[0], parts[1][1], parts[2][1]
    mean = below - above + slope * (top * first - second)
    return mean, below + above + slope.square() * (top.square() * first - 2 * top * second + third)


def _parts(r: Tensor, slope: Tensor, zero: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Return Λ₀, and E[Λᵖ], p = 0, 1, 2, where g is 1, between, and −1."""
    half = r.square() / 2
    top = (r * zero - half).exp()
    ends = [((top + sign / slope).clamp_min(0).log() + half) / r for sign in (-1, 1)]
    parts = []
    for p in range(3):
        scale = (p * (p - 1) * half).exp()
        below, until = (scale * torch.special.ndtr(end - p * r) for end in ends)
        parts.append((below, until - below, scale - until))
    return top, parts
