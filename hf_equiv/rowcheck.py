"""Check one stored row against what its images give (private helper of `hf_equiv.verify`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_equiv import metrics, shards
from hf_equiv.imagefile import decode_png
from hf_equiv.precision import no_tf32
from hf_equiv.results import SCHEMA_VERSION, Status
from hf_equiv.shards import Row

if TYPE_CHECKING:
    from hf_equiv.encoder import Encoder

_RELATIVE = ("embedding_error", "embedding_error_8bit", "target_quantization_error", "noise_floor")
_COSINES = ("cosine_to_target", "cosine_to_source", "cosine_source_target")
_PROBS = ("match_prob", "target_label_prob")
_STATUSES = (Status.CONVERGED, Status.STALLED, Status.MAX_EVALS, Status.INFEASIBLE, Status.ERROR)
LABELS = ("source_label", "target_label", "match_label", "same_top1")
"""Columns of a match row that must be as they are recomputed, to the letter."""

_PIXELS = {"psnr_db": 1e-8, "ssim": 1e-5, "linf": 1e-9, "l2": 1e-9}
"""Tolerances of what follows from pixels alone: dB, none, pixels in [0, 1], pixels in [0, 1]."""
_RANGES = {
    **dict.fromkeys(_RELATIVE, (0.0, math.inf)),
    **dict.fromkeys(_COSINES, (-1.0, 1.0)),
    **dict.fromkeys(_PROBS, (0.0, 1.0)),
    "num_evals": (1.0, math.inf),
}
_REFINED = 8 / 255  # root mean square distance between a float match and its refined PNG, at most; seldom above 1/255


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that does not hold.

    Attributes:
        file: file inside the run directory.
        pair_id: row, or None when it is about a file.
        column: column, setting or check.
        stated: what the file says.
        recomputed: what was found.
        message: the same in words.
    """

    file: str
    pair_id: str | None
    column: str
    stated: Any
    recomputed: Any
    message: str


@dataclass
class Findings:
    """Collects problems, the rows they are about, and the worst errors, while the directory is gone through."""

    problems: list[Problem] = field(default_factory=list)
    bad_rows: set[str] = field(default_factory=set)
    worst: dict[str, float] = field(default_factory=dict)

    def add(self, file: str, pair_id: str | None, column: str, stated: Any, recomputed: Any, why: str = "") -> None:
        """Note one problem of a value; `why` is added to what is stated and what was recomputed."""
        what = (f"row {pair_id!r}, " if pair_id else "") + column
        message = f"{what} states {_show(stated)}, recomputed {_show(recomputed)}" + (f" ({why})" if why else "")
        self.say(file, pair_id, column, stated, recomputed, message)

    def say(self, file: str, pair_id: str | None, column: str, stated: Any, recomputed: Any, message: str) -> None:
        """Note one problem in words of its own."""
        message = f"{file}: {message}"
        self.problems.append(Problem(file, pair_id, column, stated, recomputed, message))
        if pair_id is not None:
            self.bad_rows.add(pair_id)

    def note_worst(self, row: Row) -> None:
        """Keep the largest recomputed errors."""
        for key in ("embedding_error", "embedding_error_8bit"):
            if row[key] is not None:
                self.worst[key] = max(row[key], self.worst.get(key, 0.0))


def check_stated(
    file: str, row: Row, settings: Row, pair: Row | None, found: Findings, name: str | None = None
) -> None:
    """Check the columns that must equal what `run.json` states of the run and of a pair or image."""
    what = "pair" if name is None else "image"
    name = name or row["pair_id"]
    if pair is None:
        found.say(file, name, f"{what}_id", name, None, f"row {name!r}: run.json does not list this {what}")
    version = row["schema_version"]
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        found.add(file, name, "schema_version", version, SCHEMA_VERSION, "a newer hf_equiv wrote this row")
    for key, expected in {**settings, **(pair or {})}.items():
        if key in row and row[key] != expected and key != "schema_version":
            found.add(file, name, key, row[key], expected, "run.json states another")
    for key in ("num_evals", "seconds"):
        if row["status"] != Status.ERROR and not (row[key] is not None and 0 <= row[key] < math.inf):
            found.add(file, name, key, row[key] and _plain(row[key]), None, "must be 0 or more")


def tolerances(noise_floor: float | None) -> dict[str, float]:
    """How far each number of a match row may be from what its images give, by the noise floor as recomputed."""
    near = max(3 * (noise_floor or 0.0), 1e-6)
    return {
        **dict.fromkeys((*_RELATIVE, *_COSINES), near),
        **_PIXELS,
        **dict.fromkeys(_PROBS, max(100 * near, 1e-4)),
    }


def same_floor(stated: float, made: float) -> bool:
    """Whether two noise floors, which are estimates, are within a factor of ten."""
    return 0.1 * made <= stated <= 10 * made


