"""Turn PIL images into pixels in [0, 1] with the checkpoint's own image processor, and normalise them.

The processor's resize and crop run unchanged, on 8-bit values. What it computes after them, from 8-bit values to the
input of the model, is computed here as (x − mean) / std, so that the encoder is a differentiable function of pixels in
[0, 1]. On probe images both parts together must equal the processor. If image_mean and image_std of its settings do not
give its output (another rescale factor, an offset, a second division), mean and std are fitted to it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from hf_equiv.data.image_set import read_images
from hf_equiv.formatting import excerpt
from hf_equiv.limits import MAX_PIXELS
from hf_equiv.models.checkpoint import Checkpoint, quiet

_FILE = "preprocessor_config.json"
_CHOOSE = "Choose another checkpoint, or correct its image processor."
_CURE = "Pass pixels (B, 3, H, W) in [0, 1] to the encoder instead."
_OFF_GRID = "DINOv3ViTImageProcessor"  # needs torchvision; rescales before it resizes, so pixels are not k/255
MOST_RESIZED = MAX_PIXELS // 4  # pixels of a resized image; they take 0.4 GiB
# Switches of processors for the steps after resize and crop: all off, they give 8-bit RGB values.
_AFTER = ("do_rescale", "do_normalize", "do_flip_channel_order", "include_top", "rescale_offset", "offset")
Scale = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Scaling:
    """(x − mean) / std of each channel of pixels in [0, 1], then RGB or BGR."""

    mean: Scale = (0.0, 0.0, 0.0)  # subtracted from each channel, pixels in [0, 1]
    std: Scale = (1.0, 1.0, 1.0)  # divides each channel after that
    flipped: bool = False  # whether the model takes BGR: the channels are reversed after that
    tolerance: float = 0.0  # largest difference from the processor

    def difference(self, pixels: Tensor, whole: Tensor) -> float:
        """Return the largest difference from the output of the processor for these pixels, (..., 3, H, W) both."""
        ours = normalise(pixels, *(torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std)))
        return float(((ours.flip(-3) if self.flipped else ours) - whole).abs().max())


@dataclass(frozen=True, slots=True)
class Preprocessor:
    """The image processor of one checkpoint."""

    scaling: Scaling  # the last step of the processor, which the encoder takes
    size: tuple[int, int] | None  # (H, W) of every preprocessed image; None if this environment cannot preprocess
    refusal: str  # reason why `preprocess` is impossible; empty if it works
    record: str  # the processor's settings and backend as one JSON string
    processor: Any = None  # the transformers image processor; None if it cannot be built here

    def __call__(self, images: Any) -> Tensor:
        """Return the pixels k/255 of the images, (B, 3, H, W) float32."""
        pixels = list[Tensor]()
        for image in read_images(images):
            if self.refusal:
                raise ValueError(self.refusal)
            _refuse_thin(self.processor, *image.size)
            pixels.append(_to_pixels(self.processor, image))
        if not pixels:
            raise ValueError("`images` must hold at least one image; got none. Pass load_images(path).")
        return torch.stack(pixels)


def load_preprocessor(checkpoint: Checkpoint) -> Preprocessor:
    """Read the image processor of `checkpoint`, build it as transformers does here, and check the split."""
    settings = _read_settings(checkpoint)
    name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    processor, refusal, why = None, "", ""
    with quiet():
        try:
            processor = checkpoint.load(AutoImageProcessor)
        except Exception as error:
            why = excerpt(error) or type(error).__name__
            must = "`preprocess` must run the checkpoint's own image processor;"
            refusal = f"{must} {name or _FILE} cannot be built here ({why}). {_CURE}"
            if "trust_remote_code" in str(error):
                must = f"`trust_remote_code` must be True for '{checkpoint.model_id}':"
                refusal = f"{must} its image processor is Python code of its own. Read that code first. {_CURE}"
            elif name.startswith(_OFF_GRID):
                must = f"{must} DINOv3's exists only for torchvision, which is not usable here."
                refusal = f"{must} Install one for this PyTorch. {_CURE}"
        if processor is not None:
            return split_processor(processor, checkpoint)
    record = json.dumps(settings | {"backend": "none"}, sort_keys=True, default=str)
    return Preprocessor(_stated(settings, checkpoint, why), None, refusal, record)


def split_processor(processor: Any, checkpoint: Checkpoint) -> Preprocessor:
    """Split an image processor of transformers into its 8-bit part and a scaling, or note why that is impossible."""
    record = dict(processor.to_dict())
    _refuse_huge(record, checkpoint)
    scaling, square = _measure(processor, record, checkpoint)
    size, refusal = _check_split(processor, scaling, square)
    record["backend"] = str(getattr(processor, "backend", "none"))
    return Preprocessor(scaling, size, refusal, json.dumps(record, sort_keys=True, default=str), processor)


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


def _refuse_huge(settings: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse a processor that enlarges every image beyond memory."""
    for name in ("size", "crop_size", "pad_size"):
        sides = settings.get(name)
        side = max([s for s in sides.values() if isinstance(s, int)] if isinstance(sides, dict) else [], default=0)
        if side**2 > MOST_RESIZED:
            raise ValueError(
                f"`{name}` in {_FILE} must be at most {math.isqrt(MOST_RESIZED):,} pixels a side; that of "
                f"'{checkpoint.model_id}' is {side:,}. Correct it."
            )


