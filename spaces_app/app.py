"""The Space: matches to look at and to check, a match to make, what the embedding is sensitive to, a walk.

Few lines over `hf_equiv`; run it with `hf-equiv space run` or `python spaces_app/app.py`. Settings come from the
environment: HF_EQUIV_DATASET (a dataset USER/NAME to show beside the built-in results), HF_EQUIV_MODELS (checkpoints
that visitors may use, besides the built-in one), HF_EQUIV_MAX_EVALS, HF_EQUIV_TIME_LIMIT (seconds).
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

try:  # before torch, as ZeroGPU asks
    import spaces

    on_gpu = spaces.GPU(duration=60)
except ImportError:  # anywhere else

    def on_gpu(work):
        """Run where we are."""
        return work


import gradio as gr
import torch

from hf_equiv import Encoder, geometryviews, load_images, showviews
from hf_equiv.along import directions_of_run, stops_along
from hf_equiv.imagefile import decode_png, open_image
from hf_equiv.live import LiveMatch, live_match
from hf_equiv.showcase import Showcase, check_shown, open_showcase

HERE = Path(__file__).parent
BUILTIN_RESULTS = "built-in checkpoint, four photos"
DATASET = os.environ.get("HF_EQUIV_DATASET", "").strip()
MODELS = ["builtin", *(m.strip() for m in os.environ.get("HF_EQUIV_MODELS", "").split(",") if m.strip())]
MAX_EVALS = int(os.environ.get("HF_EQUIV_MAX_EVALS", "400"))
TIME_LIMIT = float(os.environ.get("HF_EQUIV_TIME_LIMIT", "60"))
LARGEST_UPLOAD = 25 * 2**20
BUDGETS = {"any change": None, "16 of 255 grey levels": 16 / 255, "8 of 255": 8 / 255, "4 of 255": 4 / 255}
EFFORTS = {"quick": 0.4, "normal": 1.0}
RTOL = 1e-5
WORKERS = 1 if torch.cuda.is_available() else max(1, min(2, os.cpu_count() or 1))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))

_loading = threading.Lock()
_stops: dict[str, threading.Event] = {}


# ---------------------------------------------------------------------------------------------------- what there is


@lru_cache(maxsize=4)
def _load(model: str, revision: str | None, readout: str) -> Encoder:
    return Encoder.from_pretrained(model, revision=revision, readout=readout)


def encoder_of(model: str, revision: str | None = None, readout: str = "auto") -> Encoder:
    """A checkpoint of the allow-list, loaded once."""
    if model not in MODELS:
        raise gr.Error(f"This Space offers {', '.join(MODELS)}; {model!r} is not among them.", print_exception=False)
    with _loading:
        try:
            return _load(model, revision, readout)
        except (OSError, ValueError) as error:
            raise gr.Error(f"{model!r} could not be loaded: {error}", print_exception=False) from error


def recorded_encoder(row: dict[str, Any]) -> Encoder:
    """The checkpoint that a row names, if it is on the allow-list; of a local folder the name alone is recorded."""
    name = next((m for m in MODELS if row["model_id"] in (m, Path(m).name)), row["model_id"])
    local = str(row["model_revision"]).startswith("sha256:")
    return encoder_of(name, None if local else row["model_revision"], row["readout"])


@lru_cache(maxsize=8)
def results(name: str) -> Showcase:
    """The results of a name: those that ship with the app, the owner's dataset, or a public dataset of the Hub."""
    if name == BUILTIN_RESULTS:
        return open_showcase(HERE / "results")
    token = None if name == DATASET else False  # a visitor sees what anybody sees, never what the owner's token opens
    try:
        return open_showcase(name, token=token, most_bytes=None if name == DATASET else 300 * 2**20)
    except (OSError, ValueError) as error:
        raise gr.Error(f"{name!r} cannot be shown: {error}", print_exception=False) from error


def named_results(name: str | None) -> Showcase:
    """The same, of what a visitor has typed: a folder of this machine is none of their business."""
    name = (name or "").strip() or BUILTIN_RESULTS
    if name not in (BUILTIN_RESULTS, DATASET) and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise gr.Error("Name a dataset of the Hub as USER/NAME.", print_exception=False)
    return results(name)


def row_of(name: str | None, key: str) -> dict[str, Any]:
    """One match by its key."""
    shown = named_results(name)
    for row in shown.matches:
        if key in (row["key"], row["pair_id"]):
            return row
    raise gr.Error(f"There is no match {key!r} in {shown.name!r}.", print_exception=False)


