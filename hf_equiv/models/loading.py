"""Load the model of a checkpoint with its own architecture and head, and no weight that is not in the file."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import conv2d
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from hf_equiv.models.checkpoint import Checkpoint, quiet

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_HEADS = ("classifier", "cls_classifier", "distillation_classifier")
# Weights that may be missing: they serve masked image modelling, or readouts that are then refused.
_OPTIONAL = ("mask_token", "pooler", "text_model", "visual_projection", *_HEADS)
_BY_ARCHITECTURE = ("ForImageClassification", "VisionModelWithProjection")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One model in eval mode with frozen parameters."""

    model: PreTrainedModel  # the whole model, with its classification head if the checkpoint has one
    backbone: PreTrainedModel  # the part that maps normalised pixels to hidden states
    projection: torch.nn.Module | None  # CLIP's linear map from the pooled state to the image embedding
    attention: str  # "sdpa" or "eager"
    has_head: bool  # whether trained classification weights are in the checkpoint
    has_pooler: bool  # whether every weight of the pooler (if it has any) is in the checkpoint
    two_tower: bool  # whether the checkpoint also holds a text encoder with embeddings in the same space

    @property
    def is_bare_head(self) -> bool:
        """Whether the model is a classifier without a base model, as HGNetV2 is."""
        return self.has_head and self.model is self.backbone

    @property
    def has_batch_norm(self) -> bool:
        """Whether the backward pass needs `derivatives.PlainStrides`."""
        return any(isinstance(module, _BatchNorm) for module in self.model.modules())

    def copied(self, dtype: torch.dtype, device: torch.device) -> LoadedModel:
        """Return a copy with parameters in `dtype`; float64 keeps every float32 value exactly."""
        twin = copy.deepcopy((self.model, self.backbone, self.projection))  # one call, so that shared parts stay shared
        model, backbone, projection = (part if part is None else part.to(device, dtype) for part in twin)
        return replace(self, model=model, backbone=backbone, projection=projection)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """Load the one model of `checkpoint` in `dtype` on `device`, frozen, in eval mode; refuse an incomplete one."""
    config = read_config(checkpoint)
    model_class = _choose_class(config, checkpoint)
    checkpoint.weights()
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0  # otherwise the model drops a random 75 % of the patches
    with quiet(), torch.random.fork_rng(devices=[]):
        try:
            model, report, attention = load_weights(model_class, config, checkpoint, dtype)
        except Exception as error:
            raise load_error(error, checkpoint) from error
    multiply_patches(model.eval().requires_grad_(False))
    _check_labels(model, report["mismatched_keys"], checkpoint)
    two_tower = hasattr(model, "get_image_features") and hasattr(model, "vision_model")
    backbone = model.vision_model if two_tower else _backbone(model)
    _check_inputs(backbone, config, checkpoint)
    parts = {part for key in _missing(model, report, two_tower, checkpoint) for part in key.split(".")}
    head = _is_classifier(model) and not parts & {*_HEADS, "pooler"} and (config.num_labels or 0) > 0
    for owner in (model, backbone):
        for name in (*_HEADS, "pooler", "visual_projection", *(("head",) if "siglip" in config.model_type else ())):
            part = getattr(owner, name, None)
            if isinstance(part, torch.nn.Module) and not isinstance(part, _PerImage | torch.nn.ModuleList):
                setattr(owner, name, _PerImage(part))
    projection = None if "visual_projection" in parts else getattr(model, "visual_projection", None)
    # Language models such as Kosmos-2 and BLIP-2 have a vision model too, but no embedding that is compared with text.
    contrastive = hasattr(model, "logit_scale") or hasattr(model, "temperature")
    if two_tower:  # zero-shot labels load the text encoder when they need it
        model = backbone
    for part in (model, projection):
        if part is not None:
            part.to(device)
    two_tower = two_tower and contrastive and "visual_projection" not in parts
    return LoadedModel(model, backbone, projection, attention, head, "pooler" not in parts, two_tower)


def load_weights(
    model_class: Any, config: PreTrainedConfig, checkpoint: Checkpoint, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any], str]:
    """Return the model, the report of its loading and its attention: "sdpa" if all its parts have it, else "eager"."""
    options: dict[str, Any] = {"trust_remote_code": True} if model_class is AutoModel else {}
    for attention in ("sdpa", "eager") if getattr(model_class, "_supports_sdpa", True) else ("eager",):
        try:
            model, report = model_class.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, and are refused with their names
                local_files_only=True,
                **options,
            )
        except ValueError as error:
            if attention == "eager" or "does not support an attention implementation" not in str(error):
                raise
        else:
            break
    return model, report, attention


