"""The tab of sensitivity: spectrum, constants, the secants behind them, and a slider along a direction."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import gradio as gr
import torch
import views
from along import stops_along
from shelf import home_of, on_gpu, recorded_encoder, results

from hf_equiv.analyses.lipschitz import directions_of_run
from hf_equiv.data.image_file import decode_png


def step_of(slider: float) -> float:
    """A place of the slider, −100 … 100, as a step h: fine near zero, up to 16 at the ends."""
    return 16.0 * (slider / 100.0) ** 3


def _constants(image_id: str) -> list[dict[str, Any]]:
    rows = [row for row in results(home_of("constants")).constants if row["key"] == image_id]
    if not rows:
        raise gr.Error(f"There are no constants of {image_id!r} here.", print_exception=False)
    return rows


def _direction(image_id: str, direction: str) -> dict[str, Any]:
    for row in _constants(image_id):
        if direction == f"{row['direction']} {row['index']}":
            return row
    raise gr.Error(f"There is no direction {direction!r} at {image_id!r}.", print_exception=False)


def _encoder(row: dict[str, Any]):
    home = home_of("constants")
    return recorded_encoder(row, results(home).settings[f"lipschitz {row['key']}"], home)


@lru_cache(maxsize=16)
def _vectors(image_id: str) -> dict[str, torch.Tensor]:
    shown = results(home_of("constants"))
    rows = _constants(image_id)
    settings = shown.settings[f"lipschitz {image_id}"]
    encoder = _encoder(rows[0])
    own = [row for row in shown.constants if shown.settings[f"lipschitz {row['key']}"] is settings]
    images = {row["image_id"]: row["image"] for row in own}
    toward = next((row["toward_id"] for row in rows if row["direction"] == "toward"), None)
    image = decode_png(rows[0]["image"]).to(encoder.device)
    target = decode_png(images[toward]).to(encoder.device) if toward in images else None
    made = directions_of_run(encoder, image, target, settings, rows[0]["image_id"])
    names = [f"{kind} {index}" for kind, index in zip(made.kinds, made.indices, strict=True)]
    return dict(zip(names, made.vectors[0], strict=True))


def _vector(image_id: str, direction: str) -> torch.Tensor:
    made = _vectors(image_id)
    if direction not in made:  # to a match of the run, which is not among its files
        raise gr.Error(f"The direction {direction!r} cannot be made again here.", print_exception=False)
    return made[direction]


@lru_cache(maxsize=64)
def _profile(image_id: str, direction: str):
    """Distances over the whole slider, once."""
    row = _direction(image_id, direction)
    encoder, image = _encoder(row), decode_png(row["image"])
    steps = [step_of(s) for s in range(-100, 101, 5)]
    return stops_along(encoder, image, _vector(image_id, direction), steps, jvp=row["jvp"], classes=1)


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
    if isinstance(step, bool) or not isinstance(step, int | float) or not -16 <= step <= 16:
        raise gr.Error("`step` must be from −16 to 16.", print_exception=False)
    stop = _stop(image_id, direction, step)
    return {
        "distance": stop.distance, "first_order": stop.first_order, "classes": [list(c) for c in stop.classes]
    }  # fmt: skip


def _stop(image_id: str, direction: str, step: float):
    row = _direction(image_id, direction)
    image = decode_png(row["image"])
    return stops_along(_encoder(row), image, _vector(image_id, direction), [step], jvp=row["jvp"])[0]


@on_gpu
def along_view(image_id: str, direction: str, slider: float) -> str:
    """The image at the slider, its classes, and how far the embedding has moved."""
    if direction not in _vectors(image_id):  # towards an image that is not among the results
        return '<p class="small">There is nothing to move along: this direction leads to an image that is not here.</p>'
    stop, profile = _stop(image_id, direction, step_of(slider)), _profile(image_id, direction)
    return views.along_view(stop, profile, f"{image_id} moved along {direction}")


def facts_view(image_id: str, direction: str) -> tuple[str, str, str]:
    """The ladder of one direction, the constants and the spectrum of one image."""
    shown = results(home_of("constants"))
    first = _constants(image_id)[0]
    own = ("image_id", "model_revision", "readout", "image")  # of the same model and the same picture
    spectrum = next((row for row in shown.spectra if all(row[key] == first[key] for key in own)), None)
    return (
        _titled("How its constant was read", views.ladder_view(_direction(image_id, direction))),
        _titled("Constants by kind of direction", views.constants_view(_constants(image_id))),
        "" if spectrum is None else _titled("Spectrum of the Jacobian", views.spectrum_view(spectrum)),
    )


def _titled(title: str, view: str) -> str:
    return f'<h2 class="block-title">{title}</h2>{view}'


def sensitivity_tab() -> list[Any]:
    """Spectrum, constants, ladder; and a slider along a direction."""
    ids = list(dict.fromkeys(row["key"] for row in results(home_of("constants")).constants))
    names = [f"{row['direction']} {row['index']}" for row in _constants(ids[0])]
    made_for = dict.fromkeys(row["model_id"] for row in results(home_of("constants")).constants)
    model = " and ".join("the built-in checkpoint" if name == "builtin" else f"`{name}`" for name in made_for)
    gr.Markdown(
        "How fast does the embedding move when the pixels do, and along which directions not at all? Measured for "
        f"{model}. **top** directions move it most, **null** directions not at all, to first order; a **random** one "
        "moves it little. The photo is moved by h times the direction, then clipped to [0, 1]."
    )
    with gr.Row():
        image = gr.Radio(ids, value=ids[0], label="Photo")
        first = "top 0" if "top 0" in names else names[0]
        direction = gr.Dropdown(names, value=first, label="Direction (kind and number)")
    slider = gr.Slider(-100, 100, value=30, step=1, label="Move along it (fine near the middle)", elem_id="along")
    moved = gr.HTML(elem_id="moved")
    with gr.Row():
        with gr.Column(min_width=300):
            ladder = gr.HTML()
        with gr.Column(min_width=300):
            constants = gr.HTML()
        with gr.Column(min_width=300):
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
