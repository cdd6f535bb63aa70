"""What usual image handling does to a match: JPEG, resizing, blur. Pixels are (3, H, W) in [0, 1], on k/255."""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
from PIL import Image, ImageFilter
from torch import Tensor

from hf_equiv.imagefile import decode_png, encode_png


def jpeg(pixels: Tensor, quality: int) -> Tensor:
    """Save as JPEG (Pillow, its usual 4:2:0 chroma) and read back.

    Args:
        pixels: (3, H, W).
        quality: 1 to 95.

    Returns:
        (3, H, W) on k/255.
    """
    buffer = io.BytesIO()
    _to_image(pixels).save(buffer, "JPEG", quality=quality)
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        return _to_pixels(image.convert("RGB"), pixels)


def resize_and_back(pixels: Tensor, factor: float) -> Tensor:
    """Resize by `factor` (bicubic, Pillow's antialiasing) and back to the size it had."""
    image = _to_image(pixels)
    small = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    again = image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
    return _to_pixels(again, pixels)


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """Blur with a Gaussian of standard deviation `sigma` pixels (Pillow's approximation by box filters)."""
    return _to_pixels(_to_image(pixels).filter(ImageFilter.GaussianBlur(sigma)), pixels)


def round_8bit(pixels: Tensor) -> Tensor:
    """Round to the nearest k/255."""
    return (pixels.clamp(0, 1) * 255).round() / 255


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "JPEG 95": lambda x: jpeg(x, 95),
    "JPEG 75": lambda x: jpeg(x, 75),
    "resize to 90 % and back": lambda x: resize_and_back(x, 0.9),
    "resize to 50 % and back": lambda x: resize_and_back(x, 0.5),
    "Gaussian blur, σ = 1 px": lambda x: blur(x, 1.0),
}
"""By the name that the report gives them."""


def _to_image(pixels: Tensor) -> Image.Image:
    return Image.open(io.BytesIO(encode_png(pixels))).convert("RGB")


def _to_pixels(image: Image.Image, like: Tensor) -> Tensor:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    made = decode_png(buffer.getvalue(), torch.float64 if like.dtype == torch.float64 else torch.float32)
    return made.to(like)
