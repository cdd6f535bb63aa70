"""`match_embedding` on encoders of known answer: what it finds, what it states, what it counts, what it refuses."""

from __future__ import annotations

import math
import re

import pytest
import torch
from cases import DIM, SHAPE, images, linear, orthogonal, quadratic, rank_deficient, smooth_mlp, unreachable
from scipy.optimize import lsq_linear
from torch import Tensor

from hf_equiv.conditions import admit
from hf_equiv.matching import driver, newton
from hf_equiv.matching.lbfgs import LBFGS
from hf_equiv.matching.match import match_embedding
from hf_equiv.matching.refine import refine_8bit
from hf_equiv.matching.search import Search
from hf_equiv.matching.solvers import Adam, GradientDescent
from hf_equiv.memory import MEMORY
from hf_equiv.results import ConvergenceError, MatchResult, Progress, Status

SOLVERS = [LBFGS(), LBFGS(history=1, warmup=0), Adam(lr=0.02), GradientDescent(lr=0.05)]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=["lbfgs", "lbfgs_plain", "adam", "gd"])
every_f = pytest.mark.parametrize("f", [linear(), quadratic(), smooth_mlp()], ids=lambda f: type(f).__name__)


def error64(f, x: Tensor, z: Tensor) -> Tensor:
    """‖f(x) − z‖ / ‖z‖ with everything in float64."""
    return (f(x.double()) - z.double()).norm(dim=1) / z.double().norm(dim=1)


def same_result(a: MatchResult, b: MatchResult) -> bool:
    """All but the seconds, bit for bit."""
    equal = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "errors", "num_evals"))
    return equal and a.status == b.status and a.traces == b.traces


class _Meter(torch.autograd.Function):
    """The identity; counts the images that go forwards and those that come back."""

    @staticmethod
    def forward(ctx, x, counts):
        ctx.counts = counts
        counts["forward"] += x.shape[0]
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.counts["backward"] += g.shape[0]
        return g, None


# What it finds


@every_f
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stated_error_is_that_of_the_returned_images(f, dtype):
    x, z = images(3, seed=1, dtype=dtype), f(images(3, seed=2, dtype=dtype))
    result = match_embedding(f, x, z)
    assert result.converged
    assert result.images.dtype == dtype
    assert result.errors.dtype == result.num_evals.dtype == result.seconds.dtype == torch.float64
    again = (f(result.images).double() - z.double()).norm(dim=1) / z.double().norm(dim=1)
    torch.testing.assert_close(result.errors, again, rtol=1e-14, atol=0)
    noise = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(result.errors, error64(f, result.images, z), rtol=0, atol=noise)
    assert bool((result.errors <= 1e-5).all())
    assert bool((result.seconds > 0).all())
    assert not result.images.requires_grad


def test_float64_reaches_what_float32_cannot():
    x, y = images(2, seed=3, dtype=torch.float64), images(2, seed=4, dtype=torch.float64)
    result = match_embedding(smooth_mlp(), x, y, rtol=1e-13)
    assert bool((error64(smooth_mlp(), result.images, smooth_mlp()(y)) <= 1.1e-13).all())


def test_linear_match_is_close_to_the_nearest():
    f, x, z = linear(), images(4, seed=5, dtype=torch.float64), linear()(images(4, seed=6, dtype=torch.float64))
    nearest = f.nearest_match(x, z)
    assert float(nearest.min()) > 0
    assert float(nearest.max()) < 1
    found = match_embedding(f, x, z, rtol=1e-10)
    # every step lies in the row space, so without walls the match is the nearest one
    assert float((found.images - nearest).norm() / (nearest - x).norm()) < 1e-8


@every_f
def test_pixels_and_embeddings_are_the_same_target(f):
    x, y = images(2, seed=7), images(2, seed=8)
    with torch.no_grad():
        assert same_result(match_embedding(f, x, y), match_embedding(f, x, f(y)))


def test_one_target_for_all_sources():
    x, y = images(3, seed=9), images(1, seed=10)
    together = match_embedding(linear(), x, y)
    assert same_result(together, match_embedding(linear(), x, y.expand(3, *SHAPE)))
    assert same_result(together, match_embedding(linear(), x, linear()(y)))


@pytest.mark.parametrize("kind", ["black", "white", "grey", "noise"])
def test_sources_that_are_no_photos(kind):
    noise = torch.rand((1, *SHAPE), generator=torch.Generator().manual_seed(11))
    source = {"black": 0 * noise, "white": 0 * noise + 1, "grey": 0 * noise + 0.5, "noise": noise}[kind]
    result = match_embedding(smooth_mlp(), source, images(1, seed=12))
    assert float(error64(smooth_mlp(), result.images, smooth_mlp()(images(1, seed=12)))) <= 1.1e-5
    assert float(result.images.min()) >= 0
    assert float(result.images.max()) <= 1


def test_target_one_level_away_from_the_source():
    x = images(1, seed=13)
    y = x.clone()
    y[0, 0, 0, 0] += 1 / 255
    result = match_embedding(linear(), x, y)
    assert float(error64(linear(), result.images, linear()(y))) <= 1.1e-5


