"""The first rows of a large Hub dataset, without downloading the rest (private helper of `hf_equiv.data`).

The encoded files go into the cache of `datasets` as one Arrow file, which is read from disk image by image: memory does
not grow with the number of images, and the next call, or another process, finds them there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
from datasets.utils.file_utils import xopen

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
