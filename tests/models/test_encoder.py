"""The encoder against the models it wraps: every family, every readout, derivatives, batches, float64."""

from __future__ import annotations

import copy
import csv
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tiny_models import FAMILIES, PROCESSORS, SIZE, roughen, save, save_dual
from tiny_texts import save_words
from torch import Tensor
from transformers.utils import logging as transformers_logging

from hf_equiv.models.checkpoint import quiet
from hf_equiv.models.encoder import Encoder
from hf_equiv.precision import InFloat64, exact_derivatives, no_tf32

# Tokens before the patches, by hand from the papers: class, distillation, registers.
PREFIX = {"deit": 2, "deit_head": 2, "deit_teacher": 2, "dinov2_registers": 4, "dinov3": 3}
NO_CLASS = ("siglip", "siglip_vision", "swin", "swinv2", "ijepa", "convnext", "convnextv2")
ANY_SIZE = [name for name in FAMILIES if name not in ("data2vec_shared", "data2vec_mean_relative")]
ASSETS = Path(os.environ.get("HF_EQUIV_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            with quiet():
                made[name] = save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def tiny(folder: Callable[[str], Path]) -> Callable[..., Encoder]:
    made: dict[str, Encoder] = {}

    def get(name: str, readout: str | None = None) -> Encoder:
        if name not in made:
            made[name] = Encoder.from_pretrained(folder(name), device="cpu")
        encoder = made[name]
        if readout is None or readout == encoder.readout:
            return encoder
        other = copy.copy(encoder)  # the same weights read out elsewhere
        other.readout = readout
        return other

    return get


def pixels(batch: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def reference(name: str, folder: Path, x: Tensor) -> dict[str, Tensor]:
    """Every readout, straight from the transformers model of the saved class."""
    settings = transformers.AutoConfig.from_pretrained(folder)
    if name == "vit_mae":
        settings.mask_ratio = 0.0
    with quiet(), torch.no_grad():
        kind = transformers.ViTMAEModel if name == "vit_mae" else type(FAMILIES[name].make())
        model = kind.from_pretrained(folder, config=settings, attn_implementation=_attention(kind)).eval()
        encoder = Encoder.from_pretrained(folder)
        v = (x - encoder._mean) / encoder._std
        extra = {"noise": torch.arange(16.0)[None]} if name == "vit_mae" else {}
        wanted: dict[str, Tensor] = {}
        if "ForImageClassification" in kind.__name__:
            wanted["logits"] = model(v).logits
            model = getattr(model, model.base_model_prefix)
        if name in ("clip", "siglip"):
            wanted["projection"] = model.get_image_features(v).pooler_output
            model = model.vision_model
        if name == "clip_vision_projection":
            wanted["projection"] = model(v).image_embeds
            model = model.vision_model
        out = model(v, output_hidden_states=True, **extra)
    last, prefix = out.last_hidden_state, PREFIX.get(name, 0 if name in NO_CLASS else 1)
    if getattr(out, "pooler_output", None) is not None:
        wanted["pooler"] = out.pooler_output
    wanted["tokens"] = last.flatten(1)
    wanted["mean"] = last.mean(dim=(2, 3)) if last.ndim == 4 else last[:, prefix:].mean(dim=1)
    if name not in NO_CLASS:
        wanted["cls"] = last[:, 0]
    for k, state in enumerate(out.hidden_states):
        if state.ndim == 4:
            wanted[f"hidden:{k}"] = state.mean(dim=(2, 3))
        else:
            wanted[f"hidden:{k}"] = state.mean(dim=1) if name in NO_CLASS else state[:, 0]
    return wanted


def _attention(kind: Any) -> str:
    return "sdpa" if kind._supports_sdpa else "eager"


@pytest.mark.parametrize("name", FAMILIES)
def test_readouts_are_the_models_own_outputs(name: str, folder: Any, tiny: Any) -> None:
    x, encoder = pixels(), tiny(name)
    wanted = reference(name, folder(name), x)
    assert set(encoder.readouts) == set(wanted)
    assert encoder.readout == FAMILIES[name].auto
    assert encoder.input_shape == (3, SIZE, SIZE)
    for readout, z in wanted.items():
        torch.testing.assert_close(tiny(name, readout)(x), z, rtol=0, atol=0, msg=lambda m, r=readout: f"{r}: {m}")
    assert encoder.embedding_dim == wanted[encoder.readout].shape[1]
    assert encoder.has_head == ("logits" in wanted)
    if encoder.has_head:
        assert encoder.label_names == ("ant", "bee", "cat", "dog", "elk")
        assert torch.equal(encoder.classify(x), wanted["logits"])


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_reaches_every_pixel_and_agrees_with_the_jvp(name: str, tiny: Any) -> None:
    encoder = tiny(name)
    x = pixels().requires_grad_()
    z = encoder(x)
    u = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))  # a sum would vanish after LayerNorm
    (gradient,) = torch.autograd.grad(z, x, u)
    assert (gradient != 0).float().mean() > 0.99
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    _, moved = torch.func.jvp(encoder, (x.detach(),), (v,))
    # <Jv, u> = <v, J'u>
    torch.testing.assert_close((moved * u).sum(), (v * gradient).sum(), rtol=1e-3, atol=1e-4 * float(moved.norm()))
    assert encoder.jvp_probe()


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_is_one_by_one_to_the_bit(name: str, tiny: Any) -> None:
    x = pixels(3)
    for readout in tiny(name).readouts:
        encoder = tiny(name, readout)
        with torch.no_grad():
            together = encoder(x)
            assert torch.equal(together, torch.cat([encoder(one) for one in x.split(1)])), readout
        assert float(encoder.least_errors(x[0], together).max()) < 2e-6, readout
    encoder = tiny(name)
    u = torch.randn(together[:1].shape[0], encoder.embedding_dim, generator=torch.Generator().manual_seed(1))
    batch = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(encoder(batch), batch, u.expand(3, -1).contiguous())
    for i, one in enumerate(x.split(1)):
        alone = one.clone().requires_grad_()
        assert torch.equal(torch.autograd.grad(encoder(alone), alone, u)[0][0], gradient[i])


def top_direction(f: Any, x: Tensor) -> Tensor:
    """A few steps of power iteration on J'J."""
    v = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        _, moved = torch.func.jvp(f, (x,), (v / v.norm(),))
        point = x.clone().requires_grad_()
        (v,) = torch.autograd.grad(f(point), point, moved)
    return v / v.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_float64_is_really_float64(name: str, tiny: Any) -> None:
    encoder = tiny(name).double()
    x = pixels().double()
    random = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(4))
    steps = torch.logspace(-3, -6, 7, dtype=torch.float64)
    for v in (random / random.norm(), top_direction(encoder, x)):
        z, exact = torch.func.jvp(encoder, (x,), (v,))
        assert exact.dtype == torch.float64
        with torch.no_grad():
            errors = torch.stack([((encoder(x + h * v) - z) / h - exact).norm() / exact.norm() for h in steps])
        logs, hs = errors.log10(), steps.log10()
        slope = ((hs - hs.mean()) * (logs - logs.mean())).sum() / (hs - hs.mean()).square().sum()
        assert abs(float(slope) - 1) < 0.1, errors


