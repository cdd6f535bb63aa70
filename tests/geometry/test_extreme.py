"""The reverse Weibull fit against SciPy's likelihood and against samples of known end point."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from hf_equiv.geometry.regional import fit_reverse_weibull


def sample(a, b, c, count, seed=0):
    u = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a - b * (-u.log()) ** (1 / c)


@pytest.mark.parametrize(("a", "b", "c"), [(5.0, 2.0, 3.0), (100.0, 0.5, 2.0), (1e-3, 1e-4, 4.0)])
def test_end_point_of_a_large_sample(a, b, c):
    fitted = fit_reverse_weibull(sample(a, b, c, 4000))
    assert fitted[0] == pytest.approx(a, abs=0.15 * b)
    assert fitted[1] == pytest.approx(b, rel=0.15)
    assert fitted[2] == pytest.approx(c, rel=0.2)


@pytest.mark.parametrize("seed", range(4))
def test_at_least_as_likely_as_what_scipy_finds(seed):
    y = sample(5.0, 2.0, 2.5, 60, seed)
    a, b, c = fit_reverse_weibull(y)
    ours = stats.weibull_max.logpdf(y.numpy(), c, loc=a, scale=b).sum()
    shape, location, scale = stats.weibull_max.fit(y.numpy(), 2.5, loc=float(y.max()) + 0.1, scale=2.0)
    theirs = stats.weibull_max.logpdf(y.numpy(), shape, loc=location, scale=scale).sum()
    assert a > float(y.max())
    assert ours >= theirs - 1e-4


def test_equal_maxima_end_where_they_are():
    assert fit_reverse_weibull(torch.full((8,), 3.0)) == (3.0, 0.0, math.inf)


def test_a_tail_without_an_end_has_no_estimate():
    u = (torch.arange(50, dtype=torch.float64) + 0.5) / 50
    assert math.isnan(fit_reverse_weibull(u.pow(-0.7))[0])  # Pareto: a heavy upper tail


@pytest.mark.parametrize("maxima", [torch.ones(4), torch.tensor([1.0, 2, 3, 4, math.nan])])
def test_bad_input(maxima):
    with pytest.raises(ValueError, match="at least 5 finite"):
        fit_reverse_weibull(maxima)