@pytest.mark.parametrize(("rows", "embedding"), [(1, 1.0), (400, 1.0)])
def test_one_output_and_more_outputs_than_pixels(rows, embedding):
    weight = torch.randn(rows, math.prod(SHAPE), generator=torch.Generator().manual_seed(14)) / 14

    def f(v: Tensor) -> Tensor:
        return torch.stack([weight @ image.flatten() + embedding for image in v])

    result = match_embedding(f, images(2, seed=15), images(2, seed=16))
    assert result.converged


# Batches


@every_solver
def test_batch_equals_one_by_one(solver):
    f, x = smooth_mlp(), images(5, seed=20)
    y = images(5, seed=21)
    y[3] = torch.rand(SHAPE, generator=torch.Generator().manual_seed(22))
    z = f(y)
    z[1] = f(x)[1] * (1 + 1e-6)  # ends at once
    z[4] = 50 * z[4]  # out of reach
    options = {"max_evals": 60, "raise_on_failure": False, "radius": 0.4}
    together = match_embedding(f, x, z, solver, **options)
    assert len(set(together.num_evals.tolist())) > 1, "the images should end at different times"
    for i in range(5):
        alone = match_embedding(f, x[i : i + 1], z[i : i + 1], solver, **options)
        assert torch.equal(alone.images[0], together.images[i])
        assert torch.equal(alone.errors[0], together.errors[i])
        assert torch.equal(alone.num_evals[0], together.num_evals[i])
        assert (alone.status[0], alone.traces[0]) == (together.status[i], together.traces[i])


@every_solver
def test_same_call_same_bits(solver):
    x, y = images(2, seed=23), images(2, seed=24)
    runs = [match_embedding(smooth_mlp(), x, y, solver, max_evals=50, raise_on_failure=False) for _ in range(2)]
    assert same_result(*runs)


def test_memory_layout_and_requires_grad_do_not_matter():
    x, y = images(2, seed=25), images(2, seed=26)
    plain = match_embedding(linear(), x, y)
    last, wide = x.to(memory_format=torch.channels_last), torch.stack([x, x], dim=-1)[..., 0]
    assert same_result(plain, match_embedding(linear(), last, y.to(memory_format=torch.channels_last)))
    assert same_result(plain, match_embedding(linear(), wide, y))
    tracked = match_embedding(linear(), x.clone().requires_grad_(True), y.clone().requires_grad_(True))
    assert same_result(plain, tracked)
    assert not tracked.images.requires_grad


def test_no_grad_around_the_call_does_not_matter():
    x, y = images(1, seed=27), images(1, seed=28)
    with torch.no_grad():
        inside = match_embedding(linear(), x, y)
    assert same_result(inside, match_embedding(linear(), x, y))


def test_inputs_are_left_alone():
    x, y = images(2, seed=29), images(2, seed=30)
    before = x.clone(), y.clone()
    match_embedding(linear(), x, y, radius=0.5)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_f_that_writes_into_its_input_cannot_change_the_callers_target():
    def f(v: Tensor) -> Tensor:
        return linear()(v.sub_(0.1))

    x, y = images(1, seed=31), images(1, seed=32)
    before = y.clone()
    match_embedding(f, x, y, max_evals=3, raise_on_failure=False)
    assert torch.equal(y, before)


# Counting


@every_solver
@pytest.mark.parametrize("max_evals", [1, 2, 37])
def test_every_evaluation_is_counted(solver, max_evals):
    counts, batches = {"forward": 0, "backward": 0}, []

    def f(v: Tensor) -> Tensor:
        batches.append(v.shape[0])
        return smooth_mlp()(_Meter.apply(v, counts))

    x, z = images(3, seed=40), smooth_mlp()(images(3, seed=41))
    tried = admit(f, x, noise=True)  # the check of f is not counted
    counts.update(forward=0, backward=0)
    batches.clear()
    result = match_embedding(tried, x, z, solver, max_evals=max_evals, raise_on_failure=False)
    assert sum(batches) == counts["forward"] == counts["backward"]
    assert float(result.num_evals.sum()) == (counts["forward"] + 2 * counts["backward"]) / 3
    assert len(batches) == float(result.num_evals.max())
    assert float(result.num_evals.max()) <= max_evals


def test_finished_images_leave_the_batch():
    batches = []

    def f(v: Tensor) -> Tensor:
        batches.append(v.shape[0])
        return orthogonal()(v)

    x, z = images(2, seed=42), orthogonal()(images(2, seed=43))
    z[0] = orthogonal()(x)[0]
    tried = admit(f, x, noise=True)
    batches.clear()
    result = match_embedding(tried, x, z)
    assert batches[:2] == [2, 1]
    assert result.num_evals[0] == 1
    assert result.num_evals[1] == len(batches)


@every_solver
def test_traces(solver):
    x, y = images(2, seed=44), images(2, seed=45)
    result = match_embedding(smooth_mlp(), x, y, solver, max_evals=60, raise_on_failure=False)
    for i, trace in enumerate(result.traces):
        evals, errors = zip(*trace, strict=True)
        assert list(evals) == sorted(set(evals))
        assert list(errors) == sorted(set(errors), reverse=True)
        assert evals[0] == 1
        assert evals[-1] <= float(result.num_evals[i])
        assert errors[-1] == float(result.errors[i])


