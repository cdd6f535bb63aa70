"""Read, write and merge shards: the files that hold the rows of a run and their float images.

A shard is `FOLDER/part-NNNNN.parquet` with `float/part-NNNNN.safetensors`, where NNNNN is the place of its first pair
or image in the run's list. The parquet file is written last: a shard exists when its parquet file does.

The shards of a finished run are merged into files of at most `FILE_ITEMS` pairs or images. A merged file is written
under a hidden name, the shards that it replaces are deleted, then it gets its name. After a kill in between, the run
shows each row at most once, and `settle` completes the exchange.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from hf_equiv.limits import read_batches, refuse_encrypted
from hf_equiv.png_file import check_png
from hf_equiv.results import Status
from hf_equiv.runs.schema import MATCH, PROVENANCE_FEATURES, Layout, Row, row_name

FILE_ITEMS = 500  # most pairs or images in a merged file
FILE_BYTES = 100_000_000  # most bytes of images in a merged file and its float file, unless a single item has more

_SHARD = re.compile(r"part-\d{5,}\.parquet")
_ERRORS = b"hf_equiv.errors"
_STAGED = ".merged"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a temporary file, sync it and rename it, so that the file is whole or not there; make one folder for it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)  # not its parents: a run directory that has been moved is not made again
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise gone(path.parent) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"no space left to write {path.parent.name}/{path.name} ({len(data):,} bytes). Everything written "
                "before is kept: free some space and run the same command again, without --overwrite always",
            ) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def gone(folder: Path) -> OSError:
    """Return the error for a folder that is no longer there."""
    told = f"folder {str(folder)!r} has been renamed, replaced or deleted while it was written"
    return FileNotFoundError(f"{told}. Nothing more was written; put it back and run the same command again.")


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    if path.stat().st_size == 0:  # files of the kernel, to which a link can lead, may never end
        return hashlib.sha256().hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shard_path(folder: Path, index: int, layout: Layout = MATCH) -> Path:
    """Return the parquet file of the shard that starts with pair or image `index`."""
    return folder / layout.folder / f"part-{index:05d}.parquet"


def float_file(shard: Path) -> Path:
    """Return the float file that belongs to a parquet file."""
    return shard.parents[1] / "float" / f"{shard.stem}.safetensors"


def shard_index(path: Path) -> int:
    """Return the place of a shard's first pair or image in the run's list, from a file name."""
    return int(path.name.lstrip(".").removeprefix("part-").partition(".")[0])


def shard_files(folder: Path, layout: Layout = MATCH) -> list[Path]:
    """Return the parquet files of a run directory, sorted."""
    found = (p for p in (folder / layout.folder).glob("part-*.parquet") if _SHARD.fullmatch(p.name))
    return sorted(p for p in found if p.is_file() or not p.exists())  # to open a pipe would wait for its writer


def write_shard(
    folder: Path,
    index: int,
    rows: Sequence[Row],
    floats: Mapping[str, Tensor],
    costs: Row,
    layout: Layout = MATCH,
    errors: Mapping[str, str] | None = None,
    *,
    staged: bool = False,
) -> None:
    """Write finished rows, with images as PNG bytes, and their float images as one shard."""
    # `index` is the place of the first pair or image in the run's list. The name of a float image is the pair id in a
    # match run and `IMAGE_ID/NAME` elsewhere. `costs` and `errors` (reasons of rows of status `error`) are keyed by id.
    # A `staged` shard has hidden names, which `settle` replaces.
    shard = shard_path(folder, index, layout)
    place = _hidden if staged else Path
    if floats or layout is MATCH:
        write_atomic(place(float_file(shard)), float_bytes(floats, costs))
    write_atomic(place(shard), shard_bytes(rows, layout, errors or {}))


def shard_bytes(rows: Sequence[Row], layout: Layout, errors: Mapping[str, str]) -> bytes:
    """Return the parquet file of rows; the same rows give the same bytes."""
    features = layout.all_features
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
    """Return the safetensors file of float images and their evaluations."""
    tensors = {name: image.detach().cpu().contiguous() for name, image in floats.items()}
    return save_tensors(tensors, metadata={"num_evals": json.dumps(costs, sort_keys=True)})


@contextlib.contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    with path.open("rb") as stream, pq.ParquetFile(stream) as file:  # pyarrow takes no path such as `a:b/c`
        refuse_encrypted(file.metadata)
        yield file


def read_shard(path: Path, *, images: bool = False, layout: Layout = MATCH) -> list[Row]:
    """Read the rows of one shard, with `images` also the PNG files; raise a ValueError if it is no such shard."""
    try:
        with _open(path) as file:
            there = file.schema_arrow.names
        own = layout.of_file(there)
        columns = [*(own.images if images else ()), *own.features, *PROVENANCE_FEATURES]
        if missing := [c for c in columns if c not in there]:
            raise ValueError(f"columns {', '.join(missing)} are missing")
        read = (row for batch in read_batches(path, columns, rows=1024) for row in batch.to_pylist())
        order = [*(layout.images if images else ()), *layout.features, *PROVENANCE_FEATURES]
        rows: list[Row] = [{c: row.get(c) for c in order} for row in read]
        for row in rows if images else ():
            open_cells(row, layout)
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        name = f"{path.parent.name}/{path.name}"
        told = f"{name} is not a whole shard of a {layout.analysis} run: {str(error).rstrip('.')}"
        raise ValueError(f"{told}. Restore it, or delete it and run the same command again.") from error
    return rows


def open_cells(row: Row, layout: Layout) -> Row:
    """Put the PNG files of a row, None where photos are withheld, in place of its cells; open no path of a file."""
    for column in layout.images:
        cell = row.get(column)
        if cell is not None:
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            if not isinstance(cell, dict) or cell.get("path") is not None or not isinstance(content, bytes | None):
                raise ValueError(f"column {column!r} must hold PNG files, not paths of files or something else")
            row[column] = content
    return row


def check_pictures(row: Row, layout: Layout) -> None:
    """Refuse a row whose images are not PNG files that hold pixels alone; images that are withheld are None."""
    for column in layout.images:
        try:
            if row.get(column) is not None:
                check_png(row[column])
        except ValueError as error:
            raise ValueError(f"row {row_name(layout.analysis, row)!r}, {column}: {error}") from error


def read_rows(folder: Path, *, images: bool = False, layout: Layout = MATCH, first: int | None = None) -> Iterator[Row]:
    """Read all rows, shard by shard; with `first`, only shards that start before that place of the run's list."""
    for path in shard_files(folder, layout):
        if first is None or shard_index(path) < first:
            yield from read_shard(path, images=images, layout=layout)


