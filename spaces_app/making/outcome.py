"""Keep the matches that visitors have made, and answer what can be asked of one: does it hold, what breaks it."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import torch
from live import likeliest
from shelf import HOUR, MODELS, encoder_of, refused
from showcase import Row, prove

from hf_equiv.analyses import measures
from hf_equiv.data.image_file import stored_image
from hf_equiv.models.encoder import Encoder
from hf_equiv.through.transformations import TRANSFORMS, handle

MOST = 200
CHANGES = {"Shrink to half": "resize to 50 % and back", "Save as JPEG": "JPEG 75"}
"""What may be done to a lookalike, by the words of the button."""


@dataclass(frozen=True)
class Made:
    """A match that a visitor has made: its row with the three PNG files, and the words for its settings."""

    row: Row
    model: str
    seconds: float
    curve: str  # SVG
    born: float = field(default_factory=time.monotonic)


class Shelf:
    """The matches of the last hour, by keys that nobody can guess: a link is as private as its owner keeps it."""

    def __init__(self) -> None:
        self._made: OrderedDict[str, Made] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, made: Made) -> str:
        """Keep a match, and return its key."""
        key = secrets.token_urlsafe(12)
        with self._lock:
            self._made[key] = made
            while len(self._made) > MOST or time.monotonic() - next(iter(self._made.values())).born > HOUR:
                self._made.popitem(last=False)
        return key

    def get(self, key: str) -> Made:
        """Return a match, or refuse a key that is unknown or too old."""
        made = self._made.get(key if isinstance(key, str) else "")
        if made is None or time.monotonic() - made.born > HOUR:
            raise refused("This lookalike is gone: they are kept for an hour. Make it again.")
        return made


MADE = Shelf()


@dataclass(frozen=True)
class Sight:
    """What an AI model sees in one picture."""

    label: str | None
    probability: float | None
    known: tuple[str, ...] = ()  # all classes of a model that has few


FEW = 100
"""A model with so few classes names them all when it can only guess."""


def sights(encoder: Encoder, images: torch.Tensor) -> list[Sight]:
    """Return the likeliest class of each image (B, 3, H, W); without a label for an encoder without a head."""
    names, found = tuple(encoder.label_names or ()), likeliest(encoder, images, 1)
    few = names if len(names) <= FEW else ()
    return [Sight(name, p, few) for ((name, p),) in found] or [Sight(None, None)] * len(images)


def proven(key: str) -> dict[str, Any]:
    """Encode the three PNG files of a match again, now, and compare the results with its numbers."""
    made = MADE.get(key)
    encoder = encoder_of(made.model)
    settings = {"seed": 0, "normalize": encoder.normalize, "labels": None} | {k: made.row[k] for k in ("dtype", "norm")}
    return prove(encoder, made.row | {"settings": settings})


@dataclass(frozen=True)
class Changed:
    """A lookalike after a change: its picture, what the AI model sees in it, and how far it is from the target."""

    change: str
    pixels: torch.Tensor
    sight: Sight
    error: float | None


def changed(key: str, change: str) -> tuple[Made, Changed]:
    """Do to a lookalike what a website may do to a photo, and look again."""
    made = MADE.get(key)
    if change not in CHANGES:
        raise refused(f"Choose a change: {', '.join(CHANGES)}.")
    encoder = encoder_of(made.model)
    match, target = (measures.open_png(encoder, made.row[name]) for name in ("match", "target"))
    pixels = handle(match, TRANSFORMS[CHANGES[change]])
    z, aim = measures.embed(encoder, torch.stack([pixels, target]))
    return made, Changed(change, pixels, sights(encoder, pixels[None])[0], measures.relative_error(z, aim))


def compared(key: str) -> dict[str, list[Sight] | None]:
    """Show the same three pictures to every AI model of this Space; None for one that cannot be loaded."""
    made, found = MADE.get(key), {}
    pictures = [stored_image(made.row[name]) for name in ("source", "match", "target")]
    for model in MODELS:
        found[model] = None
        with suppress(gr.Error):
            encoder = encoder_of(model)
            found[model] = sights(encoder, encoder.preprocess(pictures))
    return found
