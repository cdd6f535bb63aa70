"""Reading, drawing and carrying out transformations, and their differentiable forms beside Pillow's."""

import io

import numpy as np
import pytest
import torch
from fakes import draw_photo, pixels_of_photo
from PIL import Image

from hf_equiv.through import transformations
from hf_equiv.through.transformations import TRANSFORMS, handle, read_transformations

SIDE = 16


def draws_of(text, seed=0):
    (one,) = read_transformations([text])
    return one.draws(torch.Generator().manual_seed(seed))


def detailed(k, side=61):
    """A photo with detail, so that pixels differ from their neighbours."""
    noise = torch.randint(-20, 20, (3, side, side), generator=torch.Generator().manual_seed(k))
    return ((255 * pixels_of_photo(k, side) + noise).round().clamp(0, 255)) / 255


# --- what Pillow does ---


def test_jpeg_is_what_pillow_writes():
    x, buffer = pixels_of_photo(1), io.BytesIO()
    draw_photo(1, SIDE).save(buffer, "JPEG", quality=75)
    with Image.open(buffer) as image:
        known = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    assert torch.equal(handle(x, TRANSFORMS["JPEG 75"]), known)
    grey = x[:1].expand(3, -1, -1)  # without colour, whose resolution JPEG halves
    fine, coarse = (handle(grey, lambda image, q=q: transformations.jpeg(image, q)) for q in (95, 30))
    assert (fine - grey).abs().mean() < (coarse - grey).abs().mean() / 2


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_handling_keeps_grid_size_and_flat_images(name, dtype):
    change, x = TRANSFORMS[name], pixels_of_photo(2).to(dtype)
    made = handle(x, change)
    assert made.shape == x.shape
    assert made.dtype == dtype
    assert torch.equal((made * 255).round() / 255, made)
    assert not torch.equal(made, x)
    flat = torch.full_like(x, 100 / 255)
    assert (handle(flat, change) - flat).abs().max() <= 1.01 / 255


def test_blur_has_the_width_it_says():
    line = torch.zeros(3, 33, 33)
    line[:, :, 16] = 1.0
    row = handle(line, TRANSFORMS["Gaussian blur, σ = 1 px"])[0, 16].double()
    offsets = torch.arange(33.0) - 16
    assert float((row * offsets**2).sum() / row.sum()) == pytest.approx(1.0, rel=0.1)


def test_noise_has_the_deviation_it_says_and_its_seed():
    grey = torch.full((3, 64, 64), 128 / 255)
    first, second = draws_of("noise:4/255")[:2]
    moved = handle(grey, first) - grey
    assert float(moved.std()) == pytest.approx(4 / 255, rel=0.03)
    assert torch.equal(handle(grey, first) - grey, moved)
    assert not torch.equal(handle(grey, second) - grey, moved)


# --- the differentiable forms ---

# largest mean difference in levels, and share of values off by more than one level: libjpeg works in integers, so that
# a few coefficients are rounded the other way
AGREES = {
    "jpeg:30": (0.5, 0.1), "jpeg:75": (0.25, 0.08), "jpeg:95": (0.3, 0.06), "jpeg:100": (0.2, 0.04),
    "resize:0.5": (0.05, 1e-3), "resize:0.9": (0.05, 1e-3), "resize:0.03": (0.05, 1e-3),
    "blur:0.5": (0.2, 1e-2), "blur:1": (0.05, 1e-3), "blur:3.3": (0.05, 1e-3), "noise:2/255": (0.0, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("text", AGREES)
@pytest.mark.parametrize("shape", [(64, 64), (61, 37)])
def test_surrogates_do_what_pillow_does(text, shape):
    x = detailed(3)[:, : shape[0], : shape[1]] if shape[0] < 64 else detailed(3, 64)
    draw = draws_of(text)[0]
    gap = (draw.surrogate(255 * x) - 255 * handle(x, draw)).abs()
    mean, share = AGREES[text]
    assert float(gap.mean()) <= mean + 1e-5
    assert float((gap > 1.5).double().mean()) <= share


@pytest.mark.parametrize("text", ["jpeg:90", "resize:0.5", "blur:1", "noise:2/255"])
def test_gradients_are_those_of_large_smooth_changes(text):
    """A wave of some levels, far above every rounding: its change through T is what the gradient says."""
    draw, y, x = draws_of(text)[0], *torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    wave = torch.stack([torch.sin(2 * torch.pi * (x / 24 + y / 48 + c / 3)) for c in range(3)])
    levels = (128 + 60 * wave.roll(1, 0)).requires_grad_(True)
    (gradient,) = torch.autograd.grad((draw.surrogate(levels) * wave).sum(), levels)
    with torch.no_grad():
        change = draw.surrogate(levels + 12 * wave) - draw.surrogate(levels - 12 * wave)
    assert float((gradient * wave).sum()) == pytest.approx(float((change * wave).sum()) / 24, rel=0.1)


# --- reading and drawing ---


def test_draws():
    assert [draw.value for draw in draws_of("jpeg:75")] == [75]
    values = [draw.value for draw in draws_of("jpeg:60-95")]
    assert values[:2] == [60, 95]
    assert len(values) == transformations.DRAWS
    assert all(60 <= value <= 95 and value == int(value) for value in values)
    assert draws_of("resize:0.5-0.9") == draws_of("resize:0.5-0.9") != draws_of("resize:0.5-0.9", seed=1)
    noise = draws_of("noise:1e-3-2e-2")
    assert [draw.value for draw in noise[:2]] == [1e-3, 2e-2]
    assert len({draw.seed for draw in draws_of("noise:2/255")}) == transformations.DRAWS
    (one,) = read_transformations(["jpeg:1-2"])
    generator = torch.Generator().manual_seed(0)
    assert {one.draw(generator).value for _ in range(30)} == {1, 2}


BAD = {
    "sepia:1": r"`through` must name jpeg, resize, blur or noise, as in jpeg:75,resize:0.5; got 'sepia:1'",
    "jpeg": r"`through` must give jpeg a whole quality from 1 to 100, or a range of them; got 'jpeg'",
    "jpeg:0": "whole quality from 1 to 100",
    "jpeg:101": "whole quality from 1 to 100",
    "jpeg:75.5": "whole quality from 1 to 100",
    "jpeg:75-": "whole quality from 1 to 100",
    "resize:0": "factor from 0.001 to 1",
    "resize:1.5": "factor from 0.001 to 1",
    "blur:-1": "standard deviation from 0.001 to 100 pixels",
    "blur:nan": "standard deviation from 0.001 to 100 pixels",
    "noise:2/0": "standard deviation above 0",
    "noise:0": "standard deviation above 0",
    "jpeg:95-60": r"ranges from less to more; got 'jpeg:95-60'. Write jpeg:60-95",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_transformations(text):
    with pytest.raises(ValueError, match=BAD[text]):
        read_transformations([text])


def test_none_and_the_same_twice():
    with pytest.raises(ValueError, match="must name a transformation; got none"):
        read_transformations([])
    with pytest.raises(ValueError, match="a transformation once; got 'jpeg:75-75' twice"):
        read_transformations(["jpeg:75", "blur:1", "jpeg:75-75"])
