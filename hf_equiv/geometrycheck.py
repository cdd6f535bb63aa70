"""Check the stored spectrum, lipschitz and walk rows of one image against what it gives (private to `verify`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_equiv import metrics
from hf_equiv.imagefile import decode_png
from hf_equiv.jacobian import Jacobian
from hf_equiv.layouts import row_name
from hf_equiv.lipschitzrows import measure_directions, rows_of
from hf_equiv.results import Status
from hf_equiv.rowcheck import Findings
from hf_equiv.secants import RTOL
from hf_equiv.shards import Row
from hf_equiv.spectrumrows import measure_spectrum, row_of
from hf_equiv.walkrows import drift, labels_of, level

if TYPE_CHECKING:
    from hf_equiv.encoder import Encoder

_BATCH = 32
_STATUSES = {
    "spectrum": (Status.COMPLETED,),
    "lipschitz": (Status.RESOLVED, Status.UNDETERMINED, Status.ERROR),
    "walk": (Status.COMPLETED, Status.DRIFT_EXCEEDED, Status.BOX_BLOCKED),
}


class ImageCheck:
    """Checks all rows of one image.

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

    def run(self, rows: Sequence[Row]) -> None:
        """Check the rows of one image; one that was not analysed must hold no numbers."""
        first = rows[0]
        lone = len(rows) == 1 and first["status"] == Status.ERROR
        if lone and not any(first.get(key) for key in ("singular_values", "secants", "drift")):
            return
        column = "frame" if self.analysis == "walk" else "image"
        for row in rows:
            if row["status"] not in _STATUSES[self.analysis]:
                told = f"must be one of {', '.join(_STATUSES[self.analysis])}"
                self.found.add(self.file, self._name(row), "status", row["status"], None, told)
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
            self._walk(rows, images)

    def _name(self, row: Row) -> str:
        return row_name(self.analysis, row)

    def say(self, row: Row, column: str, wanted: str, why: str) -> None:
        """Note a problem that is no number."""
        name = self._name(row)
        self.found.say(self.file, name, column, wanted, None, f"row {name!r}, {column}: {why}")

    def near(self, row: Row, column: str, made: float | None, tolerance: float, stated: Any = ...) -> None:
        """Note a number that is off by more than `tolerance`."""
        value = row[column] if stated is ... else stated
        if value is None or made is None:
            if value is not made:
                self.found.add(self.file, self._name(row), column, value, made)
        elif not abs(value - made) <= tolerance:  # written so that NaN is a problem
            self.found.add(self.file, self._name(row), column, value, made, f"tolerance {tolerance:.1e}")

    def same(self, row: Row, column: str, made: Any) -> None:
        """Note what is not the same."""
        if row[column] != made:
            self.found.add(self.file, self._name(row), column, row[column], made)

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
                self.found.add(self.file, self._name(row), column, value, own, told)
                return

    # --- spectrum ---

    def _spectrum(self, row: Row, image: Tensor) -> None:
        made = row_of(measure_spectrum(self.encoder, image, k=self.settings["k"], vectors=False, batch=_BATCH))
        top = made["sigma_max"] or 0.0
        bounds = [b or 0.0 for b in made["error_bound"]]
        noise = [2 * b + 1e-7 * top for b in bounds]
        self.ladder(row, "singular_values", made["singular_values"], noise)
        self.ladder(row, "error_bound", made["error_bound"], [2 * b + 1e-12 * top for b in bounds])
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
        self.near(row, "effective_rank", metrics.finite(torch.special.entr(share).sum().exp()), 1e-6 * len(sigma))
        ratio = metrics.finite(values.square().sum().square() / values.pow(4).sum())
        self.near(row, "participation", ratio, 1e-6 * len(sigma))

    # --- lipschitz ---

    def _lipschitz(self, rows: Sequence[Row], image: Tensor) -> None:
        name = rows[0]["image_id"]
        toward = self.floats.get(f"{name}/toward")
        if "toward" in self.settings["directions"] and toward is None:
            self.say(rows[0], "toward", "an image", "the image of the direction `toward` is missing from float/")
            return
        found, reach = measure_directions(
            self.encoder, image, None if toward is None else toward.to(image), self.settings, name, _BATCH,
            lambda *_: None,
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

    def _direction(self, row: Row, own: Row, top: float) -> None:
        noise = 1e-6 * top if self.dtype == torch.float32 else 1e-12 * top
        self.near(row, "jvp", own["jvp"], 1e-3 * (own["jvp"] or 0.0) + 30 * noise)
        floors = [f or 0.0 for f in own["noise_floor"]]
        secants = [s or 0.0 for s in own["secants"]]
        self.ladder(row, "radii", own["radii"], [1e-12 * r for r in own["radii"]])
        self.ladder(row, "noise_floor", own["noise_floor"], [4 * f for f in floors])
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
        self.near(row, "value_error", own["value_error"], 4 * error + noise)
        self.near(row, "unit_factor", own["unit_factor"], 1e-5 * (own["unit_factor"] or 0.0))
        reach = own["linearity_radius"]
        if (row["linearity_radius"] is None) != (reach is None):
            self.same(row, "linearity_radius", reach)
        elif reach is not None:
            self.near(row, "linearity_radius", reach, 1e-2 * reach)
        if row["plateau"] is not None and own["plateau"] is not None:
            for end in (0, 1):  # one rung of the ladder either way
                self.near(row, "plateau", own["plateau"][end], 0.8 * own["plateau"][end], row["plateau"][end])

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

    # --- walk ---

    def _walk(self, rows: Sequence[Row], pictures: Sequence[Tensor]) -> None:
        name, found = rows[0]["image_id"], self.found
        frames, origin = self.floats.get(f"{name}/frames"), self.floats.get(f"{name}/origin")
        target = self.floats.get(f"{name}/target")
        if frames is None or origin is None or (target is None) != (rows[0]["target_id"] is None):
            self.say(rows[0], "frames", "float frames", f"the float frames of {name!r} are missing")
            return
        if [row["step"] for row in rows] != list(range(len(frames))):
            self.say(rows[0], "step", f"steps 0 to {len(frames) - 1}", "steps are missing or out of order")
            return
        if not (bool(torch.isfinite(frames).all()) and 0 <= float(frames.min()) and float(frames.max()) <= 1):
            self.say(rows[0], "frames", "pixels in [0, 1]", "the float frames leave [0, 1]")
            return
        place, matched = self.encoder.device, self.settings["solver"] is not None
        z = level(self.encoder, frames[0].to(place), target.to(place) if matched and target is not None else None)
        noise = float(self.encoder.noise_floor(frames[[0, -1]].to(place)).max())
        tolerance = max(3 * noise, 1e-6 if self.dtype == torch.float32 else 1e-12)
        length = 0.0
        labels = labels_of(self.encoder, frames.to(place))
        for i, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
            frame, before = frames[i], frames[max(0, i - 1)]
            made = drift(self.encoder, frame.to(place), z)
            rounded = drift(self.encoder, picture.to(frame).to(place), z)
            self.near(row, "drift", made, tolerance)
            self.near(row, "drift_8bit", rounded, tolerance)
            for key, worst in (("embedding_error", made), ("embedding_error_8bit", rounded)):
                if worst is not None:
                    found.worst[key] = max(worst, found.worst.get(key, 0.0))
            if float((picture.double() - frame.double()).abs().max()) > 0.5 / 255 + 1e-6:
                self.say(row, "frame", "the rounded float frame", "the PNG is not the float frame, rounded")
            length += float((frame.double() - before.double()).norm())
            gap = frame.double() - origin.double()
            l2 = float(gap.norm())
            self.near(row, "arc_length", length, 1e-5 * (1 + length))
            self.near(row, "l2", l2, 1e-5)
            self.near(row, "linf", float(gap.abs().max()), 1e-6)
            self.near(row, "psnr_db", 10 * math.log10(gap.numel() / l2**2) if l2 > 0 else None, 1e-3)
            self._destination(row, frame, origin, target)
            self.same(row, "label", labels[i]["label"])
            self.near(row, "prob", labels[i]["prob"], max(100 * tolerance, 1e-4))
            self.same(row, "heading", self.settings["heading"])
            if made is not None and made > self.settings["rtol"] + tolerance:
                found.add(self.file, self._name(row), "drift", self.settings["rtol"], made, "above rtol")

    def _destination(self, row: Row, frame: Tensor, origin: Tensor, target: Tensor | None) -> None:
        aim = origin if self.settings["heading"] == "nearest" else target
        made = None if aim is None else float((aim.double() - frame.double()).norm())
        self.near(row, "remaining", made, 1e-5)