# The ball


@pytest.mark.parametrize(("norm", "radius"), [("linf", 8 / 255), ("linf", 1e-3), ("l2", 0.3), ("l2", 1e-3)])
@every_solver
def test_match_stays_in_the_ball_and_uses_it(solver, norm, radius):
    x, y = images(2, seed=50), images(2, seed=51)
    result = match_embedding(linear(), x, y, solver, radius=radius, norm=norm, max_evals=40, raise_on_failure=False)
    gap = (result.images.double() - x.double()).flatten(1)
    size = gap.abs().amax(1) if norm == "linf" else gap.norm(dim=1)
    assert bool((size <= radius * (1 + 1e-14)).all())
    assert bool((size >= 0.9 * radius).all())
    assert bool((result.errors < error64(linear(), x, linear()(y))).all())


@pytest.mark.parametrize("radius", [0.02, 0.05])
def test_the_best_image_of_a_small_linf_ball(radius):
    """Against bounded least squares: the target is out of reach, and most pixels of the best image are at a bound."""
    f, x = linear(), images(1, seed=52, dtype=torch.float64)
    z = f(images(1, seed=53, dtype=torch.float64))
    lower, upper = (x - radius).clamp_min(0).flatten(), (x + radius).clamp_max(1).flatten()
    best = lsq_linear(f.A.numpy(), (z[0] - f(0 * x)[0]).numpy(), (lower.numpy(), upper.numpy()), tol=1e-14)
    at_bound = (best.active_mask != 0).mean()
    assert at_bound > 0.5
    result = match_embedding(f, x, z, radius=radius, max_evals=600, raise_on_failure=False)
    least = math.sqrt(2 * best.cost) / float(z.norm())
    assert least > 0.01
    assert least * (1 - 1e-9) <= float(result.errors[0]) <= least * (1 + 1e-3)


def test_the_best_image_of_a_small_l2_ball():
    """Against the trust-region problem min ‖A·d − b‖, ‖d‖ ≤ radius, by its secular equation."""
    f, x = linear(), images(1, seed=52, dtype=torch.float64)
    z, radius = f(images(1, seed=53, dtype=torch.float64)), 0.3
    U, S, _ = torch.linalg.svd(f.A, full_matrices=False)
    b = U.T @ (z - f(x))[0]
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = 0.5 * (low + high)
        too_long = float((S * b / (S.square() + middle)).norm()) > radius
        low, high = (middle, high) if too_long else (low, middle)
    best = float((high * b / (S.square() + high)).norm() / z.norm())
    found = match_embedding(f, x, z, radius=radius, norm="l2", raise_on_failure=False)
    assert best * (1 - 1e-9) <= float(found.errors) <= best * (1 + 1e-3)


# How it ends


def test_converged():
    result = match_embedding(linear(), images(2, seed=60), images(2, seed=61), rtol=1e-4)
    assert result.status == (Status.CONVERGED, Status.CONVERGED)
    assert result.converged
    assert bool((result.errors <= 1e-4).all())


def test_max_evals():
    result = match_embedding(linear(), images(1, seed=62), images(1, seed=63), max_evals=5, raise_on_failure=False)
    assert result.status == (Status.MAX_EVALS,)
    assert not result.converged
    assert float(result.num_evals) == 5


def test_stalled_at_the_best_there_is():
    x, z = unreachable(2)
    result = match_embedding(rank_deficient(), x, z, raise_on_failure=False)
    assert result.status == (Status.STALLED, Status.STALLED)
    torch.testing.assert_close(result.errors, torch.full((2,), 0.1, dtype=torch.float64), rtol=0, atol=1e-5)


@every_solver
def test_no_gradient_no_progress(solver):
    def f(v: Tensor) -> Tensor:
        return v.flatten(1)[:, :4] * 0 + 1

    result = match_embedding(f, images(1), torch.full((1, 4), 2.0), solver, max_evals=30, raise_on_failure=False)
    assert float(result.errors) == 0.5
    assert torch.equal(result.images, images(1))
    assert result.status == (Status.STALLED,)


def test_a_flat_spot_throws_no_image_across_the_box():
    """A Polyak step on a vanishing gradient would be as long as the gradient is small."""

    def f(v: Tensor) -> Tensor:
        return linear()(v) * 1e-12 + linear()(images(1, seed=68))

    x = images(1, seed=66)
    found = match_embedding(f, x, torch.ones((1, 12)), max_evals=2, raise_on_failure=False).images
    assert float((found - x).norm()) <= math.sqrt(x.numel())


def test_inference_mode_around_the_call():
    x, y = images(1, seed=67), images(1, seed=68)
    plain = match_embedding(linear(), x, y)
    with torch.inference_mode():
        assert same_result(match_embedding(linear(), x.clone(), y.clone()), plain)


def test_f_may_normalise_in_place():
    def f(v: Tensor) -> Tensor:
        return linear()(v.sub_(0.5).mul_(2.0))

    x, y = images(1, seed=67), images(1, seed=68)
    kept = x.clone()
    assert match_embedding(f, x, y.clone()).converged
    assert torch.equal(x, kept)


