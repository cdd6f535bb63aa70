"""Serve the Space: matches to look at and check, a match to make, directions to move along, a walk to play.

Each tab has its file. Run the app with `hf-equiv space run` or `python spaces_app/app.py`. Its settings come from the
environment: HF_EQUIV_DATASET (dataset USER/NAME to show beside the built-in results), HF_EQUIV_MODELS (checkpoints that
visitors may use besides the built-in one), HF_EQUIV_MAX_EVALS, HF_EQUIV_TIME_LIMIT (seconds).
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import anyio
import gradio as gr
import shelf
import views
from make_tab import make_tab
from making.jobs import soon
from making.uploads import LARGEST, UploadLimit
from matches_tab import check_match, get_match, list_matches, matches_tab, show_dataset
from sensitivity_tab import look_along, sensitivity_tab
from starlette.middleware import Middleware
from walk_tab import get_walk, list_walks, walk_tab

THEME = gr.themes.Base(
    primary_hue="blue", neutral_hue="slate", font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"], radius_size="md",
)  # fmt: skip
TABS = ("matches", "make", "sensitivity", "walk", "about")


def open_page(request: gr.Request) -> tuple[Any, ...]:
    """Open the page that a link names: ?tab=walk, ?pair=KEY, ?dataset=USER/NAME."""
    asked = dict(request.query_params)
    home = shelf.home_of("matches")
    dataset = asked.get("dataset") or home
    try:
        shown = show_dataset(dataset, asked.get("pair"))
    except gr.Error as error:
        shelf.warn(f"{error.message} Shown instead: {home}.")
        dataset, shown = home, show_dataset(home)
    # keep the tab if the link names none, since the visitor may have chosen one meanwhile
    tab = gr.Tabs(selected=asked["tab"]) if asked.get("tab") in TABS else gr.skip()
    return dataset, dataset, *shown, tab


def for_programs(action: Callable[..., Any]) -> Callable[..., Any]:
    """Return an action of the API that refuses all but text where it states text."""
    stated = inspect.signature(action).parameters.values()

    @wraps(action)
    async def call(*given: Any) -> Any:
        for argument, value in zip(stated, given, strict=False):
            if argument.annotation == "str" and not isinstance(value, str | None):
                raise shelf.refused(f"`{argument.name}` must be text; got {value!r}.")
        if (dataset := inspect.signature(action).bind(*given).arguments.get("dataset")) is not None:
            await anyio.to_thread.run_sync(shelf.named_results, dataset)  # which may take long, and hinders nobody
        return await soon(action, *given)

    return call


def build_demo() -> gr.Blocks:
    """Build the whole app."""
    title = "hf_equiv: two photos, one embedding"
    with gr.Blocks(title=title, analytics_enabled=False) as demo:
        gr.HTML(views.html.header())
        with gr.Tabs() as tabs:
            with gr.Tab("Two photos, one embedding", id="matches"):
                parts = matches_tab()
            with gr.Tab("Make one", id="make"):
                make_tab()
            with gr.Tab("Sensitivity", id="sensitivity") as tab:
                sensitivity_tab(tab)
            with gr.Tab("Walk", id="walk") as tab:
                walk_tab(tab)
            with gr.Tab("About", id="about"):
                gr.Markdown((shelf.HERE / "about.md").read_text(encoding="utf-8"))
        demo.load(open_page, None, [*parts, tabs], **shelf.HIDDEN)
        for action in (list_matches, get_match, check_match, look_along, list_walks, get_walk):
            gr.api(for_programs(action), api_name=action.__name__, concurrency_limit=None)
    return demo.queue(max_size=64)


def main(host: str = "127.0.0.1", port: int = 7860, share: bool = False) -> None:
    """Serve the app until Ctrl-C."""
    # load the model before the first visitor comes
    threading.Thread(target=shelf.encoder_of, args=("builtin",), daemon=True).start()
    agents = importlib.util.find_spec("mcp") is not None  # comes with gradio[mcp]
    demo = build_demo()
    shelf.keep_swept({path for block in demo.blocks.values() for path in getattr(block, "keep_in_cache", ())})
    demo.launch(
        server_name=host, server_port=port, share=share, theme=THEME, css_paths=[shelf.HERE / "style.css", shelf.HERE / "make.css"],
        max_file_size=LARGEST, mcp_server=agents, ssr_mode=False, footer_links=["api"],
        app_kwargs={"middleware": [Middleware(UploadLimit)]},
    )  # fmt: skip
    raise KeyboardInterrupt("the app was stopped.")  # gradio returns only then


if __name__ == "__main__":
    main(os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
