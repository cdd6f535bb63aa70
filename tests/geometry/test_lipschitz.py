"""Directional constants against closed forms: exact where they exist, and never a number where there is none."""

from __future__ import annotations

import math

import pytest
import torch
from cases import EIGHT, SHAPE, images, linear, smooth_mlp

from hf_equiv.geometry.directions import make_directions
from hf_equiv.geometry.lipschitz import directional_lipschitz
from hf_equiv.geometry.secants import RADII, read_secants

every_case = pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)


def directions(case, x, **more):
    return make_directions(case.f, x, random=3, top=2, row=case.rank, null=8, gradient=True, **more)


def exact(case, x, d):
    """‖Jv‖ in closed form (B, K)."""
    return torch.stack(
        [(v.flatten(1).double() @ case.f.jacobian(image).T).norm(dim=1) for image, v in zip(x, d.vectors, strict=True)]
    )


@every_case
def test_float64_is_exact(case):
    x = images(2, seed=2, dtype=torch.float64)
    d = directions(case, x)
    result = directional_lipschitz(case.f, x, d)
    null = torch.tensor([kind == "null" for kind in d.kinds])
    assert result.values[:, null].isnan().all()
    wanted = exact(case, x, d)[:, ~null]
    assert {result.status[b][k] for b in range(2) for k in range(len(d)) if not null[k]} == {"resolved"}
    assert {result.status[b][k] for b in range(2) for k in range(len(d)) if null[k]} == {"undetermined"}
    torch.testing.assert_close(result.values[:, ~null], wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(result.jvp[:, ~null], wanted, rtol=1e-12, atol=0)
    assert bool(((result.values[:, ~null] - wanted).abs() <= result.errors[:, ~null] + 1e-14).all())


@every_case
def test_float32(case):
    x = images(1, seed=2)
    d = directions(case, x)
    result = directional_lipschitz(case.f, x, d)
    null = torch.tensor([kind == "null" for kind in d.kinds])
    assert result.values[:, null].isnan().all()
    torch.testing.assert_close(result.values[:, ~null], exact(case, x, d)[:, ~null], rtol=1e-4, atol=0)


@pytest.mark.parametrize("pixels", [torch.float32, torch.bfloat16])
@every_case
def test_bfloat16_gives_no_number_that_is_not_there(case, pixels):
    x = images(1, seed=2)
    d = directions(case, x)

    def f(y):
        return case.f(y.bfloat16())

    f.dtype = torch.bfloat16
    result = directional_lipschitz(f, x.to(pixels), d)
    wanted = exact(case, x, d)
    good = result.values.isfinite()
    assert not bool(good[:, torch.tensor([kind == "null" for kind in d.kinds])].any())
    torch.testing.assert_close(result.values[good], wanted[good], rtol=0.05, atol=0)


def test_the_record():
    x = images(2, dtype=torch.float64)
    case = EIGHT[5]
    d = directions(case, x, toward=x.flip(0))
    calls = []
    result = directional_lipschitz(case.f, x, d, batch=4, progress=lambda *state: calls.append(state))
    B, K, R = 2, len(d), 21
    assert calls[-1] == (B * K, B * K)
    assert result.secants.shape == result.noise_floor.shape == (B, K, R)
    assert result.plateau.shape == (B, K, 2)
    assert result.radii.tolist() == pytest.approx([10 ** (-5 + i / 4) for i in range(R)])
    assert (result.kinds, result.indices) == (d.kinds, d.indices)
    # one forward pass of the Jacobian (and a graph of its products), 55 of the noise, K tangents, 2·K·R of the ladder
    assert result.num_evals.tolist() == pytest.approx([(2 + 55 + 2 * K + 2 * K * R) / 3] * B, abs=1.1)
    low, high = result.plateau.unbind(dim=2)
    good = result.values.isfinite()
    assert torch.equal(good, low.isfinite())
    on = (result.radii >= low[..., None]) & (result.radii <= high[..., None])
    assert int(on.sum(dim=2)[good].min()) >= 3
    off = ((result.secants - result.values[..., None]).abs() / result.values[..., None])[on]
    assert float(off.max()) <= 0.02
    kinds = result.by_kind()
    assert list(kinds) == ["random", "top", "row", "null", "gradient", "toward"]
    assert (kinds["null"].count, kinds["null"].resolved) == (16, 0)
    assert kinds["null"].quantiles.isnan().all()
    assert float(kinds["top"].quantiles[4]) == pytest.approx(kinds["top"].largest_jvp)
    assert "null 0/16" in repr(result)
    assert "toward 2/2" in repr(result)


def test_the_default_ladder_begins_below_the_curvature_of_steep_images():
    # as steep as DeiT-Tiny gets: the secant along the top direction of one photo is off by 3.4e-3 at h = 1e-4
    v = torch.randn(1, 1, *images(1).shape[1:], generator=torch.Generator().manual_seed(0))
    unit = (v / v.norm()).flatten().double()

    def encode(pixels):
        return torch.stack([torch.sin(1400 * (pixels.flatten(1).double() @ unit)), pixels.flatten(1)[:, 0]], 1).float()

    result = directional_lipschitz(encode, images(1), v)
    assert result.status == (("resolved",),)
    torch.testing.assert_close(result.values, result.jvp, rtol=1e-3, atol=0)
    assert float(result.plateau[0, 0, 1]) < 3e-4


def test_one_image_at_a_time_and_any_length_or_batch():
    x = images(2)
    v = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(1))
    both = directional_lipschitz(smooth_mlp(), x, v)
    alone = directional_lipschitz(smooth_mlp(), x[1:], 5 * v[1:], batch=2)
    torch.testing.assert_close(both.values[1:], alone.values, rtol=1e-6, atol=0)
    assert both.kinds == ("given",) * 3


