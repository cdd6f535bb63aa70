"""The feasible set against independent projections, and each solver against the iteration written out by hand."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from cases import images, linear, orthogonal, quadratic, smooth_mlp
from torch import Tensor

from hf_equiv.conditions import Function, admit
from hf_equiv.matching.feasible import FeasibleSet, SineChart
from hf_equiv.matching.lbfgs import LBFGS, SecantHistory
from hf_equiv.matching.match import match_embedding
from hf_equiv.matching.solvers import Adam, GradientDescent

RADII = [8 / 255, 4 / 255, 1 / 255, 1 / 3, 1e-3, 1e-4]
SOURCES = ["photo", "black", "white", "grey", "noise"]
DTYPES = [torch.float32, torch.float64]


def make_source(kind: str, dtype: torch.dtype) -> Tensor:
    if kind == "photo":
        return images(1, seed=20, dtype=dtype)
    if kind == "noise":
        return torch.rand((1, 3, 8, 8), generator=torch.Generator().manual_seed(21), dtype=dtype)
    return torch.full((1, 3, 8, 8), {"black": 0.0, "white": 1.0, "grey": 0.1}[kind], dtype=dtype)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def in_ball(x: Tensor, center: Tensor, radius: float, norm: str) -> bool:
    """Membership of the numbers as stored: x − center = d + e without rounding (Knuth's two-sum)."""
    a, b = x.flatten().double(), -center.flatten().double()
    d = a + b
    part = d - a
    e = (a - (d - part)) + (b - part)
    if norm == "linf":
        return bool(((d.abs() < radius) | ((d.abs() == radius) & (d.sign() * e <= 0))).all())
    # the library's own test is rounded too, in float64
    return math.fsum(((d + e) ** 2).tolist()) <= radius**2 * (1 + 1e-14)


class Recorder:
    """Keeps every point that reaches f."""

    def __init__(self, f):
        self.f, self.points = f, []

    def __call__(self, x: Tensor) -> Tensor:
        self.points.extend(x.detach().clone())
        return self.f(x)


def record(f, source: Tensor) -> Function:
    """Return f after its trial, which is anywhere in the box, with an empty list of points."""
    recorder = Recorder(f)
    tried = admit(recorder, source, noise=True)
    recorder.points.clear()
    return tried


# The feasible set


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("kind", SOURCES)
def test_linf_bounds_are_the_outermost_numbers_of_the_ball(kind, radius, dtype):
    center = make_source(kind, dtype)[0]
    ball = FeasibleSet.around(center, radius, "linf")
    assert ball.lower.dtype == ball.upper.dtype == dtype
    assert in_ball(ball.lower, center, radius, "linf")
    assert in_ball(ball.upper, center, radius, "linf")
    assert float(ball.lower.min()) >= 0
    assert float(ball.upper.max()) <= 1
    # not needlessly small: within two units in the last place of the true bound
    unit = torch.finfo(dtype).eps
    wide = center.double()
    assert float((ball.lower.double() - (wide - radius).clamp_min(0)).max()) <= 2 * unit
    assert float(((wide + radius).clamp_max(1) - ball.upper.double()).max()) <= 2 * unit


def test_linf_projection_is_the_clip():
    center, x = images(1, seed=1, dtype=torch.float64)[0], 3 * random((3, 8, 8), 2)
    ball = FeasibleSet.around(center, 0.1, "linf")
    by_hand = x.clamp(0, 1).clamp(center - 0.1, center + 0.1)
    torch.testing.assert_close(ball.project(x), by_hand, rtol=0, atol=3e-16)
    assert torch.equal(FeasibleSet.around(center, None, "linf").project(x), x.clamp(0, 1))


@pytest.mark.parametrize("radius", [0.05, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 100.0])
def test_l2_projection_is_the_nearest_point(radius, spread):
    """Against the piecewise quadratic solved between its breakpoints, and by the variational inequality."""
    center, x = images(1, seed=3, margin=0.05, dtype=torch.float64)[0], spread * random((3, 8, 8), 4)
    found = FeasibleSet.around(center, radius, "l2").project(x)
    assert in_ball(found, center, radius, "l2")
    assert bool(((found >= 0) & (found <= 1)).all())

    # y = clip(c + t·d): pixel i runs into its wall at t = room/|d|; in between ‖y − c‖² = a + b·t²
    d = (x - center).flatten()
    room = torch.where(d > 0, 1 - center.flatten(), center.flatten())
    walls, order = (room / d.abs()).sort()
    a = torch.cat([torch.zeros(1, dtype=torch.float64), room[order].square().cumsum(0)])
    b = torch.cat([d[order].square().flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    t = ((radius**2 - a).clamp_min(0) / b).sqrt()
    ends = torch.cat([walls, torch.full((1,), math.inf, dtype=torch.float64)])
    first = int((t <= ends).nonzero()[0])
    by_hand = (center + min(1.0, float(t[first])) * d.view_as(center)).clamp(0, 1)
    assert float((found - by_hand).norm()) <= 2e-6 * radius

    for seed in range(20):  # ⟨x − Px, y − Px⟩ ≤ 0 for every y of the set
        other = (center + random((3, 8, 8), 100 + seed)).clamp(0, 1) - center
        other = center + other * min(1.0, radius / float(other.norm()))
        assert float(((x - found) * (other - found)).sum()) <= 2e-6 * radius * float((x - found).norm())


def test_l2_projection_leaves_inner_points_alone():
    center = images(1, seed=5)[0]
    x = (center + 0.01).clamp(0, 1)
    ball = FeasibleSet.around(center, 0.2, "l2")
    assert torch.equal(ball.project(x), x)
    once = ball.project(center + 1)
    assert torch.equal(ball.project(once), once)


def test_l2_radius_below_the_float_spacing_leaves_only_the_centre():
    center = torch.full((3, 8, 8), 0.7)
    assert torch.equal(FeasibleSet.around(center, 1e-12, "l2").project(center + 0.1), center)
    assert torch.equal(FeasibleSet.around(center, 1e-12, "linf").project(center + 0.1), center)


def test_free_pixels():
    box = FeasibleSet.around(torch.full((1, 1, 4), 0.5), None, "linf")
    x, gradient = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]), torch.tensor([[[1.0, -1.0, 1.0, -1.0]]])
    assert box.free(x, gradient).flatten().tolist() == [False, True, True, False]
    assert bool(box.free(x, torch.zeros_like(x)).all())


@pytest.mark.parametrize("kind", SOURCES)
def test_sine_chart(kind):
    """It covers the ball, never leaves it, and pulls a gradient back as autograd does."""
    source = make_source(kind, torch.float64)[0]
    chart = SineChart(ball := FeasibleSet.around(source, 8 / 255, "linf"))
    middle, half = (ball.lower + ball.upper) / 2, (ball.upper - ball.lower) / 2
    for t in [-0.97, -0.2, 0.0, 0.9]:
        x = middle + t * half
        torch.testing.assert_close(chart.place(chart.invert(x)), x, rtol=0, atol=1e-15)
    w = (4 * random(source.shape, 22)).requires_grad_()
    x, g = chart.place(w), random(source.shape, 23)
    assert bool(((x >= ball.lower) & (x <= ball.upper)).all())
    (by_autograd,) = torch.autograd.grad(x, w, g)
    torch.testing.assert_close(chart.pull_back(g, w.detach()), by_autograd, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "solver", [LBFGS(), LBFGS(warmup=0, history=2), Adam(lr=0.05), GradientDescent(lr=0.05)], ids=repr
)
def test_every_point_that_reaches_f_is_feasible(solver, norm, kind, dtype):
    source = make_source(kind, dtype)
    for radius in [8 / 255, 1 / 3, 1e-3]:
        f = record(quadratic(), source)
        z = quadratic()(images(1, seed=30, dtype=dtype))
        match_embedding(f, source, z, solver, radius=radius, norm=norm, max_evals=12, raise_on_failure=False)
        assert len(f.points) >= 2
        for x in f.points:
            assert x.dtype == dtype
            assert float(x.min()) >= 0
            assert float(x.max()) <= 1
            assert in_ball(x, source[0], radius, norm)
        assert any(not torch.equal(x, source[0]) for x in f.points)


def test_every_point_lies_in_the_box_without_a_ball():
    f, source = Recorder(smooth_mlp()), make_source("white", torch.float32)
    match_embedding(f, source, smooth_mlp()(images(1, seed=31)), Adam(lr=0.3), max_evals=30, raise_on_failure=False)
    assert all(float(x.min()) >= 0 and float(x.max()) <= 1 for x in f.points)


# L-BFGS


def two_loops(pairs: list[tuple[Tensor, Tensor]], g: Tensor) -> Tensor:
    """Nocedal, Wright, algorithm 7.4: −H·g."""
    q, alphas = g.clone(), []
    for s, y in reversed(pairs):
        alpha = (s @ q) / (s @ y)
        q = q - alpha * y
        alphas.append(alpha)
    s, y = pairs[-1]
    r = (s @ y) / (y @ y) * q
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        r = r + s * (alpha - (y @ r) / (s @ y))
    return -r


def dense_inverse(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """BFGS updates of γI, one pair after the other."""
    s, y = pairs[-1]
    eye = torch.eye(len(s), dtype=s.dtype)
    H = (s @ y) / (y @ y) * eye
    for s, y in pairs:
        rho = 1 / (s @ y)
        V = eye - rho * torch.outer(y, s)
        H = V.T @ H @ V + rho * torch.outer(s, s)
    return H


def curvature_pairs(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    factor = random((size, size), 40)
    hessian = factor @ factor.T / size + 0.1 * torch.eye(size, dtype=torch.float64)
    steps = random((count, size), 41)
    return [(s, hessian @ s) for s in steps]


def history(capacity: int, size: int, batch: int = 1) -> SecantHistory:
    return SecantHistory(torch.empty(batch, size, dtype=torch.float64), capacity)


def add(memory: SecantHistory, s: Tensor, y: Tensor) -> None:
    memory.add(s[None], y[None], torch.tensor([True]))


@pytest.mark.parametrize(("capacity", "added"), [(1, 1), (1, 4), (5, 3), (5, 5), (5, 6), (5, 13), (23, 45), (100, 30)])
def test_direction_is_that_of_bfgs(capacity, added):
    size = 60
    memory, every = history(capacity, size), curvature_pairs(added, size)
    for count, (s, y) in enumerate(every, start=1):
        add(memory, s, y)
        if count % 3 and count < added:  # asking in between must not matter, nor must not asking
            continue
        kept, g = every[max(0, count - capacity) : count], random((size,), 1000 + count)
        found = memory.direction(g[None])[0]
        scale = float(found.norm())
        torch.testing.assert_close(found, two_loops(kept, g), rtol=0, atol=1e-9 * scale)
        torch.testing.assert_close(found, -dense_inverse(kept) @ g, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("absent", range(8))
def test_an_image_without_a_pair_keeps_an_empty_slot(absent):
    size, memory, kept = 60, history(5, 60, batch=2), []
    for count, (s, y) in enumerate(curvature_pairs(8, size)):
        wanted = count != absent
        memory.add(s.expand(2, -1), y.expand(2, -1), torch.tensor([wanted, True]))
        kept = [*kept, (s, y) if wanted else None][-5:]
    g = random((size,), 1000)
    by_hand = two_loops([pair for pair in kept if pair is not None], g)
    found = memory.direction(g.expand(2, -1))
    torch.testing.assert_close(found[0], by_hand, rtol=0, atol=1e-9 * float(by_hand.norm()))
    torch.testing.assert_close(found[1], two_loops(curvature_pairs(8, size)[-5:], g), rtol=0, atol=1e-8)


@pytest.mark.parametrize("added", [3, 5, 8])
def test_a_history_that_grows_keeps_its_pairs(added):
    pairs, memory, g = curvature_pairs(added + 4, 30), history(5, 30), random((30,), 50)
    for count, (s, y) in enumerate(pairs):
        if count == added:
            memory.grow(10)
        add(memory, s, y)
    kept = pairs[max(0, added - 5) :]
    torch.testing.assert_close(memory.direction(g[None])[0], two_loops(kept, g), rtol=0, atol=1e-9)


def test_direction_after_the_history_of_one_image_was_cleared():
    pairs, memory, g = curvature_pairs(9, 20), history(4, 20, batch=2), random((20,), 50)
    for s, y in pairs[:6]:
        memory.add(s.expand(2, -1), y.expand(2, -1), torch.tensor([True, True]))
    memory.clear(torch.tensor([True, False]))
    found = memory.direction(g.expand(2, -1))
    assert bool((found[0] == 0).all())
    torch.testing.assert_close(found[1], two_loops(pairs[2:6], g), rtol=0, atol=1e-10 * float(found[1].norm()))
    for s, y in pairs[6:]:
        memory.add(s.expand(2, -1), y.expand(2, -1), torch.tensor([True, True]))
    found = memory.direction(g.expand(2, -1))[0]
    torch.testing.assert_close(found, two_loops(pairs[6:], g), rtol=0, atol=1e-10 * float(found.norm()))


def test_pairs_without_positive_curvature_are_refused():
    pairs, memory, g = curvature_pairs(3, 20), history(9, 20), random((20,), 51)
    for s, y in pairs:
        add(memory, s, y)
        add(memory, s, -y)
        add(memory, torch.zeros_like(s), y)
    found = memory.direction(g[None])[0]
    torch.testing.assert_close(found, two_loops(pairs, g), rtol=0, atol=1e-10 * float(found.norm()))


@pytest.mark.parametrize("proximity", [0.3, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 2, 40])
@pytest.mark.parametrize("f", [linear(), smooth_mlp()], ids=lambda f: type(f).__name__)
def test_the_pull_to_the_source_ends_no_run(f, warmup, proximity):
    """Whatever its weight, the penalty is there to be lowered: these targets lie within easy reach."""
    source = images(2, seed=60)
    z = f(images(2, seed=61))
    solver = LBFGS(warmup=warmup, proximity=proximity)
    result = match_embedding(f, source, z, solver, raise_on_failure=False, max_evals=400)
    assert result.converged, (result.status, result.errors)


# The first-order solvers


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_descent_is_the_papers_iteration(dtype):
    f, x, lr = smooth_mlp(), images(1, seed=70, dtype=dtype), 0.03
    recorder, z = record(f, x), f(images(1, seed=71, dtype=dtype))
    match_embedding(recorder, x, z, GradientDescent(lr=lr), max_evals=25, raise_on_failure=False)
    for seen in recorder.points:
        assert torch.equal(seen, x[0])
        x = x.clone().requires_grad_(True)
        r = (f(x).detach().double() - z.double()).to(dtype)
        (gradient,) = torch.autograd.grad(f(x), x, r)
        x = torch.clamp(x.detach() - lr * gradient, 0, 1)
    assert len(recorder.points) == 25


def test_gradient_descent_arrives_at_once_where_all_singular_values_are_one():
    x, y = images(1, seed=72, dtype=torch.float64), images(1, seed=73, dtype=torch.float64)
    result = match_embedding(orthogonal(), x, y, GradientDescent(lr=1.0), rtol=1e-14)
    assert float(result.num_evals) == 2


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_adam_is_that_of_torch(dtype, atol):
    f, x = smooth_mlp(), images(1, seed=74, margin=0.05, dtype=dtype)
    recorder, z = record(f, x), f(1 - x)
    options = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-6}
    match_embedding(recorder, x, z, Adam(**options), max_evals=30, raise_on_failure=False)
    pixels = x.clone().requires_grad_(True)
    theirs = torch.optim.Adam([pixels], **options, foreach=False)
    for seen in recorder.points:
        torch.testing.assert_close(seen, pixels.detach()[0], rtol=0, atol=atol)
        theirs.zero_grad()
        (0.5 * (f(pixels) - z).square().sum()).backward()
        theirs.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
    assert len(recorder.points) == 30
    clamped = (recorder.points[-1] == 0) | (recorder.points[-1] == 1)
    assert bool(clamped.any()), "the clamping was not put to the test"


# Hyper-parameters


@pytest.mark.parametrize("solver", [Adam, GradientDescent])
@pytest.mark.parametrize("lr", [0, -1e-3, math.nan, math.inf])
def test_bad_step_size(solver, lr):
    with pytest.raises(ValueError, match=re.escape(f"`lr` must be finite and above 0; got {lr}")):
        solver(lr=lr)


@pytest.mark.parametrize("lr", ["0.1", None, True])
def test_step_size_that_is_no_number(lr):
    with pytest.raises(TypeError, match=f"`lr` must be a number; got {type(lr).__name__}"):
        Adam(lr=lr)


@pytest.mark.parametrize(
    "betas", [(1.0, 0.999), (0.9, 1.0), (-0.1, 0.9), (0.9, -0.1), (0.9, math.nan), (math.inf, 0.9)]
)
def test_bad_betas(betas):
    with pytest.raises(ValueError, match="`betas` must"):
        Adam(betas=betas)


@pytest.mark.parametrize("eps", [-1e-8, math.nan, math.inf])
def test_bad_eps(eps):
    with pytest.raises(ValueError, match="`eps` must"):
        Adam(eps=eps)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"history": 0}, "`history` must be at least 1"),
        ({"history": -3}, "`history` must be at least 1"),
        ({"warmup": -1}, "`warmup` (must be )?at least 0"),
        ({"momentum": 1.0}, "`momentum` must be below 1; got 1.0"),
        ({"momentum": -0.1}, "`momentum` must be finite and at least 0"),
        ({"momentum": math.nan}, "`momentum` must be finite and at least 0"),
        ({"proximity": -0.1}, "`proximity` must be finite and at least 0"),
        ({"proximity": math.nan}, "`proximity` must be finite and at least 0"),
        ({"proximity": math.inf}, "`proximity`"),
        ({"release": math.nan}, "`release` must"),
        ({"release": -1.0}, "`release` must"),
    ],
)
def test_bad_lbfgs_value(options, says):
    with pytest.raises(ValueError, match=says):
        LBFGS(**options)


@pytest.mark.parametrize("options", [{"history": 1.5}, {"history": True}, {"history": "3"}, {"warmup": 2.5}])
def test_lbfgs_counts_are_whole_numbers(options):
    (name,) = options
    with pytest.raises(TypeError, match=f"`{name}` must be a whole number"):
        LBFGS(**options)


@pytest.mark.parametrize("solver", [LBFGS(), Adam(), GradientDescent()], ids=repr)
def test_solvers_are_values(solver):
    assert solver == type(solver)()
    assert hash(solver) == hash(type(solver)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(solver, dataclasses.fields(solver)[0].name, 1)