def test_default_device_is_not_asked():
    x, y = images(1, seed=67), images(1, seed=68)
    plain, f = match_embedding(linear(), x, y), linear()
    torch.set_default_device("meta")
    try:
        assert same_result(match_embedding(f, x, y), plain)
    finally:
        torch.set_default_device(None)


class Marked:
    """`linear()`, but for the images near 0.99, where `bad` is added or memory runs out; knows its rows beyond 1e3."""

    def __init__(self, bad: float = 0.0) -> None:
        self.bad, self.batches = bad, []

    def __call__(self, v: Tensor) -> Tensor:
        marked = v.detach().flatten(1).mean(dim=1) > 0.9
        if v.requires_grad:
            self.batches.append(len(v))
            if self.bad == 0 and bool(marked.any()):
                raise torch.OutOfMemoryError("no room")
        return torch.stack([linear()(x[None])[0] + (self.bad if far else 0.0) for x, far in zip(v, marked)])  # noqa: B905

    def least_errors(self, image: Tensor, z: Tensor) -> Tensor:
        return 1 - 1e3 / z.double().norm(dim=1).clamp_min(1e3)


BAD_IMAGES = {  # what f adds to the embedding of the image, its target in units of another, and its end
    "NaN": (math.nan, 1, Status.ERROR),
    "infinite": (math.inf, 1, Status.ERROR),
    "minus infinite": (-math.inf, 1, Status.ERROR),
    "no memory for it": (0.0, 1, Status.ERROR),
    "target that no image has": (1.0, 1e6, Status.INFEASIBLE),
    "matched already": (1.0, 0, Status.CONVERGED),
}


