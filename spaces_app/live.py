"""Compute while a visitor watches: a match in progress, and steps along a direction."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from PIL.Image import Image
from torch import Tensor

from hf_equiv.analyses import measures
from hf_equiv.data.image_file import encode_png
from hf_equiv.formatting import finite
from hf_equiv.matching.match import match_embedding
from hf_equiv.matching.refine import refine_8bit
from hf_equiv.models.encoder import Encoder
from hf_equiv.precision import no_tf32
from hf_equiv.results import SCHEMA_VERSION, Progress, Status
from hf_equiv.runs.schema import Row

Curve = tuple[tuple[str, float, float], ...]
"""(stage, evaluations, embedding error) after every step; evaluations include those of earlier stages."""


@dataclass(frozen=True, slots=True)
class LiveMatch:
    """The state of a match; `png` is the image so far, and `source` and `target` are as the encoder sees them."""

    stage: str  # `match`, `refine`, `measure`, then `done`, or `stopped` if it was ended before
    png: bytes
    curve: Curve
    seconds: float
    source: bytes
    target: bytes
    ball: Row  # radius, norm, rtol, max_evals
    row: Row | None = None  # set at the end: `stopped` and a match row, or only its measures after a stop

    @property
    def error(self) -> float:
        """Embedding error ‖f(x)−z‖/‖z‖ of the best image of this stage; NaN before the first evaluation."""
        return self.curve[-1][2] if self.curve else math.nan

    @property
    def num_evals(self) -> float:
        """Evaluations so far, refinement included."""
        return self.curve[-1][1] if self.curve else 0.0

    @property
    def progress(self) -> float:
        """Share of the work that is done, from 0 to 1, as a guess: by the error of the match, then by evaluations."""
        if self.stage not in ("match", "refine"):
            return 0.97 if self.stage == "measure" else 1.0
        begun = [(evals, error) for stage, evals, error in self.curve if stage == "match" and error > 0]
        if not begun or not self.error > 0:
            return 0.0
        if self.stage == "refine":
            return _MATCHED + (0.97 - _MATCHED) * min(1.0, (self.num_evals - begun[-1][0]) / _REFINING)
        fallen = math.log(begun[0][1] / self.error) / max(math.log(begun[0][1] / self.ball["rtol"]), 1e-9)
        return _MATCHED * min(1.0, max(fallen, self.num_evals / self.ball["max_evals"], 0.0))

    @property
    def left(self) -> float | None:
        """Seconds to the end, if the rest goes on as before; None while there is too little to go by."""
        return self.seconds * (1 - self.progress) / self.progress if self.progress >= 0.05 else None


_MATCHED, _REFINING = 0.6, 350  # where the refinement begins, by time, and its usual number of evaluations


class _Enough(Exception):  # noqa: N818 (not an error)
    """Raised in the solver's progress hook to end it."""


@dataclass
class _Work:
    """State shared by the thread that works and the thread that watches; `now` is always replaced whole."""

    now: tuple[str, Tensor, Curve]
    stop: threading.Event
    time_limit: float
    start: float = field(default_factory=time.monotonic)

    def hook(self, stage: str, spent: float = 0.0) -> Callable[[Progress], None]:
        def note(p: Progress) -> None:
            point = (stage, spent + float(p.num_evals[0]), float(p.errors[0]))
            self.now = (stage, p.images[0].clone(), (*self.now[2], point))
            if self.stop.is_set() or time.monotonic() - self.start > self.time_limit:
                raise _Enough

        return note


def live_match(
    encoder: Encoder,
    source: Image,
    target: Image,
    *,
    radius: float | None = None,  # radius of the ball about the source
    norm: str = "linf",
    rtol: float = 1e-5,
    max_evals: int = 400,  # of the float match
    time_limit: float = math.inf,  # seconds after which the match stops as it is
    every: float = 0.4,  # seconds between two states
    stop: threading.Event | None = None,
) -> Iterator[LiveMatch]:
    """Match two photos as `hf-equiv match` does and yield its states; the last one is `done` or `stopped`."""
    # A separate thread does the work; closing the iterator ends it at its next evaluation. Calls share only the
    # encoder, and none changes it.
    files = [encode_png(x) for x in encoder.preprocess([source, target])]
    x, aim = (measures.open_png(encoder, png)[None] for png in files)
    if bool((x == aim).all()):
        raise ValueError("Both photos are the same to the AI model. Choose another one.")
    work, row = _Work(("match", x[0], ()), stop or threading.Event(), time_limit), Future[Row]()
    ball = {"radius": radius, "norm": norm, "rtol": rtol, "max_evals": max_evals}

    def run() -> None:
        try:
            row.set_result(_make(encoder, work, x, aim, files, ball))
        except BaseException as error:  # raised again where the match is watched
            row.set_exception(error)

    def state(row: Row | None = None) -> LiveMatch:
        stage, image, curve = work.now
        return LiveMatch(stage, encode_png(image), curve, time.monotonic() - work.start, *files, ball, row)

    worker = threading.Thread(target=run, daemon=True, name="live match")
    worker.start()
    try:
        while wait([row], every if work.now[2] else 0.05).not_done:  # the first state is shown at once
            if work.now[2]:
                yield state()
    finally:
        work.stop.set()
        worker.join()
    yield state(row.result())


