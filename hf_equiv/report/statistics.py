"""Estimates with intervals: bootstrap of a median or mean, Wilson's interval of a share, empirical distributions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000


LEVEL = 0.95


_Z = 1.959963984540054  # the 97.5 % point of the normal distribution


_CHUNK = 4_000_000  # values drawn at once


_STATISTICS: dict[str, Any] = {"median": np.median, "mean": np.mean}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: the estimate.
        low: lower end of the interval; None where there is none (a single value).
        high: upper end.
        n: values it is of.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    def to_json(self) -> dict[str, Any]:
        """The estimate as plain data."""
        return asdict(self)


def bootstrap(
    values: Iterable[float | None], statistic: str = "median", *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate | None:
    """Estimate a median or mean with the 95 % percentile bootstrap interval (Efron 1979).

    Resamples of size n with replacement, the statistic of each, and the 2.5 % and 97.5 % quantiles of those. The
    interval is too narrow for small n and says nothing of pairs that share an image.

    Args:
        values: of the pairs or images; None counts as absent.
        statistic: `median` or `mean`.
        seed: of the resampling.
        resamples: how many.

    Returns:
        The estimate; without an interval for a single value; None where there is no value.

    Raises:
        ValueError: another statistic.

    Example:
        >>> bootstrap([1.0, 2.0, 3.0, 4.0, 5.0]).value
        3.0
    """
    if statistic not in _STATISTICS:
        raise ValueError(f"`statistic` must be one of {', '.join(_STATISTICS)}; got {statistic!r}.")
    measure = _STATISTICS[statistic]
    known = _finite(values)
    n = len(known)
    if n == 0:
        return None
    middle = float(measure(known, axis=0))
    if n == 1:
        return Estimate(middle, None, None, 1)
    generator = np.random.default_rng(seed)
    found = np.empty(resamples)
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        found[start:stop] = measure(known[generator.integers(0, n, (stop - start, n))], axis=1)
    low, high = np.quantile(found, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimate(middle, float(low), float(high), n)


def wilson(hits: int, n: int) -> Estimate | None:
    """Estimate a share with Wilson's 95 % score interval, which stays in [0, 1] and is of use for small n.

    Args:
        hits: how many.
        n: of how many.

    Returns:
        The share; None for n = 0; without an interval for n = 1, where there is nothing to infer from.

    Raises:
        ValueError: more hits than n, or a negative number.

    Example:
        >>> wilson(6, 6).value, round(wilson(6, 6).low, 2)
        (1.0, 0.61)

    References:
        Wilson (1927), J. Am. Stat. Assoc. 22:209.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"`hits` must lie between 0 and n = {n}; got {hits}.")
    if n == 0:
        return None
    share = hits / n
    if n == 1:
        return Estimate(share, None, None, 1)
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half), n)


def estimate(values: Iterable[float | None], statistic: str = "median") -> dict[str, Any] | None:
    """Median or mean with its bootstrap interval, as plain data."""
    found = bootstrap(values, statistic)
    return None if found is None else found.to_json()


def share(flags: Iterable[Any]) -> dict[str, Any] | None:
    """Share of what is true with Wilson's interval, and the count as `hits`; None counts as absent."""
    known = [bool(flag) for flag in flags if flag is not None]
    found = wilson(sum(known), len(known))
    return None if found is None else found.to_json() | {"hits": sum(known)}


def ecdf(values: Iterable[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """Return the empirical distribution: sorted values, and the share that is at most each.

    Example:
        >>> x, y = ecdf([3.0, 1.0])
        >>> x.tolist(), y.tolist()
        ([1.0, 3.0], [0.5, 1.0])
    """
    known = np.sort(_finite(values))
    return known, np.arange(1, len(known) + 1) / max(len(known), 1)


def spread(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Median, 5 % and 95 % quantiles, extremes and count of values that depend on each other; None without any."""
    known = _finite(values)
    if not len(known):
        return None
    low, middle, high = (float(q) for q in np.quantile(known, (0.05, 0.5, 0.95)))
    return {
        "median": middle, "q05": low, "q95": high, "min": float(known.min()), "max": float(known.max()),
        "n": len(known),
    }  # fmt: skip


def _finite(values: Iterable[float | None]) -> np.ndarray:
    return np.array([v for v in values if v is not None and math.isfinite(v)], dtype=np.float64)
