"""Tiny random checkpoints of every supported family, saved as real ones are: config, safetensors, image processor.

The usual initialisation (standard deviation 0.02) makes nearly linear maps. Here every weight is drawn anew, so that
the functions are visibly curved, LayerNorm and layer scale included.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as t

SIZE = 32
_VIT = {
    "image_size": SIZE,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
_LABELS = {"id2label": {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "elk"}, "num_labels": 5}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "projection_dim": 16,
}
_CONV = {"depths": [1] * 4, "hidden_sizes": [8, 16, 24, 32], "image_size": SIZE, "layer_scale_init_value": 1.0}
_SWIN = {"image_size": SIZE, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}

SQUARE = {"size": {"height": SIZE, "width": SIZE}}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS: dict[str, dict[str, Any]] = {
    "vit": {"image_processor_type": "ViTImageProcessor", **SQUARE},
    "vit_legacy": {"feature_extractor_type": "ViTFeatureExtractor", "size": SIZE, **IMAGENET},
    "deit": {
        "image_processor_type": "DeiTImageProcessor",
        "size": {"height": 37, "width": 37},
        "crop_size": {"height": SIZE, "width": SIZE},
        "resample": 3,
        **IMAGENET,
    },
    "beit": {"image_processor_type": "BeitImageProcessor", **SQUARE},
    "beit_crop": {
        "image_processor_type": "BeitImageProcessor",
        "size": {"height": 40, "width": 40},
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
    },
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
    },
    "siglip": {"image_processor_type": "SiglipImageProcessor", **SQUARE},
    "convnext": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": SIZE}, **IMAGENET},
    "convnext_384": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "resample": 2},
    "bit": {  # DINOv2
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 37},
        "crop_size": {"height": SIZE, "width": SIZE},
        "resample": 3,
        **IMAGENET,
    },
    "dinov3": {"image_processor_type": "DINOv3ViTImageProcessor", **SQUARE, **IMAGENET},
}


@dataclass(frozen=True)
class Family:
    """How to make one tiny checkpoint, and which readout `auto` must choose."""

    make: Callable[[], Any]
    processor: str
    auto: str


def _clip_config() -> Any:
    return t.CLIPConfig(text_config=_TEXT, vision_config={**_VIT, "projection_dim": 16}, projection_dim=16)


def _siglip_config() -> Any:
    return t.SiglipConfig(text_config={**_TEXT, "projection_size": 32}, vision_config=_VIT)


def _beit(mean: bool = False, shared: bool = False, relative: bool = False, scale: float = 0.0) -> Any:
    return t.BeitConfig(
        **_VIT,
        **_LABELS,
        use_mean_pooling=mean,
        use_shared_relative_position_bias=shared,
        use_relative_position_bias=relative,
        use_absolute_position_embeddings=not (shared or relative),
        layer_scale_init_value=scale,
    )


def _data2vec(mean: bool = False, shared: bool = False, relative: bool = False, scale: float = 0.0) -> Any:
    return t.Data2VecVisionConfig(
        **_VIT,
        **_LABELS,
        use_mean_pooling=mean,
        use_shared_relative_position_bias=shared,
        use_relative_position_bias=relative,
        use_absolute_position_embeddings=not (shared or relative),
        layer_scale_init_value=scale,
    )


_DINO = {**_VIT, "layerscale_value": 1.0}

FAMILIES: dict[str, Family] = {
    "vit": Family(lambda: t.ViTModel(t.ViTConfig(**_VIT)), "vit", "pooler"),
    "vit_head": Family(lambda: t.ViTForImageClassification(t.ViTConfig(**_VIT, **_LABELS)), "vit", "cls"),
    "deit": Family(lambda: t.DeiTModel(t.DeiTConfig(**_VIT)), "deit", "pooler"),
    "deit_head": Family(lambda: t.DeiTForImageClassification(t.DeiTConfig(**_VIT, **_LABELS)), "deit", "cls"),
    "deit_teacher": Family(
        lambda: t.DeiTForImageClassificationWithTeacher(t.DeiTConfig(**_VIT, **_LABELS)), "deit", "cls"
    ),
    "beit": Family(lambda: t.BeitForImageClassification(_beit()), "beit", "pooler"),
    "beit_mean_relative": Family(
        lambda: t.BeitForImageClassification(_beit(mean=True, relative=True, scale=0.5)), "beit", "pooler"
    ),
    "beit_shared": Family(lambda: t.BeitModel(_beit(shared=True, scale=0.5)), "beit_crop", "pooler"),
    "data2vec": Family(lambda: t.Data2VecVisionModel(_data2vec()), "beit", "cls"),
    "data2vec_mean_relative": Family(
        lambda: t.Data2VecVisionForImageClassification(_data2vec(mean=True, relative=True, scale=0.5)), "beit", "pooler"
    ),
    "data2vec_shared": Family(
        lambda: t.Data2VecVisionForImageClassification(_data2vec(shared=True, mean=True)), "beit", "pooler"
    ),
    "dinov2": Family(lambda: t.Dinov2Model(t.Dinov2Config(**_DINO)), "bit", "pooler"),
    "dinov2_head": Family(
        lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**_DINO, **_LABELS, use_swiglu_ffn=True)), "bit", "pooler"
    ),
    "dinov2_registers": Family(
        lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**_DINO, num_register_tokens=3)), "bit", "pooler"
    ),
    "dinov3": Family(lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**_VIT, num_register_tokens=2)), "dinov3", "pooler"),
    "dinov3_convnext": Family(lambda: t.DINOv3ConvNextModel(t.DINOv3ConvNextConfig(**_CONV)), "dinov3", "pooler"),
    "clip": Family(lambda: t.CLIPModel(_clip_config()), "clip", "projection"),
    "clip_vision": Family(lambda: t.CLIPVisionModel(_clip_config().vision_config), "clip", "pooler"),
    "clip_vision_projection": Family(
        lambda: t.CLIPVisionModelWithProjection(_clip_config().vision_config), "clip", "projection"
    ),
    "siglip": Family(lambda: t.SiglipModel(_siglip_config()), "siglip", "projection"),
    "siglip_vision": Family(lambda: t.SiglipVisionModel(_siglip_config().vision_config), "siglip", "pooler"),
    "swin": Family(lambda: t.SwinForImageClassification(t.SwinConfig(**_SWIN, **_LABELS)), "vit", "pooler"),
    "swinv2": Family(lambda: t.Swinv2Model(t.Swinv2Config(**_SWIN)), "vit", "pooler"),
    "vit_mae": Family(
        lambda: t.ViTMAEForPreTraining(
            t.ViTMAEConfig(
                **_VIT,
                decoder_hidden_size=16,
                decoder_num_hidden_layers=1,
                decoder_num_attention_heads=2,
                decoder_intermediate_size=32,
            )
        ),
        "vit",
        "cls",
    ),
    "vit_msn": Family(lambda: t.ViTMSNModel(t.ViTMSNConfig(**_VIT)), "vit", "cls"),
    "ijepa": Family(lambda: t.IJepaForImageClassification(t.IJepaConfig(**_VIT, **_LABELS)), "vit", "mean"),
    "convnext": Family(
        lambda: t.ConvNextForImageClassification(t.ConvNextConfig(**_CONV, **_LABELS)), "convnext", "pooler"
    ),
    "convnextv2": Family(lambda: t.ConvNextV2Model(t.ConvNextV2Config(**_CONV)), "convnext", "pooler"),
}


def roughen(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every weight anew, large enough that the function is visibly curved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            last = name.split(".")[-1]
            if weight.ndim >= 2 and last in ("weight", "in_proj_weight"):
                weight.copy_(1.5 * noise / weight[0].numel() ** 0.5)
            elif last in ("weight", "lambda_1", "lambda_2", "lambda1", "layer_scale_parameter", "gamma"):
                weight.copy_(1.0 + 0.2 * noise)
            elif weight.ndim > 0:
                weight.copy_(0.3 * noise)


def save(name: str, folder: Path, *, processor: str | None = None) -> Path:
    """Save the tiny checkpoint `name` into `folder` and return it."""
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family.make()
    roughen(model)
    model.save_pretrained(folder)
    settings = PROCESSORS[processor or family.processor]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
