"""Match two photos in one call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hf_equiv.analyses.measures import top_classes
from hf_equiv.matching.match import match_embedding
from hf_equiv.matching.refine import refine_8bit
from hf_equiv.matching.search import ProgressHook
from hf_equiv.models.encoder import Encoder
from hf_equiv.results import MatchResult


def match_photos(
    source: Any,
    target: Any,
    model: str | os.PathLike[str] | Encoder = "builtin",
    *,
    radius: float | None = None,
    norm: str = "linf",
    rtol: float = 1e-5,
    max_evals: int = 1000,
    labels: Sequence[str] | None = None,
    progress: ProgressHook | bool | None = None,
) -> MatchResult:
    """Make an 8-bit image that looks like one photo and embeds as another.

    It is `Encoder.preprocess`, `match_embedding` and `refine_8bit` in turn; their guarantees hold.

    Args:
        source: the photo to look like, in any form that `Encoder.preprocess` takes, such as a path.
        target: the photo to embed as.
        model: a checkpoint as for `Encoder.from_pretrained`, or an encoder. Load one yourself for several matches.
        radius: radius of a ball about the source, in pixel units, such as 8/255; None for no ball.
        norm: norm of the ball, "linf" or "l2".
        rtol: embedding error at which the match is done.
        max_evals: evaluations of the match, and of its refinement.
        labels: class names for CLIP and SigLIP, whose text encoder then names the images; None for the model's head.
        progress: called as by `match_embedding` and `refine_8bit`. By default a bar in a terminal or notebook; False
            for none.

    Returns:
        The 8-bit match with source, target, labels (if the model has some), and cost and trace of both stages. A match
        that was not reached has a status that says why.

    Raises:
        ValueError: unreadable or equal photos, a bad number, or a checkpoint that cannot be used.
        OSError: a photo or checkpoint that does not exist or cannot be fetched.

    Example:
        >>> from hf_equiv import load_images, match_photos
        >>> cat, coffee, *_ = load_images("builtin")
        >>> match_photos(cat, coffee).labels  # doctest: +SKIP
        (('Egyptian cat', 'espresso', 'espresso'),)
    """
    encoder = model if isinstance(model, Encoder) else Encoder.from_pretrained(model)
    pixels = encoder.preprocess([source, target])
    pixels = pixels.to(encoder.device, torch.promote_types(torch.float32, encoder.dtype))
    x, t = pixels.split(1)
    seen = top_classes(encoder, pixels, labels)  # before the work, since it may refuse `labels`
    how: dict[str, Any] = {"radius": radius, "norm": norm, "rtol": rtol, "max_evals": max_evals, "progress": progress}
    found = match_embedding(encoder, x, t, raise_on_failure=False, **how)
    exact = refine_8bit(encoder, found.images, t, source=x, **how)
    made = top_classes(encoder, exact.images, labels)
    names = encoder.label_names if labels is None else labels
    before = float(found.num_evals[0])
    return replace(
        exact,
        num_evals=found.num_evals + exact.num_evals,
        seconds=found.seconds + exact.seconds,
        traces=((*found.traces[0], *((before + count, error) for count, error in exact.traces[0])),),
        labels=((names[seen[0]], names[made[0]], names[seen[1]]),) if seen and made and names else None,
        float_errors=found.errors,
    )