def file_of(data: bytes, name: str) -> str:
    """Bytes as a file that gradio may hand out."""
    folder = Path(tempfile.mkdtemp(prefix="hf_equiv_"))
    (folder / name).write_bytes(data)
    return str(folder / name)


# ------------------------------------------------------------------------------------------- two photos, one embedding


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
    try:
        found = check_shown(recorded_encoder(row), row, settings)
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    return found, time.perf_counter() - start


def check_view(key: str, dataset: str | None) -> str:
    """The same as a table."""
    return showviews.check_table(*_check(key, dataset))


def match_shown(dataset: str | None, key: str) -> str:
    """One match as the page shows it."""
    row = row_of(dataset, key)
    link = f"?pair={row['key']}" + (f"&dataset={dataset}" if dataset not in (None, "", BUILTIN_RESULTS) else "")
    return showviews.match_view(row["source"], row["match"], row["target"], row, link=link)


@lru_cache(maxsize=32)
def strip_of(dataset: str | None, key: str) -> str:
    """The matches of a dataset to choose from."""
    return showviews.strip(named_results(dataset).matches, key)


def show_dataset(dataset: str | None):
    """Gallery, first match and note of a dataset."""
    shown = named_results(dataset)
    if not shown.matches:
        raise gr.Error(f"{shown.name!r} holds no matches with pictures.", print_exception=False)
    key = shown.matches[0]["key"]
    return strip_of(dataset, key), key, match_shown(dataset, key), "", _note(shown)


def _note(shown: Showcase) -> str:
    made = sorted({f"{row['model_id']} ({row['readout']})" for row in shown.matches})
    more = f"; {shown.withheld} more without pictures" if shown.withheld else ""
    return f"{len(shown.matches)} matches{more}, made for {', '.join(made)}. The PNG files are shown as they are."


def matches_tab() -> dict[str, Any]:
    """Gallery, one match, Check it."""
    offered = [BUILTIN_RESULTS, *([DATASET] if DATASET else [])]
    gr.HTML('<h2 class="block-title">Matches: each looks like the first photo and embeds as the second</h2>')
    gallery = gr.HTML(elem_id="gallery", js_on_load=(HERE / "strip.js").read_text(encoding="utf-8"))
    key = gr.State("")
    view = gr.HTML(elem_id="shown")
    with gr.Row(elem_classes="checkrow"):
        check = gr.Button("Check it", variant="primary", elem_id="check", scale=0, min_width=160)
        gr.Markdown("Encodes the three PNG files above again, here and now, and compares with what is stated.")
    verdict = gr.HTML(elem_id="verdict")
    dataset = gr.Dropdown(
        offered, value=offered[-1], label="Results", allow_custom_value=True, elem_id="dataset",
        info="Choose, or type USER/NAME of a dataset that hf-equiv has published.",
    )  # fmt: skip
    note = gr.Markdown(elem_classes="small")

    def select(dataset: str, event: gr.EventData):
        key = str(event.key)
        return key, match_shown(dataset, key), ""

    dataset.change(
        show_dataset, dataset, [gallery, key, view, verdict, note], api_visibility="private", concurrency_limit=4
    )
    gallery.click(
        select, dataset, [key, view, verdict], api_visibility="private", show_progress="hidden", concurrency_limit=8
    )
    check.click(check_view, [key, dataset], verdict, api_visibility="private", concurrency_limit=2)
    return {"dataset": dataset, "gallery": gallery, "key": key, "view": view, "verdict": verdict, "note": note}