def _to_pixels(processor: Any, image: Image.Image) -> Tensor:
    if type(processor).__name__.startswith(_OFF_GRID):
        return torch.as_tensor(np.asarray(_run(processor, image, do_normalize=False))).clamp(0, 1)
    known = getattr(getattr(processor, "valid_kwargs", None), "__annotations__", _AFTER[:2])
    values = np.asarray(_run(processor, image, **{name: False for name in _AFTER if name in known}))
    if values.dtype != np.uint8:  # (3, H, W)
        raise ValueError(f"the image processor must resize 8-bit images to 8-bit images; got {values.dtype}.")
    return torch.from_numpy((values.astype(np.float64) * (1 / 255)).astype(np.float32))


def _run(processor: Any, image: Image.Image, **kwargs: Any) -> Any:
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return processor(images=[rgb], **kwargs)["pixel_values"][0]


def _measure(processor: Any, settings: dict[str, Any], checkpoint: Checkpoint) -> tuple[Scaling, torch.Size]:
    """Return the scaling that gives the output of the processor on a square image, and the shape of its pixels."""
    kind = type(processor).__name__
    must = f"the image processor of '{checkpoint.model_id}' must scale each channel by a factor and an offset; {kind}"
    plausible = [Scaling()]
    if getattr(processor, "do_normalize", False):
        plausible.insert(0, _stated(settings, checkpoint))
    try:
        pixels, whole = _halves(processor, _noise(48, 48))  # square: no processor pads it
        plain = _to_pixels(processor, Image.new("RGB", (48, 48), (204, 102, 51)))
        colour = plain[..., plain.shape[-2] // 2, plain.shape[-1] // 2].reshape(-1, 3)[0]
        kept = whole.shape == pixels.shape and torch.allclose(colour, torch.tensor([0.8, 0.4, 0.2]), atol=1e-3)
    except Exception as error:
        raise ValueError(f"{must} cannot ({excerpt(error)}). Choose another checkpoint, or correct {_FILE}.") from error
    if not kept:
        raise ValueError(f"{must} makes {tuple(whole.shape)} of one image, or other colours. {_CHOOSE}")
    exact = 0.0 if getattr(processor, "backend", "pil") == "pil" else 1e-5  # torchvision fuses and rounds differently
    candidates = [replace(one, tolerance=exact, flipped=flipped) for one in plausible for flipped in (False, True)]
    candidates += [_fit(pixels, whole, flipped) for flipped in (False, True)]
    for scaling in candidates:
        if min(scaling.std) > 0 and scaling.difference(pixels, whole) <= scaling.tolerance:
            return scaling, pixels.shape
    raise ValueError(f"{must} does more than that. {_CHOOSE}")


def _halves(processor: Any, image: Image.Image) -> tuple[Tensor, Tensor]:
    """Return the pixels of an image and the output of the processor, (..., 3, H, W) both."""
    return _to_pixels(processor, image), torch.from_numpy(np.array(_run(processor, image)))


def _fit(pixels: Tensor, whole: Tensor, flipped: bool) -> Scaling:
    """Return the mean and std of each channel by least squares of whole = (pixels − mean) / std."""
    whole = whole.flip(-3) if flipped else whole
    x, y = (values.double().transpose(0, -3).reshape(3, -1) for values in (pixels, whole))
    x_mean, y_mean = x.mean(dim=1, keepdim=True), y.mean(dim=1, keepdim=True)
    slope = ((x - x_mean) * (y - y_mean)).sum(dim=1) / (x - x_mean).square().sum(dim=1)
    mean, std = (x_mean[:, 0] - y_mean[:, 0] / slope).tolist(), (1 / slope).tolist()
    return Scaling((*mean,), (*std,), flipped, tolerance=1e-6 * float(whole.abs().max()))


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _check_split(processor: Any, scaling: Scaling, square: torch.Size) -> tuple[tuple[int, int] | None, str]:
    """Return the output size and "", or None and the reason to refuse."""
    kind = type(processor).__name__
    try:
        pixels, whole = _halves(processor, _noise(37, 59))
    except Exception as error:
        told = f"`preprocess` must split {kind} into 8-bit resizing and normalisation; it cannot "
        return None, f"{told}({excerpt(error)}). {_CURE}"
    if pixels.ndim != 3 or whole.shape != pixels.shape:
        return None, f"`preprocess` must get one image (3, H, W) from {kind}; got {tuple(whole.shape)}. {_CURE}"
    if pixels.shape != square:
        return None, f"`preprocess` must get one size for all images; {kind} keeps their shape. {_CURE}"
    worst = scaling.difference(pixels, whole)
    if not worst <= scaling.tolerance:
        return None, f"`preprocess` must reproduce {kind} exactly; it differs by up to {worst:.2g}. {_CURE}"
    return (int(square[1]), int(square[2])), ""


def _stated(settings: dict[str, Any], checkpoint: Checkpoint, unbuilt: str = "") -> Scaling:
    """Return the scaling by image_mean and image_std; settings of an `unbuilt` processor must ask for nothing else."""
    other = [name for name in _AFTER[2:] if settings.get(name)]
    factor = 1 if settings.get("do_rescale") is False else settings.get("rescale_factor", 1 / 255)
    if unbuilt and (other or not (isinstance(factor, int | float) and abs(factor - 1 / 255) <= 1e-12)):
        asked = " and ".join([f"a factor of {factor!r:.40}", *other])
        raise ValueError(
            f"{_FILE} must rescale by 1/255 and normalise, if its image processor cannot be built here; that of "
            f"'{checkpoint.model_id}' asks for {asked}. {_CHOOSE}"
        )
    if settings.get("do_normalize") is False:
        return Scaling()
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if mean is None or std is None:
        raise ValueError(
            f"{_FILE} must state image_mean and image_std; that of '{checkpoint.model_id}' does not"
            f"{f', and its image processor cannot be built here ({unbuilt})' * bool(unbuilt)}. Correct it."
        )
    try:
        values = [tuple(map(float, v if isinstance(v, list | tuple) else [v] * 3)) for v in (mean, std)]
        fits = len(values[0]) == len(values[1]) == 3 and min(values[1]) > 0 and all(map(math.isfinite, sum(values, ())))
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"image_mean and image_std must have 3 values, image_std above 0; got {mean!r:.80} and {std!r:.80}. "
            f"Correct {_FILE}."
        )
    return Scaling(values[0], values[1])  # type: ignore[arg-type]


def _read_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    for name in ("processor_config.json", _FILE):
        path = checkpoint.find(name)
        if path is None:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"'{name}' of '{checkpoint.model_id}' must be JSON; {error}. Fetch it again.") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"'{name}' of '{checkpoint.model_id}' must be a JSON object; got {type(content).__name__}."
            )
        if name == _FILE:
            return content
        if isinstance(content.get("image_processor"), dict):
            checkpoint.find(_FILE)  # transformers reads both
            return dict(content["image_processor"])
    raise FileNotFoundError(
        f"'{checkpoint.model_id}' must hold {_FILE}: without it the mean and standard deviation that the model expects "
        "are unknown, and a guess would change every number. Copy the file from the checkpoint it was trained from, or "
        "save one with `AutoImageProcessor.save_pretrained(...)`."
    )
