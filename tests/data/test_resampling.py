"""Axes and views against Pillow itself."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_equiv.data.resampling import FILTERS, Axis, follow, view_of
from hf_equiv.models.encoder import Encoder


def processor(size, resample, crop=None):
    def process(image):
        image = image.resize(size, resample)
        return torch.from_numpy(np.array(image.crop(crop) if crop else image)).permute(2, 0, 1)

    return process


CASES = {  # size of the photo, and what the processor makes of it
    "squashed": ((61, 40), (24, 24), Image.BILINEAR, None),
    "cropped": ((90, 60), (48, 32), Image.BICUBIC, (12, 4, 36, 28)),
    "off the middle": ((90, 60), (48, 32), Image.LANCZOS, (13, 3, 37, 27)),
    "scarcely smaller": ((25, 26), (24, 24), Image.HAMMING, None),
    "box": ((61, 40), (24, 24), Image.BOX, None),
    "enlarged": ((19, 17), (24, 24), Image.BICUBIC, None),
    "only cropped": ((40, 40), (40, 40), Image.BICUBIC, (8, 8, 32, 32)),
    "wide": ((900, 40), (720, 32), Image.BICUBIC, (348, 4, 372, 28)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_view_is_measured_and_exact(case):
    (width, height), size, resample, crop = case
    view = follow(processor(size, resample, crop), width, height)
    assert (view.across.m, view.down.m) == size
    assert (view.across.first, view.down.first) == (crop[:2] if crop else (0, 0))
    photo = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    photo[: height // 2] = 255 * (photo[: height // 2] > 128)  # sums that are clipped
    wanted = processor(size, resample, crop)(Image.fromarray(photo)).permute(1, 2, 0)
    assert torch.equal(view.levels(torch.from_numpy(photo)), wanted)


@pytest.mark.parametrize(
    "process",
    [
        processor((24, 24), Image.NEAREST),
        lambda image: processor((24, 24), Image.BILINEAR)(image.rotate(90)),
        lambda image: 255 - processor((24, 24), Image.BILINEAR)(image),
        lambda image: processor((24, 24), Image.BILINEAR)(image.resize((40, 40), Image.BILINEAR)),
        lambda image: torch.full((3, 24, 24), 7.0),
    ],
    ids=["nearest", "turned", "inverted", "twice", "constant"],
)
def test_anything_else_is_not_followed(process):
    assert follow(process, 61, 50) is None


@pytest.mark.parametrize("name", FILTERS)
def test_transpose_is_that_of_apply(name):
    axis = Axis(61, 32, 4, 24, name)
    x, y = torch.rand(61, 5), torch.rand(24, 5)
    torch.testing.assert_close((axis.apply(x) * y).sum(), (x * axis.transpose(y)).sum())
    torch.testing.assert_close(axis.apply(torch.ones(61, 1)), torch.ones(24, 1))


@pytest.mark.parametrize("size", [(1, 1), (63, 640), (20, 20)])
def test_a_photo_that_is_enlarged_is_refused_for_its_size(size):
    with pytest.raises(ValueError, match=rf"at least 64 x 64 pixels .* got {size[0]} x {size[1]}"):
        view_of(Encoder.from_pretrained("builtin-64"), *size)
