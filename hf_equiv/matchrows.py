"""One batch of a match run: match, refine, save as PNG, read back, measure; one row per pair."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_equiv import metrics, shards
from hf_equiv.imagefile import decode_png, encode_png
from hf_equiv.memory import PassSize, ran_out
from hf_equiv.pairs import Pair
from hf_equiv.plan import MatchPlan
from hf_equiv.precision import no_tf32
from hf_equiv.quantize import refine_8bit
from hf_equiv.results import Progress, Status
from hf_equiv.runconfig import SOLVERS
from hf_equiv.shards import Row
from hf_equiv.stages import match_in_stages


@dataclass(frozen=True, slots=True)
class RunProgress:
    """What the observer of a run receives.

    Attributes:
        stage: `match`, `refine`, `saved` (a shard is on disk), `note` (a row of status `error`, see `message`) or
            `info` (see `message`); in other analyses what is being worked on.
        done: rows on disk, of all processes.
        total: rows of the whole run.
        pair_ids: the batch being worked on.
        errors: embedding errors of that batch, (B,).
        num_evals: evaluations of that stage spent so far, (B,).
        active: images still being worked on, (B,).
        message: text of a note or of an info.
        step: how much of the stage is done, in an analysis of one image.
        steps: of how much.
        rank: number of the process that says so.
        processes: how many there are.
    """

    stage: str
    done: int = 0
    total: int = 0
    pair_ids: tuple[str, ...] = ()
    errors: Tensor | None = None
    num_evals: Tensor | None = None
    active: Tensor | None = None
    message: str = ""
    step: int = 0
    steps: int = 0
    rank: int = 0
    processes: int = 1


Observer = Callable[[RunProgress], None]

_FOLDERS = re.compile(r"(?<![\w:/.])(?:/[^\s'\"`:,;()/]+)+/(?=[^\s'\"])")
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
        measured = metrics.measure_match(
            encoder, decode_png(files[i][0], dtype), decode_png(png, dtype), decode_png(files[i][1], dtype),
            seed=config.seed, pair_id=pair.pair_id, labels=config.labels,
        )  # fmt: skip
        evals = {"match": float(found.num_evals[i]), "refine": refine_evals[i]}  # one row column, both in the summary
        row = {"source": files[i][0], "match": png, "target": files[i][1]} | pair.record() | measured
        row |= {
            "status": str(found.status[i]),
            "embedding_error": metrics.finite(found.errors[i]),
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
    row: Row = dict.fromkeys((*shards.IMAGE_COLUMNS, *shards.ROW_FEATURES))
    if images is not None:
        row["source"], row["target"] = encode_png(images[0]), encode_png(images[1])
    return row | pair.record() | {"status": str(Status.ERROR)} | plan.provenance


def one_line(error: Exception) -> str:
    """What an error says, on one line, without the folders of this machine: it goes into the run's record."""
    return _FOLDERS.sub("…/", " ".join(str(error).split())) or type(error).__name__
