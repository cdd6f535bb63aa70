"""Lay out the first tab: visitors look at a match, have it checked, choose another and play with it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any
from urllib.parse import urlencode
from zlib import crc32

import gradio as gr
import shelf
import views
from live import likeliest
from shelf import BUILTIN_RESULTS, QUICK, named_results, refused, telling
from showcase import Row, Showcase, prove

from hf_equiv.analyses.figures import difference_png, thumbnail
from hf_equiv.analyses.measures import open_png
from hf_equiv.models.encoder import Encoder
from hf_equiv.models.places import BUILTINS
from hf_equiv.runs.schema import IMAGE_COLUMNS


def list_matches(dataset: str = BUILTIN_RESULTS) -> list[dict[str, Any]]:
    """List the matches of a result dataset.

    Args:
        dataset: USER/NAME of the Hub; by default the results that ship with this Space.

    Returns:
        For each match its key, source, target, embedding error of the PNG, PSNR and class.
    """
    keys = ("key", "source_id", "target_id", "embedding_error_8bit", "psnr_db", "match_label")
    return [{key: row[key] for key in keys} for row in named_results(dataset).matches]


def get_match(key: str, dataset: str = BUILTIN_RESULTS) -> dict[str, Any]:
    """Give all numbers of one match.

    Args:
        key: key of the match, as `list_matches` gives it.
        dataset: USER/NAME of the Hub; by default the results that ship with this Space.

    Returns:
        The row without its pictures.
    """
    return {k: v for k, v in row_of(dataset, key).items() if k != "settings" and not isinstance(v, bytes)}


@shelf.on_gpu
def check_match(key: str, dataset: str = BUILTIN_RESULTS) -> dict[str, Any]:
    """Encode the three PNG files of a match again, now, and compare the results with its row.

    Args:
        key: key of the match, as `list_matches` gives it.
        dataset: USER/NAME of the Hub; by default the results that ship with this Space.

    Returns:
        Whether all numbers hold, and each number as stated and as computed now.
    """
    row = row_of(dataset, key)
    with telling(dataset):
        return prove(shelf.recorded_encoder(row, dataset), row)


def row_of(dataset: str | None, key: str) -> Row:
    """Return one match by its key."""
    for row in named_results(dataset).matches:
        if row["key"] == key:
            return row
    raise refused(f"There is no lookalike {str(key)[:200]!r} in {dataset or BUILTIN_RESULTS!r}.")


def first_match(asked: str | None = None) -> Row:
    """Return the match of this Space's own results that a link names, or else the first one."""
    home = shelf.home_of("matches")
    rows = shelf.results(home).matches
    return next((row for row in rows if row["key"] == asked), None) or _leading(rows, home)


def picture_of(dataset: str, key: str, who: str) -> bytes:
    """Return a picture of a match as the page names it: a column of the row, `change`, or `small`."""
    row = row_of(dataset, key)
    with telling(dataset):
        if who == "small":
            return _small(dataset, key)
        return row[who] if who in IMAGE_COLUMNS else difference_png(row["source"], row["match"])[0]


@lru_cache(maxsize=256)
def _small(dataset: str, key: str) -> bytes:
    return thumbnail(row_of(dataset, key)["match"], 160)


def _address(row: Row, dataset: str) -> str:
    """Return the URL prefix of a match's pictures, with a checksum so that caches refresh."""
    named = {"dataset": dataset} if dataset != shelf.home_of("matches") else {}
    return f"picture?{urlencode({'match': row['key'], 'v': crc32(row['match']), **named})}&of="


def as_shown(dataset: str, key: str) -> Row:
    """Return a match with its address and, if its checkpoint is at hand, the probabilities of the photos' classes."""
    row = row_of(dataset, key)
    row = row | {"at": _address(row, dataset)}
    if row["model_id"] in BUILTINS and dataset == shelf.home_of("matches"):
        with suppress(gr.Error), telling(dataset):  # runs do not record them
            encoder = shelf.recorded_encoder(row, dataset)
            return row | {f"{who}_prob": _probability(encoder, row[who]) for who in ("source", "target")}
    return row


@lru_cache(maxsize=32)
def _probability(encoder: Encoder, png: bytes) -> float | None:
    likely = likeliest(encoder, open_png(encoder, png)[None], 1)
    return likely[0][0][1] if likely else None


@lru_cache(maxsize=32)
def match_shown(dataset: str, key: str) -> tuple[str, str, str]:
    """Show one match, its numbers and the game with it; the view names the dataset that a link to it must name."""
    named = "" if dataset == shelf.home_of("matches") else dataset
    with telling(dataset):
        row = as_shown(dataset, key)
        return views.html.match(row, named), views.html.numbers(row), views.html.game(row)


