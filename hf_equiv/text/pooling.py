"""Read from the files of a sentence-transformers checkpoint how token states become a sentence embedding."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_equiv.models.checkpoint import Checkpoint

MODES = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_FLAGS = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
"""Keys of earlier versions of sentence-transformers, in the order in which it joins several."""

_ACTIVATIONS = {"": torch.nn.Identity, "Identity": torch.nn.Identity, "Tanh": torch.nn.Tanh, "GELU": torch.nn.GELU}
_ACTIVATIONS |= {"ReLU": torch.nn.ReLU, "SiLU": torch.nn.SiLU, "Sigmoid": torch.nn.Sigmoid}
_CURE = "Choose another checkpoint, or save it again with sentence-transformers."


class Pool(torch.nn.Module):
    """Pool the states of the tokens of a sentence, (B, T, d) → (B, d), or (B, k·d) for k modes."""

    def __init__(self, modes: Sequence[str]) -> None:
        super().__init__()
        self.modes = tuple(modes)

    def forward(self, states: Tensor) -> Tensor:
        """Return the pooled states: none of the tokens is padding."""
        return torch.cat([self._pool(states, mode) for mode in self.modes], dim=1)

    def _pool(self, states: Tensor, mode: str) -> Tensor:
        count = states.shape[1]
        if mode in ("cls", "lasttoken"):
            return states[:, 0 if mode == "cls" else -1]
        if mode == "max":
            return states.amax(dim=1)
        if mode == "weightedmean":
            weights = torch.arange(1, count + 1, dtype=states.dtype, device=states.device)
            return (states * weights[:, None]).sum(dim=1) / weights.sum()
        return states.sum(dim=1) / (count if mode == "mean" else count**0.5)


class Dense(torch.nn.Module):
    """A linear layer and an activation after the pooling."""

    def __init__(self, linear: torch.nn.Linear, activation: torch.nn.Module) -> None:
        super().__init__()
        self.linear, self.activation = linear, activation

    def forward(self, z: Tensor) -> Tensor:
        """Return the activated product, one sentence at a time, so that it does not depend on the batch."""
        return torch.cat([self.activation(self.linear(one)) for one in z.split(1)])


class Unit(torch.nn.Module):
    """Scale embeddings to unit L2 norm."""

    def forward(self, z: Tensor) -> Tensor:
        """Return z/‖z‖."""
        return z / z.norm(dim=1, keepdim=True)


def read_steps(checkpoint: Checkpoint, pooling: str | None) -> torch.nn.Sequential:
    """Return the steps from token states to the embedding, as modules.json states them, or one of `MODES` alone."""
    if pooling is not None:
        if pooling not in MODES:
            raise ValueError(f"`pooling` must be one of {', '.join(MODES)}; got {pooling!r}.")
        return torch.nn.Sequential(Pool([pooling]))
    listed = _read(checkpoint, "modules.json")
    if listed is None:
        raise ValueError(
            f"`pooling` must be given for '{checkpoint.model_id}': it has no modules.json that describes one. Use "
            "pooling='mean' or 'cls', as its authors do, or 'lasttoken' for a decoder."
        )
    steps: list[torch.nn.Module] = []
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise _unknown(checkpoint, "no list of modules")
    for module in listed:
        kind, path = (str(module.get(key, "")) for key in ("type", "path"))
        name = kind.rpartition(".")[2]
        if path and not re.fullmatch(r"\w[\w.-]*", path):
            raise _unknown(checkpoint, f"a module at {path[:80]!r}")
        if name == "Transformer" and not steps:
            if path:
                raise _unknown(checkpoint, f"its model in the folder {path!r}")
        elif name == "Pooling":
            steps.append(_pooling(checkpoint, _read(checkpoint, f"{path}/config.json")))
        elif name == "Dense" and steps:
            steps.append(_dense(checkpoint, path))
        elif name == "Normalize" and steps:
            steps.append(Unit())
        elif name != "Dropout":
            raise _unknown(checkpoint, f"a module of type {kind[:80]!r}")
    if not steps or not isinstance(steps[0], Pool):
        raise _unknown(checkpoint, "no pooling")
    return torch.nn.Sequential(*steps)


def _pooling(checkpoint: Checkpoint, config: Any) -> Pool:
    if not isinstance(config, dict):
        raise _unknown(checkpoint, "no configuration of its pooling")
    modes = config.get("pooling_mode") or [mode for key, mode in _FLAGS.items() if config.get(key)] or "mean"
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not all(mode in MODES for mode in modes):
        raise _unknown(checkpoint, f"the pooling {modes!r:.80}")
    if not config.get("include_prompt", True):
        raise _unknown(checkpoint, "a pooling without its prompt")
    return Pool(modes)


def _dense(checkpoint: Checkpoint, path: str) -> Dense:
    config = _read(checkpoint, f"{path}/config.json")
    weights = checkpoint.find(f"{path}/model.safetensors")
    if not isinstance(config, dict) or weights is None:
        raise _unknown(checkpoint, f"no config.json or no safetensors file in {path!r}")
    activation = _ACTIVATIONS.get(str(config.get("activation_function", "torch.nn.Tanh")).rpartition(".")[2])
    if activation is None or config.get("use_residual"):
        raise _unknown(checkpoint, f"a dense layer of another kind in {path!r}")
    try:
        tensors = load_file(weights)
        weight, bias = tensors["linear.weight"].float(), tensors.get("linear.bias")
    except (SafetensorError, KeyError, OSError) as error:
        raise OSError(
            f"The weights in '{path}' of '{checkpoint.model_id}' must be a readable safetensors file; it is damaged. "
            "Fetch it again."
        ) from error
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight.data = weight
    if bias is not None:
        linear.bias.data = bias.float()
    return Dense(linear, activation())


def read_options(checkpoint: Checkpoint) -> tuple[int | None, bool, str]:
    """Return the most tokens of a text, whether texts are put into lower case, and the prompt before each."""
    bert, named = (
        _read(checkpoint, f"{name}.json") for name in ("sentence_bert_config", "config_sentence_transformers")
    )
    bert, named = (one if isinstance(one, dict) else {} for one in (bert, named))
    most, prompts = bert.get("max_seq_length"), named.get("prompts")
    prompt = prompts.get(named.get("default_prompt_name")) if isinstance(prompts, dict) else None
    return most if isinstance(most, int) and most > 0 else None, bool(bert.get("do_lower_case")), str(prompt or "")


def _read(checkpoint: Checkpoint, name: str) -> Any:
    """Return the content of a JSON file, None if there is none."""
    path = checkpoint.find(name)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"the {name} of '{checkpoint.model_id}' must be JSON; it is damaged. Fetch it again."
        ) from error


def _unknown(checkpoint: Checkpoint, what: str) -> ValueError:
    return ValueError(
        f"'{checkpoint.model_id}' must describe a pooling that hf_equiv knows; its modules.json states {what}. {_CURE}"
    )
