"""Compute in torch what Pillow does to an 8-bit image, with gradients.

Every function takes levels (3, H, W) in [0, 255] and returns levels. Where Pillow rounds and clips, so do these: their
values agree with its own to about one level. The gradient passes through a rounding as if there were none.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import torch
from torch import Tensor

from hf_equiv.data.resampling import UNIT_WEIGHT, Axis

_BLOCK, _PASSES = 8, 3  # side of a JPEG block; box blurs that make Pillow's Gaussian one
_FINE = 8  # libjpeg computes cosine coefficients in steps of 1/8
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_CHROMINANCE = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))  # 99 elsewhere


def rounded(x: Tensor) -> Tensor:
    """Round, with the gradient of the identity."""
    return x + (x.round() - x).detach()


def levels_of(x: Tensor) -> Tensor:
    """Round and clip to 0…255."""
    return rounded(x.clamp(0, 255))


def jpeg(x: Tensor, quality: int) -> Tensor:
    """Save as JPEG with 4:2:0 chroma and read back, as libjpeg does it (ITU-T T.81, JFIF)."""
    H, W = x.shape[1:]
    side = 2 * _BLOCK
    padded = torch.nn.functional.pad(x[None], (0, -W % side, 0, -H % side), mode="replicate")[0]
    planes = levels_of(_mix(_TO_YCC, padded) + x.new_tensor([0.0, 128.0, 128.0])[:, None, None])
    halved = torch.nn.functional.avg_pool2d(planes[1:][None], 2)[0]
    # libjpeg rounds a half down and up in turn
    turn = torch.arange(padded.shape[2], device=x.device) % 2 - 0.5
    halved = rounded(halved + turn[: halved.shape[2]] / 8)
    luminance, chrominance = _tables(quality)
    chroma = _code(halved, chrominance.to(x))[None]
    # weights 3/4 and 1/4, as in libjpeg's "fancy upsampling"
    doubled = torch.nn.functional.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)[0]
    planes = torch.cat([_code(planes[:1], luminance.to(x)), rounded(doubled - turn / 32) - 128])
    return levels_of(_mix(_TO_RGB, planes))[:, :H, :W]


def resize_and_back(x: Tensor, factor: float) -> Tensor:
    """Resize by `factor` and back, bicubic with Pillow's antialiasing."""
    H, W = x.shape[1:]
    small = smaller(H, factor), smaller(W, factor)
    for (h, w), (m, n) in (((H, W), small), (small, (H, W))):
        x = levels_of(x @ _resampling(w, n).to(x).T)
        x = levels_of(_resampling(h, m).to(x) @ x)
    return x


def smaller(side: int, factor: float) -> int:
    """Return the side of a resized image."""
    return max(1, round(factor * side))


def blur(x: Tensor, sigma: float) -> Tensor:
    """Blur by a Gaussian of this standard deviation in pixels, as Pillow approximates it."""
    H, W = x.shape[1:]
    for _ in range(_PASSES):
        x = levels_of(x @ _box(W, sigma).to(x).T)
    for _ in range(_PASSES):
        x = levels_of(_box(H, sigma).to(x) @ x)
    return x


def _mix(weights: tuple[tuple[float, ...], ...], x: Tensor) -> Tensor:
    return torch.stack([sum(w * plane for w, plane in zip(row, x, strict=True)) for row in weights])


def _code(planes: Tensor, steps: Tensor) -> Tensor:
    """Quantise the cosine coefficients of 8 x 8 blocks (C, H, W) to multiples of `steps` (8, 8)."""
    C, H, W = planes.shape
    D = _cosines().to(planes)
    blocks = planes.reshape(C, H // _BLOCK, _BLOCK, W // _BLOCK, _BLOCK).transpose(2, 3) - 128
    multiple = rounded(_FINE * (D @ blocks @ D.T)) / _FINE / steps * (1 + 1e-5)  # a half goes away from zero
    # A coefficient that becomes 0 hardly feels a change, unless it is near a half.
    slope = (2 * multiple.detach().abs()).clamp_max(1).square()
    kept = (multiple.detach().round() + slope * (multiple - multiple.detach())) * steps
    return levels_of((D.T @ kept @ D).transpose(2, 3).reshape(C, H, W) + 128)


@cache
def _cosines() -> Tensor:
    """The orthonormal DCT-II, (8, 8)."""
    k, n = torch.arange(_BLOCK, dtype=torch.float64)[:, None], torch.arange(_BLOCK, dtype=torch.float64)
    D = torch.cos((2 * n + 1) * k * math.pi / (2 * _BLOCK)) / 2
    D[0] /= math.sqrt(2)
    return D


@cache
def _tables(quality: int) -> tuple[Tensor, Tensor]:
    """The steps of luminance and chrominance at a quality, (8, 8) each, as libjpeg scales those of the standard."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = torch.full((2, _BLOCK, _BLOCK), 99, dtype=torch.long)
    base[0], base[1, :4, :4] = torch.tensor(_LUMINANCE), torch.tensor(_CHROMINANCE)
    luminance, chrominance = ((base * percent + 50) // 100).clamp(1, 255).double()
    return luminance, chrominance


@lru_cache(maxsize=64)
def _resampling(n: int, m: int) -> Tensor:
    """The weights (m, n) of Pillow's bicubic resize."""
    return Axis(n, m, 0, m, "bicubic").matrix / UNIT_WEIGHT


@lru_cache(maxsize=16)
def _box(n: int, sigma: float) -> Tensor:
    """The weights (n, n) of one of the box blurs that make a Gaussian (Gwosdek et al. 2011), as in Pillow."""
    length = math.sqrt(12 * sigma**2 / _PASSES + 1)
    whole = math.floor((length - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * sigma**2 / _PASSES)
    part /= 6 * (sigma**2 / _PASSES - (whole + 1) ** 2)
    matrix, places = torch.zeros((n, n), dtype=torch.float64), torch.arange(n)
    for offset in range(-whole - 1, whole + 2):
        weight = part if abs(offset) > whole else 1.0
        matrix.index_put_((places, (places + offset).clamp(0, n - 1)), torch.tensor(weight).double(), accumulate=True)
    return matrix / (2 * (whole + part) + 1) * (1 - 2.0**-20)  # Pillow rounds weights down, so a half goes down
