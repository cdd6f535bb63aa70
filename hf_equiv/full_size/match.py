"""Write a match into the photo it was made from, so that the checkpoint's image processor gives the match again."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_equiv.data.back_projection import back_project
from hf_equiv.data.image_set import read_images
from hf_equiv.data.resampling import follow
from hf_equiv.models.encoder import Encoder


def to_full_size(encoder: Encoder, photo: Image.Image, match: Tensor) -> tuple[Image.Image, Tensor]:
    """Return the image nearest to a photo that the image processor turns into an 8-bit match, byte for byte.

    Only pixels that the crop sees differ from the photo. Next to black and white areas a match may ask for levels that
    no image of full size has; these are missed.

    Args:
        encoder: whose image processor is meant.
        photo: the source photo, at least as large as the input of the model.
        match: pixels k/255 of the match, (3, h, w), from `refine_8bit`.

    Returns:
        The RGB image of the size of the photo, and where its pixels differ from the match, (3, h, w) bool.

    Raises:
        ValueError: a photo smaller than the input, a match of another shape or not of 8 bit, or an image processor that
            does more than to resize and crop.
    """
    (photo,) = read_images(photo)
    levels = (255 * match.detach().cpu().double()).round()
    shape = tuple(encoder.preprocess(photo).shape[1:])
    if match.shape != shape or not bool(((levels / 255) - match.cpu()).abs().max() < 1e-6):
        raise ValueError(
            f"`match` must hold pixels k/255 of shape {shape}; got {tuple(match.shape)}. "
            "Refine it with `refine_8bit` first."
        )

    def process(image: Image.Image) -> Tensor:
        return (255 * encoder.preprocess(image)[0].double()).round()

    view = follow(process, *photo.size)
    if view is None:
        raise ValueError(
            f"the image processor of '{encoder.model_id}' must resize by a filter of Pillow and crop; it does "
            "something else. Choose another checkpoint."
        )
    if min(view.across.n / view.across.m, view.down.n / view.down.m) < 1:
        raise ValueError(
            f"`photo` must be at least {view.across.m} x {view.down.m} pixels; got {photo.width} x {photo.height}, "
            "which the image processor enlarges. Use a larger photo."
        )
    found = back_project(torch.from_numpy(np.array(photo)), view, levels.permute(1, 2, 0).to(torch.uint8))
    image = Image.fromarray(found.numpy())
    return image, process(image) != levels
