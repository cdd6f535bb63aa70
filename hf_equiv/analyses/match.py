"""Match pairs of images: turn each source into an image with the embedding of its target."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_equiv.analyses import measures
from hf_equiv.analyses.match_config import SOLVERS, MatchConfig
from hf_equiv.analyses.pairs import image_generator
from hf_equiv.analyses.plan import Loaded, Made, Plan, RunRows, Tell
from hf_equiv.analyses.stages import match_in_stages
from hf_equiv.checks import UNIT
from hf_equiv.data.image_file import decode_png, encode_png, stored_image, to_levels
from hf_equiv.data.resampling import View, levels_of, view_of
from hf_equiv.formatting import finite, fraction, one_line
from hf_equiv.full_size.match import FullSizeMatch, match_in_full_size
from hf_equiv.full_size.metric import FileMetric
from hf_equiv.matching.match import match_embedding
from hf_equiv.matching.refine import refine_8bit
from hf_equiv.matching.rounding import round_into_ball
from hf_equiv.matching.search import Search
from hf_equiv.results import MatchResult, Progress, Status
from hf_equiv.runs.schema import MATCH, Row
from hf_equiv.through.match import match_through
from hf_equiv.through.transformations import read_transformations

SUCCEEDED, BATCH = (Status.CONVERGED,), "items"
SHOWN = 64  # pairs whose images make the baseline of unrelated images
MATCH_EVALS = 2000  # most evaluations of a match that a walk or the direction `match` needs
_EXACT = 1e-12  # tolerance of errors in float64, where `rtol` may be 1e-10
_REFINED = 8 / 255  # root mean square distance between a float match and its refined PNG; seldom above 1/255

_THRESHOLDS = (1e-2, 1e-3, 1e-4, 1e-5)  # the summary states the share of matches with smaller embedding errors
_MEDIANS = (
    "embedding_error", "embedding_error_8bit", "target_quantization_error", "noise_floor", "cosine_to_target",
    "cosine_to_source", "cosine_source_target", "psnr_db", "ssim", "linf", "l2", "num_evals", "seconds",
    "match_prob", "target_label_prob",
)  # fmt: skip


CONFIG = MatchConfig


def make_rows(plan: Plan, part: Sequence[Loaded], batch: int, tell: Tell) -> Iterator[tuple[Loaded, Made]]:
    """Match all pairs at once, and yield each that has ended with the row of its refined PNG."""
    if hasattr(plan.encoder, "parts") and len(part) > 1:  # the tolerance of a joint embedding depends on its target
        for one in part:
            yield from make_rows(plan, [one], batch, tell)
        return
    views, usable, failed = dict[str, View](), list[Loaded](), False
    for one in part:
        try:
            if plan.config.full_size:
                views[one.item.name] = view_of(plan.encoder, *plan.photo(one.item).size)
        except ValueError as error:
            yield one, Made([{"status": str(Status.ERROR)}], {}, error=one_line(error))
        else:
            usable.append(one)
    if not usable:
        return
    making = _Making(plan, usable, views, tell)
    for together in making.search():
        ended = {i: found for i, found in together.items() if found.status is not Status.ERROR}
        failed = failed or len(ended) < len(together)
        for (i, found), exact in zip(ended.items(), making.refine(ended), strict=True):
            yield usable[i], making.finish(i, found, *exact)
    if failed:  # after the others, which are kept
        raise RuntimeError(Status.ERROR.advice)


class _Making:
    """Pairs that are matched together, from the search to their rows."""

    def __init__(self, plan: Plan, part: Sequence[Loaded], views: Mapping[str, View], tell: Tell) -> None:
        self.plan, self.config, self.encoder, self.part = plan, plan.config, plan.encoder, part
        self.views, self.tell = views, tell
        self.source = torch.stack([one.image for one in part])
        self.target: list[Any] = [one.item.columns.get("target_text") or one.target for one in part]
        if plan.config.wants_text:
            self.z = self.encoder.embed_texts(self.target)
        else:
            self.z = measures.embed(measures.of_files(self.encoder), torch.stack(self.target))
        joint: Any = self.encoder if hasattr(self.encoder, "parts") else None
        rtol = self.config.goal if joint is None else joint.joint_rtol(self.z[0], self.config.goal)
        self.joint, ball = joint is not None, {"radius": self.config.radius, "norm": self.config.ball_norm}
        self.goal: dict[str, Any] = ball | {"rtol": rtol}

    def search(self) -> Iterator[dict[int, Search]]:
        """Search for all matches, and yield those that end together by their positions."""
        config, encoder, drafts, start = self.config, self.encoder, self.plan.drafts, self.source
        metric = FileMetric(encoder) if config.full_size and config.radius is None else None
        survivor: MatchResult | None = None
        if config.through is not None:
            drawn = [image_generator(config.seed, f"{one.item.name}:through") for one in self.part]
            survivor = match_through(
                encoder, start, self.z, read_transformations(config.through), drawn, radius=config.radius,
                norm=config.ball_norm, max_evals=config.max_evals, progress=self._hook("through"),
            )  # fmt: skip
        if metric is not None:
            drafts = tuple(replace(one, f=metric.of(one.f)) for one in drafts)
            start = metric.invert(start)
            survivor = survivor and replace(survivor, images=metric.invert(survivor.images))
        ends = match_in_stages(
            encoder if metric is None else metric.of(encoder), drafts, start, self.z, SOLVERS[config.solver](),
            max_evals=config.max_evals, progress=self._hook("match"), bounds=UNIT if metric is None else None,
            start=survivor, **self.goal,
        )  # fmt: skip
        for together in ends:
            if metric is not None:
                for found in together.values():
                    found.best = metric.place(found.best)
            if start.device.type == "cpu":  # a CPU gains nothing by refining together, and keeps what is finished
                yield from ({i: found} for i, found in together.items())
            else:
                yield together

    def refine(self, ended: Mapping[int, Search]) -> list[tuple[Tensor, float, float]]:
        """Return an 8-bit image of each match, with the evaluations and seconds that it took."""
        if not ended:
            return []
        config, these = self.config, list(ended)
        best = torch.stack([found.best for found in ended.values()])
        if not config.refine:
            centers = self.source[these]
            pairs = zip(best, centers, strict=True)
            return [(round_into_ball(x, c, config.radius, config.ball_norm), 0.0, 0.0) for x, c in pairs]
        hook = self._hook("refine", pair_ids=tuple(self.part[i].item.name for i in these))
        exact = refine_8bit(self.encoder, best, self.z[these], source=self.source[these], progress=hook, **self.goal)
        return list(zip(exact.images, exact.num_evals.tolist(), exact.seconds.tolist(), strict=True))

    def finish(self, i: int, found: Search, grid: Tensor, num_evals: float, seconds: float) -> Made:
        """Return the row of an 8-bit match."""
        config, encoder, name, full, own = self.config, self.encoder, self.part[i].item.name, Row(), None
        if config.full_size:
            began = time.perf_counter()
            own, full = self._write_full_size(i, grid)
            grid, num_evals, seconds = own.match, num_evals + own.num_evals, seconds + time.perf_counter() - began
        png = encode_png(grid)
        three = self.source[i], decode_png(png, self.source.dtype), self.target[i]
        given = {"seed": config.seed, "labels": config.labels, "through": config.through, "file": own and own.image}
        given |= {"candidates": _candidates(self.plan.settings)}
        row = measures.measure_match(encoder, *three, pair_id=name, **given)
        reached, status = finite(found.error), found.status
        if self.joint:
            reached = _note_models(encoder, row, found.best, self.z[i])
            status = Status.CONVERGED if reached is not None and reached <= config.goal else status
        row |= full | {
            "match": png,
            "status": str(status),
            "embedding_error": reached,
            "num_evals": found.num_evals,  # the number that `max_evals` bounds
            "seconds": found.seconds + seconds,
        }
        return Made([row], {name: found.best}, {"match": found.num_evals, "refine": num_evals})

    def _write_full_size(self, i: int, grid: Tensor) -> tuple[FullSizeMatch, Row]:
        item, source, radius, norm = self.part[i].item, self.source[i], self.config.radius, self.config.ball_norm
        self.tell("full size", pair_ids=(item.name,))
        photo, hook = self.plan.photo(item), self._hook("refine", pair_ids=(item.name,))

        def allowed(image: Tensor) -> bool:
            return radius is None or not outside_ball("match", image, source, radius, norm)

        own = match_in_full_size(
            self.encoder, photo, self.views[item.name], grid, self.z[i : i + 1], source, allowed, progress=hook,
            **self.goal,
        )  # fmt: skip
        a, b = (to_levels(one) / 255 for one in (own.image, photo))
        full = {"match_full": encode_png(a, effort=4), "full_exact": own.exact}
        return own, full | {"psnr_full_db": measures.psnr_db(a, b), "ssim_full": measures.ssim(a, b)}

    def _hook(self, stage: str, **more: Any) -> Callable[[Progress], None]:
        return lambda p: self.tell(stage, errors=p.errors, num_evals=p.num_evals, active=p.active, **more)


def _candidates(settings: Mapping[str, Any]) -> list[str]:
    """Return the texts among which a text is ranked; none where targets are images."""
    return list(dict.fromkeys([*settings.get("target_texts", ()), *settings.get("usual_texts", ())]))


def _note_models(encoder: Any, row: Row, image: Tensor, z: Tensor) -> float | None:
    """State the embedding error of a float match for each model in a row, and return the worst."""
    errors = measures.errors_of(encoder, measures.embed(encoder, image[None])[0], z)
    if row.get("models"):
        row["models"] = [own | {"embedding_error": error} for own, error in zip(row["models"], errors, strict=True)]
    return measures.worst(errors)


def summarize(encoder: Any, settings: Mapping[str, Any], made: RunRows) -> Row:
    """Sum up match rows, with the baseline of unrelated images and the median evaluations of refining."""
    baseline, texts = made.baseline, _candidates(settings)
    good = [row for row in made.shown if row["status"] != Status.ERROR]
    if encoder is not None and texts:
        baseline = measures.text_baseline(encoder, good, texts)
    elif encoder is not None:
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
    if texts:
        filled = [dict.fromkeys(MATCH.added) | dict(row) for row in rows]
        summary["text"] = measures.medians_of(filled, ("cosine_to_text", "cosine_source_target", "source_text_rank"))
        summary["text"] |= {"nearest": sum(row["text_rank"] == 1 for row in filled), "candidates": len(texts)}
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
        other = row["match_label"] != row["target_label"] and not row.get("target_text")
        made.append({"status": str(status)} | ({"same_top1": False} if other else {}))
    return made


def remake(encoder: Any, settings: Row, rows: Sequence[Row], floats: dict[str, Tensor]) -> list[Row]:
    """Recompute a match row from its three PNG images, the float match and its cost."""
    (row,) = rows
    image, source, match = floats.pop(row["pair_id"]), row["source"], row["match"]
    target = row["target" if "target_texts" not in settings else "target_text"]
    if target is None:
        raise ValueError("`target_text` must be the text of a run with texts, and an image of any other; got none.")
    given: Any = {key: settings.get(key) for key in ("seed", "labels", "through")}
    given["candidates"] = _candidates(settings)
    given["file"] = stored_image(row["match_full"]) if settings.get("full_size") else None
    measured = measures.measure_match(encoder, source, match, target, pair_id=row["pair_id"], **given)
    made: Row = dict.fromkeys(MATCH.added) | measured
    text = isinstance(target, str)
    (z_target,) = encoder.embed_texts([target]) if text else measures.embed(measures.of_files(encoder), target[None])
    reached = _note_models(encoder, made, image.to(source), z_target)
    faults = []
    if (radius := settings["radius"]) is not None:
        for picture in (match, image):
            faults += outside_ball("match", picture, source, radius, settings["norm"])
    far = float((match.double() - image.double()).square().mean().sqrt())
    if not settings["refine"]:
        rounded = round_into_ball(image, source, radius, settings["norm"])
        made["match"] = decode_png(encode_png(rounded), source.dtype).to(source.device)
    elif not far <= (most := _REFINED + 0.25 * (reached or 0.0)):  # refining goes on where the match was left
        faults.append(("match", f"an image within {most:.3f} of its float match", f"it is {far:.3f} off"))
    if settings.get("full_size"):
        if encoder.provenance["processor"] != settings["processor"]:
            raise ValueError(
                "`processor` must be that of the run for files of full size; the checkpoint at hand has another. Name "
                "the folder of the run's checkpoint with --model PATH."
            )
        seen = encoder.preprocess([given["file"]])[0]
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
        "cosine_to_text": near,
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
