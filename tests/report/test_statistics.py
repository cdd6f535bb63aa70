"""Estimates and intervals, against SciPy and closed forms."""

import numpy as np
import pytest
from scipy import stats

from hf_equiv.report.statistics import bootstrap, ecdf, spread, wilson


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (1, 7), (6, 6), (50, 100), (99, 100), (3, 1000)])
def test_wilson_is_scipys(hits, n):
    found, known = wilson(hits, n), stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert found.value == hits / n
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=1e-12)
    assert found.n == n


def test_wilson_of_little():
    assert wilson(0, 0) is None
    assert (wilson(1, 1).low, wilson(1, 1).high) == (None, None)
    with pytest.raises(ValueError, match="between 0 and n = 3; got 4"):
        wilson(4, 3)


@pytest.mark.parametrize("statistic", ["median", "mean"])
def test_bootstrap_is_scipys(statistic):
    values = np.random.default_rng(3).lognormal(size=41)
    found = bootstrap(values, statistic, seed=1)
    measure = getattr(np, statistic)
    known = stats.bootstrap((values,), measure, n_resamples=10_000, method="percentile", rng=np.random.default_rng(7))
    assert found.value == measure(values)
    width = known.confidence_interval.high - known.confidence_interval.low
    assert found.low == pytest.approx(known.confidence_interval.low, abs=0.06 * width)
    assert found.high == pytest.approx(known.confidence_interval.high, abs=0.06 * width)


def test_bootstrap_covers_the_mean_of_a_known_distribution():
    """Of 200 samples of 30 normal values, the 95 % interval of the mean holds 0 about 93 % of the time (z for t)."""
    generator = np.random.default_rng(0)
    found = [bootstrap(generator.normal(size=30), "mean", resamples=1000) for _ in range(200)]
    assert 0.87 <= np.mean([e.low <= 0 <= e.high for e in found]) <= 0.98


def test_bootstrap_of_little():
    assert bootstrap([]) is None
    assert bootstrap([None, float("nan")]) is None
    one = bootstrap([None, 2.5])
    assert (one.value, one.low, one.high, one.n) == (2.5, None, None, 1)
    same = bootstrap([1.0, 1.0, 1.0])
    assert (same.low, same.high) == (1.0, 1.0)
    with pytest.raises(ValueError, match="must be one of median, mean; got 'mode'"):
        bootstrap([1.0], "mode")


def test_bootstrap_is_the_same_again_also_in_chunks(monkeypatch):
    values = list(range(30))
    first = bootstrap(values)
    assert bootstrap(values) == first
    assert bootstrap(values, seed=1).low is not None
    monkeypatch.setattr("hf_equiv.report.statistics._CHUNK", 1000)
    assert bootstrap(values) == first


def test_ecdf_and_spread():
    x, y = ecdf([3.0, None, 1.0, 2.0, float("inf")])
    assert x.tolist() == [1.0, 2.0, 3.0]
    assert y.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    known = stats.ecdf([3.0, 1.0, 2.0]).cdf
    assert y.tolist() == pytest.approx(known.probabilities.tolist())
    assert spread([]) is None
    assert spread(range(101)) == {"median": 50, "q05": 5, "q95": 95, "min": 0, "max": 100, "n": 101}
