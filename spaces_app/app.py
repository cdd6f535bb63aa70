"""Serve the Space: four tabs and an about page.

Each tab has its file. Run the app with `hf-equiv space run` or `python spaces_app/app.py`. Its settings come from the
environment: HF_EQUIV_DATASET (dataset USER/NAME to show beside the built-in results), HF_EQUIV_MODELS (checkpoints that
visitors may use besides the built-in one), HF_EQUIV_MAX_EVALS, HF_EQUIV_TIME_LIMIT (seconds).
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any
from urllib.parse import urlencode

import anyio
import gradio as gr
import shelf
import views
from gradio.route_utils import get_root_url
from look_tab import as_shown, check_match, first_match, get_match, list_matches, look_tab, picture_of, show_dataset
from make_tab import make_tab
from making.jobs import soon
from making.outcome import MADE
from making.uploads import LARGEST, UploadLimit
from melt_tab import film, get_walk, list_walks, melt_tab
from showcase import Row
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from why_tab import look_along, warm_up, why_tab

THEME = gr.themes.Base(
    primary_hue="blue", neutral_hue="slate", font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"], radius_size="md",
)  # fmt: skip
TABS = {"look": "Look", "make": "Make one", "melt": "Melt", "why": "Why it works", "about": "About"}

_PREVIEW = re.compile(r'<meta\s+(?:property|name)="(?:og|twitter):[^>]*>')
_SHEET = re.compile(r'<link rel="stylesheet"[^>]*>')
_KEPT = {"cache-control": "public, max-age=3600"}


def open_page(request: gr.Request) -> tuple[Any, ...]:
    """Open the page that a link names: ?tab=melt, ?match=KEY, ?dataset=USER/NAME, ?made=KEY."""
    asked = dict(request.query_params)
    home, told = shelf.home_of("matches"), ""
    dataset, shown = asked.get("dataset") or home, (gr.skip(),) * 10
    if dataset != home or asked.get("match"):
        try:
            shown = dataset, dataset, *show_dataset(dataset, asked.get("match"))
        except gr.Error as error:
            said = error.message if dataset != home else "This link names no lookalike of ours."
            told = f"{said} You see the first lookalike of this page instead."
    name = asked.get("tab") or ("make" if asked.get("made") else "")
    if name and name not in TABS:
        told = f"There is no tab {name[:40]!r}. Choose one of these."
    # keep the tab if the link names none, since the visitor may have chosen one meanwhile
    tab = gr.Tabs(selected=name) if name in TABS else gr.skip()
    return *shown, tab, gr.HTML(views.html.notice(told), visible=True) if told else gr.skip()


def for_programs(action: Callable[..., Any], *, heavy: bool = False) -> Callable[..., Any]:
    """Return an action for the API: it refuses other values where it states text, and a heavy one waits its turn."""
    stated = inspect.signature(action).parameters.values()

    @wraps(action)
    async def call(*given: Any) -> Any:
        for argument, value in zip(stated, given, strict=False):
            if argument.annotation == "str" and not isinstance(value, str | None):
                raise shelf.refused(f"`{argument.name}` must be text; got {value!r}.")
        if (dataset := inspect.signature(action).bind(*given).arguments.get("dataset")) is not None:
            await anyio.to_thread.run_sync(shelf.named_results, dataset)  # in a thread: it may take long
        return await (soon(action, *given) if heavy else anyio.to_thread.run_sync(action, *given))

    return call


def build_demo() -> gr.Blocks:
    """Build the whole app."""
    with gr.Blocks(title=views.TITLE, analytics_enabled=False) as demo:
        notice = gr.HTML(visible=False, padding=False)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab(TABS["look"], id="look") as look:
                parts = look_tab(tabs)
            with gr.Tab(TABS["make"], id="make") as make:
                make_tab()
            with gr.Tab(TABS["melt"], id="melt") as melt:
                melt_tab(melt)
            with gr.Tab(TABS["why"], id="why") as why:
                why_tab(why)
            with gr.Tab(TABS["about"], id="about") as about:
                gr.Markdown((shelf.HERE / "about.md").read_text(encoding="utf-8"))
        # `keepInLink` of page.js keeps the tab in the address of the page
        for name, tab in zip(TABS, (look, make, melt, why, about), strict=True):
            tab.select(None, js=f"() => keepInLink({{tab: '{name if name != 'look' else ''}'}}, true)")
        opened = demo.load(open_page, None, [*parts, tabs, notice], **shelf.QUICK)
        opened.then(
            None, notice, js="(told) => { window.linkRead = true; if (told) keepInLink({match: '', dataset: ''}); }"
        )
        for action in (list_matches, get_match, list_walks, get_walk):
            gr.api(for_programs(action), api_name=action.__name__, queue=False)
        for action in (check_match, look_along):
            gr.api(for_programs(action, heavy=True), api_name=action.__name__, concurrency_limit=None)
    return demo.queue(max_size=64)


class FirstScreen:
    """Puts a match and the tags of link previews into the page, where they need no script and no second request."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; only the page itself is changed."""
        if scope["type"] != "http" or scope["path"] != "/":
            return await self.app(scope, receive, send)
        start: Message = {}
        body = b""

        async def collect(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                page = with_first_screen(body.decode(), Request(scope)).encode() if body else body
                if body:
                    MutableHeaders(raw=start["headers"])["content-length"] = str(len(page))
                await send(start)
                await send({"type": "http.response.body", "body": page})

        await self.app(scope, receive, collect)


def with_first_screen(page: str, request: Request) -> str:
    """Return gradio's page with a preview of the match that a link names, and that match if the link leads to it."""
    asked, (query, row) = request.query_params, linked(request)
    head = views.html.head(row, get_root_url(request, "/", None), query)
    sheets = "".join(_SHEET.findall(page))  # gradio's own: the first screen is drawn before they come
    page = _SHEET.sub("", _PREVIEW.sub("", page)).replace("</head>", f"{head}</head>", 1)
    elsewhere = asked.get("made") or asked.get("dataset") or asked.get("tab", "look") in {*TABS} - {"look"}
    screen = "" if elsewhere else views.html.first_screen(row, TABS)
    return page.replace("<gradio-app", f"{views.html.before()}{screen}{sheets}<gradio-app", 1)


def linked(request: Request) -> tuple[str, Row]:
    """Return the query and the match of a link: a visitor's, one of this Space's own results, or else the first."""
    asked = request.query_params
    with suppress(gr.Error):
        if asked.get("made"):
            row = MADE.get(asked["made"]).row | {"source_class": "photo", "target_class": "other photo"}
            return urlencode({"tab": "make", "made": asked["made"]}), row
    key = first_match(asked.get("match"))["key"]
    return urlencode({"match": key}), as_shown(shelf.home_of("matches"), key)


def send_preview(request: Request) -> Response:
    """Send the picture of a link preview."""
    return _sent(lambda: views.share_picture(linked(request)[1]), "png")


def send_film(request: Request) -> Response:
    """Send a walk as an animated picture."""
    kind = request.url.path.rpartition(".")[2]
    return _sent(lambda: film(request.query_params.get("walk", ""), kind.upper()), kind)


def send_picture(request: Request) -> Response:
    """Send a picture of a match."""
    asked = request.query_params
    names = asked.get("dataset") or shelf.home_of("matches"), asked.get("match", ""), asked.get("of", "")
    return _sent(lambda: picture_of(*names), "jpeg" if names[-1] == "small" else "png")


def _sent(make: Callable[[], bytes], kind: str) -> Response:
    try:
        return Response(make(), 200, _KEPT, f"image/{kind}")
    except gr.Error as error:
        return Response(error.message, 404, media_type="text/plain")


def main(host: str = "127.0.0.1", port: int = 7860, share: bool = False) -> None:
    """Serve the app until Ctrl-C."""
    # load the model before the first visitor comes
    threading.Thread(target=warm_up, daemon=True).start()
    agents = importlib.util.find_spec("mcp") is not None  # comes with gradio[mcp]
    films = (Route(f"/melt.{kind}", send_film) for kind in ("gif", "webp"))
    pictures = [Route("/preview.png", send_preview), Route("/picture", send_picture), *films]
    demo = build_demo()
    shelf.keep_swept({path for block in demo.blocks.values() for path in getattr(block, "keep_in_cache", ())})
    demo.launch(
        server_name=host, server_port=port, share=share, theme=THEME,
        css_paths=[shelf.HERE / "style.css", shelf.HERE / "make.css"], max_file_size=LARGEST, mcp_server=agents,
        ssr_mode=False, footer_links=[],
        app_kwargs={"routes": pictures, "middleware": [Middleware(FirstScreen), Middleware(UploadLimit)]},
    )  # fmt: skip
    raise KeyboardInterrupt("the app was stopped.")  # gradio returns only then


if __name__ == "__main__":
    main(os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
