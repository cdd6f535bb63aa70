"""Make the rows of a run, batch by batch, each batch one shard; go on where an earlier run stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from hf_equiv import card, metrics, plots, rundir, shards
from hf_equiv.imagefile import decode_png
from hf_equiv.matchrows import Observer, RunProgress, make_rows
from hf_equiv.plan import MatchPlan
from hf_equiv.precision import no_tf32
from hf_equiv.results import Status
from hf_equiv.shards import MATCH, Layout, Row

BASELINE_PAIRS = 64
"""Pairs whose images make the baseline of unrelated images."""


@dataclass(frozen=True)
class Job:
    """What `carry_out` needs to know of a run: its layout, its work, and how it is closed.

    Attributes:
        layout: folder and columns of the rows.
        device: where the work is done.
        settings: everything that changes a number.
        items: the pairs or images in order, each with its place in the list as `index`, and a `record()`.
        size: items of a shard.
        make: writes the shard of some items, given the number of items done, and collects messages of errors by id.
        finish: writes figures and card once all rows are there; returns the summary.
    """

    layout: Layout
    device: torch.device
    settings: Row
    items: Sequence[Any]
    size: int
    make: Callable[[Path, Sequence[Any], dict[str, str], int], None]
    finish: Callable[[Path], Row]

    def name(self, item: Any) -> str:
        """Id of an item."""
        return str(item.record()[self.layout.item])


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
    out: Path | None = None,
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
        overwrite: `missing` makes what is not there; `always` replaces an earlier run; `never` refuses to touch one.
        batch_size: pairs matched at once, and the size of a shard; on a CPU it changes no number. Default 8, CUDA 32.
        observer: called with a `RunProgress` after every batched evaluation; what it raises ends the run.

    Returns:
        The rows as read back from disk, and the summary.

    Raises:
        ValueError: the directory holds another run, or is being written.
    """
    folder, tell = out or plan.default_out, observer or (lambda _: None)

    def make(folder: Path, batch: Sequence[Any], errors: dict[str, str], done: int) -> None:
        rows, floats, costs = make_rows(plan, batch, errors, tell, done)
        shards.write_shard(folder, batch[0].index, rows, floats, costs)

    size = shard_size(plan.encoder.device, batch_size)
    job = Job(
        MATCH, plan.encoder.device, plan.settings, plan.pairs, size, make, lambda folder: _finish_match(plan, folder)
    )
    return _outcome(plan, folder, main=carry_out(job, folder, overwrite, tell))


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


def carry_out(job: Job, folder: Path, overwrite: str, tell: Observer) -> bool:
    """Make the rows that are missing, and close the run: figures, card and `run.json`.

    Of several processes, each makes its share.

    Returns:
        Whether this is the process that speaks for the run.

    Raises:
        ValueError: the directory holds another run, or is being written; or an unknown `overwrite`.
    """
    if overwrite not in rundir.OVERWRITE:
        raise ValueError(f"`overwrite` must be one of {', '.join(rundir.OVERWRITE)}; got {overwrite!r}.")
    state = _processes(job.device)
    if not state.is_main_process:
        state.wait_for_everyone()
        _work(job, folder, tell, state)
        state.wait_for_everyone()  # until the main process has written the summary
        return False
    with rundir.locked(folder):
        records = [item.record() for item in job.items]
        rundir.prepare(folder, job.settings, records, overwrite, job.layout)
        state.wait_for_everyone()
        errors = _work(job, folder, tell, state)
        record = rundir.read_record(folder)
        if errors or not record["complete"] or not _files_there(folder, record):
            errors = _reasons(folder, job.layout) | record.get("errors", {}) | errors
            known = {job.name(item) for item in job.items}
            summary = job.finish(folder)
            rundir.write_record(  # last: it names the hashes of the other files
                folder, job.settings, records, complete=True, summary=summary, layout=job.layout,
                errors={name: why for name, why in errors.items() if name in known},
            )  # fmt: skip
        state.wait_for_everyone()
    return True


def _processes(device: torch.device) -> PartialState:
    state = PartialState(cpu=device.type == "cpu")
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != state.num_processes:
        raise ValueError(
            f"{wanted} processes were started but they do not see each other (each thinks it is one of "
            f"{state.num_processes}). Launch with `accelerate launch --multi_gpu --num_processes {wanted} -m hf_equiv`."
        )
    return state


def _work(job: Job, folder: Path, tell: Observer, state: PartialState) -> dict[str, str]:
    """Make this process's share of the missing rows; returns messages of rows that ended in an error."""
    finished = rundir.finished_ids(folder, job.layout)
    state.wait_for_everyone()  # every process has read the same list before the first one writes
    left = [item for item in job.items if job.name(item) not in finished]
    errors: dict[str, str] = {}
    done, total = len(finished), len(job.items)
    tell(RunProgress("saved", done, total))
    with state.split_between_processes(left) as mine:
        for start in range(0, len(mine), job.size):
            batch = mine[start : start + job.size]
            job.make(folder, batch, errors, done)
            done += len(batch)
            tell(RunProgress("saved", done, total, tuple(job.name(item) for item in batch)))
    state.wait_for_everyone()
    return errors


def _reasons(folder: Path, layout: Layout) -> dict[str, str]:
    """A reason for every row of status `error`, for those whose own was lost with the process that met it."""
    rows = shards.read_rows(folder, layout=layout)
    return {row[layout.item]: "the process that met it was stopped" for row in rows if row["status"] == Status.ERROR}


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
    for row in shards.read_rows(folder, images=True) if wanted else ():
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
    rows = [r for r in shards.read_rows(folder, images=True) if r["pair_id"] in first and r["match"] is not None]
    return sorted(rows, key=lambda row: order[row["pair_id"]])


def _files_there(folder: Path, record: Row) -> bool:
    return bool(record["files"]) and all((folder / name).is_file() for name in record["files"])


def _outcome(plan: MatchPlan, folder: Path, *, main: bool) -> RunOutcome:
    record = rundir.read_record(folder)
    order = {pair.pair_id: pair.index for pair in plan.pairs}
    rows = sorted(shards.read_rows(folder), key=lambda row: order[row["pair_id"]])
    refine_evals = {name: cost["refine"] for name, cost in shards.read_costs(folder).items()}
    return RunOutcome(folder, tuple(rows), record["summary"], record.get("errors", {}), refine_evals, main)
