"""The tab to try it: two photos, a checkpoint, a budget; the match while it is made."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import views
from live import LiveMatch, live_match
from shelf import LIVE, MAX_EVALS, MODELS, RTOL, TIME_LIMIT, WORKERS, encoder_of, file_of, on_gpu

from hf_equiv import load_images
from hf_equiv.data.image_file import open_image

LARGEST_UPLOAD = 25 * 2**20


BUDGETS = {"any change": None, "16 of 255 grey levels": 16 / 255, "8 of 255": 8 / 255, "4 of 255": 4 / 255}


EFFORTS = {"quick": 0.4, "normal": 1.0}


_DOING = {
    "match": "Looking for pixels that embed as the target …",
    "refine": "Now as an 8-bit PNG: single steps of one grey level …",
    "measure": "Measuring …",
}


MOST_PIXELS = 50_000_000


_stops: dict[str, set[threading.Event]] = {}
"""Matches that are being made, by visitor: one may have several."""


_changing = threading.Lock()


def photo(value: str, **given: Any) -> gr.Image:
    """An upload that reaches us as the path of a file: the library reads it, and says what is wrong with it."""
    image = gr.Image(value, type="filepath", sources=["upload"], height=250, buttons=[], **given)
    image.preprocess = lambda payload: payload.path if payload else None  # gradio would open it first
    return image


def read_upload(path: str | None, name: str):
    """A visitor's file as an image without metadata, or a friendly error."""
    if not path:
        raise gr.Error(f"Choose a {name} photo first: upload one, or take one of the four.", print_exception=False)
    if os.path.getsize(path) > LARGEST_UPLOAD:
        raise gr.Error(f"The {name} photo is larger than 25 MB. Make it smaller.", print_exception=False)
    try:
        return open_image(Path(path).read_bytes(), f"the {name} photo", most_pixels=MOST_PIXELS)
    except (OSError, ValueError) as error:
        said = str(error).replace(f"image 'the {name} photo'", f"The {name} photo")
        raise gr.Error(said, print_exception=False) from error


def accept(path: str | None, name: str) -> tuple[Any, None]:
    """Say at once what is wrong with an upload, and put it away; nothing of the four is chosen any more."""
    try:
        read_upload(path, name)
    except gr.Error as error:
        gr.Warning(escape(error.message))
        return None, None
    return gr.skip(), None


def _matching(source: str, target: str, model: str, budget: str, effort: str, session: str) -> Iterator[LiveMatch]:
    """States of a match of two uploads, within the limits of this Space."""
    images = read_upload(source, "source"), read_upload(target, "target")
    encoder = encoder_of(model)
    stop = threading.Event()
    with _changing:
        _stops.setdefault(session, set()).add(stop)
    try:
        yield from live_match(
            encoder, *images, radius=BUDGETS[budget], rtol=_rtol(budget), stop=stop, time_limit=TIME_LIMIT, every=0.3,
            max_evals=max(1, round(MAX_EVALS * EFFORTS[effort])),
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    finally:
        with _changing:
            _stops[session].discard(stop)
            if not _stops[session]:
                del _stops[session]


def _rtol(budget: str) -> float:
    return RTOL if BUDGETS[budget] is None else 1e-4


@on_gpu
def watch_match(
    source: str, target: str, model: str, budget: str, effort: str, request: gr.Request
) -> Iterator[tuple[Any, ...]]:
    """Match two photos, and show it while it is made; a new stage is told to those who listen, once."""
    stage = ""
    for state in _matching(source, target, model, budget, effort, request.session_hash or ""):
        if state.stage not in ("done", "stopped"):
            told = gr.skip() if state.stage == stage else f"<p>{_DOING[state.stage]}</p>"
            stage = state.stage
            yield _live_view(state, _rtol(budget)), gr.skip(), gr.skip(), told
    ended = ""
    if state.stage == "stopped":
        limit = f": the limit is {TIME_LIMIT:.0f} s" if state.seconds > TIME_LIMIT else ""
        ended = f'<p class="verdict">Stopped after {state.num_evals:.0f} evaluations{limit}.</p>'
    view = (
        f"{ended}{views.match_view(state.source, state.png, state.target, state.row or {})}"
        f'<div class="narrow"><h3 class="block-title">How it went ({state.seconds:.1f} s)</h3>'
        f"{views.curve_view(state.curve, _rtol(budget))}</div>"
    )
    png, row = file_of(state.png, "match.png"), file_of(json.dumps(_record(state), indent=1).encode(), "row.json")
    told = f"{ended}<p>{escape(views.match_headline(state.png, state.target, state.row or {}))}</p>"
    yield view, gr.DownloadButton(value=png, visible=True), gr.DownloadButton(value=row, visible=True), told


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
        request: of the visitor; filled in by gradio.

    Returns:
        The match as a PNG file, and its row: embedding errors, PSNR, classes, cost, settings.
    """
    *_, state = _matching(source, target, model, budget, effort, request.session_hash or "")
    return file_of(state.png, "match.png"), _record(state)


def _record(state: LiveMatch) -> dict[str, Any]:
    return {"stopped": state.stage == "stopped", **(state.row or {})}


def _live_view(state: LiveMatch, rtol: float) -> str:
    return (
        f'<p class="verdict">{_DOING[state.stage]} error {state.error:.1e} after {state.num_evals:.0f} evaluations</p>'
        f'<div class="live">{views.picture(state.png, "the match so far", "the match so far")}'
        f"<div>{views.curve_view(state.curve, rtol)}</div></div>"
    )


def stop_match(request: gr.Request) -> None:
    """Stop the matches of this visitor; who has no session could be anybody, and stops nothing."""
    with _changing:
        for event in _stops.get(request.session_hash, ()) if request.session_hash else ():
            event.set()


def try_tab() -> None:
    """Two photos, a checkpoint, a budget; the match while it is made."""
    photos = load_images("builtin")
    paths = {item.id: file_of(_png(item.image), f"{item.id}.png", seconds=None) for item in photos}
    with gr.Row():
        with gr.Column(min_width=240):
            source = photo(paths["cat"], label="Looks like this: the source", elem_id="source")
            pick_source = gr.Dropdown(list(paths), value="cat", label="or one of these photos as the source")
        with gr.Column(min_width=240):
            target = photo(paths["coffee"], label="Embeds as this: the target", elem_id="target")
            pick_target = gr.Dropdown(list(paths), value="coffee", label="or one of these photos as the target")
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
    hidden = {"api_visibility": "private", "show_progress": "hidden"}
    for image, pick, name in ((source, pick_source, "source"), (target, pick_target, "target")):
        pick.input(paths.get, pick, image, **hidden)
        image.clear(lambda: None, None, pick, **hidden)  # it is none of the four any more
        image.upload(partial(accept, name=name), image, [image, pick], **hidden)
    compute = {"concurrency_id": "compute", "concurrency_limit": WORKERS}
    asked = [source, target, model, budget, effort]
    go.click(watch_match, asked, [view, png, row, told], api_visibility="private", show_progress="minimal", **compute)
    # the same for programs: hidden, its answer a file and numbers
    answer = [gr.File(label="match", visible=False), gr.JSON(label="row", visible=False)]
    gr.Button(visible=False).click(make_match, asked, answer, api_name="make_match", **compute)
    halt.click(stop_match, api_visibility="private", queue=False)


def _png(image) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
