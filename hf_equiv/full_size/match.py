"""Write a match into the photo it was made from, so that the checkpoint's image processor gives the match again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_equiv.data.back_projection import back_project
from hf_equiv.data.image_set import read_images
from hf_equiv.data.resampling import View, levels_of, view_of
from hf_equiv.matching.refine import refine_8bit
from hf_equiv.precision import no_tf32

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

_ROUNDS = 3  # files made of one match, each after a refinement that holds the pixels which the last one missed


@dataclass(frozen=True)
class FullSizeMatch:
    """A match as a file of the size of its photo.

    Attributes:
        image: RGB, of the size of the photo.
        match: what the image processor makes of it, (3, h, w), values k/255.
        exact: whether `match` is byte for byte the match of this file; otherwise it is the match that was wanted.
        num_evals: evaluations of the refinements.
    """

    image: Image.Image
    match: Tensor
    exact: bool
    num_evals: float


def to_full_size(
    encoder: Encoder, photo: Image.Image, match: Tensor, view: View | None = None
) -> tuple[Image.Image, Tensor]:
    """Return the image nearest to a photo that the image processor turns into an 8-bit match, byte for byte.

    Only pixels that the crop sees differ from the photo. Next to black and white areas a match may ask for levels that
    no image of full size has; these are missed.

    Args:
        encoder: whose image processor is meant.
        photo: the source photo, at least as large as the input of the model.
        match: pixels k/255 of the match, (3, h, w), from `refine_8bit`.
        view: that of `view_of` for this photo, if it is known.

    Returns:
        The RGB image of the size of the photo, and what the image processor makes of it, (3, h, w).

    Raises:
        ValueError: a photo smaller than the input, a match of another shape or not of 8 bit, or an image processor that
            does more than to resize and crop.
    """
    (photo,) = read_images(photo)
    levels = levels_of(match)
    if match.shape != encoder.input_shape or not bool((levels / 255 - match.cpu()).abs().max() < 1e-6):
        raise ValueError(
            f"`match` must hold pixels k/255 of shape {encoder.input_shape}; got {tuple(match.shape)}. "
            "Refine it with `refine_8bit` first."
        )
    view = view or view_of(encoder, *photo.size)
    found = back_project(torch.from_numpy(np.array(photo)), view, levels.permute(1, 2, 0).to(torch.uint8))
    image = Image.fromarray(found.numpy())
    return image, (levels_of(encoder.preprocess([image])[0]).double() / 255).to(match)


def match_in_full_size(
    encoder: Encoder, photo: Image.Image, view: View, match: Tensor, z: Tensor, source: Tensor,
    allowed: Callable[[Tensor], bool], **goal: Any
) -> FullSizeMatch:  # fmt: skip
    """Write a match into its photo; where it asks for levels that no photo has, refine it with those that it has.

    Args:
        encoder: the encoder, with its image processor.
        photo: the source photo.
        view: that of `view_of` for this photo.
        match: refined match, (3, h, w), values k/255.
        z: embedding of the target, (1, D).
        source: the source, (3, h, w).
        allowed: whether an image lies in the ball.
        goal: `radius`, `norm`, `rtol` and `progress` of `refine_8bit`.

    Returns:
        The file with the least embedding error.
    """
    held, best, spent = torch.zeros_like(match, dtype=torch.bool), math.inf, 0.0
    exact = False
    enough = max(goal["rtol"], _error(encoder, match, z))
    made: list[tuple[Image.Image, Tensor]] = []
    for left in reversed(range(_ROUNDS)):
        image, seen = to_full_size(encoder, photo, match, view)
        made = made or [(image, match)]
        missed, error = levels_of(seen) != levels_of(match), _error(encoder, seen, z)
        if error < best and allowed(seen):
            best, made, exact = error, [(image, seen)], True
        if best <= enough or not left or not bool(missed.any()):
            break
        held |= missed.to(held.device)
        refined = refine_8bit(encoder, seen[None], z, source=source[None], held=held[None], **goal)
        match, spent = refined.images[0], spent + float(refined.num_evals[0])
    return FullSizeMatch(*made[0], exact, spent)


@torch.no_grad()
@no_tf32()
def _error(encoder: Encoder, image: Tensor, z: Tensor) -> float:
    return float((encoder(image[None]).double() - z.double()).norm() / z.double().norm())
