"""Embed texts and zero-shot labels with the text encoder of a two-tower checkpoint, such as CLIP or SigLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hf_equiv.formatting import excerpt, printable
from hf_equiv.models.checkpoint import Checkpoint, quiet
from hf_equiv.precision import no_tf32

PROMPT = "a photo of a {label}."  # sentence around each label (Radford et al. 2021, arXiv:2103.00020, §3.1.4)


@dataclass(frozen=True, slots=True)
class LabelEmbeddings:
    """Text embeddings of some labels, of unit length, with the model's logit scale and bias."""

    features: Tensor  # (L, D), each row of norm 1
    scale: float  # factor on the cosine similarity
    bias: float  # term added to the product; 0 for CLIP

    def logits(self, image_features: Tensor) -> Tensor:
        """Return scale · cos(image, label) + bias, (B, L), for image embeddings (B, D)."""
        unit = image_features / image_features.norm(dim=-1, keepdim=True)
        return self.scale * unit @ self.features.T + self.bias


def embed_labels(
    checkpoint: Checkpoint, labels: Sequence[str], dtype: torch.dtype, device: torch.device
) -> LabelEmbeddings:
    """Embed `labels`, each put into `PROMPT`, with the text encoder of `checkpoint`."""
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError("`labels` must be a sequence of strings; got something else. Pass ['cat', 'dog'].")
    if not labels or not all(label.strip() for label in labels):
        raise ValueError(f"`labels` must hold at least one label and no empty one; got {list(labels)!r}.")
    return embed_texts(checkpoint, labels, dtype, device, name="`labels`", prompt=PROMPT)


def embed_texts(
    checkpoint: Checkpoint, texts: Sequence[str], dtype: torch.dtype, device: torch.device, *, name: str = "each text",
    prompt: str = "{label}",
) -> LabelEmbeddings:  # fmt: skip
    """Embed texts with the text encoder of `checkpoint`; `name` is what messages call them."""
    checkpoint.fetch_matching((".json", ".txt", ".model"))  # the files of the tokenizer
    with quiet(), torch.random.fork_rng(devices=[]):
        try:
            tokenizer = checkpoint.load(AutoTokenizer)
        except Exception as error:
            raise OSError(
                f"{name} must be tokenised, and '{checkpoint.model_id}' has no tokenizer that can be loaded here "
                f"({excerpt(error)}). Copy the tokenizer's files beside its config.json."
            ) from error
        _check_known(tokenizer, texts, checkpoint.model_id, name)
        model = checkpoint.load(AutoModel, dtype=dtype, use_safetensors=True)
    if not hasattr(model, "logit_scale"):
        raise ValueError(
            f"{name} must be None for '{checkpoint.model_id}': {type(model).__name__} has no logit scale "
            "for similarities. Use CLIP or SigLIP."
        )
    model.eval().requires_grad_(False).to(device)
    sentences = [prompt.format(label=text) for text in texts]
    length = int(model.config.text_config.max_position_embeddings)
    for text, ids in zip(texts, tokenizer(sentences, verbose=False)["input_ids"], strict=True):
        if len(ids) > length:
            raise ValueError(
                f"{name} must have at most {length} tokens for '{checkpoint.model_id}', special ones included; got "
                f"{len(ids)} in {printable(text[:40])!r}…. Shorten it."
            )
    # SigLIP was trained on texts padded to full length and attends to the padding; CLIP stops at its end token.
    padding = "max_length" if model.config.model_type.startswith("siglip") else True
    most = {"max_length": length} if padding == "max_length" else {}
    tokens = tokenizer(sentences, padding=padding, return_tensors="pt", **most)
    wanted = ("input_ids",) if padding == "max_length" else ("input_ids", "attention_mask")
    with torch.no_grad(), no_tf32():
        features = model.get_text_features(**{k: tokens[k].to(device) for k in wanted}).pooler_output
        features = features / features.norm(dim=-1, keepdim=True)
    bias = getattr(model, "logit_bias", None)
    return LabelEmbeddings(features, float(model.logit_scale.exp()), 0.0 if bias is None else float(bias))


def _check_known(tokenizer: Any, labels: Sequence[str], model_id: str, name: str) -> None:
    """Refuse texts without one known token: transformers makes an empty tokenizer if the files are missing."""
    unknown = {*tokenizer.all_special_ids, tokenizer.unk_token_id}
    for label, tokens in zip(labels, tokenizer(list(labels), add_special_tokens=False)["input_ids"], strict=True):
        if unknown.issuperset(tokens):
            raise OSError(
                f"{name} must be words that the tokenizer knows; that of '{model_id}' has {len(tokenizer):,} entries "
                f"and none for {printable(label[:60])!r}. Copy the tokenizer's files (tokenizer.json, or vocab.json "
                "and merges.txt) beside its config.json, or choose another text."
            )