def _missing(model: PreTrainedModel, report: dict[str, Any], two_tower: bool, checkpoint: Checkpoint) -> list[str]:
    """Return the weights that the checkpoint lacks, or refuse it if one of them is used by every readout."""
    text = ("text_", "logit_scale", "logit_bias")
    missing = [key for key in report["missing_keys"] if not (two_tower and key.startswith(text))]
    require_weights(model, missing, report, checkpoint, _OPTIONAL)
    return missing


def require_weights(
    model: PreTrainedModel, missing: Sequence[str], report: dict[str, Any], checkpoint: Checkpoint,
    optional: Sequence[str],
) -> None:  # fmt: skip
    """Refuse a checkpoint that lacks weights, or has some of another shape, but for those of optional modules."""
    broken = [key for key in missing if not set(optional) & set(key.split("."))]
    broken += [str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]]
    if broken:
        raise ValueError(
            f"`model_id` must hold every weight of {type(model).__name__}; '{checkpoint.model_id}' lacks "
            f"{len(broken)} of them (first: {broken[0]}), which would be random. Check that config.json and the "
            "weights belong together."
        )


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Return the configuration of a checkpoint; its Python files are fetched if they may run."""
    if checkpoint.trust_remote_code:
        checkpoint.fetch_matching((".py",))
    with quiet():
        try:
            return checkpoint.load(AutoConfig)
        except Exception as error:
            raise load_error(error, checkpoint) from error


class _PerImage(torch.nn.Module):
    """Apply a head to one image at a time on the CPU.

    A head sees one row per image. BLAS uses different routines for a single row and for several, and they round
    differently, so an embedding would depend on the size of its batch.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, state: Tensor) -> Tensor:
        if state.shape[0] == 1 or state.device.type != "cpu":
            return self.module(state)
        return torch.cat([self.module(one) for one in state.split(1)])


class _PatchProduct(torch.autograd.Function):
    """A convolution of patches that do not overlap, with a matrix product as its backward pass.

    On a CPU the backward pass of the convolution takes 4 to 6 times as long: half the time of the built-in checkpoint.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d(pixels, weight, bias, stride=weight.shape[2:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pixels, weight, _ = inputs
        ctx.shape = pixels.shape
        ctx.save_for_backward(weight)
        ctx.save_for_forward(weight)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        patches = torch.tensordot(cotangent, weight, ([1], [0]))  # (B, H/h, W/w, C, h, w)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(ctx.shape), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (weight,) = ctx.saved_tensors
        return conv2d(tangent, weight, stride=weight.shape[2:])


class _PatchEmbedding(torch.nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        if any(whole % side for whole, side in zip(input.shape[2:], self.kernel_size, strict=True)):
            return super().forward(input)
        product: Tensor = _PatchProduct.apply(input, self.weight, self.bias)
        return product


def multiply_patches(model: torch.nn.Module) -> torch.nn.Module:
    """Let the convolutions of a frozen `model` whose kernels do not overlap go backward by a matrix product."""
    for module in model.modules():
        if type(module) is not torch.nn.Conv2d or module.padding != (0, 0) or module.dilation != (1, 1):
            continue
        if module.kernel_size == module.stride != (1, 1) and module.groups == 1:
            module.__class__ = _PatchEmbedding
    return model


def _choose_class(config: PreTrainedConfig, checkpoint: Checkpoint) -> Any:
    """Return the class that loads the checkpoint's own architecture, or refuse before any weight is fetched."""
    architectures = getattr(config, "architectures", None) or [""]
    named = getattr(transformers, architectures[0], None)
    if named is not None and any(part in named.__name__ for part in _BY_ARCHITECTURE):
        _check_class(named, config, checkpoint)
        return named
    found = AutoModel._model_mapping[type(config)] if type(config) in AutoModel._model_mapping else None
    found = found[0] if isinstance(found, tuple | list) else found
    if found is None and checkpoint.trust_remote_code and "AutoModel" in (getattr(config, "auto_map", None) or {}):
        return AutoModel
    if found is None and getattr(named, "config_class", None) is type(config) and "For" not in architectures[0]:
        found = named  # the image tower of a larger model
    if found is None:
        raise _not_an_image_encoder(checkpoint, config, ", which AutoModel does not load")
    _check_class(found, config, checkpoint)
    return found


def _check_class(kind: Any, config: PreTrainedConfig, checkpoint: Checkpoint) -> None:
    """Refuse a class that needs more than pixels, models of videos, and hidden states of a decoder."""
    if not (hasattr(kind, "get_image_features") and hasattr(kind, "get_text_features")):
        _check_inputs(kind, config, checkpoint)
    frames = getattr(getattr(config, "vision_config", config), "num_frames", None)
    if frames is not None:
        raise _not_an_image_encoder(checkpoint, config, f", which takes videos of {frames} frames")
    if getattr(config, "is_encoder_decoder", False):
        raise _not_an_image_encoder(checkpoint, config, ", whose hidden states are those of its decoder")


