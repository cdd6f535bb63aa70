"""State the limit of what is read from files, and read parquet files within it.

An image has at most `MAX_PIXELS`. A file, the cell of a table and a table that is far larger in memory than on disk
have at most `MAX_BYTES`, the size of such an image in 16-bit RGB. The limit is the same for photos, tables, uploads,
and the images of stored runs. A `run.json` has at most `MAX_RECORD`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MAX_PIXELS = 178_956_970  # Pillow's own limit
MAX_BYTES = 6 * MAX_PIXELS
MAX_RECORD = 100_000_000  # bytes; JSON takes up to 20 times as much in memory
EXPANSION = 20  # a table may take `MAX_BYTES`, or so many times the size of its file

_BUFFER = 1 << 20  # bytes of a column that are read at once
_CELL = 60  # bytes of a cell in a row of Python
_WIDTHS = {"BOOLEAN": 1, "INT64": 8, "DOUBLE": 8}  # bytes of a value in memory; of the other types 4


def read_batches(
    path: Path, columns: Sequence[str] | None = None, *, rows: int = 16, most: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Read a parquet file in batches of at most `rows`, and refuse one that takes more than `most` bytes in memory."""
    on_disk = path.stat().st_size
    most, size = max(MAX_BYTES, EXPANSION * on_disk) if most is None else most, 0
    with path.open("rb") as stream, pq.ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False) as file:
        rows = rows_at_once(file.metadata, on_disk, rows, most, columns)
        for batch in file.iter_batches(rows, columns=columns):
            size += size_of(batch)
            if size > most:
                raise _too_large(on_disk, most)
            yield batch


def rows_at_once(
    metadata: pq.FileMetaData, on_disk: int, rows: int, most: int | None = None, columns: Sequence[str] | None = None
) -> int:
    """Return the number of rows to read at once, at most `rows`; refuse a file that states to be too large."""
    most = max(MAX_BYTES, EXPANSION * on_disk) if most is None else most
    refuse_encrypted(metadata)
    total = repeated = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            if columns is None or column.path_in_schema.partition(".")[0] in columns:
                packed = column.total_uncompressed_size
                total += max(packed, column.num_values * _WIDTHS.get(column.physical_type, 4), _CELL * group.num_rows)
                repeated = max(repeated, packed if column.has_dictionary_page else 0)
    if total > most:
        raise _too_large(on_disk, most)
    # A dictionary is stored once for all rows that repeat its values, so a few rows can be large.
    return max(1, min(rows, MAX_BYTES // max(1, 2 * repeated)))


def refuse_encrypted(metadata: pq.FileMetaData) -> None:
    """Refuse a file with an encrypted column, whose sizes pyarrow cannot tell: it would end the process."""
    reader = pq.ParquetFile(pa.BufferReader(b""), metadata=metadata).reader  # without data, only the key is looked for
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            try:
                next(reader.iter_batches(1, row_groups=[group], column_indices=[column]), None)
            except (OSError, pa.ArrowException) as error:
                if "decrypt" in str(error):
                    raise ValueError(f"column {metadata.schema.column(column).path!r} is encrypted") from error


def size_of(batch: pa.RecordBatch) -> int:
    """Return the bytes that the rows of a batch take in memory."""
    return sum(max(_size(column), _CELL * len(column)) for column in batch.columns)


def _size(values: pa.Array) -> int:
    """Return the bytes of an array, where those of repeated values are written out."""
    if isinstance(values, pa.StructArray):
        return values.nbytes - sum(part.nbytes - _size(part) for part in values.flatten())
    if not isinstance(values, pa.DictionaryArray):
        return int(values.nbytes)
    each = values.dictionary.nbytes // max(1, len(values.dictionary))
    if hasattr(values.dictionary, "total_values_length"):  # text or bytes
        each = pc.max(pc.binary_length(values.dictionary)).as_py() or 0
    return len(values) * int(each)


def _too_large(on_disk: int, most: int) -> ValueError:
    told = f"it must take at most {most / 2**20:,.0f} MiB once it is read; its file has {on_disk / 2**20:,.1f} MiB"
    return ValueError(told)
