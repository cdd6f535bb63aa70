"""Arguments that the solvers share: bounds, targets of any shape, and radii in their box."""

from __future__ import annotations

import math

import pytest
import torch

from hf_equiv import checks

TOKENS, VECTORS = torch.linspace(-1, 1, 24).view(2, 3, 4), torch.linspace(-1, 1, 10).view(2, 5)
Z = torch.ones(1, 7)


def check(source, target=Z, radius=None, norm="linf", bounds=(-1, 1)):
    checks.check_match(source, "source", target, radius, norm, 1e-5, 10, bounds)


@pytest.mark.parametrize("source", [TOKENS, VECTORS])
@pytest.mark.parametrize("bounds", [(-1, 1), [-1.0, 2.0], None])
def test_images_and_embeddings_are_told_apart(source, bounds):
    for target, image in ((Z, False), (Z.expand(2, -1), False), (-source, True), (-source[:1], True)):
        assert checks.is_image(target, source) == image
        check(source, target, bounds=bounds)
    check(source, radius=2.0 if bounds else 1e3, bounds=bounds)
    check(source, radius=4.0, norm="l2", bounds=bounds)


def test_bounds_are_those_of_the_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((1, 2), 0.7, dtype=dtype)
        check(x, bounds=(0.7, 0.8))
        assert checks.check_bounds((0.7, 1), x) == (float(x[0, 0]), 1.0)
    assert checks.check_bounds(None, TOKENS) == (-math.inf, math.inf)


BAD = {
    "one number": (
        {"bounds": 1.0},
        TypeError,
        "`bounds` must be two finite numbers (lower, upper), or None for no box;",
    ),
    "text": ({"bounds": ("0", "1")}, TypeError, "`bounds` must be two finite numbers (lower, upper), or None"),
    "three": ({"bounds": (0, 1, 2)}, TypeError, "`bounds` must be two finite numbers"),
    "lower above upper": ({"bounds": (1, -1)}, ValueError, "with lower < upper; got (1, -1). Use (0, 1) for pixels."),
    "equal": ({"bounds": (0.5, 0.5)}, ValueError, "with lower < upper; got (0.5, 0.5)"),
    "NaN": ({"bounds": (math.nan, 1)}, ValueError, "`bounds` must be two finite numbers"),
    "infinite": ({"bounds": (0, math.inf)}, ValueError, "`bounds` must be two finite numbers"),
    "source below": (
        {"bounds": (-0.5, 1)},
        ValueError,
        "`source` must lie within `bounds` [-0.5, 1]; got -1 in image 0.",
    ),
    "source above": ({"bounds": (-1, 0.9)}, ValueError, "`source` must lie within `bounds` [-1, 0.9]; got 0.913043 in"),
    "source of pixels": (
        {"bounds": (0, 1)},
        ValueError,
        "`source` must lie in [0, 1]; got values in [-1, 1]. Pass raw",
    ),
    "target outside": (
        {"target": 3 * TOKENS},
        ValueError,
        "`target` must lie within `bounds` [-1, 1]; got -3 in image 0",
    ),
    "target shape": (
        {"target": TOKENS.mT},
        ValueError,
        "`target` must have the image shape of `source` (3, 4); got (4, 3)",
    ),
    "source lacks a batch axis": (
        {"target": TOKENS[None]},
        ValueError,
        "`target` must be images (B, 3, 4) or embeddings (B, D); got shape (1, 2, 3, 4). Add a batch axis with",
    ),
    "target 1-D": ({"target": Z[0]}, ValueError, "got shape (7,). Pass `target[None]` for a single one."),
    "source 1-D": ({"source": TOKENS[0, 0]}, ValueError, "must have shape (B, *shape); got (4,). Add a batch axis"),
    "no numbers": ({"source": TOKENS[:, :0]}, ValueError, "`source` must hold at least one image; got an empty batch"),
    "radius above the box": (
        {"radius": 2.1},
        ValueError,
        "`radius` must lie in (0, 2] for norm 'linf' (`bounds` (-1, 1))",
    ),
    "radius without a box": ({"radius": math.inf, "bounds": None}, ValueError, "`radius` must be finite and above 0"),
    "radius 0": ({"radius": 0.0, "bounds": None}, ValueError, "`radius` must be finite and above 0; got 0.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, error, message = BAD[name]
    with pytest.raises(error) as raised:
        check(**{"source": TOKENS, **options})
    assert message in str(raised.value)
