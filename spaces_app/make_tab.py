"""Lay out the tab where visitors make a lookalike of their own: two photos, an AI model, the match in progress."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any
from urllib.parse import urlencode

import gradio as gr
import views
from charts import Axis, Series, chart
from gradio.context import Context
from live import LiveMatch, live_match
from making import outcome
from making.jobs import MATCHES, followed, soon
from making.outcome import CHANGES, MADE, Made
from making.uploads import Photo, read_upload, shown
from shelf import HIDDEN, LIVE, MAX_EVALS, MODELS, QUICK, RTOL, TIME_LIMIT, encoder_of, file_of, on_gpu, refused

from hf_equiv.data.image_file import encode_png
from hf_equiv.data.sources import BUILTIN_PHOTOS

BUDGETS = {"any change": None, "16 of 255 grey levels": 16 / 255, "8 of 255": 8 / 255, "4 of 255": 4 / 255}
EFFORTS = {"quick": 0.4, "normal": 1.0}
OFFERED = {name: file.read_bytes() for name, file in BUILTIN_PHOTOS.items()}
PHOTOS = {"source": ("cat", "Looks like this"), "target": ("coffee", "Seen as this")}

_JACOBIAN = 20  # a curve with more evaluations between two points needs an explanation
_SCRIPT = views.script("make.js")


def look_at(path: str | None, model: str, label: str) -> tuple[Any, Any]:
    """Tell what the AI model sees in a photo; remove one that cannot be read, convert one that browsers do not show."""
    if not path:
        return gr.skip(), gr.skip()
    try:
        image = read_upload(path, label)
        picture = shown(path, image)
    except gr.Error as error:
        return None, views.html.notice(error.message)
    if picture:
        return picture, gr.skip()  # this triggers the handler again
    encoder = encoder_of(model)
    return gr.skip(), views.making.seen(outcome.sights(encoder, encoder.preprocess([image]))[0])


def _rtol(budget: str) -> float:
    return RTOL if BUDGETS[budget] is None else 1e-4


@on_gpu
def match_uploads(source: str, target: str, model: str, budget: str, effort: str, key: str) -> Iterator[LiveMatch]:
    """Yield the states of a match of two uploads, within the limits of this Space; `key` is that of the job."""
    images = [read_upload(path, label) for path, (_, label) in zip((source, target), PHOTOS.values(), strict=True)]
    try:
        yield from live_match(
            encoder_of(model), *images, radius=BUDGETS[budget], rtol=_rtol(budget), stop=MATCHES.stop_of(key),
            time_limit=TIME_LIMIT, every=0.3, max_evals=max(1, round(MAX_EVALS * EFFORTS[effort])),
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise refused(str(error)) from error


async def _states(request: gr.Request, *asked: str) -> AsyncIterator[int | LiveMatch]:
    """Yield the place in the queue while a visitor waits, 0 at the end of it, then the states of the match."""
    *_, model, budget, effort = asked
    if budget not in [*BUDGETS] or effort not in [*EFFORTS] or model not in MODELS:
        named = f"a budget ({', '.join(BUDGETS)}), an effort ({', '.join(EFFORTS)}) and a model ({', '.join(MODELS)})"
        raise refused(f"Choose {named}; each must be in the list.")
    with MATCHES.entered(request) as job:
        async for place in MATCHES.turn(job):
            yield place
        if job.stop.is_set():
            return
        yield 0
        async with aclosing(followed(match_uploads(*asked, job.key))) as states:
            async for state in states:
                yield state


async def watch_match(
    source: str, target: str, model: str, budget: str, effort: str, request: gr.Request
) -> AsyncIterator[tuple[Any, ...]]:
    """Match two photos and show the match while it is made: view, key, tools, share, words, three empty answers."""
    told = ""
    try:
        async with aclosing(_states(request, source, target, model, budget, effort)) as states:
            async for now in states:
                if isinstance(now, int):
                    words = view = views.making.waiting(now, TIME_LIMIT)
                elif now.row is None:
                    words = views.making.doing(now.stage)
                    view = views.making.making(now, curve_view(now.curve, _rtol(budget)), TIME_LIMIT)
                else:
                    row = {"source": now.source, "match": now.png, "target": now.target, **now.row}
                    key = MADE.put(Made(row, model, now.seconds, curve_view(now.curve, _rtol(budget))))
                    yield *shown_again(key), views.making.headline(row), *("",) * 3
                    return
                yield *_no_result(view), gr.skip() if words == told else words, *("",) * 3  # once a stage
                told = words
        yield *_no_result('<p class="verdict">You pressed Stop before it began.</p>'), *("",) * 4
    except gr.Error as error:
        yield *_no_result(views.html.notice(error.message)), *("",) * 4


def _no_result(view: str) -> tuple[Any, ...]:
    return view, "", gr.Column(visible=False), gr.skip()


def shown_again(key: str) -> tuple[Any, ...]:
    """Show a match that was made: view, key, tools, picture to share."""
    made = MADE.get(key)
    numbers = {name: value for name, value in made.row.items() if not isinstance(value, bytes)}
    picture = views.share_picture(made.row, str(views.making.headline(made.row)))
    view = views.making.result(made, f"?{urlencode({'tab': 'make', 'made': key})}", TIME_LIMIT, numbers)
    return view, key, gr.Column(visible=True), gr.DownloadButton(value=file_of(picture, "share.png"))


async def make_match(
    source: str, target: str, model: str, budget: str, effort: str, request: gr.Request
) -> tuple[str, dict[str, Any]]:
    """Make an image that looks like the source photo and embeds as the target photo.

    Args:
        source: photo that the match should look like.
        target: photo whose embedding it should have.
        model: one of the checkpoints of this Space.
        budget: how far each pixel may move.
        effort: "quick" or "normal".
        request: request of the visitor; gradio fills it in.

    Returns:
        The match as a PNG file, and its row: embedding errors, PSNR, classes, cost, settings.
    """
    state: Any = None
    async with aclosing(_states(request, source, target, model, budget, effort)) as states:
        async for now in states:
            state = now
    return file_of(state.png, "match.png"), state.row or {}


def curve_view(curve: Sequence[tuple[str, float, float]], rtol: float) -> str:
    """Draw the embedding error against evaluations, the float match and its refinement apart, in words of a visitor."""
    last = max((evals for _, evals, _ in curve), default=1.0)
    points = {key: [(evals, error) for stage, evals, error in curve if stage == key] for key in ("match", "refine")}
    series = [
        Series([(0.0, rtol), (max(last, 50.0), rtol)], "goal", "limit"),
        Series(points["match"], "changing pixels"),
        Series(points["refine"], "rounding to a PNG file", "two"),
    ]
    leap = max((b[1] - a[1] for a, b in pairwise(curve)), default=0.0)
    note = f"Where it leaps, by up to {leap:.0f} tries, all directions are tried at once."
    return chart(
        "Distance from the other photo against tries", series, Axis("tries", low=0.0),
        Axis("how far from the other photo", log=True, high=max([2.0, *(e for _, _, e in curve if e < math.inf)])),
        note=note if leap >= _JACOBIAN else "",
    )  # fmt: skip


def _take(name: str) -> str:
    """Write one of the four photos to a file for the visitor."""
    if name not in OFFERED:
        raise refused(f"Take one of the four photos: {', '.join(OFFERED)}.")
    return file_of(OFFERED[name], f"{name}.jpg")


def _take_chosen(event: gr.EventData) -> str:
    return _take(str(event.key))


def _photo(which: str) -> tuple[Photo, gr.HTML]:
    """Lay out one photo with the four to take instead, and a place for what the AI model sees in it."""
    chosen, label = PHOTOS[which]
    with gr.Column(min_width=230):
        image = Photo(
            _take(chosen), type="filepath", format="png", label=label, elem_id=which,
            sources=["upload", "webcam", "clipboard"], height=220, buttons=[], alt_text=f"{label}: the {which} photo",
        )  # fmt: skip
        thumbs = gr.HTML(views.making.thumbs(OFFERED), elem_id=f"take-{which}", js_on_load=_SCRIPT, padding=False)
        note = gr.HTML(elem_id=f"seen-{which}", padding=False, js_on_load=LIVE)
    thumbs.click(_take_chosen, None, image, **QUICK)
    image.clear(lambda: "", None, note, **QUICK)
    return image, note


def _open_page(request: gr.Request) -> tuple[Any, ...]:
    """Tell what the AI model sees in the first two photos, or show the match of a link, its photos and model."""
    key = request.query_params.get("made")
    view: Any = gr.skip()
    if key:
        try:
            made = MADE.get(key)
            photos = [file_of(made.row[name], f"{name}.png") for name in PHOTOS]
            return *shown_again(key), *photos, made.model, gr.skip(), gr.skip()
        except gr.Error as error:
            view = views.html.notice(error.message)
    return view, *(gr.skip(),) * 6, *_first_notes()


@lru_cache
def _first_notes() -> list[str]:
    photos = [read_upload(_take(name), label) for name, label in PHOTOS.values()]
    encoder = encoder_of("builtin")
    return [views.making.seen(sight) for sight in outcome.sights(encoder, encoder.preprocess(photos))]


def _broken(change: str, key: str) -> str:
    made, now = outcome.changed(key, change)
    return views.making.broken(made, now, encode_png(now.pixels))


def _others(key: str) -> str:
    return views.making.others(outcome.compared(key), MADE.get(key).model) if key and len(MODELS) > 1 else ""


def make_tab() -> None:
    """Lay out the tab."""
    gr.HTML(views.making.head(), padding=False)
    with gr.Row(elem_id="two"):
        source, seen_source = _photo("source")
        swap = gr.Button("⇄ Swap", elem_id="swap", scale=0, min_width=90, size="sm")
        target, seen_target = _photo("target")
    with gr.Row(), gr.Column():
        with gr.Accordion("Options", open=len(MODELS) > 1):
            model = gr.Dropdown(list(MODELS), value="builtin", label="AI model", visible=len(MODELS) > 1)
            budget = gr.Dropdown(list(BUDGETS), value="any change", label="How far each pixel may move")
            effort = gr.Radio(list(EFFORTS), value="normal", label="Effort", info=f"At most {TIME_LIMIT:.0f} seconds.")
    with gr.Row():
        go = gr.Button("Make the lookalike", variant="primary", elem_id="go", min_width=150, scale=2)
        halt = gr.Button("Stop", elem_id="halt", min_width=80, scale=1)
    view = gr.HTML(elem_id="made", js_on_load=_SCRIPT, padding=False)
    told = gr.HTML(elem_id="told", elem_classes="unseen", padding=False, js_on_load=LIVE)
    key = gr.State("")
    with gr.Column(visible=False, elem_id="tools") as tools:
        with gr.Row(elem_classes="actions"):
            proof = gr.Button("Prove it", variant="primary", elem_id="prove", min_width=130)
            share = gr.DownloadButton("Download a picture to share", elem_id="share", min_width=130)
        proven = gr.HTML(elem_id="proven", js_on_load=LIVE, padding=False)
        gr.HTML('<h3 class="block-title">Try to break it</h3>', padding=False)
        with gr.Row(elem_classes="actions"):
            changes = [gr.Button(change, elem_id=f"try-{k}", min_width=130) for k, change in enumerate(CHANGES)]
        trial = gr.HTML(elem_id="trial", js_on_load=LIVE, padding=False)
        others = gr.HTML(elem_id="others", padding=False)
    private = {"api_visibility": "private", "concurrency_limit": None}
    quietly = HIDDEN | {"concurrency_limit": None}
    for image, note in ((source, seen_source), (target, seen_target)):
        look = partial(soon, partial(look_at, label=image.label))
        gr.on([image.change, model.change], look, [image, model], [image, note], **quietly)
        image.change(None, view, view, js="(v) => v.includes('verdict bad') ? '' : v", **QUICK)
    both = [source, target, seen_source, seen_target]
    swap.click(None, both, [target, source, seen_target, seen_source], js="(...a) => a", api_visibility="private")
    asked, outputs = [source, target, model, budget, effort], [view, key, tools, share]
    done = go.click(watch_match, asked, [*outputs, told, proven, trial, others], **quietly)
    done.then(partial(soon, _others), key, others, **quietly)
    halt.click(MATCHES.stop, api_visibility="private", queue=False)
    proof.click(partial(soon, lambda key: views.html.verdict(outcome.proven(key))), key, proven, **private)
    for button, change in zip(changes, CHANGES, strict=True):
        button.click(partial(soon, partial(_broken, change)), key, trial, **private)
    page = Context.root_block
    page.load(_open_page, None, [*outputs, source, target, model, seen_source, seen_target], **QUICK)
    page.unload(MATCHES.stop)
    # programs call `make_match` by its name and get a file and numbers
    answer = [gr.File(label="match", visible=False), gr.JSON(label="row", visible=False)]
    gr.Button(visible=False).click(make_match, asked, answer, api_name="make_match", concurrency_limit=None)
