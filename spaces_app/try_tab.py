"""Lay out the tab to try it: two photos, a checkpoint, a budget, and the match in progress."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import gradio as gr
import views
from charts import Axis, Series, chart
from live import LiveMatch, live_match
from shelf import HIDDEN, LIVE, MAX_EVALS, MODELS, RTOL, TIME_LIMIT, WORKERS, encoder_of, file_of, on_gpu, refused, warn

from hf_equiv import load_images
from hf_equiv.data.image_file import open_image

LARGEST_UPLOAD = 25 * 2**20
BUDGETS = {"any change": None, "16 of 255 grey levels": 16 / 255, "8 of 255": 8 / 255, "4 of 255": 4 / 255}
EFFORTS = {"quick": 0.4, "normal": 1.0}

_JACOBIAN = 20  # a curve with more evaluations between two points needs an explanation

_running: dict[threading.Event, str] = {}
"""Stop events of the matches in progress, with the session of their visitor."""


def photo(value: Any, **given: Any) -> gr.Image:
    """Make an upload that gives the path of its file unopened, so that the library reads it and explains errors."""
    image = gr.Image(value, type="filepath", format="png", sources=["upload"], height=250, buttons=[], **given)
    image.preprocess = lambda payload: payload.path if payload else None
    return image


def read_upload(path: str | None, name: str):
    """Open a visitor's file as an image without metadata."""
    if not path:
        raise refused(f"Choose a {name} photo first: upload one, or take one of the four.")
    if os.path.getsize(path) > LARGEST_UPLOAD:
        raise refused(f"The {name} photo is larger than 25 MB. Make it smaller.")
    try:
        return open_image(Path(path).read_bytes(), f"the {name} photo")
    except (OSError, ValueError) as error:
        raise refused(str(error).replace(f"image 'the {name} photo'", f"The {name} photo")) from error


def accept(path: str | None, name: str) -> tuple[Any, None]:
    """Remove an upload that cannot be read and explain why; in any case, clear the choice among the four photos."""
    try:
        read_upload(path, name)
    except gr.Error as error:
        warn(error.message)
        return None, None
    return gr.skip(), None


def _rtol(budget: str) -> float:
    return RTOL if BUDGETS[budget] is None else 1e-4


