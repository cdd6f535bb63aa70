"""Load the model and the tokenizer of a text encoder, and refuse what is none."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from hf_equiv.formatting import excerpt
from hf_equiv.models.checkpoint import Checkpoint, quiet
from hf_equiv.models.loading import load_error, load_weights, read_config, require_weights

_SPARE = ("pooler", "lm_head", "cls")  # modules whose weights may be missing: no embedding uses them


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[PreTrainedModel, str]:
    """Return the model of a checkpoint and its attention; refuse one that is no text encoder, or is incomplete."""
    config = read_config(checkpoint)
    kind = AutoModel._model_mapping[type(config)] if type(config) in AutoModel._model_mapping else AutoModel
    kind = kind[0] if isinstance(kind, tuple | list) else kind
    if kind is AutoModel and not (checkpoint.trust_remote_code and getattr(config, "auto_map", None)):
        raise _not_text(checkpoint, config, ", which AutoModel does not load")
    if getattr(kind, "main_input_name", "input_ids") != "input_ids" or hasattr(kind, "get_image_features"):
        raise _not_text(checkpoint, config, ". Use `Encoder` for images, and --target-text for models of both")
    if getattr(config, "is_encoder_decoder", False):
        raise _not_text(checkpoint, config, ", whose states are those of its decoder")
    checkpoint.weights()
    with quiet(), torch.random.fork_rng(devices=[]):
        try:
            model, report, attention = load_weights(kind, config, checkpoint, dtype)
        except Exception as error:
            raise load_error(error, checkpoint) from error
    require_weights(model, report["missing_keys"], report, checkpoint, _SPARE)
    return model, attention


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the tokenizer of a checkpoint."""
    checkpoint.fetch_matching((".json", ".txt", ".model"))
    with quiet():
        try:
            return checkpoint.load(AutoTokenizer)
        except Exception as error:
            raise no_tokenizer(checkpoint, excerpt(error)) from error


def no_tokenizer(checkpoint: Checkpoint, why: str) -> OSError:
    """Return the error of a checkpoint without a tokenizer."""
    return OSError(
        f"'{checkpoint.model_id}' must have a tokenizer that can be loaded here; it has none ({why}). Copy the "
        "tokenizer's files (tokenizer.json, or vocab.json and merges.txt) beside its config.json."
    )


def _not_text(checkpoint: Checkpoint, config: Any, why: str) -> ValueError:
    return ValueError(
        f"`model_id` must name a text encoder (tokens in, hidden states out); '{checkpoint.model_id}' is a "
        f"{config.model_type!r} model{why}. Choose one such as 'sentence-transformers/all-MiniLM-L6-v2'."
    )
