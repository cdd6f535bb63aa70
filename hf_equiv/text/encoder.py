"""Load a text encoder of the Hub as a function f from token embeddings to a sentence embedding."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from transformers import PreTrainedModel

from hf_equiv.formatting import printable
from hf_equiv.hub_client import version
from hf_equiv.models.checkpoint import Checkpoint, HubFiles, find_checkpoint
from hf_equiv.models.frozen import FrozenEncoder
from hf_equiv.models.loading import find_device
from hf_equiv.precision import InFloat64, exact_derivatives, no_autocast, no_tf32
from hf_equiv.text.loading import load_model, load_tokenizer, no_tokenizer
from hf_equiv.text.pooling import Pool, Unit, read_options, read_steps

_PACKAGES = ("hf_equiv", "torch", "transformers", "tokenizers")
_WORDS = ("a", "1", "的")  # one of them every tokenizer should know
_GROUP = 32  # weights of a row that share the scale of their integers


class TextEncoder(FrozenEncoder):
    """f: R^(T·d) → R^D, z = pool(model(e₁, …, e_T)): a sentence embedding as a function of its T token embeddings.

    The tokens are those of the text alone. The special ones around it ([CLS], [SEP], a prompt) are part of f and do not
    move, nor do position and type embeddings. Pooling and normalisation are those of the checkpoint's own files.
    f takes any T that fits. It is a callable (B, T, d) → (B, D) like an `Encoder`, and all verbs work on it with
    `bounds=None`, since token embeddings have no box.

    Attributes:
        model_id: Hub id or folder that it was loaded from.
        revision: commit sha on the Hub, or "sha256:…" of the weights of a local folder.
        readout: the pooling, such as "mean".
        normalize: whether embeddings are scaled to unit L2 norm.
        embedding_dim: D.
        width: d, the length of a token embedding.
        max_tokens: the largest T.
        dtype: floating-point type of weights and embeddings.
        device: device of the weights.

    Example:
        >>> from hf_equiv import TextEncoder, match_embedding
        >>> encoder = TextEncoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> source, z = encoder.embed_tokens("a cat sits on the mat"), encoder.encode(["the market fell"])
        ... # doctest: +SKIP
        >>> match_embedding(encoder, source, z, bounds=None).converged  # doctest: +SKIP
        True
    """

    def __init__(
        self, checkpoint: Checkpoint, model: PreTrainedModel, attention: str, steps: torch.nn.Sequential,
        tokenizer: Any, device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self._checkpoint, self._tokenizer = checkpoint, tokenizer
        self.model_id, self.revision = checkpoint.model_id, checkpoint.revision
        self.dtype, self.device = dtype, device
        network = torch.nn.ModuleList([model, steps]).eval().requires_grad_(False).to(device, dtype)
        self._model, self._steps = model, steps
        self.readout = "+".join(mode for step in steps if isinstance(step, Pool) for mode in step.modes)
        self.normalize = any(isinstance(step, Unit) for step in steps)
        most, self._lower, self._prompt = read_options(checkpoint)
        self._before, self._after = self._frame()
        config = model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or 1 << 30
        embeddings: Any = getattr(model, "embeddings", None)
        if hasattr(embeddings, "create_position_ids_from_inputs_embeds"):  # the first ones belong to padding
            positions -= embeddings.padding_idx + 1
        limit = most or min(tokenizer.model_max_length, positions)
        self.max_tokens = min(limit, positions) - len(self._before) - len(self._after)
        self._ends = tuple(self._embedding(ids)[None] for ids in (self._before, self._after))
        self.width = self._ends[0].shape[2]
        super().__init__(network, attention, self.embed_tokens(self._word))
        with torch.no_grad():
            z = self(self._trial)
        if not bool(torch.isfinite(z).all()):
            raise ValueError(
                f"'{self.model_id}' must give finite embeddings; that of {self._word!r} holds NaN or infinity. Check "
                "the weights."
            )
        self.embedding_dim = int(z.shape[1])

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> TextEncoder:
        """Load a checkpoint of sentence-transformers, or any encoder or decoder of text of transformers.

        Weights are read from safetensors only, and all files belong to one commit.

        Args:
            model_id: Hub id or local folder.
            pooling: "cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean" or "lasttoken" for a checkpoint whose
                files state none; None for what they state (modules.json, 1_Pooling/config.json).
            normalize: whether to scale embeddings to unit L2 norm; None for what the files state.
            revision: branch, tag or commit on the Hub; None for the default branch.
            subfolder: folder of the model inside the repository or `model_id`.
            token: Hub access token; None for the stored one.
            cache_dir: cache of Hub files; None for the Hub's default.
            local_files_only: whether to use cached files only.
            trust_remote_code: whether to run Python code that the checkpoint brings.
            dtype: type of weights and embeddings.
            device: device to run on; None for CUDA if present, else the CPU.

        Returns:
            The encoder, frozen and in eval mode.

        Raises:
            TypeError: `dtype` is not a floating-point type.
            ValueError: no text encoder, a pooling that the files do not describe, or weights missing.
            FileNotFoundError: the folder or its safetensors are absent.
            OSError: a damaged file, no tokenizer, or the Hub's own error.
        """
        place = find_device(dtype, device)
        cache = None if cache_dir is None else os.fspath(cache_dir)
        hub = HubFiles(os.fspath(model_id), "", subfolder, token, cache, local_files_only)
        checkpoint = find_checkpoint(hub, revision, trust_remote_code)
        model, attention = load_model(checkpoint, dtype)
        steps, tokenizer = read_steps(checkpoint, pooling), load_tokenizer(checkpoint)
        if normalize is not None:
            steps = torch.nn.Sequential(*(step for step in steps if not isinstance(step, Unit)))
            steps.extend([Unit()] if normalize else [])
        return cls(checkpoint, model, attention, steps, tokenizer, place, dtype)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the sentence embedding of each row of token embeddings, (B, D), differentiable in them.

        Float32 is float32 (TF32 and autocast are off). On a CPU sentences are embedded one by one, so that an embedding
        does not depend on the batch.

        Args:
            tokens: (B, T, d), on the encoder's device; cast to its dtype.

        Returns:
            (B, D) in the encoder's dtype.
        """
        self._check(tokens)
        if len(tokens) > 1 and tokens.device.type == "cpu":
            return torch.cat([self(one) for one in tokens.split(1)])
        return self._embed(tokens)

    def _embed(self, tokens: Tensor) -> Tensor:
        exact = self.dtype == torch.float64
        with ExitStack() as rules, no_tf32(), no_autocast():
            if exact or forward_ad.unpack_dual(tokens).tangent is not None:
                rules.enter_context(exact_derivatives())
            if exact:
                rules.enter_context(InFloat64())
            before, after = (end.expand(len(tokens), -1, -1) for end in self._ends)
            whole = torch.cat([before, tokens.to(self.dtype), after], dim=1)
            embedding: Tensor = self._steps(self._model(inputs_embeds=whole, return_dict=True).last_hidden_state)
            return embedding

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Return embeddings of rows of token ids in one pass, without gradients; their last bits depend on the batch.

        Args:
            ids: ids of tokens, (B, T), without the special ones around them.

        Returns:
            (B, D).
        """
        with torch.no_grad():
            return self._embed(self._embedding(ids))

    @cached_property
    def words(self) -> list[int]:
        """The ids of the tokens that texts are made of: all but special and reserved ones."""
        count = min(len(self._tokenizer), self._model.get_input_embeddings().weight.shape[0])
        names = self._tokenizer.convert_ids_to_tokens(list(range(count)))
        special = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}
        reserved = re.compile(r"\[.+\]|<.+>")
        return [i for i, name in enumerate(names) if name and i not in special and not reserved.fullmatch(name)]

    def _check(self, images: Tensor) -> None:
        """Require token embeddings (B, T, d) on this device, of a length that fits."""
        if not isinstance(images, Tensor):
            raise TypeError(f"`tokens` must be a torch.Tensor; got {type(images).__name__}. Use `embed_tokens(text)`.")
        if images.ndim != 3 or images.shape[2] != self.width or not images.is_floating_point():
            raise ValueError(
                f"`tokens` must be a float tensor (B, T, {self.width}); got {tuple(images.shape)}, {images.dtype}. Use "
                "`embed_tokens(text)`."
            )
        if not 1 <= images.shape[1] <= self.max_tokens:
            raise ValueError(
                f"`tokens` must be 1 to {self.max_tokens} for '{self.model_id}'; got {images.shape[1]}. Shorten the "
                "text."
            )
        if images.device != self.device:
            raise ValueError(
                f"`tokens` must be on {self.device}; got {images.device}. Use `tokens.to(encoder.device)`."
            )

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of the tokens of a text, without the special ones around it.

        Args:
            text: one text.

        Returns:
            T ids.

        Raises:
            TypeError: no string.
            ValueError: an empty text, one of special or unknown tokens alone, or one that is too long.
        """
        if not isinstance(text, str):
            raise TypeError(f"`text` must be a string; got {type(text).__name__}. Pass one text at a time.")
        shown = repr(printable(text[:60]))
        ids = self._ids(text)
        if ids[: len(self._before)] != self._before or not ids[len(self._before) :]:
            raise ValueError(f"`text` must not change the prompt of the checkpoint; got {shown}. Choose another text.")
        ids = ids[len(self._before) : len(ids) - len(self._after)]
        if not ids:
            raise ValueError(f"`text` must have at least one token; got {shown}. Write some words.")
        special, unknown = set(self._tokenizer.all_special_ids), self._tokenizer.unk_token_id
        if special.issuperset(ids):
            kind, cure = ("unknown", "in its language") if {*ids} == {unknown} else ("special", "of text")
            raise ValueError(
                f"`text` must have words that the tokenizer of '{self.model_id}' knows; {shown} has only {kind} "
                f"tokens. Write some {cure}."
            )
        if len(ids) > self.max_tokens:
            raise ValueError(
                f"`text` must have at most {self.max_tokens} tokens for '{self.model_id}'; got {len(ids)} in {shown}…. "
                "Shorten it."
            )
        return ids

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens; it may have other tokens when it is tokenised again.

        Args:
            ids: ids of tokens.

        Returns:
            The text.
        """
        text: str = self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    def tokens_of(self, ids: Sequence[int]) -> Tensor:
        """Return the embeddings of some tokens, (1, T, d).

        Args:
            ids: ids of tokens.

        Returns:
            A new tensor.
        """
        return self._embedding(ids)[None]

    def embed_tokens(self, text: str) -> Tensor:
        """Return the embeddings of the tokens of a text, the inputs of f.

        Args:
            text: one text.

        Returns:
            (1, T, d).

        Raises:
            TypeError: no string.
            ValueError: a text that `tokenize` refuses.
        """
        return self.tokens_of(self.tokenize(text))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the sentence embedding of each text, by its text alone.

        Args:
            texts: some texts.

        Returns:
            (N, D).

        Raises:
            TypeError: a single string, or no strings.
            ValueError: a text that `tokenize` refuses.
        """
        if isinstance(texts, str):
            raise TypeError("`texts` must be a sequence of strings; got a single one. Pass [text].")
        with torch.no_grad():
            return torch.cat([self(self.embed_tokens(text)) for text in texts])

    def in_dtype(self, dtype: torch.dtype) -> TextEncoder:
        """Return the same function in another floating-point type, with weights of its own.

        Args:
            dtype: type of weights and embeddings.

        Returns:
            The copy, on the same device.
        """
        model, steps = copy.deepcopy((self._model, self._steps))
        return TextEncoder(self._checkpoint, model, self._attention, steps, self._tokenizer, self.device, dtype)

    def quantized(self, bits: int) -> TextEncoder:
        """Return the encoder with its matrices rounded to integers of so many bits, times a scale for each 32 weights.

        Each row of a matrix, vocabulary included, is cut into groups of 32 numbers w, which become s·round(w/s) with
        s = max |w| / (2^(bits − 1) − 1). Arithmetic and all other weights stay as they are.

        Args:
            bits: 2 to 8.

        Returns:
            The copy, on the same device.

        Raises:
            ValueError: other numbers of bits.
        """
        if bits not in range(2, 9):
            raise ValueError(f"`bits` must be from 2 to 8; got {bits}.")
        model, steps = copy.deepcopy((self._model, self._steps))
        for weight in [*model.parameters(), *steps.parameters()]:
            if weight.ndim == 2:
                for group in weight.data.split(_GROUP, dim=1):
                    scale = group.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / (2 ** (bits - 1) - 1)
                    group.copy_((group / scale).round() * scale)
        return TextEncoder(self._checkpoint, model, self._attention, steps, self._tokenizer, self.device, self.dtype)

    @property
    def provenance(self) -> dict[str, str]:
        """The record of the encoder in every row, with the name of a local folder and the digest of its weights."""
        tokenizer = {
            "tokenizer": type(self._tokenizer).__name__, "size": len(self._tokenizer), "max_tokens": self.max_tokens,
            "lower_case": self._lower, "prompt": self._prompt, "steps": [type(step).__name__ for step in self._steps],
        }  # fmt: skip
        return {
            "model_id": self._checkpoint.name,
            "model_revision": self.revision,
            "readout": self.readout,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self._attention,
            "processor": json.dumps(tokenizer, sort_keys=True),
            "versions": json.dumps({name: version(name) for name in _PACKAGES}),
        }

    def __repr__(self) -> str:
        """State the checkpoint, the map and the device in one line."""
        dtype = str(self.dtype).removeprefix("torch.")
        what = f"{self.model_id!r} @ {self.revision[:14]}: T×{self.width} -> {self.embedding_dim}"
        return f"TextEncoder({what}, T ≤ {self.max_tokens}, pooling={self.readout!r}, {dtype} on {self.device})"

    def _frame(self) -> tuple[list[int], list[int]]:
        """Return the ids of the tokens before and after those of a text: special ones and the prompt."""
        unknown = {self._tokenizer.unk_token_id, *self._tokenizer.all_special_ids}
        self._word = next((word for word in _WORDS if not unknown.issuperset(self._ids(word))), "")
        if not self._word:
            raise no_tokenizer(self._checkpoint, "the one loaded knows no word")
        whole, mask = self._ids(self._word, mask=True)
        special = [bool(one) for one in mask]
        first, last = special.index(False), len(special) - special[::-1].index(False)
        if self._prompt:  # its tokens are those that texts of any beginning share
            other = self._ids(next(word for word in _WORDS if word != self._word))
            first = next(i for i, pair in enumerate(zip(whole, other, strict=False)) if pair[0] != pair[1])
        return whole[:first], whole[last:]

    def _ids(self, text: str, *, mask: bool = False) -> Any:
        text = self._prompt + text
        found = self._tokenizer(text.lower() if self._lower else text, return_special_tokens_mask=True, verbose=False)
        return (found["input_ids"], found["special_tokens_mask"]) if mask else found["input_ids"]

    def _embedding(self, ids: Tensor | Sequence[int]) -> Tensor:
        ids = torch.as_tensor(ids, dtype=torch.long, device=self.device)
        with torch.no_grad():
            embeddings: Tensor = self._model.get_input_embeddings()(ids).detach()
        return embeddings
