"""Rows and float images on disk: whole shards, written beside and renamed, read back and merged into one list.

A shard of a match run is `matches/part-NNNNN.parquet` with `float/part-NNNNN.safetensors`, NNNNN being the place of its
first pair in the run's list; other analyses have other folders and columns (`Layout`). The parquet file is renamed
last: a shard exists when its parquet file does.
"""

from __future__ import annotations

import contextlib
import datasets
import errno
import hashlib
import io
import json
import os
import pyarrow.parquet as pq
from collections.abc import Iterator, Mapping, Sequence
from hf_equiv.runs import schema
from hf_equiv.runs.schema import Layout, MATCH, PROVENANCE_FEATURES, Row
from pathlib import Path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

_ERRORS = b"hf_equiv.errors"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or not there: beside, synced, renamed.

    Raises:
        OSError: the disk is full or cannot be written; no part of the file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"no space left to write {path.parent.name}/{path.name} ({len(data):,} bytes). Everything written "
                "before is kept: free some space and run the same command again, without --overwrite always",
            ) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_shard(
    folder: Path,
    index: int,
    rows: Sequence[Row],
    floats: Mapping[str, Tensor],
    costs: Row,
    layout: Layout = MATCH,
    errors: Mapping[str, str] | None = None,
) -> None:
    """Write finished rows and their float images as one shard.

    Args:
        folder: run directory.
        index: place of the first row's pair or image in the run's list.
        rows: all columns; the images as PNG bytes.
        floats: float match (3, H, W) by pair id; other analyses, which may have none, name theirs as they like.
        costs: evaluations by pair id, {"match": …, "refine": …}, kept in the metadata of the float file.
        layout: folder and columns.
        errors: why rows are of status `error`, by id, kept in the metadata of the parquet file.
    """
    float_file, shard = shard_paths(folder, index, layout)
    if floats or layout is MATCH:
        write_atomic(float_file, float_bytes(floats, costs))
    write_atomic(shard, shard_bytes(rows, layout, errors or {}))


def shard_bytes(rows: Sequence[Row], layout: Layout, errors: Mapping[str, str]) -> bytes:
    """The parquet file of rows; the same rows give the same bytes."""
    features = datasets.Features(
        {name: datasets.Image() for name in layout.images} | dict(layout.features) | PROVENANCE_FEATURES
    )
    cells = [
        row | {c: None if row[c] is None else {"bytes": row[c], "path": None} for c in layout.images} for row in rows
    ]
    table = datasets.Dataset.from_list([{k: row[k] for k in features} for row in cells], features=features).data.table
    table = table.combine_chunks()
    if errors:
        reasons = json.dumps(dict(errors), sort_keys=True, ensure_ascii=False)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _ERRORS: reasons.encode()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def float_bytes(floats: Mapping[str, Tensor], costs: Row) -> bytes:
    """The safetensors file of float images, with what they cost."""
    tensors = {name: image.detach().cpu().contiguous() for name, image in floats.items()}
    return save_tensors(tensors, metadata={"num_evals": json.dumps(costs, sort_keys=True)})


def shard_paths(folder: Path, index: int, layout: Layout = MATCH) -> tuple[Path, Path]:
    """Return (float file, parquet file) of the shard that starts with pair or image `index`."""
    return folder / "float" / f"part-{index:05d}.safetensors", folder / layout.folder / f"part-{index:05d}.parquet"


def shard_index(path: Path) -> int:
    """Place of a shard's first pair or image in the run's list, from the name of one of its files."""
    return int(path.name.lstrip(".").removeprefix("part-").partition(".")[0])


def shard_files(folder: Path, layout: Layout = MATCH) -> list[Path]:
    """The parquet files of a run directory, sorted."""
    return sorted(p for p in (folder / layout.folder).glob("*.parquet") if not p.name.startswith("."))


def read_shard(path: Path, *, images: bool = False, layout: Layout = MATCH) -> list[Row]:
    """Read the rows of one shard; with `images` the PNG files as bytes too.

    Returns:
        One dict per row.

    Raises:
        ValueError: the file is no shard of a run of this layout.
    """
    try:
        with pq.ParquetFile(path) as file:
            known = set(file.schema_arrow.names)
            columns = [*(layout.images if images else ()), *layout.features, *PROVENANCE_FEATURES]
            missing = [c for c in columns if c not in known]
            if missing:
                raise ValueError(f"columns {', '.join(missing)} are missing")
            rows: list[Row] = file.read(columns=columns).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        name = f"{path.parent.name}/{path.name}"
        raise ValueError(f"{name} is not a whole shard of a {layout.analysis} run: {error}") from error
    for row in rows if images else ():
        row.update({c: row[c]["bytes"] if isinstance(row[c], dict) else None for c in layout.images})
    return rows


def without_images(path: Path, layout: Layout = MATCH) -> bytes:
    """The rows of a shard with nothing in their image columns, and no column of another kind, as a parquet file."""
    rows = [row | dict.fromkeys(layout.images) for row in read_shard(path, layout=layout)]
    return shard_bytes(rows, layout, read_errors(path))


def unknown_columns(path: Path, layout: Layout = MATCH) -> list[str]:
    """Columns of a shard that no run of this layout has."""
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
    return [name for name in names if name not in {*layout.images, *layout.features, *PROVENANCE_FEATURES}]


