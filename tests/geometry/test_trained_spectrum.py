"""The spectrum of trained weights on real photos, against the float64 model and LAPACK."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_equiv.geometry import singular
from hf_equiv.geometry.directions import patch_null_space, row_space
from hf_equiv.geometry.spectrum import jacobian_spectrum
from hf_equiv.jacobian import Jacobian
from hf_equiv.models.encoder import Encoder
from hf_equiv.passes import alone, look

ASSETS = Path(os.environ.get("HF_EQUIV_ASSETS") or Path(__file__).parents[3] / "shared" / "assets").resolve()
MODELS, PHOTOS = ASSETS / "models", ASSETS / "images" / "sample_100"

pytestmark = [
    pytest.mark.assets,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (MODELS.is_dir() and PHOTOS.is_dir()), reason=f"no assets in {ASSETS}: set HF_EQUIV_ASSETS"),
]


def load(model: str, readout: str) -> tuple[Encoder, torch.Tensor]:
    encoder = Encoder.from_pretrained(MODELS / model, readout=readout, device="cpu")
    return encoder, encoder.preprocess(Image.open(sorted(PHOTOS.glob("*.jpg"))[3]))


def test_the_top_8_take_22_passes():
    encoder, x = load("deit-tiny-patch16-224", "cls")
    passes = [golub_kahan(Jacobian(encoder, x[0]), 8, 1e-4, seed=seed).passes for seed in range(5)]
    assert max(passes) <= 22, passes


def golub_kahan(J: Jacobian, k: int, rtol: float, seed: int = 0) -> singular.TopSingular:
    def work():
        at = yield from look(J._f, J.image)
        return (yield from singular.golub_kahan(at, k, rtol, seed=seed))

    return alone(work())


@pytest.mark.parametrize("model", ["deit-tiny-patch16-224", "beit-form-deit-tiny"])
def test_class_token(model):
    encoder, x = load(model, "cls")
    twin = Jacobian(encoder.double(), x[0].double())
    matrix = twin.as_matrix()
    exact = torch.linalg.svdvals(matrix)
    single, double = jacobian_spectrum(encoder, x), jacobian_spectrum(encoder.double(), x.double())
    torch.testing.assert_close(double.singular_values[0], exact, rtol=0, atol=1e-12 * float(exact[0]))
    error = (single.singular_values[0] - exact).abs()
    assert bool((error <= single.error_bound[0]).all())
    assert float(single.error_bound.max()) <= 3e-4 * float(exact[0])
    assert (single.rank.tolist(), double.rank.tolist()) == ([190], [191])
    for result in (single, double):
        assert [(zero.cause, zero.count) for zero in result.structural_zeros[0]] == [("LayerNorm centring", 1)]
        (near,) = result.near_structural[0]
        assert near.cause == "LayerNorm epsilon"
        assert near.predicted == pytest.approx(float(exact[190]), rel=0.01)
        assert result.patch_nullity == 196 * len(patch_null_space(encoder.patch_weight)) == 112896

    for seed in range(5):
        top = golub_kahan(Jacobian(encoder, x[0]), 8, 1e-4, seed=seed)
        assert float((top.values - single.singular_values[0, :8]).abs().max()) <= 1e-4 * float(exact[0])

    for J, limit in ((Jacobian(encoder, x[0]), 1e-7), (twin, 1e-13)):
        rows = row_space(J)
        v = torch.randn(2, *x.shape[1:], generator=torch.Generator().manual_seed(0)).to(J.image)
        v[1] = rows.project_null(v[1])
        v[1] += v[1].norm() * rows.basis[0].view_as(v[1])
        moved = J.mv(rows.project_null(v)).double().norm(dim=1) / v.double().flatten(1).norm(dim=1)
        assert float(moved.max()) <= limit * float(exact[0])


@pytest.mark.parametrize(("readout", "causes", "rank"), [("mean", ["LayerNorm centring"], 191), ("hidden:6", [], 192)])
def test_other_readouts(readout, causes, rank):
    encoder, x = load("deit-tiny-patch16-224", readout)
    result = jacobian_spectrum(encoder, x)
    assert [zero.cause for zero in result.structural_zeros[0]] == causes
    assert result.near_structural == ((),)
    assert result.rank.tolist() == [rank]


@pytest.mark.slow
def test_logits():
    encoder, x = load("deit-tiny-patch16-224", "logits")
    result = jacobian_spectrum(encoder, x)
    causes = {zero.cause: zero.count for zero in result.structural_zeros[0]}
    assert causes == {"head wider than its input": 808, "LayerNorm centring": 1}
    assert [zero.cause for zero in result.near_structural[0]] == ["LayerNorm epsilon"]
    assert result.rank.tolist() == [190]
