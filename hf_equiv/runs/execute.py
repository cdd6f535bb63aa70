"""Carry out a job: find what is missing, share it among the processes, and close the run."""

from __future__ import annotations

import torch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hf_equiv.results import Status
from hf_equiv.runs import directory, processes, resume, shards
from hf_equiv.runs.schema import Layout, MATCH, Row
from pathlib import Path
from torch import Tensor
from typing import Any


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


@dataclass(frozen=True)
class Job:
    """What `carry_out` needs to know of a run: its layout, its work, and how it is closed.

    Attributes:
        layout: folder and columns of the rows.
        device: where the work is done.
        settings: everything that changes a number.
        items: the pairs or images in order, each with its place in the list as `index`, a `record()` and an `entry()`.
        size: items of a block, which one process makes and writes as one shard.
        item_bytes: bytes of an item's images, as stored, at most.
        make: writes the shard of a block, telling how it goes, and collects messages of errors by id.
        finish: writes figures and card once all rows are there; returns the summary.
        command: command line that repeats the run, for `run.json`.
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
        return str(item.record()[self.layout.item])


def carry_out(job: Job, folder: Path, overwrite: str, observer: Observer) -> bool:
    """Make the rows that are missing, and close the run: merged files, figures, card and `run.json`.

    Of several processes, each makes the blocks that it finds free.

    Returns:
        Whether this is the process that speaks for the run.

    Raises:
        ValueError: the directory holds another run, or is being written; or an unknown `overwrite`.
        RuntimeError: this is another process, and the one that closes the run has ended before.
    """
    if overwrite not in directory.OVERWRITE:
        raise ValueError(f"`overwrite` must be one of {', '.join(directory.OVERWRITE)}; got {overwrite!r}.")
    state = processes.join(job.device)

    def tell(progress: RunProgress) -> None:
        observer(replace(progress, rank=state.process_index, processes=state.num_processes))

    with processes.Claims(folder, state) as claims:
        if not state.is_main_process:
            processes.meet(state)
            claims.open()
            work = _Work(job, folder, tell, claims, state)
            resume.refuse_other_settings(folder, job.settings, job.layout)  # images that changed in between
            work.share()
            claims.wait_for_close()
            if not directory.read_record(folder)["complete"]:
                raise RuntimeError(processes.LEFT_ALONE)
            return False
        with directory.locked(folder):
            records = [item.entry() for item in job.items]
            failed = resume.prepare(folder, job.settings, records, overwrite, job.layout)
            claims.open()
            if failed:
                what = "pairs" if job.layout is MATCH else "images"
                tell(RunProgress("info", message=f"{failed} {what} whose rows have status error are tried again"))
            processes.meet(state)
            work = _Work(job, folder, tell, claims, state)
            work.share()
            work.complete()
            record = directory.read_record(folder)
            if work.blocks or not record["complete"] or not _files_there(folder, record):
                names = [job.name(item) for item in job.items]
                shards.merge_shards(folder, job.layout, names, shards.items_per_file(job.item_bytes))
                errors = _reasons(folder, job.layout)
                summary = job.finish(folder)
                directory.write_record(  # last: it names the hashes of the other files
                    folder, job.settings, records, complete=True, summary=summary, layout=job.layout,
                    errors={name: errors[name] for name in names if name in errors}, command=job.command,
                )  # fmt: skip
    return True


class _Work:
    """The blocks that are not on disk, the same list in every process."""

    def __init__(
        self, job: Job, folder: Path, tell: Observer, claims: processes.Claims, state: processes.State
    ) -> None:
        self.job, self.folder, self.claims = job, folder, claims
        finished = directory.finished_ids(folder, job.layout)
        processes.meet(state)  # every process has read the same list before the first one writes
        left = [item for item in job.items if job.name(item) not in finished]
        size = shards.items_per_file(job.item_bytes)
        self.blocks = processes.cut_blocks(left, job.size, state.num_processes, size)
        self.kept, self.done = len(finished), -1
        self.observer = tell
        if told := processes.describe(state, self.blocks, "rows" if job.layout is MATCH else "images"):
            tell(RunProgress("info", len(finished), len(job.items), message=told))
        self.say_done()

    def share(self) -> None:
        """Make every block that nobody else has taken."""
        for number, block in enumerate(self.blocks):
            if not self.there(block) and self.claims.take(number):
                self.make(block)
                self.claims.drop(number)

    def complete(self) -> None:
        """Wait until all blocks are there; make those whose process has ended before."""
        for number, block in enumerate(self.blocks):
            self.claims.wait_for(number, self.say_done)
            self.make(block)
        self.say_done()

    def make(self, block: processes.Block) -> None:
        if not self.there(block):  # another process may have made it just now
            errors: dict[str, str] = {}
            self.job.make(self.folder, block, errors, self.tell)
            self.say_done(tuple(map(self.job.name, block)))

    def there(self, block: processes.Block) -> bool:
        return shards.shard_paths(self.folder, block[0].index, self.job.layout)[1].exists()

    def tell(self, progress: RunProgress) -> None:
        """Pass on what a block says of itself, with how far all processes are."""
        self.observer(replace(progress, done=self.done, total=len(self.job.items)))

    def say_done(self, names: tuple[str, ...] = ()) -> None:
        """Count the rows of all processes, and say so if there are more than before."""
        done = self.kept + sum(len(block) for block in self.blocks if self.there(block))
        if done != self.done:
            self.done = done
            self.observer(RunProgress("saved", done, len(self.job.items), names))


def _reasons(folder: Path, layout: Layout) -> dict[str, str]:
    """A reason for every row of status `error`, as noted by the process that met it."""
    reasons: dict[str, str] = {}
    for path in shards.shard_files(folder, layout):
        rows = [row[layout.item] for row in shards.read_shard(path, layout=layout) if row["status"] == Status.ERROR]
        noted = shards.read_errors(path) if rows else {}
        reasons |= {name: noted.get(name, "no reason was noted") for name in rows}
    return reasons


def _files_there(folder: Path, record: Row) -> bool:
    return bool(record["files"]) and all((folder / name).is_file() for name in record["files"])
