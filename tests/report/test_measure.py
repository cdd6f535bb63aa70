"""Controls, survival, transfer, retrieval and the kNN probe, on encoders of known answer."""

import pytest
import torch
from fakes import Known, pixels_of_photo

from hf_equiv.report import measure

SIDE = 16


def brightness(x):
    return torch.stack([1 - x.mean(), x.mean()])


# --- one pair ---


def test_controls_of_a_linear_encoder():
    """f(x) = x: an embedding moves by as much as the pixels do."""
    encoder = Known(torch.Tensor.flatten)
    source, target = pixels_of_photo(0), pixels_of_photo(1)
    match = ((0.7 * source + 0.3 * target) * 255).round() / 255
    row, z = measure.measure_pair(encoder, source, match, target, seed=0, pair_id="a", survival=False)
    step, apart = (match - source).norm(), (source - target).norm()
    assert row["moved"] == pytest.approx(float(step / source.norm()), rel=1e-5)
    assert row["distance"] == pytest.approx(float(apart / target.norm()), rel=1e-5)
    assert row["random_l2"] == pytest.approx(float(step), rel=0.02)
    assert row["random_moved"] == pytest.approx(row["moved"], rel=0.02)  # here every direction counts the same
    assert row["random_error"] > row["error"]
    assert torch.equal(z, match.flatten().double())
    again, _ = measure.measure_pair(encoder, source, match, target, seed=0, pair_id="a", survival=False)
    other, _ = measure.measure_pair(encoder, source, match, target, seed=1, pair_id="a", survival=False)
    assert again == row
    assert other["random_error"] != row["random_error"]


def test_random_steps_of_no_length_and_beyond_the_box():
    encoder = Known(torch.Tensor.flatten)
    white = torch.ones(3, SIDE, SIDE)
    row, _ = measure.measure_pair(encoder, white, white, pixels_of_photo(1), seed=0, pair_id="a", survival=False)
    assert row["random_moved"] == 0.0
    row, _ = measure.measure_pair(encoder, white, 1 - white, pixels_of_photo(1), seed=0, pair_id="a", survival=False)
    assert 0 < row["random_l2"] <= (3 * SIDE * SIDE) ** 0.5


def test_what_does_not_see_detail_survives_and_what_does_not_does_not():
    source, target = pixels_of_photo(0), measure.round_8bit(pixels_of_photo(1) * 0.6)
    mean = Known(lambda x: x.mean((1, 2)), head=brightness)
    fine = Known(lambda x: (x[:, :, ::2] - x[:, :, 1::2]).flatten() + 1e-3)
    match = (target.flip(1).flip(2) * 255).round() / 255  # same mean, other pixels
    row, _ = measure.measure_pair(mean, source, match, target, seed=0, pair_id="a", float_match=match)
    assert set(row["survival"]) == set(measure.TRANSFORMS)
    for found in row["survival"].values():
        assert found["error"] < 0.02
        assert found["control"] < 0.02
        assert found["label"] is True
        assert found["control_label"] is True
    assert row["rounded_error"] < 1e-6
    row, _ = measure.measure_pair(fine, source, target, target, seed=0, pair_id="a")
    blurred = row["survival"]["Gaussian blur, σ = 1 px"]
    assert blurred["error"] == blurred["control"] > 0.3
    assert blurred["label"] is None


def test_transfer_to_itself_and_to_a_stranger():
    """What matches under f(x) = mean matches there, and not under g(x) = x."""
    source, target = pixels_of_photo(0), pixels_of_photo(1)
    match = target.flip(1).flip(2)
    own, _, _ = measure.transfer_pair(Known(lambda x: x.mean((1, 2)), head=brightness), [source, match, target])
    other, z_source, _ = measure.transfer_pair(Known(torch.Tensor.flatten), [source, match, target])
    assert own["error"] < 1e-6 < other["error"]
    assert own["cosine_to_target"] == pytest.approx(1.0)
    assert own["labels"][1] == own["labels"][2]
    assert other["labels"] is None
    assert torch.allclose(z_source, source.flatten().double())


def test_without_a_place_to_keep_measurements_no_file_is_read():
    assert measure.measured_earlier(None, None) is None


def test_unrelated_distances():
    a, b, c = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    assert measure._unrelated([(a, a), (b, b)])["curve"] == pytest.approx([5**0.5 / 2, 5**0.5])
    assert measure._unrelated([(a, c)])["median"] == pytest.approx(2**0.5)
    none = torch.zeros(2, dtype=torch.float64)  # nothing is so many times a length of zero away
    for pairs in ([(b, b)], [(a, none)], [(a, none * torch.nan)], []):
        assert measure._unrelated(pairs) is None
