"""Walk rows: one point of a walk along a level set, with its frame, drift, distances and label."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hf_equiv.analyses.match import match_target
from hf_equiv.analyses.measures import relative_error
from hf_equiv.analyses.pairs import image_generator
from hf_equiv.data.image_file import decode_png, encode_png
from hf_equiv.formatting import finite, short
from hf_equiv.geometry.headings import Toward
from hf_equiv.geometry.levelset import STOP, TO_AN_IMAGE, WalkPoint, at_rest, trace_level_set
from hf_equiv.matching.corrector import Corrector
from hf_equiv.precision import no_tf32
from hf_equiv.results import Status
from hf_equiv.runs.schema import Row

CHUNK = 16
"""Frames encoded at once."""


def walk_rows(
    encoder: Any, image: Tensor, target: Tensor | None, settings: Mapping[str, Any], image_id: str,
    tell: Callable[[str, int, int], None],
) -> tuple[list[Row], dict[str, Tensor]]:  # fmt: skip
    """Walk from one image; for `nearest` and `connect` from a match that starts at it.

    Args:
        encoder: f.
        image: (3, H, W).
        target: image to head for or to match, (3, H, W); None if there is none.
        settings: of the run.
        image_id: its id.
        tell: told of progress.

    Returns:
        A row for each point, with `frame` as PNG but without provenance columns; and the float images `ID/frames`
        (S + 1, 3, H, W), `ID/origin` that distances are against, and `ID/target`.

    Raises:
        RuntimeError: no match to start from, or an encoder that gives NaN.
    """
    heading, rtol, steps = settings["heading"], settings["rtol"], settings["num_steps"]
    start, cost, seconds = image, 0.0, 0.0
    if settings["solver"] is not None and target is not None:
        start, cost, seconds = match_target(encoder, image, target, rtol, tell)
    walk = trace_level_set(
        encoder,
        start[None],
        heading=heading,
        step=settings["step"],
        num_steps=steps,
        rtol=rtol,
        target=None if target is None else target[None],
        stop=settings.get("stop", STOP),
        origin=image[None] if settings["solver"] is not None else None,
        generator=image_generator(settings["seed"], image_id),
        keep_points=True,
        progress=lambda point: tell("walk", point.step, steps),
    )
    path, status = walk.paths[0], walk.status[0]
    if not path or status is Status.ERROR:
        raise RuntimeError(status.advice)
    frames = torch.stack([point.pixels for point in path if point.pixels is not None])
    z = level(encoder, frames[0], target if settings["solver"] is not None else None)
    labels = labels_of(encoder, frames)
    rows = []
    for point, frame, label in zip(path, frames, labels, strict=True):
        png = encode_png(frame)
        rows.append(
            {
                "frame": png,
                **_measures(point),
                **label,
                "drift": drift(encoder, frame, z),  # of the frame alone, as whoever checks it computes it
                "drift_8bit": drift(encoder, decode_png(png, frame.dtype).to(frame.device), z),
                "status": str(status),
                "heading": heading,
                "num_evals": cost + float(walk.num_evals[0]),
                "seconds": seconds + float(walk.seconds[0]),
            }
        )
    origin = image if settings["solver"] is not None else frames[0].clone()  # no memory of the frames
    floats = {f"{image_id}/frames": frames, f"{image_id}/origin": origin}
    return rows, floats | ({} if target is None else {f"{image_id}/target": target})


def level(encoder: Any, start: Tensor, target: Tensor | None) -> Tensor:
    """The embedding z (D,) of the level set: the target's for walks from a match, else that of the start."""
    with torch.no_grad(), no_tf32():
        z: Tensor = encoder((start if target is None else target)[None])[0]
    return z


def drift(encoder: Any, frame: Tensor, z: Tensor) -> float | None:
    """‖f(x) − z‖ / ‖z‖ of one frame (3, H, W)."""
    with torch.no_grad(), no_tf32():
        return relative_error(encoder(frame[None])[0], z)


