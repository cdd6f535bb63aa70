"""Encoders of any torch module: from Python and by `--import`, with rows that verify."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hf_equiv import Encoder, load_images, verify_run
from hf_equiv.cli.main import _run as command
from hf_equiv.hub.card import dataset_card
from hf_equiv.report import collect

CODE = """
import torch
from hf_equiv import Encoder

def network(seed=0):
    generator = torch.Generator().manual_seed(seed)
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 8, 8), torch.nn.GELU(), torch.nn.Conv2d(16, 24, 2, 2))
    for weight in body.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / 10
    return body

def encoder():
    return Encoder.wrap(network(), size=16, mean=0.5, std=0.25, normalize=True)

def other():
    return Encoder.wrap(network(1), size=16, mean=0.5, std=0.25)

def timm():
    body = network()
    body.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return body

def text():
    return "no model"

def named():
    return Encoder.from_pretrained("builtin")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An empty folder with a file of models, and the folder's functions."""
    (tmp_path / "own_models.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    functions: dict = {}
    exec(compile(CODE, "own_models", "exec"), functions)
    return SimpleNamespace(**functions)


def test_it_is_the_module_behind_its_normalisation(place):
    body, encoder = place.network(), place.encoder()
    photo = load_images("builtin")[1].image  # 512 x 512
    pixels = encoder.preprocess(photo)
    small = np.asarray(photo.resize((16, 16), resample=3))
    assert torch.equal(pixels, torch.from_numpy(small.copy()).permute(2, 0, 1)[None] / 255)
    with torch.no_grad():
        z = body((pixels - 0.5) / 0.25).flatten(1)
    torch.testing.assert_close(encoder(pixels), z / z.norm(dim=1))
    assert all(weight.requires_grad for weight in body.parameters())  # a copy is frozen, not the module
    assert encoder.readouts == ("output",)
    assert encoder.label_names is None
    assert encoder.revision == place.encoder().revision != place.other().revision
    assert float(encoder.noise_floor(pixels)) < 1e-6
    twin = Encoder.wrap(place.timm())
    assert twin.revision == encoder.revision
    assert (twin.input_shape, twin.provenance["processor"]) == ((3, 16, 16), encoder.provenance["processor"])


def test_labels_are_of_the_output_or_of_a_head(place):
    names, pixels = [f"class {k}" for k in range(24)], torch.rand(2, 3, 16, 16)
    encoder = Encoder.wrap(place.network(), size=16, mean=0.5, std=0.25, labels=names)
    assert torch.equal(encoder.classify(pixels), encoder(pixels))
    assert encoder.label_names == tuple(names)
    head = nn.Linear(24, 3)
    encoder = Encoder.wrap(place.network(), size=16, mean=0.5, std=0.25, head=head, labels=names[:3])
    torch.testing.assert_close(encoder.classify(pixels), head(encoder(pixels)).detach())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": None}, "`mean` must be one number or three"),
        ({"std": 0}, "`std` must be one number above 0 or three"),
        ({"mean": (0.5, 0.5)}, "`mean` must be one number or three"),
        ({"size": (0, 16)}, "`size` must be a side or"),
        ({"labels": ["a", "b"]}, "`labels` must name the 24 scores of the model; got 2"),
        ({"labels": "ab"}, "`labels` must be at least two names"),
        ({"head": nn.Linear(24, 3)}, "`labels` must come with `head`"),
        ({"head": "linear"}, "`head` must be a torch.nn.Module; got str"),
        ({"name": "builtin"}, "`name` must not be 'builtin'"),
        ({"module": abs}, "`module` must be a torch.nn.Module; got builtin_function_or_method"),
        ({"module": nn.Flatten(0)}, "`module` must return one float tensor"),
    ],
)
def test_other_modules_and_options_are_refused(given, message, place):
    usual = {"module": place.network(), "size": 16, "mean": 0.5, "std": 0.25}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        Encoder.wrap(**usual | given)


def test_rows_of_an_imported_model_verify_with_the_same_import(place, capsys):
    typed = "match mine --import own_models:encoder --data builtin --pairs 2 --out run --max-evals 40 -q"
    assert command(typed.split()) in (0, 1)
    record = json.loads(Path("run/run.json").read_text())
    settings = record["settings"]
    assert (settings["import"], settings["model_id"]) == ("own_models:encoder", "mine")
    assert settings["model_revision"] == place.encoder().revision
    assert "match mine --import own_models:encoder" in record["command"]
    assert "with `hf-equiv verify . --import own_models:encoder`\n" in Path("run/README.md").read_text()
    assert "`hf-equiv verify me/x --import own_models:encoder` downloads" in dataset_card("me/x", {"": record})
    runs = collect.find_runs([("run", Path("run"))])
    assert collect.commands_of(runs)[-1] == "hf-equiv verify run --import own_models:encoder"
    (checkpoint,) = collect.group_runs(runs)
    assert collect.again(checkpoint, "match").startswith("hf-equiv match mine --import own_models:encoder --readout")
    for typed, data in (("hf-equiv match mine --data photos", "PATH"), (record["command"], "PATH/photos")):
        changed = record | {"command": typed, "settings": settings | {"data_id": "photos"}}
        command_for_more = collect.again(replace(checkpoint, runs=(replace(runs[0], record=changed),)), "match")
        assert f"--data {data} --pairs 50" in command_for_more  # PATH: all pairs of that folder have been drawn
    assert command("verify run --import own_models:encoder -q".split()) == 0
    assert "model_revision" in {problem.column for problem in verify_run("run", model=place.other()).problems}
    capsys.readouterr()
    for words, told in (
        ("verify run", "this run used own_models:encoder, a model of Python code, which is run only if you ask for it"),
        ("verify run --import own_models:text", "must name a function that returns Encoder.wrap(…) or a torch module"),
        ("verify run --import own_models:named", "returns Encoder('builtin'"),
        ("verify run --import own_models", "--import must be PACKAGE:FUNCTION that Python can import"),
        ("env mine --import absent:encoder", "--import must be PACKAGE:FUNCTION that Python can import"),
        ("env mine --import own_models:timm --revision main", "--revision must not be 'main' with an"),
        ("env builtin --import own_models:timm", "`model` must not be 'builtin' with an imported model"),
    ):
        assert command(words.split()) == 2
        assert told in capsys.readouterr().err
