"""Measure local Lipschitz constants of directions at each image, each read from a ladder of secants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hf_equiv.analyses.config import ImageConfig, Load
from hf_equiv.analyses.match import match_target, outside_ball
from hf_equiv.analyses.measures import count_images, largest, median_of, quartiles_of, verdict
from hf_equiv.analyses.pairs import image_generator
from hf_equiv.analyses.plan import Loaded, Made, Plan, RunRows, Tell
from hf_equiv.analyses.walk import drift, level
from hf_equiv.checks import check_positive, check_radii, check_radius
from hf_equiv.data.image_set import ImageSet
from hf_equiv.data.sources import BUILTIN_PHOTOS
from hf_equiv.formatting import finite
from hf_equiv.geometry.directions import Directions, make_directions
from hf_equiv.geometry.linearity import LinearityResult, linearity_radius
from hf_equiv.geometry.lipschitz import LipschitzResult, directional_lipschitz
from hf_equiv.geometry.regional import RegionalResult, regional_lipschitz
from hf_equiv.geometry.secants import JVP_RTOL, RADII, RTOL, least_error, plateau_of
from hf_equiv.jacobian import Jacobian
from hf_equiv.results import Status
from hf_equiv.runs.schema import Row

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

SUCCEEDED = (Status.RESOLVED, Status.UNDETERMINED)  # null directions are rightly undetermined
BATCH, SHOWN = "derivatives", 0

DIRECTIONS = "random:64,top:8,row:8,null:64,gradient,toward"
COUNTED = ("random", "top", "row", "null")
SINGLE = ("gradient", "toward", "match")  # kinds with a single direction
_REGION = ("regional_lower_bound", "regional_at_center", "regional_clever")
_BATCH = 32  # images and tangents per pass


@dataclass(frozen=True)
class LipschitzConfig(ImageConfig):
    """Options of `lipschitz`.

    Attributes:
        directions: kinds with counts, `random:64,top:8,gradient`; None for all, fewer where D is small.
        radii: the ladder, ascending, L2 in pixel units.
        regional: radius of the ball to search for the largest constant; None for no search.
        norm: norm of that ball, `l2` or `linf`; None for `l2`, and without a ball.
        linearity: measure the distance to which the first-order model holds along every direction.
        rtol: embedding error of the match that the direction `match` leads to.
    """

    analysis: ClassVar[str] = "lipschitz"
    wants_target: ClassVar[str] = "direction 'toward' or 'match'"

    directions: str | None = None
    radii: tuple[float, ...] | None = None
    regional: float | None = None
    norm: str | None = None
    linearity: bool = False
    rtol: float = 1e-5

    @property
    def ball_norm(self) -> str:
        """`norm`, or `l2` if none was stated."""
        return self.norm or "l2"

    @property
    def needs_target(self) -> bool:
        """Whether a direction leads to another image."""
        kinds = parse_directions(self.directions or DIRECTIONS)
        return "toward" in kinds or "match" in kinds

    def check(self) -> None:
        """Refuse options that no run can have, before a checkpoint is loaded."""
        parse_directions(self.directions or DIRECTIONS)
        super().check()
        check_positive(self.rtol, "rtol")
        if self.regional is not None:
            check_positive(self.regional, "regional")
        elif self.norm is not None:
            raise ValueError(
                f"`norm` must come with `regional`; got {self.norm!r} alone. Add a radius or leave it out."
            )
        if self.radii is not None:
            check_radii(torch.tensor(self.radii, dtype=torch.float64))

    def usual_targets(self, images: ImageSet, load: Load) -> tuple[ImageSet, ImageSet]:
        """Return the next image of the set as the target of each; for a single image, a built-in photo."""
        if len(images) > 1:
            return images, images
        other = list(BUILTIN_PHOTOS).index("cat" if images.ids[0] == "coffee" else "coffee")
        return images, load("builtin").select([other])

    def settings(self, encoder: Encoder) -> Row:
        """Return the settings of this verb, with defaults filled in; refuse those that do not fit the encoder."""
        dim, kinds = encoder.embedding_dim, parse_directions(self.directions or DIRECTIONS)
        if self.directions is None:  # a small embedding has few directions, and two of them may be structural zeros
            kinds = {kind: min(n, max(1, dim - 2)) if kind in ("top", "row") else n for kind, n in kinds.items()}
        if kinds.get("top", 0) > dim:
            raise ValueError(
                f"top:K of `directions` must ask for at most {dim}, the embedding size; got {kinds['top']}."
            )
        check_radius(self.regional, self.ball_norm, math.prod(encoder.input_shape), "regional")
        return {
            "directions": kinds,
            "radii": list(self.radii or RADII),
            "regional": self.regional,
            "norm": None if self.regional is None else self.ball_norm,
            "linearity": self.linearity,
            **({"solver": "lbfgs", "rtol": self.rtol} if "match" in kinds else {}),
        }

    def item_bytes(self, encoder: Encoder, settings: Row) -> int:
        """Return the bytes of the image, which is in every row, and of the float images."""
        size = math.prod(encoder.input_shape)
        return size * (1 + encoder.dtype.itemsize) * sum(settings["directions"].values())


def parse_directions(text: str) -> dict[str, int]:
    """Read kinds with their counts, in the order given: `random:4,gradient` is `{"random": 4, "gradient": 1}`."""
    kinds: dict[str, int] = {}
    for item in text.split(","):
        name, colon, count = item.strip().partition(":")
        single = name in SINGLE
        if name not in COUNTED and not single:
            raise ValueError(
                "`directions` must be a list of random:N, top:N, row:N, null:N, gradient, toward, match; "
                f"got {item.strip()!r}."
            )
        if name in kinds or (single and colon) or (not single and not (count.isdecimal() and int(count) > 0)):
            raise ValueError(
                "`directions` must name each kind once, with a count as in random:64 (none for gradient, toward and "
                f"match); got {text!r}."
            )
        kinds[name] = int(count) if count else 1
    return kinds


CONFIG = LipschitzConfig


def make_rows(plan: Plan, part: Sequence[Loaded], batch: int, tell: Tell) -> Iterator[tuple[Loaded, Made]]:
    """Make the rows of one image, one for each direction."""
    (one,) = part
    settings, name, image, target = plan.settings, one.item.name, one.image, one.target
    # float images: the target, its match, and the place and direction of the largest constant in the ball
    floats: dict[str, Tensor] = {} if target is None else {"toward": target}
    match, evals, seconds = None, 0.0, 0.0
    if "match" in settings["directions"] and target is not None:
        match, evals, seconds = match_target(plan.encoder, image, target, settings["rtol"], tell)
        floats["match"] = match
    found, reach, ball = measure_image(plan.encoder, image, target, match, settings, name, batch, tell)
    if ball is not None:
        floats |= {"place": ball.images[0], "direction": ball.directions[0]}
    for result in (found, reach, ball):
        if result is not None:
            evals, seconds = evals + float(result.num_evals[0]), seconds + float(result.seconds[0])
    rows = [row | {"num_evals": evals, "seconds": seconds} for row in rows_of(found, reach, ball)]
    yield one, Made(rows, {f"{name}/{key}": value for key, value in floats.items()})


def directions_of_run(
    encoder: Any, image: Tensor, target: Tensor | None, settings: Mapping[str, Any], image_id: str, batch: int = 32,
    match: Tensor | None = None,
) -> Directions:  # fmt: skip
    """Make the directions at one image (3, H, W), in the order of its rows; settings, seed and image id fix them."""
    kinds: Mapping[str, int] = settings["directions"]
    counts: dict[str, Any] = {kind: kinds.get(kind, 0) for kind in COUNTED}
    toward = target[None] if target is not None and "toward" in kinds else None
    return make_directions(
        encoder, image[None], **counts, gradient="gradient" in kinds, toward=toward,
        match=None if match is None else match[None], generator=image_generator(settings["seed"], image_id),
        batch=batch,
    )  # fmt: skip


def measure_image(
    encoder: Any, image: Tensor, target: Tensor | None, match: Tensor | None, settings: Mapping[str, Any],
    image_id: str, batch: int, tell: Tell,
) -> tuple[LipschitzResult, LinearityResult | None, RegionalResult | None]:  # fmt: skip
    """Measure the directions of one image (3, H, W) and, if asked for, linearity radii and the ball about it."""
    tell("directions", 0, 1)
    given = encoder, image[None], directions_of_run(encoder, image, target, settings, image_id, batch, match)
    found = directional_lipschitz(*given, radii=settings["radii"], batch=batch, progress=partial(tell, "secants"))
    reach = ball = None
    if settings["linearity"]:
        reach = linearity_radius(*given, batch=batch, progress=partial(tell, "linearity"))
    if settings["regional"] is not None:
        tell("region", 0, 1)
        generator = image_generator(settings["seed"], image_id)
        ball = regional_lipschitz(
            encoder, image[None], settings["regional"], settings["norm"], generator=generator, progress=False
        )
    return found, reach, ball


def rows_of(found: LipschitzResult, reach: LinearityResult | None, ball: RegionalResult | None) -> list[Row]:
    """Return the columns that the results of one image give, a row for each direction."""
    constants = (None,) * 3 if ball is None else (ball.lower_bound[0], ball.at_center[0], ball.clever[0])
    region = dict(zip(_REGION, map(finite, constants), strict=True))
    rows = []
    for k, (kind, index) in enumerate(zip(found.kinds, found.indices, strict=True)):
        plateau = found.plateau[0, k]
        rows.append({
            "direction": kind,
            "index": index,
            "value": finite(found.values[0, k]),
            "jvp": finite(found.jvp[0, k]),
            "radii": found.radii.tolist(),
            "secants": [finite(s) for s in found.secants[0, k].tolist()],
            "noise_floor": [finite(floor) for floor in found.noise_floor[0, k].tolist()],
            "noise_method": found.noise_method,
            "plateau": plateau.tolist() if bool(torch.isfinite(plateau).all()) else None,
            "status": str(found.status[0][k]),
            "value_error": finite(found.errors[0, k]),
            "unit_factor": finite(found.unit_factor[0, k]),
            "linearity_radius": None if reach is None else finite(reach.radii[0, k]),
            "linearity_at_limit": None if reach is None else bool(reach.at_limit[0, k]),
        } | region)  # fmt: skip
    return rows


def summarize(encoder: Any, settings: Mapping[str, Any], made: RunRows) -> Row:
    """Sum up the directions of a run."""
    summary, rows = count_images(made)
    if not rows:
        return summary
    kinds: Row = {}
    for kind in dict.fromkeys(row["direction"] for row in rows):
        own = [row for row in rows if row["direction"] == kind]
        values = [row["value"] for row in own if row["value"] is not None]
        kinds[kind] = {
            "count": len(own),
            "resolved": len(values),
            "quantiles": quartiles_of(values),
            "largest_jvp": largest(row["jvp"] for row in own),
            "linearity_radius": median_of(row["linearity_radius"] for row in own),
        }
    firsts = {row["image_id"]: row for row in rows}.values()
    region = {key: largest(row[key] for row in firsts) for key in _REGION}
    told = verdict("lipschitz", kinds=kinds, regional=region, settings=settings)
    told = told or "No direction has a constant above the float noise."
    return summary | {"kinds": kinds, "regional": region, "verdict": told}


def draw_figures(settings: Row, summary: Row, made: RunRows) -> dict[str, bytes]:
    """Draw the secants of one image and the constants of all."""
    from hf_equiv.analyses import figures

    return figures.lipschitz_figures(made.rows, settings)


def follow(settings: Row, rows: Sequence[Row]) -> list[Row]:
    """Return the status that fits the stated value, and the plateau of the stated secants about it."""
    made = []
    for row in rows:
        ladder, value, plateau = _ladder(row), row["value"], None
        # without a true derivative there are secants, but no `jvp`
        broken = ladder is None or (row["jvp"] is None and row.get("status") == Status.ERROR)
        status = Status.ERROR if broken else Status.UNDETERMINED
        if value is not None and ladder is not None:
            secants, radii, floors = ladder
            about = torch.tensor([value], dtype=torch.float64)
            found = plateau_of(secants[None], radii, floors[None], about)[0]
            plateau = found.tolist() if bool(found.isfinite().all()) else None
        made.append({"status": str(status if value is None else Status.RESOLVED), "plateau": plateau})
    return made


def remake(encoder: Any, settings: Row, rows: Sequence[Row], floats: dict[str, Tensor]) -> list[Row]:
    """Recompute the rows of one image."""
    name, image, kinds = rows[0]["image_id"], rows[0]["image"], settings["directions"]
    if (most := max(kinds.values(), default=0)) > 2 * len(rows):  # a count of any size would take any memory
        raise ValueError(f"`directions` must ask for the {len(rows)} rows that are there; got {most} of one kind.")
    try:
        check_radii(torch.tensor(settings["radii"] or [], dtype=torch.float64))
    except (TypeError, OverflowError) as error:  # raised by text, nulls and whole numbers beyond float64
        raise ValueError(f"`radii` must be a ladder; {error}") from error
    toward = floats.pop(f"{name}/toward") if {"toward", "match"} & set(kinds) else None
    match, faults = None, []
    if "match" in kinds:
        match = floats.pop(f"{name}/match")
        reached = drift(encoder, match, level(encoder, match, toward))
        noise = max(3 * float(encoder.noise_floor(match[None])[0]), 1e-6)
        if reached is None or not reached <= settings["rtol"] + noise:
            told = f"the embedding error of the stored match is {reached}"
            faults.append(("match", f"an image of the target's embedding, to {settings['rtol']:g}", told))
    made = rows_of(*measure_image(encoder, image, toward, match, settings, name, _BATCH, lambda *_: None))
    common = {"image": image, "largest": max((row["jvp"] or 0.0 for row in made), default=0.0)}
    if settings["regional"] is not None:  # recompute the constant at the stored place
        place, v = floats.pop(f"{name}/place"), floats.pop(f"{name}/direction")
        faults += outside_ball(_REGION[0], place, image, settings["regional"], settings["norm"])
        if abs(float(v.double().norm()) - 1) > 1e-5:
            faults.append(("direction", "a vector of length 1", f"its length is {float(v.double().norm()):.6g}"))
        moved = Jacobian(encoder, place).mv((v / v.double().norm()).to(place)[None])[0]
        common |= {_REGION[0]: finite(moved.double().norm()), "found": made[0][_REGION[0]]}
    stated = {(row["direction"], row["index"]): row for row in rows}
    made = [_beside(stated.get((row["direction"], row["index"])), row | common) for row in made]
    made[0]["faults"] = faults
    return made


def _beside(row: Row | None, made: Row) -> Row:
    """Add `least_error`, the smallest error consistent with the stated noise floors and ‖Jv‖."""
    made["least_error"] = 0.0
    if row is None:
        return made
    clever = _REGION[2]
    if made[_REGION[1]] is not None and (row[clever] is None) != (made[clever] is None):
        made |= {clever: row[clever], "left_open": (f"{clever} (whether its fit exists depends on rounding)",)}
    ladder = _ladder(row)
    if ladder is not None and len(ladder[2]) and float(ladder[2].min()) > 0:
        made["least_error"] = 0.99 * float(least_error(ladder[2][None])[0])  # less the rounding of a sum
    if row["value"] is not None and row["jvp"] is not None:
        made["least_error"] = max(made["least_error"], 0.99 * abs(row["value"] - row["jvp"]))
    # If the new error is near the limit for `resolved`, use the stated decision.
    size = made["value"] or made["jvp"] or 0.0
    if 0.5 * RTOL * size <= (made["value_error"] or 0.0) <= 2 * RTOL * size:
        made["value"] = None if row["value"] is None else made["value"] or made["jvp"]
    return made


def _ladder(row: Row) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the stated secants, radii and noise floors; None unless there are as many of each."""
    columns = [row["secants"] or [], row["radii"] or [], row["noise_floor"] or []]
    if any(None in column for column in columns) or len({len(column) for column in columns}) > 1:
        return None
    secants, radii, floors = (torch.tensor(column, dtype=torch.float64) for column in columns)
    return secants, radii, floors


