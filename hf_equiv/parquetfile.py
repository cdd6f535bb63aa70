"""Local parquet files as one table on disk, whatever their size (private helper of `hf_equiv.data`).

A row of a parquet file cannot be read alone: its row group, often 100 MB, comes along. So the rows are copied once, a
few at a time (at least a page: a megabyte in files that `datasets` wrote), into an Arrow file in the cache of
`datasets`, from which each is read where it lies. The copy is named by the contents: the next call, or another process,
finds it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast

_ROWS = 16
"""Rows that are copied at once."""

_BUFFER = 1 << 20
"""Bytes of a column that are read at once."""


def load_parquet(name: str, paths: Sequence[Path], revision: str, cache_dir: str | None) -> datasets.Dataset:
    """Open parquet files as one dataset; memory grows with the pages of a file, not with its size.

    Args:
        name: what the set is called in messages.
        paths: of the files, in order.
        revision: "sha256:…" of their contents.
        cache_dir: where the copy is kept; by default the cache of `datasets`.

    Returns:
        The dataset, images not decoded yet.

    Raises:
        ValueError: a file is damaged, the files do not fit together, or one is being written.
    """
    place = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "hf_equiv"
    copy = place / f"{revision.removeprefix('sha256:')}.arrow"
    try:
        if not copy.is_file():
            before = [_state(path) for path in paths]
            beside = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
            try:
                place.mkdir(parents=True, exist_ok=True)
                _copy(paths, beside)
                if before != [_state(path) for path in paths]:
                    raise ValueError("it was written to while it was read")
                os.replace(beside, copy)
            finally:
                beside.unlink(missing_ok=True)
        return datasets.Dataset.from_file(str(copy))
    except (OSError, ValueError, KeyError, NotImplementedError) as error:  # pyarrow's errors are subclasses of these
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"parquet data {name!r} cannot be read: {why}. Check the file.") from error


def refuse_swollen(path: Path, most: int) -> None:
    """Refuse a parquet file whose columns are larger than `most` bytes once they are read, a few rows at a time.

    Raises:
        ValueError: it is larger, or damaged.
    """
    try:
        with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            size = 0
            for batch in file.iter_batches(batch_size=4):
                size += batch.nbytes
                if size > most:
                    raise ValueError(f"it must be at most {most / 2**20:.0f} MiB once it is read")
    except (OSError, ValueError, NotImplementedError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"{path.name} cannot be shown: {why}.") from error


def _copy(paths: Sequence[Path], to: Path) -> None:
    schema = _schema(paths[0])
    with to.open("wb") as stream, pa.ipc.new_stream(stream, schema) as writer:
        for table in _tables(paths):
            writer.write_table(table_cast(table, schema))


def _schema(path: Path) -> pa.Schema:
    """Columns as `datasets` knows them, with its metadata."""
    return datasets.Features.from_arrow_schema(pq.read_schema(path)).arrow_schema


def _tables(paths: Sequence[Path]) -> Iterator[pa.Table]:
    for path in paths:
        with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                yield pa.Table.from_batches([batch])


def _state(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns
