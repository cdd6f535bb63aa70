"""Estimates and intervals, against closed forms and known distributions."""

import math

import numpy as np
import pytest
from scipy import stats

from hf_equiv.report import statistics
from hf_equiv.report.statistics import auc, estimate, share, spread


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (1, 7), (6, 6), (50, 100), (99, 100), (3, 1000)])
def test_a_share_has_wilsons_interval(hits, n):
    """The closed form of Wilson (1927), z = 1.96."""
    found, z, p = share([True] * hits + [False] * (n - hits) + [None]), 1.959963984540054, hits / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (found.value, found.hits, found.n) == (p, hits, n)
    assert (found.low, found.high) == pytest.approx((max(0, middle - half), min(1, middle + half)), abs=1e-12)


def test_a_share_of_little():
    assert share([]) is None
    assert share([None]) is None
    for flag in (True, False):
        one = share([flag])
        assert (one.value, one.low, one.high, one.n, one.hits) == (flag, None, None, 1, flag)


def test_the_bootstrap_by_hand():
    """Resample with another seed and take the quantiles."""
    values = np.random.default_rng(3).lognormal(size=41)
    found = estimate(values, seed=1)
    again = np.median(values[np.random.default_rng(7).integers(0, 41, (10_000, 41))], axis=1)
    low, high = np.quantile(again, (0.025, 0.975))
    assert found.value == np.median(values)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_the_median_has_the_interval_of_its_order_statistics():
    """The binomial interval of the median needs no resampling; the two agree for smooth distributions."""
    values = np.sort(np.random.default_rng(5).normal(size=400))
    found = estimate(values)
    low, high = (values[int(k)] for k in stats.binom.ppf((0.025, 0.975), 400, 0.5))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05)


def test_bootstrap_covers_the_median_of_a_known_distribution(monkeypatch):
    """Of 200 samples of 30 normal values, the 95 % interval of the median holds 0 about 94 % of the time."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    generator = np.random.default_rng(0)
    found = [estimate(generator.normal(size=30)) for _ in range(200)]
    assert 0.87 <= np.mean([e.low <= 0 <= e.high for e in found]) <= 0.98


def test_an_estimate_of_little():
    assert estimate([]) is None
    assert estimate([None, float("nan")]) is None
    one = estimate([None, 2.5])
    assert (one.value, one.low, one.high, one.n) == (2.5, None, None, 1)
    same = estimate([1.0, 1.0, 1.0])
    assert (same.low, same.high) == (1.0, 1.0)


def test_bootstrap_is_the_same_again_also_in_chunks(monkeypatch):
    values = list(range(30))
    first = estimate(values)
    assert estimate(values) == first
    assert estimate(values, seed=1).low is not None
    monkeypatch.setattr(statistics, "_CHUNK", 1000)
    assert estimate(values) == first


def test_spread():
    assert spread([]) is None
    assert spread([None, float("inf")]) is None
    assert spread([*range(101), None]) == statistics.Spread(median=50, q05=5, q95=95, min=0, max=100, n=101)


@pytest.mark.parametrize(("n", "inwards", "coverage"), [(2, 0, 0.5), (3, 0, 0.75), (5, 0, 0.9375), (6, 0, 0.96875),
                                                        (8, 0, 0.9921875), (9, 1, 0.9609375)])  # fmt: skip
def test_a_median_of_few_lies_between_two_of_them(n, inwards, coverage):
    """The stated coverage is exact, and at least 95 % from 6 values on."""
    values = np.random.default_rng(n).lognormal(size=(4000, n))
    found = estimate(values[0])
    ordered = np.sort(values, axis=1)
    assert (found.low, found.high) == (ordered[0, inwards], ordered[0, -1 - inwards])
    assert (found.coverage, found.method) == (coverage, "order statistics")
    covered = np.mean((ordered[:, inwards] <= 1) & (ordered[:, -1 - inwards] >= 1))  # the median is 1
    assert covered == pytest.approx(coverage, abs=0.03)
    assert estimate(np.arange(10.0)).method == "bootstrap"


@pytest.mark.parametrize("values", [[0, 1], [0, 1, 1], [1, 1, 1, 1], [0, 0.5, 1, 1, 1, 1, 0.2], [0.1, 1] * 6])
def test_the_interval_of_values_from_0_to_1_stays_there(values):
    found = estimate(values)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(("hits", "n", "side"), [(1, 1, 1), (0, 1, -1), (3, 3, 1), (0, 3, -1), (2, 3, 0), (5, 10, 0),
                                                 (9, 10, 1), (1, 10, -1)])  # fmt: skip
def test_all_or_none_of_few_is_no_draw(hits, n, side):
    assert share([k < hits for k in range(n)]).most == side


@pytest.mark.parametrize("n", [2, 5, 9, 50, 1000])
def test_a_share_of_none_or_all_has_no_rounding_dust(n):
    none, every = share([False] * n), share([True] * n)
    assert none.low == 0.0
    assert every.high == 1.0
    assert (none.method, none.coverage) == ("Wilson", 0.95)


def test_area_under_the_roc_curve():
    apart, equal = auc([2, 3, 4], [0, 1]), auc([1, 2], [1, 2])
    assert (apart.value, apart.high) == (1, 1)
    assert 0.3 < apart.low < 0.95
    assert equal.value == 0.5
    assert equal.low == pytest.approx(1 - equal.high)
    assert auc([0, 1], [2, 3, 4]).low == 0
    assert auc([], [1]) is None
    wide, narrow = auc(range(5), range(5)), auc(range(500), range(500))
    assert narrow.high - narrow.low < 0.1 < wide.high - wide.low


def test_the_interval_of_the_area_covers_it():
    generator, covered = np.random.default_rng(0), 0
    for _ in range(300):
        found = auc(generator.normal(1, 1, 15), generator.normal(0, 1, 20))
        covered += found.low <= 0.7602 <= found.high  # Φ(1/√2)
    assert covered >= 0.93 * 300