def tolerances(made: Row, settings: Row) -> Row:
    """Return the tolerances of recomputed lipschitz columns: they follow the noise floors, which vary fivefold."""
    coarse = settings["dtype"] in ("bfloat16", "float16")
    precise = settings["dtype"] == "float64"
    noise = (1e-12 if precise else 1e-6) * made["largest"]
    rounding = torch.finfo(torch.float64 if precise else torch.float32).eps * made["largest"]
    floors, secants = ([n or 0.0 for n in made[key]] for key in ("noise_floor", "secants"))
    jvp, value, error = (made[key] or 0.0 for key in ("jvp", "value", "value_error"))
    at_place = made["regional_lower_bound"] or 0.0  # the search again may end at another place, of a similar value
    beside_jvp = made["value"] == made["jvp"]  # the recomputed value narrowly missed `resolved`
    return {
        "jvp": 1e-3 * jvp + 30 * noise,
        "radii": [1e-12 * h for h in made["radii"]],
        "noise_floor": [(0.2 * floor, 5 * floor) for floor in floors],
        "secants": [4 * floor + 1e-3 * secant + noise for floor, secant in zip(floors, secants, strict=True)],
        "value": 2 * (JVP_RTOL if coarse else RTOL) * jvp if beside_jvp else 2 * error + 1e-4 * value,
        "value_error": (max(made["least_error"], 0.2 * error - rounding), 5 * error + rounding),
        "unit_factor": 1e-5 * (made["unit_factor"] or 0.0),
        "linearity_radius": 1e-2 * (made["linearity_radius"] or 0.0),
        "regional_lower_bound": (max(0.75 * (made.get("found") or 0.0), 0.9999 * at_place), 1.0001 * at_place),
        "regional_at_center": 1e-2 * (made["regional_at_center"] or 0.0),
        "regional_clever": 0.1 * (made["regional_clever"] or 0.0),  # rounding has more effect on a fit to maxima
    }
