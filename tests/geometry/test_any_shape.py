"""Vectors (B, N) and tokens (B, T, D) in a box of any width, and without one, against closed forms."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cases import DIM, images, invariant, linear, quadratic, smooth_mlp
from torch import Tensor

from hf_equiv.checks import Bounds
from hf_equiv.conditions import admit
from hf_equiv.geometry.directions import make_directions, row_space
from hf_equiv.geometry.levelset import trace_level_set
from hf_equiv.geometry.linearity import linearity_radius
from hf_equiv.geometry.lipschitz import directional_lipschitz
from hf_equiv.geometry.regional import regional_lipschitz
from hf_equiv.geometry.spectrum import jacobian_spectrum
from hf_equiv.jacobian import Jacobian

F64 = torch.float64
SCALE = 4.0  # values in a box of this width


@dataclass(frozen=True)
class Setting:
    """Inputs of a shape about a middle, and the encoder of pictures that sees them."""

    shape: tuple[int, ...]
    bounds: Bounds
    middle: float

    def wrap(self, f):
        return lambda x: f(((x - self.middle) / SCALE + 0.5).reshape(-1, 3, 8, 8))

    def inputs(self, batch: int, seed: int = 2, dtype: torch.dtype = F64) -> Tensor:
        return self.place(images(batch, seed=seed, dtype=dtype))

    def place(self, pictures: Tensor) -> Tensor:
        return (self.middle + SCALE * (pictures - 0.5)).reshape(len(pictures), *self.shape)

    def jacobian(self, f, x: Tensor) -> Tensor:
        return f.jacobian(((x - self.middle) / SCALE + 0.5).reshape(3, 8, 8)) / SCALE


SETTINGS = [
    Setting((192,), (-2, 2), 0.0),
    Setting((12, 16), (-2, 2), 0.0),
    Setting((192,), None, 5.0),
    Setting((12, 16), None, -3.0),
    Setting((2, 2, 3, 16), (1.0, 5.0), 3.0),
]
every_setting = pytest.mark.parametrize("at", SETTINGS, ids=lambda at: f"{at.shape} {at.bounds}")
every_case = pytest.mark.parametrize(
    "f", [linear(), quadratic(), smooth_mlp(), invariant()], ids=lambda f: type(f).__name__
)


@every_setting
@every_case
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_spectrum_and_constants(at, f, dtype):
    x, g = at.inputs(2, dtype=dtype), at.wrap(f)
    exact = torch.stack([torch.linalg.svdvals(at.jacobian(f, image)) for image in x])
    full = jacobian_spectrum(g, x, vectors=True, bounds=at.bounds)
    assert bool(((full.singular_values - exact).abs() <= full.error_bound + 1e-13).all())
    assert full.right.shape == (2, DIM, *at.shape)
    top = jacobian_spectrum(g, x, k=2, method="golub_kahan", bounds=at.bounds)
    torch.testing.assert_close(top.singular_values, exact[:, :2], rtol=1e-4, atol=0)
    made = make_directions(g, x, random=1, top=2, null=1, gradient=True, toward=x.flip(0), bounds=at.bounds)
    assert made.vectors.shape == (2, 6, *at.shape)
    found = directional_lipschitz(g, x, made, bounds=at.bounds)
    wanted = torch.stack(
        [(v.flatten(1).double() @ at.jacobian(f, y).T).norm(dim=1) for y, v in zip(x, made.vectors, strict=True)]
    )
    torch.testing.assert_close(found.jvp, wanted, rtol=1e-4, atol=1e-5)
    assert [set(row[:3]) | {row[3]} for row in found.status] == [{"resolved", "undetermined"}] * 2
    resolved = found.values.isfinite()
    assert bool(((found.values - wanted).abs() <= 0.01 * wanted)[resolved].all())
    torch.testing.assert_close(row_space(g, x[0], bounds=at.bounds).singular_values, exact[0], rtol=1e-4, atol=0)


@every_setting
def test_linearity_and_the_largest_constant_in_a_ball(at):
    f, x = quadratic(), at.inputs(1)
    v = torch.randn(1, 4, *at.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = linearity_radius(at.wrap(f), x, v, rtol=1e-12, max_radius=1e4, bounds=at.bounds)
    for k in range(4):  # ½h²‖D²f[v, v]‖ = τ·h·‖Jv‖
        unit = v[0, k].flatten() / v[0, k].norm()
        bend = f.second_derivative(unit) / SCALE**2
        wanted = 0.2 * (at.jacobian(f, x[0]) @ unit).norm() / bend.norm()
        assert float(found.radii[0, k]) == pytest.approx(float(wanted), rel=1e-9)
    for norm in ("l2", "linf"):
        ball = regional_lipschitz(
            at.wrap(linear()), x, 1.5, norm, num_steps=12, num_batches=5, batch_size=1, bounds=at.bounds
        )
        exact = torch.linalg.svdvals(at.jacobian(linear(), x[0]))[0]
        assert float(ball.lower_bound) == pytest.approx(float(exact), rel=1e-9)
        assert float((ball.images - x).norm() if norm == "l2" else (ball.images - x).abs().max()) <= 1.5


@every_setting
def test_walks(at):
    match, source = at.inputs(1, seed=1), at.inputs(1, seed=2)
    A = at.jacobian(linear(), source[0])
    nearest = source + (torch.linalg.pinv(A) @ (A @ (match - source).flatten())).view_as(source)
    options = {"step": 4.0, "rtol": 1e-12, "bounds": at.bounds}
    walk = trace_level_set(
        at.wrap(linear()), match, heading="nearest", origin=source, num_steps=60, stop=1e-11, **options
    )
    assert walk.completed
    torch.testing.assert_close(walk.images, nearest, rtol=0, atol=1e-9)
    g = at.wrap(smooth_mlp())
    z = g(source)
    for heading in ("random", "away"):
        for target in (None, z, source):
            walk = trace_level_set(g, source, heading=heading, num_steps=8, target=target, keep_points=True, **options)
            assert walk.completed
            points = torch.stack([point.pixels for point in walk.paths[0]])
            assert float(((g(points) - z).norm(dim=1) / z.norm()).max()) <= 2e-12
            assert float((walk.images - source).norm()) > 10
            if at.bounds is not None:
                assert bool((points >= at.bounds[0]).all())
                assert bool((points <= at.bounds[1]).all())


def test_a_walk_ends_at_the_box_and_without_one_goes_on():
    """Only the first 64 numbers count, and the others lead to the bound."""
    at = SETTINGS[0]
    heading = torch.zeros(1, 192, dtype=F64)
    heading[:, 64:] = 1.0
    g, x = at.wrap(invariant()), at.inputs(1)
    ends = [
        trace_level_set(g, x, heading=heading, step=9.0, num_steps=20, rtol=1e-12, bounds=bounds)
        for bounds in (at.bounds, (-2, 3.5), None)
    ]
    assert [str(walk.status[0]) for walk in ends] == ["box_blocked", "box_blocked", "completed"]
    assert [float(walk.images.max()) for walk in ends[:2]] == [2.0, 3.5]
    assert float(ends[2].images.min(dim=1).values) < 2 < 10 < float(ends[2].images.max())
    assert ends[0].paths[0][-1].psnr_db == pytest.approx(
        float(-10 * ((ends[0].images - x) / SCALE).square().mean().log10()), rel=1e-9
    )


@every_setting
@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_admission(at, scale):
    """What is refused for pictures is refused for any input, at the size of its values."""

    def honest(x):
        return at.wrap(smooth_mlp())(x / scale)

    def detached(x):
        return honest(x) + 0.5 * honest(x.detach())

    bounds = None if at.bounds is None else (at.bounds[0] * scale, at.bounds[1] * scale)
    for dtype in (F64, torch.float32):
        x = at.inputs(2).to(dtype) * scale
        f = admit(honest, x, noise=True, bounds=bounds)
        assert f.noise <= 20 * torch.finfo(dtype).eps
        assert dtype == F64 or f.noise > 1e-9
        for broken, message in ((detached, "the derivative that"), (lambda x: honest(x - x.mean(0)), "for itself")):
            with pytest.raises(ValueError, match=f"`f` must .*{message}"):
                admit(broken, x, bounds=bounds)


def test_a_vector_of_one_number():
    x = torch.tensor([[3.0]], dtype=F64)
    assert Jacobian(lambda v: v.square(), x[0], bounds=None).as_matrix().tolist() == [[6.0]]
    assert admit(lambda v: v.square(), x, noise=True, bounds=None).derivable


VERBS = {
    "jacobian_spectrum": lambda x, b: jacobian_spectrum(linear(), x, bounds=b),
    "make_directions": lambda x, b: make_directions(linear(), x, random=1, bounds=b),
    "directional_lipschitz": lambda x, b: directional_lipschitz(linear(), x, x[:, None], bounds=b),
    "linearity_radius": lambda x, b: linearity_radius(linear(), x, x[:, None], bounds=b),
    "regional_lipschitz": lambda x, b: regional_lipschitz(linear(), x, 0.1, bounds=b),
    "trace_level_set": lambda x, b: trace_level_set(linear(), x, heading="random", bounds=b),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_values_outside_its_box(verb):
    x = images(2)
    x[1, 0, 0, 0] = 1.5
    with pytest.raises(ValueError, match=r"`images` must lie within `bounds` \[-1, 1\.25\]; got 1\.5 in image 1\."):
        VERBS[verb](x, (-1, 1.25))
