"""Several processes on one run: the blocks of work, who takes which, and how the others wait for one that is late.

A block is taken by locking its byte of the file `.claims` in the run directory. The system frees the lock when its
owner ends, however it ends: whoever is free takes the next block, a block whose owner was killed is taken over, and
nobody waits for the dead.
"""

from __future__ import annotations

import gc
import os
import platform
import time
import torch
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

State = PartialState


Block = Sequence[Any]
"""Pairs or images that are worked on together and written as one shard, each with its place in the list as `index`."""


PAUSE = 0.1
"""Seconds between two looks at what another process is doing."""


LEFT_ALONE = "the main process has ended before the run was closed. Its rows are kept: run the same command again."


OTHER_LEFT = (
    "another process of this run has ended before the work was shared. Its own message says why; nothing was lost: "
    "run the same command again."
)


_CLAIMS = ".claims"


_MAIN = 1 << 40  # the byte that the main process holds while it lives


def join(device: torch.device) -> PartialState:
    """Join the other processes of a launcher (torchrun, `accelerate launch`, `notebook_launcher`), if there are any.

    Args:
        device: where this process computes.

    Returns:
        Its number and how many there are.

    Raises:
        ValueError: the launcher started more processes than see each other.
    """
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    state = PartialState(cpu=device.type == "cpu")
    if wanted != state.num_processes:
        raise ValueError(
            f"{wanted} processes were started but they do not see each other (each thinks it is one of "
            f"{state.num_processes}). Launch with `accelerate launch --multi_gpu --num_processes {wanted} -m hf_equiv`."
        )
    return state


def meet(state: PartialState) -> None:
    """Wait until every process is here.

    Raises:
        RuntimeError: one has ended.
    """
    try:
        state.wait_for_everyone()
    except RuntimeError as error:  # of the communication library, whichever it is
        raise RuntimeError(OTHER_LEFT) from error


def describe(state: PartialState, blocks: Sequence[Block], what: str) -> str:
    """Say how many processes work, where it is worth saying: under a launcher."""
    count, left = state.num_processes, sum(map(len, blocks))
    if count > 1:
        return f"{count} processes share {left} {what}"
    if any(name.startswith("ACCELERATE_") for name in os.environ):  # `accelerate launch --cpu` starts one, silently
        return f"1 process works on {left} {what}; for more, launch with --multi_gpu --num_processes N (also on a CPU)"
    return ""


def cut_blocks(items: Sequence[Any], size: int, processes: int, file_items: int) -> list[Block]:
    """Cut a list into blocks of at most `size`; with several processes the last ones are smaller, so that all end soon.

    No block reaches over a multiple of `file_items` of the run's whole list: that is where merged files end.

    Args:
        items: what is left to do.
        size: items of a full block.
        processes: how many share the work.
        file_items: items of a merged file.

    Returns:
        The blocks, in order.
    """
    blocks: list[Block] = []
    at = 0
    while at < len(items):
        fair = size if processes == 1 else max(1, min(size, (len(items) - at) // (2 * processes)))
        file = items[at].index // file_items
        block = [item for item in items[at : at + fair] if item.index // file_items == file]
        blocks.append(block)
        at += len(block)
    return blocks


class Claims:
    """The blocks of a run that this process may make.

    The main process begins the list of claims, before the others open it, and ends it when it leaves.

    Args:
        folder: run directory.
        state: from `join`.
    """

    def __init__(self, folder: Path, state: PartialState) -> None:
        self._path, self._alone, self._main = folder / _CLAIMS, state.num_processes == 1, state.is_main_process
        self._file: int | None = None

    def open(self) -> None:
        """Begin the list in the main process; the others open what is there.

        Raises:
            ValueError: the main process has another folder, as on a node that does not share its disk, or one whose
                file system has no locks.
        """
        if self._main:
            self._path.unlink(missing_ok=True)  # of a launch that was killed
        if self._alone:
            return
        try:
            self._file = os.open(self._path, os.O_RDWR | (os.O_CREAT if self._main else 0), 0o644)
        except FileNotFoundError:
            self._file = None
        if self._main:
            self._lock(_MAIN)
        elif self._file is None or self._lock(_MAIN):  # what nobody holds is not the list of the main process
            self.close()
            raise ValueError(
                f"`--out` must be one folder for all processes, on a file system with locks; {self._path.parent} on "
                f"{platform.node()} is not the folder of the main process. Give a path that all nodes share."
            )

    def take(self, number: int) -> bool:
        """Claim a block; False if another process has it, or the list was closed. A claim lasts until `drop`."""
        return self._alone or (self._lock(number) and self._listed())

    def drop(self, number: int) -> None:
        """Give up a claim, once the block is on disk."""
        if self._file is not None:
            _fcntl().lockf(self._file, _fcntl().LOCK_UN, 1, number)

    def wait_for(self, number: int, look: Callable[[], None]) -> None:
        """Claim a block for good, as soon as its owner has made it or has ended."""
        while not self.take(number):
            look()
            time.sleep(PAUSE)

    def wait_for_close(self) -> None:
        """Wait until the main process has closed the run.

        Raises:
            RuntimeError: it has ended without.
        """
        while self._file is not None and self._listed():
            if self._lock(_MAIN) and self._listed():
                raise RuntimeError(LEFT_ALONE)
            time.sleep(PAUSE)

    def close(self) -> None:
        """Leave; in the main process, end the list, so that nobody takes a block any more."""
        if self._file is not None:
            if self._main:
                self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Claims:
        """Return itself, opened later: by then the folder must be there."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave."""
        self.close()

    def _lock(self, byte: int) -> bool:
        assert self._file is not None
        try:
            _fcntl().lockf(self._file, _fcntl().LOCK_EX | _fcntl().LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):  # POSIX lets a system say either
            return False
        return True

    def _listed(self) -> bool:
        """Whether the list is still open: the main process removes its file."""
        assert self._file is not None
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self._path))
        except FileNotFoundError:
            return False


def _fcntl() -> Any:
    try:
        import fcntl
    except ImportError:
        raise ValueError("several processes need file locks, which this system lacks. Launch one process.") from None
    return fcntl


# When memory runs out: work on fewer images at once, and go on.


@dataclass
class PassSize:
    """How many images, tangents or cotangents go through the model at once; halved for good when memory runs out.

    Attributes:
        images: as things stand.
    """

    images: int

    def halve(self, tried: int) -> str:
        """Go on with half of what was tried; the memory that the failed attempt held is given back.

        Args:
            tried: how many were in the pass that did not fit.

        Returns:
            What to tell the user.
        """
        self.images = max(1, min(self.images, tried // 2))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return f"out of memory with {tried} at once; going on with {self.images} (--batch-size {self.images})"


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, Exception) and bool(should_reduce_batch_size(error))
    )
