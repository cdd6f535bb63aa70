"""Newton steps: the model against dense algebra, the end of a match, and images that do not disturb each other."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from cases import DIM, images, linear, quadratic, smooth_mlp
from torch import Tensor

from hf_equiv import LBFGS, match_embedding
from hf_equiv.conditions import admit
from hf_equiv.matching import newton
from hf_equiv.matching.feasible import FeasibleSet
from hf_equiv.matching.linear_model import LinearModel
from hf_equiv.matching.newton import Newton


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def end(f, x: Tensor, z: Tensor, goal: float = 1e-9, most: int = 3000) -> tuple[Tensor, Tensor, Tensor]:
    box = FeasibleSet.around(x.flatten(1), None, "linf", batched=True)
    full = torch.full((len(x),), goal, dtype=torch.float64)
    steps = Newton(f, x, z.double(), box, full, torch.full((len(x),), most))
    for _ in steps.run():
        pass
    return steps.best.view(x.shape), steps.error, steps.cost


def move(x: Tensor, r: Tensor, A: Tensor, box: FeasibleSet, first: Tensor, damping: float) -> tuple[Tensor, ...]:
    models = [LinearModel(J.clone(), J.shape[1:]) for J in A]
    return newton.move(x, r, models, box, first, torch.full((len(x), 1), damping, dtype=torch.float64))


def near(f, seed: int, batch: int = 3, away: float = 0.02) -> tuple[Tensor, Tensor]:
    """Images, and the embeddings of others beside them."""
    x = images(batch, seed=seed, dtype=torch.float64)
    return x, f(x + away * random(*x.shape, seed=seed + 1))


@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_a_step_is_the_best_one_in_the_box(damping):
    """Against projected gradients; clipping the best step without a box is worse."""
    A, x, r = random(3, 4, 40, seed=0), random(3, 40, seed=1).sigmoid(), 4 * random(3, 4, seed=2)
    box = FeasibleSet.around(torch.full_like(x, 0.5), None, "linf", batched=True)
    first = -torch.linalg.solve(A @ A.mT + damping * torch.eye(4), r[:, :, None])[:, :, 0]
    moved, change = move(x, r, A, box, first, damping)

    def cost(y: Tensor) -> Tensor:
        return newton.times(A, y - x).add(r).square().sum(dim=1) + damping * (y - x).square().sum(dim=1)

    best = x.clone()
    rate = 1 / (torch.linalg.matrix_norm(A, 2).square() + damping)[:, None]
    for _ in range(20_000):
        slope = newton.times(A.mT, newton.times(A, best - x) + r) + damping * (best - x)
        best = (best - rate * slope).clamp(0, 1)
    assert float(((best == 0) | (best == 1)).double().mean()) > 0.05, "the box matters"
    torch.testing.assert_close(moved, best, rtol=0, atol=5e-2)
    torch.testing.assert_close(cost(moved), cost(best), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(change, newton.times(A, moved - x))
    clipped = box.project(x + newton.times(A.mT, first))
    assert bool((cost(clipped) > 1.05 * cost(best)).all())


@pytest.mark.parametrize(("left", "radius"), [(1e-3, math.inf), (0.0, math.inf), (0.0, 0.3), (0.5, 0.01)])
def test_damping_leaves_a_residual_or_a_length(left, radius):
    values, part = random(1, 6, seed=1).exp(), random(1, 6, seed=2)
    mu = float(newton._damping(values, part, torch.tensor([left]), torch.tensor([radius])))
    ratio = 10 ** (20 / 63)  # the table's

    def residual(mu: float) -> float:
        return float((part * mu / (values + mu)).norm())

    def length(mu: float) -> float:
        return float((part * values.sqrt() / (values + mu)).norm())

    fits = length(mu) <= radius
    assert fits
    assert length(mu / ratio) > radius or residual(mu) <= left or mu <= 2e-14 * float(values.max())
    if radius == math.inf and left:
        assert residual(mu) <= left < residual(ratio * mu)


def test_an_image_whose_pixels_are_all_held_stays():
    """A singular system of this size ends a threaded LU decomposition with an error."""
    A, x, r = torch.zeros(1, 384, 900, dtype=torch.float64), random(1, 900, seed=1).sigmoid(), random(1, 384, seed=2)
    box = FeasibleSet.around(x, None, "linf", batched=True)
    assert torch.equal(move(x, r, A, box, 0 * r, 0.0)[0], x)


def test_a_linear_map_takes_one_step_of_least_length():
    f = linear()
    x, z = near(f, 20)
    found, errors, costs = end(f, x, z)
    J = f.jacobian(x[0])
    shortest = torch.linalg.pinv(J) @ (z - f(x)).double().T
    torch.testing.assert_close((found - x).flatten(1).T, shortest, rtol=0, atol=1e-6)
    assert float(errors.max()) <= 1e-9
    assert costs.tolist() == [2 + 2 * DIM + 1] * 3  # a Jacobian, an embedding and a step, in thirds


@pytest.mark.parametrize("f", [quadratic(), smooth_mlp()], ids=lambda f: type(f).__name__)
def test_curved_maps_are_matched_from_one_jacobian(f, monkeypatch):
    x, z = near(f, 30)
    forwards, formed, real = [], [], newton.jacobians
    monkeypatch.setattr(newton, "jacobians", lambda *args: formed.append(1) or real(*args))

    def counted(v: Tensor) -> Tensor:
        forwards.append(len(v))
        return f(v)

    found, errors, costs = end(counted, x, z)
    again = (f(found) - z).norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(errors, again, rtol=1e-6, atol=1e-12)
    assert float(errors.max()) <= 1e-9
    assert formed == [1]
    assert bool((found >= 0).all() & (found <= 1).all())
    learnt = int(costs.sum()) - sum(forwards) - 2 * 3 * DIM
    assert learnt % 2 == 0, "each row learnt costs a cotangent more"


def test_an_image_alone_takes_the_same_steps():
    f = smooth_mlp()
    x, z = near(f, 40, batch=5)
    z[1] = f(x[1:2])[0] * (1 + 1e-12)  # there at once
    z[3] = 10 * z[3]  # out of reach
    together = end(f, x, z, most=400)
    for i in range(5):
        alone = end(f, x[i : i + 1], z[i : i + 1], most=400)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_image_without_a_finite_jacobian_stays_where_it_is(bad):
    f = smooth_mlp()
    x, z = near(f, 50)
    marked = x.clone()
    marked[1, 0, 0, 0] = 0.999

    def broken(v: Tensor) -> Tensor:
        factor = torch.where(v[:, 0, 0, 0] == 0.999, bad, 1.0)[:, None]
        return f(v) + 0.0 * factor * (v.flatten(1).sum(dim=1, keepdim=True))

    found, errors, _ = end(broken, marked, z)
    assert torch.equal(found[1], marked[1])
    assert float(errors[[0, 2]].max()) <= 1e-9


def test_the_evaluations_allowed_are_kept():
    f = smooth_mlp()
    x, z = near(f, 60, away=0.1)
    for most in (2 + 2 * DIM, 2 + 2 * DIM + 5, 200):
        assert int(end(f, x, z, goal=0.0, most=most)[2].max()) <= most


# Where `match_embedding` ends by Newton steps


def steep(seed: int = 0):
    """A linear map whose singular values span three decades: L-BFGS with a short history creeps along the smallest."""
    inner = linear()
    U, _, V = torch.linalg.svd(inner.A, full_matrices=False)
    scale = torch.logspace(0, -3, DIM, dtype=torch.float64)
    return lambda x: ((x.flatten(1) - 0.5).to(torch.float64) @ V.T.to(torch.float64) * scale @ U.T).to(x)


@pytest.mark.parametrize("radius", [None, 0.05])
def test_a_slow_match_ends_by_newton_steps(radius):
    f = steep()
    x, y = images(2, seed=5, dtype=torch.float64)[:, None].unbind()
    (slope,) = torch.autograd.grad(f(y.requires_grad_())[0, 0], y)  # f is linear: only this corner of a ball has its z
    z = f((x + (0.04 if radius else 0.3) * slope.sign()).clamp(0, 1))
    slow, quick = (
        match_embedding(f, x, z, LBFGS(history=1, newton=newton), radius=radius, max_evals=2000, raise_on_failure=False)
        for newton in (False, True)
    )
    if radius:
        assert float((quick.images - x).abs().max()) <= radius
        assert float(((quick.images - x).abs() > 0.99 * radius).double().mean()) > 0.05, "the ball matters"
    assert quick.converged
    assert float(quick.num_evals) < 0.5 * float(slow.num_evals)


def test_newton_steps_are_counted_and_stay_within_the_evaluations(monkeypatch):
    forwards, backwards, calls = [], [], Counter()

    def f(v):
        forwards.append(len(v))
        backwards.append(v.requires_grad)
        return steep()(v)

    for owner, name in ((newton, "jacobians"), (newton, "vjps"), (Newton, "_step")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, name=name, real=real: calls.update([name]) or real(*args))
    x, y = images(2, seed=5, dtype=torch.float64)[:, None].unbind()
    z, formed, tried = steep()(y), 0, admit(f, x, noise=True)
    for most in range(40, 200, 16):
        forwards.clear(), backwards.clear(), calls.clear()
        result = match_embedding(tried, x, z, LBFGS(history=1), max_evals=most, raise_on_failure=False)
        descent = sum(backwards) - calls["jacobians"] - calls["_step"]  # each with one cotangent
        cotangents = descent + calls["vjps"] + DIM * calls["jacobians"]
        assert 3 * float(result.num_evals) == pytest.approx(sum(forwards) + 2 * cotangents, abs=1e-9)
        assert float(result.num_evals) <= most
        assert result.traces[0][-1][1] == float(result.errors)
        formed += calls["jacobians"]
    assert formed > 0


def test_louder_noise_at_the_match_takes_more_steps_but_no_other_jacobian(monkeypatch):
    formed, real = [], newton.jacobians
    monkeypatch.setattr(newton, "jacobians", lambda *args: formed.append(1) or real(*args))
    x, y = images(2, seed=5, dtype=torch.float64)[:, None].unbind()
    f = admit(steep(), x, noise=True)
    f.noise = 2e-7
    monkeypatch.setattr(type(f), "noise_near", lambda self, image: 6.5e-6)
    result = match_embedding(f, x, steep()(y), LBFGS(history=1), rtol=1e-5)
    assert float(result.errors) <= 3.5e-6
    assert len(formed) == 1


def test_in_an_l2_ball_there_are_none():
    f = steep()
    x, y = images(2, seed=5, dtype=torch.float64)[:, None].unbind()
    runs = [
        match_embedding(
            f, x, y, LBFGS(history=1, newton=newton), radius=0.9, norm="l2", max_evals=200, raise_on_failure=False
        )
        for newton in (False, True)
    ]
    assert torch.equal(runs[0].images, runs[1].images)
