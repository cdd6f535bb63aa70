"""The largest mean that a shift undoes, against closed forms and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import norm

from hf_equiv.defences.shifts import largest_mean

SHIFTS = torch.tensor([0.0, 1e-4, 0.01, 0.1, 0.5, 1.0, 2.0, 3.0, 4.9], dtype=torch.float64)


def test_with_any_variance_it_is_that_of_neyman_and_pearson():
    wanted = torch.tensor(2 * norm.cdf(SHIFTS.numpy()) - 1)
    torch.testing.assert_close(largest_mean(SHIFTS, torch.ones(())), wanted, rtol=1e-6, atol=1e-12)


def test_small_shifts_are_linear_in_the_ratio_of_the_densities():
    found = largest_mean(SHIFTS[:4], torch.tensor(1e-3, dtype=torch.float64))
    linear = (1e-3 * torch.expm1(SHIFTS[:4].square())).sqrt()
    assert bool((found <= linear * (1 + 1e-12)).all())
    torch.testing.assert_close(found, linear, rtol=1e-4, atol=0)  # the clip acts beyond three standard deviations


def test_it_rises_with_shift_and_variance():
    variances = torch.tensor([0.0, 1e-4, 1e-3, 0.01, 0.1, 0.5, 1.0], dtype=torch.float64)
    found = largest_mean(SHIFTS, variances[:, None])
    assert bool((found.diff(dim=0) >= -1e-7).all())
    assert bool((found.diff(dim=1) >= -1e-7).all())
    assert float(largest_mean(torch.tensor(5.1), torch.tensor(1e-9))) == 1.0


@pytest.mark.parametrize(("shift", "variance"), [(0.5, 0.03), (1.0, 0.3), (1.0, 0.03), (2.0, 0.003)])
def test_no_function_on_a_grid_has_a_larger_mean(shift, variance):
    edges = np.linspace(-5, 7, 61)
    here, there = np.diff(norm.cdf(edges)), np.diff(norm.cdf(edges - shift))
    found = minimize(
        lambda g: -here @ g, np.zeros(len(here)), jac=lambda g: -here, bounds=[(-1, 1)] * len(here), method="SLSQP",
        options={"maxiter": 200, "ftol": 1e-9},
        constraints=[
            {"type": "ineq", "fun": lambda g: -(there @ g), "jac": lambda g: -there},
            {"type": "ineq", "fun": lambda g: variance - here @ g**2 + (here @ g) ** 2,
             "jac": lambda g: -2 * here * g + 2 * (here @ g) * here},
        ],
    )  # fmt: skip
    assert there @ found.x < 1e-6
    bound = float(largest_mean(torch.tensor(shift).double(), torch.tensor(variance).double()))
    assert -found.fun <= bound * (1 + 1e-6)
    assert -found.fun == pytest.approx(bound, rel=0.02)  # the grid is coarse
