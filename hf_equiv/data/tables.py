"""Hub datasets, and the image column of any table, read through `datasets` (private helper of `hf_equiv.data`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast
from datasets.utils.file_utils import xopen
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from PIL import Image

from hf_equiv.data.image_file import open_image
from hf_equiv.data.image_set import ImageSet
from hf_equiv.hub_client import hushed

# Local parquet files as one table on disk, whatever their size (private helper of `hf_equiv.data`).
#
# A row of a parquet file cannot be read alone: its row group, often 100 MB, comes along. So the rows are copied once, a
# few at a time (at least a page: a megabyte in files that `datasets` wrote), into an Arrow file in the cache of
# `datasets`, from which each is read where it lies. The copy is named by the contents: the next call, or another
# process, finds it.


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


# The first rows of a large Hub dataset, without downloading the rest (private helper of `hf_equiv.data`).
#
# The encoded files go into the cache of `datasets` as one Arrow file, which is read from disk image by image: memory
# does not grow with the number of images, and the next call, or another process, finds them there.


_UNREAD = datasets.Image(decode=False)


LARGE = 5_000_000_000
"""Bytes of a dataset's files above which it is streamed, where a number of images was asked for."""


def is_large(repo_id: str, config: str, revision: str) -> bool:
    """Whether the dataset card or its files say that a split comes with more than `LARGE` bytes."""
    info = datasets.load_dataset_builder(repo_id, config, revision=revision).info
    return (info.download_size or 0) > LARGE


def first_rows(
    repo_id: str, config: str, revision: str, split: str, count: int, cache_dir: str | None
) -> datasets.Dataset:
    """Take the first `count` rows of a split, in its own order, with every image as the bytes of its file.

    Returns:
        The rows, on disk.
    """
    options = {"repo_id": repo_id, "config": config, "revision": revision, "split": split}
    features = datasets.Features(
        {k: _UNREAD if isinstance(v, datasets.Image) else v for k, v in _stream(**options).features.items()}
    )
    return datasets.Dataset.from_generator(
        _rows, features=features, cache_dir=cache_dir, gen_kwargs=options | {"count": count}
    )


def _stream(repo_id: str, config: str, revision: str, split: str) -> datasets.IterableDataset:
    stream = datasets.load_dataset(repo_id, config, split=split, revision=revision, streaming=True)
    return stream if stream.features is not None else stream._resolve_features()  # of some formats, from a first row


def _rows(repo_id: str, config: str, revision: str, split: str, count: int) -> Iterator[dict[str, Any]]:
    stream = _stream(repo_id, config, revision, split)
    images = [name for name, feature in stream.features.items() if isinstance(feature, datasets.Image)]
    for row in islice(stream.decode(False), count):
        yield row | {name: _with_bytes(row[name]) for name in images}


def _with_bytes(cell: dict[str, Any] | None) -> dict[str, Any] | None:
    """The bytes of an image that is a file of its own on the Hub."""
    if cell is None or cell.get("bytes") is not None or not cell.get("path"):
        return cell
    if "hf://" not in cell["path"]:  # a file of this machine or of elsewhere is none of the dataset
        return {"bytes": None, "path": None}
    with xopen(cell["path"], "rb") as stream:
        return {"bytes": stream.read(), "path": None}


Columns = tuple[tuple[str, ...], tuple[str | None, ...], Callable[[int], Image.Image], tuple[str, ...]]


DEFAULT_SPLITS = ("validation", "test", "train")


LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "category")