# ----------------------------------------------------------------------------------------------------------- try it


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
        return open_image(Path(path).read_bytes(), f"the {name} photo")
    except (OSError, ValueError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def _matching(source: str, target: str, model: str, budget: str, effort: str, session: str) -> Iterator[LiveMatch]:
    """States of a match of two uploads, within the limits of this Space."""
    images = read_upload(source, "source"), read_upload(target, "target")
    encoder = encoder_of(model)
    stop = _stops[session] = threading.Event()
    try:
        yield from live_match(
            encoder, *images, radius=BUDGETS[budget], rtol=_rtol(budget), stop=stop, time_limit=TIME_LIMIT, every=0.3,
            max_evals=max(1, round(MAX_EVALS * EFFORTS[effort])),
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    finally:
        _stops.pop(session, None)


def _rtol(budget: str) -> float:
    return RTOL if BUDGETS[budget] is None else 1e-4


@on_gpu
def watch_match(
    source: str, target: str, model: str, budget: str, effort: str, request: gr.Request
) -> Iterator[tuple[Any, ...]]:
    """Match two photos, and show it while it is made."""
    for state in _matching(source, target, model, budget, effort, request.session_hash or ""):
        if state.stage not in ("done", "stopped"):
            yield _live_view(state, _rtol(budget)), gr.skip(), gr.skip()
    ended = ""
    if state.stage == "stopped":
        limit = f": the limit is {TIME_LIMIT:.0f} s" if state.seconds > TIME_LIMIT else ""
        ended = f'<p class="verdict" role="status">Stopped after {state.num_evals:.0f} evaluations{limit}.</p>'
    view = (
        f"{ended}{showviews.match_view(state.source, state.png, state.target, state.row or {})}"
        f'<div class="narrow"><h3 class="block-title">How it went ({state.seconds:.1f} s)</h3>'
        f"{showviews.curve_view(state.curve, _rtol(budget))}</div>"
    )
    png, row = file_of(state.png, "match.png"), file_of(json.dumps(_record(state), indent=1).encode(), "row.json")
    yield view, gr.DownloadButton(value=png, visible=True), gr.DownloadButton(value=row, visible=True)


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
    doing = {
        "match": "Looking for pixels that embed as the target …",
        "refine": "Now as an 8-bit PNG: single steps of one grey level …",
        "measure": "Measuring …",
    }[state.stage]
    return (
        f'<p class="verdict" role="status">{doing} error {state.error:.1e} after {state.num_evals:.0f} evaluations</p>'
        f'<div class="live">{showviews.picture(state.png, "the match so far", "the match so far")}'
        f"<div>{showviews.curve_view(state.curve, rtol)}</div></div>"
    )


def stop_match(request: gr.Request) -> None:
    """Stop the match of this visitor."""
    if (event := _stops.get(request.session_hash or "")) is not None:
        event.set()


def try_tab() -> dict[str, Any]:
    """Two photos, a checkpoint, a budget; the match while it is made."""
    photos = load_images("builtin")
    paths = {item.id: file_of(_png(item.image), f"{item.id}.png") for item in photos}
    with gr.Row():
        with gr.Column(min_width=240):
            source = photo(paths["cat"], label="Looks like this: the source", elem_id="source")
            pick_source = gr.Dropdown(list(paths), value="cat", label="or one of these photos as the source")
        with gr.Column(min_width=240):
            target = photo(paths["coffee"], label="Embeds as this: the target", elem_id="target")
            pick_target = gr.Dropdown(list(paths), value="coffee", label="or one of these photos as the target")
        with gr.Column(min_width=260):
            model = gr.Dropdown(MODELS, value=MODELS[0], label="Checkpoint")
            budget = gr.Dropdown(list(BUDGETS), value="any change", label="How far each pixel may move")
            effort = gr.Radio(list(EFFORTS), value="normal", label="Effort", info=f"At most {TIME_LIMIT:.0f} seconds.")
            with gr.Row():
                go = gr.Button("Make the match", variant="primary", elem_id="go", min_width=150, scale=2)
                halt = gr.Button("Stop", elem_id="halt", min_width=80, scale=1)
    view = gr.HTML('<p class="small">The match appears here while it is being made.</p>', elem_id="made")
    with gr.Row():
        png = gr.DownloadButton("Download the PNG", visible=False, elem_id="png", size="sm")
        row = gr.DownloadButton("Download the numbers (JSON)", visible=False, elem_id="row", size="sm")
    pick_source.change(paths.get, pick_source, source, api_visibility="private", show_progress="hidden")
    pick_target.change(paths.get, pick_target, target, api_visibility="private", show_progress="hidden")
    compute = {"concurrency_id": "compute", "concurrency_limit": WORKERS}
    asked = [source, target, model, budget, effort]
    go.click(watch_match, asked, [view, png, row], api_visibility="private", show_progress="minimal", **compute)
    # the same for programs: hidden, its answer a file and numbers
    answer = [gr.File(label="match", visible=False), gr.JSON(label="row", visible=False)]
    gr.Button(visible=False).click(make_match, asked, answer, api_name="make_match", **compute)
    halt.click(stop_match, api_visibility="private", queue=False)
    return {"go": go}


def _png(image) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------ sensitivity


def step_of(slider: float) -> float:
    """A place of the slider, −100 … 100, as a step h: fine near zero, up to 16 at the ends."""
    return 16.0 * (slider / 100.0) ** 3


def _constants(image_id: str) -> list[dict[str, Any]]:
    rows = [row for row in results(BUILTIN_RESULTS).constants if row["image_id"] == image_id]
    if not rows:
        raise gr.Error(f"There are no constants of {image_id!r} here.", print_exception=False)
    return rows


def _direction(image_id: str, direction: str) -> dict[str, Any]:
    for row in _constants(image_id):
        if direction == f"{row['direction']} {row['index']}":
            return row
    raise gr.Error(f"There is no direction {direction!r} at {image_id!r}.", print_exception=False)


@lru_cache(maxsize=16)
def _vectors(image_id: str) -> dict[str, torch.Tensor]:
    shown = results(BUILTIN_RESULTS)
    rows = _constants(image_id)
    encoder, settings = recorded_encoder(rows[0]), shown.settings[f"lipschitz {image_id}"]
    images = {row["image_id"]: row["image"] for row in shown.constants}
    toward = next((row["toward_id"] for row in rows if row["direction"] == "toward"), None)
    target = decode_png(images[toward]) if toward in images else None
    made = directions_of_run(encoder, decode_png(rows[0]["image"]), target, settings, image_id)
    names = [f"{kind} {index}" for kind, index in zip(made.kinds, made.indices, strict=True)]
    return dict(zip(names, made.vectors[0], strict=True))


@lru_cache(maxsize=64)
def _profile(image_id: str, direction: str):
    """Distances over the whole slider, once."""
    row = _direction(image_id, direction)
    encoder, image = recorded_encoder(row), decode_png(row["image"])
    steps = [step_of(s) for s in range(-100, 101, 5)]
    return stops_along(encoder, image, _vectors(image_id)[direction], steps, jvp=row["jvp"], classes=1)


@on_gpu
def look_along(image_id: str, direction: str, step: float) -> dict[str, Any]:
    """Move one of the four photos along a direction and see what the built-in encoder makes of it.

    Args:
        image_id: cat, coffee, rocket or astronaut.
        direction: kind and index, such as "top 0", "null 3", "random 0", "gradient 0".
        step: how far, L2 with pixels in [0, 1], from −16 to 16.

    Returns:
        The distance of the embedding relative to its length, what the Jacobian foretells, and the likeliest classes.

    Raises:
        gradio.Error: no such photo or direction, or too far a step.
    """
    if not -16 <= step <= 16:
        raise gr.Error("`step` must be from −16 to 16.", print_exception=False)
    stop = _stop(image_id, direction, step)
    return {
        "distance": stop.distance, "first_order": stop.first_order, "classes": [list(c) for c in stop.classes]
    }  # fmt: skip


def _stop(image_id: str, direction: str, step: float):
    row = _direction(image_id, direction)
    image = decode_png(row["image"])
    return stops_along(recorded_encoder(row), image, _vectors(image_id)[direction], [step], jvp=row["jvp"])[0]


@on_gpu
def along_view(image_id: str, direction: str, slider: float) -> str:
    """The image at the slider, its classes, and how far the embedding has moved."""
    stop, profile = _stop(image_id, direction, step_of(slider)), _profile(image_id, direction)
    return geometryviews.along_view(stop, profile, f"{image_id} moved along {direction}")


def facts_view(image_id: str, direction: str) -> tuple[str, str, str]:
    """The ladder of one direction, the constants and the spectrum of one image."""
    spectrum = next(row for row in results(BUILTIN_RESULTS).spectra if row["image_id"] == image_id)
    return (
        geometryviews.ladder_view(_direction(image_id, direction)),
        geometryviews.constants_view(_constants(image_id)),
        geometryviews.spectrum_view(spectrum),
    )


def sensitivity_tab() -> list[Any]:
    """Spectrum, constants, ladder; and a slider along a direction."""
    ids = list(dict.fromkeys(row["image_id"] for row in results(BUILTIN_RESULTS).constants))
    names = [f"{row['direction']} {row['index']}" for row in _constants(ids[0])]
    gr.Markdown(
        "How fast does the embedding move when the pixels do, and along which directions not at all? Measured for the "
        "built-in checkpoint at four photos. **top** directions move it most, **null** directions not at all, to first "
        "order; a **random** one is nearly null."
    )
    with gr.Row():
        image = gr.Radio(ids, value=ids[0], label="Photo")
        direction = gr.Dropdown(names, value="top 0", label="Direction (kind and number)")
    slider = gr.Slider(-100, 100, value=30, step=1, label="Move along it (fine near the middle)", elem_id="along")
    moved = gr.HTML(elem_id="moved")
    with gr.Row():
        with gr.Column(min_width=300):
            gr.HTML('<h2 class="block-title">How its constant was read</h2>')
            ladder = gr.HTML()
        with gr.Column(min_width=300):
            gr.HTML('<h2 class="block-title">Constants by kind of direction</h2>')
            constants = gr.HTML()
        with gr.Column(min_width=300):
            gr.HTML('<h2 class="block-title">Spectrum of the Jacobian</h2>')
            spectrum = gr.HTML()

    def show(image: str, direction: str, slider: float):
        return along_view(image, direction, slider), *facts_view(image, direction)

    slider.input(
        along_view, [image, direction, slider], moved, api_visibility="private", show_progress="hidden",
        trigger_mode="always_last", concurrency_limit=2,
    )  # fmt: skip
    for control in (image, direction):
        control.change(
            show, [image, direction, slider], [moved, ladder, constants, spectrum], api_visibility="private",
            show_progress="hidden", concurrency_limit=2,
        )  # fmt: skip
    return [show, [image, direction, slider], [moved, ladder, constants, spectrum]]


# -------------------------------------------------------------------------------------------------------------- walk


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
        raise gr.Error(f"There is no walk {name!r}; there are: {'; '.join(paths) or 'none'}.", print_exception=False)
    return paths[name]


@lru_cache(maxsize=32)
def walk_view(name: str, dataset: str | None = BUILTIN_RESULTS) -> str:
    """A walk to play."""
    rtol = named_results(dataset).settings.get(name, {}).get("rtol", RTOL)
    return showviews.player(_path(name, dataset), rtol)


def walk_tab() -> list[Any]:
    """A walk as an animation, with the drift below."""
    names = list(results(BUILTIN_RESULTS).paths)
    gr.Markdown(
        "A walk inside one level set: every image below has the same embedding, to within the drift shown. It starts "
        "at a match that looks like the cat and ends at the coffee itself; the classifier sees coffee all the way."
    )
    name = gr.Dropdown(names, value=names[0], label="Walk", visible=len(names) > 1)
    view = gr.HTML(elem_id="walk", js_on_load=(HERE / "player.js").read_text(encoding="utf-8"))
    name.change(walk_view, name, view, api_visibility="private", show_progress="hidden")
    return [walk_view, name, view]


# ------------------------------------------------------------------------------------------------------------- about


HEADER = """
<div id="top"><h1>Two photos, one embedding</h1>
<p>These images look like one thing to you and like another to the model. Drag the border, read what the classifier
sees, have every number checked before your eyes, or make a match of your own.</p></div>
"""

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
                gr.Markdown((HERE / "about.md").read_text(encoding="utf-8"))

        def open_page(request: gr.Request):
            """What a link asks for: ?tab=walk, ?pair=KEY, ?dataset=USER/NAME."""
            asked = dict(request.query_params)
            dataset = asked.get("dataset") or (DATASET or BUILTIN_RESULTS)
            gallery, key, view, verdict, note = show_dataset(dataset)
            if asked.get("pair"):
                key = row_of(dataset, asked["pair"])["key"]
                gallery, view = strip_of(dataset, key), match_shown(dataset, key)
            tab = asked.get("tab", "matches")
            return dataset, gallery, key, view, verdict, note, gr.Tabs(selected=tab)

        parts = [matches[k] for k in ("dataset", "gallery", "key", "view", "verdict", "note")]
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
    threading.Thread(target=encoder_of, args=(MODELS[0],), daemon=True).start()  # the first visitor finds it loaded
    build_demo().launch(
        server_name=host, server_port=port, share=share, theme=THEME, css_paths=HERE / "style.css",
        max_file_size=LARGEST_UPLOAD, mcp_server=agents, ssr_mode=False, show_error=True, footer_links=["api"],
    )  # fmt: skip


if __name__ == "__main__":
    main(os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
