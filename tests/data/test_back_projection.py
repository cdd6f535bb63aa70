"""Photos whose view is a match: byte for byte, as near as a dense solution, and what no photo can have."""

import math

import numpy as np
import pytest
import torch

from hf_equiv.data.back_projection import back_project
from hf_equiv.data.resampling import Axis, View


def view(width, height, name, m=24):
    return View(Axis(width, m, 0, m, name), Axis(height, m, 0, m, name))


def photo(width, height, low=60, high=196):
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:height, :width]
    smooth = np.sin(x / 9)[..., None] + np.cos(y / 7)[..., None] + np.array([0.1, 0.3, 0.6])
    noise = rng.normal(0, 0.05, (height, width, 3))
    values = (smooth + noise - smooth.min()) / np.ptp(smooth)
    return torch.from_numpy((low + (high - low) * values).clip(0, 255).round().astype(np.uint8))


def changed(seen, size=4.0):
    noise = torch.randn(seen.shape, generator=torch.Generator().manual_seed(4))
    return (seen + size * noise).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("width", "height"), [(26, 25), (36, 40), (61, 50), (200, 48)])
def test_the_view_is_the_match_byte_for_byte(width, height, name):
    source, sees = photo(width, height), view(width, height, name)
    match = changed(sees.levels(source))
    assert torch.equal(sees.levels(back_project(source, sees, match)), match)


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_the_change_is_hardly_longer_than_the_shortest(name):
    source, sees = photo(72, 60), view(72, 60, name)
    match = changed(sees.levels(source))
    found = back_project(source, sees, match)
    across, down = (torch.linalg.pinv(axis.matrix / 2**22) for axis in (sees.across, sees.down))
    seen = torch.einsum("mh,wn,hnc->mwc", sees.down.matrix, sees.across.matrix, source.double()) / 2**44
    change = torch.einsum("hm,nw,mwc->hnc", down, across, match.double() - seen)
    length = float((found.double() - source.double()).norm())
    assert length <= 1.05 * float(change.norm()) + math.sqrt(change.numel() / 12)


def test_pixels_that_the_view_does_not_see_stay():
    source = photo(80, 64)
    sees = View(Axis(80, 40, 8, 24, "bicubic"), Axis(64, 32, 4, 24, "bicubic"))
    match = changed(sees.levels(source))
    found = back_project(source, sees, match)
    assert torch.equal(sees.levels(found), match)
    inside = torch.zeros(64, 80, dtype=torch.bool)
    inside[sees.down.span, sees.across.span] = True
    assert torch.equal(found[~inside], source[~inside])
    assert not bool(inside.all())


def test_a_photo_that_has_the_view_already_stays_nearly_as_it_is():
    source, sees = photo(61, 50), view(61, 50, "bicubic")
    found = back_project(source, sees, sees.levels(source))
    assert int((found.int() - source.int()).abs().max()) <= 3
    assert float((found.double() - source.double()).square().mean().sqrt()) < 0.75


def test_levels_that_no_photo_has_are_missed_and_no_others():
    source = photo(96, 96)
    sees = view(96, 96, "bilinear")
    match = sees.levels(source)
    match[10, 10], match[10, 11], match[10, 12] = 0, 255, 0
    missed = sees.levels(back_project(source, sees, match)) != match
    assert bool(missed.any())
    missed[7:15, 7:16] = False
    assert not bool(missed.any())


def test_black_and_white_areas_are_met():
    source = photo(61, 50, low=-60, high=320)
    sees = view(61, 50, "bilinear")
    match = sees.levels(source)
    match = torch.where((match == 0) | (match == 255), match, changed(match, 1.0))
    assert float((match == 0).double().mean()) > 0.05
    assert float((sees.levels(back_project(source, sees, match)) != match).double().mean()) < 0.01
