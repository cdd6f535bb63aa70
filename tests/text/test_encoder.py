"""Text encoders against plain transformers, for every family, pooling and kind of bad input."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as t
from tiny_texts import SENTENCES, TEXT_FAMILIES, WORDS, save_text, write

from hf_equiv import TextEncoder, jacobian_spectrum, match_embedding
from hf_equiv.jacobian import Jacobian

every_family = pytest.mark.parametrize("family", TEXT_FAMILIES)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return {name: save_text(folder / name, name) for name in TEXT_FAMILIES}


@pytest.fixture(scope="module")
def bert(checkpoints):
    return TextEncoder.from_pretrained(checkpoints["bert"])


def plain(folder, texts, mode):
    """Pooled states by transformers alone, in one padded batch, of unit length."""
    tokenizer, model = t.AutoTokenizer.from_pretrained(folder), t.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    kept = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = model(**kept).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    last = mask[..., 0].sum(dim=1).long() - 1
    order = torch.arange(1, states.shape[1] + 1)[:, None] * mask
    z = {
        "cls": lambda: states[:, 0],
        "mean": lambda: (states * mask).sum(dim=1) / mask.sum(dim=1),
        "lasttoken": lambda: states[torch.arange(len(states)), last],
        "max": lambda: states.masked_fill(mask == 0, -torch.inf).amax(dim=1),
        "mean_sqrt_len_tokens": lambda: (states * mask).sum(dim=1) / mask.sum(dim=1).sqrt(),
        "weightedmean": lambda: (states * order).sum(dim=1) / order.sum(dim=1),
    }[mode]()
    return z / z.norm(dim=1, keepdim=True)


@every_family
def test_embeddings_are_those_of_transformers(checkpoints, family):
    encoder, mode = TextEncoder.from_pretrained(checkpoints[family]), TEXT_FAMILIES[family].pooling
    assert encoder.readout == mode
    assert encoder.normalize
    z = encoder.encode(SENTENCES)
    assert float((z - plain(checkpoints[family], SENTENCES, mode)).abs().max()) < 1e-6
    alone = torch.cat([encoder.encode([text]) for text in SENTENCES])
    assert torch.equal(z, alone)


@every_family
def test_the_longest_text_fits(checkpoints, family):
    encoder = TextEncoder.from_pretrained(checkpoints[family])
    assert 20 <= encoder.max_tokens <= 24
    assert encoder.encode(["cat " * encoder.max_tokens]).isfinite().all()
    with pytest.raises(ValueError, match=f"at most {encoder.max_tokens} tokens"):
        encoder.encode(["cat " * (encoder.max_tokens + 1)])


@every_family
def test_derivatives_are_those_of_float64_differences(checkpoints, family):
    encoder = TextEncoder.from_pretrained(checkpoints[family], dtype=torch.float64)
    assert encoder.jvp_probe()
    x = encoder.embed_tokens(SENTENCES[0])
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = 1e-6 / float(v.norm())
    secant = (encoder(x + h * v) - encoder(x - h * v))[0] / (2 * h)
    product = Jacobian(encoder, x[0]).mv(v)[0]
    assert float((product - secant).norm()) < 1e-7 * float(secant.norm())


@pytest.mark.parametrize("mode", ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_pooling_modes(checkpoints, tmp_path, mode):
    encoder = TextEncoder.from_pretrained(checkpoints["bert"], pooling=mode, normalize=True)
    assert float((encoder.encode(SENTENCES) - plain(checkpoints["bert"], SENTENCES, mode)).abs().max()) < 1e-6
    folder = save_text(tmp_path / "new", "bert", pooling_mode=mode)  # the key of later versions
    assert torch.equal(TextEncoder.from_pretrained(folder).encode(SENTENCES), encoder.encode(SENTENCES))


def test_dense_layer_joined_poolings_and_no_unit_norm(checkpoints, tmp_path):
    folder = save_text(tmp_path / "dense", "bert", normalize=False, dense=7)
    encoder = TextEncoder.from_pretrained(folder)
    weights = dict(encoder._steps[1].linear.named_parameters())
    mean = TextEncoder.from_pretrained(folder, pooling="mean").encode(SENTENCES)
    expected = torch.tanh(mean @ weights["weight"].T + weights["bias"])
    assert float((encoder.encode(SENTENCES) - expected).abs().max()) < 1e-6
    assert encoder.embedding_dim == 7
    assert not encoder.normalize
    both = TextEncoder.from_pretrained(save_text(tmp_path / "both", "bert", pooling_mode=["cls", "mean"]))
    assert both.embedding_dim == 64
    assert both.readout == "cls+mean"


def test_prompt_and_lower_case_are_part_of_f(checkpoints, tmp_path, bert):
    folder = shutil.copytree(checkpoints["bert"], tmp_path / "prompt")
    write(folder / "config_sentence_transformers.json", {"prompts": {"q": "music "}, "default_prompt_name": "q"})
    write(folder / "sentence_bert_config.json", {"max_seq_length": 9, "do_lower_case": True})
    encoder = TextEncoder.from_pretrained(folder)
    assert torch.equal(encoder.encode(["The Cat"]), bert.encode(["music the cat"]))
    assert encoder.embed_tokens("the cat").shape == (1, 2, 32)
    assert encoder.max_tokens == 9 - 3


def test_tokens_of_a_text_move_and_special_ones_do_not(bert):
    x = bert.embed_tokens("the old cat")
    assert x.shape == (1, 3, 32)
    assert torch.equal(bert(x), bert.encode(["the old cat"]))
    assert bert.text_of(bert.tokenize("cats  sat")) == "cats sat"
    assert bert.max_tokens == 22
    half = bert.in_dtype(torch.float64)
    assert 0 < float((bert(x).double() - half(x.double())).norm()) < 1e-6
    assert float(bert.noise_floor(x)) < 1e-6
    assert json.loads(bert.provenance["processor"])["steps"] == ["Pool", "Unit"]


def test_a_match_and_its_spectrum(bert):
    source, target = bert.embed_tokens(SENTENCES[0]), bert.encode([SENTENCES[3]])
    match = match_embedding(bert, source, target, bounds=None)
    assert float((bert(match.images) - target).norm()) < 1.1e-5
    spectrum = jacobian_spectrum(bert, source, bounds=None)
    causes = {zero.cause: zero.count for zero in spectrum.structural_zeros[0]}
    assert causes == {"unit norm": 1}
    assert int(spectrum.rank) == 31


def test_gains_of_zero_are_named(checkpoints):
    encoder = TextEncoder.from_pretrained(checkpoints["bert"], normalize=False)
    norm = encoder._model.encoder.layer[-1].output.LayerNorm
    norm.weight.data[[3, 8]] = torch.tensor([1e-33, 1e-9])  # as in all-MiniLM-L6-v2
    spectrum = jacobian_spectrum(encoder, encoder.embed_tokens(SENTENCES[0]), bounds=None)
    assert [(zero.cause, zero.count) for zero in spectrum.structural_zeros[0]] == [("LayerNorm gain of zero", 2)]
    assert int(spectrum.rank) == 30


BAD_TEXTS = {
    "": (ValueError, "at least one token"),
    "   ": (ValueError, "at least one token"),
    "[SEP] [SEP]": (ValueError, "only special tokens"),
    "東京 zebra": (ValueError, "only unknown tokens"),
    "cat " * 23: (ValueError, "at most 22 tokens for .*; got 23"),
    5: (TypeError, "a string; got int"),
}


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_bad_texts(bert, text):
    kind, message = BAD_TEXTS[text]
    with pytest.raises(kind, match=message):
        bert.embed_tokens(text)


def test_bad_calls(bert):
    with pytest.raises(TypeError, match="a single one"):
        bert.encode("the cat")
    with pytest.raises(ValueError, match=r"float tensor \(B, T, 32\)"):
        bert(torch.zeros(1, 3, 31))
    with pytest.raises(ValueError, match="1 to 22"):
        bert(torch.zeros(1, 23, 32))
    with pytest.raises(TypeError, match=r"torch\.Tensor; got list"):
        bert([1])


def _lists(*kinds):
    paths = ["", "1_Pooling", "2_X"]
    return [{"path": path, "type": f"a.b.{kind}"} for path, kind in zip(paths, kinds, strict=False)]


BAD_FILES = {
    "modules.json": [
        ({}, "no list of modules"),
        ([5], "no list of modules"),
        (_lists("Transformer"), "no pooling"),
        (_lists("Transformer", "LSTM"), "a module of type 'a.b.LSTM'"),
        ([{"path": "../../etc", "type": "a.Pooling"}], r"a module at '\.\./\.\./etc'"),
        ([{"path": "0_T", "type": "a.Transformer"}], "its model in the folder '0_T'"),
        (_lists("Transformer", "Pooling", "Dense"), "no config.json or no safetensors file in '2_X'"),
    ],
    "1_Pooling/config.json": [
        ({"pooling_mode": "attention"}, "attention"),
        ([], "no configuration of its pooling"),
        ({"pooling_mode": "mean", "include_prompt": False}, "a pooling without its prompt"),
    ],
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in BAD_FILES.items() for case in cases])
def test_files_that_describe_no_pooling(checkpoints, tmp_path, name, case):
    folder = shutil.copytree(checkpoints["bert"], tmp_path / "bad")
    write(folder / name, case[0])
    with pytest.raises(ValueError, match=case[1]):
        TextEncoder.from_pretrained(folder)


def test_checkpoints_that_are_refused(checkpoints, tmp_path):
    def copy(name):
        return shutil.copytree(checkpoints["bert"], tmp_path / name)

    bare = copy("bare")
    (bare / "modules.json").unlink()
    with pytest.raises(ValueError, match="`pooling` must be given"):
        TextEncoder.from_pretrained(bare)
    with pytest.raises(ValueError, match=r"`pooling` must be one of .*; got 'first'"):
        TextEncoder.from_pretrained(bare, pooling="first")
    damaged = copy("damaged")
    (damaged / "modules.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"modules\.json of .* must be JSON"):
        TextEncoder.from_pretrained(damaged)
    wordless = copy("wordless")
    for path in (*wordless.glob("tokenizer*"), *wordless.glob("special*")):
        path.unlink()
    with pytest.raises(OSError, match="must have a tokenizer that can be loaded here"):
        TextEncoder.from_pretrained(wordless)
    with pytest.raises(ValueError, match=r"must name a text encoder .* Use `Encoder` for images"):
        TextEncoder.from_pretrained("builtin")
    torn = copy("torn")
    config = json.loads((torn / "config.json").read_text())
    write(torn / "config.json", config | {"num_hidden_layers": 3})
    with pytest.raises(ValueError, match="lacks 16 of them"):
        TextEncoder.from_pretrained(torn)
    seq2seq = tmp_path / "t5"
    small = t.T5Config(vocab_size=len(WORDS) + 5, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    t.T5Model(small).save_pretrained(seq2seq)
    with pytest.raises(ValueError, match="those of its decoder"):
        TextEncoder.from_pretrained(seq2seq, pooling="mean")


def test_a_checkpoint_by_name(checkpoints, tmp_path, hub):
    """All files belong to one commit, those of subfolders included."""
    folder = shutil.copytree(checkpoints["bert"], tmp_path / "bert")
    save_text(folder, "bert", dense=7)
    repo = hub.add("models", "alice/bert", folder)
    encoder = TextEncoder.from_pretrained("alice/bert", cache_dir=tmp_path / "cache")
    assert encoder.revision == repo.at("main").sha
    assert torch.equal(encoder.encode(SENTENCES), TextEncoder.from_pretrained(folder).encode(SENTENCES))
    again = TextEncoder.from_pretrained("alice/bert", cache_dir=tmp_path / "cache", local_files_only=True)
    assert torch.equal(again.encode(SENTENCES), encoder.encode(SENTENCES))
