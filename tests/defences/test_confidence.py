"""The bounds of mean and variance fail no more often than they state, and are sharp."""

from __future__ import annotations

import math

import pytest
import torch

from hf_equiv.defences.confidence import mean_at_least, variance_at_most

ALPHA, TRIALS = 0.1, 300


def samples(kind: str, generator: torch.Generator, n: int) -> torch.Tensor:
    draw = torch.rand(n, generator=generator, dtype=torch.float64)
    return {
        "uniform": 2 * draw - 1 + 1e-9,
        "two values": torch.where(draw < 0.97, 1.0, -1.0),
        "narrow": 0.9 + 0.1 * (draw - 0.5),
        "skewed": 1 - 2 * draw**20,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "mean"), [("uniform", 0.0), ("two values", 0.94), ("narrow", 0.9), ("skewed", 19 / 21)]
)
def test_means(kind, mean):
    generator = torch.Generator().manual_seed(0)
    found = [mean_at_least(samples(kind, generator, 200), ALPHA) for _ in range(TRIALS)]
    missed = sum(bound > mean + 1e-8 for bound in found) / TRIALS
    assert missed <= ALPHA + 3 * math.sqrt(ALPHA / TRIALS)
    sharp = mean_at_least(samples(kind, generator, 20_000), ALPHA)
    spread = float(samples(kind, generator, 20_000).std())
    assert sharp >= mean - 4 * spread / math.sqrt(20_000) - 1e-3


def test_a_mean_of_directions_that_only_later_are_right():
    generator = torch.Generator().manual_seed(1)
    values = samples("narrow", generator, 2000)
    values[:5] = 0.0
    assert 0.87 < mean_at_least(values, ALPHA) < 0.9
    assert mean_at_least(-values, ALPHA) == 0.0


def rotations(kind: str, generator: torch.Generator, n: int) -> torch.Tensor:
    """Vectors of length 1 at most whose largest variance is 0.04, along the first axis."""
    h = torch.zeros(n, 5, dtype=torch.float64)
    sign = torch.randn(n, generator=generator).sign().double()
    h[:, 0] = 0.2 * sign if kind == "two values" else sign * (torch.rand(n, generator=generator) < 0.04)
    h[:, 1:] = 0.1 * torch.randn(n, 4, generator=generator, dtype=torch.float64).clamp(-2, 2)
    return h


@pytest.mark.parametrize("kind", ["two values", "rare"])
def test_variances(kind):
    generator, missed = torch.Generator().manual_seed(0), 0
    for _ in range(TRIALS):
        largest = float(torch.linalg.eigvalsh(torch.cov(rotations(kind, generator, 100).T))[-1])
        missed += variance_at_most(largest, 100, ALPHA) < 0.04
    assert missed / TRIALS <= ALPHA + 3 * math.sqrt(ALPHA / TRIALS)


def test_variances_are_sharp():
    assert variance_at_most(0.04, 10**7, ALPHA) == pytest.approx(0.04, rel=0.02)
    assert variance_at_most(0.0, 1000, ALPHA) == pytest.approx(2 * (1 - ALPHA ** (1 / 500)))  # (1 − λ/2)^500 = α
    assert variance_at_most(2.1, 1000, ALPHA) == variance_at_most(0.9, 2, ALPHA) == 1.0