@pytest.mark.parametrize("as_attribute", [False, True])
def test_normalised_pixel_units(as_attribute):
    std = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    class Encoder:
        pixel_std = std if as_attribute else None

        def __call__(self, x):
            return linear()(x / std.to(x).view(3, 1, 1))

    x = images(1, dtype=torch.float64)
    v = torch.randn(1, 4, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = directional_lipschitz(Encoder(), x, v, std=None if as_attribute else std)
    w = (v / std.view(3, 1, 1)).flatten(2)
    inside = (w / w.norm(dim=2, keepdim=True)) @ linear().A.T
    torch.testing.assert_close(result.values * result.unit_factor, inside.norm(dim=2))
    assert directional_lipschitz(linear(), x, v).unit_factor.isnan().all()


def test_a_wrong_derivative_is_caught():
    class Wrong(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

        @staticmethod
        def jvp(ctx, tangent):
            return 2 * tangent

    x = images(1, dtype=torch.float64)
    v = torch.randn(1, 2, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = directional_lipschitz(lambda y: linear()(Wrong.apply(y)), x, v)
    assert set(result.status[0]) == {"undetermined"}
    assert result.values.isnan().all()


def test_a_random_encoder_is_refused():
    generator = torch.Generator().manual_seed(0)

    def f(x):
        return smooth_mlp()(x) + torch.randn(12, generator=generator, dtype=x.dtype)

    x = images(1, dtype=torch.float64)
    v = torch.randn(1, 4, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with pytest.raises(ValueError, match="`f` must be deterministic; two calls on one image differ by"):
        directional_lipschitz(f, x, v)


@pytest.mark.parametrize("kink", [5e-5, 1e-6])
def test_a_kink_below_the_ladder_is_seen_by_the_derivative(kink):
    def f(v):
        y = v.flatten(1)[:, :1] - 0.5
        return y + 0.05 * (torch.relu(y - kink) - torch.relu(-y - kink))  # slope 1 at x, 1.05 where secants look

    x = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    v = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 1, 1, 1, 2)
    result = directional_lipschitz(f, x, v)
    assert result.status == (("undetermined",),)
    assert float(result.errors) >= 0.045


@pytest.mark.parametrize("quantum", [1e-3, 1e-2])
def test_outputs_that_are_rounded_on_purpose(quantum):
    """The gradient passes straight through, and the secants see the steps."""
    weight = torch.randn(10, 48, generator=torch.Generator().manual_seed(0))

    def f(v):
        y = v.flatten(1) @ weight.T
        return y + ((y / quantum).round() * quantum - y).detach()

    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    v = torch.randn(1, 60, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    result = directional_lipschitz(f, x, v)
    u = v[0].flatten(1).double()
    exact = (u / u.norm(dim=1, keepdim=True) @ weight.double().T).norm(dim=1)
    good = result.values[0].isfinite()
    assert bool(((result.values[0] - exact).abs() <= result.errors[0])[good].all())
    assert float(result.noise_floor[0, 0, 0] * result.radii[0]) > 0.1 * quantum


def test_secants_that_are_noisier_than_their_floor_widen_the_error():
    radii, generator = torch.tensor(RADII, dtype=torch.float64), torch.Generator().manual_seed(0)
    floor = (1e-4 / radii).expand(400, -1)
    slope = torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)  # of norm 3
    scatter = torch.randn(400, len(radii), 3, generator=generator, dtype=torch.float64) / 3**0.5
    for louder in (1, 4, 20):
        secants = slope + radii[:, None] ** 2 + louder * floor[..., None] * scatter
        reading = read_secants(secants, radii, floor)
        assert bool(reading.resolved.all())
        assert bool(((reading.value - 3).abs() <= reading.error).all()), louder


def test_a_constant_encoder_is_undetermined():
    x = images(1)
    v = torch.ones(1, 1, *SHAPE)
    result = directional_lipschitz(lambda y: y.flatten(1)[:, :3] * 0 + 1, x, v)
    assert result.status == (("undetermined",),)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_embedding_that_is_not_finite_is_an_error_of_its_image(value):
    x = images(2)
    x[0, 0, 0, 0] = 0

    def f(y):
        return smooth_mlp()(y) + torch.where(y[:, :1, 0, 0] < 0.1, value, 0.0)

    v = torch.randn(1, 3, *SHAPE, generator=torch.Generator().manual_seed(1)).expand(2, -1, -1, -1, -1)
    result = directional_lipschitz(f, x, v)
    assert [set(row) for row in result.status] == [{"error"}, {"resolved"}]
    assert result.values[0].isnan().all()


V = torch.ones(1, 2, *SHAPE)


@pytest.mark.parametrize(
    ("directions", "options", "error", "message"),
    [
        (V[0], {}, ValueError, r"must have shape \(1, K, 3, 8, 8\)"),
        (V[:, :0], {}, ValueError, "K ≥ 1"),
        (V * 0, {}, ValueError, "must be finite and not zero"),
        (V * math.nan, {}, ValueError, "must be finite and not zero"),
        (V.long(), {}, TypeError, "must be a float tensor"),
        (None, {}, TypeError, "must be a float tensor"),
        (V, {"radii": [1e-3, 1e-2, 1e-1, 1.0]}, ValueError, "at least four a decade"),
        (V, {"radii": [1e-3, 1.5e-3, 2e-3]}, ValueError, "at least 4 numbers"),
        (V, {"radii": [0.0, 1e-3, 1.5e-3, 2e-3]}, ValueError, "above 0"),
        (V, {"noise": "none"}, ValueError, "`noise` must be one of"),
        (V, {"std": [1.0]}, ValueError, "`std` must be 3 positive"),
        (V, {"batch": 0}, ValueError, "`batch` must be at least 1"),
    ],
)
def test_bad_input(directions, options, error, message):
    with pytest.raises(error, match=message):
        directional_lipschitz(linear(), images(1), directions, **options)
