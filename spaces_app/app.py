"""The Space: matches to look at and to check, a match to make, what the embedding is sensitive to, a walk.

Few lines over `hf_equiv`, a file for each tab; run it with `hf-equiv space run` or `python spaces_app/app.py`. Settings
come from the environment: HF_EQUIV_DATASET (a dataset USER/NAME to show beside the built-in results), HF_EQUIV_MODELS
(checkpoints that visitors may use, besides the built-in one), HF_EQUIV_MAX_EVALS, HF_EQUIV_TIME_LIMIT (seconds).
"""

from __future__ import annotations

import os
import threading

import gradio as gr
import shelf
from matches_tab import check_match, get_match, list_matches, match_shown, matches_tab, show_dataset, strip_of
from sensitivity_tab import look_along, sensitivity_tab
from try_tab import LARGEST_UPLOAD, try_tab
from walk_tab import get_walk, list_walks, walk_tab

HEADER = """
<div id="top"><h1>Two photos, one embedding</h1>
<p>These images look like one thing to you and like another to the model. Drag the border, read what the classifier
sees, have every number checked before your eyes, or make a match of your own.</p></div>
"""


TABS = ("matches", "try", "sensitivity", "walk", "about")


THEME = gr.themes.Base(
    primary_hue="blue", neutral_hue="slate", font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"], radius_size="md",
).set(
    # the colours of style.css, dark enough to be read by everyone
    button_primary_background_fill="#1f5fbf", button_primary_background_fill_hover="#174a96",
    button_primary_background_fill_dark="#2c66bd", button_primary_background_fill_hover_dark="#1f5fbf",
    color_accent="#1f5fbf", body_text_color_subdued="#4b5a69", block_info_text_color="#4b5a69",
    body_text_color_subdued_dark="#aab8c6", block_info_text_color_dark="#aab8c6", block_label_text_color="#16202b",
    block_title_text_color="#16202b",
)  # fmt: skip


TABS = ("matches", "try", "sensitivity", "walk", "about")


def build_demo() -> gr.Blocks:
    """The whole app."""
    with gr.Blocks(
        title="hf_equiv: two photos, one embedding", analytics_enabled=False, delete_cache=(600, 3600)
    ) as demo:
        gr.HTML(HEADER)
        with gr.Tabs() as tabs:
            with gr.Tab("Two photos, one embedding", id="matches"):
                matches = matches_tab()
            with gr.Tab("Try it", id="try"):
                try_tab()
            with gr.Tab("Sensitivity", id="sensitivity") as sensitivity:
                show, given, shown = sensitivity_tab()
                sensitivity.select(show, given, shown, api_visibility="private", show_progress="hidden")
            with gr.Tab("Walk", id="walk") as walk:
                play, name, player = walk_tab()
                walk.select(play, name, player, api_visibility="private", show_progress="hidden")
            with gr.Tab("About", id="about"):
                gr.Markdown((shelf.HERE / "about.md").read_text(encoding="utf-8"))

        def open_page(request: gr.Request):
            """What a link asks for: ?tab=walk, ?pair=KEY, ?dataset=USER/NAME."""
            asked = dict(request.query_params)
            home = shelf.home_of("matches")
            dataset = asked.get("dataset") or home
            try:
                gallery, key, view, verdict, note = show_dataset(dataset)
                if asked.get("pair"):
                    key = shelf.row_of(dataset, asked["pair"])["key"]
                    gallery, view = strip_of(dataset, key), match_shown(dataset, key)
            except gr.Error as error:  # a link that leads nowhere leads here, not to an empty page
                gr.Warning(shelf.plain(f"{error.message} Shown instead: {home}."))
                dataset = home
                gallery, key, view, verdict, note = show_dataset(dataset)
            if shelf.DATASET and home != shelf.DATASET:
                note += f" There are no matches with pictures to show of `{shelf.DATASET}`."
            # without a wish the tab stays: the visitor may have chosen one since
            tab = gr.Tabs(selected=asked["tab"]) if asked.get("tab") in TABS else gr.skip()
            return dataset, dataset, gallery, key, view, verdict, note, tab

        parts = [matches[k] for k in ("dataset", "opened", "gallery", "key", "view", "verdict", "note")]
        demo.load(open_page, None, [*parts, tabs], api_visibility="private", show_progress="hidden")
        for action in (list_matches, get_match, check_match, look_along, list_walks, get_walk):
            gr.api(action, api_name=action.__name__)
    demo.queue(max_size=64)
    return demo


def main(host: str = "127.0.0.1", port: int = 7860, share: bool = False) -> None:
    """Serve the app until it is stopped."""
    try:
        import mcp  # noqa: F401 (comes with gradio[mcp])
    except ImportError:
        agents = False
    else:
        agents = True
    # the first visitor finds the model loaded
    threading.Thread(target=shelf.encoder_of, args=("builtin",), daemon=True).start()
    build_demo().launch(
        server_name=host, server_port=port, share=share, theme=THEME, css_paths=shelf.HERE / "style.css",
        max_file_size=LARGEST_UPLOAD, mcp_server=agents, ssr_mode=False, show_error=True, footer_links=["api"],
    )  # fmt: skip


if __name__ == "__main__":
    main(os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
