"""Turn PIL images into pixels in [0, 1] with the checkpoint's own image processor, and normalise them.

The processor's resize and crop run unchanged, on 8-bit values. Its (x − mean) / std is computed here, so that the
encoder is a differentiable function of pixels in [0, 1]. On probe images both parts together must equal the processor.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from hf_equiv.formatting import excerpt
from hf_equiv.limits import MAX_PIXELS
from hf_equiv.models.checkpoint import Checkpoint, quiet

_FILE = "preprocessor_config.json"
_CURE = "Pass pixels (B, 3, H, W) in [0, 1] to the encoder instead."
_OFF_GRID = "DINOv3ViTImageProcessor"  # needs torchvision; rescales before it resizes, so pixels are not k/255
MOST_RESIZED = MAX_PIXELS // 4  # pixels of a resized image; they take 0.4 GiB
_BEFORE = {"do_rescale": False, "do_normalize": False}  # resize and crop only


@dataclass(frozen=True, slots=True)
class Preprocessor:
    """The image processor of one checkpoint."""

    mean: tuple[float, float, float]  # subtracted from each channel, pixels in [0, 1]
    std: tuple[float, float, float]  # divides each channel after that
    size: tuple[int, int] | None  # (H, W) of every preprocessed image; None if this environment cannot preprocess
    refusal: str  # reason why `preprocess` is impossible; empty if it works
    record: str  # the processor's settings and backend as one JSON string
    processor: Any = None  # the transformers image processor; None if it cannot be built here

    def __call__(self, images: Sequence[Image.Image] | Image.Image) -> Tensor:
        """Return the pixels k/255 of the images, (B, 3, H, W) float32."""
        if isinstance(images, Image.Image):
            images = [images]
        for image in images if isinstance(images, Sequence) else [images]:
            if not isinstance(image, Image.Image):
                raise TypeError(
                    f"`images` must be PIL images; got {type(image).__name__}. Use load_images(path)[0].image."
                )
        if not images:
            raise ValueError("`images` must hold at least one image; got none. Pass load_images(path)[0].image.")
        if self.refusal:
            raise ValueError(self.refusal)
        for image in images:
            _refuse_thin(self.processor, *image.size)
        return torch.stack([_to_pixels(self.processor, image) for image in images])


def load_preprocessor(checkpoint: Checkpoint) -> Preprocessor:
    """Read the image processor of `checkpoint`, build it as transformers does here, and check the split."""
    settings = _read_settings(checkpoint)
    name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    processor, refusal = None, ""
    with quiet():
        try:
            processor = checkpoint.load(AutoImageProcessor)
        except Exception as error:
            must = "`preprocess` must run the checkpoint's own image processor;"
            refusal = f"{must} {name or _FILE} cannot be built here ({excerpt(error)}). {_CURE}"
            if "trust_remote_code" in str(error):
                must = f"`trust_remote_code` must be True for '{checkpoint.model_id}':"
                refusal = f"{must} its image processor is Python code of its own. Read that code first. {_CURE}"
            elif name.startswith(_OFF_GRID):
                must = f"{must} DINOv3's exists only for torchvision, which is not usable here."
                refusal = f"{must} Install one for this PyTorch. {_CURE}"
        record = dict(settings if processor is None else processor.to_dict())
        mean, std = _normalisation(record, checkpoint)
        size = None
        if processor is not None:
            size, refusal = _check_split(processor, mean, std)
    record["backend"] = str(getattr(processor, "backend", "none"))
    return Preprocessor(mean, std, size, refusal, json.dumps(record, sort_keys=True, default=str), processor)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (x − mean) / std with mean and std of shape (1, 3, 1, 1), the last step of the image processor."""
    return (pixels - mean) / std


def _refuse_thin(processor: Any, width: int, height: int) -> None:
    """Refuse an image whose short side is resized to many times its length, and the long one with it, to be cropped."""
    size = processor.size or {}
    edge = None if size.get("longest_edge") else size.get("shortest_edge")
    resized = (edge or 0) ** 2 * max(width, height) // min(width, height)
    if resized > max(width * height, MOST_RESIZED):
        raise ValueError(
            f"`images` must not be so long and thin; {width} x {height} would be resized to {resized:,} pixels before "
            f"most are cut off (at most {MOST_RESIZED:,}). Crop the image first."
        )


