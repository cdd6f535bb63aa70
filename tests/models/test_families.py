"""Every other family by name: its readouts are the model's own, its derivatives agree, or the reason is true."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES, MORE_FAMILIES, PROCESSORS, REFUSED, Family, build
from torch import Tensor

from hf_equiv.models.checkpoint import quiet
from hf_equiv.models.encoder import Encoder

README = Path(__file__).parents[2] / "README.md"


def loaded(make: Any, folder: Path, processor: str) -> tuple[Any, Encoder]:
    """Save a tiny model, and return it and the encoder that is loaded from its files."""
    with quiet():
        model = build(make)
        model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[processor]), encoding="utf-8")
    return model, Encoder.from_pretrained(folder, device="cpu")


def own_readouts(model: Any, family: Family, pixel_values: Tensor) -> dict[str, Tensor]:
    """Every readout but `hidden:K`, straight from the model that was saved."""
    wanted: dict[str, Tensor] = {}
    with torch.no_grad():
        if "ForImageClassification" in type(model).__name__:
            wanted["logits"] = model(pixel_values)[0]
        if hasattr(model, "get_image_features"):
            wanted["projection"] = model.get_image_features(pixel_values).pooler_output
            model = model.vision_model
        out = (getattr(model, family.part) if family.part else model)(pixel_values, output_hidden_states=True)
    bare = "logits" in wanted and not family.part  # its only outputs are scores and hidden states
    last = out.hidden_states[-1] if bare else out.last_hidden_state
    if out.get("pooler_output") is not None:
        wanted["pooler"] = out.pooler_output.flatten(1)
    wanted["tokens"] = last.flatten(1)
    if last.ndim == 4:
        wanted["mean"] = last.mean(dim=(2, 3))
    else:
        wanted["mean"] = last[:, family.before : last.shape[1] - family.after].mean(dim=1)
    if family.before:
        wanted["cls"] = last[:, 0]
    wanted["hidden:1"] = out.hidden_states[1]
    return wanted


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_readouts_batches_and_derivatives(name: str, tmp_path: Path) -> None:
    family = MORE_FAMILIES[name]
    model, encoder = loaded(family.make, tmp_path, family.processor)
    assert encoder.readout == family.auto
    x = torch.rand(2, *encoder.input_shape, generator=torch.Generator().manual_seed(0))
    wanted = own_readouts(model, family, encoder._normalise(x))
    assert {r for r in encoder.readouts if not r.startswith("hidden:")} == wanted.keys() - {"hidden:1"}
    for readout, own in wanted.items():
        f = copy.copy(encoder)
        f.readout = readout
        with torch.no_grad():
            z = f(x)
            assert torch.equal(z, torch.cat([f(one) for one in x.split(1)])), readout
        assert float(f.least_errors(x[0], z).max()) < 2e-6, readout
        if readout == "hidden:1":
            own = own_hidden(own, z.shape[1], family)
        torch.testing.assert_close(z, own, rtol=1e-4, atol=1e-5 * float(own.abs().max()), msg=readout)
    exact = encoder.double()
    for readout in {encoder.readout, *wanted} & {encoder.readout, "logits"}:
        exact.readout = readout
        check_derivative(exact, x[:1].double(), readout)


def own_hidden(state: Tensor, width: int, family: Family) -> Tensor:
    """The class token of a hidden state if it has one, else the mean over its positions."""
    if state.ndim == 4:
        return state.mean(dim=(2, 3) if state.shape[1] == width else (1, 2))
    return state[:, 0] if family.before and family.part != "pvt" else state.mean(dim=1)


def check_derivative(f: Encoder, x: Tensor, readout: str) -> None:
    """Compare VJP, JVP and a central secant in float64; the float32 steps of a cast inside would bend f."""
    v = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    v, h = v / v.norm(), 1e-6
    point = x.clone().requires_grad_()
    z = f(point)
    u = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(z, point, u)
    _, moved = torch.func.jvp(f, (x,), (v,))
    with torch.no_grad():
        z, ahead, behind = z.detach(), f(x + h * v), f(x - h * v)
    assert abs(float((gradient * v).sum() - (moved * u).sum())) < 1e-10 * float(moved.norm() * u.norm()), readout
    rounding = 1e-9 * float(z.norm())  # of a secant in float64
    assert float(((ahead - behind) / (2 * h) - moved).norm()) < 1e-5 * float(moved.norm()) + rounding, readout
    assert float((ahead - 2 * z + behind).norm()) < 1e-9 * float(z.norm()), readout


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_embed_no_single_image_say_why(name: str, tmp_path: Path) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(ValueError, match=rf"^`model_id` must .*{reason}.*\. Choose a.*\.$"):
        loaded(make, tmp_path, "vit")


def test_the_families_of_the_readme_are_those_that_are_tested() -> None:
    text = " ".join(README.read_text(encoding="utf-8").split())
    (listed,) = re.findall(r"vision checkpoints of `transformers`: (.*?)\.", text)
    tested = set()
    for family in (FAMILIES | MORE_FAMILIES).values():
        name = type(family.make().config).__name__.removesuffix("Config")
        whole = name.removesuffix("Vision")
        tested.add(whole if hasattr(transformers, f"{whole}Config") else name)
    assert sorted(re.split(r", | and ", listed)) == sorted(tested)


def test_the_vision_model_of_a_language_model_has_no_projection(tmp_path: Path) -> None:
    """The image features of Kosmos-2 are tokens for its language model; its pooler went by the name of `projection`."""
    text = {"vocab_size": 40, "embed_dim": 32, "layers": 1, "ffn_dim": 32, "attention_heads": 2}
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Kosmos2Config(vision_config=vision, text_config=text, latent_query_num=2)
    _, encoder = loaded(lambda: transformers.Kosmos2Model(config), tmp_path, "vit")
    assert encoder.readout == "pooler"
    assert "projection" not in encoder.readouts