def _make(encoder: Encoder, work: _Work, x: Tensor, aim: Tensor, files: list[bytes], ball: Row) -> Row:
    """Match, refine, measure, and return the row."""
    row: Row = {
        **encoder.provenance, **ball, "pair_id": "source->target", "source_id": "source", "target_id": "target",
        "stopped": True,
    }  # fmt: skip
    with suppress(_Enough):
        z = measures.embed(encoder, aim)
        goal = {key: ball[key] for key in ("radius", "norm", "rtol")}  # as the command line refines
        found = match_embedding(encoder, x, z, raise_on_failure=False, progress=work.hook("match"), **ball)
        if found.status[0] is Status.ERROR:
            raise ValueError(found.status[0].advice)
        cost = float(found.num_evals[0])
        work.now = ("refine", found.images[0], work.now[2])
        exact = refine_8bit(encoder, found.images, z, source=x, progress=work.hook("refine", cost), **goal)
        work.now = ("refine", exact.images[0], work.now[2])
        row |= {
            "solver": "lbfgs", "seed": 0, "schema_version": SCHEMA_VERSION, "status": str(found.status[0]),
            "embedding_error": finite(found.errors[0]), "num_evals": cost, "seconds": time.monotonic() - work.start,
            "stopped": False,
        }  # fmt: skip
    _, image, curve = work.now
    work.now = ("measure", image, curve)
    three = [measures.open_png(encoder, png) for png in (files[0], encode_png(image), files[1])]
    measured = measures.measure_match(encoder, *three, seed=0, pair_id="source->target")
    (source, *_), _, (target, *_) = likeliest(encoder, torch.stack(three), 1) or [((None, None),)] * 3
    work.now = ("stopped" if row["stopped"] else "done", image, curve)
    return row | measured | {"source_prob": source[1], "target_prob": target[1]}


@dataclass(frozen=True, slots=True)
class Stop:
    """One place x + h·v on a line, clipped to [0, 1]; `png` is rounded to 8 bit, the numbers are computed before."""

    step: float  # h, L2 in pixel units
    distance: float | None  # ‖f(x + hv) − f(x)‖ / ‖f(x)‖
    first_order: float  # |h|·‖Jv‖ / ‖f(x)‖, the distance that the Jacobian at x predicts
    png: bytes
    classes: tuple[tuple[str, float], ...]  # (name, probability), likeliest first; empty without a head


@torch.no_grad()
@no_tf32()
def likeliest(encoder: Encoder, images: Tensor, most: int) -> list[tuple[tuple[str, float], ...]]:
    """Return the first classes of each image (B, 3, H, W) with their probabilities; an empty list without a head."""
    if not encoder.has_head:
        return []
    names = encoder.label_names or ()
    scores = encoder.classify(images.to(encoder.device))
    best = measures.probabilities(encoder, scores).topk(min(most, len(names)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [tuple((names[k], p) for k, p in zip(*pair, strict=True)) for pair in pairs]


@torch.no_grad()
@no_tf32()
def stops_along(
    encoder: Encoder, image: Tensor, direction: Tensor, steps: Sequence[float], jvp: float
) -> tuple[Stop, ...]:
    """Evaluate the encoder at x + h·v, (3, H, W), for each step h of the unit vector v; `jvp` is ‖Jv‖ at x."""
    image, direction = image.to(encoder.device), direction.to(encoder.device)
    h = torch.tensor(list(steps), dtype=torch.float64, device=encoder.device).view(-1, 1, 1, 1)
    places = (image.double() + h * direction.double()).clamp(0, 1).to(image.dtype)
    z, moved = encoder(image[None])[0].double(), encoder(places).double()
    classes = likeliest(encoder, places, 5) or [()] * len(places)
    return tuple(
        Stop(
            step=step,
            distance=measures.relative_error(moved[k], z),
            first_order=abs(step) * jvp / float(z.norm()),
            png=encode_png(places[k]),
            classes=classes[k],
        )
        for k, step in enumerate(steps)
    )
