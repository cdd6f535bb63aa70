"""Newton steps of the corrector, and where `match_embedding` ends with them."""

from __future__ import annotations

import pytest
import torch
from cases import DIM, images, linear, smooth_mlp

from hf_equiv import LBFGS, match_embedding
from hf_equiv.conditions import admit
from hf_equiv.jacobian import jacobian_cost
from hf_equiv.matching.corrector import Corrector

F64 = torch.float64


def near(f, distance: float, seed: int = 3):
    """A target embedding, and an image at a distance from one that has it."""
    x = 0.25 + 0.5 * images(1, seed=seed, dtype=F64)[0]
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return f(x[None])[0], x + distance * v / v.norm()


def test_newton_steps_reach_the_target_by_one_jacobian():
    f = smooth_mlp()
    z, x = near(f, 0.3)
    corrector = Corrector(f, z, 1e-10)
    start = corrector.look(x)
    corrector.refresh(start)
    place = corrector.newton(start, 40)
    assert start.drift > 1e-2
    assert place.drift <= 1e-10
    assert corrector.num_jacobians == 1
    assert corrector.num_evals == pytest.approx(jacobian_cost(DIM) + corrector.trials)
    assert float((f(place.image[None])[0] - z).norm() / z.norm()) == pytest.approx(place.drift, rel=1e-6, abs=1e-14)


def test_newton_steps_in_float32_end_below_ten_times_the_noise():
    f = smooth_mlp()
    z, x = near(f, 0.3)
    corrector = Corrector(f, z, 3e-7)
    start = corrector.look(x.float())
    corrector.refresh(start)
    assert corrector.newton(start, 40).drift <= 3e-7


@pytest.mark.parametrize("most", [0, 1, 3])
def test_newton_steps_are_limited_and_never_end_farther(most):
    f = smooth_mlp()
    z, x = near(f, 2.0)
    corrector = Corrector(f, z, 1e-14)
    start = corrector.look(x)
    corrector.refresh(start)
    place = corrector.newton(start, most)
    assert corrector.trials <= most
    assert place.drift <= start.drift


def steep(seed: int = 0):
    """A linear map whose singular values span three decades: L-BFGS with a short history creeps along the smallest."""
    inner = linear()
    U, _, V = torch.linalg.svd(inner.A, full_matrices=False)
    scale = torch.logspace(0, -3, DIM, dtype=F64)
    return lambda x: ((x.flatten(1) - 0.5).to(F64) @ V.T.to(F64) * scale @ U.T).to(x)


def test_a_slow_match_ends_by_newton_steps():
    f = steep()
    x, y = images(2, seed=5, dtype=F64)[:, None].unbind()
    slow, quick = (
        match_embedding(f, x, y, LBFGS(history=1, newton=newton), max_evals=2000, raise_on_failure=False)
        for newton in (False, True)
    )
    assert quick.converged
    assert float(quick.num_evals) < 0.5 * float(slow.num_evals)
    assert float(quick.num_evals) % 1 == pytest.approx(jacobian_cost(DIM) % 1)  # a Jacobian is counted, in thirds


def test_newton_steps_are_counted_and_stay_within_the_evaluations():
    calls = []

    def f(x):
        calls.append(len(x))
        return steep()(x)

    x, y = images(2, seed=5, dtype=F64)[:, None].unbind()
    z, jacobians, tried = steep()(y), 0, admit(f, x, noise=True)
    for most in range(40, 200, 16):
        calls.clear()
        result = match_embedding(tried, x, z, LBFGS(history=1), max_evals=most, raise_on_failure=False)
        spent = float(result.num_evals)
        formed = (spent - sum(calls)) / (jacobian_cost(DIM) - 1)  # its forward is among the calls
        assert formed == pytest.approx(round(formed), abs=1e-9)
        assert spent <= most
        assert result.traces[0][-1][1] == float(result.errors)
        jacobians += round(formed)
    assert jacobians > 0


def test_in_a_ball_there_are_none():
    f = steep()
    x, y = images(2, seed=5, dtype=F64)[:, None].unbind()
    runs = [
        match_embedding(
            f, x, y, LBFGS(history=1, newton=newton), radius=0.9, norm="l2", max_evals=200, raise_on_failure=False
        )
        for newton in (False, True)
    ]
    assert torch.equal(runs[0].images, runs[1].images)
