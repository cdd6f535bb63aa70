"""Read an image file as upright RGB, or explain its fault; write and read PNG on the k/255 grid.

Every image of this package is decoded here. Only the decoders of `FORMATS` run: others start programs, as that of EPS
does, or read formats that are no photos. Stored images are PNG files that hold pixels alone.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from hf_equiv.limits import MAX_BYTES, MAX_PIXELS
from hf_equiv.png_file import SIGNATURE, check_png, chunks

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF")
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .gif .webp .tif .tiff .jp2 .j2k .jpx .ppm .pgm .pnm .avif".split()
)


class RefusedError(ValueError):
    """An image that is whole but cannot be taken."""


_PILLOW_LOCK = threading.Lock()
_LONGEST_TEXT = 1 << 20
_STRIP = 1 << 22  # pixels that are converted at once


def open_image(
    source: str | Path | bytes, name: str | None = None, *, sha256: str | None = None, most_pixels: int | None = None
) -> Image.Image:
    """Read a file, or the bytes of one, as upright 8-bit RGB without metadata; `name` is its name in messages."""
    # 16-bit grey is scaled to 8 bit (value / 257, rounded). A JPEG above `MAX_PIXELS` is decoded at 1/2, 1/4 or 1/8 of
    # its size; other formats above it, and with `most_pixels` every larger image, are refused before they are decoded.
    data, name = _read(source, name, sha256)
    with _patient_pillow():
        with _explained(data, name):
            image = Image.open(io.BytesIO(_pixel_chunks(data)), formats=FORMATS)
        _fit(image, name, most_pixels)
        with _explained(data, name):
            image.load()
            with suppress(Exception):  # damaged metadata does not spoil the pixels
                ImageOps.exif_transpose(image, in_place=True)
            if data.startswith(SIGNATURE):
                _correct_transparency(image, data)
                if data[24] == 16 and image.mode == "RGB" and not np.asarray(image).any():
                    return to_rgb(_low_bytes(data), name)  # 8-bit levels in a file of 16 bit
        with _explained(data, name):  # Pillow looks at a palette only here
            return to_rgb(image, name)


def open_array(values: Any, name: str) -> Image.Image:
    """Read levels as RGB: integers of shape (H, W) or (H, W, C), of 8 bit if none is above 255, else of 16 bit."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"image {name!r} must have rows of one length. Correct it or leave it out.") from None
    if array.dtype == bool:
        array = array * np.uint8(255)
    if array.dtype.kind not in "iu":
        told = f"image {name!r} must hold whole numbers from 0 to 255, or to 65535; got {array.dtype}"
        raise ValueError(f"{told}. Scale it to 8 bit first.")
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)) or 0 in array.shape:
        told = f"image {name!r} must have the shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); got {array.shape}"
        raise ValueError(f"{told}. Store it in that shape.")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise _too_many_pixels(array.shape[1], array.shape[0], name, MAX_PIXELS)
    low, high = int(array.min()), int(array.max())
    levels = _to_8_bit(array[..., 0] if array.shape[2:] == (1,) else array, low, high, name, array.dtype)
    return to_rgb(Image.fromarray(levels), name)


def _read(source: str | Path | bytes, name: str | None, sha256: str | None) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        name, size = name or "image", len(source)
    else:
        path = Path(source)
        named, name = name or str(path), name or path.name
        if not os.path.exists(path):  # a name may be too long for `Path.exists`
            raise FileNotFoundError(f"image file {named!r} does not exist. Check the path.")
        if not path.is_file():
            kind = "a folder. Name a file inside it" if path.is_dir() else "a device or a pipe. Copy it to a file"
            raise ValueError(f"{name!r} must be an image file; got {kind}.")
        size = path.stat().st_size
    if size > MAX_BYTES:
        told = f"image {name!r} must be a file of at most {MAX_BYTES:,} bytes; got {size:,}"
        raise ValueError(f"{told}. Shrink it first: encoders look at a few hundred pixels a side.")
    try:
        # a file without a size, as those of the kernel, can be endless
        data = source if isinstance(source, bytes) else path.read_bytes() if size else b""
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


