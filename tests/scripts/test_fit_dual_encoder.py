"""The projections of two tiny towers: each photo is nearest to its own class."""

import importlib.util
import sys
from pathlib import Path

import torch
from tiny_models import save
from tiny_texts import save_text, save_words

from hf_equiv import Encoder, load_images

PATH = Path(__file__).parents[2] / "scripts" / "fit_dual_encoder.py"


def test_each_photo_is_nearest_to_its_class(tmp_path, monkeypatch):
    text = save_words(save_text(tmp_path / "text", "bert"), "coffee", "rocket", "astronaut")
    vision, out = save("deit", tmp_path / "vision"), tmp_path / "out"
    spec = importlib.util.spec_from_file_location("fit_dual_encoder", PATH)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    words = ["--vision", vision, "--text", text, "--photos", "builtin", "--output", out]
    monkeypatch.setattr(sys, "argv", ["fit_dual_encoder.py", *map(str, words)])
    monkeypatch.setattr(script, "load_images", lambda _: load_images("builtin"))
    assert script.main() == 0
    encoder, photos = Encoder.from_pretrained(out, normalize=True), load_images("builtin")
    texts = encoder.embed_texts([f"a photo of a {name}." for name in photos.labels])
    x = encoder.preprocess(photos)
    assert bool(((encoder(x) @ texts.T).argmax(dim=1) == torch.arange(4)).all())
