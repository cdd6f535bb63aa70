"""Check the stored rows of one walk along a level set (private to `verify`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_equiv.columncheck import Columns
from hf_equiv.corrector import Corrector
from hf_equiv.headings import Toward
from hf_equiv.levelset import STOP, TO_AN_IMAGE
from hf_equiv.precision import no_tf32
from hf_equiv.results import Status
from hf_equiv.shards import Row
from hf_equiv.walk import at_rest
from hf_equiv.walkrows import drift, labels_of, level


def check_walk(columns: Columns, rows: Sequence[Row], pictures: Sequence[Tensor]) -> None:
    """Check the rows of one walk against its float frames, and the PNG files against these."""
    name, found = rows[0]["image_id"], columns.found
    frames, origin = columns.floats.get(f"{name}/frames"), columns.floats.get(f"{name}/origin")
    target = columns.floats.get(f"{name}/target")
    if frames is None or origin is None or (target is None) != (rows[0]["target_id"] is None):
        columns.say(rows[0], "frames", "float frames", f"the float frames of {name!r} are missing")
        return
    if [row["step"] for row in rows] != list(range(len(frames))):
        columns.say(rows[0], "step", f"steps 0 to {len(frames) - 1}", "steps are missing or out of order")
        return
    if not (bool(torch.isfinite(frames).all()) and 0 <= float(frames.min()) and float(frames.max()) <= 1):
        columns.say(rows[0], "frames", "pixels in [0, 1]", "the float frames leave [0, 1]")
        return
    heading = columns.settings["heading"]
    place, matched = columns.encoder.device, columns.settings["solver"] is not None
    z = level(columns.encoder, frames[0].to(place), target.to(place) if matched and target is not None else None)
    noise = float(columns.encoder.noise_floor(frames[[0, -1]].to(place)).max())
    tolerance = max(3 * noise, 1e-6 if columns.dtype == torch.float32 else 1e-12)
    length = 0.0
    labels = labels_of(columns.encoder, frames.to(place))
    for i, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        frame, before = frames[i], frames[max(0, i - 1)]
        made = drift(columns.encoder, frame.to(place), z)
        rounded = drift(columns.encoder, picture.to(frame).to(place), z)
        columns.near(row, "drift", made, tolerance)
        columns.near(row, "drift_8bit", rounded, tolerance)
        for key, worst in (("embedding_error", made), ("embedding_error_8bit", rounded)):
            if worst is not None:
                found.worst[key] = max(worst, found.worst.get(key, 0.0))
        if float((picture.double() - frame.double()).abs().max()) > 0.5 / 255 + 1e-6:
            columns.say(row, "frame", "the rounded float frame", "the PNG is not the float frame, rounded")
        length += float((frame.double() - before.double()).norm())
        gap = frame.double() - origin.double()
        l2 = float(gap.norm())
        columns.near(row, "arc_length", length, 1e-5 * (1 + length))
        columns.near(row, "l2", l2, 1e-5)
        columns.near(row, "linf", float(gap.abs().max()), 1e-6)
        columns.near(row, "psnr_db", 10 * math.log10(gap.numel() / l2**2) if l2 > 0 else None, 1e-3)
        _destination(columns, row, frame, origin, target)
        columns.same(row, "label", labels[i]["label"])
        columns.near(row, "prob", labels[i]["prob"], max(100 * tolerance, 1e-4))
        columns.same(row, "heading", columns.settings["heading"])
        if made is not None and made > columns.settings["rtol"] + tolerance:
            found.add(columns.file, columns.name(row), "drift", columns.settings["rtol"], made, "above rtol")
    _end(columns, rows[-1], frames[-1].to(place), origin if heading == "nearest" or target is None else target, z)


def _end(columns: Columns, row: Row, frame: Tensor, target: Tensor, z: Tensor) -> None:
    """Check the status, and how near to stationary the walk ended: what is stated is an upper bound."""
    heading, most = columns.settings["heading"], columns.settings["num_steps"]
    early = row["step"] < most
    if not early and row["status"] != Status.COMPLETED:
        columns.same(row, "status", str(Status.COMPLETED))
    if early and heading == "random" and row["status"] == Status.COMPLETED:
        columns.say(row, "status", f"{most} steps", f"completed states {most} steps; there are {row['step']}")
    if (row["stationarity"] is None) != (heading == "random"):
        columns.say(row, "stationarity", "a number but for `random`", f"it does not fit heading {heading}")
    if heading not in TO_AN_IMAGE or row["stationarity"] is None:
        return
    most_left = at_rest(columns.settings.get("stop", STOP))
    if early and row["status"] == Status.COMPLETED and row["stationarity"] > most_left:
        columns.found.add(
            columns.file, columns.name(row), "stationarity", row["stationarity"], most_left, "completed states at most"
        )
    corrector = Corrector(columns.encoder, z.double(), columns.settings["rtol"])
    with no_tf32():
        at = corrector.look(frame)
        corrector.refresh(at)
        made = Toward(target.to(frame), stop=math.inf).plan(corrector, at, 1.0).stationarity
    if made is None or not 0.95 * made - 1e-3 <= row["stationarity"] <= 1 + 1e-6:
        columns.found.add(columns.file, columns.name(row), "stationarity", row["stationarity"], made, "at least")


def _destination(columns: Columns, row: Row, frame: Tensor, origin: Tensor, target: Tensor | None) -> None:
    aim = origin if columns.settings["heading"] == "nearest" else target
    made = None if aim is None else float((aim.double() - frame.double()).norm())
    columns.near(row, "remaining", made, 1e-5)