@pytest.mark.parametrize("name", FAMILIES)
def test_noise_floor_is_float32_noise(name: str, tiny: Any) -> None:
    floor = tiny(name).noise_floor(pixels(2))
    assert floor.shape == (2,)
    assert floor.dtype == torch.float64
    assert bool(((floor > 1e-9) & (floor < 1e-5)).all())
    assert float(tiny(name).double().noise_floor(pixels().double())) == 0.0


@pytest.mark.parametrize("name", ANY_SIZE)
def test_other_sizes_where_positions_interpolate(name: str, tiny: Any) -> None:
    encoder = tiny(name)
    x = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(5))
    z = encoder(x)
    assert z.shape == (2, encoder.embedding_dim)
    _, moved = torch.func.jvp(encoder, (x,), (torch.ones_like(x),))
    assert bool(moved.isfinite().all())


def test_another_size_is_the_models_own_interpolation(folder: Any, tiny: Any) -> None:
    x = torch.rand(1, 3, 48, 64)
    with quiet():
        model = transformers.ViTModel.from_pretrained(folder("vit")).eval()
    own = model((x - 0.5) / 0.5, interpolate_pos_encoding=True).pooler_output
    assert torch.equal(tiny("vit")(x), own)


def test_sizes_that_do_not_fit_are_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"multiples of 8, the patch of this model; got 30×32.*Resize to 24×32"):
        tiny("vit")(torch.rand(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"size this model takes; got 2×2, but ConvNextModel was made for 32×32"):
        tiny("convnext")(torch.rand(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ([[0.5]], TypeError, r"`pixels` must be a torch.Tensor; got list"),
        (torch.rand(3, SIZE, SIZE), ValueError, r"shape \(B, 3, H, W\); got \(3, 32, 32\)"),
        (torch.rand(1, 1, SIZE, SIZE), ValueError, r"shape \(B, 3, H, W\); got \(1, 1, 32, 32\)"),
        (
            torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8),
            TypeError,
            "float tensor; got dtype torch.uint8",
        ),
        (torch.zeros(1, 3, SIZE, SIZE, device="meta"), ValueError, r"`pixels` must be on cpu; got meta"),
    ],
)
def test_bad_pixels(bad: Any, kind: type[Exception], message: str, tiny: Any) -> None:
    with pytest.raises(kind, match=message):
        tiny("vit")(bad)


