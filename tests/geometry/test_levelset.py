"""`trace_level_set` on level sets of known shape, against an uncorrected walk, and what it refuses."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import EIGHT, SHAPE, images, invariant, linear, quadratic, rank_deficient, smooth_mlp, unreachable
from PIL import Image
from scipy.optimize import minimize, nnls
from tiny_models import save
from torch import Tensor
from torch.func import jacrev

from hf_equiv import passes
from hf_equiv.geometry.corrector import Corrector
from hf_equiv.geometry.headings import Toward
from hf_equiv.geometry.levelset import trace_level_set
from hf_equiv.jacobian import Jacobian, Jacobians, jacobian_cost
from hf_equiv.matching.match import match_embedding
from hf_equiv.models.encoder import Encoder
from hf_equiv.passes import alone
from hf_equiv.results import Status

ASSETS = Path(os.environ.get("HF_EQUIV_ASSETS") or Path(__file__).parents[3] / "shared" / "assets").resolve()
MODEL, PHOTOS = ASSETS / "models" / "deit-tiny-patch16-224", ASSETS / "images" / "sample_100"

F64 = torch.float64
exact = {"rtol": 1e-12, "stop": 1e-11}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drift64(f, x: Tensor, z: Tensor) -> Tensor:
    return (f(x.double()) - z.double()).norm(dim=1) / z.double().norm(dim=1)


def pixels_of(path) -> Tensor:
    return torch.stack([point.pixels for point in path])


def euler_walk(f, x: Tensor, direction: Tensor, step: float, num_steps: int) -> Tensor:
    """Uncorrected steps along the projection of a fixed direction on the null space of a fresh J: the last image."""
    for _ in range(num_steps):
        J = jacrev(lambda v: f(v[None])[0])(x).reshape(-1, x.numel())
        t = direction.flatten() - torch.linalg.pinv(J) @ (J @ direction.flatten())
        x = (x + step * (t / t.norm()).view_as(x)).clamp(0, 1)
    return x


def euler_reach(f, x: Tensor, direction: Tensor, num_steps: int, drift: float) -> float:
    """L2 distance of the uncorrected walk whose step is bisected to a final drift."""
    z, low, high = f(x[None]), 0.0, 1.0
    for _ in range(25):
        step = (low + high) / 2
        end = euler_walk(f, x, direction, step, num_steps)
        low, high = (step, high) if float(drift64(f, end[None], z)) <= drift else (low, step)
    return float((euler_walk(f, x, direction, low, num_steps) - x).norm())


class Sphere:
    """z = (‖x − c‖²,): level sets are spheres about c."""

    def __init__(self, center: Tensor) -> None:
        self.center = center

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([(image - self.center.to(image)).square().sum() for image in x])[:, None]


@pytest.fixture
def sphere():
    """The map, a start at distance 0.9 of its centre, and an origin; all far from the walls."""
    center = torch.full(SHAPE, 0.5, dtype=F64)
    way, other = (torch.randn(2, 1, *SHAPE, generator=generator(1), dtype=F64)).unbind(0)
    return Sphere(center), center + 0.9 * way / way.norm(), center + 0.4 * other / other.norm()


# Known shapes


@pytest.mark.parametrize("f", [linear(), rank_deficient(), invariant()], ids=["linear", "rank_deficient", "invariant"])
def test_linear_nearest_is_the_projection(f):
    match, source = images(1, seed=1, dtype=F64), images(1, seed=2, dtype=F64)
    A = f.jacobian(source[0])
    shift = torch.linalg.pinv(A, rtol=1e-9) @ (A @ (match - source).flatten())
    expected = source + shift.view_as(source)
    assert 0 < float(expected.min()) < float(expected.max()) < 1
    walk = trace_level_set(f, match, heading="nearest", origin=source, step=2.0, num_steps=60, **exact)
    assert walk.completed
    torch.testing.assert_close(walk.images, expected, rtol=0, atol=1e-10)
    assert walk.paths[0][-1].stationarity <= 1e-11
    assert walk.paths[0][-1].l2 == pytest.approx(float((expected - source).norm()), abs=1e-10)


def test_coming_nearer_by_leaving_the_level_set_is_no_gain():
    f, origin = linear(), images(1, seed=2, dtype=F64)[0]
    fixer = Corrector(f, f(images(1, seed=1, dtype=F64))[0], 1e-12)
    at = alone(fixer.look(images(1, seed=1, dtype=F64)[0]))
    alone(fixer.refresh(at))
    way = Toward(origin, stop=1e-11)
    tangent = alone(way.plan(fixer, at, 1.0)).direction
    wish = origin - at.image
    normal = (wish - fixer.model.project_null(wish)) / (wish - fixer.model.project_null(wish)).norm()
    along, off = (alone(fixer.look(at.image + 1e-3 * step)) for step in (tangent, normal))
    assert float((off.image - origin).norm()) < float((at.image - origin).norm())
    assert (way.accepts(at, along), way.accepts(at, off)) == (True, False)


def test_nearest_in_the_box_is_the_clipped_projection():
    """min ‖x − o‖ with a·x = b in the box: x = clip(o + μa), μ by bisection."""
    a = torch.randn(192, generator=generator(3), dtype=F64)
    source = images(1, seed=4, margin=0.0, dtype=F64)
    match = (source + 0.45 * a.sign().view_as(source)).clamp(0, 1)
    value, low, high = float(match.flatten() @ a), 0.0, 10.0
    for _ in range(200):
        mu = (low + high) / 2
        nearest = (source.flatten() + mu * a).clamp(0, 1)
        low, high = (mu, high) if float(nearest @ a) < value else (low, mu)
    held = int(((nearest == 0) | (nearest == 1)).sum())
    assert 10 < held < 182
    walk = trace_level_set(
        lambda x: x.flatten(1) @ a[:, None].to(x), match, heading="nearest", origin=source, num_steps=300, **exact
    )
    assert walk.completed
    torch.testing.assert_close(walk.images.flatten(), nearest, rtol=0, atol=1e-10)


def test_sphere_nearest_is_radial(sphere):
    f, start, origin = sphere
    walk = trace_level_set(f, start, heading="nearest", origin=origin, step=0.2, num_steps=200, **exact)
    expected = f.center + 0.9 * (origin - f.center) / (origin - f.center).norm()
    assert walk.completed
    torch.testing.assert_close(walk.images, expected, rtol=0, atol=1e-10)
    assert walk.paths[0][-1].remaining == pytest.approx(0.5, abs=1e-10)
    distances = [point.remaining for point in walk.paths[0]]
    assert all(b <= a + 1e-12 for a, b in pairwise(distances))


def test_sphere_walk_is_a_geodesic(sphere):
    """A fixed heading leads along the great circle through it, each point at radius 0.9."""
    f, start, _ = sphere
    heading = torch.randn(1, *SHAPE, generator=generator(2), dtype=F64)
    walk = trace_level_set(f, start, heading=heading, step=0.05, num_steps=20, keep_points=True, **exact)
    assert walk.completed
    offsets = (pixels_of(walk.paths[0]) - f.center).flatten(1)
    first = offsets[0] / offsets[0].norm()
    second = heading.flatten() - (heading.flatten() @ first) * first
    second = second / second.norm()
    angles = torch.atan2(offsets @ second, offsets @ first)
    circle = 0.9 * (angles.cos()[:, None] * first + angles.sin()[:, None] * second)
    torch.testing.assert_close(offsets, circle, rtol=0, atol=1e-10)
    assert bool((angles.diff() > 0).all())
    chords = 2 * 0.9 * (angles.diff() / 2).sin()
    assert walk.paths[0][-1].arc_length == pytest.approx(float(chords.sum()), abs=1e-10)


def test_sphere_away_reaches_the_far_side(sphere):
    f, start, _ = sphere
    walk = trace_level_set(f, start, heading="away", step=0.3, num_steps=60, rtol=1e-12)
    assert walk.paths[0][-1].l2 == pytest.approx(1.8, abs=1e-6)
    assert max(point.l2 for point in walk.paths[0]) <= 1.8 + 1e-9


def test_connect_arrives_at_another_member(sphere):
    f, start, _ = sphere
    way = torch.randn(1, *SHAPE, generator=generator(5), dtype=F64)
    target = f.center + 0.9 * way / way.norm()
    walk = trace_level_set(f, start, heading="connect", target=target, step=0.2, num_steps=100, **exact)
    assert walk.completed
    torch.testing.assert_close(walk.images, target, rtol=0, atol=1e-10)


def test_two_parts_of_one_level_set_do_not_connect():
    """z = (x₁ − ½)²: from x₁ = 0.9 nothing leads to x₁ = 0.1; the nearest that it comes is 0.8."""
    start, target = images(2, seed=3, dtype=F64).split(1)
    start[0, 0, 0, 0], target[0, 0, 0, 0] = 0.9, 0.1
    walk = trace_level_set(
        lambda x: (x[:, 0, 0, :1] - 0.5).square(), start, heading="connect", target=target, num_steps=50, **exact
    )
    assert walk.completed
    assert walk.paths[0][-1].remaining == pytest.approx(0.8, abs=1e-10)


def test_piecewise_linear_walks_cross_kinks():
    weight = linear().A

    def f(x: Tensor) -> Tensor:
        return torch.stack([weight.to(x) @ (image.flatten() - 0.5).abs() for image in x])

    start = images(1, seed=6, dtype=F64)
    walk = trace_level_set(f, start, heading="random", step=0.3, num_steps=20, rtol=1e-12, generator=generator())
    assert walk.completed
    assert bool(((walk.images - 0.5).sign() != (start - 0.5).sign()).any())
    assert float(drift64(f, walk.images, f(start))) <= 1e-12


# Every encoder


@pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)
@pytest.mark.parametrize(("dtype", "rtol"), [(F64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("heading", ["random", "away", "toward", "nearest"])
def test_points_lie_on_the_level_set_and_in_the_box(case, dtype, rtol, heading):
    start, other = images(2, seed=7, dtype=dtype).split(1)
    origin = other if heading == "nearest" else None
    walk = trace_level_set(
        case.f,
        start,
        heading=heading,
        step=0.4,
        num_steps=15,
        rtol=rtol,
        target=other if heading == "toward" else None,
        origin=origin,
        generator=generator(),
        keep_points=True,
    )
    assert walk.completed
    path = walk.paths[0]
    points = pixels_of(path)
    assert points.dtype == dtype
    assert 0 <= float(points.min()) <= float(points.max()) <= 1
    noise = 1e-15 if dtype == F64 else 1e-6
    drifts = drift64(case.f, points, case.f(start))
    assert float(drifts.max()) <= rtol + noise
    torch.testing.assert_close(torch.tensor([p.drift for p in path], dtype=F64), drifts, rtol=0, atol=noise)
    assert torch.equal(points[-1:], walk.images)
    if heading in ("random", "away"):
        assert len(path) == 16
        assert path[-1].l2 > 4


def test_the_record_of_a_point_is_that_of_its_pixels():
    start, origin = images(2, seed=8).split(1)
    seen = []
    walk = trace_level_set(
        smooth_mlp(),
        start,
        heading="random",
        step=0.3,
        num_steps=5,
        origin=origin,
        generator=generator(),
        keep_points=True,
        progress=seen.append,
    )
    assert [(p.step, p.drift, p.l2, p.num_evals) for p in seen] == [
        (p.step, p.drift, p.l2, p.num_evals) for p in walk.paths[0]
    ]
    arc, last = 0.0, start[0]
    for k, point in enumerate(walk.paths[0]):
        offset = (point.pixels - origin[0]).double()
        arc += float((point.pixels - last).double().norm())
        last = point.pixels
        assert (point.image, point.step) == (0, k)
        assert point.l2 == pytest.approx(float(offset.norm()), rel=1e-6)
        assert point.linf == pytest.approx(float(offset.abs().max()), rel=1e-6)
        assert point.psnr_db == pytest.approx(-10 * math.log10(float(offset.square().mean())), rel=1e-6)
        assert point.arc_length == pytest.approx(arc, rel=1e-6)
        assert point.remaining is point.stationarity is None
    assert walk.paths[0][-1].num_evals == float(walk.num_evals)


def test_batch_is_one_by_one_and_the_seed_decides():
    start = images(3, seed=9)
    options = {"heading": "random", "step": 0.3, "num_steps": 4, "keep_points": True}
    whole = trace_level_set(smooth_mlp(), start, generator=generator(1), **options)
    shared = generator(1)
    for b in range(3):
        alone = trace_level_set(smooth_mlp(), start[b : b + 1], generator=shared, **options)
        assert torch.equal(pixels_of(alone.paths[0]), pixels_of(whole.paths[b]))
        assert float(alone.num_evals) == float(whole.num_evals[b])
    other = trace_level_set(smooth_mlp(), start, generator=generator(2), **options)
    assert not torch.equal(other.images, whole.images)


def test_evaluations_are_counted(monkeypatch):
    made = []

    class Recorded(Jacobians):
        def __init__(self, f, images):
            super().__init__(f, images)
            made.append(self)

    monkeypatch.setattr(passes, "Jacobians", Recorded)
    start = images(1, seed=10, dtype=F64)
    walk = trace_level_set(smooth_mlp(), start, heading="random", step=0.3, num_steps=5, generator=generator())
    assert int(walk.num_jacobians) == 1
    counted = sum(each.num_evals for each in made) + 1 / 3  # and that of z
    assert float(walk.num_evals) == pytest.approx(counted, rel=1e-12)


@pytest.mark.parametrize("f", [quadratic(), smooth_mlp()], ids=["quadratic", "smooth_mlp"])
def test_reaches_much_farther_than_uncorrected_steps(f):
    start = images(1, seed=11, dtype=F64)
    heading = torch.randn(1, *SHAPE, generator=generator(3), dtype=F64)
    plain = euler_reach(f, start[0], heading[0], 20, 1e-5)
    walk = trace_level_set(f, start, heading=heading, step=0.25, num_steps=20, rtol=1e-5)
    assert walk.completed
    assert max(point.drift for point in walk.paths[0]) <= 1e-5
    assert walk.paths[0][-1].l2 >= 10 * plain
    assert float(walk.num_evals) < 20 * jacobian_cost(12)


# How it ends


def test_box_blocked():
    """Only the first channel counts, and the others stand at the wall that the heading leads into."""
    start = images(1, seed=12, dtype=F64)
    start[:, 1:] = 1.0
    heading = torch.zeros_like(start)
    heading[:, 1:] = 1.0
    walk = trace_level_set(invariant(), start, heading=heading, num_steps=5, rtol=1e-12)
    assert walk.status == (Status.BOX_BLOCKED,)
    assert torch.equal(walk.images, start)
    start[:, 1:] = 0.9
    walk = trace_level_set(invariant(), start, heading=heading, step=0.5, num_steps=50, rtol=1e-12)
    assert walk.status == (Status.BOX_BLOCKED,)
    expected = start.clone()
    expected[:, 1:] = 1.0
    torch.testing.assert_close(walk.images, expected, rtol=0, atol=1e-10)


def test_drift_exceeded_where_the_embedding_cannot_be_reached():
    x, z = unreachable(1, dtype=F64)
    walk = trace_level_set(rank_deficient(), x, heading="random", target=z, generator=generator())
    assert walk.status == (Status.DRIFT_EXCEEDED,)
    assert walk.paths == ((),)
    assert torch.equal(walk.images, x)


def test_drift_exceeded_below_the_float_noise():
    start = images(1, seed=13)
    walk = trace_level_set(smooth_mlp(), start, heading="random", step=0.5, rtol=1e-9, generator=generator())
    assert walk.status == (Status.DRIFT_EXCEEDED,)
    assert all(point.drift <= 1e-9 for point in walk.paths[0])


def test_nan_in_the_jacobian_is_an_error_of_its_image_alone():
    start = images(2, seed=14, dtype=F64)
    start[0, 0, 0, 0] = 0.0  # √x has no derivative there

    walk = trace_level_set(
        lambda x: linear()(x) + x[:, 0, 0, :1].sqrt(),
        start,
        heading="random",
        num_steps=2,
        rtol=1e-12,
        generator=generator(),
    )
    assert walk.status == (Status.ERROR, Status.COMPLETED)
    assert torch.equal(walk.images[0], start[0])


def test_an_infinite_row_on_the_way_ends_no_walk_with_an_error_of_lapack():
    start = images(1, seed=14, dtype=F64)
    walk = trace_level_set(lambda x: linear()(x.sqrt()), start, heading="random", step=2.0, num_steps=3)
    assert walk.status[0] in (Status.COMPLETED, Status.BOX_BLOCKED, Status.DRIFT_EXCEEDED)


def test_a_start_off_the_level_set_is_corrected_first():
    start, other = images(2, seed=15, dtype=F64).split(1)
    near = start + 1e-3 * (other - start)
    walk = trace_level_set(smooth_mlp(), near, heading="random", target=start, num_steps=2, rtol=1e-12)
    assert walk.completed
    assert walk.paths[0][0].drift <= 1e-12
    assert 0 < walk.paths[0][0].l2 < 0.01


# Bad input


BAD = [
    ({"heading": "sideways"}, ValueError, "`heading` must be one of random, away"),
    ({"heading": torch.zeros(1, *SHAPE)}, ValueError, "`heading` must be finite and not zero"),
    ({"heading": torch.ones(1, 3, 4, 4)}, ValueError, "`heading` must have the shape of `images`"),
    ({"heading": "nearest"}, ValueError, "`origin` must be given"),
    ({"heading": "toward"}, ValueError, "`target` must be images"),
    ({"heading": "connect", "target": torch.ones(1, 12)}, ValueError, "`target` must be images"),
    ({"heading": "toward", "target": torch.ones(1, 3, 4, 4)}, ValueError, "`target` must have the shape"),
    ({"heading": "random", "origin": torch.ones(2, *SHAPE)}, ValueError, "`origin` must have the shape"),
    ({"heading": "random", "step": 0.0}, ValueError, "`step` must be finite and above 0"),
    ({"heading": "random", "rtol": math.nan}, ValueError, "`rtol` must be finite"),
    ({"heading": "random", "num_steps": 0}, ValueError, "`num_steps` must be at least 1"),
    ({"heading": "random", "target": torch.zeros(1, 12)}, ValueError, "non-zero norm"),
    ({"heading": "random", "target": torch.ones(1, 5)}, ValueError, "encoder's dimension 12"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        trace_level_set(linear(), images(1), **options)


def test_half_precision_is_refused():
    with pytest.raises(TypeError, match="float32 or float64"):
        trace_level_set(linear(), images(1).bfloat16(), heading="random")


def test_a_heading_in_the_row_space_is_refused():
    heading = linear().A[:1].view(1, *SHAPE)
    with pytest.raises(ValueError, match="part in the null space"):
        trace_level_set(linear(), images(1, dtype=F64), heading=heading)


def test_f_without_gradient_is_refused():
    with pytest.raises(ValueError, match="differentiable"):
        trace_level_set(lambda x: linear()(x).detach(), images(1), heading="random")


def test_an_f_without_null_space_is_refused():
    weight = torch.randn(200, 192, generator=generator(6), dtype=F64)
    with pytest.raises(ValueError, match="part in the null space"):
        trace_level_set(lambda x: x.flatten(1) @ weight.T, images(1, dtype=F64), heading="random")


def test_a_jacobian_too_large_to_hold_is_refused():
    with pytest.raises(ValueError, match=r"must have a Jacobian that fits into memory; .*Use a readout"):
        trace_level_set(lambda v: linear()(v).repeat(1, 64_000), images(1), heading="random")


# The box


def projected(weight: Tensor, z: Tensor, origin: Tensor) -> Tensor:
    """The point of {W x = z, 0 ≤ x ≤ 1} nearest to origin, by its dual: x = clip(origin + Wᵀλ)."""
    W, goal, o = weight.numpy(), z.numpy(), origin.numpy()

    def dual(multipliers):
        x = np.clip(o + W.T @ multipliers, 0, 1)
        return multipliers @ (W @ x - goal) - 0.5 * ((x - o) ** 2).sum(), W @ x - goal

    # the dual is concave: minimise its negative, ½‖x − o‖² − λ(Wx − z) at its minimiser
    found = minimize(
        lambda m: (-(0.5 * ((np.clip(o + W.T @ m, 0, 1) - o) ** 2).sum() - m @ (W @ np.clip(o + W.T @ m, 0, 1) - goal)),
                   dual(m)[1]),
        np.zeros(len(goal)), jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 2000},
    )  # fmt: skip
    return torch.from_numpy(np.clip(o + W.T @ found.x, 0, 1))


def test_nearest_is_the_projection_wherever_pixels_are_at_a_bound():
    """Start and origin with many pixels at 0 and 1: which of them move is part of the answer."""
    checked = 0
    for seed in range(60):
        draw = generator(seed)
        size, dim = int(torch.randint(4, 30, (1,), generator=draw)), int(torch.randint(1, 4, (1,), generator=draw))
        weight = torch.randn(dim, size, generator=draw, dtype=F64)
        x, origin = torch.rand(2, size, generator=draw, dtype=F64)
        mask = torch.rand(2, size, generator=draw)
        x[mask[0] < 0.4], x[mask[0] > 0.7], origin[mask[1] < 0.3], origin[mask[1] > 0.7] = 0.0, 1.0, 0.0, 1.0
        z = weight @ x
        if float(z.norm()) < 1e-6:
            continue
        walk = trace_level_set(
            lambda v, weight=weight: v.flatten(1) @ weight.T, x.view(1, 1, 1, -1), heading="nearest",
            origin=origin.view(1, 1, 1, -1), num_steps=400, step=0.3, rtol=1e-8, stop=1e-5,
        )  # fmt: skip
        exact = projected(weight, z, origin)
        if float((weight @ exact - z).abs().max()) > 1e-7:
            continue  # the reference did not converge
        checked += 1
        assert walk.paths[0][-1].l2 <= float((exact - origin).norm()) * (1 + 1e-3) + 1e-6, seed
    assert checked > 40


def test_a_corner_is_left_along_its_edge():
    start = torch.tensor([0.0, 1.0], dtype=F64).view(1, 1, 1, 2)
    walk = trace_level_set(
        lambda v: v.flatten(1).sum(1, keepdim=True), start, heading="nearest", origin=torch.zeros_like(start), step=0.1
    )
    assert walk.completed
    torch.testing.assert_close(walk.images, torch.full_like(start, 0.5), rtol=0, atol=0.02)


@pytest.mark.parametrize("step", [1.0, 1e6])
def test_a_step_longer_than_the_box(step):
    start = images(1, seed=11, dtype=F64)
    walk = trace_level_set(linear(), start, heading="away", step=step, num_steps=30)
    assert walk.paths[0][-1].l2 > 2


# Networks


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Encoder:
    return Encoder.from_pretrained(save("deit_head", tmp_path_factory.mktemp("deit")), device="cpu")


@pytest.mark.parametrize(("double", "rtol"), [(False, 1e-5), (True, 1e-11)])
def test_random_walk_of_a_tiny_vit(vit, double, rtol):
    encoder = vit.double() if double else vit
    start = 0.25 + 0.5 * torch.rand(1, *vit.input_shape, generator=generator(), dtype=encoder.dtype)
    walk = trace_level_set(
        encoder, start, heading="random", step=0.3, num_steps=20, rtol=rtol, generator=generator(), keep_points=True
    )
    assert walk.completed
    with torch.no_grad():
        z = vit.double()(start.double())
        drifts = torch.cat([drift64(vit.double(), point.pixels[None], z) for point in walk.paths[0]])
    assert float(drifts.max()) <= rtol + (0 if double else 3 * float(vit.noise_floor(start)))
    assert walk.paths[0][-1].l2 > 5
    assert int(walk.num_jacobians) == 1


@pytest.mark.parametrize("heading", ["nearest", "connect"])
def test_a_match_of_a_tiny_vit_slides(vit, heading):
    # in float64: at the float32 noise the slide to the nearest member may come to rest at a bound of 0.025
    encoder = vit.double()
    start, target = 0.25 + 0.5 * torch.rand(2, 1, *vit.input_shape, generator=generator(3), dtype=torch.float64)
    match = match_embedding(encoder, start, target, rtol=1e-6, raise_on_failure=False).images
    walk = trace_level_set(encoder, match, heading=heading, step=0.3, num_steps=100, origin=start, target=target)
    distances = [point.remaining for point in walk.paths[0]]
    assert all(b < a for a, b in pairwise(distances))
    assert walk.completed
    if heading == "nearest":
        assert walk.paths[0][-1].stationarity <= 0.01
        d = (start - walk.images)[0].double()
        J = Jacobian(encoder, walk.images[0]).as_matrix()
        free = ((walk.images > 0) & (walk.images < 1)).flatten()
        J, d = J[:, free], d.flatten()[free]
        left = d - torch.linalg.pinv(J, rtol=1e-5) @ (J @ d)
        assert float(left.norm() / d.norm()) <= 0.02


@pytest.mark.assets
@pytest.mark.timeout(900)
@pytest.mark.skipif(not MODEL.is_dir(), reason=f"no {MODEL.name}: set HF_EQUIV_ASSETS")
def test_random_walk_of_a_trained_vit():
    encoder = Encoder.from_pretrained(MODEL, readout="cls", device="cpu")
    start = encoder.preprocess([Image.open(sorted(PHOTOS.iterdir())[3])])
    walk = trace_level_set(encoder, start, heading="random", num_steps=10, generator=generator(), keep_points=True)
    assert walk.completed
    with torch.no_grad():
        z = encoder.double()(start.double())
        drifts = torch.cat([drift64(encoder.double(), point.pixels[None], z) for point in walk.paths[0]])
    assert float(drifts.max()) <= 1e-5 + 3 * float(encoder.noise_floor(start))
    assert walk.paths[0][-1].l2 > 9.5
    assert float(walk.num_evals) <= 10 * 0.3 * jacobian_cost(192)


def test_a_walk_of_few_dimensions_whose_steps_all_fail_ends():
    start = images(1, seed=5, dtype=F64)

    def jumps(x: Tensor) -> Tensor:  # any other image is a thousand away, farther than the box is wide
        return x.flatten(1).mean(dim=1, keepdim=True) + 1e3 * (x.detach() != start).flatten(1).any(dim=1, keepdim=True)

    walk = trace_level_set(jumps, start, heading="random", num_steps=3, generator=generator())
    assert walk.status == (Status.DRIFT_EXCEEDED,)
    assert len(walk.paths[0]) == 1


# The tangent cone of the level set in the box


def corner(seed: int, dim: int, pixels: int) -> tuple:
    """A linear encoder, an image all of whose pixels are at 0 or 1, and a wish."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(dim, pixels, generator=g, dtype=torch.float64)
    x = (torch.rand(1, 1, 1, pixels, generator=g, dtype=torch.float64) > 0.5).double()
    wish = torch.randn(1, 1, 1, pixels, generator=g, dtype=torch.float64)
    return A, lambda image: (image.flatten(1) - 0.5) @ A.T.to(image) + 0.5, x, wish


