"""The tab of matches: choose one, look at it, have it checked."""

from __future__ import annotations

import time
from functools import lru_cache
from html import escape
from typing import Any
from urllib.parse import urlencode

import gradio as gr
import views
from shelf import BUILTIN_RESULTS, DATASET, HERE, LIVE, named_results, on_gpu, recorded_encoder, row_of, telling
from showcase import Showcase, check_shown


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
        key: of the match, as `list_matches` gives it.
        dataset: USER/NAME of the Hub; by default the results that ship with this Space.

    Returns:
        The row without its pictures.
    """
    return {k: v for k, v in row_of(dataset, key).items() if not isinstance(v, bytes)}


def check_match(key: str, dataset: str = BUILTIN_RESULTS) -> dict[str, Any]:
    """Encode the three PNG files of a match again, now, and compare with what its row states.

    Args:
        key: of the match, as `list_matches` gives it.
        dataset: USER/NAME of the Hub; by default the results that ship with this Space.

    Returns:
        Whether all numbers hold, and each number as stated and as computed now.
    """
    found, seconds = _check(key, dataset)
    numbers = {c.name: {"stated": c.stated, "now": c.now, "holds": c.holds} for c in found}
    return {"holds": all(c.holds for c in found), "seconds": seconds, "numbers": numbers}


@on_gpu
def _check(key: str, dataset: str | None):
    row, start = row_of(dataset, key), time.perf_counter()
    settings = named_results(dataset).settings[row["key"]]
    encoder = recorded_encoder(row, settings, dataset)
    with telling(dataset):
        found = check_shown(encoder, row, settings)
    return found, time.perf_counter() - start


def check_view(key: str, dataset: str | None) -> str:
    """The same as a table."""
    return views.check_table(*_check(key, dataset))


def match_shown(dataset: str | None, key: str) -> str:
    """One match as the page shows it."""
    row = row_of(dataset, key)
    asked = {"pair": row["key"]} | ({"dataset": dataset} if dataset not in (None, "", BUILTIN_RESULTS) else {})
    link = f"?{urlencode(asked)}"
    with telling(dataset):
        return views.match_view(row["source"], row["match"], row["target"], row, link=link)


@lru_cache(maxsize=32)
def strip_of(dataset: str | None, key: str) -> str:
    """The matches of a dataset to choose from."""
    shown = named_results(dataset)
    with telling(dataset):
        return views.strip(shown.matches, key)


def show_dataset(dataset: str | None):
    """Gallery, first match and note of a dataset."""
    shown = named_results(dataset)
    if not shown.matches:
        raise gr.Error(f"{shown.name!r} holds no matches with pictures.", print_exception=False)
    key = shown.matches[0]["key"]
    return strip_of(dataset, key), key, match_shown(dataset, key), "", _note(shown)


def _note(shown: Showcase) -> str:
    made = sorted({escape(f"{row['model_id']} ({row['readout']})") for row in shown.matches})
    more = f"; {shown.withheld} more without pictures" if shown.withheld else ""
    return f"{len(shown.matches)} matches{more}, made for {', '.join(made)}. The PNG files are shown as they are."


def matches_tab() -> dict[str, Any]:
    """Gallery, one match, Check it."""
    offered = [BUILTIN_RESULTS, *([DATASET] if DATASET else [])]
    gr.HTML('<h2 class="block-title">Matches: each looks like the first photo and embeds as the second</h2>')
    gallery = gr.HTML(elem_id="gallery", js_on_load=(HERE / "strip.js").read_text(encoding="utf-8"))
    key, opened = gr.State(""), gr.State(offered[-1])
    view = gr.HTML(elem_id="shown")
    with gr.Row(elem_classes="checkrow"):
        check = gr.Button("Check it", variant="primary", elem_id="check", scale=0, min_width=160)
        gr.Markdown("Encodes the three PNG files above again, here and now, and compares with what is stated.")
    verdict = gr.HTML(elem_id="verdict", js_on_load=LIVE)
    dataset = gr.Dropdown(
        offered, value=offered[-1], label="Results", allow_custom_value=True, elem_id="dataset",
        info="Choose, or type USER/NAME of a dataset that hf-equiv has published.",
    )  # fmt: skip
    note = gr.HTML(elem_classes="small")  # no Markdown: the names in it are those of somebody's dataset

    def select(dataset: str, event: gr.EventData):
        key = str(event.key)
        return key, match_shown(dataset, key), ""

    def change(name: str, opened: str):
        if (name or BUILTIN_RESULTS) == opened:
            return (gr.skip(),) * 7
        try:
            return gr.skip(), name or BUILTIN_RESULTS, *show_dataset(name)
        except gr.Error as error:  # what is shown stays, and so does its name
            gr.Warning(escape(error.message))
            return opened, *(gr.skip(),) * 6

    parts = [dataset, opened, gallery, key, view, verdict, note]
    dataset.change(change, [dataset, opened], parts, api_visibility="private", concurrency_limit=4)
    gallery.click(
        select, opened, [key, view, verdict], api_visibility="private", show_progress="hidden", concurrency_limit=8
    )
    check.click(check_view, [key, opened], verdict, api_visibility="private", concurrency_limit=2)
    return dict(zip(("dataset", "opened", "gallery", "key", "view", "verdict", "note"), parts, strict=True))
