"""Carry out a run: make the missing rows, shared among the processes, and close the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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


def carry_out(job: Any, overwrite: str, observer: Observer) -> bool:
    """Make the missing rows together with the other processes, close the run, and return whether this one is main."""
    # A job has the `plan` with its layout, settings, command and items (each with its place `index`, `name` and
    # `entry()`), the `folder` of the run, and the `size` of a block in items. `make(block, tell)` returns the rows of a
    # block, their float images, costs and errors; `finish()` writes figures and card once all rows are there, and
    # returns the summary.
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
                tell(RunProgress("info", message=told))
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
    finished = shards.ids_of(folder, layout)
    if unknown := finished - {item.name for item in items}:
        told = f"{str(folder)!r} holds rows of {min(unknown)!r}, which its run does not list"
        raise ValueError(f"{told}. Give another --out, or --overwrite always to replace it.")
    processes.meet(state)  # every process has read the same list before the first one writes
    if not state.is_main_process:
        resume.refuse_other_settings(folder, job.plan, mendable=False)  # images may have changed in between
    left = [item for item in items if item.name not in finished]
    blocks = processes.cut_blocks(left, job.size, state.num_processes, shards.items_per_file(job.plan.item_bytes))
    done = -1

    def is_there(block: Block) -> bool:
        return shards.shard_path(folder, block[0].index, layout).exists()

    def count(names: tuple[str, ...] = ()) -> None:
        nonlocal done  # report the rows of all processes if there are more than before
        now = len(finished) + sum(len(block) for block in blocks if is_there(block))
        if now != done:
            done = now
            tell(RunProgress("saved", done, len(items), names))

    def make(block: Block) -> None:
        if not is_there(block):
            made = job.make(block, lambda progress: tell(replace(progress, done=done, total=len(items))))
            check()
            rows, floats, costs, errors = made
            shards.write_shard(folder, block[0].index, rows, floats, costs, layout, errors)
            count(tuple(item.name for item in block))

    if told := processes.describe(state, blocks, "rows" if layout is MATCH else "images"):
        tell(RunProgress("info", len(finished), len(items), message=told))
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


def _close(job: Any) -> None:
    """Merge the shards, write figures and card, and last `run.json`, which has the hashes of the other files."""
    folder, layout, names = job.folder, job.plan.layout, [item.name for item in job.plan.items]
    shards.merge_shards(folder, layout, names, shards.items_per_file(job.plan.item_bytes))
    failed = shards.ids_of(folder, layout, failed=True)
    reasons = {k: v for path in shards.shard_files(folder, layout) for k, v in shards.read_errors(path).items()}
    errors = {name: reasons.get(name, "no reason was noted") for name in names if name in failed}
    directory.write_record(folder, job.plan, job.finish(), errors)