def _check_inputs(model: Any, config: PreTrainedConfig, checkpoint: Checkpoint) -> None:
    """Require that the forward pass of a model or class takes pixels, and needs nothing else."""
    signature = inspect.signature(model.forward).parameters.values()
    inputs = [one for one in signature if one.name != "self" and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    names = [one.name for one in inputs]
    own_name = getattr(model, "main_input_name", None) == "pixel_values" and "pixel_values" not in names  # remote code
    first = names[0] if names and not own_name else "pixel_values"
    if first != "pixel_values":
        tower = next((name for name in ("image_model", "vision_tower") if hasattr(model, name)), None)
        cure = " (for texts use `TextEncoder` from Python)" if first == "input_ids" else ""
        cure = cure if tower is None else f" (its image tower is `{tower}`: save that alone)"
        raise _not_an_image_encoder(checkpoint, config, f", whose first input is `{first}`{cure}")
    others = " and ".join(one.name for one in inputs[1:] if one.default is one.empty)
    if others:
        raise _not_an_image_encoder(checkpoint, config, f", which needs {others} beside the pixels")


def _backbone(model: PreTrainedModel) -> PreTrainedModel:
    for name in (model.base_model_prefix, "vision_model"):
        inner = getattr(model, name, None) if name else None
        # DINOv3 calls its encoder "model", like its prefix; that encoder alone takes no pixels.
        if isinstance(inner, PreTrainedModel) and (_is_classifier(model) or name == "vision_model"):
            return inner
    return model


def _is_classifier(model: PreTrainedModel) -> bool:
    return "ForImageClassification" in type(model).__name__


def _check_labels(model: PreTrainedModel, mismatched: Any, checkpoint: Checkpoint) -> None:
    """Require one name for each logit of a classification head."""
    names = model.config.id2label or {}
    count = next((shape[0] for name, shape, _ in mismatched if {*_HEADS, "fc"} & set(name.split("."))), len(names))
    if _is_classifier(model) and sorted(names) != list(range(count)):
        raise ValueError(
            f"id2label in the config.json of '{checkpoint.model_id}' must name the {count} logits of its head, 0 to "
            f"{count - 1}; it names {len(names)}, {min(names)} to {max(names)}. Correct it."
        )


def _not_an_image_encoder(checkpoint: Checkpoint, config: PreTrainedConfig, why: str = "") -> ValueError:
    return ValueError(
        f"`model_id` must name an image encoder (pixels in, hidden states out); '{checkpoint.model_id}' is a "
        f"{config.model_type!r} model{why}. Choose a vision checkpoint such as 'facebook/deit-tiny-patch16-224'."
    )


def load_error(error: Exception, checkpoint: Checkpoint) -> Exception:
    """Turn an error of transformers or safetensors into one line with the cure."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return ValueError(
            f"`trust_remote_code` must be True for '{checkpoint.model_id}': it brings its own Python code, which would "
            "run on this machine. Read that code first, then pass `trust_remote_code=True`."
        )
    if type(error).__name__ == "SafetensorError" or "safetensors" in text.lower():
        return OSError(
            f"The weights of '{checkpoint.model_id}' must be a readable safetensors file; it is damaged or cut short "
            f"({text[:120]}). Fetch it again."
        )
    if "not a valid JSON" in text:
        return ValueError(f"the config.json of '{checkpoint.model_id}' must be JSON; it is damaged. Fetch it again.")
    if "model_type" in text or "model type" in text:
        return ValueError(
            f"`model_id` must hold a config.json that transformers {transformers.__version__} knows; "
            f"'{checkpoint.model_id}' does not ({text[:160]}). Update transformers, or choose another checkpoint."
        )
    return OSError(
        f"'{checkpoint.model_id}' cannot be loaded ({type(error).__name__}: {text[:300]}). Check the checkpoint."
    )


def find_device(dtype: torch.dtype, device: str | torch.device | None) -> torch.device:
    """Require a floating-point type, and return the device named by `device`; None is CUDA if present, else the CPU."""
    if dtype not in _DTYPES:
        raise TypeError(f"`dtype` must be one of {', '.join(map(str, _DTYPES))}; got {dtype!r}. Use torch.float32.")
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`device` must be a PyTorch device; got {device!r}. Use 'cpu' or 'cuda'.") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"`device` must be present; got '{place}', but PyTorch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices. Use device='cpu', or install a CUDA build of PyTorch."
        )
    return place
