"""Read images from tables: local parquet files and Hub datasets, whole or streamed.

Reading one row of a parquet file or stream reads its whole row group, often 100 MB. Rows are therefore copied once, a
few at a time, into an Arrow file in the `datasets` cache, which gives access to single rows. The copy is named by its
contents, so that the next call or another process finds it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.arrow_writer import ArrowWriter
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.utils.file_utils import xopen
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from PIL import Image

from hf_equiv.data.folders import LABEL_COLUMNS
from hf_equiv.data.image_file import open_array, open_image
from hf_equiv.data.image_set import ImageSet, content_hash, file_digest
from hf_equiv.formatting import some
from hf_equiv.hub_client import api_of, checked, explained, hushed, misread, unusable_cache
from hf_equiv.limits import EXPANSION, MAX_BYTES, read_batches, rows_at_once, size_of

LARGE = 5_000_000_000  # bytes of files above which a dataset is streamed, if the number of images is known
DEFAULT_SPLITS = ("validation", "test", "train")

_ROWS = 16  # rows copied at once
# the errors of pyarrow are subclasses of the first; damaged metadata and odd dates cause the others
_UNREADABLE = (
    OSError, ValueError, LookupError, NotImplementedError, TypeError, AttributeError, OverflowError, RecursionError
)  # fmt: skip
_UNLOADABLE = (*_UNREADABLE, RuntimeError, datasets.exceptions.DatasetsError)


def load_parquet(
    name: str,
    paths: Sequence[Path],
    cache_dir: str | None,
    features: datasets.Features | None = None,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[datasets.Dataset, str]:
    """Open parquet files as one dataset; return it with a revision computed from their contents."""
    # With `features`, only these columns are read; `check` gets every row and refuses a bad one by a ValueError.
    revision = content_hash([p.name for p in paths], [file_digest(p) for p in paths], [None] * len(paths))

    def states() -> list[tuple[int, int]]:
        return [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths]

    def write(copy: Path) -> None:
        before = states()
        _copy(paths, copy, features, check)
        if before != states():
            raise ValueError("it was written to while it was read")

    copy = _place(revision.removeprefix("sha256:") + ("-checked" if check else ""), cache_dir)
    try:
        return _cached(copy, write), revision
    except _UNREADABLE as error:
        raise ValueError(f"parquet data {name!r} cannot be read: {_first_line(error)}. Check the file.") from error


def _place(key: str, cache_dir: str | None) -> Path:
    """Return the file of a table in the cache, whose folder is made."""
    copy = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "hf_equiv" / f"{key}.arrow"
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable_cache(error) from error
    return copy


def _cached(copy: Path, write: Callable[[Path], None]) -> datasets.Dataset:
    """Return the table in this file of the cache; `write` makes the file if it is not there."""
    if not copy.is_file():
        temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
        try:
            write(temporary)
            os.replace(temporary, copy)
        finally:
            temporary.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(copy))


def _copy(
    paths: Sequence[Path],
    to: Path,
    features: datasets.Features | None = None,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    schemas = []
    for path in paths:
        with path.open("rb") as stream:
            schemas.append(pq.read_schema(stream))
    known = {name for schema in schemas for name in schema.names}
    kept = datasets.Features({k: v for k, v in (features or {}).items() if k in known})
    with ArrowWriter(features=kept or datasets.Features.from_arrow_schema(schemas[0]), path=str(to)) as writer:
        for path, schema in zip(paths, schemas, strict=True):
            for batch in read_batches(path, [k for k in kept if k in schema.names] or None, rows=_ROWS):
                if check is not None:
                    for row in batch.to_pylist():
                        check(row)
                writer.write_table(pa.Table.from_batches([batch]))
        writer.finalize()


def refuse_swollen(paths: Sequence[Path], most: int) -> int:
    """Refuse parquet files that are damaged or larger than `most` bytes in memory; return the bytes that are left."""
    for path in paths:
        try:
            most -= sum(map(size_of, read_batches(path, rows=4, most=most)))
        except _UNREADABLE as error:
            raise ValueError(f"{path.name} cannot be shown: {_first_line(error)}.") from error
    return most


@hushed()
def load_hub_dataset(
    what: str, image_column: str | None, label_column: str | None, cache_dir: str | None, *,
    local_files_only: bool, most: int | None, streaming: bool,
) -> ImageSet:  # fmt: skip
    """Open `id[:config][:split]` at its current commit; fetch only `most` images if it is large or streamed."""
    repo_id, *parts = what.split(":")
    if len(parts) > 2:
        raise ValueError(f"a dataset must be named id[:config][:split]; got {what!r}.")
    offline = local_files_only or constants.is_offline_mode()
    if streaming and (offline or most is None):
        raise ValueError("`streaming` must come with the network and with `limit` or `pairs`. Add them.")
    revision = _revision(repo_id, cache_dir, offline)
    with explained(repo_id):
        config, split, choices = _choose(repo_id, revision, parts)
    name = f"{repo_id}:{config}:{split}"
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error repeats what the log says
    try:
        with explained(repo_id):
            if most is not None and not offline and (streaming or is_large(repo_id, config, revision)):
                rows, streaming = first_rows(repo_id, config, revision, split, most, cache_dir), True
                has_files = False  # the cells hold the files themselves
            else:
                how = datasets.DownloadConfig(local_files_only=offline, cache_dir=cache_dir)
                modes = iter([None, "force_redownload", "force_redownload"])  # again where a file arrived damaged
                builder = datasets.load_dataset_builder(
                    repo_id, config, revision=revision, cache_dir=cache_dir, download_config=how
                )
                _limit_memory(builder)
                prepare = partial(builder.download_and_prepare, download_config=how)
                checked(lambda: prepare(download_mode=next(modes)), repo_id, "dataset")
                rows, has_files = builder.as_dataset(split=split), isinstance(builder, FolderBasedBuilder)
    except _UNLOADABLE as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise ValueError(f"dataset {what!r} cannot be loaded: {_first_line(cause or error)}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
    images = table_images(rows, revision, name, image_column, label_column, _homes(repo_id, cache_dir, has_files))
    shown = f"{name}[:{most}]" if streaming else name
    return replace(images, data_id=shown, streamed=streaming, choices=choices + images.choices)


def is_large(repo_id: str, config: str, revision: str) -> bool:
    """Return whether the dataset card or its files state more than `LARGE` bytes."""
    info = datasets.load_dataset_builder(repo_id, config, revision=revision).info
    return (info.download_size or 0) > LARGE


def _limit_memory(builder: datasets.DatasetBuilder, *, streaming: bool = False) -> None:
    """Have a builder read parquet files in small parts, and refuse files that are far larger in memory than on disk."""
    if not isinstance(builder, Parquet):
        return
    read = builder._generate_tables
    builder.config.batch_size = 1  # the files of a stream are unknown before they are fetched

    def tables(files: Sequence[str], **more: Any) -> Iterator[Any]:
        sizes = [0 if streaming else os.path.getsize(file) for file in files]
        if not streaming:
            rows = (rows_at_once(pq.read_metadata(f), n, _ROWS) for f, n in zip(files, sizes, strict=True))
            builder.config.batch_size = min(rows)
        left = LARGE if streaming else max(MAX_BYTES, EXPANSION * sum(sizes))
        for key, table in read(files=files, **more):
            left -= table.nbytes
            if left < 0:
                raise ValueError("its parquet files are too large in memory for their size on disk")
            yield key, table

    builder._generate_tables = tables


def _homes(repo_id: str, cache_dir: str | None, has_files: bool) -> tuple[Path, ...]:
    """Return the folders of the cache that hold the image files of a dataset which consists of them."""
    own = f"datasets--{repo_id.replace('/', '--')}"
    hubs = [Path(place, own) for place in (cache_dir, constants.HF_HUB_CACHE) if place]
    downloads = [Path(place, "downloads") for place in (cache_dir, datasets.config.HF_DATASETS_CACHE) if place]
    return tuple(place.resolve() for place in hubs + downloads) if has_files else ()


def first_rows(
    repo_id: str, config: str, revision: str, split: str, count: int, cache_dir: str | None
) -> datasets.Dataset:
    """Fetch the first `count` rows of a split, in its own order, with every image as the bytes of its file."""

    def write(copy: Path) -> None:
        builder = datasets.load_dataset_builder(repo_id, config, revision=revision)
        _limit_memory(builder, streaming=True)
        stream, own = builder.as_streaming_dataset(split=split), isinstance(builder, FolderBasedBuilder)
        if stream.features is None:  # some formats need a first row
            stream = stream._resolve_features()
        images = [name for name, feature in stream.features.items() if isinstance(feature, datasets.Image)]
        features = datasets.Features(stream.features | dict.fromkeys(images, datasets.Image(decode=False)))
        home = f"hf://datasets/{repo_id}@{revision}/" if own else None
        with ArrowWriter(features=features, path=str(copy), writer_batch_size=_ROWS) as writer:
            for row in islice(stream.decode(False), count):
                writer.write(features.encode_example(row | {name: _with_bytes(row[name], home) for name in images}))
            writer.finalize()

    key = hashlib.sha256("\0".join([repo_id, config, revision, split, str(count)]).encode()).hexdigest()
    return _cached(_place(key, cache_dir), write)


def _with_bytes(cell: dict[str, Any] | None, home: str | None) -> dict[str, Any] | None:
    """Fetch the file of a cell if it is one of the files that the dataset consists of, below `home`."""
    if cell is None or cell.get("bytes") is not None:
        return cell and {"bytes": cell["bytes"], "path": None}
    path = cell.get("path") or ""
    if home is None or not re.fullmatch(rf"(zip://[^:]*::)?{re.escape(home)}[^:]*", path):
        return {"bytes": None, "path": "elsewhere" if path else None}
    with xopen(path, "rb") as stream:
        return {"bytes": stream.read(MAX_BYTES + 1), "path": None}


def table_images(
    dataset: datasets.Dataset, revision: str, name: str, image_column: str | None, label_column: str | None,
    inside: tuple[Path, ...] = (), names_in: Path | None = None,
) -> ImageSet:  # fmt: skip
    """Return the images of a table: files, or levels as lists of rows."""
    # A file in a cell is its bytes. Files elsewhere are opened only in the folders `inside`, to which `datasets` has
    # downloaded the files of the dataset itself, and by their names in a column of text in the folder `names_in`.
    column, found = _image_column(dataset, name, image_column)
    if len(dataset) == 0:
        raise ValueError(f"dataset {name!r} must hold images; it is empty.")
    if not _may_hold_images(dataset.data.schema.field(column).type):
        told = f"column {column!r} of {name!r} must hold images; got {dataset.features[column]}"
        raise ValueError(f"{told}. Store files as binary, or pixels as lists of rows.")
    cells = dataset.select_columns([column]).with_format("arrow")  # nothing is decoded here

    def read(index: int) -> Image.Image:
        where = f"{name} row {index}"
        try:
            cell = cells[index].column(0).to_pylist()[0]
        except _UNREADABLE as error:
            raise ValueError(f"{where} cannot be read ({_first_line(error)}). Correct it or drop the row.") from error
        if isinstance(cell, list):
            return open_array(cell, where)
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(content, bytes):
            return open_image(content, where)
        path = cell.get("path") if isinstance(cell, dict) else cell
        if not path:
            raise ValueError(f"{where} must hold an image; column {column!r} is empty there. Fill it or drop the row.")
        homes = inside
        if names_in is not None and isinstance(cell, str):
            path, homes = os.path.join(names_in, cell), (names_in.resolve(),)
        known = isinstance(path, str) and "\0" not in path
        if not known or not any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in homes):
            raise ValueError(
                f"{where} must hold an image; got the path of a file elsewhere, which is never opened. Store the bytes "
                "of the file, or its name in a column of text for files beside the table."
            )
        return open_image(path, where)

    ids = tuple(map(str, range(len(dataset))))
    told = f"taking image column {column!r} of {some(found, 8)}; `image_column` names another"
    choices = (told,) if not image_column and len(found) > 1 else ()
    labels, said = _labels(dataset, name, label_column)
    return ImageSet(name, revision, ids, labels, read, tabular=True, choices=choices + said)


def _may_hold_images(kind: pa.DataType) -> bool:
    """Return whether a column has files, names of files, or lists of rows."""
    if isinstance(kind, pa.ExtensionType):
        kind = kind.storage_type
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 or kind.get_field_index("path") >= 0
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(test(kind) for test in is_list):
        return any(test(kind.value_type) for test in is_list)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_large_string)
    return any(test(kind) for test in tests)


def _image_column(dataset: datasets.Dataset, name: str, wanted: str | None) -> tuple[str, list[str]]:
    """Return the image column, and all columns that hold images by type or else by name."""
    features = dataset.features
    found = [k for k, v in features.items() if isinstance(v, datasets.Image)]
    # without the metadata of `datasets`, an image column has this type
    found = found or [k for k, v in features.items() if isinstance(v, dict) and set(v) == {"bytes", "path"}]
    found = found or [k for k in ("image", "img", "jpg", "png") if k in features]
    column = wanted or next(iter(found), None)
    if column is None or column not in features:
        told = f"dataset {name!r} must have an image column{f' {column!r}' if column else ''}"
        raise ValueError(f"{told}; it has {some(features, 8)}. Name one with --image-column.")
    return column, found


def _labels(
    dataset: datasets.Dataset, name: str, label_column: str | None
) -> tuple[tuple[str | None, ...], tuple[str, ...]]:
    """Return the class of each row, and a sentence on each guess."""
    features = dataset.features
    if label_column is not None and label_column not in features:
        raise ValueError(f"dataset {name!r} must have a column {label_column!r}; it has {some(features, 8)}.")
    classes = [k for k, v in features.items() if isinstance(v, datasets.ClassLabel)]
    found = list(dict.fromkeys(k for k in (*classes, *LABEL_COLUMNS) if k in features))
    column = label_column or next(iter(found), None)
    if column is None:
        return (None,) * len(dataset), ()
    try:
        values = dataset.select_columns([column]).with_format("arrow")[:].column(0).to_pylist()
    except _UNREADABLE as error:
        told = f"column {column!r} of {name!r} must hold classes; it cannot be read ({_first_line(error)})"
        raise ValueError(f"{told}. Correct it, or name another with --label-column.") from error
    if column in classes:
        values = list(map(dict(enumerate(features[column].names)).get, values))
    labels = tuple(None if value is None or isinstance(value, list | dict) else str(value) for value in values)
    said = []
    if not label_column and len(found) > 1:
        said.append(f"taking label column {column!r} of {some(found, 8)}; `label_column` names another")
    if without := labels.count(None):
        said.append(f"rows without a class in column {column!r}: {without} of {len(labels)}")
    return labels, tuple(said)


def _revision(repo_id: str, cache_dir: str | None, offline: bool) -> str:
    """Return the current commit of a dataset, or the one in the cache."""
    find = partial(api_of(None).resolve_revision, repo_type="dataset", cache_dir=cache_dir, local_files_only=offline)
    try:
        with explained(repo_id, local_files_only=offline):
            return find(repo_id).resolved
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no file or folder here, and no name of a dataset ({error}).") from None
    except OSError as error:
        raise ValueError(str(error)) from error


def _choose(repo_id: str, revision: str, parts: list[str]) -> tuple[str, str, tuple[str, ...]]:
    """Choose configuration and split, and describe each default in a sentence; a single part may be either."""
    try:
        configs = datasets.get_dataset_config_names(repo_id, revision=revision)
        config = next((p for p in parts[:1] if p in configs), "default" if "default" in configs else configs[0])
        splits = datasets.get_dataset_split_names(repo_id, config, revision=revision)
    except Exception as error:  # the card may be of anybody, and its YAML reader raises many classes of errors
        if misread(error):
            raise  # `explained` says what that means
        raise ValueError(f"dataset {repo_id!r} cannot be opened: {_first_line(error)}") from error
    wanted = [p for p in parts if p != config]
    if len(wanted) > 1 or (wanted and wanted[0] not in splits):
        told = f"dataset {repo_id!r} has no {':'.join(parts)!r}; configurations: {', '.join(configs)}"
        raise ValueError(f"{told}; splits of {config!r}: {', '.join(splits)}.")
    split = next((s for s in (*wanted, *DEFAULT_SPLITS) if s in splits), splits[0])
    choices = []
    if config not in parts and len(configs) > 1:
        choices.append(f"taking configuration {config} of {some(configs, 8)}; name another as {repo_id}:CONFIG")
    if not wanted and len(splits) > 1:
        choices.append(f"taking split {split} of {some(splits, 8)}; name another as {repo_id}:{config}:SPLIT")
    return config, split, tuple(choices)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
