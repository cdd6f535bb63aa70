"""Read transformations of images such as `jpeg:60-95`, draw them, and carry them out by Pillow or with gradients."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageFilter
from torch import Tensor

from hf_equiv.data.image_file import open_image, to_image, to_levels
from hf_equiv.formatting import read_fraction
from hf_equiv.through import surrogates

DRAWS = 8  # of a random transformation, by which a match is measured
_NUMBER = r"\d+\.?\d*(?:e-?\d+)?(?:/[1-9]\d*)?"


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Save as JPEG (Pillow, its usual 4:2:0 chroma) and read back."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return open_image(buffer.getvalue())


def resize_and_back(image: Image.Image, factor: float) -> Image.Image:
    """Resize by `factor` (bicubic, Pillow's antialiasing) and back to the first size."""
    small = surrogates.smaller(image.width, factor), surrogates.smaller(image.height, factor)
    return image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)


def add_noise(levels: Tensor, sigma: float, seed: int) -> Tensor:
    """Add Gaussian noise of standard deviation `sigma`, in pixel units, to levels (3, H, W); round and clip."""
    noise = torch.randn(levels.shape, generator=torch.Generator().manual_seed(seed))
    return surrogates.levels_of(levels + 255 * sigma * noise.to(levels))


@dataclass(frozen=True)
class Draw:
    """A transformation of 8-bit images with its random numbers drawn."""

    kind: str  # jpeg, resize, blur or noise
    value: float
    seed: int = 0  # of the noise

    def __call__(self, image: Image.Image) -> Image.Image:
        """Transform an image by Pillow."""
        if self.kind == "jpeg":
            return jpeg(image, int(self.value))
        if self.kind == "resize":
            return resize_and_back(image, self.value)
        if self.kind == "blur":
            return image.filter(ImageFilter.GaussianBlur(self.value))
        return to_image(add_noise(to_levels(image).float(), self.value, self.seed) / 255)

    def surrogate(self, levels: Tensor) -> Tensor:
        """Transform levels (3, H, W) in [0, 255], differentiably."""
        if self.kind == "jpeg":
            return surrogates.jpeg(levels, int(self.value))
        if self.kind == "resize":
            return surrogates.resize_and_back(levels, self.value)
        if self.kind == "blur":
            return surrogates.blur(levels, self.value)
        return add_noise(levels, self.value, self.seed)


@dataclass(frozen=True)
class Transformation:
    """A kind of transformation with the range of its parameter."""

    name: str  # as the user states it, such as jpeg:60-95
    kind: str
    low: float
    high: float

    @property
    def fixed(self) -> bool:
        """Whether all draws are equal."""
        return self.low == self.high and self.kind != "noise"

    def draw(self, generator: torch.Generator) -> Draw:
        """Draw the parameter, uniform in its range, and the seed of the noise."""
        share, seed = (float(torch.rand((), generator=generator, dtype=torch.float64)) for _ in range(2))
        value = self.low + share * (self.high - self.low)
        if self.kind == "jpeg":  # each quality is as probable as another
            value = self.low + int(share * (self.high - self.low + 1))
        return Draw(self.kind, value, int(seed * 2**31))

    def draws(self, generator: torch.Generator) -> list[Draw]:
        """Draw the transformations by which a match is measured: one if it is fixed, else 8, first the ends."""
        drawn = [self.draw(generator) for _ in range(1 if self.fixed else DRAWS)]
        ends = [Draw(self.kind, value, draw.seed) for value, draw in zip((self.low, self.high), drawn, strict=False)]
        return ends + drawn[2:]


_RANGES = {
    "jpeg": (1, 100, "a whole quality from 1 to 100"),
    "resize": (1e-3, 1, "a factor from 0.001 to 1"),
    "blur": (1e-3, 100, "a standard deviation from 0.001 to 100 pixels"),
    "noise": (1e-6, 1, "a standard deviation above 0 and at most 1, where pixels lie in [0, 1]"),
}


def read_transformations(names: Sequence[str]) -> tuple[Transformation, ...]:
    """Read transformations such as `jpeg:75`, `resize:0.5-0.9`, `blur:1` and `noise:2/255`; refuse bad ones."""
    found = {}
    for name in names:
        one = _read(name)
        if (key := (one.kind, one.low, one.high)) in found:
            raise ValueError(f"`through` must name a transformation once; got {name!r} twice. Leave one out.")
        found[key] = one
    if not found:
        raise ValueError("`through` must name a transformation; got none. Write jpeg:75, or leave it out.")
    return tuple(found.values())


def _read(name: str) -> Transformation:
    kind, _, numbers = name.partition(":")
    if kind not in _RANGES:
        raise ValueError(f"`through` must name jpeg, resize, blur or noise, as in jpeg:75,resize:0.5; got {name!r}.")
    least, most, wanted = _RANGES[kind]
    match = re.fullmatch(f"({_NUMBER})(?:-({_NUMBER}))?", numbers)
    low, high = (read_fraction(match[1]), read_fraction(match[2] or match[1])) if match else (0.0, 0.0)
    whole = kind != "jpeg" or (low.is_integer() and high.is_integer())
    if not (match and whole and least <= min(low, high) and max(low, high) <= most):
        raise ValueError(f"`through` must give {kind} {wanted}, or a range of them; got {name!r}.")
    if low > high:
        turned = f"{kind}:{match[2]}-{match[1]}"
        raise ValueError(f"`through` must have ranges from less to more; got {name!r}. Write {turned}.")
    return Transformation(name, kind, low, high)


TRANSFORMS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG 95": Draw("jpeg", 95),
    "JPEG 75": Draw("jpeg", 75),
    "resize to 90 % and back": Draw("resize", 0.9),
    "resize to 50 % and back": Draw("resize", 0.5),
    "Gaussian blur, σ = 1 px": Draw("blur", 1.0),
}
"""Image transforms by their names in the report."""


def handle(pixels: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Apply a transform of images to pixels (3, H, W), rounded to 8 bit."""
    return (to_levels(change(to_image(pixels))).to(pixels.dtype) / 255).to(pixels.device)
