"""`run_match`: make the rows of a match run, batch by batch; go on where an earlier run stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hf_equiv import card, memory, metrics, plots, rundir, shards
from hf_equiv.imagefile import decode_png
from hf_equiv.matchrows import Observer, make_rows
from hf_equiv.plan import MatchPlan
from hf_equiv.precision import no_tf32
from hf_equiv.results import Status
from hf_equiv.shards import MATCH, Row
from hf_equiv.work import Job, carry_out

BASELINE_PAIRS = 64
"""Pairs whose images make the baseline of unrelated images."""


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """A finished run.

    Attributes:
        out: its directory.
        rows: its rows, in the order of the pairs, without images.
        summary: as from `metrics.summarize`.
        errors: why rows are of status `error`, by pair id.
        refine_evals: evaluations of the 8-bit refinement, by pair id.
        main: whether this is the process that speaks for the run; of several, only one does.
    """

    out: Path
    rows: tuple[Row, ...]
    summary: Row
    errors: Mapping[str, str]
    refine_evals: Mapping[str, float]
    main: bool = True

    @property
    def converged(self) -> bool:
        """Whether every row has status `converged`."""
        return all(row["status"] == Status.CONVERGED for row in self.rows)


def run_match(
    plan: MatchPlan,
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: str = "missing",
    batch_size: int | None = None,
    observer: Observer | None = None,
) -> RunOutcome:
    """Carry out a plan: match, refine, save as PNG, read back, measure, write.

    Rows are on disk after each batch; on a full disk an OSError says so and they are kept. A run that was stopped, at
    whatever moment, is finished by the same call: rows that are there are kept, the others are made.

    Args:
        plan: from `make_plan`.
        out: run directory; by default `plan.default_out`.
        overwrite: `missing` makes what is not there, and tries rows of status `error` again; `always` replaces an
            earlier run; `never` refuses to touch one.
        batch_size: pairs matched at once, and the size of a shard; on a CPU it changes no number. Default 8, CUDA 32.
        observer: called with a `RunProgress` after every batched evaluation; what it raises ends the run.

    Returns:
        The rows as read back from disk, and the summary.

    Raises:
        ValueError: the directory holds another run, or is being written.
    """
    folder = Path(out or plan.default_out)
    encoder, sizes = plan.encoder, memory.PassSize(shard_size(plan.encoder.device, batch_size))

    def make(folder: Path, block: Sequence[Any], errors: dict[str, str], tell: Observer) -> None:
        rows, floats, costs = make_rows(plan, block, errors, tell, sizes)
        shards.write_shard(folder, block[0].index, rows, floats, costs, errors=errors)

    job = Job(
        MATCH, encoder.device, plan.settings, plan.pairs, sizes.images,
        prod(encoder.input_shape) * (3 + encoder.dtype.itemsize), make, lambda folder: _finish_match(plan, folder),
    )  # fmt: skip
    return _outcome(plan, folder, main=carry_out(job, folder, overwrite, observer or (lambda _: None)))


def shard_size(device: torch.device, batch_size: int | None) -> int:
    """Images worked on at once: as asked for, or 8 on a CPU and 32 elsewhere.

    Returns:
        The number.

    Raises:
        ValueError: it is below 1.
    """
    size = batch_size or (8 if device.type == "cpu" else 32)
    if size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {size}.")
    return size


def _finish_match(plan: MatchPlan, folder: Path) -> Row:
    """Write figure and card; returns the summary."""
    order = {pair.pair_id: pair.index for pair in plan.pairs}
    rows = sorted(shards.read_rows(folder), key=lambda row: order[row["pair_id"]])
    summary = summarize_run(plan.encoder, folder, rows, plan.config.rtol, [pair.pair_id for pair in plan.pairs])
    pictures = plots.pairs_figure(_first_pictures(folder, order, plots.MAX_PAIRS), summary["verdict"], plan.settings)
    if pictures is not None:
        shards.write_atomic(folder / "figures" / "pairs.png", pictures)
    shards.write_atomic(folder / "README.md", card.run_card(plan.settings, summary).encode())
    return summary


def summarize_run(encoder: Any, folder: Path, rows: Sequence[Row], rtol: float, pair_ids: Sequence[str]) -> Row:
    """Summary of a run directory's rows, with the baseline from the stored images of its first pairs.

    Args:
        encoder: f.
        folder: run directory.
        rows: its rows.
        rtol: tolerance of the run.
        pair_ids: ids of all pairs, in order.

    Returns:
        As `metrics.summarize`, with the median evaluations of refining, which rows do not have.
    """
    wanted = set(pair_ids[:BASELINE_PAIRS])
    z: dict[str, tuple[Tensor, Tensor]] = {}
    dtype = torch.float64 if encoder.dtype == torch.float64 else torch.float32
    for row in shards.read_rows(folder, images=True, first=len(wanted)):
        if row["pair_id"] in wanted and row["status"] != Status.ERROR:
            two = torch.stack([decode_png(row["source"], dtype), decode_png(row["target"], dtype)])
            with torch.no_grad(), no_tf32():
                a, b = encoder(two.to(encoder.device)).cpu()
            z[row["pair_id"]] = (a, b)
    kept = [z[name] for name in pair_ids if name in z]
    baseline = None
    if kept:
        baseline = metrics.random_pair_baseline(torch.stack([a for a, _ in kept]), torch.stack([b for _, b in kept]))
    summary = metrics.summarize(rows, baseline, rtol)
    refining = [cost["refine"] for cost in shards.read_costs(folder).values()]
    summary["median"]["num_evals_refine"] = median(refining) if refining else None
    return summary


def _first_pictures(folder: Path, order: dict[str, int], limit: int) -> list[Row]:
    first = {name for name, index in order.items() if index < limit}
    rows = [
        r
        for r in shards.read_rows(folder, images=True, first=limit)
        if r["pair_id"] in first and r["match"] is not None
    ]
    return sorted(rows, key=lambda row: order[row["pair_id"]])


def _outcome(plan: MatchPlan, folder: Path, *, main: bool) -> RunOutcome:
    record = rundir.read_record(folder)
    order = {pair.pair_id: pair.index for pair in plan.pairs}
    rows = sorted(shards.read_rows(folder), key=lambda row: order[row["pair_id"]])
    refine_evals = {name: cost["refine"] for name, cost in shards.read_costs(folder).items()}
    return RunOutcome(folder, tuple(rows), record["summary"], record.get("errors", {}), refine_evals, main)
