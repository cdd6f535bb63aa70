"""The largest constant found in a ball against closed forms, and CLEVER beside it."""

from __future__ import annotations

import math

import pytest
import torch
from cases import SIGMA, images, invariant, kinked, linear, orthogonal, quadratic, smooth_mlp

from hf_equiv.geometry import regional
from hf_equiv.geometry.regional import regional_lipschitz


def squares(x):
    """J = diag(2x): the constant of a ball is twice the largest pixel in it."""
    return x.flatten(1).square()


def one_bright_pixel(value=0.5):
    x = torch.full((1, 1, 3, 3), 0.3, dtype=torch.float64)
    x[0, 0, 1, 1] = value
    return x


@pytest.mark.parametrize("f", [linear(), orthogonal(), invariant()], ids=["linear", "orthogonal", "invariant"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_linear_map_has_its_largest_singular_value(f, norm):
    x = images(2, dtype=torch.float64)
    result = regional_lipschitz(f, x, 0.1, norm, num_batches=5, batch_size=1)
    wanted = float(torch.linalg.svdvals(f.jacobian(x[0]))[0])
    torch.testing.assert_close(result.lower_bound, torch.full((2,), wanted, dtype=torch.float64), rtol=1e-10, atol=0)
    assert set(result.status) == {"completed"}


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("radius", "wanted"), [(0.2, 1.4), (0.6, 2.0)])
def test_the_ball_and_the_box_end_the_ascent(norm, radius, wanted):
    result = regional_lipschitz(squares, one_bright_pixel(), radius, norm)
    assert float(result.at_center) == pytest.approx(1.0, rel=1e-6)
    assert float(result.lower_bound) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("norm", "radius"), [("l2", 1.0), ("linf", 0.05)])
@pytest.mark.parametrize("f", [smooth_mlp(), quadratic(), kinked()], ids=["smooth_mlp", "quadratic", "kinked"])
def test_a_bound_that_holds_where_it_was_found(f, norm, radius, dtype):
    x = images(2, dtype=dtype)
    result = regional_lipschitz(f, x, radius, norm, num_batches=6, batch_size=2)
    for b in range(2):
        place, v = result.images[b], result.directions[b].double()
        gap = (place.double() - x[b].double()).flatten()
        assert float(gap.norm() if norm == "l2" else gap.abs().max()) <= radius
        assert bool((place >= 0).all())
        assert bool((place <= 1).all())
        J = f.jacobian(place)
        assert float((J @ v.flatten()).norm() / v.norm()) == pytest.approx(float(result.lower_bound[b]), rel=1e-5)
        assert float(result.lower_bound[b]) <= float(torch.linalg.svdvals(J)[0]) * (1 + 1e-6)
        assert float(result.lower_bound[b]) >= float(result.at_center[b])
        assert float(result.lower_bound[b]) >= float(result.sample_maxima[b].max())
        assert not float(result.clever[b]) < float(result.sample_maxima[b].max())  # NaN: no end point


def test_ascent_beats_random_points():
    x = images(2, dtype=torch.float64)
    found = regional_lipschitz(smooth_mlp(), x, 2.0, num_batches=6, batch_size=4)
    assert bool((found.lower_bound > 1.02 * found.sample_maxima.max(dim=1).values).all())


def test_clever_estimates_a_known_end():
    # ‖J‖ = 2·max x over a line: uniform samples of [0.3, 0.7] end at 1.4
    x = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    result = regional_lipschitz(squares, x, 0.2, num_batches=60, batch_size=8)
    assert float(result.clever) == pytest.approx(1.4, abs=0.02)


def test_an_encoder_without_slope():
    result = regional_lipschitz(lambda x: x.flatten(1)[:, :3] * 0 + 1, images(1), 0.5, num_batches=0)
    assert float(result.lower_bound) == 0
    assert result.clever.isnan().all()
    assert result.status == ("completed",)


BLACK, GREY, WHITE = (torch.full((1, 3, 2, 2), level, dtype=torch.float64) for level in (0.0, 0.5, 1.0))
MIX = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def hidden(x):
    return (x.flatten(1) - 0.5) @ MIX.to(x).T


