"""Lipschitz rows: one direction at one image, its constant, and the ladder of secants that it was read from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from hf_equiv import checks
from hf_equiv.analyses.match import match_target, outside_ball
from hf_equiv.analyses.measures import _median
from hf_equiv.analyses.pairs import image_generator
from hf_equiv.analyses.walk import drift, level
from hf_equiv.formatting import finite
from hf_equiv.geometry.directions import Directions, make_directions
from hf_equiv.geometry.linearity import LinearityResult, linearity_radius
from hf_equiv.geometry.lipschitz import LipschitzResult, directional_lipschitz
from hf_equiv.geometry.regional import RegionalResult, regional_lipschitz
from hf_equiv.geometry.secants import JVP_RTOL, RTOL, least_error, plateau_of
from hf_equiv.jacobian import Jacobian
from hf_equiv.results import Status
from hf_equiv.runs.schema import Row

Stage = Callable[[str, int, int], None]
"""Told of a stage, how much of it is done, and of how much."""


def directions_of_run(
    encoder: Any, image: Tensor, target: Tensor | None, settings: Mapping[str, Any], image_id: str, batch: int = 32,
    match: Tensor | None = None,
) -> Directions:  # fmt: skip
    """The directions at one image: they follow from the settings of the run, its seed and the image's id.

    Args:
        encoder: f.
        image: (3, H, W).
        target: image of the `toward` direction, (3, H, W); None if there is none.
        settings: of the run, as in `run.json`.
        image_id: its id.
        batch: cotangents per backward pass.
        match: image of the `match` direction, (3, H, W); None if there is none.

    Returns:
        The directions of one image, in the order of its rows.
    """
    kinds: Mapping[str, int] = settings["directions"]
    return make_directions(
        encoder,
        image[None],
        random=kinds.get("random", 0),
        top=kinds.get("top", 0),
        row=kinds.get("row", 0),
        null=kinds.get("null", 0),
        gradient="gradient" in kinds,
        toward=target[None] if target is not None and "toward" in kinds else None,
        match=match[None] if match is not None else None,
        generator=image_generator(settings["seed"], image_id),
        batch=batch,
    )


def measure_directions(
    encoder: Any, image: Tensor, target: Tensor | None, settings: Mapping[str, Any], image_id: str, batch: int,
    tell: Stage, match: Tensor | None = None,
) -> tuple[LipschitzResult, LinearityResult | None]:  # fmt: skip
    """Constants and, if asked for, linearity radii of the directions of one image.

    The directions follow from the settings, the seed and the image's id, so that `verify` makes the same.

    Args:
        encoder: f.
        image: (3, H, W).
        target: image of the `toward` direction, (3, H, W); None if there is none.
        settings: of the run.
        image_id: its id.
        batch: images and tangents per pass.
        tell: told of progress.
        match: image of the `match` direction, (3, H, W); None if there is none.

    Returns:
        The two results.
    """
    tell("directions", 0, 1)
    directions = directions_of_run(encoder, image, target, settings, image_id, batch, match)
    radii: Sequence[float] = settings["radii"]
    found = directional_lipschitz(
        encoder, image[None], directions, radii=radii, batch=batch,
        progress=lambda done, total: tell("secants", done, total),
    )  # fmt: skip
    reach = None
    if settings["linearity"]:
        reach = linearity_radius(
            encoder, image[None], directions, batch=batch, progress=lambda done, total: tell("linearity", done, total)
        )
    return found, reach


def measure_region(encoder: Any, image: Tensor, settings: Mapping[str, Any], image_id: str) -> RegionalResult:
    """The largest constant found about one image (3, H, W), and the extreme-value estimate of the rest."""
    generator = image_generator(settings["seed"], image_id)
    return regional_lipschitz(encoder, image[None], settings["regional"], settings["norm"], generator=generator)


def lipschitz_rows(
    encoder: Any, image: Tensor, target: Tensor | None, settings: Mapping[str, Any], image_id: str, batch: int,
    tell: Stage,
) -> tuple[list[Row], dict[str, Tensor]]:  # fmt: skip
    """The rows of one image, without image and provenance columns; arguments as `measure_directions`.

    Returns:
        A row for each direction; and, each (3, H, W), the target as `ID/toward`, its match as `ID/match`, and where the
        regional constant was found, `ID/place` and `ID/direction`.

    Raises:
        RuntimeError: no match for the direction `match`, or an encoder that gives NaN.
    """
    floats: dict[str, Tensor] = {} if target is None else {f"{image_id}/toward": target}
    match, evals, spent = None, 0.0, 0.0
    if "match" in settings["directions"] and target is not None:
        match, evals, spent = match_target(encoder, image, target, settings["rtol"], tell)
        floats[f"{image_id}/match"] = match
    found, reach = measure_directions(encoder, image, target, settings, image_id, batch, tell, match)
    rows = rows_of(found, reach)
    cost, seconds = evals + float(found.num_evals[0]), spent + float(found.seconds[0])
    if reach is not None:
        cost, seconds = cost + float(reach.num_evals[0]), seconds + float(reach.seconds[0])
    region: Row = dict.fromkeys(("regional_lower_bound", "regional_at_center", "regional_clever"))
    if settings["regional"] is not None:
        tell("region", 0, 1)
        ball = measure_region(encoder, image, settings, image_id)
        cost, seconds = cost + float(ball.num_evals[0]), seconds + float(ball.seconds[0])
        region = {
            "regional_lower_bound": finite(ball.lower_bound[0]),
            "regional_at_center": finite(ball.at_center[0]),
            "regional_clever": finite(ball.clever[0]),
        }
        floats |= {f"{image_id}/place": ball.images[0], f"{image_id}/direction": ball.directions[0]}
    return [row | region | {"num_evals": cost, "seconds": seconds} for row in rows], floats


def rows_of(found: LipschitzResult, reach: LinearityResult | None) -> list[Row]:
    """The columns that the results of one image give, a row for each direction."""
    rows = []
    for k, (kind, index) in enumerate(zip(found.kinds, found.indices, strict=True)):
        plateau = found.plateau[0, k]
        rows.append(
            {
                "direction": kind,
                "index": index,
                "value": finite(found.values[0, k]),
                "jvp": finite(found.jvp[0, k]),
                "radii": found.radii.tolist(),
                "secants": _numbers(found.secants[0, k]),
                "noise_floor": _numbers(found.noise_floor[0, k]),
                "noise_method": found.noise_method,
                "plateau": plateau.tolist() if bool(torch.isfinite(plateau).all()) else None,
                "status": str(found.status[0][k]),
                "value_error": finite(found.errors[0, k]),
                "unit_factor": finite(found.unit_factor[0, k]),
                "linearity_radius": None if reach is None else finite(reach.radii[0, k]),
                "linearity_at_limit": None if reach is None else bool(reach.at_limit[0, k]),
            }
        )
    return rows


def _numbers(values: Tensor) -> list[float | None]:
    return [finite(v) for v in values.tolist()]


def _lipschitz(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Row:
    kinds: Row = {}
    for kind in dict.fromkeys(row["direction"] for row in rows):
        own = [row for row in rows if row["direction"] == kind]
        values = [row["value"] for row in own if row["value"] is not None]
        kinds[kind] = {
            "count": len(own),
            "resolved": len(values),
            "quantiles": _quantiles(values),
            "largest_jvp": max((row["jvp"] for row in own if row["jvp"] is not None), default=None),
            "linearity_radius": _median(row["linearity_radius"] for row in own),
        }
    firsts = {row["image_id"]: row for row in rows}.values()
    region = {
        key: max((row[key] for row in firsts if row[key] is not None), default=None)
        for key in ("regional_lower_bound", "regional_at_center", "regional_clever")
    }
    return {"kinds": kinds, "regional": region, "verdict": _lipschitz_verdict(kinds, region, settings)}


def _lipschitz_verdict(kinds: Row, region: Row, settings: Mapping[str, Any]) -> str:
    told = [f"{kind} {q['quantiles'][2]:.3g}" for kind, q in kinds.items() if q["quantiles"]]
    text = "Median local constants by kind of direction: " + ", ".join(told) + "." if told else ""
    if "null" in kinds:
        null = kinds["null"]
        numbers = f"{null['resolved']} of {null['count']}" if null["resolved"] else f"none of {null['count']}"
        text += f" A constant above the float noise along null directions: {numbers}."
    found = region["regional_lower_bound"]
    if found is not None:
        norm = {"linf": "L∞ ", "l2": "L2 "}.get(settings.get("norm") or "", "")
        ball = f"{norm}ball" + (f" of radius {settings['regional']:g}" if settings.get("regional") else "")
        text += f" The largest constant found in the {ball} is {found:.4g} ({region['regional_at_center']:.4g} at the "
        text += "image itself): a lower bound."
        clever = region["regional_clever"]
        if clever is not None:
            text += f" The extreme-value estimate (CLEVER) is {clever:.4g}"
            text += ", less than what is attained." if clever < found else "."
    return text.strip() or "No direction has a constant above the float noise."


def _quantiles(values: Sequence[float]) -> list[float] | None:
    """0, 25, 50, 75 and 100 %."""
    if not values:
        return None
    if len(values) == 1:
        return [values[0]] * 5
    return [min(values), *quantiles(values, n=4, method="inclusive"), max(values)]


# How `verify` makes rows of constants again, and compares them (see `verify.rows.VERBS`).


_BATCH = 32  # images and tangents per pass


_REGION = ("regional_lower_bound", "regional_at_center", "regional_clever")


def follow(settings: Row, rows: Sequence[Row]) -> list[Row]:
    """Return the status that fits the stated value, and the plateau of the stated secants about it."""
    made = []
    for row in rows:
        ladder, value, plateau = _ladder(row), row["value"], None
        status = Status.ERROR if ladder is None or row["jvp"] is None else Status.UNDETERMINED
        if value is not None and ladder is not None:
            secants, radii, floors = ladder
            about = torch.tensor([value], dtype=torch.float64)
            plateau = plateau_of(secants[None], radii, floors[None], about)[0].tolist()
        made.append({"status": str(status if value is None else Status.RESOLVED), "plateau": plateau})
    return made


def remake(encoder: Any, settings: Row, rows: Sequence[Row], floats: Mapping[str, Tensor]) -> list[Row]:
    """Make the rows of one image again."""
    name, image, kinds = rows[0]["image_id"], rows[0]["image"], settings["directions"]
    try:
        checks.check_radii(torch.tensor(settings["radii"] or [], dtype=torch.float64))
    except (TypeError, OverflowError) as error:  # of text, nulls and whole numbers beyond float64
        raise ValueError(f"`radii` must be a ladder; {error}") from error
    toward = floats[f"{name}/toward"] if {"toward", "match"} & set(kinds) else None
    match, faults = None, []
    if "match" in kinds:
        match = floats[f"{name}/match"]
        reached = drift(encoder, match, level(encoder, match, toward))
        noise = max(3 * float(encoder.noise_floor(match[None])[0]), 1e-6)
        if reached is None or not reached <= settings["rtol"] + noise:
            told = f"the embedding error of the stored match is {reached}"
            faults.append(("match", f"an image of the target's embedding, to {settings['rtol']:g}", told))
    found, reach = measure_directions(encoder, image, toward, settings, name, _BATCH, lambda *_: None, match)
    region: Row = dict.fromkeys(_REGION)
    if settings["regional"] is not None:
        place, v = floats[f"{name}/place"], floats[f"{name}/direction"]
        faults += outside_ball(_REGION[0], place, image, settings["regional"], settings["norm"])
        moved = Jacobian(encoder, place).mv((v / v.double().norm()).to(place)[None])[0]
        ball = measure_region(encoder, image, settings, name)
        constants = (moved.double().norm(), ball.at_center[0], ball.clever[0])
        region = dict(zip(_REGION, map(finite, constants), strict=True))
    made = rows_of(found, reach)
    common = {"image_id": name, "image": image, "largest": max((row["jvp"] or 0.0 for row in made), default=0.0)}
    stated = {(row["direction"], row["index"]): row for row in rows}
    made = [_beside(stated.get((row["direction"], row["index"])), row | region | common) for row in made]
    made[0]["faults"] = faults
    return made


def _beside(row: Row | None, made: Row) -> Row:
    """Add the least error that the stated floors and ‖Jv‖ allow; at the edge of `resolved`, take the stated side."""
    made["least_error"] = 0.0
    if row is None:
        return made
    ladder = _ladder(row)
    if ladder is not None and len(ladder[2]) and float(ladder[2].min()) > 0:
        made["least_error"] = 0.99 * float(least_error(ladder[2][None])[0])  # rounding of a sum
    if row["value"] is not None and row["jvp"] is not None:
        made["least_error"] = max(made["least_error"], 0.99 * abs(row["value"] - row["jvp"]))
    size = made["value"] or made["jvp"] or 0.0
    if 0.5 * RTOL * size <= (made["value_error"] or 0.0) <= 2 * RTOL * size:
        made["value"] = None if row["value"] is None else made["value"] or made["jvp"]
    return made


def _ladder(row: Row) -> tuple[Tensor, Tensor, Tensor] | None:
    """The stated secants, radii and noise floors, if there are as many of each."""
    columns = [row["secants"] or [], row["radii"] or [], row["noise_floor"] or []]
    if any(None in column for column in columns) or len({len(column) for column in columns}) > 1:
        return None
    secants, radii, floors = (torch.tensor(column, dtype=torch.float64) for column in columns)
    return secants, radii, floors


def tolerances(made: Row, settings: Row) -> Row:
    """Say how far columns of a lipschitz row may be from those made again: by the noise floors, which vary fivefold."""
    coarse = settings["dtype"] in ("bfloat16", "float16")
    noise = (1e-12 if settings["dtype"] == "float64" else 1e-6) * made["largest"]
    floors, secants = ([n or 0.0 for n in made[key]] for key in ("noise_floor", "secants"))
    jvp, value, error = (made[key] or 0.0 for key in ("jvp", "value", "value_error"))
    beside_jvp = made["value"] == made["jvp"]  # undetermined here, by a little
    return {
        "jvp": 1e-3 * jvp + 30 * noise,
        "radii": [1e-12 * h for h in made["radii"]],
        "noise_floor": [(0.2 * floor, 5 * floor) for floor in floors],
        "secants": [4 * floor + 1e-3 * secant + noise for floor, secant in zip(floors, secants, strict=True)],
        "value": 2 * (JVP_RTOL if coarse else RTOL) * jvp if beside_jvp else 2 * error + 1e-4 * value,
        "value_error": (made["least_error"], 5 * error + noise),
        "unit_factor": 1e-5 * (made["unit_factor"] or 0.0),
        "linearity_radius": 1e-2 * (made["linearity_radius"] or 0.0),
        "regional_lower_bound": 1e-4 * (made["regional_lower_bound"] or 0.0),
        "regional_at_center": 1e-2 * (made["regional_at_center"] or 0.0),
        "regional_clever": 0.1 * (made["regional_clever"] or 0.0),  # a fit to maxima: rounding counts for more
    }
