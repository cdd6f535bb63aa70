"""Estimates with 95 % intervals, from SciPy: the bootstrap of a median or mean, Wilson's interval of a share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 4_000_000  # values drawn at once
_STATISTICS: dict[str, Any] = {"median": np.median, "mean": np.mean}


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: the estimate.
        low: lower end of the interval; None for a single value, which has no interval.
        high: upper end.
        n: number of values behind the estimate.
    """

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Share(Estimate):
    """A share `hits` / `n` with Wilson's interval."""

    hits: int


@dataclass(frozen=True)
class Spread:
    """The distribution of values that depend on each other, so that no interval is stated."""

    median: float
    q05: float | None
    q95: float | None
    min: float
    max: float
    n: int


def estimate(values: Iterable[float | None], statistic: str = "median", *, seed: int = 0) -> Estimate | None:
    """Estimate a median or mean with the 95 % percentile bootstrap interval (Efron 1979).

    The interval is too narrow for small n and ignores that pairs may share an image. Absent and infinite values are
    left out.

    Args:
        values: one for each pair or image.
        statistic: `median` or `mean`.
        seed: seed of the resampling.

    Returns:
        The estimate, without an interval for a single value; None where there is no value.

    Raises:
        ValueError: unknown statistic.

    Example:
        >>> estimate([1.0, 2.0, 3.0, 4.0, 5.0]).value
        3.0
    """
    if statistic not in _STATISTICS:
        raise ValueError(f"`statistic` must be one of {', '.join(_STATISTICS)}; got {statistic!r}.")
    measure, known = _STATISTICS[statistic], _finite(values)
    if not len(known):
        return None
    value = float(measure(known))
    if len(known) == 1:
        return Estimate(value, None, None, 1)
    interval = stats.bootstrap(
        (known,), measure, n_resamples=RESAMPLES, batch=max(1, _CHUNK // len(known)), confidence_level=LEVEL,
        method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Estimate(value, float(interval.low), float(interval.high), len(known))


def share(flags: Iterable[Any]) -> Share | None:
    """Estimate the share of true flags with Wilson's 95 % score interval (Wilson 1927).

    Args:
        flags: one for each pair; those that are None are left out.

    Returns:
        The share, without an interval for a single flag; None where there is none.

    Example:
        >>> share([True] * 6).hits, round(share([True] * 6).low, 2)
        (6, 0.61)
    """
    known = [bool(flag) for flag in flags if flag is not None]
    n, hits = len(known), sum(known)
    if n < 2:
        return Share(float(hits), None, None, 1, hits) if known else None
    interval = stats.binomtest(hits, n).proportion_ci(LEVEL, method="wilson")
    return Share(hits / n, float(interval.low), float(interval.high), n, hits)


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return median, 5 % and 95 % quantiles, extremes and count of values; None without any."""
    known = _finite(values)
    if not len(known):
        return None
    low, middle, high = (float(q) for q in np.quantile(known, (0.05, 0.5, 0.95)))
    return Spread(middle, low, high, float(known.min()), float(known.max()), len(known))


def _finite(values: Iterable[float | None]) -> np.ndarray:
    return np.array([v for v in values if v is not None and math.isfinite(v)], dtype=np.float64)
