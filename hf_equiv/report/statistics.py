"""Estimate with intervals from SciPy: order statistics or the bootstrap for a median, Wilson's interval for a share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
from scipy import optimize, stats

Rows = Sequence[Mapping[str, Any]]
Record = TypeVar("Record")

RESAMPLES = 10_000
SMALL = 10  # with fewer values a verdict has a caveat, and the bootstrap of a median is too narrow: 87 % at n = 4
LEVEL = 0.95
_CHUNK = 4_000_000  # values drawn at once


@dataclass(frozen=True)
class Estimate:
    """A number with its interval and the number of values behind it; a single value has no interval."""

    value: float
    low: float | None
    high: float | None
    n: int
    coverage: float = field(default=LEVEL, kw_only=True)  # of the interval; below 95 % for the range of 2 to 5 values
    method: str = field(default="bootstrap", kw_only=True)  # or "order statistics", "Wilson", "Newcombe"

    def is_below(self, other: Estimate) -> bool:
        """Return whether this interval ends before the other one begins."""
        return self.high is not None and other.low is not None and self.high < other.low

    def side_of(self, limit: float) -> int:
        """Return 1 if the interval lies above a limit, -1 if it lies below, and 0 if it includes it or is unknown."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > limit) - (self.high < limit)


@dataclass(frozen=True)
class Share(Estimate):
    """A share `hits` / `n` with Wilson's interval."""

    hits: int

    @property
    def most(self) -> int:
        """1 for all, or more than half by the lower end of the interval; -1 for none, or fewer than half; else 0."""
        return self.side_of(0.5) if 0 < self.hits < self.n else 1 if self.hits else -1


@dataclass(frozen=True)
class Spread:
    """The distribution of values that depend on each other, and therefore have no interval."""

    median: float
    q05: float | None
    q95: float | None
    min: float
    max: float
    n: int


def estimate(values: Iterable[float | None], *, seed: int = 0) -> Estimate | None:
    """Estimate a median with an interval that covers it in 95 % of samples; None without a value."""
    # From 10 values on it is the percentile bootstrap (Efron 1979). It ignores that pairs may share an image.
    known = _finite(values)
    if not len(known):
        return None
    value, n = float(np.median(known)), len(known)
    if n == 1:
        return Estimate(value, None, None, 1)
    if n < SMALL:
        return _of_few(value, np.sort(known))
    interval = stats.bootstrap(
        (known,), np.median, n_resamples=RESAMPLES, batch=max(1, _CHUNK // n), confidence_level=LEVEL,
        method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Estimate(value, float(interval.low), float(interval.high), n)


def _of_few(value: float, known: np.ndarray) -> Estimate:
    """Estimate a median between two of 2 to 9 ascending values."""
    # The k-th least and k-th largest of n enclose the median with probability 1 − 2 P(fewer than k of n fair coins fall
    # heads), which is 1 − 2¹⁻ⁿ for the range. Below 6 values the range covers less than 95 %.
    n = len(known)
    k = max(1, int(stats.binom.ppf((1 - LEVEL) / 2, n, 0.5)))
    coverage = 1 - 2 * float(stats.binom.cdf(k - 1, n, 0.5))
    return Estimate(value, float(known[k - 1]), float(known[-k]), n, coverage=coverage, method="order statistics")


def share(flags: Iterable[Any]) -> Share | None:
    """Estimate the share of true flags with Wilson's 95 % score interval (1927); None if no flag is known."""
    known = [bool(flag) for flag in flags if flag is not None]
    n, hits = len(known), sum(known)
    if n < 2:
        return Share(float(hits), None, None, 1, hits, method="Wilson") if known else None
    interval = stats.binomtest(hits, n).proportion_ci(LEVEL, method="wilson")
    low = float(interval.low) if hits > 0 else 0.0  # without rounding dust
    return Share(hits / n, low, float(interval.high) if hits < n else 1.0, n, hits, method="Wilson")


def auc(positives: Iterable[float | None], negatives: Iterable[float | None]) -> Estimate | None:
    """Estimate the area under the ROC curve: the probability that a positive lies above a negative, ties by half."""
    # The interval inverts the score test with the variance of Hanley and McNeil (Newcombe 2006, Stat. Med. 25:559,
    # method 5): unlike a bootstrap it has a width at 0 and 1.
    high, low = _finite(positives), _finite(negatives)
    m, n = len(high), len(low)
    if not m or not n:
        return None
    value = float((np.sign(high[:, None] - low[None]) + 1).mean() / 2)
    middle, z = min(max(value, 1e-9), 1 - 1e-9), float(stats.norm.ppf((1 + LEVEL) / 2))

    def excess(t: float) -> float:
        more = ((m + n) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))
        return float((value - t) ** 2 - z * z * t * (1 - t) * (1 + more) / (m * n))

    ends = (
        (0.0 if value <= 0 else optimize.brentq(excess, 0, middle)),
        (1.0 if value >= 1 else optimize.brentq(excess, middle, 1)),
    )
    return Estimate(value, *ends, m + n, method="Newcombe")


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return median, 5 % and 95 % quantiles, extremes and count of values; None if there are none."""
    known = _finite(values)
    if not len(known):
        return None
    low, middle, high = (float(q) for q in np.quantile(known, (0.05, 0.5, 0.95)))
    return Spread(middle, low, high, float(known.min()), float(known.max()), len(known))


def _finite(values: Iterable[float | None]) -> np.ndarray:
    return np.array([v for v in values if v is not None and math.isfinite(v)], dtype=np.float64)


def column(rows: Rows, key: str) -> list[Any]:
    """Return one column of rows; None where a row does not have it."""
    return [row.get(key) for row in rows]


def fill(record: type[Record], rows: Rows, stated: Mapping[str, Any], /, **given: Any) -> Record:
    """Fill each field of a dataclass as given, else as stated, else with the median of the column of that name."""
    known = {**stated, **given}
    names = [one.name for one in fields(record)]  # type: ignore[arg-type]
    return record(**{name: known[name] if name in known else estimate(column(rows, name)) for name in names})
