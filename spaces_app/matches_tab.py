"""Lay out the matches tab: visitors choose a match, look at it and have it checked."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any
from urllib.parse import urlencode

import gradio as gr
import shelf
import views
from shelf import BUILTIN_RESULTS, HIDDEN, named_results, refused, telling
from showcase import Row, Showcase, check_shown


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
    row, start = row_of(dataset, key), time.perf_counter()
    with telling(dataset):
        found = check_shown(shelf.recorded_encoder(row, dataset), row)
    numbers = {c.name: {"stated": c.stated, "now": c.now, "holds": c.holds} for c in found}
    return {"holds": all(c.holds for c in found), "seconds": time.perf_counter() - start, "numbers": numbers}


def row_of(dataset: str | None, key: str) -> Row:
    """Return one match by its key."""
    shown = named_results(dataset)
    for row in shown.matches:
        if row["key"] == key:
            return row
    raise refused(f"There is no match {str(key)[:200]!r} in {shown.name!r}.")


def check_view(key: str, dataset: str) -> tuple[str, str]:
    """Check a match and show the verdict and a table."""
    found = check_match(key, dataset)
    return views.html.verdict(found), views.html.checked(found)


def match_shown(dataset: str | None, key: str) -> str:
    """Show one match, with a link to it."""
    row = row_of(dataset, key)
    asked = {"pair": row["key"]} | ({"dataset": dataset} if dataset not in (None, "", BUILTIN_RESULTS) else {})
    with telling(dataset):
        return views.html.match(row, f"?{urlencode(asked)}")


@lru_cache(maxsize=32)
def strip_of(dataset: str | None, key: str) -> str:
    """Show the matches of a dataset as buttons with small pictures."""
    with telling(dataset):
        return views.html.strip(named_results(dataset).matches, key)


def show_dataset(dataset: str | None, pair: str | None = None) -> tuple[Any, ...]:
    """Return the contents of the tab: gallery, key, one match, no verdict, no numbers, note."""
    shown = named_results(dataset)
    if not shown.matches:
        raise refused(f"{shown.name!r} holds no matches with pictures.")
    key = row_of(dataset, pair)["key"] if pair else shown.matches[0]["key"]
    return strip_of(dataset, key), key, match_shown(dataset, key), "", "", note_of(shown)


def note_of(shown: Showcase) -> str:
    """Return a note with the number of matches and their checkpoints."""
    made = sorted({f"{row['model_id']} ({row['readout']})" for row in shown.matches})
    return views.html.note(shown, made, "" if shelf.home_of("matches") == shelf.DATASET else shelf.DATASET)


def _select(dataset: str, event: gr.EventData) -> tuple[Any, ...]:
    key = str(event.key)
    return key, match_shown(dataset, key), "", ""


def _change(name: str, opened: str) -> tuple[Any, ...]:
    if (name or BUILTIN_RESULTS) == opened:
        return (gr.skip(),) * 8
    try:
        return gr.skip(), name or BUILTIN_RESULTS, *show_dataset(name)
    except gr.Error as error:  # keep the results that are shown, and restore their name
        shelf.warn(error.message)
        return opened, *(gr.skip(),) * 7


def matches_tab() -> list[Any]:
    """Lay out the tab and return its parts: dataset, opened dataset, then the outputs of `show_dataset`."""
    offered = [BUILTIN_RESULTS, *([shelf.DATASET] if shelf.DATASET else [])]
    gr.HTML('<h2 class="block-title">Matches: each looks like the first photo and embeds as the second</h2>')
    gallery = gr.HTML(elem_id="gallery", js_on_load=(shelf.HERE / "strip.js").read_text(encoding="utf-8"))
    key, opened = gr.State(""), gr.State(offered[-1])
    view = gr.HTML(elem_id="shown")
    with gr.Row(elem_classes="checkrow"):
        check = gr.Button("Check it", variant="primary", elem_id="check", scale=0, min_width=160)
        gr.Markdown("Encodes the three PNG files above again, here and now, and compares the results with its numbers.")
    verdict = gr.HTML(elem_id="verdict", js_on_load=shelf.LIVE)
    numbers = gr.HTML(elem_id="numbers")
    dataset = gr.Dropdown(
        offered, value=offered[-1], label="Results", allow_custom_value=True, elem_id="dataset",
        info="Choose, or type USER/NAME of a dataset that hf-equiv has published.",
    )  # fmt: skip
    note = gr.HTML(elem_classes="small")  # not Markdown, which would format the names in a stranger's dataset
    parts = [dataset, opened, gallery, key, view, verdict, numbers, note]
    dataset.change(_change, [dataset, opened], parts, api_visibility="private", concurrency_limit=4)
    gallery.click(_select, opened, [key, view, verdict, numbers], concurrency_limit=8, **HIDDEN)
    check.click(check_view, [key, opened], [verdict, numbers], api_visibility="private", concurrency_limit=2)
    return parts