def _to_pixels(processor: Any, image: Image.Image) -> Tensor:
    if type(processor).__name__.startswith(_OFF_GRID):
        return torch.as_tensor(np.asarray(_run(processor, image, do_normalize=False))).clamp(0, 1)
    values = np.asarray(_run(processor, image, **_BEFORE))
    if values.dtype != np.uint8:  # (3, H, W)
        raise ValueError(f"the image processor must resize 8-bit images to 8-bit images; got {values.dtype}.")
    return torch.from_numpy((values.astype(np.float64) * processor.rescale_factor).astype(np.float32))


def _run(processor: Any, image: Image.Image, **kwargs: Any) -> Any:
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return processor(images=[rgb], **kwargs)["pixel_values"][0]


def _check_split(
    processor: Any, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> tuple[tuple[int, int] | None, str]:
    """Return the output size and "", or None and the reason to refuse."""
    kind = type(processor).__name__
    if not processor.do_rescale or abs(processor.rescale_factor - 1 / 255) > 1e-12:
        factor = processor.rescale_factor if processor.do_rescale else 1
        return None, f"the rescale factor of {kind} must be 1/255, for pixels in [0, 1]; got {factor:.6g}. {_CURE}"
    generator = np.random.default_rng(0)
    sizes = set()
    for width, height in ((61, 43), (37, 59)):
        probe = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        try:
            pixels = _to_pixels(processor, probe)
            whole = torch.as_tensor(np.asarray(_run(processor, probe)))
        except Exception as error:
            told = f"`preprocess` must split {kind} into 8-bit resizing and normalisation; it cannot "
            return None, f"{told}({excerpt(error)}). {_CURE}"
        if pixels.ndim != 3 or pixels.shape[0] != 3 or whole.shape != pixels.shape:
            return None, f"`preprocess` must get one image (3, H, W) from {kind}; got {tuple(whole.shape)}. {_CURE}"
        ours = normalise(pixels, *(torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std)))[0]
        worst = float((ours - whole).abs().max())
        # torchvision fuses the two steps, which rounds differently; the PIL backend must agree to the last bit.
        if worst > (0.0 if getattr(processor, "backend", "pil") == "pil" else 1e-5):
            return None, f"`preprocess` must reproduce {kind} exactly; it differs by up to {worst:.2g}. {_CURE}"
        sizes.add((int(pixels.shape[1]), int(pixels.shape[2])))
    if len(sizes) > 1:
        return None, f"`preprocess` must get one size for all images; {kind} keeps their shape. {_CURE}"
    return sizes.pop(), ""


def _normalisation(
    settings: dict[str, Any], checkpoint: Checkpoint
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    if settings.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if mean is None or std is None:
        raise ValueError(
            f"{_FILE} must state image_mean and image_std; that of '{checkpoint.model_id}' does not. Add them to it."
        )
    mean, std = (tuple(map(float, v if isinstance(v, list | tuple) else [v] * 3)) for v in (mean, std))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(
            f"image_mean and image_std must have 3 values, image_std above 0; got {mean} and {std}. Correct {_FILE}."
        )
    return mean, std


def _read_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    for name in ("processor_config.json", _FILE):
        path = checkpoint.find(name)
        if path is None:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"'{name}' of '{checkpoint.model_id}' must be JSON; {error}. Fetch it again.") from error
        if name == _FILE:
            return dict(content)
        if isinstance(content.get("image_processor"), dict):
            checkpoint.find(_FILE)  # transformers reads both
            return dict(content["image_processor"])
    raise FileNotFoundError(
        f"'{checkpoint.model_id}' must hold {_FILE}: without it the mean and standard deviation that the model expects "
        "are unknown, and a guess would change every number. Copy the file from the checkpoint it was trained from, or "
        "save one with `AutoImageProcessor.save_pretrained(...)`."
    )
