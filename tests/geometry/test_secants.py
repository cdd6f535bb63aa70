"""The reading of a secant ladder: exact expansions, noise of known size, and nothing where there is nothing."""

from __future__ import annotations

import pytest
import torch
from cases import images, linear, smooth_mlp

from hf_equiv.geometry.directions import make_directions
from hf_equiv.geometry.secants import central_secants, read_secants, secant_noise

RADII = torch.logspace(-4, 0, 17, dtype=torch.float64)


def ladders(count, dim, slope, cubic, noise, *, quintic=0.0, seed=0):
    """Vectors slope + cubic·h² + quintic·h⁴ + noise/h with random directions, and the noise floor."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape):
        g = torch.randn(*shape, dim, generator=generator, dtype=torch.float64)
        return g / g.norm(dim=-1, keepdim=True)

    h = RADII[None, :, None]
    rounding = torch.randn(count, len(RADII), dim, generator=generator, dtype=torch.float64) / dim**0.5
    secants = slope * some(count, 1) + cubic * some(count, 1) * h**2 + quintic * some(count, 1) * h**4
    return secants + noise * rounding / h, (noise / RADII)[None]


@pytest.mark.parametrize("slope", [1e-3, 1.0, 1e4])
def test_expansions_are_read_exactly(slope):
    reading = read_secants(ladders(6, 5, slope, 3 * slope, 1e-13 * slope, quintic=slope)[0], RADII, 1e-13 / RADII[None])
    assert bool(reading.resolved.all())
    torch.testing.assert_close(reading.value, torch.full_like(reading.value, slope), rtol=1e-10, atol=0)


@pytest.mark.parametrize("cubic", [0.1, 10.0, 1e3])
def test_errors_hold_in_noise(cubic):
    secants, floor = ladders(300, 192, 1.0, cubic, 1.5e-5, quintic=cubic)
    reading = read_secants(secants, RADII, floor)
    assert float(reading.resolved.double().mean()) >= 0.99
    assert bool(((reading.value - 1).abs() <= reading.error).all())
    assert bool((reading.plateau[:, 0] < reading.plateau[:, 1]).all())


@pytest.mark.parametrize("dim", [1, 12, 192])
@pytest.mark.parametrize(("cubic", "quintic"), [(0.0, 0.0), (0.05, 0.0), (3.0, 0.0), (300.0, 0.0), (3.0, 30.0)])
def test_a_true_zero_is_never_resolved(dim, cubic, quintic):
    secants, floor = ladders(2000, dim, 0.0, cubic, 1.5e-5, quintic=quintic)
    for part in secants.split(200):  # fits in a cache
        assert int(read_secants(part, RADII, floor).resolved.sum()) == 0


def test_too_much_noise_resolves_nothing():
    secants, floor = ladders(100, 192, 1e-4, 1.0, 1.5e-5)
    assert int(read_secants(secants, RADII, floor).resolved.sum()) == 0


def test_a_kink_ends_the_plateau():
    secants = torch.where(RADII < 1e-2, 2.0, 2.0 + (1 - 1e-2 / RADII)).view(1, -1, 1)
    reading = read_secants(secants, RADII, 1e-12 / RADII[None])
    assert float(reading.value) == pytest.approx(2.0, rel=1e-10)
    assert reading.plateau[0].tolist() == pytest.approx([1e-4, 1e-2])


def test_secants_of_a_linear_map():
    x = images(1, dtype=torch.float64)[0]
    v = torch.randn(5, *x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = v.flatten(1) @ linear().A.T
    secants, shares = central_secants(linear(), x, v, RADII)
    torch.testing.assert_close(secants, exact[:, None].expand(-1, 17, -1), rtol=0, atol=1e-9)
    torch.testing.assert_close(shares, v.flatten(1).square().sum(1)[:, None].expand(-1, 17), rtol=1e-9, atol=0)


def test_steps_that_the_dtype_rounds_away_are_seen():
    x = images(1)[0].bfloat16()
    v = torch.ones(1, *x.shape) / x.numel() ** 0.5
    _, shares = central_secants(lambda y: y.flatten(1)[:, :3], x, v, RADII)
    assert float(shares[0, 0]) == 0
    assert float(shares[0, -1]) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("most", [1, 5, 12, 48, 1000])
def test_the_size_of_a_pass_changes_its_number_alone(most):
    x, passes = images(1)[0], []
    v = make_directions(smooth_mlp(), x[None], random=6).vectors[0]

    class Meter:
        def __call__(self, points):
            passes.append(len(points))
            return smooth_mlp()(points)

        def double(self):
            return smooth_mlp()

    def measure(most):
        passes.clear()
        found = [*central_secants(Meter(), x, v, RADII, most)]
        assert sum(passes) == 12 * len(RADII)
        assert most is None or max(passes) <= most
        assert len(passes) == {None: 34, 48: 5, 1000: 1}.get(most, len(passes))
        for method in ("twin", "ecnoise"):
            noise, _, count = secant_noise(Meter(), x, RADII, method=method, most=most)
            found += [noise, torch.tensor(count)]
        return found

    for one, other in zip(measure(None), measure(most), strict=True):
        assert torch.equal(one, other)
