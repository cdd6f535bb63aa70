import hashlib

import numpy as np
import pytest
import torch
from fakes import LABELS, TinyEncoder, draw_photo
from skimage.metrics import peak_signal_noise_ratio

from hf_equiv import formatting
from hf_equiv.analyses import match, measures
from hf_equiv.analyses.plan import RunRows
from hf_equiv.data.image_file import decode_png, encode_png


def summarize(rows, baseline, rtol):
    return match.summarize(None, {"rtol": rtol}, RunRows(rows, baseline=baseline))


@pytest.fixture
def three(tiny):
    source, target = tiny.preprocess([draw_photo(1), draw_photo(2)])
    noise = torch.rand(source.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    return source, decode_png(encode_png((source + 0.1 * noise).clamp(0, 1))), target


@pytest.mark.parametrize("size", [11, 16, 40])
def test_psnr_agrees_with_scikit_image_and_ssim_with_its_formula(size):
    generator = torch.Generator().manual_seed(size)
    a = torch.rand((3, size, size), generator=generator)
    b = (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)
    x, y = a.double().numpy(), b.double().numpy()
    assert measures.psnr_db(a, b) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1.0), abs=1e-9)
    bell = np.exp(-((np.arange(-5, 6) / 1.5) ** 2) / 2)
    window = np.outer(bell, bell) / bell.sum() ** 2

    def mean(values):
        parts = np.lib.stride_tricks.sliding_window_view(values, (11, 11), axis=(1, 2))
        return (parts * window).sum(axis=(-2, -1))

    covariance = mean(x * y) - mean(x) * mean(y)
    variances = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
    contrast = (2 * covariance + 0.03**2) / (variances + 0.03**2)
    luminance = (2 * mean(x) * mean(y) + 0.01**2) / (mean(x) ** 2 + mean(y) ** 2 + 0.01**2)
    assert measures.ssim(a, b) == pytest.approx((luminance * contrast).mean(), abs=1e-12)


def test_what_is_not_defined_is_none():
    a = torch.rand(3, 10, 40)
    assert measures.psnr_db(a, a) is None
    assert measures.ssim(a, a) is None  # below the window
    assert measures.ssim(torch.ones(3, 11, 11), torch.ones(3, 11, 11)) == pytest.approx(1.0)
    zero = torch.zeros(4)
    assert measures.relative_error(torch.ones(4), zero) is None
    assert measures.cosine(torch.ones(4), zero) is None
    assert formatting.finite(float("nan")) is None
    assert formatting.finite(None) is None


def test_closed_forms():
    e = torch.eye(3)
    assert measures.relative_error(2 * e[0], e[0]) == 1.0
    assert measures.cosine(e[0], e[1]) == 0.0
    assert measures.cosine(3 * e[0], e[0]) == 1.0
    assert measures.psnr_db(torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.1)) == pytest.approx(20.0, abs=1e-5)


def test_target_quantization_error_is_its_definition(tiny, three):
    target = three[2]
    z = tiny(target[None])[0]
    got = measures.target_quantization_error(tiny, target, z, 3, "a->b")
    seed = int.from_bytes(hashlib.sha256(b"3:a->b").digest()[:8], "big") >> 1
    u = (torch.rand((8, *target.shape), generator=torch.Generator().manual_seed(seed)) - 0.5) / 255
    errors = sorted(float((tiny((target + d)[None])[0].double() - z.double()).norm() / z.double().norm()) for d in u)
    assert got == pytest.approx((errors[3] + errors[4]) / 2, rel=1e-9)
    assert 1e-4 < got < 1e-1
    assert got != measures.target_quantization_error(tiny, target, z, 4, "a->b")


def test_row_is_recomputed_independently(tiny, three):
    source, match, target = three
    row = measures.measure_match(tiny, source, match, target, seed=0, pair_id="p")
    assert tuple(row) == measures.MEASURES
    a, b, t = (np.rint(x.numpy().astype(np.float64) * 255) / 255 for x in three)
    za, zb, zt = (tiny(x[None])[0].double().numpy() for x in three)
    assert row["embedding_error_8bit"] == pytest.approx(np.linalg.norm(zb - zt) / np.linalg.norm(zt), rel=1e-9)
    assert row["cosine_to_target"] == pytest.approx(zb @ zt / np.linalg.norm(zb) / np.linalg.norm(zt), rel=1e-9)
    assert row["cosine_to_source"] == pytest.approx(zb @ za / np.linalg.norm(zb) / np.linalg.norm(za), rel=1e-9)
    assert row["cosine_source_target"] == pytest.approx(za @ zt / np.linalg.norm(za) / np.linalg.norm(zt), rel=1e-9)
    steps = np.abs(np.rint(a * 255) - np.rint(b * 255)).max()
    assert row["linf"] == steps / 255  # so that it can be held against a radius of k/255
    assert row["l2"] == pytest.approx(np.linalg.norm(a - b), rel=1e-12)
    assert row["psnr_db"] == pytest.approx(-10 * np.log10(((a - b) ** 2).mean()), abs=1e-9)
    assert row["noise_floor"] < 1e-6
    p = torch.from_numpy(np.stack([za, zb, zt])).float() @ tiny._head.T.float()
    p = p.double().softmax(dim=1).numpy()
    assert row["source_label"] == LABELS[p[0].argmax()]
    assert row["match_label"] == LABELS[p[1].argmax()]
    assert row["target_label"] == LABELS[p[2].argmax()]
    assert row["match_prob"] == pytest.approx(p[1].max(), rel=1e-5)
    assert row["target_label_prob"] == pytest.approx(p[1, p[2].argmax()], rel=1e-5)
    assert row["same_top1"] is bool(p[1].argmax() == p[2].argmax())
    assert t.shape == a.shape