def ids_of(folder: Path, layout: Layout, *, failed: bool = False) -> set[str]:
    """Return the ids of the pairs or images on disk, or only of those with a row of status `error`."""
    rows = read_rows(folder, layout=layout)
    return {row[layout.item] for row in rows if not failed or row["status"] == Status.ERROR}


def without_images(path: Path, layout: Layout = MATCH) -> bytes:
    """Return a shard with empty image columns and the columns of its layout only, as a parquet file."""
    rows = [row | dict.fromkeys(layout.images) for row in read_shard(path, layout=layout)]
    return shard_bytes(rows, layout, read_errors(path))


def faults_of_schema(path: Path, layout: Layout, errors: Mapping[str, str] | None) -> Iterator[tuple[str, str]]:
    """Yield the columns and metadata of a shard that are not those of its layout, and what is wrong with them."""
    with _open(path) as file:
        schema, footer = file.schema_arrow, file.metadata
    metadata, wanted = dict(footer.metadata or {}), layout.of_file(schema.names).all_features.arrow_schema
    for name in sorted({*schema.names} - {*wanted.names}):
        yield name, f"column {name!r} is not one of a {layout.analysis} run"
    if {*schema.names} == {*wanted.names} and schema.names != wanted.names:
        yield "columns", f"the columns must be those of a {layout.analysis} run in their order, each once"
    for field, right in zip(schema, wanted, strict=True) if schema.names == wanted.names else ():
        if (field.type, field.nullable) != (right.type, right.nullable):
            yield field.name, f"column {field.name!r} must have the type {right.type}; got {field.type}"
    if any({*(field.metadata or {})} - {b"PARQUET:field_id"} for field in schema):
        yield "metadata", "the columns of the file have metadata"
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    packed = sum(group.column(i).total_compressed_size for group in groups for i in range(group.num_columns))
    with path.open("rb") as stream:
        head = stream.read(4)  # which pyarrow does not look at
    if head != b"PAR1" or len(head) + packed + footer.serialized_size + len(b"sizePAR1") != path.stat().st_size:
        yield "file", "the file holds bytes that belong to no column"
    metadata.pop(b"ARROW:schema", None)  # compared above
    own = _object(metadata.pop(_ERRORS, b"{}"))
    if {name: errors.get(name) for name in own} != own if isinstance(errors, dict) else own:
        yield "errors", "the reasons of rows of status error are not those of run.json"
    read = _object(metadata.pop(b"huggingface", b"{}"))
    if metadata or read != json.loads(wanted.metadata[b"huggingface"]):
        yield "metadata", "the metadata of the file state other columns, or more than columns"


def read_errors(path: Path) -> dict[str, str]:
    """Return the stored reasons of a shard's rows of status `error`, by id."""
    with _open(path) as file:
        return _object((file.schema_arrow.metadata or {}).get(_ERRORS, b"{}"))


def _object(text: bytes | str) -> Row:
    """Read the JSON object in the metadata of a file; a ValueError says what else is there."""
    try:
        made = json.loads(text)
    except RecursionError:
        raise ValueError("its metadata are nested too deeply") from None
    if not isinstance(made, dict):
        raise ValueError("its metadata must be an object of JSON")
    return made