@pytest.mark.parametrize(("dim", "pixels"), [(24, 48), (12, 48), (24, 30), (6, 4), (6, 8)])
def test_a_heading_in_a_corner_is_projected_on_the_tangent_cone(dim, pixels):
    """The way is blocked where the dense projection is zero, by non-negative least squares on the polar cone."""
    for seed in range(10):
        A, f, x, wish = corner(seed, dim, pixels)
        polar = torch.cat([A, -A, torch.diag(2 * x.flatten() - 1)]).T
        share = nnls(polar.numpy(), wish.flatten().numpy(), maxiter=100_000)[1] / float(wish.norm())
        walk = trace_level_set(f, x, heading=wish, num_steps=1, step=0.1, rtol=1e-10)
        assert (walk.status[0] is Status.BOX_BLOCKED) == (share < 1e-3), (seed, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_walk_that_has_no_way_on_says_so(dtype):
    """From black, an encoder that grows with brightness keeps its value nowhere else."""

    def f(image):
        return torch.tanh(image.reshape(len(image), 12, 16).mean(2)) + 0.5

    x = torch.zeros(1, 3, 8, 8, dtype=dtype)
    y = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=dtype)
    walk = trace_level_set(f, x, heading="toward", target=y, num_steps=20, rtol=1e-6)
    assert walk.status == (Status.COMPLETED,)
    assert walk.paths[0][-1].stationarity < 1e-5
    assert (len(walk.paths[0]), int(walk.num_jacobians)) == (1, 1)
    assert float(walk.num_evals) < 40


