"""Preprocessing against the image processor that transformers selects in this environment, to the last bit."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import IMAGENET, PROCESSORS, save
from transformers import AutoImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from hf_equiv.data import load_images
from hf_equiv.models.checkpoint import Checkpoint, HubFiles, find_checkpoint, quiet
from hf_equiv.models.encoder import Encoder
from hf_equiv.models.preprocess import Preprocessor, load_preprocessor, normalise


def photo(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth random picture with a hard edge, so that resizing has something to do."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image.paste((250, 3, 120), (0, 0, max(1, width // 3), max(1, height // 2)))
    return image.convert(mode)


PHOTOS = {
    "odd": photo(101, 67),
    "tall": photo(33, 240),
    "wide": photo(301, 35),
    "tiny": photo(5, 7),
    "one pixel": photo(1, 1),
    "grey": photo(90, 90, "L"),
    "palette": photo(64, 50, "P"),
    "cmyk": photo(64, 50, "CMYK"),
}


def checkpoint(folder: Path, settings: dict[str, Any]) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return find_checkpoint(HubFiles(str(folder)))


@pytest.mark.parametrize("name", [n for n in PROCESSORS if n not in ("dinov3", "mobilevit", "efficientnet")])
def test_equals_the_processor_to_the_bit(name: str, tmp_path: Path) -> None:
    preprocess = load_preprocessor(checkpoint(tmp_path, PROCESSORS[name]))
    with quiet():
        processor = AutoImageProcessor.from_pretrained(tmp_path)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocess.scaling.mean, preprocess.scaling.std))
    for kind, image in PHOTOS.items():
        rgb = image.convert("RGB")
        pixels = preprocess(image)
        assert pixels.dtype == torch.float32
        assert tuple(pixels.shape) == (1, 3, *preprocess.size)
        unnormalised = processor(images=rgb, do_normalize=False, return_tensors="pt").pixel_values
        assert torch.equal(pixels, unnormalised), kind
        full = processor(images=rgb, return_tensors="pt").pixel_values
        difference = float((normalise(pixels, mean, std) - full).abs().max())
        assert difference <= (0.0 if processor.backend == "pil" else 1e-5), kind
        grid = (pixels * 255).round() / 255
        assert torch.equal(pixels, grid), kind  # what a PNG gives back
    batch = preprocess([PHOTOS["odd"], PHOTOS["tall"]])
    assert torch.equal(batch[1:], preprocess(PHOTOS["tall"]))
    assert json.loads(preprocess.record)["backend"] == processor.backend


def test_the_grid_is_that_of_a_png() -> None:
    levels = np.arange(256, dtype=np.uint8)
    ours = torch.from_numpy((levels.astype(np.float64) * (1 / 255)).astype(np.float32))
    assert torch.equal(ours, torch.from_numpy(levels).float() / 255)


def test_processor_nested_in_processor_config(tmp_path: Path) -> None:
    point = checkpoint(tmp_path, PROCESSORS["vit"])
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSORS["clip"]}))
    assert load_preprocessor(point).scaling.mean[0] == pytest.approx(0.48145466)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_dinov3_says_why_and_still_normalises(tmp_path: Path) -> None:
    preprocess = load_preprocessor(checkpoint(tmp_path, PROCESSORS["dinov3"]))
    assert preprocess.scaling.mean == (0.485, 0.456, 0.406)
    with pytest.raises(ValueError, match=r"DINOv3's exists only for torchvision, which is not usable here"):
        preprocess(PHOTOS["odd"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_processor_type": "ViTImageProcessor", "do_resize": False}, "one size for all images"),
        (
            {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "size": {"shortest_edge": 32}},
            "one size for all images",
        ),
        ({"image_processor_type": "NoSuchImageProcessor", "image_mean": 0.5, "image_std": 0.5}, "cannot be built here"),
    ],
)
def test_processors_that_cannot_be_reproduced_are_refused(settings: Any, message: str, tmp_path: Path) -> None:
    preprocess = load_preprocessor(checkpoint(tmp_path, settings))
    assert preprocess.size is None
    with pytest.raises(ValueError, match=message):
        preprocess(PHOTOS["odd"])


@pytest.mark.parametrize("name", ["clip", "convnext", "bit", "vit"])
def test_the_cost_follows_the_input_that_counts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess = load_preprocessor(checkpoint(tmp_path, PROCESSORS[name]))
    monkeypatch.setattr("hf_equiv.models.preprocess.MOST_RESIZED", 100_000)
    assert preprocess(photo(60, 1)).shape[1:] == (3, *preprocess.size)
    for size in ((1200, 1), (1, 1200)):
        if name == "vit":  # resizes to a square whatever the shape
            assert preprocess(photo(*size)).shape[1:] == (3, *preprocess.size)
        else:
            with pytest.raises(ValueError, match=rf"so long and thin; {size[0]} x {size[1]} .* Crop the image first"):
                preprocess(photo(*size))


def test_missing_or_useless_file_is_named(tmp_path: Path) -> None:
    point = checkpoint(tmp_path, {"image_processor_type": "NoSuchImageProcessor"})
    with pytest.raises(ValueError, match=r"preprocessor_config.json must state image_mean and image_std"):
        load_preprocessor(point)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"'preprocessor_config.json' of .* must be JSON"):
        load_preprocessor(point)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold preprocessor_config.json: .* Copy the file"):
        load_preprocessor(point)


def test_one_image_in_every_form(tmp_path: Path) -> None:
    preprocess = load_preprocessor(checkpoint(tmp_path, PROCESSORS["vit"]))
    image = PHOTOS["odd"]
    image.save(tmp_path / "odd.png")
    levels = np.asarray(image)
    tensor = torch.from_numpy(levels.copy()).permute(2, 0, 1)
    images = load_images(tmp_path / "odd.png")
    forms = [str(tmp_path / "odd.png"), [tmp_path / "odd.png"], images, images[0], levels, levels[None], levels / 255]
    for form in (*forms, tensor, tensor.float() / 255, tensor[None].double() / 255):
        assert torch.equal(preprocess(form), preprocess(image))
    clear = image.convert("RGBA")
    clear.putalpha(0)
    assert bool((preprocess(clear) == 1).all())  # transparent pixels are laid over white, as in a file


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "`images` must hold at least one image; got none"),
        (7, r"`images\[0\]` must be a path, a PIL image, an array"),
        (torch.zeros(4, 4, 3), r"`images\[0\]` must be a tensor \(3, H, W\); got \(4, 4, 3\)"),
        (np.zeros((3, 4, 5), np.uint8), r"'images\[0\]' must have the shape \(H, W\)"),
        ([np.full((4, 4, 3), 200.0)], r"`images\[0\]` must lie in \[0, 1\], or hold integers"),
        (torch.full((3, 4, 4), torch.nan), r"`images\[0\]` must lie in \[0, 1\]"),
        (torch.full((3, 4, 4), -1), "must have values from 0 to 65535"),
    ],
)
def test_other_forms_are_refused(bad: Any, message: str, tmp_path: Path) -> None:
    preprocess = load_preprocessor(checkpoint(tmp_path, PROCESSORS["vit"]))
    with pytest.raises((TypeError, ValueError), match=message):
        preprocess(bad)


def test_save_writes_what_from_pretrained_reads(tmp_path: Path) -> None:
    with quiet():
        save("deit", tmp_path)
    assert load_preprocessor(find_checkpoint(HubFiles(str(tmp_path)))).size == (32, 32)


CAFFE = {"image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]}
SMALL = {"size": {"height": 64, "width": 64}, "crop_size": {"height": 64, "width": 64}, "max_image_size": 490}
KINDS = sorted({kind["pil"].removesuffix("Pil") for kind in IMAGE_PROCESSOR_MAPPING_NAMES.values() if "pil" in kind})
SCALINGS = {
    "own": {},
    "caffe": {"do_rescale": False, **CAFFE},
    "offset": {"rescale_factor": 1 / 127.5, "rescale_offset": True},
    "bgr": {"do_flip_channel_order": True, "do_normalize": True, **IMAGENET},
    "no rescale and no mean": {"do_rescale": False, "do_normalize": False},
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", ["ViT", "CLIP", "Siglip", "EfficientNet", "MobileViT", "Chameleon", "Segformer"])
def test_the_normalisation_is_that_of_the_processor(kind: str, scaling: str, tmp_path: Path) -> None:
    settings = {"image_processor_type": f"{kind}ImageProcessor", **SMALL, **SCALINGS[scaling]}
    assert_equals_the_processor(load_preprocessor(checkpoint(tmp_path, settings)), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_processor_is_followed_or_refused(kind: str, tmp_path: Path) -> None:
    try:
        preprocess = load_preprocessor(checkpoint(tmp_path, {"image_processor_type": kind, **SMALL}))
    except ValueError as error:
        refusal = str(error)  # neither pixels nor an encoder
    else:
        refusal = preprocess.refusal
        if not refusal:
            assert_equals_the_processor(preprocess, tmp_path)
    assert refusal == "" or re.fullmatch(r"[^\n]* must [^\n]*; [^\n]*\. [^\n]*\.", refusal), refusal


def assert_equals_the_processor(preprocess: Preprocessor, folder: Path) -> None:
    """Compare the pixels and their normalisation with the output of the processor on photos."""
    with quiet():
        processor = AutoImageProcessor.from_pretrained(folder)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess.scaling.mean, preprocess.scaling.std))
    for image in (PHOTOS["odd"], PHOTOS["tall"]):
        whole = torch.tensor(np.array(processor(images=[image])["pixel_values"][0]))
        ours = normalise(preprocess(image)[0], mean, std)
        ours = ours.flip(0) if preprocess.scaling.flipped else ours
        assert float((ours - whole).abs().max()) <= 5e-7 * float(whole.abs().max())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"image_mean": [0.5, 0.5]}, "image_mean and image_std must have 3 values"),
        ({"image_std": [0.5] * 4}, "image_mean and image_std must have 3 values"),
        ({"image_std": 0}, "image_mean and image_std must have 3 values"),
        ({"image_std": [0.2, 0.0, 0.2]}, "image_mean and image_std must have 3 values"),
        ({"image_std": [0.2, -0.2, 0.2]}, "image_mean and image_std must have 3 values"),
        ({"image_mean": "half"}, "image_mean and image_std must have 3 values"),
        ({"image_mean": float("nan")}, "image_mean and image_std must have 3 values"),
        ({"image_mean": None}, "must state image_mean and image_std"),
        ({"size": {"foo": 32}}, "must state image_mean and image_std; .* cannot be built here"),
        ({"size": {"height": 10**6, "width": 10**6}}, r"`size` in .* at most 6,\d+ pixels a side; .* is 1,000,000"),
        ({"rescale_factor": 0}, "must scale each channel by a factor and an offset"),
        ({"rescale_factor": "1/255"}, "must scale each channel by a factor and an offset"),
        ({"rescale_factor": None}, "must scale each channel by a factor and an offset"),
    ],
)
def test_useless_numbers_are_refused_for_encoder_and_pixels(settings: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        load_preprocessor(checkpoint(tmp_path, {"image_processor_type": "ViTImageProcessor", **settings}))


@pytest.mark.parametrize("settings", [{"do_rescale": False}, {"rescale_factor": 1 / 127.5}, {"rescale_offset": True}])
def test_a_processor_that_cannot_be_built_must_ask_for_nothing_unusual(settings: Any, tmp_path: Path) -> None:
    stated = {"image_processor_type": "NoSuchImageProcessor", "image_mean": 0.5, "image_std": 0.5}
    with pytest.raises(
        ValueError, match=r"must rescale by 1/255 and normalise, if its image processor cannot be built"
    ):
        load_preprocessor(checkpoint(tmp_path, {**stated, **settings}))


def test_bgr_reaches_the_encoder_and_its_patches(tmp_path: Path) -> None:
    with quiet():
        plain = Encoder.from_pretrained(save("vit", tmp_path / "rgb"))
        swapped = {"image_processor_type": "MobileViTImageProcessor", "do_center_crop": False}
        folder = save("vit", tmp_path / "bgr")
    (folder / "preprocessor_config.json").write_text(json.dumps({**swapped, "size": {"height": 32, "width": 32}}))
    bgr = Encoder.from_pretrained(folder)
    x = bgr.preprocess(PHOTOS["odd"])
    with torch.no_grad():
        torch.testing.assert_close(bgr(x), plain(x.flip(1) / 2 + 0.5))  # plain maps p to 2p − 1
    assert torch.equal(bgr.patch_weight, plain.patch_weight.flip(1) / 2)
