"""Estimate with 95 % intervals from SciPy: the bootstrap for a median or mean, Wilson's interval for a share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from scipy import stats

Rows = Sequence[Mapping[str, Any]]
Record = TypeVar("Record")

RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 4_000_000  # values drawn at once


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval and the number of values behind it; a single value has no interval."""

    value: float
    low: float | None
    high: float | None
    n: int

    def is_below(self, other: Estimate) -> bool:
        """Return whether this interval ends before the other one begins."""
        return self.high is not None and other.low is not None and self.high < other.low


@dataclass(frozen=True)
class Share(Estimate):
    """A share `hits` / `n` with Wilson's interval."""

    hits: int


@dataclass(frozen=True)
class Spread:
    """The distribution of values that depend on each other, and therefore have no interval."""

    median: float
    q05: float | None
    q95: float | None
    min: float
    max: float
    n: int


def estimate(
    values: Iterable[float | None], measure: Callable[..., Any] = np.median, *, seed: int = 0
) -> Estimate | None:
    """Estimate a median or mean with the 95 % percentile bootstrap interval (Efron 1979); None without a value."""
    # The interval is too narrow for small n and ignores that pairs may share an image.
    known = _finite(values)
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
    """Estimate the share of true flags with Wilson's 95 % score interval (1927); None if no flag is known."""
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


def column(rows: Rows, key: str) -> list[Any]:
    """Return one column of rows; None where a row does not have it."""
    return [row.get(key) for row in rows]


def fill(record: type[Record], rows: Rows, stated: Mapping[str, Any], /, **given: Any) -> Record:
    """Fill each field of a dataclass as given, else as stated, else with the median of the column of that name."""
    known = {**stated, **given}
    names = [one.name for one in fields(record)]  # type: ignore[arg-type]
    return record(**{name: known[name] if name in known else estimate(column(rows, name)) for name in names})