def _matching(source: str, target: str, model: str, budget: str, effort: str, session: str) -> Iterator[LiveMatch]:
    """Yield the states of a match of two uploads, within the limits of this Space."""
    if budget not in [*BUDGETS] or effort not in [*EFFORTS]:
        raise refused(f"Choose a budget ({', '.join(BUDGETS)}) and an effort ({', '.join(EFFORTS)}).")
    images = read_upload(source, "source"), read_upload(target, "target")
    encoder, stop = encoder_of(model), threading.Event()
    _running[stop] = session
    try:
        yield from live_match(
            encoder, *images, radius=BUDGETS[budget], rtol=_rtol(budget), stop=stop, time_limit=TIME_LIMIT, every=0.3,
            max_evals=max(1, round(MAX_EVALS * EFFORTS[effort])),
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise refused(str(error)) from error
    finally:
        del _running[stop]


def stop_match(request: gr.Request) -> None:
    """Stop the matches of this visitor; a request without a session stops nothing, since it could be anybody's."""
    for stop, session in list(_running.items()):
        if session and session == request.session_hash:
            stop.set()


@on_gpu
def watch_match(
    source: str, target: str, model: str, budget: str, effort: str, request: gr.Request
) -> Iterator[tuple[Any, ...]]:
    """Match two photos and show the match while it is made: view, two downloads, words for screen readers."""
    stage, rtol = "", _rtol(budget)
    for state in _matching(source, target, model, budget, effort, request.session_hash or ""):
        if state.stage not in ("done", "stopped"):
            told = gr.skip() if state.stage == stage else f"<p>{views.html.doing(state.stage)}</p>"  # once a stage
            stage = state.stage
            yield views.html.making(state, curve_view(state.curve, rtol)), gr.skip(), gr.skip(), told
    ended = views.html.ended(state, TIME_LIMIT)
    row = {"source": state.source, "match": state.png, "target": state.target, **(state.row or {})}
    view = views.html.made(ended, row, state.seconds, curve_view(state.curve, rtol))
    files = file_of(state.png, "match.png"), file_of(json.dumps(state.row, indent=1).encode(), "row.json")
    downloads = [gr.DownloadButton(value=file, visible=True) for file in files]
    yield view, *downloads, f"<p>{ended} {views.html.headline(row)}</p>"


@on_gpu
def make_match(
    source: str, target: str, model: str, budget: str, effort: str, request: gr.Request
) -> tuple[str, dict[str, Any]]:
    """Make an image that looks like the source photo and embeds as the target photo.

    Args:
        source: photo that the match shall look like.
        target: photo whose embedding it shall have.
        model: one of the checkpoints of this Space.
        budget: how far each pixel may move.
        effort: "quick" or "normal".
        request: request of the visitor; gradio fills it in.

    Returns:
        The match as a PNG file, and its row: embedding errors, PSNR, classes, cost, settings.
    """
    *_, state = _matching(source, target, model, budget, effort, request.session_hash or "")
    return file_of(state.png, "match.png"), state.row or {}


def curve_view(curve: Sequence[tuple[str, float, float]], rtol: float) -> str:
    """Draw the embedding error against evaluations, the float match and its refinement apart."""
    last = max((evals for _, evals, _ in curve), default=1.0)
    points = {key: [(evals, error) for stage, evals, error in curve if stage == key] for key in ("match", "refine")}
    series = [
        Series([(0.0, rtol), (max(last, 50.0), rtol)], "goal", "limit"),
        Series(points["match"], "float match"),
        Series(points["refine"], "8-bit PNG", "two"),
    ]
    leap = max((b[1] - a[1] for a, b in pairwise(curve)), default=0.0)
    note = f"Where it leaps, by up to {leap:.0f} evaluations, a whole Jacobian is computed."
    return chart(
        "Embedding error against evaluations", series, Axis("evaluations (forward + backward)", low=0.0),
        Axis("embedding error", log=True, high=max([2.0, *(e for _, _, e in curve if e < math.inf)])),
        note=note if leap >= _JACOBIAN else "",
    )  # fmt: skip


def try_tab() -> None:
    """Lay out the tab."""
    photos: list[gr.Image] = []
    offered = {item.id: item.image for item in load_images("builtin")}
    with gr.Row():
        for name, chosen, label in (("source", "cat", "Looks like this"), ("target", "coffee", "Embeds as this")):
            with gr.Column(min_width=240):
                image = photo(offered[chosen], label=f"{label}: the {name}", elem_id=name)
                pick = gr.Dropdown(list(offered), value=chosen, label=f"or one of these photos as the {name}")
                pick.input(offered.get, pick, image, **HIDDEN)
                image.clear(lambda: None, None, pick, **HIDDEN)
                image.upload(partial(accept, name=name), image, [image, pick], **HIDDEN)
                photos.append(image)
        with gr.Column(min_width=260):
            model = gr.Dropdown(list(MODELS), value="builtin", label="Checkpoint")
            budget = gr.Dropdown(list(BUDGETS), value="any change", label="How far each pixel may move")
            effort = gr.Radio(list(EFFORTS), value="normal", label="Effort", info=f"At most {TIME_LIMIT:.0f} seconds.")
            with gr.Row():
                go = gr.Button("Make the match", variant="primary", elem_id="go", min_width=150, scale=2)
                halt = gr.Button("Stop", elem_id="halt", min_width=80, scale=1)
    view = gr.HTML('<p class="small">The match appears here while it is being made.</p>', elem_id="made")
    told = gr.HTML(elem_id="told", elem_classes="unseen", padding=False, js_on_load=LIVE)
    with gr.Row():
        png = gr.DownloadButton("Download the PNG", visible=False, elem_id="png", size="sm")
        row = gr.DownloadButton("Download the numbers (JSON)", visible=False, elem_id="row", size="sm")
    asked = [*photos, model, budget, effort]
    compute = {"concurrency_id": "compute", "concurrency_limit": WORKERS}
    go.click(watch_match, asked, [view, png, row, told], api_visibility="private", show_progress="minimal", **compute)
    halt.click(stop_match, api_visibility="private", queue=False)
    # programs call `make_match` by its name and get a file and numbers
    answer = [gr.File(label="match", visible=False), gr.JSON(label="row", visible=False)]
    gr.Button(visible=False).click(make_match, asked, answer, api_name="make_match", **compute)