def test_no_head_no_labels(three):
    row = measures.measure_match(TinyEncoder(head=False), *three, seed=0, pair_id="p")
    assert tuple(row) == measures.MEASURES
    assert [k for k, v in row.items() if v is None] == list(measures.LABEL_MEASURES)


def test_baseline_leaves_own_pairs_out():
    a, b = torch.eye(3), torch.eye(3) * 2
    got = measures.random_pair_baseline(a, b)
    assert got["num_pairs"] == 6
    assert got["cosine"] == {"median": 0.0, "min": 0.0, "max": 0.0}
    assert got["distance"]["median"] == pytest.approx(5**0.5 / 2)
    alone = measures.random_pair_baseline(a[:1], b[:1])
    assert alone["num_pairs"] == 1
    assert alone["distance"]["median"] == 0.5


def test_baseline_never_compares_a_photo_with_itself():
    a, b, c = torch.eye(3)
    got = measures.random_pair_baseline(
        torch.stack([a, b]), torch.stack([b, c])
    )  # b: target of one, source of the other
    assert got["num_pairs"] == 1
    assert got["distance"]["min"] == pytest.approx(2**0.5)
    assert measures.random_pair_baseline(torch.stack([a, a]), torch.stack([a, a])) is None


def test_summary(tiny, three):
    measured = measures.measure_match(tiny, *three, seed=0, pair_id="p")
    good = measured | {
        "status": "converged", "embedding_error": 5e-6, "embedding_error_8bit": 5e-5, "num_evals": 10.0, "seconds": 1.0,
        "source_label": "apple", "target_label": "boat", "match_label": "boat", "same_top1": True,
    }  # fmt: skip
    poor = good | {"status": "stalled", "embedding_error": 2e-3, "embedding_error_8bit": 0.5, "same_top1": False}
    failed = dict.fromkeys(good) | {"status": "error"}
    baseline = measures.random_pair_baseline(torch.eye(2), torch.eye(2))
    summary = summarize([good, poor, failed], baseline, 1e-5)
    assert summary["counts"] == {"converged": 1, "error": 1, "stalled": 1}
    assert summary["success"]["float"] == {"1e-02": 2 / 3, "1e-03": 1 / 3, "1e-04": 1 / 3, "1e-05": 1 / 3}
    assert summary["success"]["8bit"] == {"1e-02": 1 / 3, "1e-03": 1 / 3, "1e-04": 1 / 3, "1e-05": 0.0}
    assert summary["median"]["embedding_error_8bit"] == pytest.approx((5e-5 + 0.5) / 2)
    assert summary["same_top1"] == 0.5
    assert (summary["source_labelled_otherwise"], summary["label_flipped_to_target"]) == (2, 1)
    assert "1 of 3 matches reached embedding error 1e-5" in summary["verdict"]
    assert "Unrelated images are 1.41 apart" in summary["verdict"]
    assert summarize([failed], None, 1e-5)["verdict"] == "No match was made."
    assert summarize([good], baseline, 1e-5)["verdict"].startswith("The match embeds as the target: error 5e-6")
    lost = summarize([good | {"embedding_error_8bit": 0.5}], baseline, 1e-5)["verdict"]
    assert lost.startswith("The float match embeds as the target, its 8-bit PNG does not: error 5e-6")
    assert "apple in the source and boat in the match, like the target" in summarize([good], None, 1)["verdict"]
    one = summarize([poor | {"match_label": "dune"}], baseline, 1e-5)["verdict"]
    assert one.startswith("The match did not reach embedding error 1e-5: error 2e-3 (the source: 1.41)")
    assert "dune in the match, not the boat of the target" in one


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (1.23e-5, "1.2e-5"), (1e-5, "1e-5"), (0.5, "0.50"), (1.07, "1.07")]
)
def test_short(value, text):
    assert formatting.short(value) == text


@pytest.mark.parametrize(
    ("error", "noise", "stated", "wanted"),
    [
        (9.9e-6, 1e-6, "stalled", "stalled"),  # noise keeps it from the tolerance
        (9.9e-6, 1e-6, "converged", "converged"),  # an earlier run, which left noise out
        (5e-6, 1e-6, "stalled", "converged"),
        (2e-5, 1e-6, "converged", "stalled"),
    ],
)
def test_the_status_follows_from_the_error_and_its_noise(error, noise, stated, wanted):
    row = {"embedding_error": error, "noise_floor": noise, "status": stated, "num_evals": 50.0}
    row |= {"match_label": None, "target_label": None}
    assert match.follow({"rtol": 1e-5, "max_evals": 60}, [row])[0]["status"] == wanted
