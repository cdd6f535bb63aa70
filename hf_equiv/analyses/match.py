"""Match pairs of images: turn each source into an image with the embedding of its target."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_equiv.analyses import measures
from hf_equiv.analyses.config import DTYPES, BaseConfig, Load
from hf_equiv.analyses.pairs import Item, Reader, image_generator, name_pairs
from hf_equiv.analyses.plan import Loaded, Made, Plan, RunRows, Tell
from hf_equiv.checks import NORMS, UNIT, check_choice, check_count, check_positive, check_radius, check_rtol
from hf_equiv.data.image_file import decode_png, encode_png, stored_image
from hf_equiv.data.image_set import ImageSet
from hf_equiv.data.resampling import View, levels_of, view_of
from hf_equiv.data.sources import DEFAULT_PAIRS
from hf_equiv.formatting import finite, fraction, one_line
from hf_equiv.full_size.match import match_in_full_size
from hf_equiv.full_size.metric import FileMetric
from hf_equiv.matching.lbfgs import LBFGS
from hf_equiv.matching.match import match_embedding
from hf_equiv.matching.refine import refine_8bit
from hf_equiv.matching.rounding import round_into_ball
from hf_equiv.matching.solvers import Adam, GradientDescent
from hf_equiv.matching.stages import HALF, Draft, match_in_stages
from hf_equiv.results import Progress, Status
from hf_equiv.runs.schema import MATCH, Row
from hf_equiv.through.match import match_through
from hf_equiv.through.transformations import read_transformations

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

SOLVERS: dict[str, Any] = {"lbfgs": LBFGS, "adam": Adam, "gd": GradientDescent}

SUCCEEDED, BATCH = (Status.CONVERGED,), "items"
SHOWN = 64  # pairs whose images make the baseline of unrelated images
MATCH_EVALS = 2000  # most evaluations of a match that a walk or the direction `match` needs
_GOAL, _GOAL_THROUGH = 1e-5, 0.05  # `rtol` by default, and where the match is to survive transformations
_EXACT = 1e-12  # tolerance of errors in float64, where `rtol` may be 1e-10
_REFINED = 8 / 255  # root mean square distance between a float match and its refined PNG; seldom above 1/255

_FULL_BYTES = 10_000_000  # about those of a PNG file of 6 megapixels

_THRESHOLDS = (1e-2, 1e-3, 1e-4, 1e-5)  # the summary states the share of matches with smaller embedding errors
_MEDIANS = (
    "embedding_error", "embedding_error_8bit", "target_quantization_error", "noise_floor", "cosine_to_target",
    "cosine_to_source", "cosine_source_target", "psnr_db", "ssim", "linf", "l2", "num_evals", "seconds",
    "match_prob", "target_label_prob",
)  # fmt: skip


@dataclass(frozen=True)
class MatchConfig(BaseConfig):
    """Options of `match`; `dtype` may also be `bfloat16` (`bf16`) or `float16`, for the early iterations only.

    Attributes:
        pairs: number of pairs to draw from `data`.
        solver: `lbfgs`, `adam` or `gd`.
        radius: radius of the ball about the source: half-width (linf) or L2 length.
        norm: norm of the ball, `linf` or `l2`; None for `linf`, and without a ball.
        rtol: embedding error ‖f(x)−z‖/‖z‖ at which a match is finished; None for 1e-5, and with `through` for 0.05,
            because a nearer match survives less.
        max_evals: evaluations allowed per image.
        refine: refine the match on the 8-bit lattice; otherwise it is rounded.
        labels: class names for zero-shot classification.
        through: transformations that the match should survive, such as `jpeg:60-95` and `resize:0.5`.
        compile: match with `torch.compile`; the plain encoder still computes every number.
        full_size: also write each match as a file of the size of its source photo.
    """

    analysis: ClassVar[str] = "match"

    pairs: int | None = None
    solver: str = "lbfgs"
    radius: float | None = None
    norm: str | None = None
    rtol: float | None = None
    max_evals: int = 1000
    refine: bool = True
    labels: tuple[str, ...] | None = None
    through: tuple[str, ...] | None = None
    compile: bool = False
    full_size: bool = False

    @property
    def goal(self) -> float:
        """`rtol`, or its default."""
        return self.rtol or (_GOAL if self.through is None else _GOAL_THROUGH)

    @property
    def ball_norm(self) -> str:
        """`norm`, or `linf` if none was stated."""
        return self.norm or "linf"

    def check(self) -> None:
        """Refuse options that no run can have, before a checkpoint is loaded."""
        check_choice(self.solver, "solver", SOLVERS)
        check_choice(self.ball_norm, "norm", NORMS)
        check_choice(self.half or self.dtype, "dtype", (*DTYPES, *HALF))
        check_rtol(self.goal if self.rtol is None else self.rtol)
        check_count(self.max_evals, "max_evals")
        super().check()
        if self.norm is not None and self.radius is None:
            raise ValueError(f"`norm` must come with `radius`; got {self.norm!r} alone. Add a radius or leave it out.")
        if self.ball_norm == "linf":
            check_radius(self.radius, self.ball_norm, 1)
        elif self.radius is not None:  # its limit depends on the image size of the checkpoint
            check_positive(self.radius, "radius")
        if self.full_size and not self.refine:
            raise ValueError("`full_size` must come with the 8-bit refinement; got `no_refine`. Leave one of them out.")
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"`labels` must be at least two different names; got {', '.join(self.labels)!r}.")
        if self.through is not None:
            read_transformations(self.through)
        if self.data is not None and (self.source is not None or self.target is not None):
            raise ValueError("`data` must not be combined with `source` and `target`. Give one or the other.")
        if (self.source is None) != (self.target is None):
            given, other = ("source", "target") if self.target is None else ("target", "source")
            raise ValueError(
                f"`{given}` must come with `{other}`; got `{given}` alone. Give both, or --data W --pairs N."
            )
        if self.pairs is not None and self.data is None:
            raise ValueError("`pairs` must come with `data`: pairs are drawn from a set. Add --data W.")
        if self.streaming and self.data is None:
            raise ValueError("`streaming` must come with `data`, a Hub dataset of which to fetch the first images.")
        if self.pairs is not None:
            check_count(self.pairs, "pairs")

    def drafts(self, encoder: Encoder) -> tuple[Draft, ...]:
        """Return the cheaper forms of the encoder: half precision first, then compiled."""
        drafts = []
        if self.half is not None:
            dtype, rtol = HALF[self.half]
            drafts.append(Draft(encoder.in_dtype(dtype), rtol, 0.2))
        if self.compile:
            name = os.environ.get("CXX") or "g++"
            if shutil.which(name) is None:
                raise ValueError(
                    f"`compile` must have a C++ compiler; {name!r} was not found. Install one, name it in the "
                    "environment variable CXX, or leave `compile` out."
                )
            drafts.append(Draft(torch.compile(encoder.__call__), 0.0, 1.0))
        return tuple(drafts)

    def open_images(self, load: Load) -> tuple[ImageSet, ImageSet]:
        """Open the set to draw from, or sources and targets."""
        if self.data is not None:
            most = max(100, 4 * (self.pairs or DEFAULT_PAIRS))
            images = load(self.data, most=most, streaming=self.streaming)
            return images, images
        if self.source is not None and self.target is not None:
            return load(self.source), load(self.target)
        photos = load("builtin")
        return photos.select([0]), photos.select([1])  # cat -> coffee

    def list_items(self, reader: Reader, images: ImageSet, targets: ImageSet | None) -> tuple[Item, ...]:
        """Read each image once and list the pairs."""
        drawn = self.data is not None
        return name_pairs(reader, images, targets or images, drawn=drawn, n=self.pairs, seed=self.seed)

    def settings_of_items(self, items: Sequence[Item]) -> Row:
        """Return the settings that state the number of pairs."""
        return {"drawn": self.data is not None, "num_pairs": len(items)}

    def settings(self, encoder: Encoder) -> Row:
        """Return the other settings of this verb, with defaults filled in; refuse those that do not fit the encoder."""
        from hf_equiv.models.zero_shot import PROMPT  # brings transformers along

        if self.full_size and hasattr(encoder, "parts"):
            raise ValueError(
                "`full_size` must come with one model; got several, whose image processors would see the file "
                "differently. Leave it out."
            )
        check_radius(self.radius, self.ball_norm, math.prod(encoder.input_shape))
        if self.labels is not None:  # refuse a model without text tower at once
            grey = torch.full((1, *encoder.input_shape), 128 / 255, device=encoder.device, dtype=encoder.dtype)
            with torch.no_grad():
                encoder.classify(grey, self.labels)
        if self.full_size and hasattr(encoder, "preprocess"):  # refuse a processor that cannot be followed at once
            view_of(encoder, *(2 * side for side in encoder.input_shape[:0:-1]))
        start = ([f"{self.half} start"] if self.half else []) + (["compiled"] if self.compile else [])
        return {
            "solver": ", ".join([self.solver, *start]),
            "solver_parameters": json.dumps(asdict(SOLVERS[self.solver]()), sort_keys=True, default=str),
            "radius": self.radius,
            "norm": self.ball_norm,
            "rtol": self.goal,
            "max_evals": self.max_evals,
            "refine": self.refine,
            "labels": list(self.labels) if self.labels else None,
            **({"prompt": PROMPT} if self.labels else {}),
            **({"through": list(self.through)} if self.through else {}),
            **({"full_size": True} if self.full_size else {}),
        }

    def item_bytes(self, encoder: Encoder, settings: Row) -> int:
        """Return the bytes of three images and a float image, and about those of a file of full size."""
        return math.prod(encoder.input_shape) * (3 + encoder.dtype.itemsize) + self.full_size * _FULL_BYTES


CONFIG = MatchConfig


def make_rows(plan: Plan, part: Sequence[Loaded], batch: int, tell: Tell) -> Iterator[tuple[Loaded, Made]]:
    """Match all pairs at once, and yield each that has ended with the row of its refined PNG."""
    config, encoder, views = plan.config, plan.encoder, dict[str, View]()
    joint: Any = encoder if hasattr(encoder, "parts") else None
    if joint is not None and len(part) > 1:  # the tolerance of a joint embedding depends on its target
        for one in part:
            yield from make_rows(plan, [one], batch, tell)
        return
    if config.full_size:
        for one in part:
            try:
                views[one.item.name] = view_of(encoder, *plan.photo(one.item).size)
            except ValueError as error:
                yield one, Made([{"status": str(Status.ERROR)}], {}, error=one_line(error))
        part = [one for one in part if one.item.name in views]
        if not part:
            return
    source = torch.stack([one.image for one in part])
    target = torch.stack([one.target for one in part if one.target is not None])

    def hook(stage: str, **more: Any) -> Callable[[Progress], None]:
        return lambda p: tell(stage, errors=p.errors, num_evals=p.num_evals, active=p.active, **more)

    z = measures.embed(measures.of_files(encoder), target)
    rtol = config.goal if joint is None else joint.joint_rtol(z[0], config.goal)
    goal: dict[str, Any] = {"radius": config.radius, "norm": config.ball_norm, "rtol": rtol}
    metric = FileMetric(encoder) if config.full_size and config.radius is None else None
    f, drafts, start = (encoder, plan.drafts, source) if metric is None else (
        metric.of(encoder), [replace(one, f=metric.of(one.f)) for one in plan.drafts], metric.invert(source)
    )  # fmt: skip
    survivor, drawn = None, [image_generator(config.seed, f"{one.item.name}:through") for one in part]
    if config.through is not None:
        survivor = match_through(
            encoder, source, z, read_transformations(config.through), drawn, radius=config.radius,
            norm=config.ball_norm, max_evals=config.max_evals, progress=hook("through"),
        )  # fmt: skip
        survivor = survivor if metric is None else replace(survivor, images=metric.invert(survivor.images))
    searches = match_in_stages(
        f, drafts, start, z, SOLVERS[config.solver](), max_evals=config.max_evals, progress=hook("match"),
        bounds=UNIT if metric is None else None, start=survivor, **goal,
    )  # fmt: skip
    # A GPU refines together what ends together. A CPU gains nothing by it, and keeps each pair that is finished.
    ends = (
        ({i: end} for together in searches for i, end in together.items()) if source.device.type == "cpu" else searches
    )
    failed = False
    for together in ends:
        if metric is not None:
            for found in together.values():
                found.best = metric.place(found.best)
        ended = {i: found for i, found in together.items() if found.status is not Status.ERROR}
        failed = failed or len(ended) < len(together)
        exact = None
        if config.refine and ended:
            alone = hook("refine", pair_ids=tuple(part[i].item.name for i in ended))
            best, these = torch.stack([found.best for found in ended.values()]), list(ended)
            exact = refine_8bit(encoder, best, z[these], source=source[these], progress=alone, **goal)
        for k, (i, found) in enumerate(ended.items()):
            name, evals, seconds = part[i].item.name, {"match": found.num_evals, "refine": 0.0}, found.seconds
            if exact is None:
                grid = round_into_ball(found.best, source[i], config.radius, config.ball_norm)
            else:
                grid, evals["refine"] = exact.images[k], float(exact.num_evals[k])
                seconds += float(exact.seconds[k])
            full: Row = {}
            if config.full_size:
                tell("full size", pair_ids=(name,))
                began, photo = time.perf_counter(), plan.photo(part[i].item)
                own = match_in_full_size(
                    encoder, photo, views[name], grid, z[i : i + 1], source[i],
                    partial(_inside, source[i], config.radius, config.ball_norm),
                    progress=hook("refine", pair_ids=(name,)), **goal,
                )  # fmt: skip
                grid, evals["refine"] = own.match, evals["refine"] + own.num_evals
                full = measure_full_size(own.image, photo) | {"full_exact": own.exact}
                seconds += time.perf_counter() - began
            png = encode_png(grid)
            three = source[i], decode_png(png, source.dtype), target[i]
            given = {"seed": config.seed, "labels": config.labels, "through": config.through}
            row = measures.measure_match(encoder, *three, pair_id=name, **given)
            reached, status = finite(found.error), found.status
            if joint is not None:
                reached = _note_models(encoder, row, found.best, z[i])
                status = Status.CONVERGED if reached is not None and reached <= config.goal else status
            row |= full | {
                "match": png,
                "status": str(status),
                "embedding_error": reached,
                "num_evals": evals["match"],  # the number that `max_evals` bounds
                "seconds": seconds,
            }
            yield part[i], Made([row], {name: found.best}, evals)
    if failed:  # after the others, which are kept
        raise RuntimeError(Status.ERROR.advice)


def _note_models(encoder: Any, row: Row, image: Tensor, z: Tensor) -> float | None:
    """State the embedding error of a float match for each model in a row, and return the worst."""
    errors = measures.errors_of(encoder, measures.embed(encoder, image[None])[0], z)
    if row.get("models"):
        row["models"] = [own | {"embedding_error": error} for own, error in zip(row["models"], errors, strict=True)]
    return measures.worst(errors)


def measure_full_size(image: Image.Image, photo: Image.Image) -> Row:
    """Return the columns of a file of full size, except `full_exact`."""
    a, b = (torch.from_numpy(np.array(one)).movedim(2, 0) / 255 for one in (image, photo))
    return {"match_full": encode_png(a), "psnr_full_db": measures.psnr_db(a, b), "ssim_full": measures.ssim(a, b)}


def _inside(source: Tensor, radius: float | None, norm: str, image: Tensor) -> bool:
    return radius is None or not outside_ball("match", image, source, radius, norm)


def summarize(encoder: Any, settings: Mapping[str, Any], made: RunRows) -> Row:
    """Sum up match rows, with the baseline of unrelated images and the median evaluations of refining."""
    baseline = made.baseline
    if encoder is not None:
        good = [row for row in made.shown if row["status"] != Status.ERROR]
        pairs = [[measures.open_png(encoder, row[column]) for column in ("source", "target")] for row in good]
        files = measures.of_files(encoder)
        z = torch.stack([measures.embed(files, torch.stack(pair)).cpu() for pair in pairs]) if pairs else None
        baseline = None if z is None else measures.random_pair_baseline(z[:, 0], z[:, 1])
    rows, flips = made.rows, [row for row in made.rows if row["same_top1"] is not None]
    changed = [row for row in flips if row["source_label"] != row["target_label"]]
    errors = {"float": "embedding_error", "8bit": "embedding_error_8bit"}
    refining = measures.median_of(cost["refine"] for cost in (made.costs or {}).values())
    summary: Row = {
        "pairs": len(rows),
        "counts": measures.counts_of(rows),
        "success": {kind: {f"{t:.0e}": _share(rows, key, t) for t in _THRESHOLDS} for kind, key in errors.items()},
        "median": measures.medians_of(rows, _MEDIANS) | {"num_evals_refine": refining},
        "worst": {key: measures.largest(row[key] for row in rows) for key in errors.values()},
        "same_top1": sum(bool(row["same_top1"]) for row in flips) / len(flips) if flips else None,
        "source_labelled_otherwise": len(changed) if flips else None,
        "label_flipped_to_target": sum(bool(row["same_top1"]) for row in changed) if flips else None,
        "baseline": baseline,
    }
    if names := settings.get("through"):
        summary["through"] = [measures.sum_up_through(rows, name) for name in names]
    if settings.get("full_size"):
        summary["full_size"] = measures.medians_of(rows, ("psnr_full_db", "ssim_full"))
        summary["full_size"] |= {"exact": sum(bool(row["full_exact"]) for row in rows)}
    return summary | {"verdict": measures.verdict("match", summary=summary, rows=rows, rtol=settings["rtol"])}


def _share(rows: Sequence[Row], key: str, threshold: float) -> float | None:
    return sum(row[key] is not None and row[key] <= threshold for row in rows) / len(rows) if rows else None


def draw_figures(settings: Row, summary: Row, made: RunRows) -> dict[str, bytes]:
    """Draw the first pairs."""
    from hf_equiv.analyses import figures

    png = figures.pairs_figure(made.shown, summary["verdict"], settings)
    return {} if png is None else {"pairs.png": png}


def match_target(encoder: Any, source: Tensor, target: Tensor, rtol: float, tell: Tell) -> tuple[Tensor, float, float]:
    """Match an image with the embedding of another, and return the match (3, H, W), its evaluations, its seconds."""
    z = measures.embed(encoder, target[None])

    def hook(progress: Progress) -> None:
        tell("match", min(int(progress.num_evals.max()), MATCH_EVALS - 1), MATCH_EVALS)

    found = match_embedding(
        encoder, source[None], z, rtol=rtol, max_evals=MATCH_EVALS, raise_on_failure=False, progress=hook
    )
    if not found.converged:
        raise RuntimeError(
            f"no match of the target: embedding error {float(found.errors[0]):.2g} after {MATCH_EVALS} evaluations; "
            f"{rtol:g} is wanted. Choose another image or target, or, for a walk, loosen `rtol`."
        )
    return found.images[0], float(found.num_evals[0]), float(found.seconds[0])


def outside_ball(column: str, image: Tensor, source: Tensor, radius: float, norm: str) -> list[tuple[str, str, str]]:
    """Describe the fault of an image (3, H, W) that is outside the ball about the source."""
    gap = image.double() - source.double()
    distance = float(gap.abs().max() if norm == "linf" else gap.norm())
    if distance <= radius * (1 + 1e-6) + 1e-7:
        return []
    return [(column, f"within {norm} distance {fraction(radius, 'g')}", f"it is outside the ball, at {distance:g}")]


def follow(settings: Row, rows: Sequence[Row]) -> list[Row]:
    """Return the status that fits the stated error and evaluations; None for every number of rows of status `error`."""
    made = []
    for row in rows:
        if row["status"] == Status.ERROR:
            numbers = ("embedding_error", *measures.MEASURES, "num_evals", "seconds")
            made.append(dict.fromkeys(("match", *numbers, *MATCH.added)))
            continue
        reached, status = row["embedding_error"], row["status"]
        missed = {Status.STALLED, Status.INFEASIBLE}
        missed |= {Status.MAX_EVALS} if (row["num_evals"] or 0.0) > settings["max_evals"] - 1 else set()
        noisy = reached is not None and reached + 4 * (row["noise_floor"] or 0.0) > settings["rtol"]
        if reached is not None and reached <= settings["rtol"] and not (noisy and status in missed):
            status = Status.CONVERGED
        elif status not in missed:
            status = Status.STALLED
        other = row["match_label"] != row["target_label"]
        made.append({"status": str(status)} | ({"same_top1": False} if other else {}))
    return made


def remake(encoder: Any, settings: Row, rows: Sequence[Row], floats: dict[str, Tensor]) -> list[Row]:
    """Recompute a match row from its three PNG images, the float match and its cost."""
    (row,) = rows
    image, source, match, target = floats.pop(row["pair_id"]), row["source"], row["match"], row["target"]
    given: Any = {key: settings.get(key) for key in ("seed", "labels", "through")}
    measured = measures.measure_match(encoder, source, match, target, pair_id=row["pair_id"], **given)
    made: Row = dict.fromkeys(MATCH.added) | measured
    (z_target,) = measures.embed(measures.of_files(encoder), target[None])
    reached = _note_models(encoder, made, image.to(target), z_target)
    faults = []
    if (radius := settings["radius"]) is not None:
        for picture in (match, image):
            faults += outside_ball("match", picture, source, radius, settings["norm"])
    far = float((match.double() - image.double()).square().mean().sqrt())
    if not settings["refine"]:
        rounded = round_into_ball(image, source, radius, settings["norm"])
        made["match"] = decode_png(encode_png(rounded), target.dtype).to(target.device)
    elif not far <= (most := _REFINED + 0.25 * (reached or 0.0)):  # refining goes on where the match was left
        faults.append(("match", f"an image within {most:.3f} of its float match", f"it is {far:.3f} off"))
    if settings.get("full_size"):
        if encoder.provenance["processor"] != settings["processor"]:
            raise ValueError(
                "`processor` must be that of the run for files of full size; the checkpoint at hand has another. Name "
                "the folder of the run's checkpoint with --model PATH."
            )
        seen = encoder.preprocess([stored_image(row["match_full"])])[0]
        made["full_exact"] = torch.equal(levels_of(seen), levels_of(match))
        for column in ("match_full", "psnr_full_db", "ssim_full"):  # the photo is not stored
            made.pop(column)
    cost = row["cost"] or {}
    if cost.keys() != {"match", "refine"} or bool(cost["refine"]) != settings["refine"]:
        told = f"the float file states {cost}"
        faults.append(("num_evals", "evaluations of the match and, if there was one, of its refinement", told))
    made |= {"embedding_error": reached, "faults": faults}
    return [made | {"num_evals": cost.get("match")}]


def tolerances(made: Row, settings: Row) -> Row:
    """Return the tolerances of recomputed match columns."""
    floor = made["noise_floor"] or 0.0
    near = max(3 * floor, _EXACT if settings["dtype"] == "float64" else 1e-6)  # so that rows of a GPU verify on a CPU
    errors = ("embedding_error", "embedding_error_8bit", "target_quantization_error")
    models = [
        dict.fromkeys(errors[:2], max(3 * (own["noise_floor"] or 0.0), 1e-6 if near >= 1e-6 else _EXACT))
        | {"noise_floor": ((own["noise_floor"] or 0.0) / 6, 6 * (own["noise_floor"] or 0.0))}
        for own in made.get("models") or ()
    ]
    return {
        **dict.fromkeys((*errors, "cosine_to_target", "cosine_to_source", "cosine_source_target"), near),
        **dict.fromkeys(("match_prob", "target_label_prob"), max(100 * near, 1e-4)),
        "through": dict.fromkeys(("error", "worst"), near),
        "models": models,
        "noise_floor": (floor / 6, 6 * floor),  # other kernels change it by up to 30 % (measured, D = 192)
        "psnr_db": 1e-8,
        "ssim": 1e-5,
        "linf": 1e-9,
        "l2": 1e-9,
        "match": 1.01 / 255 if settings["norm"] == "l2" else 1e-6,  # equal gains may be rounded in another order
    }
