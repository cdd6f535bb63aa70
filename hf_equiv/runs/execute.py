"""Carry out a run: make the missing rows, shared among the processes, and close the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from hf_equiv.results import Status
from hf_equiv.runs import directory, processes, resume, shards
from hf_equiv.runs.processes import Block, Claims
from hf_equiv.runs.schema import MATCH, Layout, Row


@dataclass(frozen=True, slots=True)
class RunProgress:
    """The progress of a run, as its observer receives it.

    Attributes:
        stage: `match`, `refine`, `saved` (a shard is on disk), `note` (a row of status `error`, see `message`) or
            `info` (see `message`); in other analyses the stage of an image.
        done: rows on disk, of all processes.
        total: rows of the whole run.
        pair_ids: ids of the batch in work.
        errors: embedding errors of that batch, (B,).
        num_evals: evaluations of that stage so far, (B,).
        active: images still in work, (B,).
        message: text of a note or of an info.
        step: steps of the stage that are done, in an analysis of one image.
        steps: all steps of the stage.
        rank: rank of the process.
        processes: number of processes.
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


@dataclass(frozen=True)
class Job:
    """A run for `carry_out`: its layout, its work, and the way it is closed.

    Attributes:
        layout: folder and columns of the rows.
        device: device of the work.
        settings: everything that changes a number.
        items: the pairs or images in order, each with its place in the list as `index`, a `name` and an `entry()`.
        size: items of a block, which one process makes and writes as one shard.
        item_bytes: most bytes of an item's images, as stored.
        make: writes the shard of a block, reports progress, and collects messages of errors by id.
        finish: writes figures and card once all rows are there; returns the summary.
        command: command line of the run, for `run.json`.
    """

    layout: Layout
    device: torch.device
    settings: Row
    items: Sequence[Any]
    size: int
    item_bytes: int
    make: Callable[[Path, Sequence[Any], dict[str, str], Observer], None]
    finish: Callable[[Path], Row]
    command: str | None = None

    def name(self, item: Any) -> str:
        """Id of an item."""
        return str(item.name)

    @property
    def items_per_file(self) -> int:
        """Items of a merged file."""
        return shards.items_per_file(self.item_bytes)


def carry_out(job: Job, folder: Path, overwrite: str, observer: Observer) -> bool:
    """Make the missing rows and close the run: merged files, figures, card and `run.json`.

    With several processes, each makes the blocks that it finds free.

    Returns:
        Whether this is the main process.

    Raises:
        ValueError: the directory holds another run, or is being written; or an unknown `overwrite`.
        RuntimeError: the main process has ended before it closed the run.
    """
    if overwrite not in directory.OVERWRITE:
        raise ValueError(f"`overwrite` must be one of {', '.join(directory.OVERWRITE)}; got {overwrite!r}.")
    state = processes.join(job.device)

    def tell(progress: RunProgress) -> None:
        observer(replace(progress, rank=state.process_index, processes=state.num_processes))

    if not state.is_main_process:
        processes.meet(state)
        with Claims(folder, state) as claims:
            _make_rows(job, folder, tell, claims, state)
            claims.wait_for_close()
        if not directory.read_record(folder)["complete"]:
            raise RuntimeError(processes.LEFT_ALONE)
        return False
    with directory.locked(folder):
        entries = [item.entry() for item in job.items]
        failed = resume.prepare(folder, job.settings, entries, overwrite, job.layout, job.command)
        with Claims(folder, state) as claims:
            if failed:
                what = "pairs" if job.layout is MATCH else "images"
                tell(RunProgress("info", message=f"{failed} {what} whose rows have status error are tried again"))
            processes.meet(state)
            made = _make_rows(job, folder, tell, claims, state)
            if made or not _is_closed(folder):
                _close(job, folder, entries)
    return True


def _make_rows(job: Job, folder: Path, tell: Observer, claims: Claims, state: PartialState) -> bool:
    """Make the missing rows together with the other processes, and return whether any was missing."""
    # The main process returns when all rows are there. It makes the blocks of processes that have ended.
    finished, total = directory.finished_ids(folder, job.layout), len(job.items)
    processes.meet(state)  # every process has read the same list before the first one writes
    if not state.is_main_process:
        resume.refuse_other_settings(folder, job.settings, job.layout)  # images that changed in between
    left = [item for item in job.items if job.name(item) not in finished]
    blocks = processes.cut_blocks(left, job.size, state.num_processes, job.items_per_file)
    done = -1

    def is_there(block: Block) -> bool:
        return shards.shard_path(folder, block[0].index, job.layout).exists()

    def count(names: tuple[str, ...] = ()) -> None:
        """Count the rows of all processes, and report them if there are more than before."""
        nonlocal done
        now = len(finished) + sum(len(block) for block in blocks if is_there(block))
        if now != done:
            done = now
            tell(RunProgress("saved", done, total, names))

    def make(block: Block) -> None:
        if not is_there(block):
            job.make(folder, block, {}, lambda progress: tell(replace(progress, done=done, total=total)))
            count(tuple(map(job.name, block)))

    if told := processes.describe(state, blocks, "rows" if job.layout is MATCH else "images"):
        tell(RunProgress("info", len(finished), total, message=told))
    count()
    for number, block in enumerate(blocks):
        if not is_there(block) and claims.take(number):
            make(block)
            claims.drop(number)
    if state.is_main_process:
        for number, block in enumerate(blocks):
            claims.wait_for(number, count)
            make(block)
        count()
    return bool(blocks)


def _is_closed(folder: Path) -> bool:
    record = directory.read_record(folder)
    files = record["files"]
    return bool(record["complete"] and files) and all((folder / name).is_file() for name in files)


def _close(job: Job, folder: Path, entries: Sequence[Row]) -> None:
    """Merge the shards, write figures and card, and last `run.json`, which has the hashes of the other files."""
    names = [job.name(item) for item in job.items]
    shards.merge_shards(folder, job.layout, names, job.items_per_file)
    reasons = _reasons(folder, job.layout)
    errors = {name: reasons[name] for name in names if name in reasons}
    summary = job.finish(folder)
    directory.write_record(
        folder, job.settings, entries, complete=True, summary=summary, errors=errors, layout=job.layout,
        command=job.command,
    )  # fmt: skip


def _reasons(folder: Path, layout: Layout) -> dict[str, str]:
    """Return a reason for every row of status `error`, by id."""
    reasons: dict[str, str] = {}
    for path in shards.shard_files(folder, layout):
        rows = [row[layout.item] for row in shards.read_shard(path, layout=layout) if row["status"] == Status.ERROR]
        noted = shards.read_errors(path) if rows else {}
        reasons |= {name: noted.get(name, "no reason was noted") for name in rows}
    return reasons
