"""Matches in files of the size of the photo, by the image processor of a checkpoint."""

import io

import pytest
import torch
from PIL import Image

from hf_equiv import Encoder, load_images, match_embedding, refine_8bit
from hf_equiv.full_size.match import to_full_size


@pytest.fixture(scope="module")
def encoder():
    return Encoder.from_pretrained("builtin-64")


def test_the_file_is_processed_into_the_match(encoder):
    source, target = (item.image for item in list(load_images("builtin"))[:2])
    x, y = encoder.preprocess(source), encoder.preprocess(target)
    exact = refine_8bit(encoder, match_embedding(encoder, x, y, rtol=1e-3).images, y, rtol=1e-3)
    image, seen = to_full_size(encoder, source, exact.images[0])
    assert (image.size, image.mode) == (source.size, "RGB")
    assert torch.equal(seen, exact.images[0])
    file = io.BytesIO()
    image.save(file, "png")
    assert torch.equal(encoder.preprocess(Image.open(file))[0], exact.images[0])


def test_bad_input(encoder):
    photo = next(iter(load_images("builtin"))).image
    pixels = encoder.preprocess(photo)[0]
    with pytest.raises(ValueError, match=r"`match` must hold pixels k/255 of shape \(3, 64, 64\); got \(3, 32, 32\)"):
        to_full_size(encoder, photo, pixels[:, ::2, ::2])
    with pytest.raises(ValueError, match=r"Refine it with `refine_8bit` first"):
        to_full_size(encoder, photo, 0.999 * pixels)
    with pytest.raises(ValueError, match=r"photos must be at least 64 x 64 pixels for .*; got 50 x 80"):
        to_full_size(encoder, photo.resize((50, 80)), pixels)