def encode_png(pixels: Tensor, effort: int = 6) -> bytes:
    """Write pixels (3, H, W) in [0, 1] as PNG bytes, each value rounded to the nearest k/255; `effort` is zlib's."""
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, "PNG", compress_level=effort)
    return buffer.getvalue()


def to_image(pixels: Tensor) -> Image.Image:
    """Return pixels (3, H, W) in [0, 1] as an image, each value rounded to the nearest k/255."""
    levels = (pixels.detach().to("cpu", torch.float64) * 255.0).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy(), mode="RGB")


def to_levels(image: Image.Image) -> Tensor:
    """Return the levels of an RGB image, (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode_png(data: bytes, dtype: torch.dtype = torch.float32) -> Tensor:
    """Read a stored PNG file back to pixels (3, H, W) of `dtype`, values k/255."""
    levels = to_levels(stored_image(data))
    return torch.empty(levels.shape, dtype=dtype).copy_(levels).div_(255)


def stored_image(data: bytes) -> Image.Image:
    """Open the image of a stored run, a file as `encode_png` writes it."""
    check_png(data)
    with _patient_pillow(), Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        image.load()
    return image


def _pixel_chunks(data: bytes) -> bytes:
    """Leave out the chunks of a PNG file that bear neither on its pixels nor on its rotation; keep other formats."""
    # Pillow refuses a file for a long text, a large profile or a wrong checksum in a chunk that is not needed.
    if not data.startswith(SIGNATURE):
        return data
    kept = (chunk for kind, chunk in chunks(data) if kind == b"tRNS" or kind[:1].isupper() or _turns(chunk))
    return b"".join([SIGNATURE, *kept])


def _turns(chunk: memoryview) -> bool:
    """Return whether a chunk of a PNG file is EXIF or a short text that may state a rotation, and undamaged."""
    if len(chunk) > _LONGEST_TEXT or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
        return False
    kind, (word, _, text) = bytes(chunk[4:8]), bytes(chunk[8:-4]).partition(b"\0")
    if kind == b"eXIf":
        return True
    if word == b"XML:com.adobe.xmp":
        return kind == b"iTXt" and text[:1] == b"\0"
    with suppress(zlib.error):
        unpacker = zlib.decompressobj()
        short = kind == b"tEXt" or (kind == b"zTXt" and unpacker.decompress(text[1:], _LONGEST_TEXT) and unpacker.eof)
        return word == b"Raw profile type exif" and bool(short)
    return False


@contextmanager
def _patient_pillow() -> Iterator[None]:
    # Sizes are checked here. Pillow would refuse large JPEG files at opening, but they are decoded smaller. It warns
    # about odd EXIF and palette transparency, which are handled below.
    with _PILLOW_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        Image.preinit()
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _explained(data: bytes, name: str) -> Iterator[None]:
    """Turn the errors of Pillow into a sentence; a damaged file can make it raise any of them."""
    try:
        yield
    except UnidentifiedImageError:
        known = f"an image file ({', '.join(FORMATS)})"
        told = f"image {name!r} must be {known}; got {len(data):,} bytes of something else"
        raise ValueError(f"{told}. Convert it to PNG or JPEG.") from None
    except RefusedError:
        raise
    except MemoryError:
        raise RefusedError(f"image {name!r} does not fit into memory. Shrink it.") from None
    except Exception as error:
        why = str(error) or type(error).__name__
        raise ValueError(f"image {name!r} is damaged or truncated ({why}). Copy or download it again.") from error


def _fit(image: Image.Image, name: str, most_pixels: int | None) -> None:
    """Have a large JPEG decoded smaller, and refuse another large image."""
    width, height = image.size
    if most_pixels is not None and width * height > most_pixels:
        raise _too_many_pixels(width, height, name, most_pixels)
    # a progressive JPEG takes memory for all of its pixels at any scale
    if width * height > MAX_PIXELS and image.format in ("JPEG", "MPO") and not image.info.get("progressive"):
        scale = next((s for s in (2, 4, 8) if (width // s) * (height // s) <= MAX_PIXELS), 8)
        image.draft("RGB", (width // scale, height // scale))
    tile = [getattr(image, "tag_v2", {}).get(tag, 1) for tag in (322, 323)]  # a TIFF tile is decoded whole
    for wide, high in (image.size, tile):
        if wide * high > MAX_PIXELS:
            raise _too_many_pixels(wide, high, name, MAX_PIXELS)


def _too_many_pixels(width: int, height: int, name: str, most: int) -> RefusedError:
    told = f"image {name!r} must have at most {most:,} pixels; got {width} x {height}"
    return RefusedError(f"{told}. Shrink it first: encoders look at a few hundred pixels a side.")


def _correct_transparency(image: Image.Image, data: bytes) -> None:
    """Correct the one transparent colour of a PNG file, which Pillow compares with pixels of another scale."""
    key, depth = image.info.get("transparency"), data[24]
    if image.mode == "L" and isinstance(key, int):
        image.info["transparency"] = (key % 2**depth) * (255 // (2**depth - 1))
    elif image.mode == "RGB" and isinstance(key, tuple) and depth == 8:
        image.info["transparency"] = tuple(value % 256 for value in key)
    elif image.mode == "RGB" and isinstance(key, tuple):  # Pillow has kept the high bytes of 16-bit values alone
        low = _low_bytes(data)
        clear = np.ones(image.size[::-1], dtype=bool)
        for high_band, low_band, value in zip(image.split(), low.split(), key, strict=True):
            clear &= (np.asarray(high_band) == value >> 8) & (np.asarray(low_band) == value & 255)
        del image.info["transparency"]
        image.putalpha(Image.fromarray(np.where(clear, np.uint8(0), np.uint8(255))))


def _low_bytes(data: bytes) -> Image.Image:
    """Read the low bytes of a PNG file of 16-bit RGB, of which Pillow reads the high ones."""
    with Image.open(io.BytesIO(_pixel_chunks(data)), formats=["PNG"]) as low:
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        with suppress(Exception):
            ImageOps.exif_transpose(low, in_place=True)
        low.load()
    return low


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert to RGB over white, a strip at a time where that takes more memory than the image."""
    if image.mode == "F":
        raise RefusedError(f"image {name!r} must hold integers; got floating point (mode F). Scale it to 8 bit first.")
    grey, clear = image.mode.startswith("I"), image.has_transparency_data or image.mode in ("RGBa", "La")
    if not grey and not clear:
        try:
            rgb = image.convert("RGB")
        except ValueError as error:
            told = f"image {name!r} of mode {image.mode} has no RGB form ({error})"
            raise RefusedError(f"{told}. Convert it to RGB.") from error
        rgb.info = {}
        return rgb
    rgb, (width, height) = Image.new("RGB", image.size), image.size
    step, extrema = max(1, _STRIP // width), image.getextrema() if grey else None
    for top in range(0, height, step):
        strip = image.crop((0, top, width, min(top + step, height)))
        rgb.paste(_grey_to_rgb(strip, image, extrema, name) if grey else _over_white(strip), (0, top))
    return rgb


def _over_white(image: Image.Image) -> Image.Image:
    front = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", front.size, (255, 255, 255, 255)), front).convert("RGB")


def _grey_to_rgb(strip: Image.Image, image: Image.Image, extrema: Any, name: str) -> Image.Image:
    """Convert modes I;16, I;16B, I;16L, and I: 32-bit integers, which 16-bit PGM and some TIFF files become."""
    values, key = np.asarray(strip), image.info.get("transparency")
    most = 4095 if getattr(image, "tag_v2", {}).get(258) == (12,) else None
    low, high = extrema
    levels = _to_8_bit(values, low, high, name, f"mode {image.mode}", most)
    levels[values == key] = 255  # the transparent level, over white
    return Image.fromarray(levels).convert("RGB")


def _to_8_bit(values: np.ndarray, low: int, high: int, name: str, kind: Any, most: int | None = None) -> np.ndarray:
    """Scale levels from 0 … `most` to 0 … 255; where it is unknown, the values tell 8 bit from 16 bit."""
    # The container does not: 8-bit levels in integers of Pillow or NumPy are saved as files of 16 bit.
    if low < 0 or high > 65535:
        told = f"image {name!r} must have values from 0 to 65535; got {low} to {high} ({kind})"
        raise RefusedError(f"{told}. Scale it to 8 or 16 bit first.")
    most = most or (255 if high <= 255 else 65535)
    return np.rint(values.astype(np.float64) / (most / 255)).astype(np.uint8)