def read_floats(path: Path) -> tuple[dict[str, Tensor], Row]:
    """Read a float file: images (3, H, W) by name, and the evaluations {"match": …, "refine": …} by pair id."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, _costs(file.metadata())
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path.parent.name}/{path.name} cannot be read: {error}") from error


def read_first_floats(folder: Path, shown: int, kind: str) -> dict[str, Tensor]:
    """Return the float images `ID/KIND` of the shards with the first `shown` images of a run."""
    found: dict[str, Tensor] = {}
    for path in sorted((folder / "float").glob("part-*.safetensors")):
        if path.is_file() and shard_index(path) < shown:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.rpartition("/")[2] == kind]
                found |= {name: file.get_tensor(name) for name in names}
    return found


def read_costs(folder: Path) -> Row:
    """Return the evaluations of matching and refining, by pair id; none where the float files are withheld."""
    costs: Row = {}
    for path in filter(Path.is_file, map(float_file, shard_files(folder))):
        with safe_open(path, framework="pt") as file:
            costs |= _costs(file.metadata())
    return costs


def _costs(metadata: Mapping[str, str] | None) -> Row:
    if more := {*(metadata or {})} - {"num_evals"}:
        raise ValueError(f"its metadata hold {min(more)!r}, which is not of a run")
    costs = _object((metadata or {}).get("num_evals", "{}"))
    numbers: list[Any] = [n for one in costs.values() for n in (one.values() if isinstance(one, dict) else [None])]
    if not all(type(n) in (int, float) and 0 <= n < math.inf for n in numbers):
        raise ValueError("its evaluations must be numbers")
    return costs


def read_items(
    paths: Sequence[Path], layout: Layout, names: Sequence[str]
) -> tuple[list[Row], dict[str, Tensor], Row, dict[str, str]]:
    """Return the rows of some pairs or images in order, their float images, evaluations, and reasons of errors."""
    rows: dict[str, list[Row]] = {name: [] for name in names}
    floats: dict[str, Tensor] = {}
    costs: Row = {}
    errors: dict[str, str] = {}
    for path in paths:
        for row in read_shard(path, images=True, layout=layout):
            check_pictures(row, layout)
            if row[layout.item] in rows:
                rows[row[layout.item]].append(row)
        errors |= read_errors(path)
        if float_file(path).is_file():
            tensors, spent = read_floats(float_file(path))
            floats, costs = floats | tensors, costs | spent
    floats = {key: x for key, x in floats.items() if (key if layout is MATCH else key.rpartition("/")[0]) in rows}
    costs, errors = ({key: value for key, value in of.items() if key in rows} for of in (costs, errors))
    return [row for name in names for row in rows[name]], floats, costs, errors


def items_per_file(item_bytes: int) -> int:
    """Return the number of pairs or images in a merged file, from the bytes of the images of one item."""
    return max(1, min(FILE_ITEMS, FILE_BYTES // max(1, item_bytes)))


def merge_shards(folder: Path, layout: Layout, names: Sequence[str], file_items: int) -> None:
    """Merge the shards of a finished run into files of `file_items` items, however they were cut; under the lock."""
    files: dict[int, list[Path]] = {}
    for path in shard_files(folder, layout):
        files.setdefault(shard_index(path) // file_items, []).append(path)
    for number, parts in sorted(files.items()):
        first = number * file_items
        wanted = list(names[first : first + file_items])
        there = [name for path in parts for name in names_in(path, layout)]
        merged = len(parts) == 1 and shard_index(parts[0]) == first and there == wanted
        if merged or sorted(there) != sorted(wanted):  # already merged, or cut differently by another version
            continue
        rows, floats, costs, errors = read_items(parts, layout, wanted)
        write_shard(folder, first, rows, floats, costs, layout, errors, staged=True)
        settle(folder, layout)


def settle(folder: Path, layout: Layout) -> None:
    """Complete every exchange of shards for a merged file that a killed process has begun."""
    for staged in sorted((folder / layout.folder).glob(f".part-*.parquet{_STAGED}")):
        first, merged = shard_index(staged), set(names_in(staged, layout))
        for path in shard_files(folder, layout):
            inside = first <= shard_index(path) < first + len(merged)
            if inside and merged.issuperset(names_in(path, layout)):
                path.unlink()
                float_file(path).unlink(missing_ok=True)
        shard = shard_path(folder, first, layout)
        if (hidden := _hidden(float_file(shard))).exists():
            os.replace(hidden, float_file(shard))
        os.replace(staged, shard)
    for leftover in (folder / "float").glob(f".part-*{_STAGED}"):  # the rows of these were never staged
        leftover.unlink()


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}{_STAGED}")


def names_in(path: Path, layout: Layout) -> list[str]:
    """Return the ids of the pairs or images of a shard, in order, each once."""
    return list(dict.fromkeys(row[layout.item] for row in read_shard(path, layout=layout)))
