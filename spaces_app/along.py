"""One step along a direction: the image there, how far its embedding has moved, and what the head says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_equiv.analyses import measures
from hf_equiv.checks import check_images
from hf_equiv.data.image_file import encode_png
from hf_equiv.precision import no_tf32

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder


@dataclass(frozen=True, slots=True)
class Stop:
    """One place x + h·v on a line, clipped to [0, 1].

    Attributes:
        step: h, L2 in pixel units.
        distance: ‖f(x + hv) − f(x)‖ / ‖f(x)‖; None if it is not finite.
        first_order: |h|·‖Jv‖ / ‖f(x)‖, what the Jacobian at x foretells; None where ‖Jv‖ is not given.
        png: the image there, rounded to 8 bit for the eye; the numbers are of the image before.
        classes: (name, probability) of the likeliest classes there, likeliest first; empty without a head.
    """

    step: float
    distance: float | None
    first_order: float | None
    png: bytes
    classes: tuple[tuple[str, float], ...]


@torch.no_grad()
@no_tf32()
def stops_along(
    encoder: Encoder,
    image: Tensor,
    direction: Tensor,
    steps: Sequence[float],
    *,
    jvp: float | None = None,
    classes: int = 5,
    batch: int = 32,
) -> tuple[Stop, ...]:
    """Go from an image along a direction and look what the encoder makes of it.

    Cost: one forward an image, and another one with a head.

    Args:
        encoder: f.
        image: x, (3, H, W), pixels in [0, 1].
        direction: v, (3, H, W), of unit L2 norm.
        steps: h, L2 in pixel units, of either sign.
        jvp: ‖Jv‖ at x, if known.
        classes: how many classes to name.
        batch: images per forward.

    Returns:
        One place for each step.

    Raises:
        ValueError: pixels outside [0, 1], or a direction of another shape or length.
    """
    check_images(image[None], "image")
    if direction.shape != image.shape or not math.isclose(float(direction.double().norm()), 1.0, rel_tol=1e-4):
        raise ValueError(
            f"`direction` must have the shape of `image` {tuple(image.shape)} and length 1; got "
            f"{tuple(direction.shape)}, length {float(direction.double().norm()):.4g}. Divide it by its norm."
        )
    image, direction = image.to(encoder.device), direction.to(encoder.device)
    z = encoder(image[None]).double()
    lengths = torch.tensor(list(steps), dtype=torch.float64).view(-1, 1, 1, 1)
    places = (image.double() + lengths.to(image.device) * direction.double()).clamp(0, 1).to(image.dtype)
    found = []
    for first in range(0, len(places), batch):
        part = places[first : first + batch]
        moved = encoder(part)
        probs = encoder.classify(part).double().softmax(dim=1) if encoder.has_head else None
        for i in range(len(part)):
            h = float(steps[first + i])
            found.append(
                Stop(
                    h,
                    measures.relative_error(moved[i], z[0]),
                    None if jvp is None else abs(h) * jvp / float(z.norm()),
                    encode_png(part[i]),
                    () if probs is None else top_classes(encoder.label_names or (), probs[i], classes),
                )
            )
    return tuple(found)


def top_classes(names: Sequence[str], probabilities: Tensor, count: int) -> tuple[tuple[str, float], ...]:
    """The likeliest classes with their probabilities, likeliest first."""
    best = probabilities.topk(min(count, len(probabilities)))
    return tuple((names[int(k)], float(p)) for p, k in zip(best.values, best.indices, strict=True))
