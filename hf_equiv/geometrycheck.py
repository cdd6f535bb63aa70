"""Check the stored rows of one image of an analysis against what the image gives (private to `verify`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_equiv import checks, metrics
from hf_equiv.columncheck import Columns
from hf_equiv.imagefile import decode_png
from hf_equiv.jacobian import Jacobian
from hf_equiv.lipschitzrows import measure_directions, measure_region, rows_of
from hf_equiv.results import Status
from hf_equiv.secants import JVP_RTOL, RTOL, least_error, plateau_of
from hf_equiv.shards import Row
from hf_equiv.spectrumrows import measure_spectrum, row_of
from hf_equiv.walkcheck import check_walk
from hf_equiv.walkrows import drift, level

_BATCH = 32
_STATUSES = {
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
            if row["status"] not in _STATUSES[self.analysis]:
                told = f"must be one of {', '.join(_STATUSES[self.analysis])}"
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
        clever = metrics.finite(again.clever[0])
        self.near(rows[0], keys[1], metrics.finite(again.at_center[0]), 1e-2 * float(again.at_center[0]))
        self.near(rows[0], keys[2], clever, 0.1 * (clever or 0.0))  # a fit to maxima: rounding counts for more
