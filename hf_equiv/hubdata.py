"""Hub datasets, and the image column of any table, read through `datasets` (private helper of `hf_equiv.data`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from PIL import Image

from hf_equiv.hub_files import hushed
from hf_equiv.imagefile import open_image
from hf_equiv.imageset import ImageSet
from hf_equiv.streaming import first_rows, is_large

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
