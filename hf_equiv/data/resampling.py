"""Follow the resize and crop of an image processor in its own integer arithmetic, one axis at a time.

Pillow resizes 8-bit images along the rows first, then along the columns. Each pass is

    y_i = clip(⌊(Σ_j a_ij x_j + 2²¹) / 2²²⌋, 0, 255),   a_ij = round(2²² w_ij),   Σ_j w_ij = 1,

with w_ij a filter stretched by the scale n/m of the axis, about the place of output i (Pillow, `Resample.c`). A crop
keeps some of the outputs. Size, crop and filter are measured on images made for it, not read from settings, so that
any processor can be followed whose output is this of its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Process = Callable[[Image.Image], Tensor]
"""The 8-bit part of an image processor: RGB image -> levels 0…255, (3, h, w)."""

UNIT_WEIGHT = 2**22  # a weight of one


def _bicubic(x: Tensor) -> Tensor:
    near = (1.5 * x - 2.5) * x * x + 1
    return torch.where(x < 1, near, -0.5 * (((x - 5) * x + 8) * x - 4))


def _hamming(x: Tensor) -> Tensor:
    return torch.sinc(x) * (0.54 + 0.46 * torch.cos(math.pi * x))


FILTERS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {  # half width, and weight at a distance
    "bilinear": (1.0, lambda x: 1 - x),
    "bicubic": (2.0, _bicubic),
    "lanczos": (3.0, lambda x: torch.sinc(x) * torch.sinc(x / 3)),
    "hamming": (1.0, _hamming),
    "box": (0.5, torch.ones_like),
}


@dataclass(frozen=True)
class Axis:
    """The resampling of n pixels to m, of which `count` are kept from `first` on, by one of `FILTERS`.

    Images are (n, L): the pixels of L lines. Weights are banded: output i sees the pixels of `windows[i]`.
    """

    n: int
    m: int
    first: int
    count: int
    filter: str

    @cached_property
    def matrix(self) -> Tensor:
        """The integers a_ij (count, n), float64."""
        half, weight = FILTERS[self.filter]
        scale = self.n / self.m
        stretch = max(scale, 1.0)
        matrix = torch.zeros((self.count, self.n), dtype=torch.float64)
        for i in range(self.count):
            centre = (self.first + i + 0.5) * scale
            lower = max(int(centre - half * stretch + 0.5), 0)
            upper = min(int(centre + half * stretch + 0.5), self.n)
            offset = (torch.arange(lower, upper, dtype=torch.float64) - centre + 0.5) / stretch
            w = torch.where(offset.abs() < half, weight(offset.abs()), 0.0)
            if self.filter == "box":  # half open
                w = ((offset > -half) & (offset <= half)).double()
            w = w / w.sum() * UNIT_WEIGHT
            matrix[i, lower:upper] = (w.sign() * 0.5 + w).trunc()
        return matrix

    @cached_property
    def windows(self) -> list[slice]:
        """The pixels that each output sees."""
        seen = self.matrix != 0
        first = seen.int().argmax(dim=1).tolist()
        last = (self.n - seen.flip(1).int().argmax(dim=1)).tolist()
        return [slice(a, b) for a, b in zip(first, last, strict=True)]

    @cached_property
    def span(self) -> slice:
        """The pixels that any output sees."""
        return slice(min(w.start for w in self.windows), max(w.stop for w in self.windows))

    @cached_property
    def bands(self) -> list[Tensor]:
        """The weights of each output in its window, float32."""
        return [(row[w] / UNIT_WEIGHT).float() for row, w in zip(self.matrix, self.windows, strict=True)]

    def apply(self, x: Tensor) -> Tensor:
        """Return the weighted sums of float pixels (n, L) without rounding, (count, L)."""
        return torch.stack([band.to(x) @ x[w] for band, w in zip(self.bands, self.windows, strict=True)])

    def transpose(self, y: Tensor) -> Tensor:
        """Return Aᵀy (n, L) of float values (count, L)."""
        x = y.new_zeros((self.n, y.shape[1]))
        for band, w, row in zip(self.bands, self.windows, y, strict=True):
            x[w].addr_(band.to(y), row)
        return x

    def levels(self, x: Tensor) -> Tensor:
        """Return the levels (count, L) that Pillow makes of levels (n, L): float64 holds its integers exactly."""
        sums = [row[w] @ x[w].double() for row, w in zip(self.matrix, self.windows, strict=True)]
        return _rounded(torch.stack(sums)).to(x.dtype)

    @cached_property
    def seen_by(self) -> tuple[Tensor, Tensor]:
        """The outputs that see each pixel, and their integers a_ij: (n, K) each, with weights 0 to fill up."""
        seen = self.matrix.T != 0
        first, most = seen.int().argmax(dim=1), int(seen.sum(dim=1).max())
        places = first[:, None] + torch.arange(most)
        inside = places < self.count
        places = places.clamp(max=self.count - 1)
        return places, self.matrix.T.gather(1, places) * inside


@dataclass(frozen=True)
class View:
    """What an image processor sees of a photo: a resampling along its rows, then one along its columns."""

    across: Axis
    down: Axis

    def levels(self, photo: Tensor) -> Tensor:
        """Return the levels (h, w, 3) of a photo (H, W, 3) uint8, as the processor does."""
        H, W = photo.shape[:2]
        rows = self.across.levels(photo.transpose(0, 1).reshape(W, -1)).view(-1, H, 3)
        return self.down.levels(rows.transpose(0, 1).reshape(H, -1)).view(-1, rows.shape[0], 3)

    def levels_of(self, pixels: Tensor) -> Tensor:
        """Return what the processor makes of 8-bit images (B, 3, H, W) in [0, 1], on k/255."""
        levels = (255 * pixels.detach().cpu().double()).round().permute(0, 2, 3, 1)
        seen = [self.levels(one).permute(2, 0, 1) for one in levels]
        return (torch.stack(seen) / 255).to(pixels)

    def flips(self, levels: Tensor) -> Flips:
        """Return how single steps change the view of an 8-bit image (3, H, W)."""
        return Flips(self, levels)

    def smooth(self, pixels: Tensor) -> Tensor:
        """Return the view of images (B, 3, H, W) in [0, 1] without rounding, differentiable almost everywhere."""
        across, down = ((axis.matrix / UNIT_WEIGHT).to(pixels) for axis in (self.across, self.down))
        return (down @ (pixels @ across.T).clamp(0, 1)).clamp(0, 1)


class Flips:
    """How single steps of ±1 level change the levels of a view, at one image (3, H, W).

    A step of pixel (i, j) changes the K sums along row i that see it. Where one passes a rounding boundary, its level
    in the image between the passes changes by ±1, and this may change K' levels of the view in that column.
    """

    def __init__(self, view: View, levels: Tensor) -> None:
        self.view, sums = view, levels.double() @ view.across.matrix.T.to(levels.device)
        (self._o, a), (self._p, b) = (
            tuple(part.to(levels.device) for part in axis.seen_by) for axis in (view.across, view.down)
        )
        between = _rounded(sums)
        sums = sums[:, :, self._o]  # (3, H, W, K)
        self._between = {s: _rounded(sums + s * a) - _rounded(sums) for s in (1, -1)}
        sums = (view.down.matrix.to(levels.device) @ between)[:, self._p]  # (3, H, K', w)
        self._seen = {s: _rounded(sums + s * b[:, :, None]) - _rounded(sums) for s in (1, -1)}

    def weigh(self, field: Tensor, step: int, power: int = 1) -> Tensor:
        """Return Σ field · change^power over the levels that a step of each pixel changes, (3, H, W).

        Args:
            field: a value for each level of the view, (3, h, w).
            step: 1 or -1.
            power: 1 for changes with their sign, 2 for their squares.
        """
        near = field[:, self._p]
        column = {s: (near * seen**power).sum(dim=2)[:, :, self._o] for s, seen in self._seen.items()}
        flips = self._between[step]
        return ((flips == 1) * column[1] + (flips == -1) * column[-1]).sum(dim=3)

    def pixels(self, seen: Tensor) -> Tensor:
        """Return the pixels (3, H, W) that some levels of the view, (3, h, w) bool, depend on."""
        across, down = (
            (axis.matrix != 0).to(seen.device, torch.float64) for axis in (self.view.across, self.view.down)
        )
        return down.T @ seen.double() @ across > 0

    def entries(self, index: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which levels some steps change: the place of the step, the flat index of the level, and the change.

        Args:
            index: flat indices of the pixels, (K,).
            steps: 1 or -1 of each, (K,).
        """
        H, W = self._between[1].shape[1:3]
        c, i, j = index // (H * W), index // W % H, index % W
        up = (steps > 0)[:, None]
        flips = torch.where(up, self._between[1][c, i, j], self._between[-1][c, i, j])  # (K, k)
        o, p = self._o[j], self._p[i]
        at = c[:, None], i[:, None], slice(None), o
        seen = {s: self._seen[s][at[0], at[1], :, o] for s in (1, -1)}  # (K, k, k')
        change = (flips == 1)[:, :, None] * seen[1] + (flips == -1)[:, :, None] * seen[-1]
        h, w = self.view.down.count, self.view.across.count
        flat = (c[:, None, None] * h + p[:, None, :]) * w + o[:, :, None]
        place, *rest = change.nonzero(as_tuple=True)
        return place, flat[place, *rest], change[place, *rest]


