"""Give any torch module the form of a loaded checkpoint: one output, an image processor, and a digest as revision."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil

from hf_equiv.models.checkpoint import Checkpoint
from hf_equiv.models.loading import LoadedModel, multiply_patches
from hf_equiv.models.places import BUILTINS
from hf_equiv.models.preprocess import Preprocessor, split_processor
from hf_equiv.models.readouts import OUTPUT

KIND = "module"  # marks a wrapped module: `attention` of its records, `model_type` of its configuration


class WrappedModule(torch.nn.Module):
    """A module of the user, called as a vision model of transformers."""

    def __init__(self, module: torch.nn.Module, labels: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.config = SimpleNamespace(model_type=KIND, id2label=dict(enumerate(labels)))

    def forward(self, pixel_values: Tensor, **_: Any) -> dict[str, Tensor]:
        """Return the embedding, (B, D)."""
        return {OUTPUT: _one_tensor(self.module(pixel_values), len(pixel_values), "module")}


class WrappedHead(torch.nn.Module):
    """The class scores of a wrapped module."""

    def __init__(self, body: WrappedModule, head: torch.nn.Module | None) -> None:
        super().__init__()
        self.body, self.head, self.config = body, head, body.config

    def forward(self, pixel_values: Tensor, **_: Any) -> tuple[Tensor]:
        """Return the scores, (B, num_classes)."""
        z = self.body(pixel_values)[OUTPUT]
        return (z if self.head is None else _one_tensor(self.head(z), len(z), "head"),)


def wrap_module(
    module: torch.nn.Module, size: int | tuple[int, int] | None, mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None, head: torch.nn.Module | None, labels: Sequence[str] | None,
    name: str | None, dtype: torch.dtype, device: torch.device,
) -> tuple[Checkpoint, LoadedModel, Preprocessor]:  # fmt: skip
    """Return the three parts of an `Encoder`; `Encoder.wrap` describes the arguments."""
    for part, whose in ((module, "module"), (head, "head")):
        if not isinstance(part, torch.nn.Module) and (part is not None or whose == "module"):
            raise TypeError(f"`{whose}` must be a torch.nn.Module; got {type(part).__name__}.")
    if name in BUILTINS:
        raise ValueError(f"`name` must not be {name!r}, a checkpoint of this package. Choose another.")
    if labels is not None and (isinstance(labels, str) or len(labels) < 2):
        raise ValueError(f"`labels` must be at least two names; got {labels!r}. Leave it out without classes.")
    if head is not None and labels is None:
        raise ValueError("`labels` must come with `head`, one name for each score. Add them or leave both out.")
    body = WrappedModule(module, labels or ())
    whole = body if labels is None else WrappedHead(body, head)
    checkpoint = Checkpoint(name or type(module).__name__, Path(), _digest(whole))
    whole = copy.deepcopy(whole).eval().requires_grad_(False).to(device, dtype)
    multiply_patches(whole)
    body = whole if isinstance(whole, WrappedModule) else whole.body
    loaded = LoadedModel(whole, body, None, KIND, labels is not None, False, False)
    return checkpoint, loaded, split_processor(_processor(module, size, mean, std), checkpoint)


def check_labels(scores: Tensor, labels: Sequence[str]) -> None:
    """Require one name for each class score (B, num_classes)."""
    if scores.shape[1] != len(labels):
        raise ValueError(
            f"`labels` must name the {scores.shape[1]} scores of the model; got {len(labels)}. If the scores come from "
            "another layer, pass it as `head`."
        )


def _processor(module: Any, size: Any, mean: Any, std: Any) -> Any:
    """Return an image processor that resizes the short side, cuts out the centre and normalises."""
    stated = getattr(module, "pretrained_cfg", None)
    stated = stated if isinstance(stated, dict) else {}
    height, width = (size, size) if isinstance(size, int) else size or stated.get("input_size", (3, 224, 224))[1:]
    scales = {"mean": stated.get("mean") if mean is None else mean, "std": stated.get("std") if std is None else std}
    for name, value in scales.items():
        values = [value] * 3 if isinstance(value, int | float) else list(value or ())
        if len(values) != 3 or not all(torch.isfinite(torch.tensor(values))) or (name == "std" and min(values) <= 0):
            raise ValueError(
                f"`{name}` must be one number{' above 0' if name == 'std' else ''} or three, as in the training of the "
                f"model; got {value!r}. A module that normalises by itself takes mean=0 and std=1."
            )
        scales[name] = [float(one) for one in values]
    if not min(height, width) >= 1:
        raise ValueError(f"`size` must be a side or (H, W) of at least 1 pixel; got {size!r}.")
    return CLIPImageProcessorPil(
        size={"shortest_edge": max(height, width)}, crop_size={"height": height, "width": width},
        image_mean=scales["mean"], image_std=scales["std"],
    )  # fmt: skip


def _one_tensor(value: Any, batch: int, whose: str) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != batch or not value.is_floating_point():
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"`{whose}` must return one float tensor ({batch}, …); got {got}. Wrap it in one that does.")
    return value.flatten(1)


def _digest(module: torch.nn.Module) -> str:
    """Return the SHA-256 over names, types, shapes and values of parameters and buffers."""
    whole = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        whole.update(f"{name}\0{getattr(value, 'dtype', '')}\0{tuple(getattr(value, 'shape', ()))}\0".encode())
        if isinstance(value, Tensor):
            whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:  # the extra state of a module
            whole.update(repr(value).encode())
    return f"sha256:{whole.hexdigest()}"