def test_corners_end_no_walk_with_an_error():
    for seed in range(30):
        _, f, x, wish = corner(seed, 6, 4)
        walk = trace_level_set(f, x.float(), heading="toward", target=wish.clamp(0, 1).float(), num_steps=3)
        assert walk.paths[0][-1].stationarity < 1e-5, seed


def test_the_end_of_a_walk_states_what_is_left():
    """Also where its steps ran out while a stale Jacobian bounded it badly."""
    g = torch.Generator().manual_seed(0)
    B = torch.randn(24, 64, generator=g, dtype=torch.float64) / 8
    A = torch.randn(64, 192, generator=g, dtype=torch.float64)

    def f(image):
        return torch.sin(image.flatten(1) @ A.T / 2) @ B.T + 2  # whose row space turns

    x, y = torch.rand(2, 1, 3, 8, 8, generator=g, dtype=torch.float64) * 0.6 + 0.2
    end = trace_level_set(f, x, heading="toward", target=y, num_steps=8, step=0.2, keep_points=True).paths[0][-1]
    J = jacrev(lambda v: f(v[None])[0])(end.pixels).reshape(24, -1)
    free = (end.pixels > 0) & (end.pixels < 1)
    assert bool(free.all())
    d = (y[0] - end.pixels).flatten()
    left = d - J.T @ torch.linalg.lstsq(J.T, d[:, None]).solution[:, 0]
    assert end.stationarity == pytest.approx(float(left.norm() / d.norm()), rel=1e-6)
