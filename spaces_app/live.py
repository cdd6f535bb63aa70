"""A match that can be watched while it is made, and stopped."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_equiv import formatting
from hf_equiv.analyses import measures
from hf_equiv.checks import check_count, check_positive, check_radius, check_rtol
from hf_equiv.data.image_file import decode_png, encode_png
from hf_equiv.matching.match import match_embedding
from hf_equiv.matching.refine import refine_8bit
from hf_equiv.precision import no_tf32
from hf_equiv.results import SCHEMA_VERSION, Progress, Status

if TYPE_CHECKING:
    from PIL.Image import Image

    from hf_equiv.models.encoder import Encoder

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LiveMatch:
    """A match as it is now.

    Attributes:
        stage: `match`, `refine`, `measure`, then `done`, or `stopped` if it was ended before.
        png: the image so far, rounded to 8 bit, as the bytes of a PNG file.
        curve: (stage, evaluations, embedding error) after every step, the evaluations of both stages added.
        seconds: since the start.
        source: the source as the encoder sees it, PNG.
        target: the target, likewise.
        row: at the end, the columns of a match row without the images; of a stopped match its measures only.
    """

    stage: str
    png: bytes
    curve: tuple[tuple[str, float, float], ...]
    seconds: float
    source: bytes
    target: bytes
    row: Row | None = None

    @property
    def error(self) -> float:
        """Embedding error ‖f(x)−z‖/‖z‖ of the best image of this stage; NaN before the first evaluation."""
        return self.curve[-1][2] if self.curve else math.nan

    @property
    def num_evals(self) -> float:
        """Evaluations so far, refinement included."""
        return self.curve[-1][1] if self.curve else 0.0


class _Enough(Exception):  # noqa: N818 (no error: somebody has seen enough)
    """Raised in the solver's hook to end it."""


@dataclass
class _State:
    """What the working thread and the one that watches share."""

    image: Tensor
    stage: str = "match"
    curve: list[tuple[str, float, float]] = field(default_factory=list)
    spent: float = 0.0
    row: Row | None = None
    error: BaseException | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    news: threading.Condition = field(default_factory=threading.Condition)
    over: bool = False


