"""Walk through images that share an embedding, with drift, distances, label and frame of every point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hf_equiv.analyses.config import ImageConfig
from hf_equiv.analyses.match import match_target
from hf_equiv.analyses.measures import (
    count_images,
    embed,
    largest,
    median_of,
    probabilities,
    relative_error,
    verdict,
)
from hf_equiv.analyses.pairs import image_generator
from hf_equiv.analyses.plan import Loaded, Made, Plan, RunRows, Tell
from hf_equiv.checks import check_choice, check_count, check_positive
from hf_equiv.data.image_file import decode_png, encode_png
from hf_equiv.formatting import finite
from hf_equiv.geometry.corrector import Corrector
from hf_equiv.geometry.headings import Ahead, Heading, Toward
from hf_equiv.geometry.levelset import HEADINGS, STOP, TO_AN_IMAGE, WalkPoint, at_rest, trace_level_set
from hf_equiv.passes import Work, alone
from hf_equiv.precision import no_tf32
from hf_equiv.results import Status
from hf_equiv.runs import shards
from hf_equiv.runs.schema import Row

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

SUCCEEDED, BATCH = (Status.COMPLETED,), "both"
SHOWN = 6  # walks drawn one by one
CHUNK = 16  # frames encoded at once
_LONGEST, _ALONG = 2.0, 0.3  # most length of a step over `step`, and least cosine with a random heading, in `verify`
FROM_A_MATCH = ("nearest", "connect")  # headings whose walks start from a match of the target


@dataclass(frozen=True)
class WalkConfig(ImageConfig):
    """Options of `walk`.

    Attributes:
        heading: `random`, `away`, `toward`, `nearest` or `connect`.
        step: longest step, L2 in pixel units.
        num_steps: points after the start.
        rtol: largest drift ‖f(x)−z‖/‖z‖.
        stop: ‖P_null d‖/‖d‖ at which a walk to an image is over; None for 0.01.
    """

    analysis: ClassVar[str] = "walk"
    wants_target: ClassVar[str] = "heading 'toward', 'nearest' or 'connect'"

    heading: str = "random"
    step: float = 1.0
    num_steps: int = 100
    rtol: float = 1e-5
    stop: float | None = None

    @property
    def needs_target(self) -> bool:
        """Whether the walk leads to an image, or starts from a match of one."""
        return self.heading in TO_AN_IMAGE

    def check(self) -> None:
        """Refuse options that no run can have, before a checkpoint is loaded."""
        check_choice(self.heading, "heading", HEADINGS)
        super().check()
        check_count(self.num_steps, "num_steps")
        check_positive(self.step, "step")
        check_positive(self.rtol, "rtol")
        if self.stop is not None:
            check_positive(self.stop, "stop", 1)
            if self.heading not in TO_AN_IMAGE:
                raise ValueError(
                    f"`stop` must come with heading {', '.join(map(repr, TO_AN_IMAGE))}; got {self.stop:g} with "
                    f"{self.heading!r}, which has no end. Leave it out."
                )
        if self.target is None and self.needs_target and (self.source or self.data):
            raise ValueError(f"`target` must come with heading {self.heading!r}. Add --target W, the image to go to.")

    def settings(self, encoder: Encoder) -> Row:
        """Return the settings of this verb, with defaults filled in."""
        return {
            "heading": self.heading,
            "step": self.step,
            "num_steps": self.num_steps,
            "rtol": self.rtol,
            **({"stop": self.stop or STOP} if self.heading in TO_AN_IMAGE else {}),
            "solver": "lbfgs" if self.heading in FROM_A_MATCH else None,
        }

    def item_bytes(self, encoder: Encoder, settings: Row) -> int:
        """Return the bytes of all frames, of the origin and of the target."""
        size, whole = math.prod(encoder.input_shape), math.prod(encoder.input_shape) * encoder.dtype.itemsize
        return (size + whole) * (self.num_steps + 1) + 2 * whole


CONFIG = WalkConfig


def make_rows(plan: Plan, part: Sequence[Loaded], batch: int, tell: Tell) -> Iterator[tuple[Loaded, Made]]:
    """Walk from each image (`nearest` and `connect`: from a match that starts at it); make a row for each point."""
    encoder, settings = plan.encoder, plan.settings
    from_match, steps, rtol = settings["solver"] is not None, settings["num_steps"], settings["rtol"]
    matched, fault = dict[str, tuple[Tensor, float, float]](), None
    for one in part:
        try:
            begin = one.image, 0.0, 0.0
            if from_match and one.target is not None:
                begin = match_target(encoder, one.image, one.target, rtol, tell)
            matched[one.item.name] = begin
        except RuntimeError as error:
            fault = error.with_traceback(None)
    part = [one for one in part if one.item.name in matched]
    if not part and fault is not None:
        raise fault
    images = torch.stack([one.image for one in part])
    targets = [one.target for one in part if one.target is not None]
    heading = settings["heading"]
    if heading == "random":
        heading = torch.stack([drawn(settings["seed"], one.item.name, one.image) for one in part])
    walk = trace_level_set(
        encoder, torch.stack([start for start, _, _ in matched.values()]), heading=heading, step=settings["step"],
        num_steps=steps, rtol=rtol, target=torch.stack(targets) if targets else None,
        stop=settings.get("stop", STOP), origin=images if from_match else None, batch=batch, keep_points=True,
        progress=lambda point: tell("walk", point.step, steps, pair_ids=(part[point.image].item.name,)),
    )  # fmt: skip
    for b, one in enumerate(part):
        name, path, status = one.item.name, walk.paths[b], walk.status[b]
        if not path or status is Status.ERROR:
            fault = fault or RuntimeError(Status.ERROR.advice)
            continue
        frames = torch.stack([point.pixels for point in path if point.pixels is not None])
        z = level(encoder, frames[0], one.target if from_match else None)
        _, evals, seconds = matched[name]
        whole: Row = {
            "status": str(status),
            "num_evals": evals + float(walk.num_evals[b]),
            "seconds": seconds + float(walk.seconds[b]),
        }
        labels = labels_of(encoder, frames)
        rows = [
            _measures(encoder, point, frame, z) | label | whole
            for point, frame, label in zip(path, frames, labels, strict=True)
        ]
        origin = one.image if from_match else frames[0].clone()  # a copy does not keep the other frames in memory
        floats = {"frames": frames, "origin": origin} | ({} if one.target is None else {"target": one.target})
        yield one, Made(rows, {f"{name}/{key}": value for key, value in floats.items()})
    if fault is not None:  # after the others, which are kept
        raise fault


def drawn(seed: int, name: str, image: Tensor) -> Tensor:
    """Return the random heading of an image, of its shape and type."""
    return torch.randn(image.shape, generator=image_generator(seed, name), dtype=torch.float64).to(image)


def _measures(encoder: Any, point: WalkPoint, frame: Tensor, z: Tensor) -> Row:
    """Return the frame as PNG with its numbers; the drift is computed from the frame alone, as in `verify`."""
    png = encode_png(frame)
    numbers = {
        key: finite(getattr(point, key)) for key in ("arc_length", "l2", "linf", "psnr_db", "remaining", "stationarity")
    }
    rounded = decode_png(png, frame.dtype).to(frame.device)
    drifts = {"drift": drift(encoder, frame, z), "drift_8bit": drift(encoder, rounded, z)}
    return {"frame": png, "step": point.step} | numbers | drifts


def level(encoder: Any, start: Tensor, target: Tensor | None) -> Tensor:
    """Return the embedding z (D,) of the level set: from the target for walks from a match, else from the start."""
    return embed(encoder, (start if target is None else target)[None])[0]


def drift(encoder: Any, frame: Tensor, z: Tensor) -> float | None:
    """Return ‖f(x) − z‖ / ‖z‖ of one frame (3, H, W)."""
    return relative_error(embed(encoder, frame[None])[0], z)


def labels_of(encoder: Any, frames: Tensor) -> list[Row]:
    """Return `label` and `prob` of each frame, both None without a head."""
    if not encoder.has_head:
        return [{"label": None, "prob": None} for _ in frames]
    with torch.no_grad(), no_tf32():
        probs = torch.cat([probabilities(encoder, encoder.classify(some)) for some in frames.split(CHUNK)])
    names = encoder.label_names
    return [{"label": names[int(p.argmax())], "prob": finite(p.max())} for p in probs]


def summarize(encoder: Any, settings: Mapping[str, Any], made: RunRows) -> Row:
    """Sum up the walks of a run."""
    summary, rows = count_images(made)
    if not rows:
        return summary
    paths: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        paths.setdefault(row["image_id"], []).append(row)
    walks = [
        {
            "image_id": name,
            "status": path[0]["status"],
            "steps": path[-1]["step"],
            "start_l2": path[0]["l2"],
            **{key: path[-1][key] for key in ("l2", "arc_length", "psnr_db", "remaining", "stationarity")},
            "largest_drift": largest(row["drift"] for row in path),
            "largest_drift_8bit": largest(row["drift_8bit"] for row in path),
            "labels": list(dict.fromkeys(row["label"] for row in path if row["label"] is not None)),
            "num_evals": path[0]["num_evals"],
        }
        for name, path in paths.items()
    ]
    told = verdict(
        "walk", settings=settings, walks=walks, l2=median_of(walk["l2"] for walk in walks),
        drift=largest(walk["largest_drift"] for walk in walks),
        drift_8bit=largest(walk["largest_drift_8bit"] for walk in walks),
        stop=settings.get("stop", STOP) if settings["heading"] in TO_AN_IMAGE else None,
    )  # fmt: skip
    return summary | {"walks": walks, "verdict": told}


def draw_figures(settings: Row, summary: Row, made: RunRows) -> dict[str, bytes]:
    """Draw the first walks, with the images that they lead to."""
    from hf_equiv.analyses import figures

    frames: dict[str, list[bytes]] = {}
    for row in made.shown:
        if row["step"] is not None:
            frames.setdefault(row["image_id"], []).append(row["frame"])
    ends, end = dict[str, Tensor](), "origin" if settings["heading"] == "nearest" else "target"
    if settings["heading"] in TO_AN_IMAGE and made.folder is not None:
        floats = shards.read_first_floats(made.folder, SHOWN, end)
        ends = {name: floats[f"{name}/{end}"] for name in frames if f"{name}/{end}" in floats}
    return figures.walk_figures(made.rows, frames, ends, settings)


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


def remake(encoder: Any, settings: Row, rows: Sequence[Row], floats: dict[str, Tensor]) -> list[Row]:
    """Recompute the rows of one walk from its float frames."""
    name, heading = rows[0]["image_id"], settings["heading"]
    frames, matched = floats.pop(f"{name}/frames"), settings["solver"] is not None
    origin = floats.pop(f"{name}/origin")
    target = None if rows[0]["target_id"] is None else floats.pop(f"{name}/target")
    z = level(encoder, frames[0], target if matched else None)
    floor = float(encoder.noise_floor(frames[[0, -1]]).max())
    aim = origin if heading == "nearest" else target
    made: list[Row] = []
    for step, (frame, label) in enumerate(zip(frames, labels_of(encoder, frames), strict=True)):
        picture = decode_png(encode_png(frame), frame.dtype).to(frame.device)
        gap, moved = frame.double() - origin.double(), frame.double() - frames[max(0, step - 1)].double()
        l2 = float(gap.norm())
        made.append({
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
    made[0]["faults"] = _path_faults(settings, name, frames, origin, aim, 1 - len(z) / origin.numel())
    if heading != "random":
        ahead = Ahead(torch.where(origin <= 0.5, 1.0, -1.0).to(origin), origin)
        way = ahead if aim is None else Toward(aim.to(frames), stop=math.inf)
        with no_tf32():
            share = alone(_share(way, Corrector(encoder, z.double(), settings["rtol"]), frames[-1]))
        made[-1]["stationarity"] = share
    if heading in TO_AN_IMAGE:
        early = made[-1]["step"] < settings["num_steps"] and rows[-1]["status"] == Status.COMPLETED
        made[-1]["most_left"] = at_rest(settings.get("stop", STOP)) if early else 1.0 + 1e-6
    return made


def _share(way: Heading, corrector: Corrector, frame: Tensor) -> Work[float | None]:
    """Return the share of the way from a frame that runs along the level set."""
    at = yield from corrector.look(frame)
    yield from corrector.refresh(at)
    return (yield from way.plan(corrector, at, 1.0)).stationarity


def _path_faults(
    settings: Row, name: str, frames: Tensor, origin: Tensor, aim: Tensor | None, null_share: float
) -> list[tuple[str, str, str]]:
    """Describe steps that are too long or do not follow the heading, and a walk that starts elsewhere."""
    # A point of `toward`, `nearest` and `connect` is nearer to its end than the one before, to the noise of f; one of
    # `away` is farther from the origin. A `random` step follows the pixels of the drawn v that the box lets move, less
    # the row space of J (measured: cosine above 0.9), while the cosine of another direction is about 1/√N.
    points, found = frames.double(), []
    random = settings["heading"] == "random"
    if settings["solver"] is None and not torch.equal(frames[0], origin):
        found.append(("origin", "the first frame", "it is another image"))
    v = drawn(settings["seed"], name, points[0]) if random else torch.where(origin <= 0.5, 1.0, -1.0).to(points)
    longest = _LONGEST * min(settings["step"], math.sqrt(origin.numel()))
    for step, (a, b) in enumerate(pairwise(points), 1):
        moved, middle = b - a, (a + b) / 2
        if random or (aim is None and step == 1):  # `away` begins towards the farther end of each pixel
            wish, least = v * (((a > 0) | (v > 0)) & ((a < 1) | (v < 0))), _ALONG * max(null_share, 0.0) ** 0.5
        else:
            wish, least = middle - origin if aim is None else aim - middle, -0.05
        length = float(moved.norm())
        cosine = float((moved * wish).sum()) / (length * float(wish.norm()) or 1.0)
        if not 0 < length <= longest:
            found.append(("step", f"a step of at most {longest:.3g}", f"step {step} has length {length:.3g}"))
        if not cosine > least:
            told = f"step {step} has the cosine {cosine:.2g} with it"
            found.append(("heading", f"a path that follows the heading {settings['heading']!r}", told))
    return found


def tolerances(made: Row, settings: Row) -> Row:
    """Return the tolerances of recomputed walk columns."""
    near = max(3 * made["noise_floor"], 1e-12 if settings["dtype"] == "float64" else 1e-6)
    far = made["drift"] or 0.0
    limits: Row = {
        "drift": (far - near, min(far, settings["rtol"]) + near),
        "drift_8bit": near,
        "arc_length": 1e-5 * (1 + made["arc_length"]),
        "l2": 1e-5,
        "linf": 1e-6,
        "psnr_db": 1e-3,
        "remaining": 1e-5,
        "prob": max(100 * near, 1e-4),
    }
    if settings["heading"] == "away":
        limits["stationarity"] = 0.1  # the walk itself knows J less well
    if "most_left" in made:  # an upper bound; a walk that completed early states a small one
        limits["stationarity"] = (0.95 * (made["stationarity"] or 0.0) - 1e-3, made["most_left"])
    return limits