def test_missing_pooler_is_never_used(tmp_path: Path) -> None:
    with quiet():
        save("vit_head", tmp_path)
        settings = json.loads((tmp_path / "config.json").read_text())
        settings["architectures"] = ["ViTModel"]  # so that transformers makes a random pooler
        (tmp_path / "config.json").write_text(json.dumps(settings))
    encoder = Encoder.from_pretrained(tmp_path)
    assert encoder.readout == "cls"
    assert "pooler" not in encoder.readouts
    assert not encoder.has_head
    message = r"readout 'pooler' is not in this checkpoint \(its weights would be random\)\. Use readout='cls'\."
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(tmp_path, readout="pooler")


def test_readouts_a_model_lacks(folder: Any) -> None:
    load = partial(Encoder.from_pretrained, folder("swin"))
    with pytest.raises(ValueError, match=r"readout 'cls' is not in this checkpoint; .* has mean, pooler, tokens, logi"):
        load(readout="cls")
    with pytest.raises(ValueError, match=r"readout 'hidden:9' is not in this checkpoint"):
        load(readout="hidden:9")
    with pytest.raises(ValueError, match=r"`readout` must be one of mean, .*; got 'CLS'\. Use readout='pooler'\."):
        load(readout="CLS")
    with pytest.raises(TypeError, match=r"`readout` must be a string; got int"):
        load(readout=3)
    assert load(readout="hidden:-1").readout == "hidden:2"


def test_normalize_gives_unit_vectors(folder: Any, tiny: Any) -> None:
    z, unit = tiny("vit")(pixels(2)), Encoder.from_pretrained(folder("vit"), normalize=True)(pixels(2))
    torch.testing.assert_close(unit, z / z.norm(dim=1, keepdim=True))


def test_classify_without_head_or_text_tower(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"`classify` must have a classification head; .* has none\. Use a checkpoint"):
        tiny("vit").classify(pixels())
    with pytest.raises(ValueError, match=r"has none\. Pass `labels`\."):
        tiny("clip").classify(pixels())
    with pytest.raises(ValueError, match=r"`labels` must be None .* no text encoder\. Leave it out"):
        tiny("vit_head").classify(pixels(), ["cat"])


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_zero_shot_is_the_two_tower_model(name: str, tmp_path: Path) -> None:
    with quiet():
        save(name, tmp_path)
        save_words(tmp_path)
        model = transformers.AutoModel.from_pretrained(tmp_path).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path, readout="mean")  # zero-shot does not depend on the readout
    padding = "max_length" if name == "siglip" else True
    tokens = tokenizer(
        ["a photo of a cat.", "a photo of a dog."], padding=padding, max_length=16, truncation=True, return_tensors="pt"
    )
    x = pixels(2)
    mask = {} if name == "siglip" else {"attention_mask": tokens.attention_mask}
    v = (x - encoder._mean) / encoder._std
    with torch.no_grad():
        own = model(input_ids=tokens.input_ids, pixel_values=v, **mask).logits_per_image
        scores = encoder.classify(x, labels=["cat", "dog"])
    torch.testing.assert_close(scores, own, rtol=1e-5, atol=1e-5)
    assert scores.shape == (2, 2)
    with pytest.raises(TypeError, match=r"`labels` must be a sequence of strings"):
        encoder.classify(x, labels="cat")
    with pytest.raises(ValueError, match=r"`labels` must hold at least one label"):
        encoder.classify(x, labels=[])


