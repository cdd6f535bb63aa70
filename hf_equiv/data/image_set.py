"""Define a set of images under one name, decoded one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One image of a set: its id (never an absolute path), upright RGB pixels, and its class or None."""

    id: str
    image: Image.Image
    label: str | None


@dataclass(frozen=True)
class ImageSet:
    """Images that are decoded one by one, when asked for."""

    data_id: str  # a file or folder name, `id:config:split` of the Hub, or `builtin`
    data_revision: str  # the commit of the Hub dataset, or "sha256:…" over names, labels and contents of local files
    ids: tuple[str, ...]
    labels: tuple[str | None, ...]  # the class name of each image, None where there is none
    read: Callable[[int], Image.Image]  # refuses a file that has changed since the set was opened
    tabular: bool = False  # whether the images come from a column of a table (parquet, Hub dataset)
    streamed: bool = False  # whether these are only the first images of a dataset
    choices: tuple[str, ...] = ()  # a sentence on each choice that the user left open, such as the split

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.ids)

    def __getitem__(self, index: int) -> ImageItem:
        """Decode one image; a bad one raises a ValueError that names it."""
        index = range(len(self.ids))[index]
        return ImageItem(self.ids[index], self.read(index), self.labels[index])

    def __iter__(self) -> Iterator[ImageItem]:
        """Decode all images in order, one at a time."""
        return (self[i] for i in range(len(self)))

    def select(self, indices: Sequence[int]) -> ImageSet:
        """Return the images at `indices` as a set with the same name and revision."""
        chosen = tuple(range(len(self))[i] for i in indices)
        return replace(
            self,
            ids=tuple(self.ids[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            read=lambda i: self.read(chosen[i]),
        )


def file_digest(path: Path, most: int | None = None) -> str:
    """Return the hex SHA-256 of a file, or "unreadable"; reading the file later raises the error."""
    try:
        size = path.stat().st_size  # of files of the kernel it is 0, and reading them may never end
        if size == 0 or (most is not None and size > most):
            return "unreadable" if size else hashlib.sha256().hexdigest()
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return "unreadable"


def content_hash(names: Sequence[str], digests: Sequence[str], labels: Sequence[str | None]) -> str:
    """Return the revision of a set: "sha256:…" over the name, label and contents of every file."""
    whole = hashlib.sha256()
    for name, digest, label in zip(names, digests, labels, strict=True):
        whole.update(f"{name}\0{label}\0{digest}\n".encode("utf-8", "backslashreplace"))
    return "sha256:" + whole.hexdigest()
