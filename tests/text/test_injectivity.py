"""Nearest texts against all distances by hand, and collisions that are made on purpose."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_texts import WORDS, save_text

from hf_equiv import TextEncoder, find_nearest_texts

TEXTS = [f"the {a} {b}" for a, b in itertools.permutations(WORDS[:7], 2)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return TextEncoder.from_pretrained(save_text(tmp_path_factory.mktemp("texts") / "bert", "bert"))


def test_the_nearest_pair_is_that_of_all_distances(bert):
    found = find_nearest_texts(bert, [*TEXTS, "THE a the"], progress=False)
    assert [one.precision for one in found] == ["float32", "bfloat16", "int8", "int4"]
    z = bert.encode(TEXTS).double()
    distances = {(a, b): float((z[a] - z[b]).norm()) for a, b in itertools.combinations(range(len(TEXTS)), 2)}
    best = min(distances, key=lambda pair: distances[pair])
    exact = found[0]
    assert exact.pair == (TEXTS[best[0]], TEXTS[best[1]])
    assert exact.distance == pytest.approx(distances[best], rel=1e-6)
    assert exact.num_pairs == len(distances)  # the last text has the tokens of another
    assert exact.median == pytest.approx(sorted(distances.values())[(len(distances) - 1) // 2], rel=1e-6)
    assert 0 < exact.noise < 1e-6 < found[1].noise < 0.1
    assert not exact.collides


def test_texts_that_an_encoder_cannot_tell_apart_collide(bert):
    same = bert.in_dtype(torch.float32)
    cat, dog = (bert.tokenize(word)[0] for word in ("cat", "dog"))
    same._model.get_input_embeddings().weight.data[dog] = same._model.get_input_embeddings().weight.data[cat]
    same = same.in_dtype(torch.float32)
    (found,) = find_nearest_texts(same, ["the cat", "the dog", "music"], precisions=["float32"], progress=False)
    assert found.pair == ("the cat", "the dog")
    assert found.collides
    assert found.distance == 0


def test_weights_take_as_many_values_as_their_bits_allow(bert):
    for bits, values in ((8, 255), (4, 15), (2, 3)):
        weight = bert.quantized(bits)._model.encoder.layer[0].attention.self.query.weight
        assert weight.shape == (32, 32)
        assert max(len(row.unique()) for row in weight) <= values
        step = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        original = bert._model.encoder.layer[0].attention.self.query.weight
        assert bool(((weight - original).abs() <= 0.5001 * step).all())
    assert len(bert.quantized(4).tokens_of([7]).unique()) <= 15
    with pytest.raises(ValueError, match="from 2 to 8; got 16"):
        bert.quantized(16)


def test_bad_calls(bert):
    with pytest.raises(ValueError, match="at least two texts of different tokens; got 1"):
        find_nearest_texts(bert, ["the cat", "THE cat"])
    with pytest.raises(ValueError, match="among float32, bfloat16, int8, int4; got 'int3'"):
        find_nearest_texts(bert, TEXTS, precisions=["int3"])
    with pytest.raises(TypeError, match="a single one"):
        find_nearest_texts(bert, "the cat")