@pytest.mark.parametrize("name", ["clip", "siglip", "altclip", "chinese_clip", "dual"])
def test_text_embeddings_are_those_of_the_two_tower_model(name: str, tmp_path: Path) -> None:
    with quiet():
        if name == "dual":
            save_dual(tmp_path)
        else:
            save(name, tmp_path)
        save_words(tmp_path)
        model = transformers.AutoModel.from_pretrained(tmp_path).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path, normalize=True)
    texts = ["a photo of a cat", "dog"]
    padding = "max_length" if name == "siglip" else True
    tokens = tokenizer(texts, padding=padding, max_length=16, truncation=True, return_tensors="pt")
    mask = {} if name == "siglip" else {"attention_mask": tokens.attention_mask}
    x = pixels(2)
    with torch.no_grad():
        z = model.get_text_features(input_ids=tokens.input_ids, **mask).pooler_output
        seen = model.get_image_features(pixel_values=(x - encoder._mean) / encoder._std).pooler_output
    own = encoder.embed_texts(texts)
    torch.testing.assert_close(own, z / z.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encoder(x), seen / seen.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert torch.equal(encoder.embed_texts(texts[1:]), own[1:])
    with pytest.raises(TypeError, match="must be a sequence of strings"):
        encoder.embed_texts("a cat")
    with pytest.raises(ValueError, match=r"each text must have at most 16 tokens for .*; got 21 in 'cat cat"):
        encoder.embed_texts(["cat " * 20])
    with pytest.raises(OSError, match=r"each text must be words that the tokenizer knows; .* none for 'zebra'"):
        encoder.embed_texts(["zebra"])


def test_texts_without_a_text_encoder(tiny: Any) -> None:
    with pytest.raises(ValueError, match="must come with a model of images and texts"):
        tiny("vit_head").embed_texts(["cat"])
    with pytest.raises(OSError, match=r"each text must be tokenised, and .* has no tokenizer"):
        tiny("siglip").embed_texts(["cat"])


def test_zero_shot_without_tokenizer(tiny: Any) -> None:
    with pytest.raises(OSError, match=r"has no tokenizer that can be loaded here"):
        tiny("siglip").classify(pixels(), labels=["cat"])


def test_provenance_and_repr(tiny: Any, folder: Any) -> None:
    encoder = tiny("vit_head")
    record = encoder.provenance
    assert list(record) == ["model_id", "model_revision", "readout", "dtype", "attention", "processor", "versions"]
    assert all(isinstance(value, str) for value in record.values())
    assert json.loads(json.dumps(record)) == record
    assert encoder.model_id == str(folder("vit_head"))
    assert record["model_id"] == folder("vit_head").name  # no path of this machine
    assert record["model_revision"].startswith("sha256:")
    assert len(record["model_revision"]) == 71
    assert (record["readout"], record["dtype"], record["attention"]) == ("cls", "float32", "sdpa")
    assert json.loads(record["processor"])["backend"] in ("pil", "torchvision")
    assert json.loads(record["versions"])["torch"]
    assert "3×32×32 -> 32, readout='cls', float32 on cpu" in repr(encoder)


def test_loading_is_silent_and_leaves_no_trace(folder: Any, capfd: pytest.CaptureFixture[str]) -> None:
    verbosity, state = transformers_logging.get_verbosity(), torch.random.get_rng_state()
    bars = transformers_logging.is_progress_bar_enabled()
    Encoder.from_pretrained(folder("clip"))
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == verbosity
    assert transformers_logging.is_progress_bar_enabled() == bars
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dtypes(folder: Any) -> None:
    assert Encoder.from_pretrained(folder("vit"), dtype=torch.bfloat16)(pixels()).dtype == torch.bfloat16
    assert Encoder.from_pretrained(folder("vit"), dtype=torch.float64)(pixels()).dtype == torch.float64
    with pytest.raises(TypeError, match=r"`dtype` must be one of torch.float32, .*; got torch.int8"):
        Encoder.from_pretrained(folder("vit"), dtype=torch.int8)


def test_eager_softmax_is_kept_in_float64(folder: Any, tiny: Any) -> None:
    with quiet():
        model = transformers.ViTModel.from_pretrained(folder("vit"), attn_implementation="eager").double().eval()
    v = (pixels().double() - 0.5) / 0.5
    exact = tiny("vit").double()(pixels())
    with torch.no_grad():
        rounded = model(v).pooler_output
        with InFloat64():
            kept = model(v).pooler_output
    assert (kept - exact).norm() < 1e-13 * exact.norm()
    assert (rounded - exact).norm() > 1e-10 * exact.norm()


def test_math_attention_has_second_order_and_tf32_comes_back(tiny: Any) -> None:
    x = pixels().requires_grad_()
    with exact_derivatives():
        (g,) = torch.autograd.grad(tiny("vit")(x).square().sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x)
    assert bool(h.isfinite().all())
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with no_tf32(), no_tf32():
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_autocast_leaves_float32_alone(name: str, tiny: Any) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tiny(name)(pixels())
    with torch.no_grad():
        assert torch.equal(inside, tiny(name)(pixels()))


def test_jvp_probe_names_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet():
        encoder = Encoder.from_pretrained(save("vit", tmp_path))
    monkeypatch.setattr("hf_equiv.models.encoder.exact_derivatives", no_tf32)  # leave the fused kernel in place
    with pytest.raises(RuntimeError, match=r"`encoder` must have forward-mode derivatives for this; .* with sdpa"):
        encoder.jvp_probe()


def test_an_unlisted_vision_model_works_too(tmp_path: Path) -> None:
    with quiet():
        shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        model = transformers.ResNetModel(transformers.ResNetConfig(**shape))
        roughen(model)
        model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}})
    )
    encoder = Encoder.from_pretrained(tmp_path)
    assert encoder.readouts[:3] == ("mean", "pooler", "tokens")
    assert encoder.jvp_probe()
    x = pixels(2)
    with torch.no_grad():
        own = model.eval()((x - 0.5) / 0.5).pooler_output  # (2, 16, 1, 1)
        assert torch.allclose(encoder(x), own.flatten(1), rtol=1e-5, atol=1e-6)


