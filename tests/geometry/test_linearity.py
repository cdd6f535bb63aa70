"""The linearity radius against kinks at known distances and curvatures in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from cases import SHAPE, images, kinked, linear, quadratic, smooth_mlp

from hf_equiv.geometry.directions import make_directions
from hf_equiv.geometry.linearity import linearity_radius


def random_directions(count, seed=1):
    v = torch.randn(1, count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return v / v.flatten(2).norm(dim=2).view(1, count, 1, 1, 1)


def kink_radius(f, x, v, tau):
    """Where (h − h₀)(w·v)‖c‖ = τ·h·‖Av‖; infinite where the kink is never felt that much."""
    below = f.kink_distance(x, v)
    change = float((f.w @ v.flatten()).clamp_min(0) * f.c.norm())
    allowed = tau * float((f.inner.A @ v.flatten()).norm())
    return below * change / (change - allowed) if change > allowed else math.inf


@pytest.mark.parametrize("tau", [1e-6, 1e-2, 0.1])
def test_exact_on_a_known_kink(tau):
    f, x, v = kinked(), images(1, seed=2, dtype=torch.float64), random_directions(40)
    result = linearity_radius(f, x, v, tau=tau, rtol=1e-13)
    felt = 0
    for k in range(40):
        wanted = kink_radius(f, x[0], v[0, k], tau)
        assert result.status[0][k] == "resolved"
        if wanted < math.sqrt(192):
            felt += 1
            assert not result.at_limit[0, k]
            assert float(result.radii[0, k]) == pytest.approx(wanted, rel=1e-10)
        else:
            assert result.at_limit[0, k]
            assert float(result.radii[0, k]) == pytest.approx(math.sqrt(192))
    assert felt >= 5


def test_exact_on_a_quadratic():
    f, x, v = quadratic(), images(1, seed=2, dtype=torch.float64), random_directions(10)
    result = linearity_radius(f, x, v, rtol=1e-13, max_radius=1e4)
    for k in range(10):  # ½h²‖D²f[v, v]‖ = τ·h·‖Jv‖
        slope = (f.jacobian(x[0]) @ v[0, k].flatten()).norm()
        wanted = float(0.2 * slope / f.second_derivative(v[0, k]).norm())
        assert float(result.radii[0, k]) == pytest.approx(wanted, rel=1e-10)


def test_null_directions_are_measured_against_the_embedding():
    f, x = quadratic(), images(1, seed=2, dtype=torch.float64)
    d = make_directions(f, x, null=4, random=1)
    result = linearity_radius(f, x, d, tau=0.05, rtol=1e-13, max_radius=1e4)
    assert result.relative_to == ("jvp",) + ("embedding",) * 4
    for k in range(1, 5):  # ½h²‖D²f[v, v]‖ = τ·‖z‖
        wanted = float((0.1 * f(x)[0].norm() / f.second_derivative(d.vectors[0, k]).norm()).sqrt())
        assert float(result.radii[0, k]) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_linear_encoder_is_linear_up_to_the_limit(dtype):
    result = linearity_radius(linear(), images(2, dtype=dtype), random_directions(3).expand(2, -1, -1, -1, -1))
    assert bool(result.at_limit.all())
    assert set(sum(result.status, ())) == {"resolved"}


def test_float32_agrees_with_float64():
    x, v = images(1), random_directions(8)
    half, full = (linearity_radius(smooth_mlp(), x.to(t), v, batch=3) for t in (torch.float32, torch.float64))
    torch.testing.assert_close(half.radii, full.radii, rtol=5e-3, atol=0)
    assert bool((full.radii > 0.05).all())


def test_rtol_is_the_width_of_the_bracket():
    x, v = images(1, dtype=torch.float64), random_directions(8)
    fine = linearity_radius(smooth_mlp(), x, v, rtol=1e-12)
    coarse = linearity_radius(smooth_mlp(), x, v, rtol=0.05)
    assert bool((coarse.radii <= fine.radii).all())
    assert bool((coarse.radii >= fine.radii / 1.05).all())
    assert bool((coarse.num_evals < fine.num_evals).all())


def test_what_lies_in_the_noise_is_undetermined():
    def f(x):
        return smooth_mlp()(x.bfloat16()).to(x.dtype)

    result = linearity_radius(f, images(1), random_directions(4), tau=1e-4)
    assert set(result.status[0]) == {"undetermined"}
    assert result.radii.isnan().all()


def test_null_direction_of_zero_slope_against_the_slope_is_undetermined():
    x = images(1, dtype=torch.float64)
    d = make_directions(quadratic(), x, null=1)
    assert linearity_radius(quadratic(), x, d, relative_to="jvp").status == (("undetermined",),)


def test_nan_is_an_error_of_its_image():
    x = images(2)
    x[0, 0, 0, 0] = 0

    def f(y):
        return smooth_mlp()(y) + torch.where(y[:, :1, 0, 0] < 0.1, math.nan, 0.0)

    result = linearity_radius(f, x, random_directions(2).expand(2, -1, -1, -1, -1))
    assert [set(row) for row in result.status] == [{"error"}, {"resolved"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "`tau` must be finite and above 0"),
        ({"rtol": math.nan}, "`rtol` must be finite"),
        ({"relative_to": "z"}, "`relative_to` must be one of"),
        ({"max_radius": -1.0}, "`max_radius` must be"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        linearity_radius(linear(), images(1), random_directions(1), **options)