@every_solver
@pytest.mark.parametrize("case", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_a_bad_image_spoils_no_other(solver, case):
    bad, scale, status = case
    x, z = images(5, seed=64), linear()(images(5, seed=65))
    x[1] = 0.99
    f = Marked(bad)
    z[1] = scale * z[1] if scale else linear()(x[1:2])[0] + bad
    start = (linear()(x[1:2])[0] + bad - z[1]).double().norm() / z[1].double().norm()
    options = {"max_evals": 30, "raise_on_failure": False}
    result = match_embedding(f, x, z, solver, **options)
    rest = [0, 2, 3, 4]
    good = match_embedding(linear(), x[rest], z[rest], solver, **options)
    assert result.status[1] is status
    assert torch.equal(result.images[1], x[1])
    torch.testing.assert_close(result.errors[1], start if bad == 1.0 else result.errors[1], rtol=1e-6, atol=1e-7)
    assert math.isfinite(float(result.errors[1])) is (bad == 1.0)
    assert result.num_evals[1] == 1
    for name in ("images", "errors", "num_evals"):
        assert torch.equal(getattr(result, name)[rest], getattr(good, name))
    assert tuple(result.status[i] for i in rest) == good.status


def test_memory_that_no_image_has_is_told():
    x, z = images(3, seed=64) * 0 + 0.99, linear()(images(3, seed=65))
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        match_embedding(Marked(), x, z)


def test_a_batch_is_halved_where_memory_runs_out_and_stays_so():
    class Small(Marked):
        def __call__(self, v: Tensor) -> Tensor:
            if v.requires_grad and len(v) > 2:
                raise torch.OutOfMemoryError
            return super().__call__(v)

    x, z, f = images(5, seed=66), linear()(images(5, seed=67)), Small(1.0)
    assert same_result(match_embedding(f, x, z), match_embedding(linear(), x, z))
    assert max(f.batches) == 2


J_BYTES = 8 * 192 * 4  # of a Jacobian of `scaled_rows`


@pytest.mark.parametrize(
    ("room", "memory", "together"),
    [(1, MEMORY, 3), (0, MEMORY, 3), (3, 3 * J_BYTES - 1, 2), (3, J_BYTES, 1), (3, J_BYTES - 1, 0)],
)
def test_newton_steps_take_the_memory_there_is(monkeypatch, room, memory, together):
    f, x, y = scaled_rows(torch.float32), 0.2 + 0.6 * images(3, seed=70), 0.2 + 0.6 * images(3, seed=71)
    real, asked = newton.jacobians, []

    def short(f, points):
        asked.append(len(points))
        if len(points) > room:
            raise torch.OutOfMemoryError
        return real(f, points)

    def g(v: Tensor) -> Tensor:
        return torch.stack([f(one.flatten()) for one in v])

    plain = match_embedding(g, x, g(y))
    monkeypatch.setattr(newton, "jacobians", short)
    found = match_embedding(g, x, g(y), memory=memory, raise_on_failure=room > 0)
    assert max(asked, default=0) == together
    assert found.converged
    assert same_result(found, plain) or room == 0 or together == 0


def test_where_newton_steps_do_not_help_an_image_begins_again_beside_its_source(monkeypatch):
    f, x, y = scaled_rows(torch.float32), 0.2 + 0.6 * images(1, seed=70), 0.2 + 0.6 * images(1, seed=71)
    real, away, failed = newton.Newton.run, [], []

    def run(steps):
        failed.append(len(away))
        return real(steps) if len(failed) > 1 else iter(())

    def g(v: Tensor) -> Tensor:
        away.extend([float((v.detach() - x).abs().max())] if v.requires_grad else [])
        return torch.stack([f(one.flatten()) for one in v])

    monkeypatch.setattr(newton.Newton, "run", run)
    monkeypatch.setattr(driver, "_NEARER", 0.0)  # no progress is enough
    assert match_embedding(g, x, g(y)).converged
    assert away[failed[0]] == pytest.approx(1 / 255, rel=1e-5)
    assert min(away[failed[0] - 20 : failed[0]]) > 0.05  # where it was


def test_a_target_that_no_image_has_is_told_with_its_least_error():
    x, z = images(2, seed=64), linear()(images(2, seed=65))
    z[1] *= 2e3 / z[1].norm()
    with pytest.raises(ConvergenceError, match=r"The least possible error is 0\.5 for image 1\.") as caught:
        match_embedding(Marked(1.0), x, z)
    assert caught.value.result.status == (Status.CONVERGED, Status.INFEASIBLE)
    found = refine_8bit(Marked(1.0), x, z)
    assert found.status[1] is Status.INFEASIBLE
    assert float(found.num_evals[1]) < 1 < float(found.num_evals[0])  # one forward pass, of the rounded image

    class Wrapper:  # lends the attributes of another function
        def __init__(self) -> None:
            self.inner = Marked(1.0)

        def __call__(self, v: Tensor) -> Tensor:
            return 1e6 * self.inner(v)

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    assert match_embedding(Wrapper(), x, 1e6 * linear()(images(2, seed=65))).converged


@pytest.mark.parametrize("shape", [(40,), (5, 8), (2, 2, 2, 5)])
@pytest.mark.parametrize("bounds", [(0, 1), (-1, 2), None])
def test_images_of_any_shape_are_targets(shape, bounds):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))

    def f(v: Tensor) -> Tensor:
        return torch.stack([weight @ one.flatten() for one in v])

    x, y = (torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    found = match_embedding(f, x, y, bounds=bounds)
    assert same_result(found, match_embedding(f, x, f(y), bounds=bounds))
    assert torch.equal(found.target, y)
    with pytest.raises(ValueError, match="`target` must differ from `source`"):
        match_embedding(f, x, x, bounds=bounds)


def test_nan_in_the_gradient_is_an_error():
    def f(v: Tensor) -> Tensor:
        return linear()(v) + (v - v.detach()).square().sum(dim=(1, 2, 3)).sqrt()[:, None]

    result = match_embedding(f, images(1), images(1, seed=1), raise_on_failure=False)
    assert result.status == (Status.ERROR,)
    assert torch.equal(result.images, images(1))


@pytest.mark.parametrize("scale", [1e-20, 1e-9, 1e9, 1e20])
def test_the_unit_of_the_embedding_does_not_matter(scale):
    """The error is relative, and so is every decision: eighteen decades give the same match."""
    x, y = images(1, seed=66), images(1, seed=67)
    usual = match_embedding(linear(), x, y)
    result = match_embedding(lambda v: linear()(v) * scale, x, y, raise_on_failure=False, max_evals=300)
    assert result.status == (Status.CONVERGED,)
    assert float(result.num_evals) <= 2 * float(usual.num_evals)


def test_convergence_error_carries_the_result():
    x, z = images(3, seed=68), linear()(images(3, seed=69))
    z[0] = linear()(x)[0]
    with pytest.raises(ConvergenceError) as caught:
        match_embedding(linear(), x, z, max_evals=6)
    result = caught.value.result
    assert result.status == (Status.CONVERGED, Status.MAX_EVALS, Status.MAX_EVALS)
    assert same_result(result, match_embedding(linear(), x, z, max_evals=6, raise_on_failure=False))
    best = float(result.errors[1:].min())
    start = f"2 of 3 images did not reach rtol=1e-05 in 6 evaluations (images 1, 2; best {best:.1e}; max_evals). "
    assert str(caught.value).startswith(start)
    assert Status.MAX_EVALS.advice in str(caught.value)
    assert str(caught.value).endswith("Or pass `raise_on_failure=False`.")
    assert isinstance(caught.value, RuntimeError)


def test_convergence_error_lists_eight_images_at_most():
    with pytest.raises(ConvergenceError, match=re.escape("(images 0, 1, 2, 3, 4, 5, 6, 7, …; best")):
        match_embedding(linear(), images(9), images(9, seed=1), max_evals=1)


# The hook


def test_progress_sees_every_evaluation():
    x, z = images(2, seed=70), linear()(images(2, seed=71))
    z[0] = linear()(x)[0]
    seen: list[Progress] = []
    result = match_embedding(linear(), x, z, LBFGS(newton=False), progress=seen.append)
    assert len(seen) == int(result.num_evals.max())
    assert [float(p.num_evals[1]) for p in seen] == [float(k) for k in range(1, len(seen) + 1)]
    assert all(float(p.num_evals[0]) == 1 for p in seen)
    assert [p.active.tolist() for p in seen] == [[False, True]] * (len(seen) - 1) + [[False, False]]
    for p in seen:
        again = (linear()(p.images).double() - z.double()).norm(dim=1) / z.double().norm(dim=1)
        torch.testing.assert_close(p.errors, again, rtol=1e-13, atol=0)
    assert torch.equal(seen[-1].images, result.images)
    assert torch.equal(seen[-1].errors, result.errors)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ZeroDivisionError])
