"""Measure changes of a small image by the length that they have in a photo of full size.

A change d of the small image, across and down, needs the change A⁺d of the photo, of squared length dᵀ(AAᵀ)⁻¹d with A
of `Axis`. A resize blurs, so fine changes cost most. In the variable y of x = clip(S y), with S = (s AAᵀ)^½ on each
axis, a match near its start is near it in the photo. The factor s = n/m leaves the length of an even change as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_equiv.data.resampling import Axis, view_of
from hf_equiv.precision import Encoding, no_autocast, no_tf32

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

_SCALE = 4  # side of the photo whose metric is taken, over that of the input; others differ little


class FileMetric:
    """The variable y (B, 3, h, w) of small images x = clip(S y), for the image processor of an encoder."""

    def __init__(self, encoder: Encoder) -> None:
        _, h, w = encoder.input_shape
        view = view_of(encoder, _SCALE * w, _SCALE * h)
        self._down, self._across = _roots(view.down, encoder.device), _roots(view.across, encoder.device)

    def place(self, y: Tensor) -> Tensor:
        """Return the image x of y."""
        return self._times(0, y).clamp(0, 1)

    def invert(self, x: Tensor) -> Tensor:
        """Return the y of an image."""
        return self._times(1, x.double()).to(x)

    def of(self, f: Encoding) -> Encoding:
        """Return f as a function of y."""
        return lambda y: f(self.place(y))

    @no_tf32()
    @no_autocast()
    def _times(self, which: int, image: Tensor) -> Tensor:
        return (image @ self._across[which].to(image)).mT.matmul(self._down[which].to(image)).mT


def _roots(axis: Axis, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return S and S⁻¹ of an axis, symmetric (count, count), float64."""
    A = axis.matrix / 2.0**22
    values, vectors = torch.linalg.eigh(axis.n / axis.m * A @ A.T)
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    return root.to(device), inverse.to(device)
