"""The search among texts: errors come from the text alone, and an exhaustive search finds nothing better."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_texts import save_text

from hf_equiv import Status, TextEncoder, refine_tokens, round_tokens


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return TextEncoder.from_pretrained(save_text(tmp_path_factory.mktemp("texts") / "bert", "bert"))


def test_the_text_found_is_the_best_of_all_pairs_of_words(bert):
    source, target = ["the cat"], ["market rose slowly"]
    result = refine_tokens(bert, source, target, rtol=1e-3, max_evals=800, progress=False)
    pairs = [(bert.text_of(pair), pair) for pair in itertools.product(bert.words, repeat=2)]
    texts = [text for text, pair in pairs if bert._ids(text)[1:-1] == [*pair]]
    best = max((bert.encode(texts) @ bert.encode(target).T).flatten().tolist())
    assert float(result.cosines[0]) == pytest.approx(best, abs=1e-6)
    assert result.status[0] in (Status.STALLED, Status.MAX_EVALS)


def test_errors_and_cost_are_those_of_the_texts(bert):
    sources, targets = ["the old cat sat", "music"], ["a dog runs under a bridge", "night and day"]
    result = refine_tokens(bert, sources, targets, max_evals=60, progress=False)
    z, found = bert.encode(targets).double(), bert.encode(result.texts).double()
    assert torch.equal(result.errors, (found - z).norm(dim=1) / z.norm(dim=1))
    assert torch.allclose(result.cosines, (found * z).sum(dim=1), atol=1e-6)
    start = (bert.encode(sources).double() * z).sum(dim=1)
    assert bool((result.cosines >= start).all())
    assert bool((result.num_evals <= 60).all())
    assert [len(bert.tokenize(text)) for text in result.texts] == [4, 1]
    words = [set(bert.tokenize(text)) for text in (*result.texts, *targets)]
    assert result.shared[1] == len(words[1] & words[3]) / 1
    again = refine_tokens(bert, sources, z, max_evals=60, progress=False)
    assert again.shared is None


def test_the_text_of_the_target_is_never_taken(bert):
    target = "the old cat"
    result = refine_tokens(bert, ["the old dog"], [target], rtol=1e-3, max_evals=300, progress=False)
    assert result.texts[0] != target
    assert float(result.errors[0]) > 1e-3


def test_rounding_finds_the_tokens_again(bert):
    texts = ["the old cat", "music under bridge"]
    x = torch.cat([bert.embed_tokens(text) for text in texts])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert round_tokens(bert, x + 0.01 * noise) == texts


def test_special_tokens_are_no_words(bert):
    assert not {*range(5)} & set(bert.words)


def test_bad_calls(bert):
    with pytest.raises(TypeError, match="sequences of strings"):
        refine_tokens(bert, "the cat", ["a dog"])
    with pytest.raises(ValueError, match=r"as many as `texts` \(1\); got 2"):
        refine_tokens(bert, ["the cat"], ["a dog", "music"])
    with pytest.raises(ValueError, match=r"got \(1, 5\)"):
        refine_tokens(bert, ["the cat"], torch.ones(1, 5))
    with pytest.raises(ValueError, match="at least one token"):
        refine_tokens(bert, [""], ["a dog"])
