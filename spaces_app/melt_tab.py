"""Lay out the tab that plays a walk: a path through images that share an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlencode

import gradio as gr
import views
from charts import Axis, Series, chart
from shelf import BUILTIN_RESULTS, QUICK, home_of, named_results, refused, results, telling
from showcase import Row

from hf_equiv.analyses.figures import animation
from hf_equiv.formatting import short

_LEAST = 1e-7  # smallest drift on a chart, unless the allowed drift is as small


def list_walks(dataset: str = BUILTIN_RESULTS) -> list[str]:
    """List the level-set walks of a result dataset.

    Args:
        dataset: USER/NAME of the Hub; by default the results that ship with this Space.

    Returns:
        Their names.
    """
    return list(named_results(dataset).paths)


def get_walk(name: str, dataset: str = BUILTIN_RESULTS) -> list[dict[str, Any]]:
    """Give the points of a walk through images that share an embedding.

    Args:
        name: name of the walk, as `list_walks` gives it.
        dataset: USER/NAME of the Hub; by default the results that ship with this Space.

    Returns:
        For each step its drift, arc length, distances, and class.
    """
    keys = ("step", "drift", "arc_length", "l2", "linf", "psnr_db", "label", "prob")
    return [{key: row[key] for key in keys} for row in _path(name, dataset)]


def _path(name: str, dataset: str | None) -> Sequence[Row]:
    paths = named_results(dataset).paths
    if name not in paths:
        raise refused(f"There is no walk {str(name)[:200]!r}; there are: {'; '.join(paths) or 'none'}.")
    return paths[name]


@lru_cache(maxsize=32)
def walk_view(name: str, dataset: str | None = BUILTIN_RESULTS) -> str:
    """Show a walk to play."""
    path = _path(name, dataset)
    with telling(dataset):
        return player(path, path[0]["settings"]["rtol"], name)


@lru_cache(maxsize=4)
def film(name: str, kind: str) -> bytes:
    """Return a walk of this tab as an animated picture, GIF or WEBP; a GIF that its run has drawn saves seconds."""
    home, frames = home_of("paths"), [row["frame"] for row in _path(name, home_of("paths"))]
    return (results(home).films.get(name) if kind == "GIF" else None) or animation(frames, kind)


def player(path: Sequence[Row], rtol: float, name: str = "") -> str:
    """Show the frames of a walk with a slider, and their drift; player.js moves them."""
    least = min(_LEAST, rtol / 100)
    drift = [(row["arc_length"], max(row["drift"], least)) for row in path]
    below = any(row["drift"] < least for row in path)
    drawn = chart(
        "Drift of the embedding against arc length",
        [
            Series([(length, rtol) for length, _ in drift], "largest drift allowed", "limit"),
            Series(drift, "drift", draw="line dots"),
        ],
        Axis("arc length (L2, pixels in [0, 1])"),
        Axis("drift", log=True, low=least, high=max(10 * rtol, *(row["drift"] for row in path))),
        mark=drift[0],
        note=f"Drawn at {short(least)}: drift below it, and none at all." if below else "",
    )
    files = {kind: f"melt.{kind}?{urlencode({'walk': name})}" for kind in ("gif", "webp")}
    return views.html.player(path, drawn, files)


def melt_tab(tab: gr.Tab) -> None:
    """Lay out the tab."""
    home = home_of("paths")
    paths = results(home).paths
    names = list(paths)
    view = gr.HTML(views.html.still(paths[names[0]][0]), elem_id="walk", js_on_load=views.script("player.js"))
    name = gr.Dropdown(names, value=names[0], label="Film", visible=len(names) > 1)
    gr.on([tab.select, name.change], lambda name: walk_view(name, home), name, view, **QUICK)
