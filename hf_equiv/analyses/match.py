"""One batch of a match run: match, refine, save as PNG, read back, measure; one row per pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_equiv import formatting
from hf_equiv.analyses import measures
from hf_equiv.analyses.config import SOLVERS
from hf_equiv.analyses.pairs import Pair
from hf_equiv.analyses.plan import MatchPlan
from hf_equiv.data.image_file import decode_png, encode_png
from hf_equiv.formatting import one_line
from hf_equiv.matching.match import match_embedding
from hf_equiv.matching.refine import refine_8bit
from hf_equiv.matching.stages import match_in_stages
from hf_equiv.precision import no_tf32
from hf_equiv.results import Progress, Status
from hf_equiv.runs import schema
from hf_equiv.runs.execute import Observer, RunProgress
from hf_equiv.runs.processes import PassSize, ran_out
from hf_equiv.runs.schema import Row

_Loaded = tuple[Pair, Tensor, Tensor]


def make_rows(
    plan: MatchPlan, block: Sequence[Pair], errors: dict[str, str], tell: Observer, sizes: PassSize
) -> tuple[list[Row], dict[str, Tensor], Row]:
    """Rows of a block; a pair that cannot be read or computed gets a row of status `error` and the others go on.

    When memory runs out, fewer pairs are matched at once, from then on.

    Returns:
        The rows in order; float matches, and what they cost, by pair id.
    """
    rows: dict[str, Row] = {}
    floats: dict[str, Tensor] = {}
    costs: Row = {}
    loaded: list[_Loaded] = []

    def fail(pair: Pair, why: str, images: tuple[Tensor, Tensor] | None = None) -> None:
        errors[pair.pair_id] = why
        rows[pair.pair_id] = _error_row(plan, pair, images)
        tell(RunProgress("note", pair_ids=(pair.pair_id,), message=f"{pair.pair_id}: {why}"))

    def compute(part: Sequence[_Loaded]) -> None:
        try:
            made = list(_match_batch(plan, part, tell))
        except (RuntimeError, ValueError, MemoryError) as error:  # or NaN, or a model that fails on one image
            why, full = one_line(error), ran_out(error)
        else:
            for row, image, cost in made:
                rows[row["pair_id"]], floats[row["pair_id"]], costs[row["pair_id"]] = row, image, cost
            return
        if len(part) == 1:  # here the failed attempt is gone, with the memory that its error kept alive
            fail(part[0][0], f"out of memory with a single pair: {why}" if full else why, part[0][1:])
            return
        if full:
            tell(RunProgress("info", message=sizes.halve(len(part))))
        compute_all(part, sizes.images if full else 1)

    def compute_all(part: Sequence[_Loaded], size: int) -> None:
        at = 0
        while at < len(part):
            few = part[at : at + min(size, sizes.images)]
            compute(few)
            at += len(few)

    for pair in block:
        try:
            loaded.append((pair, *plan.pixels(pair)))
        except (ValueError, OSError) as error:
            fail(pair, one_line(error))
    compute_all(loaded, sizes.images)
    return [rows[pair.pair_id] for pair in block], floats, costs


def _match_batch(plan: MatchPlan, part: Sequence[_Loaded], tell: Observer) -> Iterator[tuple[Row, Tensor, Row]]:
    config, encoder = plan.config, plan.encoder
    ids = tuple(pair.pair_id for pair, _, _ in part)
    dtype = torch.float64 if encoder.dtype == torch.float64 else torch.float32
    # The images go through PNG before anything is computed, so that what is analysed is what is stored.
    files = [(encode_png(source), encode_png(target)) for _, source, target in part]
    source = torch.stack([decode_png(s, dtype) for s, _ in files]).to(encoder.device)
    target = torch.stack([decode_png(t, dtype) for _, t in files]).to(encoder.device)

    def hook(stage: str) -> Callable[[Progress], None]:
        return lambda p: tell(RunProgress(stage, 0, 0, ids, p.errors, p.num_evals, p.active))

    with torch.no_grad(), no_tf32():
        z = encoder(target)
    ball: dict[str, Any] = {"radius": config.radius, "norm": config.ball_norm, "rtol": config.rtol}
    found = match_in_stages(
        encoder, plan.drafts, source, z, SOLVERS[config.solver](), max_evals=config.max_evals, progress=hook("match"),
        **ball,
    )  # fmt: skip
    if config.refine:
        exact = refine_8bit(encoder, found.images, z, source=source, progress=hook("refine"), **ball)
        grid, refine_evals, refine_seconds = exact.images, exact.num_evals.tolist(), exact.seconds.tolist()
    else:
        grid = torch.stack(
            [round_into_ball(x, s, config.radius, config.ball_norm) for x, s in zip(found.images, source, strict=True)]
        )
        refine_evals = refine_seconds = [0.0] * len(part)
    for i, (pair, _, _) in enumerate(part):
        if found.status[i] is Status.ERROR:
            raise RuntimeError(f"{found.status[i].advice}")
        png = encode_png(grid[i])
        measured = measures.measure_match(
            encoder, decode_png(files[i][0], dtype), decode_png(png, dtype), decode_png(files[i][1], dtype),
            seed=config.seed, pair_id=pair.pair_id, labels=config.labels,
        )  # fmt: skip
        evals = {"match": float(found.num_evals[i]), "refine": refine_evals[i]}  # one row column, both in the summary
        row = {"source": files[i][0], "match": png, "target": files[i][1]} | pair.record() | measured
        row |= {
            "status": str(found.status[i]),
            "embedding_error": formatting.finite(found.errors[i]),
            "num_evals": evals["match"],  # what --max-evals bounds
            "seconds": float(found.seconds[i]) + refine_seconds[i],
        }
        yield row | plan.provenance, found.images[i], evals


def round_into_ball(image: Tensor, source: Tensor, radius: float | None, norm: str) -> Tensor:
    """Round pixels (3, H, W) to k/255 without leaving the ball about a source that lies on the grid.

    Each value goes to the nearest level inside the linf ball; for l2, the values that rounding moved outwards at the
    least gain go one level back, until the distance fits.

    Returns:
        Pixels k/255, (3, H, W).
    """
    levels, centre = image.double() * 255, (source.double() * 255).round()
    step = levels.round() - centre
    if radius is not None and norm == "linf":
        most = int(radius * 255 + 1e-9)
        step = step.clamp(-most, most)
    elif radius is not None:
        outwards = (step.abs() - (levels - centre).abs()).flatten().argsort(descending=True)
        flat = step.flatten()
        while (excess := float(flat.square().sum()) - (radius * 255) ** 2) > 0:
            order = outwards[flat[outwards] != 0]
            saved = (2 * flat[order].abs() - 1).cumsum(0)  # k² − (k−1)² for each value taken one level back
            back = order[: int((saved < excess).sum()) + 1]
            flat[back] -= flat[back].sign()
        step = flat.view_as(step)
    return ((centre + step).clamp(0, 255) / 255).to(image.dtype)


def _error_row(plan: MatchPlan, pair: Pair, images: tuple[Tensor, Tensor] | None) -> Row:
    row: Row = dict.fromkeys((*schema.IMAGE_COLUMNS, *schema.ROW_FEATURES))
    if images is not None:
        row["source"], row["target"] = encode_png(images[0]), encode_png(images[1])
    return row | pair.record() | {"status": str(Status.ERROR)} | plan.provenance


# A match made on the way: what walks from a match start with, and where the direction `match` leads.


MATCH_EVALS = 2000
"""Most evaluations of such a match."""


def match_target(
    encoder: Any, source: Tensor, target: Tensor, rtol: float, tell: Callable[[str, int, int], None]
) -> tuple[Tensor, float, float]:
    """Match an image with the embedding of another.

    Args:
        encoder: f.
        source: image to start from, (3, H, W).
        target: image whose embedding is wanted, (3, H, W).
        rtol: embedding error ‖f(x)−f(t)‖/‖f(t)‖ to reach.
        tell: told of progress.

    Returns:
        The match (3, H, W), its evaluations, its seconds.

    Raises:
        RuntimeError: it did not reach `rtol`.
    """
    with torch.no_grad(), no_tf32():
        z = encoder(target[None])

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


# How `verify` makes rows of matches again, and compares them (see `verify.rows.VERBS`).


_REFINED = 8 / 255  # root mean square distance between a float match and its refined PNG; seldom above 1/255


def outside_ball(column: str, image: Tensor, source: Tensor, radius: float, norm: str) -> list[tuple[str, str, str]]:
    """Name the fault of an image (3, H, W) that is outside the ball about the source."""
    gap = image.double() - source.double()
    distance = float(gap.abs().max() if norm == "linf" else gap.norm())
    if distance <= radius * (1 + 1e-6) + 1e-7:
        return []
    return [(column, f"within {norm} distance {radius:g}", f"it is outside the ball, at {distance:g}")]


def follow(settings: Row, rows: Sequence[Row]) -> list[Row]:
    """Return the status that fits the stated error and evaluations; None for every number of rows of status `error`."""
    made = []
    for row in rows:
        if row["status"] == Status.ERROR:
            made.append(dict.fromkeys(("match", "embedding_error", *measures.MEASURES, "num_evals", "seconds")))
            continue
        reached, status = row["embedding_error"], row["status"]
        missed = {Status.STALLED, Status.INFEASIBLE}
        missed |= {Status.MAX_EVALS} if (row["num_evals"] or 0.0) > settings["max_evals"] - 1 else set()
        if reached is not None and reached <= settings["rtol"]:
            status = Status.CONVERGED
        elif status not in missed:
            status = Status.STALLED
        other = row["match_label"] != row["target_label"]
        made.append({"status": str(status)} | ({"same_top1": False} if other else {}))
    return made


def remake(encoder: Any, settings: Row, rows: Sequence[Row], floats: dict[str, Tensor]) -> list[Row]:
    """Make a match row again from its three PNG images, the float match and what that cost."""
    (row,) = rows
    image, source, match, target = floats[row["pair_id"]], row["source"], row["match"], row["target"]
    made = measures.measure_match(
        encoder, source, match, target, seed=settings["seed"], pair_id=row["pair_id"], labels=settings["labels"]
    )
    with torch.no_grad(), no_tf32():
        z, z_target = encoder(torch.stack([image.to(target), target]))
    faults = []
    if (radius := settings["radius"]) is not None:
        for picture in (match, image):
            faults += outside_ball("match", picture, source, radius, settings["norm"])
    far = float((match.double() - image.double()).square().mean().sqrt())
    if not settings["refine"]:
        rounded = round_into_ball(image, source, radius, settings["norm"])
        made["match"] = decode_png(encode_png(rounded), target.dtype).to(target.device)
    elif not far <= _REFINED:
        faults.append(("match", f"an image within {_REFINED:.3f} of its float match", f"it is {far:.3f} off"))
    return [
        made
        | {"pair_id": row["pair_id"], "embedding_error": measures.relative_error(z, z_target), "faults": faults}
        | {"num_evals": (row["cost"] or {}).get("match")}
    ]


def tolerances(made: Row, settings: Row) -> Row:
    """Say how far columns of a match row may be from those made again: noise floors by a factor of ten."""
    floor = made["noise_floor"] or 0.0
    near = max(3 * floor, 1e-6)  # so that rows made on a GPU verify on a CPU
    errors = ("embedding_error", "embedding_error_8bit", "target_quantization_error")
    return {
        **dict.fromkeys((*errors, "cosine_to_target", "cosine_to_source", "cosine_source_target"), near),
        **dict.fromkeys(("match_prob", "target_label_prob"), max(100 * near, 1e-4)),
        "noise_floor": (max(0.1 * floor, floor - near), min(10 * floor, floor + near)),
        "psnr_db": 1e-8,
        "ssim": 1e-5,
        "linf": 1e-9,
        "l2": 1e-9,
        "match": 1.01 / 255 if settings["norm"] == "l2" else 1e-6,  # equal gains may be rounded in another order
    }
