"""Certified cosines against smoothed embeddings in closed form, and against attacks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import images, smooth_mlp

from hf_equiv.defences import attack_smoothed, certified_cosine
from hf_equiv.defences.shifts import largest_mean

NODES, WEIGHTS = (torch.tensor(part) for part in np.polynomial.hermite_e.hermegauss(200))
SIGMA = 0.5
RADII = [0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0]


def line(slope):
    """f = (1, slope·x₁), which turns as x₁ grows."""
    return lambda x: torch.stack([torch.ones_like(x[:, 0]), slope * x[:, 0]], dim=1)


def step(x):
    """f = ±1 for x₁ above and below 0: the smoothed embedding is 2Φ(x₁/σ) − 1 exactly."""
    return torch.where(x[:, :1] > 0, 1.0, -1.0) + 0 * x[:, :1]


def smoothed(f, x):
    """f̂ at points whose first number is x (K,), by quadrature, (K, D)."""
    points = (x[:, None] + SIGMA * NODES).reshape(-1, 1)
    h = torch.nn.functional.normalize(f(points), dim=1).view(len(x), len(NODES), -1)
    return (h * (WEIGHTS / WEIGHTS.sum())[:, None]).sum(dim=1)


@pytest.mark.parametrize("slope", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("place", [0.0, 0.7])
def test_the_cosine_of_no_shift_is_less(slope, place):
    f, x = line(slope), torch.tensor([[place, 0.3]], dtype=torch.float64)
    found = certified_cosine(f, x, SIGMA, RADII, n=4000, bounds=None)
    shifts = torch.tensor([[place, place - r, place + r] for r in RADII], dtype=torch.float64)
    for certified, points in zip(found.cosine[0], shifts, strict=True):
        center, *others = smoothed(f, points)
        for other in others:
            assert float(certified) <= float(torch.cosine_similarity(center, other, dim=0)) + 1e-12
    center = smoothed(f, shifts[0, :1])[0]
    assert float(found.norm_bound) <= float(center.norm())
    assert float(found.norm) == pytest.approx(float(center.norm()), abs=0.02)
    torch.testing.assert_close(found.embeddings[0], center, rtol=0, atol=0.03)


def test_it_is_tight_for_a_small_turn():
    x, f = torch.zeros(1, 1, dtype=torch.float64), line(0.1)
    points = torch.tensor([0.0, 0.05], dtype=torch.float64)
    center, other = smoothed(f, points)
    h = torch.nn.functional.normalize(f(SIGMA * NODES[:, None]), dim=1)[:, 1]
    variance = (h.square() * WEIGHTS).sum() / WEIGHTS.sum()
    attained = torch.atan2(other[1], other[0])
    assert float(largest_mean(torch.tensor(0.1).double(), variance) / center.norm()) == pytest.approx(
        float(attained), rel=0.01
    )
    found = certified_cosine(f, x, SIGMA, 0.05, n=100_000, batch=20_000, bounds=None)
    assert float(attained) <= math.acos(float(found.cosine)) <= 1.4 * float(attained)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_it_ends_where_a_step_ends(place):
    x = torch.tensor([[place]])
    radii = [share * place for share in (0.5, 0.9, 1.0, 1.1)]
    found = certified_cosine(step, x, SIGMA, radii, n=50_000, batch=10_000)
    assert float(found.norm) == pytest.approx(math.erf(place / SIGMA / math.sqrt(2)), abs=0.01)
    # within the distance to the step every f̂(x′) has the sign of f̂(x), at that distance none has a sign
    assert bool((found.cosine[0, :2] > 0).all())
    assert bool((found.cosine[0, 2:] == -1).all())


def test_a_constant():
    found = certified_cosine(lambda x: 0 * x + x.new_tensor([3.0, 4.0]), images(1)[:, 0, 0, :2], SIGMA, [0, 0.25, 10])
    assert found.cosine[0, 0] == 1
    assert 0.998 < found.cosine[0, 1] < 1
    assert found.cosine[0, 2] == -1
    assert float(found.norm) == pytest.approx(1)
    assert float(found.norm_bound) > 0.998


def test_no_attack_is_below():
    f, x = smooth_mlp(), images(2)
    found = certified_cosine(f, x, 0.25, [0.1, 0.3], n=2000, bounds=(0, 1))
    assert bool((found.cosine > 0).all())
    for k, radius in enumerate((0.1, 0.3)):
        for bounds in ((0, 1), None):
            attack = attack_smoothed(f, x, 0.25, radius, n=500, restarts=1, bounds=bounds)
            assert bool((attack.cosine + attack.error >= found.cosine[:, k]).all())


def test_images_and_passes_do_not_change_an_image():
    f, x = smooth_mlp(), images(3)
    done = []
    together = certified_cosine(f, x, 0.25, 0.1, n=100, progress=lambda *state: done.append(state))
    assert done[:1] + done[-1:] == [(32, 300), (300, 300)]
    assert together.cosine.shape == (3,)
    assert together.radii.shape == ()
    alone = [certified_cosine(f, one, 0.25, 0.1, n=100, batch=7) for one in x.split(1)]
    for name in ("cosine", "norm", "norm_bound", "variance_bound", "embeddings", "num_evals"):
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))
    assert not torch.equal(together.norm, certified_cosine(f, x, 0.25, 0.1, n=100, seed=1).norm)
    assert repr(together).startswith("CosineCertificate(3 images; median cosine by radius: 0.1: ")
    assert together.num_evals.tolist() == [pytest.approx(100 / 3)] * 3


def test_an_embedding_that_is_not_finite_or_zero():
    found = certified_cosine(torch.log, torch.full((1, 2), 0.5), 1.0, [0.1, 0.2], n=100)
    assert found.status == ("error",)
    assert found.cosine.isnan().all()
    pointless = certified_cosine(lambda x: 0 * x, torch.full((1, 2), 0.5), 1.0, [0.0, 0.2], n=100)
    assert pointless.status == ("completed",)
    assert pointless.cosine.tolist() == [[-1, -1]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sigma": 0}, "`sigma` must be finite and above 0"),
        ({"sigma": math.inf}, "`sigma` must be finite and above 0"),
        ({"radius": -0.1}, "`radius` must be finite and at least 0"),
        ({"radius": [0.1, math.nan]}, "`radius` must be finite and at least 0"),
        ({"radius": []}, "`radius` must be a number or several; got none"),
        ({"confidence": 1.0}, "`confidence` must be below 1"),
        ({"confidence": 0.0}, "`confidence` must be finite and above 0"),
        ({"n": 11}, r"`n` must be at least 12 for confidence 0.999; got 11\. Fewer draws say nothing"),
        ({"batch": 0}, "`batch` must be at least 1"),
        ({"images": images(1) + 1}, r"`images` must lie in \[0, 1\]"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        certified_cosine(smooth_mlp(), **{"images": images(1), "sigma": 0.25, "radius": 0.1, "n": 100, **given})


def test_embeddings_too_long_for_their_covariance():
    with pytest.raises(ValueError, match="embeddings of at most 11585 numbers"):
        certified_cosine(lambda x: x.flatten(1).repeat(1, 6000), torch.full((1, 2), 0.5), 1.0, 0.1, n=100)


def test_few_draws_state_little():
    found = certified_cosine(lambda x: 2 + x.flatten(1), torch.full((1, 2), 0.5), 0.01, [0.0, 0.01], n=12)
    assert found.cosine[0, 1] == -1