def read_rows(folder: Path, *, images: bool = False, layout: Layout = MATCH, first: int | None = None) -> Iterator[Row]:
    """Read all rows, shard by shard, in no particular order; with `first`, those of that many pairs or images."""
    for path in shard_files(folder, layout):
        if first is None or shard_index(path) < first:  # a few more than asked for
            yield from read_shard(path, images=images, layout=layout)


def read_errors(path: Path) -> dict[str, str]:
    """Why rows of a shard are of status `error`, by id; only what was noted."""
    with pq.ParquetFile(path) as file:
        noted = (file.schema_arrow.metadata or {}).get(_ERRORS, b"{}")
    return dict(json.loads(noted))


def read_floats(path: Path) -> tuple[dict[str, Tensor], Row]:
    """Read a float file: the matches by pair id, and the evaluations of matching and refining by pair id.

    Returns:
        Images (3, H, W), and {"match": …, "refine": …}, both by pair id.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            costs = json.loads((file.metadata() or {}).get("num_evals", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, costs
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path.parent.name}/{path.name} cannot be read: {error}") from error


def read_costs(folder: Path) -> Row:
    """Evaluations of matching and refining of all pairs, by pair id."""
    costs: Row = {}
    for shard in shard_files(folder):
        float_file = folder / "float" / f"{shard.stem}.safetensors"
        with safe_open(float_file, framework="pt") as file:
            costs |= json.loads((file.metadata() or {}).get("num_evals", "{}"))
    return costs


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Put the small shards of a finished run into few files, the same whoever made the shards, and safe to kill.
#
# The rows of `file_items` consecutive pairs or images go into one file. It is written whole under a hidden name; then the
# shards that it replaces are deleted; then it gets its name. Killed in between, the run directory shows each row at most
# once, and `settle` completes the exchange: no row is lost or doubled.


FILE_ITEMS = 500
"""Most pairs or images of a merged file."""


FILE_BYTES = 100_000_000
"""Most bytes of a merged file and its float file, as far as images are counted, unless one item has more."""


_STAGED = ".merged"


def items_per_file(item_bytes: int) -> int:
    """How many pairs or images go into one file; it depends on their size alone, never on how they were made.

    Args:
        item_bytes: bytes of the images of one, at most.

    Returns:
        The number, at least 1.

    Example:
        >>> items_per_file(1_000_000)
        100
    """
    return max(1, min(FILE_ITEMS, FILE_BYTES // max(1, item_bytes)))


def merge_shards(folder: Path, layout: Layout, names: Sequence[str], file_items: int) -> None:
    """Merge the shards of a run whose rows are all there; what is merged already is left alone.

    Args:
        folder: run directory; nobody else may write into it.
        layout: folder and columns.
        names: ids of all pairs or images, in order.
        file_items: how many of them go into one file.
    """
    files: dict[int, list[Path]] = {}
    for path in shard_files(folder, layout):
        files.setdefault(shard_index(path) // file_items, []).append(path)
    for number, parts in sorted(files.items()):
        first = number * file_items
        wanted = list(names[first : first + file_items])
        there = [name for path in parts for name in _ids(path, layout)]
        merged = len(parts) == 1 and shard_index(parts[0]) == first and there == wanted
        if merged or sorted(there) != sorted(wanted):  # or cut by another version, at other places
            continue
        _stage(folder, layout, first, wanted, parts)
        settle(folder, layout)


def settle(folder: Path, layout: Layout) -> None:
    """Complete every exchange of shards for a merged file that was begun."""
    for staged in sorted((folder / layout.folder).glob(f".part-*.parquet{_STAGED}")):
        first, merged = shard_index(staged), set(_ids(staged, layout))
        for path in shard_files(folder, layout):
            inside = first <= shard_index(path) < first + len(merged)
            if inside and merged.issuperset(_ids(path, layout)):
                path.unlink()
                (folder / "float" / f"{path.stem}.safetensors").unlink(missing_ok=True)
        float_file, shard = shard_paths(folder, first, layout)
        if (hidden := _hidden(float_file)).exists():
            os.replace(hidden, float_file)
        os.replace(staged, shard)
    for leftover in (folder / "float").glob(f".part-*{_STAGED}"):  # its rows were never staged
        leftover.unlink()


def _stage(folder: Path, layout: Layout, first: int, names: Sequence[str], parts: Sequence[Path]) -> None:
    rows: dict[str, list[Row]] = {name: [] for name in names}
    floats: dict[str, Tensor] = {}
    costs: Row = {}
    errors: dict[str, str] = {}
    for path in parts:
        for row in read_shard(path, images=True, layout=layout):
            rows[row[layout.item]].append(row)
        errors |= read_errors(path)
        float_file = folder / "float" / f"{path.stem}.safetensors"
        if float_file.is_file():
            tensors, spent = read_floats(float_file)
            floats, costs = floats | tensors, costs | spent
    float_file, shard = shard_paths(folder, first, layout)
    if floats or layout is schema.MATCH:
        write_atomic(_hidden(float_file), float_bytes(floats, costs))
    data = shard_bytes([row for name in names for row in rows[name]], layout, errors)
    write_atomic(_hidden(shard), data)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}{_STAGED}")


def _ids(path: Path, layout: Layout) -> list[str]:
    """Ids of the pairs or images of a shard, in order, each once."""
    return list(dict.fromkeys(row[layout.item] for row in read_shard(path, layout=layout)))
