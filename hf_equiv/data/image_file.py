"""Read an image file as upright RGB, or explain its fault; write and read PNG on the k/255 grid."""

from __future__ import annotations

import hashlib
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 178_956_970  # most pixels decoded (0.7 GiB), which is also Pillow's limit
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .bmp .gif .webp .tif .tiff .ppm .pgm .pnm .avif".split())
_LIMIT_LOCK = threading.Lock()


def open_image(
    source: str | Path | bytes, name: str | None = None, *, sha256: str | None = None, most_pixels: int | None = None
) -> Image.Image:
    """Read a file, or the bytes of one, as upright 8-bit RGB without metadata; `name` is its name in messages."""
    # Grey, palette and CMYK become RGB; transparency is laid over white; 16-bit grey is scaled to 8 bit (value / 257,
    # rounded); the EXIF orientation is applied; an animation gives its first frame. A JPEG above `most_pixels` is
    # decoded at 1/2, 1/4 or 1/8 of its size; other formats above it are refused before any pixel is decoded.
    data, name = _read(source, name, sha256)
    try:
        with _pillow_limit_off(), Image.open(io.BytesIO(data)) as image:
            return _decode(image, name, most_pixels or MAX_PIXELS)
    except UnidentifiedImageError:
        told = f"image {name!r} must be an image that Pillow reads; got {len(data):,} bytes of something else"
        raise ValueError(f"{told}. Convert it to PNG or JPEG.") from None
    except (OSError, SyntaxError, EOFError, IndexError, ArithmeticError) as error:
        raise ValueError(f"image {name!r} is damaged or truncated ({error}). Copy or download it again.") from error


def _read(source: str | Path | bytes, name: str | None, sha256: str | None) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        name, data = name or "image", source
    else:
        path = Path(source)
        name = name or path.name
        if path.is_dir():
            raise ValueError(f"{name!r} must be an image file; got a folder. Name a file inside it.")
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"image file {name!r} does not exist. Check the path.") from None
        except OSError as error:
            raise ValueError(f"image file {name!r} cannot be read: {error.strerror}. Check its permissions.") from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(
            f"image file {name!r} must not change while it is used; it has changed since the images were listed. Put "
            "it back and run the same command again, or begin a new run with the photos as they are."
        )
    if not data:
        raise ValueError(f"image {name!r} must hold an image; got an empty file (0 bytes). Copy or download it again.")
    return data, name


def encode_png(pixels: Tensor) -> bytes:
    """Write pixels (3, H, W) in [0, 1] as PNG bytes, each value rounded to the nearest k/255."""
    levels = (pixels.detach().to("cpu", torch.float64) * 255.0).round().clamp(0, 255).to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy(), mode="RGB").save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def decode_png(data: bytes, dtype: torch.dtype = torch.float32) -> Tensor:
    """Read PNG bytes of mode RGB back to pixels (3, H, W) of `dtype`, values k/255."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, levels = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"a stored image must be a PNG; it cannot be decoded: {error}") from error
    if mode != "RGB" or levels.dtype != np.uint8:
        raise ValueError(f"a stored image must be an 8-bit RGB PNG; got mode {mode}.")
    return torch.from_numpy(levels).permute(2, 0, 1).contiguous().to(dtype) / 255


@contextmanager
def _pillow_limit_off() -> Iterator[None]:
    # `_decode` checks the size. Pillow would refuse large JPEG files at opening, but they are decoded smaller.
    with _LIMIT_LOCK:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _decode(image: Image.Image, name: str, most: int) -> Image.Image:
    width, height = image.size
    if width * height > most and image.format == "JPEG":
        scale = next((s for s in (2, 4, 8) if (width // s) * (height // s) <= most), 8)
        image.draft("RGB", (width // scale, height // scale))
    if image.size[0] * image.size[1] > most:
        told = f"image {name!r} must have at most {most:,} pixels; got {width} x {height}"
        raise ValueError(f"{told}. Shrink it first: encoders look at a few hundred pixels a side.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd EXIF and palette transparency, which are handled below
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if mode.startswith("I"):  # I;16, I;16B, I;16L, or I: 32-bit integers, which 16-bit PGM and some TIFF files become
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            told = f"image {name!r} must have values from 0 to 65535; got {low} to {high} (mode {mode})"
            raise ValueError(f"{told}. Scale it to 8 or 16 bit first.")
        levels = np.rint(values.astype(np.float64) / 257.0).astype(np.uint8)
        return Image.fromarray(levels, mode="L").convert("RGB")
    if mode == "F":
        raise ValueError(f"image {name!r} must hold integers; got floating point (mode F). Scale it to 8 bit first.")
    if image.has_transparency_data or mode in ("RGBa", "La"):
        front = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", front.size, (255, 255, 255, 255)), front).convert("RGB")
    try:
        rgb = image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"image {name!r} of mode {mode} has no RGB form ({error}). Convert it to RGB.") from error
    rgb.info = {}
    return rgb