def test_exception_in_the_hook_ends_the_run(kind):
    calls = []

    def hook(progress: Progress) -> None:
        calls.append(progress)
        if len(calls) == 3:
            raise kind

    with pytest.raises(kind):
        match_embedding(linear(), images(1), images(1, seed=1), progress=hook)
    assert len(calls) == 3


# Bad input: one case per message

GOOD = images(2)
OTHER = images(2, seed=1)
Z = linear()(OTHER)
NAN = torch.where(torch.arange(2).view(2, 1, 1, 1) == 1, math.nan, GOOD)

# ruff: noqa: E501
BAD = {
    "source no tensor": ([0.5], OTHER, {}, TypeError, "`source` must be a torch.Tensor; got list."),
    "source 3-D": (GOOD[0], OTHER, {}, ValueError, "`target` must be images (B, 8, 8) or embeddings (B, D); got shape (2, 3, 8, 8)."),
    "source uint8": (GOOD.byte(), OTHER, {}, TypeError, "`source` must be a float tensor; got dtype torch.uint8"),
    "source empty": (GOOD[:0], OTHER, {}, ValueError, "`source` must hold at least one image; got an empty batch"),
    "source NaN": (NAN, OTHER, {}, ValueError, "`source` must be finite; got NaN or infinity in image 1."),
    "source infinite": (GOOD / 0, OTHER, {}, ValueError, "`source` must be finite"),
    "source above 1": (GOOD * 255, OTHER, {}, ValueError, "`source` must lie in [0, 1]; got values in ["),
    "source below 0": (GOOD - 1, OTHER, {}, ValueError, "`source` must lie in [0, 1]; got values in [-"),
    "target no tensor": (GOOD, "cat", {}, TypeError, "`target` must be a torch.Tensor; got str."),
    "target 3-D": (GOOD, OTHER[0], {}, ValueError, "`target` must be images (B, 3, 8, 8) or embeddings (B, D); got"),
    "target 1-D": (GOOD, Z[0], {}, ValueError, "`target` must be images (B, 3, 8, 8) or embeddings (B, D); got"),
    "target batch": (GOOD, images(3), {}, ValueError, "`target` must have batch size 1 or 2; got 3."),
    "target batch of embeddings": (GOOD[:1], Z, {}, ValueError, "`target` must have batch size 1; got 2."),
    "target above 1": (GOOD, OTHER + 1, {}, ValueError, "`target` must lie in [0, 1]"),
    "target uint8": (GOOD, OTHER.byte(), {}, TypeError, "`target` must be a float tensor; got dtype torch.uint8"),
    "target other shape": (GOOD, OTHER[..., :4], {}, ValueError, "`target` must have the image shape of `source` (3, 8, 8)"),
    "target = source": (GOOD, GOOD.clone(), {}, ValueError, "`target` must differ from `source`; got the same pixels for images 0, 1."),
    "one target = source": (GOOD, torch.stack([OTHER[0], GOOD[1]]), {}, ValueError, "got the same pixels for image 1."),
    "shared target = source": (GOOD, GOOD[1:], {}, ValueError, "got the same pixels for image 1."),
    "target = source in another dtype": (GOOD, GOOD.double() + 1e-12, {}, ValueError, "`target` must differ from `source`"),
    "embeddings int": (GOOD, Z.long(), {}, TypeError, "`target` must be a float tensor; got dtype torch.int64."),
    "embeddings NaN": (GOOD, Z * math.nan, {}, ValueError, "`target` embeddings must be finite; got NaN or infinity for image 0."),
    "embeddings zero": (GOOD, Z * 0, {}, ValueError, "`target` embeddings must have non-zero norm"),
    "embeddings dimension": (GOOD, Z[:, :5], {}, ValueError, f"`target` embeddings must have the encoder's dimension {DIM}; got 5."),
    "embeddings dimension 1": (GOOD, Z[:, :1], {}, ValueError, f"`target` embeddings must have the encoder's dimension {DIM}; got 1."),
    "norm": (GOOD, OTHER, {"norm": "l1"}, ValueError, "`norm` must be one of linf, l2; got 'l1'."),
    "radius text": (GOOD, OTHER, {"radius": "8/255"}, TypeError, "`radius` must be a number or None; got str."),
    "radius bool": (GOOD, OTHER, {"radius": True}, TypeError, "`radius` must be a number or None; got bool."),
    "radius 0": (GOOD, OTHER, {"radius": 0}, ValueError, "`radius` must lie in (0, 1] for norm 'linf'"),
    "radius negative": (GOOD, OTHER, {"radius": -0.1}, ValueError, "`radius` must lie in (0, 1] for norm 'linf'"),
    "radius NaN": (GOOD, OTHER, {"radius": math.nan}, ValueError, "`radius` must lie in (0, 1]"),
    "radius infinite": (GOOD, OTHER, {"radius": math.inf}, ValueError, "`radius` must lie in (0, 1]"),
    "radius in levels": (GOOD, OTHER, {"radius": 8}, ValueError, "such as 8/255"),
    "radius above √N": (GOOD, OTHER, {"radius": 13.9, "norm": "l2"}, ValueError, "`radius` must lie in (0, 13.8564] for norm 'l2'"),
    "rtol 0": (GOOD, OTHER, {"rtol": 0}, ValueError, "`rtol` must be finite and above 0; got 0."),
    "rtol 1": (GOOD, OTHER, {"rtol": 1.0}, ValueError, "`rtol` must be below 1, the error of an embedding of zeros"),
    "rtol negative": (GOOD, OTHER, {"rtol": -1e-5}, ValueError, "`rtol` must be finite and above 0; got -1e-05."),
    "rtol NaN": (GOOD, OTHER, {"rtol": math.nan}, ValueError, "`rtol` must be finite and above 0; got nan."),
    "rtol text": (GOOD, OTHER, {"rtol": "1e-5"}, TypeError, "`rtol` must be a number; got str."),
    "max_evals 0": (GOOD, OTHER, {"max_evals": 0}, ValueError, "`max_evals` must be at least 1; got 0."),
    "max_evals float": (GOOD, OTHER, {"max_evals": 1e3}, TypeError, "`max_evals` must be a whole number; got float."),
    "memory 0": (GOOD, OTHER, {"memory": 0}, ValueError, "`memory` must be at least 1; got 0."),
    "max_evals bool": (GOOD, OTHER, {"max_evals": True}, TypeError, "`max_evals` must be a whole number; got bool."),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input(case):
    source, target, options, kind, message = case
    with pytest.raises(kind, match=re.escape(message)):
        match_embedding(linear(), source, target, **options)


@pytest.mark.parametrize("radius", [1, 1.0, 8 / 255])
def test_largest_radii_are_allowed(radius):
    match_embedding(linear(), GOOD, OTHER, radius=radius, max_evals=1, raise_on_failure=False)
    match_embedding(linear(), GOOD, OTHER, radius=math.sqrt(192), norm="l2", max_evals=1, raise_on_failure=False)


BAD_F = {
    "tuple": (lambda v: (linear()(v),), "`f` must map (B, *shape) to a float tensor (B, D); got tuple."),
    "3-D": (lambda v: linear()(v)[:, None], "`f` must map (B, *shape) to a float tensor (B, D); got shape (1, 1, 12)"),
    "1-D": (lambda v: v.sum((1, 2, 3)), "`f` must map (B, *shape) to a float tensor (B, D); got shape (1,)"),
    "batch": (lambda v: linear()(v)[:1], "`f` must map (B, *shape) to a float tensor (B, D); got shape (1, 12)"),
    "integers": (lambda v: linear()(v).long(), "got shape (1, 12), dtype torch.int64"),
    "detached": (lambda v: linear()(v.detach()), "`f` must be differentiable and use its input; got no gradient."),
    "NaN": (lambda v: linear()(v) * math.nan, "`target` embeddings must be finite"),
}


@pytest.mark.parametrize("case", BAD_F.values(), ids=BAD_F)
def test_bad_encoder(case):
    f, message = case
    with pytest.raises(ValueError, match=re.escape(message)):
        match_embedding(f, GOOD, OTHER)


def test_encoder_that_ignores_the_pixels_but_has_parameters():
    layer = torch.nn.Linear(192, DIM)
    with pytest.raises(ValueError, match="`f` must be differentiable"):
        match_embedding(lambda v: layer(v.detach().flatten(1)), GOOD, Z)


def test_bad_encoder_output_with_a_target_embedding():
    with pytest.raises(ValueError, match="`f` must map"):
        match_embedding(lambda v: linear()(v)[:, None], GOOD, Z)


def test_tiny_embeddings_are_not_zero():
    """1e-30 squared is nothing in float32, but the norm is not."""
    result = match_embedding(linear(), GOOD, torch.full((1, DIM), 1e-30), max_evals=1, raise_on_failure=False)
    assert bool(torch.isfinite(result.errors).all())


def test_solver_must_be_one():
    with pytest.raises(TypeError, match="`solver` must"):
        match_embedding(linear(), GOOD, OTHER, "adam")


# The function that is stated


def scaled_rows(dtype: torch.dtype) -> torch.nn.Linear:
    """Rows orthonormal but for lengths from 1 to 0.1, so that the default solver ends by Newton steps."""
    draw = torch.randn(192, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = torch.nn.Linear(192, 8, bias=False).requires_grad_(requires_grad=False)
    layer.weight.data = (torch.linalg.qr(draw)[0].T * torch.logspace(0, -1, 8, dtype=torch.float64)[:, None]).to(dtype)
    return layer


def test_under_autocast_the_error_is_that_of_f_under_autocast():
    f = scaled_rows(torch.float32)
    x, y = (0.2 + 0.6 * images(1, seed=seed).reshape(-1)[:192].view(1, 3, 8, 8) for seed in (70, 71))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = f(y.flatten(1))
        found = match_embedding(lambda v: f(v.flatten(1)), x, z, raise_on_failure=False)
        again = (f(found.images.flatten(1)).double() - z.double()).norm() / z.double().norm()
    assert z.dtype is torch.bfloat16
    assert float(found.errors) == pytest.approx(float(again), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_embedding_finer_than_the_pixels_is_not_rounded(dtype):
    def f(v: Tensor) -> Tensor:
        return linear()(v.float())

    for seed in range(72, 80):
        x, z = images(1, seed=seed).to(dtype), f(images(1, seed=seed + 100).to(dtype)).to(dtype)
        found = match_embedding(f, x, z, raise_on_failure=False)
        again = (f(found.images).double() - z.double()).norm() / z.double().norm()
        assert float(found.errors) == pytest.approx(float(again), rel=1e-9)


def test_a_gradient_whose_sum_overflows_is_finite():
    x = torch.full((1, 3, 64, 64), 0.4, dtype=torch.float16)

    def f(v: Tensor) -> Tensor:
        return v.float().mean(dim=(1, 2, 3))[:, None] * 1e6 - 0.499e6

    found = match_embedding(f, x, torch.full_like(x, 0.5), max_evals=20, raise_on_failure=False)
    assert found.status != (Status.ERROR,)
    assert float(found.num_evals) > 1


@pytest.mark.parametrize("scale", [1e-170, 1e155])
def test_embeddings_that_cannot_be_squared_are_refused(scale):
    x = images(1).double()
    with pytest.raises(ValueError, match="between 1e-150 and 1e150"):
        match_embedding(lambda v: linear()(v) * scale, x, images(1, seed=9).double())


# Solvers of others


class Walker:
    """Gradient steps in place; with `free`, out of the set."""

    def __init__(self, *, free: bool) -> None:
        self.free = free

    def iterate(self, source, feasible):
        x, k = feasible.project(source).clone(), 0
        while True:
            at = yield x
            k += 1
            x.sub_((1e-2 if k % 5 else 0.3) * at.gradient * at.unit**2)
            if not self.free:
                x.copy_(feasible.project(x))


def test_a_solver_may_step_in_place():
    f, x, z = linear(), images(1, seed=73), linear()(images(1, seed=74))
    found = match_embedding(f, x, z, Walker(free=False), max_evals=6, raise_on_failure=False)
    torch.testing.assert_close(found.errors, error64(f, found.images, z), rtol=1e-4, atol=0)


def test_a_solver_must_stay_in_the_set():
    f, x, z = linear(), images(1, seed=73), linear()(images(1, seed=74))
    with pytest.raises(ValueError, match="points of the feasible set"):
        match_embedding(f, x, z, Walker(free=True), radius=1e-3, max_evals=6, raise_on_failure=False)


def test_the_line_search_steps_back_from_where_f_is_not_finite():
    f, seen, barred = linear(), [], []
    x, y = 0.1 + 0.8 * images(1, seed=75), 0.1 + 0.8 * images(1, seed=76)

    def watched(v: Tensor) -> Tensor:
        seen.append(float((v.detach() - x).norm()))
        return f(v)

    end = match_embedding(watched, x, f(y))
    limit = 0.5 * (max(seen) + float((end.images - x).norm()))  # the start oversteps

    def partial(v: Tensor) -> Tensor:
        out = float((v.detach() - x).norm()) > limit
        barred.append(out)
        return f(v) + (math.nan if out else 0.0)

    found = match_embedding(partial, x, f(y))
    assert any(barred)
    torch.testing.assert_close(error64(f, found.images, f(y)), found.errors, rtol=1e-2, atol=1e-7)


# Noise


def noisy(v: Tensor) -> Tensor:
    """An embedding of which float32 keeps five digits."""
    return smooth_mlp()(v) + 30 - 30


@pytest.mark.parametrize("rtol", [1e-6, 3e-6, 1e-5, 1e-4])
@pytest.mark.parametrize("f", [smooth_mlp(), noisy, lambda v: noisy(v.float()).to(v)], ids=["exact", "noisy", "cast"])
def test_converged_means_the_error_with_its_noise(f, rtol):
    x, y = images(3, seed=90), images(3, seed=91)
    result = match_embedding(f, x, y, rtol=rtol, max_evals=200, raise_on_failure=False)
    exact, z = smooth_mlp()(result.images.double()), smooth_mlp()(y.double())
    errors = (exact - z).norm(dim=1) / z.norm(dim=1)
    noise = admit(f, x, noise=True).noise
    for status, error, true in zip(result.status, result.errors.tolist(), errors.tolist(), strict=True):
        if status is Status.CONVERGED:
            assert error + noise <= rtol
            assert true <= 1.1 * rtol
        else:
            assert rtol < 20 * noise
    if rtol >= 20 * noise:
        assert result.converged


def test_a_tolerance_below_the_noise_is_not_reached():
    x, y = images(1, seed=92), images(1, seed=93)
    result = match_embedding(noisy, x, noisy(x), rtol=1e-7, raise_on_failure=False)
    assert result.status == (Status.STALLED,)
    assert float(result.errors) <= 1e-7
    assert "float noise" in Status.STALLED.advice
    with pytest.raises(ConvergenceError, match="float noise"):
        match_embedding(noisy, x, noisy(y), rtol=1e-7, max_evals=300)


def test_evaluations_are_counted_in_exact_thirds():
    search = Search(torch.zeros(1), thirds=1075)
    assert search.num_evals == 1075 / 3