@hushed()
def load_hub_dataset(
    what: str,
    image_column: str | None,
    label_column: str | None,
    cache_dir: str | None,
    *,
    local_files_only: bool,
    most: int | None = None,
    streaming: bool = False,
) -> ImageSet:
    """Open `id[:config][:split]` at its current commit.

    With `streaming`, or if the files are large, only the first `most` images are fetched; the name says so.

    Returns:
        The images.

    Raises:
        ValueError: unknown, private or gated dataset, configuration or split; no network.
    """
    repo_id, _, rest = what.partition(":")
    parts = rest.split(":") if rest else []
    if len(parts) > 2:
        raise ValueError(f"a dataset must be named id[:config][:split]; got {what!r}.")
    offline = local_files_only or constants.is_offline_mode()
    revision = _cached_revision(repo_id, cache_dir) if offline else _current_revision(repo_id)
    config, split, choices = _choose(repo_id, revision, parts)
    name = ":".join([repo_id, config, split])
    try:
        if streaming or (most is not None and not offline and is_large(repo_id, config, revision)):
            if offline or most is None:
                raise ValueError("`streaming` must come with the network and with `limit` or `pairs`. Add them.")
            with _quiet():
                rows = first_rows(repo_id, config, revision, split, most, cache_dir)
            ids, labels, read, columns = columns_as_images(rows, name, image_column, label_column, _caches(cache_dir))
            first = f"{name}[:{most}]"
            told = choices + columns
            return ImageSet(first, revision, ids, labels, read, tabular=True, streamed=True, choices=told)
    except (OSError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"dataset {what!r} cannot be streamed: {_first_line(error.__cause__ or error)}") from error
    mode = datasets.DownloadConfig(local_files_only=offline, cache_dir=cache_dir)
    try:
        with _quiet():
            dataset = datasets.load_dataset(
                repo_id, config, split=split, revision=revision, cache_dir=cache_dir, download_config=mode
            )
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"dataset {what!r} cannot be loaded: {_first_line(error.__cause__ or error)}") from error
    ids, labels, read, columns = columns_as_images(dataset, name, image_column, label_column, _caches(cache_dir))
    return ImageSet(name, revision, ids, labels, read, tabular=True, choices=choices + columns)


def _caches(cache_dir: str | None) -> tuple[Path, ...]:
    """Where downloads are: the only files of this machine that a dataset of the Hub may point to."""
    places = [cache_dir, constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE]
    return tuple(Path(place).resolve() for place in places if place)


def columns_as_images(
    dataset: datasets.Dataset,
    name: str,
    image_column: str | None,
    label_column: str | None,
    inside: tuple[Path, ...] | None = None,
) -> Columns:
    """Find the image and label columns; images are decoded by `open_image`, not by `datasets`.

    Cells may hold the path of a file; with `inside` only of one in these folders.

    Returns:
        Ids, labels, a function that decodes image `i`, and a sentence if an image column was taken unasked.

    Raises:
        ValueError: there is no such column, or none that holds images.
    """
    features = dataset.features
    found = [k for k, v in features.items() if isinstance(v, datasets.Image)]
    # what an image column is without the metadata of `datasets`
    found = found or [k for k, v in features.items() if isinstance(v, dict) and set(v) == {"bytes", "path"}]
    found = found or [k for k in ("image", "img", "jpg", "png") if k in features]
    column = image_column or next(iter(found), None)
    if column is None or column not in features:
        raise ValueError(
            f"dataset {name!r} must have an image column{f' {column!r}' if column else ''}; it has "
            f"{', '.join(features)}. Name one with --image-column."
        )
    if isinstance(features[column], datasets.List) and isinstance(features[column].feature, datasets.Value):
        raise ValueError(
            f"column {column!r} of {name!r} must hold images; got {features[column]}. Store files as binary, or pixels "
            "as lists of rows."
        )
    if len(dataset) == 0:
        raise ValueError(f"dataset {name!r} must hold images; it is empty.")
    try:
        encoded = dataset.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"column {column!r} of {name!r} must hold images; got {features[column]}.") from error
    labels = _labels(dataset, name, label_column)
    choices: tuple[str, ...] = ()
    if not image_column and len(found) > 1:
        choices = (f"taking image column {column!r} of {_listed(found)}; `image_column` names another",)

    def read(index: int) -> Image.Image:
        cell = encoded[index][column] or {}
        where = f"{name} row {index}"
        if cell.get("bytes") is not None:
            return open_image(cell["bytes"], where)
        if cell.get("path"):
            file = Path(cell["path"]).resolve()
            if inside is not None and not any(file.is_relative_to(folder) for folder in inside):
                raise ValueError(
                    f"{where} must hold an image of the dataset; got the path of another file. Leave it out."
                )
            return open_image(cell["path"], where)
        raise ValueError(f"{where} must hold an image; column {column!r} is empty there. Fill it or remove the row.")

    return tuple(str(i) for i in range(len(dataset))), labels, read, choices