def check_row(
    file: str, row: Row, image: Tensor | None, cost: Row | None, encoder: Encoder, settings: Row, found: Findings
) -> None:
    """Recompute one row from its images, its float match and what that cost, and note what does not agree."""
    name = row["pair_id"]
    if row["status"] == Status.ERROR:
        check_empty(file, row, found)
        return
    dtype = torch.float64 if encoder.dtype == torch.float64 else torch.float32
    images: dict[str, Tensor] = {}
    for column in shards.IMAGE_COLUMNS:
        try:
            images[column] = decode_png(row[column] or b"", dtype)
        except ValueError as error:
            found.say(file, name, column, "a PNG image", None, f"row {name!r}, {column}: {error}")
            return
        if tuple(images[column].shape) != tuple(encoder.input_shape):
            found.add(file, name, column, list(images[column].shape), list(encoder.input_shape), "wrong size")
            return
    made = metrics.measure_match(
        encoder, images["source"], images["match"], images["target"],
        seed=settings["seed"], pair_id=name, labels=settings["labels"],
    )  # fmt: skip
    near = tolerances(made["noise_floor"])
    made["embedding_error"] = _float_error(file, name, image, images, encoder, settings, found)
    found.note_worst(made)
    floor, own = row["noise_floor"], made["noise_floor"]
    if floor is not None and own is not None and not same_floor(floor, own):
        found.add(file, name, "noise_floor", floor, own, "within a factor of ten")
    for key, limit in near.items():
        if image is not None or key != "embedding_error":
            _compare(file, row, key, made[key], limit, found)
    for key in LABELS:
        if row[key] != made[key]:
            found.add(file, name, key, row[key], made[key])
    _check_ball(file, name, "match", images["match"], images["source"], settings, found)
    if image is not None and (cost is None or cost.get("match") != row["num_evals"]):
        found.add(file, name, "num_evals", row["num_evals"], (cost or {}).get("match"), "the float file states another")
    check_limits(file, row, settings, found)


def check_empty(file: str, row: Row, found: Findings) -> None:
    """A row of status `error` must hold nothing."""
    for key in ("match", "embedding_error", *metrics.MEASURES, "num_evals", "seconds"):
        if row[key] is not None:
            stated = "an image" if key == "match" else row[key]
            found.add(file, row["pair_id"], key, stated, None, "a row of status error holds no match and no numbers")


def check_limits(file: str, row: Row, settings: Row, found: Findings) -> None:
    """Check what a row must be whatever its images: numbers in their ranges, and a status that fits them."""
    name = row["pair_id"]
    if row["status"] not in _STATUSES:
        found.add(file, name, "status", row["status"], None, f"must be one of {', '.join(_STATUSES)}")
    for key, (least, most) in _RANGES.items():
        if row[key] is not None and not least - 1e-12 <= row[key] <= most + 1e-12:
            found.add(file, name, key, _plain(row[key]), None, f"must be from {least:g} to {most:g}")
    spent, most = row["num_evals"], settings["max_evals"]
    if spent is not None and (spent > most or (row["status"] == Status.MAX_EVALS and spent <= most - 1)):
        found.add(file, name, "num_evals", spent, most, f"max_evals, with status {row['status']}")
    reached, rtol = row["embedding_error"], settings["rtol"]
    if reached is not None and (row["status"] == Status.CONVERGED) != (reached <= rtol):
        found.add(file, name, "status", row["status"], reached, f"an embedding error; rtol is {rtol:g}")


def _float_error(
    file: str, name: str, image: Tensor | None, images: Mapping[str, Tensor], encoder: Encoder, settings: Row,
    found: Findings,
) -> float | None:  # fmt: skip
    float_file = f"float/{Path(file).stem}.safetensors"
    if image is None:
        found.say(float_file, name, "match", "a float match", None, f"the float match of row {name!r} is missing")
        return None
    inside = bool(torch.isfinite(image).all()) and 0 <= float(image.min()) and float(image.max()) <= 1
    if not inside or image.shape != images["source"].shape:
        found.add(float_file, name, "match", "pixels in [0, 1]", None, f"shape {tuple(image.shape)} or range is wrong")
        return None
    _check_ball(float_file, name, "match", image, images["source"], settings, found)
    gap = images["match"].double() - image.double()
    if settings["refine"] and not float(gap.square().mean().sqrt()) <= _REFINED:
        far = float(gap.square().mean().sqrt())
        found.add(float_file, name, "match", f"an image within {_REFINED:.3f} of its PNG", far, "root mean square")
    if not settings["refine"] and settings["radius"] is None and not float(gap.abs().max()) <= 0.5 / 255 + 1e-6:
        found.add(float_file, name, "match", "the image whose rounding is the PNG", float(gap.abs().max()), "farthest")
    two = torch.stack([image.to(images["target"].dtype), images["target"]]).to(encoder.device)
    with torch.no_grad(), no_tf32():
        z, z_target = encoder(two)
    return metrics.relative_error(z, z_target)


def _check_ball(
    file: str, name: str, column: str, image: Tensor, source: Tensor, settings: Row, found: Findings
) -> None:
    radius, norm = settings["radius"], settings["norm"]
    if radius is None:
        return
    gap = image.double() - source.double()
    distance = float(gap.abs().max() if norm == "linf" else gap.norm())
    if distance > radius * (1 + 1e-6) + 1e-7:
        found.add(file, name, column, f"{norm} distance at most {radius:g}", distance, "outside the ball")


def _compare(file: str, row: Row, key: str, made: float | None, tolerance: float, found: Findings) -> None:
    stated = row[key]
    if stated is None or made is None:
        if stated is not made:
            found.add(file, row["pair_id"], key, stated, made)
    elif not abs(stated - made) <= tolerance:  # written so that NaN is a problem
        found.add(file, row["pair_id"], key, _plain(stated), made, f"tolerance {tolerance:.1e}")


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
