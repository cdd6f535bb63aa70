"""Rounding in turn: the grid, the bounds, the evaluations, and sources at a bound of the box."""

from __future__ import annotations

import pytest
import torch
from cases import Wide, wide_images

from hf_equiv.conditions import admit
from hf_equiv.data.sources import load_images
from hf_equiv.matching.lattice import Lattice
from hf_equiv.matching.match import match_embedding
from hf_equiv.matching.refine import refine_8bit
from hf_equiv.matching.rounding import num_turns, round_in_turn
from hf_equiv.models.encoder import Encoder

LAST = 1280


def turned(x, z, radius, most: int = 3000):
    lattice = Lattice.around(x, None if radius is None else x, radius, "linf")
    f = admit(Wide(), x, noise=True)
    *_, newton = round_in_turn(f, x, z.double(), lattice, 1e-5, torch.full((len(x),), most))
    return newton, lattice


@pytest.mark.parametrize("radius", [None, 4 / 255])
def test_all_but_the_last_pixels_end_on_the_grid(radius):
    x = (wide_images(2, 50) * 255).round() / 255 if radius else wide_images(2, 50)
    z = Wide()((x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(51))).clamp(0, 1))
    newton, lattice = turned(x, z, radius)
    assert bool((newton.error <= 1e-4).all())
    levels = 255 * newton.best.double()
    off = (levels - levels.round()).abs() > 1e-4
    assert bool((off.sum(dim=1) <= LAST).all())
    assert bool(off.any())
    assert bool(((levels > lattice.lower - 1e-4) & (levels < lattice.upper + 1e-4)).all())


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_it_stays_within_the_evaluations(steps):
    x = wide_images(1, 52)
    most = 2 + 2 * 6 + num_turns(x[0].numel()) + 3 * steps
    newton, _ = turned(x, Wide()(wide_images(1, 53)), None, most)
    assert int(newton.cost) <= most


def test_an_image_is_rounded_as_if_alone():
    x = wide_images(3, 54)
    z = Wide()((x + torch.tensor([0.0, 0.01, 0.03])[:, None, None, None]).clamp(0, 1))
    both = refine_8bit(Wide(), x, z, rtol=1e-4)
    for b in range(3):
        alone = refine_8bit(Wide(), x[b : b + 1], z[b : b + 1], rtol=1e-4)
        assert torch.equal(both.images[b], alone.images[0])
        assert float(both.num_evals[b]) == float(alone.num_evals[0])


@pytest.mark.parametrize("shade", [0.0, 1.0])
def test_a_match_of_a_black_or_white_source_survives_rounding(shade):
    """Its changes are about 1/255, so that rounding them all at once moves the embedding by several percent."""
    encoder = Encoder.from_pretrained("builtin-64")
    target = encoder.preprocess([load_images("builtin")[0].image])
    source = torch.full_like(target, shade)
    match = match_embedding(encoder, source, target)
    exact = refine_8bit(encoder, match.images, target)
    assert float(exact.traces[0][0][1]) > 5e-3
    assert float(exact.errors) <= 1e-3
