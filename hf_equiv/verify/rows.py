"""Check one stored row against what its images give (private helper of `hf_equiv.verify`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_equiv import checks, formatting
from hf_equiv.analyses import measures
from hf_equiv.analyses.lipschitz import measure_directions, measure_region, rows_of
from hf_equiv.analyses.spectrum import measure_spectrum, row_of
from hf_equiv.analyses.walk import drift, labels_of, level
from hf_equiv.data.image_file import decode_png
from hf_equiv.geometry.headings import Toward
from hf_equiv.geometry.levelset import STOP, TO_AN_IMAGE, at_rest
from hf_equiv.geometry.secants import JVP_RTOL, RTOL, least_error, plateau_of
from hf_equiv.jacobian import Jacobian
from hf_equiv.matching.corrector import Corrector
from hf_equiv.precision import no_tf32
from hf_equiv.results import SCHEMA_VERSION, Status
from hf_equiv.runs import schema
from hf_equiv.runs.schema import Row, row_name

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

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
    for column in schema.IMAGE_COLUMNS:
        try:
            images[column] = decode_png(row[column] or b"", dtype)
        except ValueError as error:
            found.say(file, name, column, "a PNG image", None, f"row {name!r}, {column}: {error}")
            return
        if tuple(images[column].shape) != tuple(encoder.input_shape):
            found.add(file, name, column, list(images[column].shape), list(encoder.input_shape), "wrong size")
            return
    made = measures.measure_match(
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
    for key in ("match", "embedding_error", *measures.MEASURES, "num_evals", "seconds"):
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
    return measures.relative_error(z, z_target)


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


# The rows of one image of an analysis, and how their columns are compared (private to `verify`).


class Columns:
    """Compares columns with what was recomputed, and notes what does not agree.

    Args:
        analysis: `spectrum`, `lipschitz` or `walk`.
        file: where the rows are.
        encoder: f.
        settings: of the run.
        floats: of the shard.
        found: collects what does not hold.
    """

    def __init__(
        self, analysis: str, file: str, encoder: Encoder, settings: Row, floats: Mapping[str, Tensor], found: Findings
    ) -> None:
        self.analysis, self.file, self.encoder, self.settings = analysis, file, encoder, settings
        self.floats, self.found = floats, found
        self.dtype = torch.float64 if encoder.dtype == torch.float64 else torch.float32

    def name(self, row: Row) -> str:
        """What a row is called in messages."""
        return row_name(self.analysis, row)

    def say(self, row: Row, column: str, wanted: str, why: str) -> None:
        """Note a problem that is no number."""
        name = self.name(row)
        self.found.say(self.file, name, column, wanted, None, f"row {name!r}, {column}: {why}")

    def near(self, row: Row, column: str, made: float | None, tolerance: float, stated: Any = ...) -> None:
        """Note a number that is off by more than `tolerance`."""
        value = row[column] if stated is ... else stated
        if value is None or made is None:
            if value is not made:
                self.found.add(self.file, self.name(row), column, value, made)
        elif not abs(value - made) <= tolerance:  # written so that NaN is a problem
            self.found.add(self.file, self.name(row), column, value, made, f"tolerance {tolerance:.1e}")

    def same(self, row: Row, column: str, made: Any) -> None:
        """Note what is not the same."""
        if row[column] != made:
            self.found.add(self.file, self.name(row), column, row[column], made)

    def ladder(self, row: Row, column: str, made: Sequence[float | None], tolerances: Sequence[float]) -> None:
        """Note the first number of a list that is off."""
        stated = row[column]
        if stated is None or len(stated) != len(made):
            self.same(row, column, list(made))
            return
        for i, (value, own, tolerance) in enumerate(zip(stated, made, tolerances, strict=True)):
            both = value is not None and own is not None
            if (both and not abs(value - own) <= tolerance) or (not both and value is not own):
                told = f"number {i + 1} of {len(made)}; tolerance {tolerance:.1e}"
                self.found.add(self.file, self.name(row), column, value, own, told)
                return


# Check the stored rows of one walk along a level set (private to `verify`).


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


# Check the stored rows of one image of an analysis against what the image gives (private to `verify`).


_BATCH = 32


_ANALYSIS_STATUSES = {
    "spectrum": (Status.COMPLETED,),
    "lipschitz": (Status.RESOLVED, Status.UNDETERMINED, Status.ERROR),
    "walk": (Status.COMPLETED, Status.DRIFT_EXCEEDED, Status.BOX_BLOCKED),
}


class ImageCheck(Columns):
    """Checks all rows of one image; arguments as `Columns`."""

    def run(self, rows: Sequence[Row]) -> None:
        """Check the rows of one image; one that was not analysed must hold no numbers."""
        first = rows[0]
        lone = len(rows) == 1 and first["status"] == Status.ERROR
        if lone and not any(first.get(key) for key in ("singular_values", "secants", "drift")):
            return
        column = "frame" if self.analysis == "walk" else "image"
        for row in rows:
            if row["status"] not in _ANALYSIS_STATUSES[self.analysis]:
                told = f"must be one of {', '.join(_ANALYSIS_STATUSES[self.analysis])}"
                self.found.add(self.file, self.name(row), "status", row["status"], None, told)
            if row[column] != first[column] and self.analysis != "walk":
                self.say(row, column, "one image in all rows of an id", "another image")
        try:
            images = [
                decode_png(row[column] or b"", self.dtype) for row in (rows if self.analysis == "walk" else [first])
            ]
        except ValueError as error:
            self.say(first, column, "a PNG image", str(error))
            return
        if any(tuple(image.shape) != tuple(self.encoder.input_shape) for image in images):
            self.say(first, column, f"shape {list(self.encoder.input_shape)}", "wrong size")
            return
        image = images[0].to(self.encoder.device)
        if self.analysis == "spectrum":
            self._spectrum(first, image)
        elif self.analysis == "lipschitz":
            self._lipschitz(rows, image)
        else:
            check_walk(self, rows, images)

    # --- spectrum ---

    def _spectrum(self, row: Row, image: Tensor) -> None:
        made = row_of(measure_spectrum(self.encoder, image, k=self.settings["k"], vectors=False, batch=_BATCH))
        top = made["sigma_max"] or 0.0
        bounds = [b or 0.0 for b in made["error_bound"]]
        noise = [2 * b + 1e-7 * top for b in bounds]
        self.ladder(row, "singular_values", made["singular_values"], noise)
        self.ladder(row, "error_bound", made["error_bound"], [2 * b + 1e-12 * top for b in bounds])
        stated = [b or 0.0 for b in row["error_bound"] or []]
        if len(stated) == len(bounds) and any(b < 0.2 * own for b, own in zip(stated, bounds, strict=True)):
            self.say(row, "error_bound", "bounds as large as the noise", "it is less than a fifth of what was found")
        self.same(row, "method", made["method"])
        self.same(row, "status", made["status"])
        self.near(row, "rank_threshold", made["rank_threshold"], 0.5 * (made["rank_threshold"] or 0.0))
        self.same(row, "patch_nullity", made["patch_nullity"])
        for key in ("structural_zeros", "near_structural"):
            stated = [(z["cause"], z["count"]) for z in row[key]]
            if stated != [(z["cause"], z["count"]) for z in made[key]]:
                self.same(row, key, made[key])
                continue
            for there, here in zip(row[key], made[key], strict=True):
                self.near(row, key, here["measured"], 2 * max(bounds) + 1e-7 * top, there["measured"])
                self.near(row, key, here["predicted"], 1e-2 * (here["predicted"] or 0.0) + 1e-12, there["predicted"])
        sigma = row["singular_values"]
        if sigma and all(s is not None for s in sigma):
            self._derived(row, sigma, made)
        right = self.floats.get(f"{row['image_id']}/right")
        if self.settings["vectors"] and right is None:
            self.say(row, "right", "singular vectors", "the singular vectors are missing from float/")
        elif right is not None and len(right) <= len(sigma):
            J = Jacobian(self.encoder, image, batch=_BATCH)
            lengths = J.mv(right.to(image)).double().norm(dim=1).tolist()
            self.ladder(row, "singular_values", lengths + sigma[len(lengths) :], [1e-3 * top] * len(sigma))

    def _derived(self, row: Row, sigma: list[float], made: Row) -> None:
        """What follows from the stated values alone."""
        self.near(row, "sigma_max", sigma[0], 0.0)
        if made["rank"] is None:
            for key in ("rank", "nullity", "effective_rank", "participation"):
                self.same(row, key, None)
            return
        if len(sigma) < min(self.encoder.embedding_dim, math.prod(self.encoder.input_shape)):  # of all the values
            self.same(row, "rank", made["rank"])
            self.same(row, "nullity", made["nullity"])
            self.near(row, "effective_rank", made["effective_rank"], 1e-3 * (made["effective_rank"] or 0.0))
            self.near(row, "participation", made["participation"], 1e-3 * (made["participation"] or 0.0))
            return
        self.same(row, "rank", sum(s > (row["rank_threshold"] or 0.0) for s in sigma))
        self.same(row, "nullity", math.prod(self.encoder.input_shape) - (row["rank"] or 0))
        values = torch.tensor(sigma, dtype=torch.float64)
        share = values / values.sum()
        self.near(row, "effective_rank", formatting.finite(torch.special.entr(share).sum().exp()), 1e-6 * len(sigma))
        ratio = formatting.finite(values.square().sum().square() / values.pow(4).sum())
        self.near(row, "participation", ratio, 1e-6 * len(sigma))

    # --- lipschitz ---

    def _lipschitz(self, rows: Sequence[Row], image: Tensor) -> None:
        name = rows[0]["image_id"]
        toward = self.floats.get(f"{name}/toward")
        if "toward" in self.settings["directions"] and toward is None:
            self.say(rows[0], "toward", "an image", "the image of the direction `toward` is missing from float/")
            return
        match = self.floats.get(f"{name}/match")
        if "match" in self.settings["directions"] and not self._matches(rows[0], match, toward, image):
            return
        try:
            checks.check_radii(torch.tensor(self.settings["radii"] or [], dtype=torch.float64))
        except (ValueError, TypeError, OverflowError) as error:  # of text, nulls and whole numbers beyond float64
            self.say(rows[0], "radii", "a ladder", str(error))
            return
        found, reach = measure_directions(
            self.encoder, image, None if toward is None else toward.to(image), self.settings, name, _BATCH,
            lambda *_: None, None if match is None else match.to(image),
        )  # fmt: skip
        made = {(row["direction"], row["index"]): row for row in rows_of(found, reach)}
        top = max((row["jvp"] or 0.0 for row in made.values()), default=0.0)
        for row in rows:
            own = made.pop((row["direction"], row["index"]), None)
            if own is None:
                self.say(row, "direction", "a direction of the settings", "the settings ask for no such direction")
            else:
                self._direction(row, own, top)
        for kind, index in made:
            what = f"{name} {kind} {index}"
            self.found.say(self.file, what, "direction", "a row", None, f"row {what!r} is missing")
        self._region(rows, image)

    def _matches(self, row: Row, match: Tensor | None, target: Tensor | None, like: Tensor) -> bool:
        """The stored match must have the embedding of the stored target."""
        if match is None or target is None or match.shape != like.shape or target.shape != like.shape:
            self.say(row, "match", "an image", "the images of the direction `match` are missing from float/")
            return False
        match, rtol = match.to(like), self.settings["rtol"]
        error = drift(self.encoder, match, level(self.encoder, target.to(like), None))
        noise = max(3 * float(self.encoder.noise_floor(match[None])[0]), 1e-6)
        if error is None or error > rtol + noise:
            told = f"the embedding error of the stored match is {error}"
            self.say(row, "match", f"an image of the target's embedding, to {rtol:g}", told)
        if not 0 <= float(match.min()) <= float(match.max()) <= 1:
            self.say(row, "match", "pixels in [0, 1]", "pixels of the stored match are outside")
        return True

    def _direction(self, row: Row, own: Row, top: float) -> None:
        noise = 1e-6 * top if self.dtype == torch.float32 else 1e-12 * top
        self.near(row, "jvp", own["jvp"], 1e-3 * (own["jvp"] or 0.0) + 30 * noise)
        floors = [f or 0.0 for f in own["noise_floor"]]
        secants = [s or 0.0 for s in own["secants"]]
        self.ladder(row, "radii", own["radii"], [1e-12 * r for r in own["radii"]])
        self.ladder(row, "noise_floor", own["noise_floor"], [4 * f for f in floors])
        stated = [f or 0.0 for f in row["noise_floor"] or []]
        if len(stated) == len(floors) and any(f < 0.2 * o for f, o in zip(stated, floors, strict=True)):
            self.say(row, "noise_floor", "floors as high as the noise", "it is less than a fifth of what was found")
        self.same(row, "noise_method", own["noise_method"])
        tolerances = [4 * f + 1e-3 * s + noise for f, s in zip(floors, secants, strict=True)]
        self.ladder(row, "secants", own["secants"], tolerances)
        error = own["value_error"] or 0.0
        level_ = own["value"] or own["jvp"] or 0.0
        borderline = 0.5 * RTOL * level_ <= error <= 2 * RTOL * level_
        if row["status"] != own["status"] and not borderline:
            self.same(row, "status", own["status"])
        if (row["value"] is None) != (row["status"] != Status.RESOLVED):
            self.say(row, "value", "a value where resolved, null elsewhere", f"it does not fit status {row['status']}")
        elif row["value"] is not None and own["value"] is not None:
            self.near(row, "value", own["value"], 2 * error + 1e-4 * own["value"])
        elif row["value"] is not None:  # borderline: resolved there, within this of the exact ‖Jv‖, and not here
            coarse = self.encoder.dtype in (torch.float16, torch.bfloat16)
            self.near(row, "value", own["jvp"], 2 * (JVP_RTOL if coarse else RTOL) * (own["jvp"] or 0.0))
        self.near(row, "value_error", own["value_error"], 4 * error + noise)
        self.near(row, "unit_factor", own["unit_factor"], 1e-5 * (own["unit_factor"] or 0.0))
        reach = own["linearity_radius"]
        if (row["linearity_radius"] is None) != (reach is None):
            self.same(row, "linearity_radius", reach)
        elif reach is not None:
            self.near(row, "linearity_radius", reach, 1e-2 * reach)
        self.same(row, "linearity_at_limit", own["linearity_at_limit"])
        self._reading(row)

    def _reading(self, row: Row) -> None:
        """What a value was read from must be in its row: a plateau of the secants, and an error not below the noise."""
        value, error = row["value"], row["value_error"]
        columns = [row["secants"] or [], row["radii"] or [], row["noise_floor"] or []]
        if None in [n for column in columns for n in column] or len({len(column) for column in columns}) > 1:
            return  # told above, or an error row
        secants, radii, floors = (torch.tensor(column, dtype=torch.float64) for column in columns)
        plateau = None
        if value is not None:
            low, high = plateau_of(secants[None], radii, floors[None], torch.tensor([value], dtype=torch.float64))[0]
            plateau = [float(low), float(high)]
        self.same(row, "plateau", plateau)
        if error is None or not len(floors) or not float(floors.min()) > 0:
            return
        least = 0.99 * float(least_error(floors[None])[0])  # rounding of a sum
        if value is not None and row["jvp"] is not None:
            least = max(least, 0.99 * abs(value - row["jvp"]))
        if not error >= least:
            self.say(
                row, "value_error", "an error not below noise and ‖Jv‖", f"{error:.3g} must be at least {least:.3g}"
            )

    def _region(self, rows: Sequence[Row], image: Tensor) -> None:
        """The largest constant must be that of the stored place and direction, inside the ball and the box."""
        radius, name = self.settings["regional"], rows[0]["image_id"]
        keys = ("regional_lower_bound", "regional_at_center", "regional_clever")
        for row in rows:
            for key in keys:
                self.same(row, key, None if radius is None else rows[0][key])
        if radius is None:
            return
        place, v = (self.floats.get(f"{name}/{what}") for what in ("place", "direction"))
        if place is None or v is None:
            self.say(rows[0], keys[0], "a stored place", "the place of the largest constant is missing from float/")
            return
        place, v = place.to(image), v.to(image)
        norm, gap = self.settings["norm"], place.double() - image.double()
        distance = float(gap.abs().max() if norm == "linf" else gap.norm())
        inside = 0 <= float(place.min()) and float(place.max()) <= 1
        if distance > radius * (1 + 1e-6) or not inside:
            self.say(rows[0], keys[0], f"a place within {radius:g} and the box", f"it was found at {norm} {distance:g}")
        made = float(Jacobian(self.encoder, place).mv((v / v.double().norm()).to(image)[None])[0].double().norm())
        self.near(rows[0], keys[0], made, 1e-4 * made)
        again = measure_region(self.encoder, image, self.settings, name)
        clever = formatting.finite(again.clever[0])
        self.near(rows[0], keys[1], formatting.finite(again.at_center[0]), 1e-2 * float(again.at_center[0]))
        self.near(rows[0], keys[2], clever, 0.1 * (clever or 0.0))  # a fit to maxima: rounding counts for more