@lru_cache(maxsize=32)
def strip_of(dataset: str, key: str) -> str:
    """Show the matches of a dataset as buttons with small pictures."""
    with telling(dataset):
        rows = [row | {"at": _address(row, dataset)} for row in named_results(dataset).matches]
        return views.html.strip(rows, key)


def show_match(dataset: str, key: str) -> tuple[Any, ...]:
    """Return the parts of the tab that change with the match: key, view, way to its walk, verdict, numbers, game."""
    row = row_of(dataset, key)
    shown, numbers, game = match_shown(dataset, key)
    return key, shown, gr.update(visible=_has_walk(row, dataset)), "", numbers, game


def show_dataset(dataset: str, asked: str | None = None) -> tuple[Any, ...]:
    """Return the contents of the tab: gallery, note, then those of `show_match`."""
    shown = named_results(dataset)
    if not shown.matches:
        raise refused(f"{shown.name!r} holds no matches with pictures.")
    key = row_of(dataset, asked)["key"] if asked else _leading(shown.matches, dataset)["key"]
    return strip_of(dataset, key), note_of(shown), *show_match(dataset, key)


def _leading(rows: Sequence[Row], dataset: str) -> Row:
    """Return the match to show first: the one that the other tab melts, or else the most similar to its photo."""
    return next((row for row in rows if _has_walk(row, dataset)), rows[0])


def _has_walk(row: Row, dataset: str) -> bool:
    """Return whether the first walk of the other tab starts and ends at the photos of a match."""
    home = shelf.home_of("paths")
    walk = next(iter(shelf.results(home).paths.values()))[0]
    ends = (walk["image_id"], walk["target_id"])
    return dataset == home and (row["source_id"], row["target_id"]) == ends


def note_of(shown: Showcase) -> str:
    """Return a note with the number of matches and their checkpoints."""
    made = sorted({row["model_id"] for row in shown.matches})
    return views.html.note(shown, made, "" if shelf.home_of("matches") == shelf.DATASET else shelf.DATASET)


def _select(dataset: str, event: gr.EventData) -> tuple[Any, ...]:
    return show_match(dataset, str(event.key))


def _check(key: str, dataset: str) -> str:
    try:
        return views.html.verdict(check_match(key, dataset))
    except gr.Error as error:
        return views.html.notice(error.message)


def _change(name: str, opened: str) -> tuple[Any, ...]:
    name = (name or "").strip() or BUILTIN_RESULTS
    if name == opened:
        return (gr.skip(),) * 10
    try:
        return gr.skip(), name, *show_dataset(name)
    except gr.Error as error:  # keep the results that are shown, and restore their name
        return opened, gr.skip(), gr.skip(), views.html.notice(error.message), *(gr.skip(),) * 6


def look_tab(tabs: gr.Tabs) -> list[Any]:
    """Lay out the tab and return its parts: dataset, opened dataset, then the outputs of `show_dataset`."""
    # the page holds the first match from the start
    offered, home = [BUILTIN_RESULTS, *([shelf.DATASET] if shelf.DATASET else [])], shelf.home_of("matches")
    strip, told, first, shown, way, _, numbers_shown, game_shown = show_dataset(home)
    key, opened = gr.State(first), gr.State(home)
    view = gr.HTML(shown, elem_id="shown", js_on_load=views.script("shown.js"))
    with gr.Row(elem_classes="actions"):
        check = gr.Button("Prove it", variant="primary", elem_id="check", scale=0, min_width=130)
        melt = gr.Button("Watch it melt", elem_id="melt", scale=0, min_width=130, visible=way["visible"])
    verdict = gr.HTML(elem_id="verdict", js_on_load=shelf.LIVE)
    numbers = gr.HTML(numbers_shown, elem_id="numbers")
    gr.HTML('<h2 class="section">Other pairs</h2>')
    gallery = gr.HTML(strip, elem_id="gallery", js_on_load=views.script("strip.js"))
    game = gr.HTML(game_shown, elem_id="game", js_on_load=views.script("game.js"))
    with gr.Accordion("Other collections of lookalikes", open=False):
        dataset = gr.Dropdown(
            offered, value=home, label="Collection", allow_custom_value=True, elem_id="dataset",
            info="Choose, or type the name of a dataset on the Hugging Face Hub, as USER/NAME.",
        )  # fmt: skip
        note = gr.HTML(told, elem_classes="small")  # not Markdown, which would format the names in a stranger's dataset
    changing = [key, view, melt, verdict, numbers, game]
    parts = [dataset, opened, gallery, note, *changing]
    dataset.change(_change, [dataset, opened], parts, api_visibility="private", queue=False)
    gallery.click(_select, opened, changing, **QUICK)
    check.click(None, None, verdict, js="() => '<p class=verdict>Checking …</p>'", **QUICK)
    check.click(_check, [key, opened], verdict, concurrency_limit=2, **shelf.HIDDEN)
    melt.click(lambda: gr.Tabs(selected="melt"), None, tabs, **QUICK)
    return parts
