"""Runs that are killed, run in processes of their own, and compared."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import torch

from hf_equiv.runs import shards

ROOT = Path(__file__).parents[1]
COMMAND = "import sys; from hf_equiv.cli.main import main; main(sys.argv[1:])"
"""Script of the command line."""
SCRIPT = """
    import os, runpy, sys
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Script that carries out the file that is its first argument."""
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [f"hf_equiv.{name}" for name in ("cli.main", "analyses", "models.encoder", "hub.publish")]
)


class KilledError(BaseException):
    """What a kill looks like from inside: nothing after it is done."""


@contextmanager
def killed_after(steps: int, monkeypatch):
    """Let this many files be renamed or removed; the next one is the kill."""
    left = iter(range(steps))

    def count(real):
        def call(*arguments, **options):
            if next(left, None) is None:
                raise KilledError
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", count(os.replace))
        patch.setattr(Path, "unlink", count(Path.unlink))
        yield


def rows_of(out: Path) -> dict[str, dict]:
    rows = list(shards.read_rows(out, images=True))
    assert len({row["pair_id"] for row in rows}) == len(rows), "a row is there twice"
    return {row["pair_id"]: {k: v for k, v in row.items() if k != "seconds"} for row in rows}


def files_of(out: Path) -> dict[str, bytes]:
    """Bytes of all files of rows, with `seconds` set to 0."""
    found = {path.name: path.read_bytes() for path in sorted((out / "float").iterdir())}
    for path in sorted((out / "matches").iterdir()):
        table = pq.read_table(path)
        seconds = table.column_names.index("seconds")
        table = table.set_column(seconds, table.schema.field(seconds), [[0.0] * len(table)])
        pq.write_table(table, out.parent / "plain.parquet")
        found[path.name] = (out.parent / "plain.parquet").read_bytes()
    return found


class Process:
    """A script in a process of its own: the fork of one that has imported the package, and computed nothing yet."""

    def __init__(self, script: str, *arguments: object, cwd: Path | None = None, **environment: str) -> None:
        self._told = tempfile.TemporaryDirectory()
        given = script, [str(a) for a in arguments], environment, cwd or Path.cwd(), Path(self._told.name)
        self._child = _FORKS.Process(target=_carry_out, args=given)
        self._child.start()

    def runs(self) -> bool:
        return self._child.is_alive()

    def kill(self) -> subprocess.CompletedProcess:
        """Without a chance to say or to clear up anything."""
        self._child.kill()
        return self.end()

    def end(self) -> subprocess.CompletedProcess:
        """Wait for it."""
        self._child.join(timeout=300)
        assert not self.runs(), "it hangs"
        out, err = ((Path(self._told.name) / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess([], self._child.exitcode, out, err)


def _carry_out(script: str, arguments: list[str], environment: dict[str, str], cwd: Path, told: Path) -> None:
    os.environ |= environment
    os.chdir(cwd)
    tempfile.tempdir = None  # which TMPDIR may name
    torch.set_num_threads(1)
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(told / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        setattr(sys, f"std{name}", open(number, "w", buffering=1, closefd=False))
    sys.argv = ["-c", *arguments]
    exec(compile(textwrap.dedent(script), "<script>", "exec"), {"__name__": "__main__"})


def python(script: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    return Process(script, *arguments, **options).end()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
