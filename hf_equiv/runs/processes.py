"""Share the blocks of a run among several processes, and pass fewer images through the model when memory runs out.

A process takes a block by locking its byte of the file `.claims` in the run directory. The system frees the lock when
the process ends, also after a kill: then another process takes over its block.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from hf_equiv.runs.directory import unwritable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Block = Sequence[Any]  # pairs or images that are made together, as one shard; each has its place in the list as `index`
PAUSE = 0.1  # seconds between two looks at the work of another process

LEFT_ALONE = "the main process has ended before the run was closed. Its rows are kept: run the same command again."

_CLAIMS = ".claims"
_MAIN = 1 << 40  # the byte that the main process holds while it lives


def join(device: torch.device) -> PartialState:
    """Join the other processes of a launcher (torchrun, `accelerate launch`, `notebook_launcher`), if any."""
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    state = PartialState(cpu=device.type == "cpu")
    if wanted != state.num_processes:
        raise ValueError(
            f"{wanted} processes were started but they do not see each other (each thinks it is one of "
            f"{state.num_processes}). Launch with `accelerate launch --multi_gpu --num_processes {wanted} -m hf_equiv`."
        )
    if wanted > 1 and fcntl is None:
        raise ValueError("several processes need file locks, which this system lacks. Launch one process.")
    return state


def meet(state: PartialState) -> None:
    """Wait until every process arrives; raise a RuntimeError if one has ended."""
    try:
        state.wait_for_everyone()
    except RuntimeError as error:  # raised by any communication library
        raise RuntimeError(
            "another process of this run has ended before the work was shared. Its own message says why; nothing was "
            "lost: run the same command again."
        ) from error


def describe(state: PartialState, blocks: Sequence[Block], what: str) -> str:
    """Return a sentence on the number of processes under a launcher; else nothing."""
    count, left = state.num_processes, sum(map(len, blocks))
    if count > 1:
        return f"{count} processes share {left} {what}"
    if any(name.startswith("ACCELERATE_") for name in os.environ):  # `accelerate launch --cpu` starts one, silently
        return f"1 process works on {left} {what}; for more, launch with --multi_gpu --num_processes N (also on a CPU)"
    return ""


def cut_blocks(items: Sequence[Any], size: int, processes: int, file_items: int) -> list[Block]:
    """Cut a list into blocks of at most `size`, each within one merged file of `file_items`."""
    blocks: list[Block] = []
    at = 0
    while at < len(items):
        # with several processes the last blocks are smaller, so that all end soon
        fair = size if processes == 1 else max(1, min(size, (len(items) - at) // (2 * processes)))
        file = items[at].index // file_items
        block = [item for item in items[at : at + fair] if item.index // file_items == file]
        blocks.append(block)
        at += len(block)
    return blocks


class Claims:
    """Claim blocks of a run for this process, inside a `with` statement.

    The main process creates the file of claims before the others open it. It deletes the file at the end; after that no
    process can claim a block. A single process needs no file. A ValueError says that this folder is not the folder of
    the main process, as on a node that does not share its disk, or that its file system has no locks.
    """

    def __init__(self, folder: Path, state: PartialState) -> None:
        self._path, self._main = folder / _CLAIMS, state.is_main_process
        self._alone = state.num_processes == 1
        self._file = -1

    def __enter__(self) -> Claims:
        """Create the file in the main process; open it in the others."""
        if self._main:
            self._path.unlink(missing_ok=True)  # a killed launch may have left it
        if self._alone:
            return self
        with contextlib.suppress(FileNotFoundError):
            self._file = os.open(self._path, os.O_RDWR | (os.O_CREAT if self._main else 0), 0o644)
        if self._main:
            self._lock(_MAIN)
        elif self._file < 0 or self._lock(_MAIN):  # nobody holds the byte: this is not the file of the main process
            self.__exit__()
            raise ValueError(
                f"`--out` must be one folder for all processes, on a file system with locks; {self._path.parent} on "
                f"{platform.node()} is not the folder of the main process. Give a path that all nodes share."
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file; the main process deletes it."""
        if self._file >= 0:
            if self._main:
                self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def take(self, number: int) -> bool:
        """Claim a block until `drop`; False if another process has it, or the main process has left."""
        return self._alone or (self._lock(number) and self._is_open())

    def drop(self, number: int) -> None:
        """Give up a claim, once the block is on disk."""
        if not self._alone:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    def wait_for(self, number: int, look: Callable[[], None]) -> None:
        """Claim a block for good, as soon as its owner has made it or has ended."""
        while not self.take(number):
            look()
            time.sleep(PAUSE)

    def wait_for_close(self) -> None:
        """Wait until the main process has left; raise a RuntimeError if it was killed."""
        while self._is_open():
            if self._lock(_MAIN) and self._is_open():
                raise RuntimeError(LEFT_ALONE)
            time.sleep(PAUSE)

    def _lock(self, byte: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):  # POSIX allows both
            return False
        except OSError as error:
            raise unwritable(self._path.parent, error, "locked") from error
        return True

    def _is_open(self) -> bool:
        """Return whether the file of claims is still there."""
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self._path))
        except FileNotFoundError:
            return False


def fewer_at_once(tried: int) -> int:
    """Free the memory of a pass that was too large, and return half of the images, tangents or cotangents tried."""
    clear_device_cache(garbage_collection=True)
    return tried // 2


def ran_out(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or a CPU."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, Exception) and bool(should_reduce_batch_size(error)))