def labels_of(encoder: Any, frames: Tensor) -> list[Row]:
    """`label` and `prob` of each frame, both None without a head."""
    if not encoder.has_head:
        return [{"label": None, "prob": None} for _ in frames]
    with torch.no_grad(), no_tf32():
        probs = torch.cat([encoder.classify(some).double().softmax(dim=1) for some in frames.split(CHUNK)])
    names = encoder.label_names
    return [{"label": names[int(p.argmax())], "prob": finite(p.max())} for p in probs]


def _measures(point: WalkPoint) -> Row:
    return {
        "step": point.step,
        "arc_length": finite(point.arc_length),
        "l2": finite(point.l2),
        "linf": finite(point.linf),
        "psnr_db": finite(point.psnr_db),
        "remaining": finite(point.remaining),
        "stationarity": finite(point.stationarity),
    }


def _walk(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Row:
    walks: list[Row] = []
    for name in dict.fromkeys(row["image_id"] for row in rows):
        path = [row for row in rows if row["image_id"] == name]
        labels = list(dict.fromkeys(row["label"] for row in path if row["label"] is not None))
        walks.append(
            {
                "image_id": name,
                "status": path[0]["status"],
                "steps": path[-1]["step"],
                "start_l2": path[0]["l2"],
                "l2": path[-1]["l2"],
                "arc_length": path[-1]["arc_length"],
                "psnr_db": path[-1]["psnr_db"],
                "largest_drift": max(row["drift"] for row in path),
                "largest_drift_8bit": max((d for row in path if (d := row["drift_8bit"]) is not None), default=None),
                "remaining": path[-1]["remaining"],
                "stationarity": path[-1]["stationarity"],
                "labels": labels,
                "num_evals": path[0]["num_evals"],
            }
        )
    return {"walks": walks, "verdict": _walk_verdict(walks, settings)}


def _walk_verdict(walks: Sequence[Row], settings: Mapping[str, Any]) -> str:
    heading = settings["heading"]
    drift = short(max(walk["largest_drift"] for walk in walks))
    rounded = [walk["largest_drift_8bit"] for walk in walks if walk["largest_drift_8bit"] is not None]
    kept = f"with drift at most {drift} at every point" + (
        f" ({short(max(rounded))} for the frames rounded to 8 bit)." if rounded else "."
    )
    if len(walks) > 1:
        done = sum(walk["status"] == Status.COMPLETED for walk in walks)
        ends = f"{median(w['l2'] for w in walks):.3g}"
        return f"{done} of {len(walks)} walks ({heading}) were completed; they end at L2 {ends} (median), {kept}"
    walk = walks[0]
    name, steps = walk["image_id"], walk["steps"]
    if settings["solver"] is not None:
        way = f"from a match of the target ({heading}): L2 {walk['start_l2']:.3g} from {name} before, "
        way += f"{walk['l2']:.3g} after"
    else:
        way = f"from {name} ({heading}): L2 {walk['l2']:.3g} from it"
    text = f"{steps} steps {way}, along a path of {walk['arc_length']:.3g}, {kept}"
    if steps == 0:
        text = f"No step was made from {name} ({heading})."
    if heading in ("toward", "connect") and walk["remaining"] is not None:
        reached = walk["remaining"] < 1e-3
        text += " The target itself was reached." if reached else f" The target is still {walk['remaining']:.3g} away."
    if heading in TO_AN_IMAGE and walk["stationarity"] is not None and (walk["remaining"] or 0.0) >= 1e-3:
        text += " " + _rest(walk, settings)
    if walk["labels"]:
        seen = " then ".join(name.split(",")[0] for name in walk["labels"])
        text += f" The head sees {seen} all the way." if len(walk["labels"]) == 1 else f" The head sees {seen}."
    return text


def _rest(walk: Row, settings: Mapping[str, Any]) -> str:
    """Why a walk to an image ended, and how much of the way on still leads along the level set."""
    left = walk["stationarity"]
    told = f"at most {left:.0%} of the way on leads along the level set"
    if left <= settings.get("stop", STOP):
        return f"It is as near as was asked: {told}."
    if walk["steps"] == settings["num_steps"]:
        return f"All steps that were asked are made; {told}."
    if walk["status"] == Status.COMPLETED:
        return f"No nearer point was found; {told}."
    return f"A nearer point could not be brought back to the level set; {told}."


# How `verify` makes rows of walks again, and compares them (see `verify.rows.VERBS`).


def follow(settings: Row, rows: Sequence[Row]) -> list[Row]:
    """Return the status that fits the number of steps: the same in all rows."""
    status, steps = rows[-1]["status"], max(row["step"] or 0 for row in rows)
    ends = {Status.DRIFT_EXCEEDED, Status.BOX_BLOCKED}
    ends |= set() if settings["heading"] == "random" else {Status.COMPLETED}
    if steps == settings["num_steps"]:
        status = Status.COMPLETED
    elif status not in ends:
        status = Status.DRIFT_EXCEEDED
    return [{"status": str(status)} for _ in rows]


def remake(encoder: Any, settings: Row, rows: Sequence[Row], floats: Mapping[str, Tensor]) -> list[Row]:
    """Make the rows of one walk again from its float frames."""
    name, heading = rows[0]["image_id"], settings["heading"]
    frames, matched = floats[f"{name}/frames"], settings["solver"] is not None
    origin = floats[f"{name}/origin"] if matched else frames[0]
    target = None if rows[0]["target_id"] is None else floats[f"{name}/target"]
    z = level(encoder, frames[0], target if matched else None)
    floor = float(encoder.noise_floor(frames[[0, -1]]).max())
    aim = origin if heading == "nearest" else target
    made: list[Row] = []
    for step, (frame, label) in enumerate(zip(frames, labels_of(encoder, frames), strict=True)):
        picture = decode_png(encode_png(frame), frame.dtype).to(frame.device)
        gap, moved = frame.double() - origin.double(), frame.double() - frames[max(0, step - 1)].double()
        l2 = float(gap.norm())
        made.append({
            "image_id": name,
            "step": step,
            "frame": picture,
            **label,
            "drift": drift(encoder, frame, z),
            "drift_8bit": drift(encoder, picture, z),
            "arc_length": (made[-1]["arc_length"] if made else 0.0) + float(moved.norm()),
            "l2": l2,
            "linf": float(gap.abs().max()),
            "psnr_db": 10 * math.log10(gap.numel() / l2**2) if l2 > 0 else None,
            "remaining": None if aim is None else float((aim.double() - frame.double()).norm()),
            "noise_floor": floor,
        } | ({"stationarity": None} if heading == "random" else {}))  # fmt: skip
    if heading in TO_AN_IMAGE and aim is not None:
        made[-1]["stationarity"] = _left(encoder, frames[-1], aim, z, settings["rtol"])
        early = made[-1]["step"] < settings["num_steps"] and rows[-1]["status"] == Status.COMPLETED
        made[-1]["most_left"] = at_rest(settings.get("stop", STOP)) if early else 1.0 + 1e-6
    return made


def _left(encoder: Any, frame: Tensor, aim: Tensor, z: Tensor, rtol: float) -> float | None:
    """The share of the way to an image that leads along the level set, by the Jacobian at the frame."""
    corrector = Corrector(encoder, z.double(), rtol)
    with no_tf32():
        at = corrector.look(frame)
        corrector.refresh(at)
        return Toward(aim.to(frame), stop=math.inf).plan(corrector, at, 1.0).stationarity


def tolerances(made: Row, settings: Row) -> Row:
    """Say how far columns of a walk row may be from those made again."""
    near = max(3 * made["noise_floor"], 1e-12 if settings["dtype"] == "float64" else 1e-6)
    drift = made["drift"] or 0.0
    limits: Row = {
        "drift": (drift - near, min(drift, settings["rtol"]) + near),
        "drift_8bit": near,
        "arc_length": 1e-5 * (1 + made["arc_length"]),
        "l2": 1e-5,
        "linf": 1e-6,
        "psnr_db": 1e-3,
        "remaining": 1e-5,
        "prob": max(100 * near, 1e-4),
    }
    if "most_left" in made:  # an upper bound is stated, which a walk that was completed early had to bring low
        limits["stationarity"] = (0.95 * (made["stationarity"] or 0.0) - 1e-3, made["most_left"])
    return limits
