"""Bound a mean and a variance of bounded values from samples, at a stated probability."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALVINGS = 50
_BET = 0.9  # largest part of the capital at stake


def mean_at_least(values: Tensor, alpha: float) -> float:
    """Return a lower bound, at least 0, of the mean of values (n,) in [−1, 1]; it is too high with probability `alpha`.

    A gambler bets on values above m with capital K = Π(1 + λᵢ(vᵢ − m)), and λᵢ depends on earlier values alone. If no
    vᵢ has a mean above m given the earlier values, K exceeds 1/alpha with probability `alpha` at most: each m where K
    does is refuted. Waudby-Smith, Ramdas (2024), *J. R. Stat. Soc. B* 86:1, arXiv:2010.09686, §4.
    """
    values = values.double().cpu()
    count = torch.arange(1, len(values) + 1, dtype=torch.float64)
    spread = 1 + (values - values.cumsum(0) / (count + 1)).square().cumsum(0)
    earlier = torch.cat([spread.new_ones(1), (spread / (count + 1))[:-1]])
    bets = (-2 * math.log(alpha) / (len(values) * earlier)).sqrt()

    def is_refuted(mean: float) -> bool:
        stake = bets.clamp(max=_BET / (1 + mean))
        return float(torch.log1p(stake * (values - mean)).cumsum(0).max()) >= -math.log(alpha)

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):  # the capital falls with m
        middle = (low + high) / 2
        low, high = (middle, high) if is_refuted(middle) else (low, middle)
    return low


def variance_at_most(largest: float, n: int, alpha: float) -> float:
    """Return an upper bound of the largest variance of uᵀh over unit vectors u; it is too low with probability `alpha`.

    `largest` is the largest eigenvalue of the covariance (divisor n − 1) of n vectors h, ‖h‖ ≤ 1. For the u of largest
    variance λ, which is fixed, uᵀCu ≤ `largest` is a mean over pairs of values in [0, 2] with expectation λ, so that

        P(uᵀCu ≤ c) ≤ exp(−⌊n/2⌋ KL(c/2 ‖ λ/2)),    KL(p ‖ q) = p log(p/q) + (1 − p) log((1 − p)/(1 − q)).

    Hoeffding (1963), *J. Am. Stat. Assoc.* 58:13, theorem 1 and eq. 5.7. The dimension of h does not enter.
    """
    p = min(max(largest / 2, 0.0), 1.0)

    def is_refuted(q: float) -> bool:
        first = p * math.log(p / q) if p else 0.0
        rest = (1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else 0.0
        return n // 2 * (first + rest) >= -math.log(alpha)

    low, high = p, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if middle < 1 and is_refuted(middle) else (middle, high)
    return min(2 * high, 1.0)
