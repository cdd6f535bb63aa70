"""The energy of the row space by cell, band and channel against closed forms."""

from __future__ import annotations

import torch

from hf_equiv.geometry.spectrum import jacobian_spectrum


def of(f, x=None):
    return jacobian_spectrum(f, torch.full((1, 3, 16, 16), 0.5) if x is None else x, progress=False)


def test_pixels_that_f_does_not_read_have_none():
    seen = of(lambda x: x[:, 0, :4, :8].flatten(1))
    expected = torch.zeros(8, 8, dtype=torch.float64)
    expected[:2, :4] = 8.0  # an eighth of the pixels
    torch.testing.assert_close(seen.invariance_map[0], expected)
    assert seen.channel_energy.tolist() == [[3.0, 0.0, 0.0]]


def test_what_comes_behind_changes_nothing():
    gains = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) + 8 * torch.eye(512)
    seen, mixed = (of(lambda x, A=A: x.flatten(1)[:, :512] @ A) for A in (torch.eye(512), gains))
    assert seen.channel_energy[0].tolist() == [1.5, 1.5, 0.0]
    for name in ("invariance_map", "channel_energy", "band_energy"):
        torch.testing.assert_close(getattr(mixed, name), getattr(seen, name), rtol=1e-3, atol=1e-6)


def test_only_the_row_space_counts():
    weights = torch.tensor([2.0, 1.0, 0.0])[:, None, None]
    (energy,) = of(lambda x: (weights * x).sum(1).flatten(1)).channel_energy
    torch.testing.assert_close(energy, torch.tensor([2.4, 0.6, 0.0], dtype=torch.float64))


def test_bands():
    waves = torch.cos(2 * torch.pi * torch.arange(16) / 16)
    for wave, band in ((torch.ones(16), 0), (waves, 2), ((-1.0) ** torch.arange(16), 4)):
        (energy,) = of(lambda x, wave=wave: (x * wave).sum((2, 3))).band_energy
        assert energy.argmax() == band
        assert energy[band] > 0.99 * energy.sum()
    every = of(lambda x: x.flatten(1)).band_energy[0]  # sees all alike: 16 pixels have no wave of 1/32 … 1/16
    torch.testing.assert_close(every, torch.tensor([1.0, 0, 1, 1, 1], dtype=torch.float64))


def test_no_map_without_the_matrix_and_none_of_a_vector():
    x = torch.full((1, 3, 16, 16), 0.5)
    assert jacobian_spectrum(lambda x: x.mean(3).flatten(1), x, k=2, method="golub_kahan").invariance_map is None
    assert of(lambda x: 2 * x, torch.full((1, 5), 0.5)).invariance_map is None
    assert not bool(of(lambda x: 0 * x.mean(3).flatten(1)).invariance_map.any())
