"""Tiny random text encoders of every supported family, saved as sentence-transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as t
from safetensors.torch import save_file
from tiny_models import roughen
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = (
    "a the cat dog owl sat ran slept on under over mat bridge river old red slowly and market fell rose bank paper "
    "child reads writes ##s ##ing house music plays night day"
).split()
SENTENCES = ("the old cat sat on a mat", "a dog runs under the red bridge", "music", "the market fell slowly and rose")
_SIZE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 24,
}  # fmt: skip
_DECODER = _SIZE | {"num_key_value_heads": 1, "head_dim": 16}


@dataclass(frozen=True)
class TextFamily:
    """How to make one tiny text encoder."""

    make: Callable[..., Any]  # from the size of the vocabulary and the ids of its special tokens
    special: tuple[str, str] = ("[CLS]", "[SEP]")  # before and after a text; empty for none
    pooling: str = "mean"


def _decoder(config: Any, **more: Any) -> Callable[..., Any]:
    return lambda size, **ids: t.AutoModel.from_config(config(vocab_size=size, **_DECODER, **ids, **more))


TEXT_FAMILIES: dict[str, TextFamily] = {
    "bert": TextFamily(lambda size, **ids: t.BertModel(t.BertConfig(vocab_size=size, **_SIZE, **ids))),
    "mpnet": TextFamily(lambda size, **ids: t.MPNetModel(t.MPNetConfig(vocab_size=size, **_SIZE, **ids))),
    "xlm_roberta": TextFamily(
        lambda size, **ids: t.XLMRobertaModel(t.XLMRobertaConfig(vocab_size=size, **_SIZE, **ids)), pooling="cls"
    ),
    "distilbert": TextFamily(
        lambda size, **ids: t.DistilBertModel(
            t.DistilBertConfig(
                vocab_size=size, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=24, **ids
            )
        )
    ),
    "modernbert": TextFamily(
        lambda size, **ids: t.ModernBertModel(
            t.ModernBertConfig(vocab_size=size, **_SIZE, cls_token_id=2, sep_token_id=3, **ids)
        )
    ),
    "qwen3": TextFamily(_decoder(t.Qwen3Config), ("", "[SEP]"), "lasttoken"),
    "llama": TextFamily(_decoder(t.LlamaConfig), ("[CLS]", ""), "lasttoken"),
    "gemma": TextFamily(_decoder(t.GemmaConfig), ("[CLS]", "[SEP]"), "weightedmean"),
}


def save_text(folder: Path, family: str, *, normalize: bool = True, dense: int = 0, **pooling: Any) -> Path:
    """Save a tiny checkpoint with its tokenizer and the files of sentence-transformers."""
    made = TEXT_FAMILIES[family]
    names = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}  # MPNet counts positions from the padding 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = made.make(len(names), **ids)
    roughen(model)
    model.save_pretrained(folder)
    before, after = made.special
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    marks = [(one, names.index(one)) for one in made.special if one]
    tokenizer.post_processor = processors.TemplateProcessing(f"{before} $A {after}".strip(), special_tokens=marks)
    t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=24,
    ).save_pretrained(folder)  # fmt: skip
    steps = [("", "Transformer"), ("1_Pooling", "Pooling")]
    steps += [("2_Dense", "Dense")] if dense else []
    steps += [(f"{len(steps)}_Normalize", "Normalize")] if normalize else []
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(steps)
    ]
    write(folder / "modules.json", listed)
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32} | (pooling or _flags(made.pooling)))
    if dense:
        activation = "torch.nn.modules.activation.Tanh"
        config = {"in_features": 32, "out_features": dense, "bias": True, "activation_function": activation}
        write(folder / "2_Dense" / "config.json", config)
        generator = torch.Generator().manual_seed(1)
        tensors = {"linear.weight": torch.randn(dense, 32, generator=generator) / 6}
        save_file(
            tensors | {"linear.bias": torch.randn(dense, generator=generator)}, folder / "2_Dense/model.safetensors"
        )
    return folder


def _flags(mode: str) -> dict[str, bool]:
    names = {"cls": "cls_token", "mean": "mean_tokens", "weightedmean": "weightedmean_tokens", "lasttoken": "lasttoken"}
    return {f"pooling_mode_{name}": key == mode for key, name in names.items()}


def write(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def save_words(folder: Path, *more: str) -> Path:
    """Add a tokenizer of a few words to a checkpoint of images and texts."""
    words = ["<s>", "</s>", "a", "photo", "of", "cat", "dog", ".", "<unk>", *more]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = t.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder
