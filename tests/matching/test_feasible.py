"""The feasible set in a box of any width, and without one."""

from __future__ import annotations

import math

import pytest
import torch

from hf_equiv.matching.feasible import FeasibleSet, SineChart

CENTER = torch.linspace(-1.9, 1.9, 12, dtype=torch.float64)
FAR = torch.linspace(8, -8, 12, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(12,), (3, 4), (3, 2, 2)])
@pytest.mark.parametrize("bounds", [(-2, 2), (-1.9, 5.0), None])
@pytest.mark.parametrize(("radius", "norm"), [(None, "linf"), (0.5, "linf"), (0.5, "l2"), (3.0, "l2")])
def test_projection(shape, bounds, radius, norm):
    center, x = CENTER.view(shape), FAR.view(shape)
    ball = FeasibleSet.around(center, radius, norm, bounds)
    found = ball.project(x)
    low, high = bounds or (-math.inf, math.inf)
    assert low <= float(found.min()) <= float(found.max()) <= high
    if norm == "linf":
        reach = math.inf if radius is None else radius
        by_hand = x.clamp(low, high).clamp(center - reach, center + reach)
        torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-15)
    else:
        assert float((found - center).norm()) == pytest.approx(radius, rel=1e-5)
        if bounds is None:
            torch.testing.assert_close(found, center + radius * (x - center) / (x - center).norm(), rtol=1e-5, atol=0)
    assert torch.equal(ball.project(center), center)
    on = (found == low) | (found == high)
    assert bool((ball.free(found, FAR.view(shape).sign() * 0 + 1.0) | (found == ball.lower)).all())
    assert bounds is not None or not bool(on.any())


def test_sine_chart_without_a_box():
    chart = SineChart(FeasibleSet.around(CENTER, 0.25, "linf", None))
    torch.testing.assert_close(chart.place(chart.center), CENTER, rtol=0, atol=1e-15)
    assert float((chart.place(FAR) - CENTER).abs().max()) <= 0.25
