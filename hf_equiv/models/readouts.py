"""Read the embedding out of a vision model's outputs; define and find its readouts (docs/guide.md)."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_equiv.models.loading import LoadedModel

OUTPUT = "output"  # the readout of a wrapped module

# Families whose float32 embeddings on the CPU have the same bits in every batch (tests/models/test_encoder.py).
_SAME_IN_BATCHES = frozenset(
    "vit deit beit data2vec-vision dinov2 dinov2_with_registers dinov3_vit dinov3_convnext clip_vision_model "
    "siglip_vision_model swin swinv2 vit_mae vit_msn ijepa convnext convnextv2 dpt yolos clipseg_vision_model "
    "altclip_vision_model chinese_clip_vision_model metaclip_2_vision_model blip_vision_model internvl_vision "
    "pixio mlcd_vision_model donut-swin".split()
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Outputs of one forward pass of a checkpoint, found on a probe image."""

    prefix: int  # number of tokens before the patch tokens; the first of them is the class token
    suffix: int  # number of tokens after them (YOLOS: its detection tokens)
    patch: int | None  # side of the square patches, one for each token after the prefix; None for other models
    alone: bool  # whether images are embedded one by one on the CPU, so that bits do not depend on the batch
    num_hidden: int  # length of `hidden_states`
    available: tuple[str, ...]  # the readouts of this checkpoint


