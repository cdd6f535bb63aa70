"""Map where, at which frequencies and in which channels an image has its null space: the row space of J by part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_equiv.geometry.singular import combine

GRID = 14  # most cells of the map along a side; the side of a cell divides that of the image
BAND_EDGES = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)  # cycles per pixel; the corner of the spectrum is at 0.71
_TOGETHER = 16  # right singular vectors


def row_energy(matrix: Tensor, left: Tensor, sigma: Tensor, shape: Sequence[int]) -> dict[str, Tensor | None]:
    """Return the energy of the row space of J (D, N) by cell, frequency band and channel of an image (C, H, W).

    The row space is spanned by the right singular vectors V (R, N) of J, so a unit change e of pixel n has the part
    ‖Ve‖² = Σ_k V_kn² in the row space, which f sees, and the rest in the null space. A part P of the pixels, of an
    orthonormal Fourier basis, or of the channels has the mean of this over P, divided by the mean R/N over all: 0 if it
    lies in the null space, 1 if f sees as much of it as of the mean. An invertible linear map behind f changes nothing.
    All values are 0 if J is 0, and None if the input is no image.

    Args:
        matrix: J.
        left: left singular vectors U (D, R) of the row space, float64.
        sigma: their singular values (R,), float64.
        shape: of the image.
    """
    if len(shape) != 3:
        return dict.fromkeys(("invariance_map", "band_energy", "channel_energy"))
    channels, height, width = shape
    rows, columns = (max(n for n in range(1, GRID + 1) if side % n == 0) for side in (height, width))
    pixels = torch.zeros(channels, height, width, dtype=torch.float64, device=matrix.device)
    waves = torch.zeros_like(pixels[0])
    for own in (left / sigma).split(_TOGETHER, dim=1) if len(sigma) else ():
        vectors = combine(matrix, own).view(-1, channels, height, width)
        pixels += vectors.square().sum(dim=0)
        waves += torch.fft.fft2(vectors, norm="ortho").abs().square().sum(dim=(0, 1))
    mean = float(pixels.mean()) or 1.0
    up, across = (torch.fft.fftfreq(side, device=matrix.device, dtype=torch.float64) for side in (height, width))
    band = torch.bucketize((up[:, None].square() + across.square()).sqrt(), torch.tensor(BAND_EDGES).to(up), right=True)
    counts = [(band == k).sum().clamp_min(1) for k in range(1, len(BAND_EDGES))]  # small images have empty bands
    bands = [waves[band == k].sum() / count for k, count in enumerate(counts, start=1)]
    cells = pixels.view(channels, rows, height // rows, columns, width // columns).mean(dim=(0, 2, 4))
    return {
        "invariance_map": cells / mean,
        "band_energy": torch.stack(bands) / (channels * mean),
        "channel_energy": pixels.mean(dim=(1, 2)) / mean,
    }