def _rounded(sums: Tensor) -> Tensor:
    """Return the levels of sums of integers a_ij times levels."""
    return ((sums + UNIT_WEIGHT // 2) / UNIT_WEIGHT).floor().clamp(0, 255)


def follow(process: Process, width: int, height: int) -> View | None:
    """Return the view that a processor has of a photo of this size, or None if it does anything else."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    across = _measure(lambda line: process(_image(np.broadcast_to(line, (height, width, 3))))[:, 0], width)
    down = _measure(lambda line: process(_image(np.broadcast_to(line[:, None], noise.shape)))[:, :, 0], height)
    if across is None or down is None:
        return None
    view = View(across, down)
    seen = process(_image(noise)).permute(1, 2, 0)
    return view if torch.equal(view.levels(torch.from_numpy(noise)), seen.to(torch.uint8)) else None


def levels_of(pixels: Tensor) -> Tensor:
    """Return the levels 0…255 of pixels k/255, uint8 on the CPU."""
    return (255 * pixels.detach().cpu().double()).round().to(torch.uint8)


def view_of(encoder: Any, width: int, height: int) -> View:
    """Return the view that the image processor has of photos of a size; refuse one that cannot be followed.

    Args:
        encoder: the encoder with that image processor.
        width: of the photo.
        height: of the photo.

    Raises:
        ValueError: photos that it enlarges, or an image processor that does more than to resize and crop.
    """
    view = follow(lambda image: levels_of(encoder.preprocess([image])[0]).double(), width, height)
    least = (view.across.m, view.down.m) if view is not None else encoder.input_shape[:0:-1]
    if width < least[0] or height < least[1]:
        raise ValueError(
            f"photos must be at least {least[0]} x {least[1]} pixels for the image processor of '{encoder.model_id}', "
            f"which enlarges smaller ones; got {width} x {height}. Use a larger photo, or another checkpoint."
        )
    if view is None:
        raise ValueError(
            f"the image processor of '{encoder.model_id}' must resize by a filter of Pillow and crop; it does "
            "something else. Choose another checkpoint."
        )
    return view


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels))


def _measure(process: Callable[[np.ndarray], Tensor], n: int) -> Axis | None:
    """Return the axis on which a processor makes its output (3, count) of lines (n, 3) uint8, or None."""
    places, lower, upper = np.arange(n) + 0.5, 0.0, float(n)
    for _ in range(2):  # the second ramp rises over the part that is kept
        ramp = np.round(255 * ((places - lower) / (upper - lower)).clip(0, 1)).astype(np.uint8)
        line = process(np.repeat(ramp[:, None], 3, axis=1))[0].double().numpy()
        count = len(line)
        middle = np.arange(count // 4, count - count // 4)  # where place (first + i + 1/2) n / m becomes output i
        if len(middle) < 2:
            return None
        scale, place = np.polyfit(middle, lower + line[middle] / 255 * (upper - lower), 1).tolist()
        if not scale > 1e-3:
            return None
        lower, upper = max(0.0, place - 2 * scale), min(float(n), place + (count + 2) * scale)
    first = round(place / scale - 0.5)
    test = np.random.default_rng(1).integers(0, 256, (n, 3), dtype=np.uint8)
    seen, pixels = process(test).T.to(torch.uint8), torch.from_numpy(test)
    for m in sorted(range(round(n / scale) - 2, round(n / scale) + 3), key=lambda m: abs(m - n / scale)):
        for start, name in product((first, first - 1, first + 1), FILTERS):
            if 0 <= start <= m - count:
                few = Axis(n, m, start + int(middle[0]), 4, name)
                if torch.equal(few.levels(pixels), seen[middle[0] : middle[0] + 4]):
                    axis = Axis(n, m, start, count, name)
                    if torch.equal(axis.levels(pixels), seen):
                        return axis
    return None
