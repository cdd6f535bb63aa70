"""Carry out a run: make the missing rows, shared among the processes, and close the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor

from hf_equiv.runs import directory, processes, resume, shards
from hf_equiv.runs.processes import Block, Claims
from hf_equiv.runs.schema import MATCH


@dataclass(frozen=True, slots=True)
class RunProgress:
    """The progress of a run, as its observer receives it."""

    stage: str  # stage of the current items, or `saved` (a shard is on disk), `note` (a row of status `error`), `info`
    done: int = 0  # rows on disk, from all processes
    total: int = 0  # rows of the whole run
    pair_ids: tuple[str, ...] = ()  # ids of the current batch
    errors: Tensor | None = field(default=None, repr=False)  # embedding errors of that batch, (B,)
    num_evals: Tensor | None = field(default=None, repr=False)  # evaluations in that stage so far, (B,)
    active: Tensor | None = field(default=None, repr=False)  # images still in work, (B,)
    message: str = ""  # text of a note or of an info
    step: int = 0  # steps done in the stage of one image
    steps: int = 0  # all steps of the stage
    rank: int = 0  # rank of the process
    processes: int = 1  # number of processes


Observer = Callable[[RunProgress], None]

WRITE_EVERY = 15.0  # seconds after which the finished items of a block are written before the block is done


def carry_out(job: Any, overwrite: str, observer: Observer) -> bool:
    """Make the missing rows together with the other processes, close the run, and return whether this one is main."""
    # A job has the `plan` with its layout, settings, command and items (each with its place `index`, `name` and
    # `entry()`), the `folder` of the run, and the `size` of a block in items. `make(items, tell)` yields each item with
    # its `rows`, `floats` (float images), `cost` and `error` as soon as it is finished; `finish()` writes figures and
    # card once all rows are there, and returns the summary.
    if overwrite not in directory.OVERWRITE:
        raise ValueError(f"`overwrite` must be one of {', '.join(directory.OVERWRITE)}; got {overwrite!r}.")
    folder, state = job.folder, processes.join(job.plan.encoder.device)

    def tell(progress: RunProgress) -> None:
        observer(replace(progress, rank=state.process_index, processes=state.num_processes))

    if not state.is_main_process:
        processes.meet(state)
        with Claims(folder, state) as claims:
            _make_rows(job, tell, claims, state, lambda: None)
            claims.wait_for_close()
        if not directory.read_record(folder)["complete"]:
            raise RuntimeError(processes.LEFT_ALONE)
        return False
    with directory.locked(folder) as check:
        failed = resume.prepare(folder, job.plan, overwrite)
        with Claims(folder, state) as claims:
            if failed:
                told = f"{failed} {job.plan.layout.listed} whose rows have status error are tried again"
                there = len(shards.ids_of(folder, job.plan.layout))
                tell(RunProgress("info", there, len(job.plan.items), message=told))
            processes.meet(state)
            made = _make_rows(job, tell, claims, state, check)
            record = directory.read_record(folder)
            files = record["files"]  # empty until the run is closed
            whole = bool(files) and all((folder / name).is_file() for name in files)
            if made or not whole or not directory.is_summed_up(record):
                check()
                _close(job)
    return True


def _make_rows(job: Any, tell: Observer, claims: Claims, state: PartialState, check: Callable[[], None]) -> bool:
    """Make the missing rows, and return whether there were any; `check` the folder before each is written."""
    # The main process returns when all rows are there. It makes the blocks of processes that have ended.
    folder, layout, items = job.folder, job.plan.layout, job.plan.items
    rows = _Rows(job, tell, check, alone=state.num_processes == 1)
    if unknown := rows.there - {item.name for item in items}:
        told = f"{str(folder)!r} holds rows of {min(unknown)!r}, which its run does not list"
        raise ValueError(f"{told}. Give another --out, or --overwrite always to replace it.")
    processes.meet(state)  # every process has read the same list before the first one writes
    if not state.is_main_process:
        resume.refuse_other_settings(folder, job.plan, mendable=False)  # images may have changed in between
    left = [item for item in items if item.name not in rows.there]
    blocks = processes.cut_blocks(left, job.size, state.num_processes, shards.items_per_file(job.plan.item_bytes))
    if told := processes.describe(state, blocks, "rows" if layout is MATCH else "images"):
        tell(RunProgress("info", len(rows.there), len(items), message=told))
    rows.count()
    for number, block in enumerate(blocks):
        if claims.take(number):
            rows.make(block)
            claims.drop(number)
    if state.is_main_process:
        for number, block in enumerate(blocks):
            claims.wait_for(number, rows.look)
            rows.make(block)
    return bool(blocks)


class _Rows:
    """The items whose rows are on disk, from all processes. Shards are read only before they are merged."""

    def __init__(self, job: Any, tell: Observer, check: Callable[[], None], *, alone: bool) -> None:
        self.job, self.tell, self.check, self.alone = job, tell, check, alone
        self.folder, self.layout, self.total = job.folder, job.plan.layout, len(job.plan.items)
        self.seen: set[Path] = set()  # shards whose items are known
        self.there: set[str] = set()  # names of the items on disk
        self.told = -1
        self._read()

    def look(self) -> None:
        """Read the shards that other processes have written, and report them."""
        if not self.alone:
            self._read()
            self.count()

    def count(self, names: tuple[str, ...] = ()) -> None:
        """Report the number of rows if it has grown."""
        if len(self.there) != self.told:
            self.told = len(self.there)
            self.tell(RunProgress("saved", self.told, self.total, names))

    def make(self, block: Block) -> None:
        """Make the missing items of a block, and write them as one shard; an interruption writes the finished ones."""
        self.look()
        left = [item for item in block if item.name not in self.there]
        made, last = list[tuple[Any, Any]](), time.monotonic()
        try:
            for item, own in self.job.make(left, lambda p: self.tell(replace(p, done=self.told, total=self.total))):
                made.append((item, own))
                if own.error is not None:
                    self.tell(RunProgress("note", pair_ids=(item.name,), message=f"{item.name}: {own.error}"))
                if time.monotonic() - last > WRITE_EVERY:
                    last = time.monotonic()
                    self._write(made)
        finally:
            self._write(made)

    def _write(self, made: list[tuple[Any, Any]]) -> None:
        """Move finished items to disk."""
        if not made:
            return
        self.check()
        finished = sorted(made, key=lambda one: one[0].index)
        made.clear()
        first, names = finished[0][0].index, tuple(item.name for item, _ in finished)
        rows = [row for _, own in finished for row in own.rows]
        floats = {name: image for _, own in finished for name, image in own.floats.items()}
        costs = {item.name: own.cost for item, own in finished if own.cost is not None}
        errors = {item.name: own.error for item, own in finished if own.error is not None}
        shards.write_shard(self.folder, first, rows, floats, costs, self.layout, errors)
        self.seen.add(shards.shard_path(self.folder, first, self.layout))
        self.there |= {*names}
        self.count(names)

    def _read(self) -> None:
        for path in {*shards.shard_files(self.folder, self.layout)} - self.seen:
            self.there |= {*shards.names_in(path, self.layout)}
            self.seen.add(path)


def _close(job: Any) -> None:
    """Merge the shards, write figures and card, and last `run.json`, which has the hashes of the other files."""
    folder, layout, names = job.folder, job.plan.layout, [item.name for item in job.plan.items]
    shards.merge_shards(folder, layout, names, shards.items_per_file(job.plan.item_bytes))
    failed = shards.ids_of(folder, layout, failed=True)
    reasons = {k: v for path in shards.shard_files(folder, layout) for k, v in shards.read_errors(path).items()}
    errors = {name: reasons.get(name, "no reason was noted") for name in names if name in failed}
    directory.write_record(folder, job.plan, job.finish(), errors)
