"""The attack finds the worst image where it is known, stays in its set, and measures without bias."""

from __future__ import annotations

import math

import pytest
import torch
from cases import images, smooth_mlp

from hf_equiv.defences import attack_smoothed
from hf_equiv.defences.attack import paired_cosine


def moved(x):
    return 2 + x.flatten(1)


@pytest.mark.parametrize(("bounds", "radius"), [(None, 0.5), (None, 2.0), ((0, 1), 0.5)])
def test_without_noise_it_finds_the_tangent(bounds, radius):
    found = attack_smoothed(moved, torch.full((2, 2), 0.5).double(), 0, radius, bounds=bounds)
    wanted = math.sqrt(1 - (radius / (2.5 * math.sqrt(2))) ** 2)  # sin of the angle = radius over length
    assert found.cosine.tolist() == [pytest.approx(wanted, abs=2e-4)] * 2
    assert found.error.tolist() == [pytest.approx(0, abs=1e-9)] * 2
    assert repr(found).startswith("SmoothedAttack(2 images; least cosine 0.")


def test_noise_is_averaged_out():
    # f = x, and f̂ points along x by symmetry: the tangent again
    x = torch.tensor([[2.0, 0.0]]).double()
    found = attack_smoothed(lambda x: x, x, 0.5, 1.0, n=4000, bounds=None)
    assert abs(float(found.cosine) - math.cos(math.asin(0.5))) <= float(found.error) + 0.01
    assert float(found.error) < 0.05


@pytest.mark.parametrize("bounds", [(0, 1), None])
def test_it_stays_in_ball_and_box(bounds):
    x = images(2, margin=0.0)
    found = attack_smoothed(smooth_mlp(), x, 0.1, 0.6, num_steps=5, restarts=1, n=20, bounds=bounds)
    assert bool(((found.images - x).double().flatten(1).norm(dim=1) <= 0.6 + 1e-6).all())
    assert bool(((found.images >= 0) & (found.images <= 1)).all()) == (bounds is not None)


def test_it_beats_random_images():
    f, x = smooth_mlp(), images(1)
    found = attack_smoothed(f, x, 0.1, 0.5, n=200)
    away = torch.randn(50, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    others = x + 0.5 * away / away.flatten(1).norm(dim=1)[:, None, None, None]
    assert float(found.cosine + found.error) < float(torch.cosine_similarity(f(x), f(others), dim=1).min())


def test_images_do_not_change_an_image():
    f, x = smooth_mlp(), images(2)
    together = attack_smoothed(f, x, 0.1, 0.5, num_steps=3, restarts=1, n=20)
    alone = [attack_smoothed(f, one, 0.1, 0.5, num_steps=3, restarts=1, n=20) for one in x.split(1)]
    for name in ("images", "cosine", "error", "num_evals"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))
    assert together.num_evals.tolist() == [3 * 16 + 20] * 2
    assert not torch.equal(together.images, attack_smoothed(f, x, 0.1, 0.5, num_steps=3, seed=2, n=20).images)


def test_the_interval_covers_and_the_cosine_has_no_bias():
    generator, found = torch.Generator().manual_seed(0), []
    a, b = torch.tensor([1.0, 0.0, 0.0]).double(), torch.tensor([0.8, 0.6, 0.0]).double()
    for _ in range(300):
        noise = 0.5 * torch.randn(60, 3, generator=generator, dtype=torch.float64)
        found.append(paired_cosine(a + noise, b + 0.5 * noise, 0.95))
    cosines, errors = torch.tensor(found, dtype=torch.float64).T
    assert 0.9 <= float(((cosines - 0.8).abs() <= errors).double().mean()) <= 0.98
    assert float(cosines.mean()) == pytest.approx(0.8, abs=0.003)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sigma": -1}, "`sigma` must be finite and at least 0"),
        ({"radius": 0}, "`radius` must be finite and above 0"),
        ({"restarts": 0}, "`restarts` must be at least 1"),
        ({"n": 2}, "`n` must be at least 3"),
        ({"confidence": 1.5}, "`confidence` must be below 1"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        attack_smoothed(smooth_mlp(), images(1), **{"sigma": 0.25, "radius": 0.1, **given})
