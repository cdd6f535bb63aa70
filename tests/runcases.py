"""Runs that are killed, run in processes of their own, and compared."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq

from hf_equiv.runs import shards

ROOT = Path(__file__).parents[1]


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


def python(script: str, *arguments, **options) -> subprocess.CompletedProcess:
    here = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(here), "OMP_NUM_THREADS": "1"} | options
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
