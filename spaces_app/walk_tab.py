"""The tab of walks: a path through images that share an embedding, to be played."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import gradio as gr
import views
from shelf import BUILTIN_RESULTS, HERE, RTOL, home_of, named_results, plain, results, telling


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
        name: of the walk, as `list_walks` gives it.
        dataset: USER/NAME of the Hub; by default the results that ship with this Space.

    Returns:
        For each step its drift, arc length, distances, and class.
    """
    keys = ("step", "drift", "arc_length", "l2", "linf", "psnr_db", "label", "prob")
    return [{key: row[key] for key in keys} for row in _path(name, dataset)]


def _path(name: str, dataset: str | None):
    paths = named_results(dataset).paths
    if name not in paths:
        told = f"There is no walk {str(name)[:200]!r}; there are: {'; '.join(paths) or 'none'}."
        raise gr.Error(plain(told), print_exception=False)
    return paths[name]


@lru_cache(maxsize=32)
def walk_view(name: str, dataset: str | None = BUILTIN_RESULTS) -> str:
    """A walk to play."""
    rtol = named_results(dataset).settings.get(name, {}).get("rtol", RTOL)
    path = _path(name, dataset)
    with telling(dataset):
        return views.player(path, rtol)


def walk_tab() -> list[Any]:
    """A walk as an animation, with the drift below."""
    home = home_of("paths")
    names = list(results(home).paths)
    story = (
        " It starts at a match that looks like the cat and ends at the coffee itself; the classifier sees coffee all "
        "the way."
    )
    gr.Markdown(
        "A walk inside one level set: every image below has the same embedding, to within the drift shown."
        + (story if home == BUILTIN_RESULTS else "")
    )
    name = gr.Dropdown(names, value=names[0], label="Walk", visible=len(names) > 1)
    view = gr.HTML(elem_id="walk", js_on_load=(HERE / "player.js").read_text(encoding="utf-8"))

    def play(name: str) -> str:
        return walk_view(name, home)

    name.change(play, name, view, api_visibility="private", show_progress="hidden")
    return [play, name, view]
