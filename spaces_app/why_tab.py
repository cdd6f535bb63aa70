"""Lay out the tab on directions: three pushes to compare, then any direction, secants, constants and the spectrum."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import gradio as gr
import torch
import views
from charts import NARROW, Axis, Series, chart
from live import Stop, stops_along
from making.jobs import soon
from shelf import HIDDEN, encoder_of, home_of, on_gpu, recorded_encoder, refused, results
from showcase import Row
from torch import Tensor

from hf_equiv.analyses.lipschitz import directions_of_run
from hf_equiv.data.image_file import decode_png

KINDS = ("top", "random", "null")

_STYLES = {"top": "two", "row": "three", "gradient": "four", "toward": "four", "match": "four"}
_UNRELATED = 2.1  # a chart goes up to this relative distance at least; unrelated embeddings are 1 to 2 apart


@on_gpu
def look_along(image_id: str, direction: str, step: float) -> dict[str, Any]:
    """Move one of the photos along a direction and give the distance and classes that the encoder finds there.

    Args:
        image_id: name of the photo; cat, coffee, rocket or astronaut in the results that ship with this Space.
        direction: kind and index, such as "top 0", "null 3", "random 0", "gradient 0".
        step: how far, L2 with pixels in [0, 1], from −16 to 16.

    Returns:
        The distance of the embedding relative to its length, the prediction of the Jacobian, and the likeliest classes.
    """
    (stop,) = _stops(image_id, direction, [step])
    return {"distance": stop.distance, "first_order": stop.first_order, "classes": [list(c) for c in stop.classes]}


def step_of(slider: float) -> float:
    """Map a place of the slider, −100 … 100, to a step h: fine near zero, up to 16 at the ends."""
    return 16.0 * (slider / 100.0) ** 3


def _constants(image_id: str) -> dict[str, Row]:
    """Return the rows of an image by the name of the direction."""
    rows = [row for row in results(home_of("constants")).constants if row["key"] == image_id]
    if not rows:
        raise refused(f"There are no constants of {image_id!r} here.")
    return {f"{row['direction']} {row['index']}": row for row in rows}


def _direction(image_id: str, direction: str) -> Row:
    rows = _constants(image_id)
    if direction not in rows:
        raise refused(f"There is no direction {direction!r} at {image_id!r}; there are: {', '.join(rows)}.")
    return rows[direction]


@lru_cache(maxsize=16)
def _vectors(image_id: str) -> dict[str, Tensor]:
    """Recompute the directions at an image, except those to images outside the results."""
    home, rows = home_of("constants"), list(_constants(image_id).values())
    first, settings = rows[0], rows[0]["settings"]
    encoder = recorded_encoder(first, home)
    images = {row["image_id"]: row["image"] for row in results(home).constants if row["settings"] is settings}
    toward = next((row["toward_id"] for row in rows if row["direction"] == "toward"), None)
    target = decode_png(images[toward]).to(encoder.device) if toward in images else None
    image = decode_png(first["image"]).to(encoder.device)
    made = directions_of_run(encoder, image, target, settings, first["image_id"])
    names = zip(made.kinds, made.indices, made.vectors[0], strict=True)
    return {f"{kind} {index}": vector for kind, index, vector in names}


def _stops(image_id: str, direction: str, steps: Sequence[float]) -> tuple[Stop, ...]:
    if any(isinstance(h, bool) or not isinstance(h, int | float) or not -16 <= h <= 16 for h in steps):
        raise refused("`step` must be from −16 to 16.")
    row, vectors = _direction(image_id, direction), _vectors(image_id)
    if direction not in vectors:
        raise refused("There is nothing to move along: this direction leads to an image that is not here.")
    encoder = recorded_encoder(row, home_of("constants"))
    return stops_along(encoder, decode_png(row["image"]), vectors[direction], steps, row["jvp"])


@lru_cache(maxsize=64)
def _profile(image_id: str, direction: str) -> tuple[Stop, ...]:
    """Evaluate all steps of the slider once."""
    return _stops(image_id, direction, [step_of(slider) for slider in range(-100, 101, 5)])


@on_gpu
def moved_view(image_id: str, direction: str, slider: float) -> str:
    """Show the image at the slider, its classes, and the distance of its embedding."""
    try:
        (stop,) = _stops(image_id, direction, [step_of(slider)])
    except gr.Error as error:
        return views.html.notice(error.message)
    return along_view(stop, _profile(image_id, direction), f"{image_id} moved along {direction}")


def along_view(stop: Stop, profile: Sequence[Stop], name: str) -> str:
    """Show the image at one step, its classes, and the distance of the embedding over the whole way."""
    moved = stop.distance or 0.0
    near = [(p.step, p.first_order) for p in profile if p.first_order <= _UNRELATED]
    way = [(p.step, p.distance) for p in profile]
    curve = chart(
        f"Distance of the embedding: {name}",
        [Series(near, "prediction of the Jacobian", "limit"), Series(way, "distance of the embedding")],
        Axis("step h (L2, pixels in [0, 1])", low=profile[0].step, high=profile[-1].step),
        Axis("‖f(x+hv) − f(x)‖ / ‖f(x)‖", low=0.0, high=max(_UNRELATED, moved, *(p.distance or 0.0 for p in profile))),
        mark=(stop.step, moved),
    )
    return views.html.along(stop, name, curve)


def ladder_view(row: Row) -> str:
    """Draw the secants of one direction over the radii, with the float noise and the plateau."""
    radii, secants = row["radii"], list(zip(row["radii"], row["secants"], strict=True))
    series = [
        Series(list(zip(radii, row["noise_floor"], strict=True)), "float noise", "quiet"),
        Series([(r, row["jvp"]) for r in (radii[0], radii[-1])], "|Jv|", "limit"),
        Series(secants, "secants", draw="line dots"),
    ]
    if row["plateau"]:
        low, high = row["plateau"]
        series.append(Series([(r, s) for r, s in secants if low <= r <= high], "plateau", "two", "line dots"))
    title = f"Secants along {row['direction']} {row['index']} at {row['image_id']}"
    return chart(
        title, series, Axis("radius h (L2)", log=True), Axis("‖f(x+hv) − f(x−hv)‖ / 2h", log=True),
        note=views.html.reading(row), width=NARROW,
    )  # fmt: skip


def constants_view(rows: Sequence[Row]) -> str:
    """Draw the constants of one image by kind of direction; rings where no constant can be read."""
    kinds = list(dict.fromkeys(row["direction"] for row in rows))
    values = [row["value"] for row in rows if row["value"] is not None]

    def place(row: Row) -> float:
        return float(kinds.index(row["direction"]) + 0.056 * ((7 * row["index"] + 5) % 11 - 5))

    series = []
    for kind in kinds:
        points = [(place(row), row["value"]) for row in rows if row["direction"] == kind]
        series.append(Series(points, style=_STYLES.get(kind, "one"), draw="dots"))
    hidden = [(place(row), row["jvp"]) for row in rows if row["value"] is None]
    series.append(Series(hidden, "|Jv| where noise hides the constant", "quiet", "rings"))
    span = f"From {min(values):.2g} to {max(values):.3g}, by direction alone." if values else "None can be read."
    return chart(
        f"Lipschitz constants at {rows[0]['image_id']} by kind of direction", series,
        Axis("kind of direction", low=-0.5, high=len(kinds) - 0.5, names=kinds), Axis("constant", log=True), note=span,
        width=NARROW,
    )  # fmt: skip


def spectrum_view(row: Row) -> str:
    """Draw the singular values of one image with the rank threshold and the named zeros."""
    values, rank, threshold = row["singular_values"], row["rank"], row["rank_threshold"]
    causes = ", ".join(zero["cause"] for zero in [*row["structural_zeros"], *row["near_structural"]])
    ordered = list(enumerate(values, start=1))
    series = [
        Series([(1, threshold), (len(values), threshold)], "rank threshold", "limit"),
        Series(ordered[:rank], "singular values"),
        Series(ordered[rank:], f"zero: {causes}" if causes else "below it", "two", "dots"),
    ]
    told = f"along {row['nullity']:,} pixel directions the embedding does not move, to first order."
    return chart(
        f"Singular values of the Jacobian at {row['image_id']}", series, Axis("number", low=0.0), Axis("σ", log=True),
        note=f"Rank {rank} of {len(values)}: {told}", width=NARROW,
    )  # fmt: skip


def facts_view(image_id: str, direction: str) -> str:
    """Show the secants of one direction, the constants and the spectrum of one image."""
    rows = list(_constants(image_id).values())
    same = ("image_id", "model_revision", "readout", "image")  # the same model and the same picture
    facts = {
        "How its constant was read": ladder_view(_direction(image_id, direction)),
        "Constants by kind of direction": constants_view(rows),
    }
    for row in results(home_of("constants")).spectra:
        if all(row[key] == rows[0][key] for key in same):
            facts.setdefault("Spectrum of the Jacobian", spectrum_view(row))
    return views.html.facts(facts.items())


@on_gpu
def pushed_views(image_id: str, sliders: dict[str, float]) -> list[str]:
    """Show a photo moved along the first direction of each kind; 100 is a strong push for the model."""
    (reach, own), shown = _reach(image_id), []
    for kind, slider in sliders.items():
        (stop,) = _stops(image_id, f"{kind} 0", [reach * (slider / 100) ** 2])
        shown.append(views.html.pushed(kind, stop.png, stop, own))
    return shown


async def _renewed(kinds: Sequence[str], image_id: str, *sliders: float) -> AsyncIterator[list[str]]:
    """Show the photo itself at once, then moved: the first time, its directions take seconds."""
    photo = next(iter(_constants(image_id).values()))["image"]
    yield [views.html.pushed(kind, photo, None) for kind in kinds]
    yield await soon(pushed_views, image_id, dict(zip(kinds, sliders, strict=True)))


@lru_cache(maxsize=16)
def _reach(image_id: str) -> tuple[float, str | None]:
    """Return the length of a strong push, and the label of the photo itself."""
    rows, vectors = _constants(image_id), _vectors(image_id)
    strongest = max(vectors, key=lambda name: rows[name]["jvp"])
    still, moved = _stops(image_id, strongest, [0.0, 1.0])
    return min(16.0, 4.0 / max(moved.first_order, 1e-3)), next((label for label, _ in still.classes), None)


def warm_up() -> None:
    """Load the model of the directions and compute those of the first photos, before a visitor asks for them."""
    with suppress(gr.Error):  # the page shows it
        encoder_of("builtin")
        if torch.cuda.is_available():
            return  # a GPU is quick, and on ZeroGPU there is none yet
        for image_id in list(dict.fromkeys(row["key"] for row in results(home_of("constants")).constants))[:4]:
            _vectors(image_id)


def why_tab(tab: gr.Tab) -> None:
    """Lay out the tab."""
    constants = results(home_of("constants")).constants
    ids = list(dict.fromkeys(row["key"] for row in constants))
    names = list(_constants(ids[0]))
    gr.HTML(views.html.about_push())
    image = gr.Radio(ids, value=ids[0], label="Photo", elem_id="photo")
    sliders, pictures = [], []
    kinds = [kind for kind in KINDS if f"{kind} 0" in names]
    with gr.Row():
        for kind in kinds:
            with gr.Column(min_width=220):
                # the photo itself is there before the model is, so that the tab is never blank
                pictures.append(gr.HTML(views.html.pushed(kind, constants[0]["image"], None), elem_id=f"pushed-{kind}"))
                label = views.html.PUSHES[kind]
                sliders.append(gr.Slider(0, 100, value=50, step=1, label=label, elem_id=f"push-{kind}", buttons=[]))
    gr.HTML(views.html.so_it_works())
    # `soon` lets visitors take turns; a choice made meanwhile is followed
    quietly = HIDDEN | {"concurrency_limit": None, "trigger_mode": "always_last"}
    for kind, slider, picture in zip(kinds, sliders, pictures, strict=True):
        slider.input(
            partial(soon, lambda image, at, kind=kind: pushed_views(image, {kind: at})[0]), [image, slider], picture,
            **quietly,
        )  # fmt: skip
    gr.on([tab.select, image.change], partial(_renewed, kinds), [image, *sliders], pictures, **quietly)
    with gr.Accordion("Details: all directions, and the numbers", open=False, elem_id="directions") as details:
        gr.HTML(views.html.about_directions(dict.fromkeys(row["model_id"] for row in constants)))
        direction = gr.Dropdown(
            names, value="top 0" if "top 0" in names else names[0], label="Direction (kind and number)"
        )
        along = gr.Slider(-100, 100, value=30, step=1, label="Move along it (fine near the middle)", elem_id="along")
        moved, facts = gr.HTML(elem_id="moved"), gr.HTML()
    asked = [image, direction, along]
    along.input(partial(soon, moved_view), asked, moved, **quietly)
    gr.on(
        [details.expand, image.change, direction.change],
        partial(soon, lambda image, direction, at: (moved_view(image, direction, at), facts_view(image, direction))),
        asked, [moved, facts], **quietly,
    )  # fmt: skip