def test_weights_that_give_nan_are_refused(tmp_path: Path) -> None:
    with quiet():
        model = FAMILIES["vit"].make()
        with torch.no_grad():
            model.layernorm.weight[3] = torch.nan
        model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSORS["vit"]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"must give finite embeddings; .* holds NaN or infinity in float32\. Check"):
        Encoder.from_pretrained(tmp_path)


@pytest.mark.assets
def test_trained_deit_tiny() -> None:
    if not (ASSETS / "models" / "deit-tiny-patch16-224").is_dir():
        pytest.skip(f"no trained checkpoints in {ASSETS}")
    encoder = Encoder.from_pretrained(ASSETS / "models" / "deit-tiny-patch16-224")
    twin = Encoder.from_pretrained(ASSETS / "models" / "beit-form-deit-tiny", readout="cls")
    assert (encoder.readout, encoder.embedding_dim, encoder.input_shape) == ("cls", 192, (3, 224, 224))
    photos = ASSETS / "images" / "sample_100"
    with (photos / "labels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))[::5]
    x = encoder.preprocess([Image.open(photos / row["file"]) for row in rows])
    right = encoder.classify(x).argmax(dim=1) == torch.tensor([int(row["label"]) for row in rows])
    assert int(right.sum()) >= 15
    z = encoder(x[:2])
    assert float((twin(x[:2]) - z).norm() / z.norm()) < 3e-3  # the second file holds the same weights in fp16
    assert bool(((encoder.noise_floor(x[:2]) > 5e-7) & (encoder.noise_floor(x[:2]) < 1e-5)).all())
