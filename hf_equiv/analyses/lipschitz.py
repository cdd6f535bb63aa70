"""Lipschitz rows: one direction at one image, its constant, and the ladder of secants that it was read from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from hf_equiv.analyses.match import match_target
from hf_equiv.analyses.measures import _median
from hf_equiv.analyses.pairs import image_generator
from hf_equiv.formatting import finite
from hf_equiv.geometry.directions import Directions, make_directions
from hf_equiv.geometry.linearity import LinearityResult, linearity_radius
from hf_equiv.geometry.lipschitz import LipschitzResult, directional_lipschitz
from hf_equiv.geometry.regional import RegionalResult, regional_lipschitz
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
