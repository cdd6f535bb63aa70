"""Extreme-value fit: where the largest of many maxima would end (reverse Weibull, as CLEVER uses it)."""

from __future__ import annotations

import torch
from torch import Tensor

_SPAN = 1e4  # largest distance of the end point from the largest maximum tried, in spreads of the maxima
_GRID = 161
_ZOOMS = 6


def fit_reverse_weibull(maxima: Tensor) -> tuple[float, float, float]:
    """Fit F(y) = exp(−((a − y)/b)^c), y ≤ a, to maxima by maximum likelihood, c ≥ 1; a is the end point.

    For a fixed a the distances a − y are Weibull distributed; b has a closed form and c the usual one-dimensional
    equation, solved by bisection. The likelihood is then searched over a > max y on a grid that is refined six times.
    Below c = 1 it grows without bound as a → max y, so those fits are left out; where it is still growing as a → ∞ (the
    tail has no end, as far as these maxima can tell) there is no estimate.

    Args:
        maxima: y, (M,), at least 5, finite.

    Returns:
        a, b, c; (max y, 0, ∞) where all maxima are equal to rounding, NaN where the likelihood has no maximum.

    Raises:
        ValueError: fewer than 5 maxima, or some not finite.

    Example:
        >>> import torch
        >>> from hf_equiv.extreme import fit_reverse_weibull
        >>> u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        >>> a, b, c = fit_reverse_weibull(5 - 2 * (-u.log()) ** (1 / 3))
        >>> round(a, 1), round(b, 1), round(c, 1)
        (5.0, 2.0, 3.0)

    References:
        Weng et al. (2018), "Evaluating the robustness of neural networks: an extreme value theory approach",
        arXiv:1801.10578, §4 (CLEVER). Smith (1985), *Biometrika* 72:67 (likelihoods with an unknown end point).
    """
    y = maxima.detach().double().flatten().cpu()
    if len(y) < 5 or not bool(torch.isfinite(y).all()):
        raise ValueError(f"`maxima` must be at least 5 finite numbers; got {len(y)}. Draw more batches.")
    largest, spread = float(y.max()), float(y.max() - y.min())
    if spread <= 1e-9 * abs(largest):
        return largest, 0.0, float("inf")
    low, high = 1e-4, _SPAN
    for zoom in range(_ZOOMS):
        gaps = torch.logspace(torch.tensor(low).log10().item(), torch.tensor(high).log10().item(), _GRID).double()
        likelihood, shape = _profile(largest + spread * gaps[:, None] - y)
        likelihood = torch.where(shape >= 1, likelihood, -torch.inf)
        best = int(likelihood.argmax())
        if not bool(likelihood[best].isfinite()) or (zoom == 0 and best == _GRID - 1):
            return float("nan"), float("nan"), float("nan")
        low, high = float(gaps[max(0, best - 1)]), float(gaps[min(_GRID - 1, best + 1)])
    distances = largest + spread * gaps[best] - y
    c = float(shape[best])
    return float(largest + spread * gaps[best]), float(distances.pow(c).mean().pow(1 / c)), c


def _profile(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Largest log-likelihood over (b, c) of Weibull distances (G, M), and the c that has it, (G,)."""
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
