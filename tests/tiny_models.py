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
    "mobilevit": {  # BGR in [0, 1]
        "image_processor_type": "MobileViTImageProcessor",
        "size": {"shortest_edge": 37},
        "crop_size": {"height": SIZE, "width": SIZE},
    },
    "efficientnet": {  # divides by the standard deviation twice
        "image_processor_type": "EfficientNetImageProcessor",
        **SQUARE,
        **IMAGENET,
    },
    "vit_64": {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}},
}


@dataclass(frozen=True)
class Family:
    """How to make one tiny checkpoint, and which readout `auto` must choose."""

    make: Callable[[], Any]
    processor: str
    auto: str
    before: int = 0  # tokens before the patch tokens, the first of them the class token
    after: int = 0  # tokens after them
    part: str = ""  # attribute of the model that holds the image encoder


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


def _two_towers(kind: Any, vision: dict[str, Any] | None = None, **text: Any) -> Any:
    towers = {"text_config": {**_TEXT, **text}, "vision_config": {**_VIT, "projection_dim": 16, **(vision or {})}}
    return kind(**towers, projection_dim=16)


def _without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in _VIT.items() if name not in names}


_NET = {"depths": [1] * 4, "hidden_sizes": [8, 16, 24, 32], **_LABELS}
_PYRAMID = {**_NET, "num_attention_heads": [1, 2, 2, 2]}
_LEVIT = {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2] * 3, "depths": [1] * 3, **_LABELS}
_MOBILE = {"image_size": SIZE, "depth_multiplier": 0.25, **_LABELS}
_HGNET = {
    "stem_channels": [3, 8, 16],
    "stage_in_channels": [16, 16, 24, 32],
    "stage_mid_channels": [8] * 4,
    "stage_out_channels": [16, 24, 32, 32],
    "stage_num_blocks": [1] * 4,
    "stage_numb_of_layers": [2] * 4,
    "hidden_sizes": [16, 24, 32, 32],
    "depths": [1] * 4,
}
_HIERA = {
    "embed_dim": 8,
    "image_size": [SIZE, SIZE],
    "patch_size": [3, 3],
    "patch_stride": [2, 2],
    "patch_padding": [1, 1],
    "depths": [1] * 4,
    "num_heads": [1, 1, 2, 2],
}
_EFFICIENT = {
    "image_size": SIZE,
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "kernel_sizes": [3, 5],
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2],
    "hidden_dim": 1280,
}
_SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 8,
    "window_size": 2,
    "global_attn_indexes": [1],
    "mlp_dim": 64,
    "num_pos_feats": 8,
}
_TEXTNET = {
    "stem_out_channels": 8,
    "hidden_sizes": [8, 8, 16, 16, 32],
    "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3]], [[3, 1]], [[1, 3]]],
    "conv_layer_strides": [[1], [2], [2], [2]],
}
_FOCAL = {"embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]}
_NAFLEX = {**_without("image_size"), "num_patches": 16}

MORE_FAMILIES: dict[str, Family] = {
    "resnet": Family(
        lambda: t.ResNetForImageClassification(t.ResNetConfig(embedding_size=8, **_NET)),
        "convnext",
        "pooler",
        part="resnet",
    ),
    "regnet": Family(
        lambda: t.RegNetForImageClassification(t.RegNetConfig(embedding_size=8, groups_width=8, **_NET)),
        "convnext",
        "pooler",
        part="regnet",
    ),
    "bit": Family(
        lambda: t.BitForImageClassification(t.BitConfig(embedding_size=8, num_groups=4, **_NET)),
        "bit",
        "pooler",
        part="bit",
    ),
    "mobilenet_v1": Family(
        lambda: t.MobileNetV1ForImageClassification(t.MobileNetV1Config(**_MOBILE)),
        "vit",
        "pooler",
        part="mobilenet_v1",
    ),
    "mobilenet_v2": Family(
        lambda: t.MobileNetV2ForImageClassification(t.MobileNetV2Config(**_MOBILE)),
        "vit",
        "pooler",
        part="mobilenet_v2",
    ),
    "mobilevit": Family(
        lambda: t.MobileViTForImageClassification(
            t.MobileViTConfig(
                image_size=SIZE,
                hidden_sizes=[16, 24, 32],
                neck_hidden_sizes=[8, 8, 16, 24, 24, 32, 32],
                num_attention_heads=2,
                **_LABELS,
            )
        ),
        "mobilevit",
        "pooler",
        part="mobilevit",
    ),
    "mobilevitv2": Family(
        lambda: t.MobileViTV2ForImageClassification(
            t.MobileViTV2Config(
                image_size=64, n_attn_blocks=[1] * 3, base_attn_unit_dims=[16, 16, 32], width_multiplier=0.25, **_LABELS
            )
        ),
        "vit_64",
        "pooler",
        part="mobilevitv2",
    ),
    "efficientnet": Family(
        lambda: t.EfficientNetForImageClassification(t.EfficientNetConfig(**_EFFICIENT, **_LABELS)),
        "efficientnet",
        "pooler",
        part="efficientnet",
    ),
    "hgnet_v2": Family(lambda: t.HGNetV2ForImageClassification(t.HGNetV2Config(**_HGNET, **_LABELS)), "vit", "mean"),
    "pp_lcnet": Family(
        lambda: t.PPLCNetForImageClassification(t.PPLCNetConfig(scale=0.25, class_expand=32, **_LABELS)), "vit", "mean"
    ),
    "textnet": Family(
        lambda: t.TextNetForImageClassification(t.TextNetConfig(**_TEXTNET, **_LABELS)), "vit", "pooler", part="textnet"
    ),
    "focalnet": Family(
        lambda: t.FocalNetForImageClassification(t.FocalNetConfig(image_size=SIZE, **_FOCAL, **_LABELS)),
        "bit",
        "pooler",
        part="focalnet",
    ),
    "poolformer": Family(
        lambda: t.PoolFormerForImageClassification(t.PoolFormerConfig(**_NET)), "vit", "mean", part="poolformer"
    ),
    "swiftformer": Family(
        lambda: t.SwiftFormerForImageClassification(
            t.SwiftFormerConfig(image_size=SIZE, depths=[1] * 4, embed_dims=[8, 16, 24, 32], **_LABELS)
        ),
        "vit",
        "mean",
        part="swiftformer",
    ),
    "segformer": Family(
        lambda: t.SegformerForImageClassification(t.SegformerConfig(**_PYRAMID)), "vit", "mean", part="segformer"
    ),
    "segformer_segmentation": Family(
        lambda: t.SegformerForSemanticSegmentation(t.SegformerConfig(decoder_hidden_size=16, **_PYRAMID)),
        "vit",
        "mean",
        part="segformer",
    ),
    "pvt": Family(
        lambda: t.PvtForImageClassification(t.PvtConfig(image_size=SIZE, **_PYRAMID)),
        "vit",
        "cls",
        before=1,
        part="pvt",
    ),
    "pvt_v2": Family(
        lambda: t.PvtV2ForImageClassification(t.PvtV2Config(image_size=SIZE, **_PYRAMID)), "vit", "mean", part="pvt_v2"
    ),
    "cvt": Family(
        lambda: t.CvtForImageClassification(
            t.CvtConfig(embed_dim=[8, 16, 32], num_heads=[1, 2, 2], depth=[1, 2, 3], **_LABELS)
        ),
        "convnext",
        "mean",
        part="cvt",
    ),
    "levit": Family(
        lambda: t.LevitForImageClassification(t.LevitConfig(key_dim=[8] * 3, **_LEVIT)),
        "vit_64",
        "pooler",
        part="levit",
    ),
    "levit_teacher": Family(
        lambda: t.LevitForImageClassificationWithTeacher(t.LevitConfig(key_dim=[8] * 3, **_LEVIT)),
        "vit_64",
        "pooler",
        part="levit",
    ),
    "hiera": Family(
        lambda: t.HieraForImageClassification(t.HieraConfig(**_HIERA, **_LABELS)), "bit", "pooler", part="hiera"
    ),
    "donut_swin": Family(
        lambda: t.DonutSwinForImageClassification(t.DonutSwinConfig(**_SWIN, **_LABELS)), "vit", "pooler", part="donut"
    ),
    "swin2sr": Family(
        lambda: t.Swin2SRModel(
            t.Swin2SRConfig(image_size=SIZE, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ),
        "vit",
        "mean",
    ),
    "dpt": Family(lambda: t.DPTModel(t.DPTConfig(**_VIT, backbone_out_indices=[0, 1])), "vit", "pooler", before=1),
    "yolos": Family(
        lambda: t.YolosForObjectDetection(
            t.YolosConfig(**_without("image_size"), image_size=[SIZE, SIZE], num_detection_tokens=4)
        ),
        "vit",
        "cls",
        before=1,
        after=4,
        part="vit",
    ),
    "vitdet": Family(
        lambda: t.VitDetModel(t.VitDetConfig(**_without("intermediate_size"), pretrain_image_size=SIZE)), "vit", "mean"
    ),
    "sam_vision": Family(lambda: t.SamVisionModel(t.SamVisionConfig(**_SAM)), "vit", "mean"),
    "pixio": Family(
        lambda: t.PixioModel(t.PixioConfig(**_without("intermediate_size"), n_cls_tokens=3)), "bit", "pooler", before=3
    ),
    "internvl_vision": Family(
        lambda: t.InternVLVisionModel(
            t.InternVLVisionConfig(
                **_without("image_size", "patch_size"), image_size=[SIZE, SIZE], patch_size=[8, 8], norm_type="rms_norm"
            )
        ),
        "vit",
        "cls",
        before=1,
    ),
    "mlcd": Family(lambda: t.MLCDVisionModel(t.MLCDVisionConfig(**_VIT)), "clip", "pooler", before=1),
    "aimv2_vision": Family(lambda: t.Aimv2VisionModel(t.Aimv2VisionConfig(**_VIT)), "clip", "pooler"),
    "aimv2": Family(lambda: t.Aimv2Model(_two_towers(t.Aimv2Config)), "clip", "projection"),
    "clip_head": Family(
        lambda: t.CLIPForImageClassification(t.CLIPConfig(text_config=_TEXT, vision_config=_VIT, **_LABELS)),
        "clip",
        "pooler",
        before=1,
        part="vision_model",
    ),
    "siglip_head": Family(
        lambda: t.SiglipForImageClassification(
            t.SiglipConfig(text_config={**_TEXT, "projection_size": 32}, vision_config=_VIT, **_LABELS)
        ),
        "siglip",
        "pooler",
        part="vision_model",
    ),
    "clipseg": Family(lambda: t.CLIPSegModel(_two_towers(t.CLIPSegConfig)), "vit", "projection", before=1),
    "altclip": Family(
        lambda: t.AltCLIPModel(_two_towers(t.AltCLIPConfig, project_dim=32)), "clip", "projection", before=1
    ),
    "chinese_clip": Family(
        lambda: t.ChineseCLIPModel(_two_towers(t.ChineseCLIPConfig)), "clip", "projection", before=1
    ),
    "metaclip_2": Family(lambda: t.MetaClip2Model(_two_towers(t.MetaClip2Config)), "clip", "projection", before=1),
    "metaclip_2_vision": Family(
        lambda: t.MetaClip2VisionModel(_two_towers(t.MetaClip2Config).vision_config), "clip", "pooler", before=1
    ),
    "blip": Family(lambda: t.BlipModel(_two_towers(t.BlipConfig)), "vit", "projection", before=1),
    "blip_caption": Family(
        lambda: t.BlipForConditionalGeneration(_two_towers(t.BlipConfig)),
        "vit",
        "pooler",
        before=1,
        part="vision_model",
    ),
    "blip_vision": Family(
        lambda: t.BlipVisionModel(_two_towers(t.BlipConfig).vision_config), "vit", "pooler", before=1
    ),
    "owlvit": Family(lambda: t.OwlViTModel(_two_towers(t.OwlViTConfig)), "clip", "projection", before=1),
    "owlvit_vision": Family(
        lambda: t.OwlViTVisionModel(_two_towers(t.OwlViTConfig).vision_config), "clip", "pooler", before=1
    ),
    "flava_image": Family(lambda: t.FlavaImageModel(t.FlavaImageConfig(**_VIT)), "vit", "pooler", before=1),
}

_BACKBONE = {
    "image_size": SIZE,
    "embed_dim": 16,
    "depths": [1] * 4,
    "num_heads": [1] * 4,
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_WIDTHS = {"hidden_dim": 32, "num_attention_heads": 4, "encoder_feedforward_dim": 16, "dim_feedforward": 16}
_FORMER = {**_WIDTHS, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 4}


def _swin_backbone() -> Any:
    return t.SwinConfig(**_BACKBONE)


# Models that embed no single image, and the reason that the user must read.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "siglip2": (
        lambda: t.Siglip2VisionModel(t.Siglip2VisionConfig(**_NAFLEX)),
        "needs pixel_attention_mask and spatial_shapes beside the pixels",
    ),
    "siglip2_head": (
        lambda: t.Siglip2ForImageClassification(t.Siglip2Config(text_config=_TEXT, vision_config=_NAFLEX, **_LABELS)),
        "needs pixel_attention_mask and spatial_shapes beside the pixels",
    ),
    "videomae": (
        lambda: t.VideoMAEModel(t.VideoMAEConfig(**_VIT, num_frames=4)),
        "which takes videos of 4 frames",
    ),
    "vivit": (
        lambda: t.VivitModel(t.VivitConfig(**_without("patch_size"), tubelet_size=[2, 8, 8], num_frames=4)),
        "which takes videos of 4 frames",
    ),
    "timesformer": (
        lambda: t.TimesformerModel(t.TimesformerConfig(**_VIT, num_frames=4)),
        "which takes videos of 4 frames",
    ),
    "sam": (
        lambda: t.SamModel(
            t.SamConfig(
                vision_config=_SAM,
                prompt_encoder_config={"hidden_size": 16, "image_size": SIZE, "patch_size": 8},
                mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2},
            )
        ),
        "SamModel gives iou_scores, pred_masks",
    ),
    "sam2_vision": (
        lambda: t.Sam2VisionModel(
            t.Sam2VisionConfig(
                backbone_config=t.Sam2HieraDetConfig(
                    hidden_size=8,
                    blocks_per_stage=[1] * 4,
                    global_attention_blocks=[],
                    embed_dim_per_stage=[8, 16, 24, 32],
                    num_attention_heads_per_stage=[1, 2, 3, 4],
                ),
                backbone_channel_list=[32, 24, 16, 8],
                fpn_hidden_size=8,
            )
        ),
        r"gives \(2, 1, 1, 32\), channels last",
    ),
    "mask2former": (
        lambda: t.Mask2FormerModel(
            t.Mask2FormerConfig(backbone_config=_swin_backbone(), feature_size=32, mask_feature_size=32, **_FORMER)
        ),
        "Mask2FormerModel gives encoder_last_hidden_state, pixel_decoder_last_hidden_state",
    ),
    "oneformer": (
        lambda: t.OneFormerModel(
            t.OneFormerConfig(
                backbone_config=_swin_backbone(),
                conv_dim=32,
                mask_dim=32,
                text_encoder_width=32,
                text_encoder_vocab_size=40,
                **_FORMER,
            )
        ),
        "needs task_inputs beside the pixels",
    ),
    "seggpt": (
        lambda: t.SegGptModel(
            t.SegGptConfig(
                **_without("image_size", "intermediate_size"),
                image_size=[64, SIZE],
                pretrain_image_size=SIZE,
                decoder_hidden_size=8,
                intermediate_hidden_state_indices=[0, 1],
                merge_index=0,
            )
        ),
        "needs prompt_pixel_values and prompt_masks beside the pixels",
    ),
    "flava": (
        lambda: t.FlavaModel(
            t.FlavaConfig(
                image_config=_VIT, text_config=_TEXT, multimodal_config=_VIT, hidden_size=32, projection_dim=16
            )
        ),
        r"whose first input is `input_ids` \(its image tower is `image_model`: save that alone\)",
    ),
    "detr": (
        lambda: t.DetrModel(
            t.DetrConfig(
                backbone_config=t.ResNetConfig(embedding_size=8, out_features=["stage4"], **_NET),
                use_timm_backbone=False,
                d_model=16,
                num_queries=4,
                encoder_layers=1,
                decoder_layers=1,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
            )
        ),
        "whose hidden states are those of its decoder",
    ),
    "llava": (
        lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(
                vision_config=t.CLIPVisionConfig(**_VIT),
                text_config=t.LlamaConfig(
                    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
                ),
            )
        ),
        "whose first input is `input_ids`",
    ),
    "pixtral": (
        lambda: t.PixtralVisionModel(t.PixtralVisionConfig(**_VIT, head_dim=16)),
        "PixtralVisionModel joins the images of a batch",
    ),
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
        for name, state in model.named_buffers():  # of BatchNorm
            if name.endswith("running_mean"):
                state.copy_(0.3 * torch.randn(state.shape, generator=generator))
            elif name.endswith("running_var"):
                state.copy_(0.5 + torch.rand(state.shape, generator=generator))


def build(make: Callable[[], Any]) -> Any:
    """Make a model and draw its weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    roughen(model)
    return model.eval()


def save(name: str, folder: Path, *, processor: str | None = None) -> Path:
    """Save the tiny checkpoint `name` into `folder` and return it."""
    family = FAMILIES.get(name) or MORE_FAMILIES[name]
    build(family.make).save_pretrained(folder)
    settings = PROCESSORS[processor or family.processor]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def save_dual(folder: Path) -> Path:
    """Save a tiny VisionTextDualEncoder of a ViT and a BERT, without tokenizer."""
    vision = t.ViTConfig(**_VIT)
    text = t.BertConfig(**{key: value for key, value in _TEXT.items() if key != "projection_dim"})
    config = t.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)
    build(lambda: t.VisionTextDualEncoderModel(config)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS["vit"]), encoding="utf-8")
    return folder