def find_layout(loaded: LoadedModel, outputs: Mapping[str, Any], image_size: tuple[int, int]) -> Layout:
    """Read the layout off the outputs of one forward pass of two images at `image_size`."""
    if OUTPUT in outputs:
        return Layout(0, 0, None, True, 0, (OUTPUT, "logits") if loaded.has_head else (OUTPUT,))
    last = _last(loaded, outputs)
    if not isinstance(last, Tensor) or last.ndim not in (3, 4) or not last.is_floating_point():
        raise ValueError(
            f"`model_id` must map pixels to hidden states (B, T, D) or (B, C, H, W); {type(loaded.backbone).__name__} "
            f"gives {', '.join(list(outputs)[:3])}. Choose an image encoder."
        )
    if last.ndim == 4 and image_size[0] == image_size[1] and last.shape[2] != last.shape[3]:
        raise ValueError(
            f"`model_id` must map pixels to hidden states (B, T, D) or (B, C, H, W); {type(loaded.backbone).__name__} "
            f"gives {tuple(last.shape)}, channels last. Choose an image encoder."
        )
    if len(last) != 2:
        raise ValueError(
            f"`model_id` must embed each image for itself; {type(loaded.backbone).__name__} joins the images of a "
            "batch. Choose another image encoder."
        )
    prefix, suffix = (0, 0) if last.ndim == 4 else _extra_tokens(loaded, last.shape[1], image_size)
    patch, width = _patch(loaded.backbone.config)
    count = last.shape[1] - prefix - suffix
    tiles = 0 < patch == width and count == (image_size[0] // patch) * (image_size[1] // patch)
    hidden = tuple(outputs.get("hidden_states") or ())
    hidden = hidden if all(isinstance(state, Tensor) for state in hidden) else ()
    there = {
        "cls": prefix > 0,
        "mean": True,
        "pooler": loaded.has_pooler and isinstance(outputs.get("pooler_output"), Tensor),
        "tokens": True,
        "logits": loaded.has_head,
        "projection": loaded.two_tower or loaded.projection is not None,
    }
    available = *(name for name in there if there[name]), *(f"hidden:{k}" for k in range(len(hidden)))
    # Measured on the CPU: float32 matrix products with 16 or more rows an image round the same in every batch; those
    # with fewer rows do not, nor do convolutions, nor the activation of half a tensor in DINOv2's SwiGLU.
    rows = min(state[0].numel() // state.shape[1 if state.ndim == 4 else -1] for state in (last, *hidden))
    config = loaded.backbone.config
    alone = rows < 16 or config.model_type not in _SAME_IN_BATCHES or bool(getattr(config, "use_swiglu_ffn", False))
    return Layout(prefix, suffix, patch if tiles else None, alone, len(hidden), available)


def resolve_readout(readout: str, layout: Layout, model_id: str) -> str:
    """Return the available readout that `readout` names ("auto" and negative K included), or refuse it."""
    if not isinstance(readout, str):
        raise TypeError(f"`readout` must be a string; got {type(readout).__name__}. Use readout='auto'.")
    default = next(name for name in ("projection", "pooler", "cls", "mean", OUTPUT) if name in layout.available)
    if readout == "auto":
        return default
    negative = re.fullmatch(r"hidden:-(\d+)", readout)
    if negative and 1 <= int(negative[1]) <= layout.num_hidden:
        readout = f"hidden:{layout.num_hidden - int(negative[1])}"
    if readout in layout.available:
        return readout
    if readout == "pooler":
        raise ValueError(
            f"readout 'pooler' is not in this checkpoint (its weights would be random). Use readout='{default}'."
        )
    known = ("cls", "mean", "tokens", "logits", "projection", OUTPUT)
    if readout not in known and not readout.startswith("hidden:"):
        raise ValueError(f"`readout` must be one of {_listed(layout)}; got {readout!r}. Use readout='{default}'.")
    raise ValueError(
        f"readout '{readout}' is not in this checkpoint; '{model_id}' has {_listed(layout)}. Use readout='{default}'."
    )


def _listed(layout: Layout) -> str:
    names = [name for name in layout.available if not name.startswith("hidden:")]
    return ", ".join(names) + (f", hidden:0 … hidden:{layout.num_hidden - 1}" if layout.num_hidden else "")


def embed(loaded: LoadedModel, layout: Layout, readout: str, pixel_values: Tensor, interpolate: bool) -> Tensor:
    """Map normalised pixels (B, 3, H, W) to the embedding (B, D) of `readout`."""
    if readout == "logits":
        return run(loaded.model, pixel_values, interpolate)[0]  # the scores come first; PPLCNet gives them no name
    deep = readout.startswith("hidden:")
    outputs = run(loaded.backbone, pixel_values, interpolate, output_hidden_states=deep or loaded.is_bare_head)
    if readout == OUTPUT:
        return outputs[OUTPUT]
    if readout == "pooler":
        return outputs.pooler_output.flatten(1)  # some convolutional networks give (B, D, 1, 1)
    if readout == "projection":
        pooled = outputs.pooler_output
        return pooled if loaded.projection is None else loaded.projection(pooled)
    last = _last(loaded, outputs)
    if deep:
        state = outputs.hidden_states[int(readout.partition(":")[2])]
        if layout.prefix and state.ndim == 3 and state.shape[1] == last.shape[1]:  # PVT adds the class token late
            return state[:, 0]
        return _mean(state.permute(0, 3, 1, 2) if _channels_last(loaded, state, last) else state, 0, 0)
    if readout == "cls":
        return last[:, 0]
    if readout == "mean":
        return _mean(last, layout.prefix, layout.suffix)
    return last.flatten(1)  # tokens: (B, T, D) -> (B, T·D)


def run(model: Any, pixel_values: Tensor, interpolate: bool, output_hidden_states: bool = False) -> Any:
    """Call a transformers vision model; let it interpolate positions only if the size is not its own."""
    kwargs: dict[str, Any] = {"return_dict": True}
    if interpolate and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        kwargs["interpolate_pos_encoding"] = True
    if output_hidden_states:
        kwargs["output_hidden_states"] = True
    if model.config.model_type == "vit_mae":  # it sorts patches by `noise`; ascending noise keeps their order
        patches = model.embeddings.patch_embeddings.projection.kernel_size
        count = (pixel_values.shape[2] // patches[0]) * (pixel_values.shape[3] // patches[1])
        kwargs["noise"] = torch.arange(float(count), device=pixel_values.device).expand(pixel_values.shape[0], -1)
    return model(pixel_values, **kwargs)


def _last(loaded: LoadedModel, outputs: Mapping[str, Any]) -> Any:
    """Return the last hidden state; a classifier without a base model (HGNetV2) gives it among all of them."""
    return outputs["hidden_states"][-1] if loaded.is_bare_head else outputs.get("last_hidden_state")


def _mean(state: Tensor, prefix: int, suffix: int) -> Tensor:
    if state.ndim == 4:  # (B, C, H, W) -> (B, C)
        return state.mean(dim=(2, 3))
    return state[:, prefix : state.shape[1] - suffix].mean(dim=1)


def _channels_last(loaded: LoadedModel, state: Tensor, last: Tensor) -> bool:
    """Return whether a state is (B, H, W, C): SAM's layers are, and its last state is not."""
    width = getattr(loaded.backbone.config, "hidden_size", None)
    return state.ndim == 4 and state.shape[1] != width == state.shape[-1] and state.shape[1:3] == last.shape[-2:]


def _patch(config: Any) -> tuple[int, int]:
    """Return the (height, width) of the patches that the configuration states, (0, 0) if it states none."""
    patch = getattr(config, "patch_size", None)
    pair = patch if isinstance(patch, list | tuple) else (patch, patch)
    return (pair[0], pair[1]) if len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair) else (0, 0)


def _extra_tokens(loaded: LoadedModel, tokens: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return the number of tokens before and after the patches if a class token is among them, else (0, 0)."""
    config = loaded.backbone.config
    if config.model_type == "dinov3_convnext":
        return 1, 0  # the pooled map comes before the positions
    stride = math.prod(getattr(config, "strides", None) or [0])  # PVT has strides
    height, width = _patch(config) if hasattr(config, "patch_size") else (stride, stride)
    if height <= 0 or width <= 0:
        return 0, 0
    extra = tokens - (image_size[0] // height) * (image_size[1] // width)
    suffix = getattr(config, "num_detection_tokens", 0)
    names = (name for name, _ in loaded.backbone.named_parameters())
    known = any(re.search(r"cls_token|class_(embedding|token)", name) for name in names)
    return (extra - suffix, suffix) if 0 < extra - suffix <= 16 and known else (0, 0)


def probe(loaded: LoadedModel, pixel_values: Tensor, interpolate: bool) -> Mapping[str, Any]:
    """Run one forward pass without gradients and return every output of the backbone."""
    with torch.no_grad():
        return run(loaded.backbone, pixel_values, interpolate, output_hidden_states=True)


def native_size(loaded: LoadedModel) -> tuple[int, int] | None:
    """Return the (H, W) of the position embeddings; None if the configuration does not state it."""
    size = getattr(loaded.backbone.config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def check_size(
    loaded: LoadedModel, layout: Layout, size: tuple[int, int], native: tuple[int, ...], like: Tensor
) -> None:
    """Require an image size (H, W) that the model takes, by one forward pass of a zero image."""
    got, made_for = f"{size[0]}×{size[1]}", f"{native[0]}×{native[1]}"
    patch = layout.patch
    if patch and size != native and (size[0] % patch or size[1] % patch):
        raise ValueError(
            f"`pixels` must have sides that are multiples of {patch}, the patch of this model; got {got}, whose edge "
            f"it would ignore. Resize to {max(1, size[0] // patch) * patch}×{max(1, size[1] // patch) * patch}."
        )
    try:
        probe(loaded, like.new_zeros(1, 3, *size), interpolate=size != native)
    except Exception as error:
        raise ValueError(
            f"`pixels` must have a size this model takes; got {got}, but {type(loaded.backbone).__name__} was made for "
            f"{made_for} and does not interpolate its positions. Use `encoder.preprocess(...)`, or resize the images."
        ) from error