def _labels(dataset: datasets.Dataset, name: str, label_column: str | None) -> tuple[str | None, ...]:
    features = dataset.features
    if label_column is not None and label_column not in features:
        raise ValueError(f"dataset {name!r} must have a column {label_column!r}; it has {', '.join(features)}.")
    column = label_column or next((k for k, v in features.items() if isinstance(v, datasets.ClassLabel)), None)
    if column is None:
        column = next((k for k in LABEL_COLUMNS if k in features), None)
    if column is None:
        return (None,) * len(dataset)
    feature, values = features[column], list(dataset.select_columns([column])[column])
    names: list[str] | None = feature.names if isinstance(feature, datasets.ClassLabel) else None
    return tuple(_label(value, names) for value in values)


def _label(value: Any, names: list[str] | None) -> str | None:
    if value is None or isinstance(value, list | dict):
        return None
    if names is None:
        return str(value)
    return names[value] if 0 <= value < len(names) else None


def _current_revision(repo_id: str) -> str:
    try:
        sha = HfApi(library_name="hf_equiv").dataset_info(repo_id).sha
    except GatedRepoError:
        raise ValueError(
            f"dataset {repo_id!r} is gated. Ask for access at {constants.ENDPOINT}/datasets/{repo_id} and log in "
            "with `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(_unknown(repo_id)) from None
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is neither a file or folder here nor a dataset name ({error}).") from None
    except (HfHubHTTPError, OSError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) == 404:  # of one word, without an error code
            raise ValueError(_unknown(repo_id)) from None
        raise ValueError(
            f"dataset {repo_id!r} cannot be looked up: {_first_line(error)}. Check the network, or use local images."
        ) from error
    except Exception as error:  # the HTTP client's own connection errors, whose classes differ between its versions
        if "http" not in type(error).__module__:
            raise
        raise ValueError(
            f"dataset {repo_id!r} cannot be looked up: no connection to {constants.ENDPOINT} ({_first_line(error)}). "
            "Check the network, or use local images."
        ) from error
    if not sha:
        raise ValueError(f"the Hub names no commit of dataset {repo_id!r}.")
    return sha


def _unknown(repo_id: str) -> str:
    return (
        f"{repo_id!r} is neither a file nor a folder here nor a dataset that the Hub shows you. Check the name; if it "
        "is private, log in with `hf auth login`."
    )


def _cached_revision(repo_id: str, cache_dir: str | None) -> str:
    from pathlib import Path

    folder = "datasets--" + repo_id.replace("/", "--")
    ref = Path(cache_dir or constants.HF_HUB_CACHE) / folder / "refs" / "main"
    if not ref.is_file():
        raise ValueError(
            f"{repo_id!r} is neither a file nor a folder here, and as a Hub dataset it is not in the cache while the "
            "Hub is switched off (--local-files-only or HF_HUB_OFFLINE=1). Check the name or allow the network."
        )
    return ref.read_text().strip()


def _choose(repo_id: str, revision: str, parts: list[str]) -> tuple[str, str, tuple[str, ...]]:
    """Settle configuration and split, with a sentence on each that nobody named; a single part may be either."""
    try:
        configs = datasets.get_dataset_config_names(repo_id, revision=revision)
        config = next((p for p in parts[:1] if p in configs), "default" if "default" in configs else configs[0])
        splits = datasets.get_dataset_split_names(repo_id, config, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"dataset {repo_id!r} cannot be opened: {_first_line(error)}") from error
    wanted = [p for p in parts if p != config]
    if len(wanted) > 1 or (wanted and wanted[0] not in splits):
        raise ValueError(
            f"dataset {repo_id!r} has no {':'.join(parts)!r}; configurations: {', '.join(configs)}; "
            f"splits of {config!r}: {', '.join(splits)}."
        )
    split = next((s for s in (*wanted, *DEFAULT_SPLITS) if s in splits), splits[0])
    choices = []
    if config not in parts and len(configs) > 1:
        choices.append(f"taking configuration {config} of {_listed(configs)}; name another as {repo_id}:CONFIG")
    if not wanted and len(splits) > 1:
        choices.append(f"taking split {split} of {_listed(splits)}; name another as {repo_id}:{config}:SPLIT")
    return config, split, tuple(choices)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what `datasets` logs about a file before it raises: the error says it."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