def live_match(
    encoder: Encoder,
    source: Image,
    target: Image,
    *,
    radius: float | None = None,
    norm: str = "linf",
    rtol: float = 1e-5,
    max_evals: int = 400,
    refine: bool = True,
    time_limit: float | None = None,
    every: float = 0.4,
    stop: threading.Event | None = None,
    source_id: str = "source",
    target_id: str = "target",
) -> Iterator[LiveMatch]:
    """Match two photos and yield the state of it until it is done: what `hf-equiv match` does with one pair.

    The work is done in a thread of its own; closing the iterator ends it at its next evaluation. Two calls share
    nothing but the encoder, which is only read.

    Args:
        encoder: f.
        source: the photo to start from.
        target: the photo whose embedding is wanted.
        radius: of the ball about the source, pixels in [0, 1]; None for no ball.
        norm: of the ball, `linf` or `l2`.
        rtol: embedding error ‖f(x)−z‖/‖z‖ at which a match is finished.
        max_evals: evaluations of the float match; the 8-bit refinement may take as many again.
        refine: refine on the 8-bit grid; otherwise the match is rounded.
        time_limit: seconds after which the match is stopped as it is.
        every: seconds between two states, at least.
        stop: set it to stop the match as it is.
        source_id: name of the source in the row.
        target_id: name of the target in the row.

    Yields:
        States; the last has stage `done` or `stopped`, and the row.

    Raises:
        ValueError: photos that are equal to the encoder, or a bad number.
    """
    check_rtol(rtol)
    check_count(max_evals, "max_evals")
    check_positive(every, "every")
    check_radius(radius, norm, math.prod(encoder.input_shape))
    start = time.monotonic()
    dtype = torch.float64 if encoder.dtype == torch.float64 else torch.float32
    files = [encode_png(x) for x in encoder.preprocess([source, target])]
    x, aim = (decode_png(png, dtype).to(encoder.device)[None] for png in files)
    if bool((x == aim).all()):
        raise ValueError("`source` and `target` must differ; the encoder sees the same pixels in both. Choose another.")
    state = _State(image=x[0], stop=stop or threading.Event())
    ball: dict[str, Any] = {"radius": radius, "norm": norm, "rtol": rtol, "max_evals": max_evals}
    record = {
        **encoder.provenance,
        **{"pair_id": f"{source_id}->{target_id}", "source_id": source_id, "target_id": target_id},
        **{"solver": "lbfgs", "radius": radius, "norm": norm, "rtol": rtol, "max_evals": max_evals, "seed": 0},
        "schema_version": SCHEMA_VERSION,
    }

    def hook(stage: str) -> Callable[[Progress], None]:
        def note(p: Progress) -> None:
            with state.news:
                state.stage, state.image = stage, p.images[0].clone()
                state.curve.append((stage, state.spent + float(p.num_evals[0]), float(p.errors[0])))
                state.news.notify()
            if state.stop.is_set() or (time_limit is not None and time.monotonic() - start > time_limit):
                raise _Enough

        return note

    def work() -> None:
        try:
            _work(encoder, state, x, aim, files, ball, record, hook, refine=refine)
        except BaseException as error:  # raised again where the match is watched
            state.error = error
        finally:
            with state.news:
                state.over = True
                state.news.notify()

    worker = threading.Thread(target=work, daemon=True, name="live match")
    worker.start()
    try:
        while not state.over:
            with state.news:
                state.news.wait_for(lambda: state.over or bool(state.curve), timeout=1.0)
            if state.curve and not state.over:
                yield _snapshot(state, start, files)
                _pause(state, every)
    finally:
        state.stop.set()
        worker.join()
    if state.error is not None:
        raise state.error
    yield _snapshot(state, start, files)


def _work(
    encoder: Encoder,
    state: _State,
    x: Tensor,
    aim: Tensor,
    files: list[bytes],
    ball: Row,
    record: Row,
    hook: Callable[[str], Callable[[Progress], None]],
    *,
    refine: bool,
) -> None:
    """Match, refine, measure."""
    begin, whole, cost = time.monotonic(), False, 0.0
    status, error = Status.MAX_EVALS, math.nan
    try:
        with torch.no_grad(), no_tf32():
            z = encoder(aim)
        found = match_embedding(encoder, x, z, raise_on_failure=False, progress=hook("match"), **ball)
        status, error, cost = found.status[0], float(found.errors[0]), float(found.num_evals[0])
        if status is Status.ERROR:
            raise ValueError(status.advice)
        state.image, state.spent = found.images[0], cost
        if refine:
            exact = refine_8bit(encoder, state.image[None], z, source=x, progress=hook("refine"), **ball)
            state.image = exact.images[0]
        whole = True
    except _Enough:
        pass
    state.stage = "measure"
    png = encode_png(state.image)
    three = [decode_png(data, x.dtype) for data in (files[0], png, files[1])]
    measured = measures.measure_match(encoder, *three, seed=0, pair_id=record["pair_id"])
    if whole:
        seconds = time.monotonic() - begin
        made = {"status": str(status), "embedding_error": formatting.finite(torch.tensor(error))}
        state.row = record | made | measured | {"num_evals": cost, "seconds": seconds}
    else:
        state.row = measured
    state.stage = "done" if whole else "stopped"


def _pause(state: _State, seconds: float) -> None:
    with state.news:
        state.news.wait_for(lambda: state.over, timeout=seconds)


def _snapshot(state: _State, start: float, files: list[bytes]) -> LiveMatch:
    with state.news:
        image, stage, curve = state.image, state.stage, tuple(state.curve)
    return LiveMatch(stage, encode_png(image), curve, time.monotonic() - start, files[0], files[1], state.row)