KINKS = {
    "x - relu(x)": (lambda x: x.flatten(1) - torch.relu(x.flatten(1)), BLACK, 0.0),
    "clamp from above": (lambda x: x.flatten(1).clamp(max=0), BLACK, 0.0),
    "clamp from below": (lambda x: x.flatten(1).clamp(min=1), WHITE, 0.0),
    "maximum": (lambda x: torch.maximum(x.flatten(1), x.flatten(1) * 0) - x.flatten(1), BLACK, 0.0),
    "relu of a sum": (lambda x: torch.relu(hidden(x)) - torch.relu(-hidden(x)) - hidden(x), GREY, 0.0),
    "steep outside": (lambda x: torch.where(x.flatten(1) <= 0, 3 * x.flatten(1), 0.1 * x.flatten(1)), BLACK, 0.1),
    "steep inside": (lambda x: torch.where(x.flatten(1) <= 0, 0.1 * x.flatten(1), 3 * x.flatten(1)), BLACK, 3.0),
    "one per cent": (lambda x: torch.where(x.flatten(1) <= 0, x.flatten(1), 0.99 * x.flatten(1)), BLACK, 0.99),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", KINKS)
def test_a_kink_has_no_constant_that_no_two_points_show(name, norm, dtype):
    f, x, constant = KINKS[name]
    result = regional_lipschitz(f, x.to(dtype), 0.1, norm, num_batches=5, batch_size=1)
    assert result.status == ("completed",)
    assert float(result.at_center) <= float(result.lower_bound) <= constant * (1 + 1e-4) + 1e-6
    assert float(result.lower_bound) >= 0.98 * constant - 1e-6
    J = torch.func.jacrev(f)(result.images).flatten(3).squeeze()  # autograd agrees at the stated place
    v = result.directions[0].flatten().to(J)
    assert float((J @ v).norm()) == pytest.approx(float(result.lower_bound), rel=1e-3, abs=1e-6)


def test_normalised_units_cost_and_seed():
    x = images(2, dtype=torch.float64)
    std = [0.2, 0.2, 0.2]
    calls = []
    one = regional_lipschitz(linear(), x, 0.1, std=std, progress=lambda *state: calls.append(state))
    assert calls == [(1, 2), (2, 2)]
    torch.testing.assert_close(one.unit_factor, torch.full((2,), 0.2, dtype=torch.float64))
    assert float((one.lower_bound - SIGMA[0]).abs().max()) < 1e-9
    assert bool((one.num_evals > 0).all())
    other = regional_lipschitz(linear(), x, 0.1, std=std)
    assert torch.equal(one.sample_maxima, other.sample_maxima)
    assert regional_lipschitz(linear(), x, 0.1, num_batches=0).unit_factor.isnan().all()


def test_random_points_without_a_number_do_not_count():
    def f(x):
        return linear()(x) * torch.where(x[:, :1, 0, 0] > 0.5, math.nan, 1.0)

    x = torch.full((1, 3, 8, 8), 0.49, dtype=torch.float64)
    found = regional_lipschitz(f, x, 0.3, num_steps=0, num_batches=5, batch_size=8)
    assert 0.5 < float(found.sample_maxima.min()) <= float(found.sample_maxima.max()) <= float(SIGMA[0]) * (1 + 1e-9)
    assert found.status == ("completed",)


def test_random_points_may_share_passes(monkeypatch):
    found = []
    for at_once in (1, 3, 8):
        monkeypatch.setattr(regional, "_at_once", lambda image, size=at_once: size)
        found.append(regional_lipschitz(smooth_mlp(), images(1), 0.5, num_steps=3, num_batches=5, batch_size=4))
    for other in found[1:]:
        assert torch.equal(found[0].sample_maxima, other.sample_maxima)
        assert torch.equal(found[0].images, other.images)
        assert float(found[0].num_evals) == pytest.approx(float(other.num_evals), rel=1e-12)


def test_nan_is_an_error_of_its_image():
    x = images(2)
    x[0, 0, 0, 0] = 0

    def f(y):
        return smooth_mlp()(y) * torch.where(y[:, :1, 0, 0] < 0.1, math.nan, 1.0)

    assert regional_lipschitz(f, x, 0.01, num_batches=5).status == ("error", "completed")


@pytest.mark.parametrize(
    ("radius", "norm", "options", "message"),
    [
        (0.0, "l2", {}, "`radius` must lie in"),
        (2.0, "linf", {}, "`radius` must lie in"),
        (None, "l2", {}, "`radius` must be a number"),
        (0.1, "l1", {}, "`norm` must be one of"),
        (0.1, "l2", {"num_batches": 3}, "0 or at least 5"),
        (0.1, "l2", {"num_steps": -1}, "`num_steps` must be at least 0"),
    ],
)
def test_bad_input(radius, norm, options, message):
    with pytest.raises(ValueError, match=message):
        regional_lipschitz(linear(), images(1), radius, norm, **options)
