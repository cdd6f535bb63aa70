"""Directional constants of a trained checkpoint on photos, against its float64 twin; null directions stay without one.

HF_EQUIV_ASSETS names the folder with `models/` and `images/`, by default `../shared/assets`; HF_EQUIV_PHOTOS and
HF_EQUIV_NULL how many photos and null directions (5 and 200 are the full claim: two hours on two cores).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_equiv.geometry.directions import Directions, make_directions
from hf_equiv.geometry.linearity import linearity_radius
from hf_equiv.geometry.lipschitz import directional_lipschitz
from hf_equiv.jacobian import Jacobian
from hf_equiv.models.encoder import Encoder

ASSETS = Path(os.environ.get("HF_EQUIV_ASSETS") or Path(__file__).parents[3] / "shared" / "assets").resolve()
MODEL = ASSETS / "models" / "deit-tiny-patch16-224"
PHOTOS = ASSETS / "images" / "sample_100"
COUNT = int(os.environ.get("HF_EQUIV_PHOTOS", "1"))
NULL = int(os.environ.get("HF_EQUIV_NULL", "4"))

pytestmark = [
    pytest.mark.assets,
    pytest.mark.timeout(4 * 3600),
    pytest.mark.skipif(
        not (MODEL.is_dir() and PHOTOS.is_dir()),
        reason=f"no {MODEL.name} and {PHOTOS.name} in {ASSETS}: set HF_EQUIV_ASSETS",
    ),
]


@pytest.fixture(scope="module")
def encoder():
    return Encoder.from_pretrained(MODEL, readout="cls")


@pytest.fixture(scope="module")
def photos(encoder):
    names = sorted(PHOTOS.glob("*.jpg"))
    picked = [names[i] for i in (3, 12, 47, 60, 80)[: COUNT + 1]]
    return encoder.preprocess([Image.open(name) for name in picked])


@pytest.fixture(scope="module")
def directions(encoder, photos):
    """Of each photo apart: random, top, the lowest and some other row directions, null, gradient and toward."""
    made = []
    for b in range(COUNT):
        toward = photos[(b + 1) % len(photos)][None]
        d = make_directions(
            encoder, photos[b : b + 1], random=2, top=2, row=190, null=NULL, gradient=True, toward=toward
        )
        lowest = (20, 100, 170, 187, 188, 189)
        kept = [k for k, name in enumerate(d.kinds) if name != "row" or d.indices[k] in lowest]
        made.append(Directions(d.vectors[:, kept], tuple(d.kinds[k] for k in kept), tuple(d.indices[k] for k in kept)))
    return made


def test_float32(encoder, photos, directions):
    resolved = asked = 0
    for b, d in enumerate(directions):
        result = directional_lipschitz(encoder, photos[b : b + 1], d)
        assert result.noise_method == "twin"
        null = torch.tensor([kind == "null" for kind in d.kinds])
        assert result.values[0, null].isnan().all()
        good = result.values[0].isfinite()
        resolved, asked = resolved + int(good.sum()), asked + int((~null).sum())
        twin = Jacobian(encoder.double(), photos[b].double(), batch=1)
        exact = twin.mv(d.vectors[0, good].double()).norm(dim=1)
        error = (result.values[0, good] - exact).abs() / exact
        assert float(error.max()) <= 1e-2
        assert float(error.median()) <= 1e-3
        assert bool(((result.values[0, good] - exact).abs() <= result.errors[0, good]).all())
    assert resolved >= 0.95 * asked  # weighted towards the lowest rows: σ₁₉₀ alone may fail


def test_bfloat16_has_no_null_direction_with_a_number(photos, directions):
    encoder = Encoder.from_pretrained(MODEL, readout="cls", dtype=torch.bfloat16)
    for b, d in enumerate(directions):
        kept = [k for k, name in enumerate(d.kinds) if name in ("null", "top")]
        some = Directions(d.vectors[:, kept], tuple(d.kinds[k] for k in kept), tuple(d.indices[k] for k in kept))
        result = directional_lipschitz(encoder, photos[b : b + 1], some)
        null = torch.tensor([kind == "null" for kind in some.kinds])
        assert result.values[0, null].isnan().all()
        good = result.values[0].isfinite()
        torch.testing.assert_close(result.values[0, good], result.jvp[0, good], rtol=0.05, atol=0)


def test_linear_sets_are_small(encoder, photos, directions):
    d = directions[0]
    result = linearity_radius(encoder, photos[:1], d, rtol=0.01)
    radius = {kind: result.radii[0, [i for i, name in enumerate(d.kinds) if name == kind]] for kind in d.kinds}
    # along σ₁₉₀ the model bends before it rises above the float noise
    assert {d.indices[k] for k, status in enumerate(result.status[0]) if status != "resolved"} <= {189}
    assert bool((radius["top"] < 0.1).all())  # a match lies at about 5
    assert bool((radius["random"] < 1.0).all())
    assert bool((radius["null"] > radius["random"].max()).all())
