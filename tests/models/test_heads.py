"""What a head is: one label an image, several, or a regression; names that fit its scores and are data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import PROCESSORS, build

from hf_equiv.analyses.measures import measure_match
from hf_equiv.analyses.walk import labels_of
from hf_equiv.models.checkpoint import quiet
from hf_equiv.models.encoder import Encoder

SHAPE = {
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
NAMES = {0: "ant", 1: "bee", 2: "ant"}  # two classes of one name stay two


def head(folder: Path, kind: str | None, names: dict[int, str] | None = None, **edited: Any) -> Encoder:
    config = transformers.ViTConfig(**SHAPE, id2label=names or NAMES, problem_type=kind)
    with quiet():
        build(lambda: transformers.ViTForImageClassification(config)).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **edited}))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS["vit"]))
    return Encoder.from_pretrained(folder, device="cpu")


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255


@pytest.mark.parametrize("kind", ["multi_label_classification", "single_label_classification", None])
def test_scores_become_sigmoids_or_a_softmax(kind: str | None, tmp_path: Path) -> None:
    encoder, x = head(tmp_path, kind), images(3)
    assert encoder.label_names == ("ant", "bee", "ant")
    assert encoder.multi_label == (kind == "multi_label_classification")
    with torch.no_grad():
        scores = encoder.classify(x).double()
    wanted = scores.sigmoid() if encoder.multi_label else scores.softmax(dim=1)
    row = measure_match(encoder, *x, seed=0, pair_id="0")
    best = [int(k) for k in scores.argmax(dim=1)]
    assert row["match_prob"] == float(wanted[1, best[1]])
    assert row["target_label_prob"] == float(wanted[1, best[2]])
    assert row["same_top1"] == (best[1] == best[2])
    assert [step["prob"] for step in labels_of(encoder, x)] == wanted.amax(dim=1).tolist()


@pytest.mark.parametrize(("kind", "names"), [("regression", NAMES), (None, {0: "age"})])
def test_regression_is_no_classifier(kind: str | None, names: dict[int, str], tmp_path: Path) -> None:
    encoder, x = head(tmp_path, kind, names), images(3)
    assert (encoder.has_head, encoder.label_names, encoder.multi_label) == (False, None, False)
    with pytest.raises(ValueError, match=r"must have a classification head; .* Its head is one of regression"):
        encoder.classify(x)
    assert measure_match(encoder, *x, seed=0, pair_id="0")["match_label"] is None
    assert "logits" in encoder.readouts


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"0": "a", "1": "b"}, "must name the 3 logits of its head, 0 to 2; it names 2, 0 to 1"),
        ({str(k): "a" for k in range(9)}, "must name the 3 logits of its head, 0 to 2; it names 9, 0 to 8"),
        ({"1": "a", "2": "b", "3": "c"}, "must name the 3 logits of its head, 0 to 2; it names 3, 1 to 3"),
    ],
)
def test_names_that_do_not_fit_the_scores_are_said(names: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"id2label in the config.json of .* {told}\. Correct it\."):
        head(tmp_path, None, id2label=names)


def test_names_are_data(tmp_path: Path) -> None:
    names = ("\x1b[2J\n<b>", "x" * 10_000, "")
    assert head(tmp_path, None, dict(enumerate(names))).label_names == names
