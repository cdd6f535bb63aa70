"""Sets of image files: one, a folder, the built-in photos; with the SHA-256 of what they hold.

The SHA-256 of every file is kept from when the set was opened, and an image is read from those bytes or not at all: the
revision that goes into every row is that of the pixels that were analysed.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from hf_equiv.imagefile import IMAGE_SUFFIXES, open_image
from hf_equiv.imageset import ImageSet

BUILTIN_PHOTOS = ("cat", "coffee", "rocket", "astronaut")
LABEL_FILE = "labels.csv"


def builtin_photos() -> ImageSet:
    """The four photos of the package."""
    folder = Path(__file__).parent / "assets" / "photos"
    files = [folder / f"{name}.jpg" for name in BUILTIN_PHOTOS]
    digests = [file_digest(file) for file in files]
    return ImageSet(
        "builtin",
        content_hash(BUILTIN_PHOTOS, digests, BUILTIN_PHOTOS),
        BUILTIN_PHOTOS,
        BUILTIN_PHOTOS,
        _reader(files, BUILTIN_PHOTOS, digests),
    )


def single_photo(path: Path) -> ImageSet:
    """One image file as a set.

    Args:
        path: of the file.

    Returns:
        The set.

    Raises:
        ValueError: it does not end like an image and is none.
    """
    if path.suffix.lower() not in IMAGE_SUFFIXES:  # a table, a text, an archive: say so before it counts as one image
        try:
            open_image(path)
        except ValueError as error:
            raise ValueError(f"{error} A table of images must be a .parquet file.") from None
    digest = file_digest(path)
    return ImageSet(path.name, "sha256:" + digest, (path.name,), (None,), _reader([path], [path.name], [digest]))


def photo_folder(path: Path, files: Sequence[Path]) -> ImageSet:
    """Image files of a folder, sorted by their path inside it; classes from `labels.csv` or sub-folders."""
    by_id = dict(sorted((file.relative_to(path).as_posix(), file) for file in files))
    ids, files = tuple(by_id), tuple(by_id.values())
    listed = _read_labels(path / LABEL_FILE)
    labels: list[str | None] = []
    for key, file in by_id.items():
        folder_class = file.parent.name if file.parent != path else None
        labels.append(listed.get(key, listed.get(file.name, folder_class)))
    digests = [file_digest(file) for file in files]
    revision = content_hash(ids, digests, labels)
    return ImageSet(path.resolve().name or "root", revision, ids, tuple(labels), _reader(files, ids, digests))


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file, or "unreadable": what is wrong with it is said when it is read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return "unreadable"


def content_hash(names: Sequence[str], digests: Sequence[str], labels: Sequence[str | None]) -> str:
    """The revision of a set: "sha256:…" over the name, label and contents of every file."""
    whole = hashlib.sha256()
    for name, digest, label in zip(names, digests, labels, strict=True):
        whole.update(f"{name}\0{label}\0{digest}\n".encode())
    return "sha256:" + whole.hexdigest()


def _reader(files: Sequence[Path], names: Sequence[str], digests: Sequence[str]) -> Callable[[int], Image.Image]:
    return lambda i: open_image(files[i], names[i], sha256=digests[i])


def _read_labels(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as stream:
        table = csv.DictReader(stream)
        columns = table.fieldnames or []
        if "file" not in columns or not {"label", "name"} & set(columns):
            raise ValueError(f"{path.name!r} must have columns file,label[,name]; got {','.join(columns)}.")
        column = "name" if "name" in columns else "label"
        return {row["file"]: row[column] for row in table if row["file"] and row[column]}
