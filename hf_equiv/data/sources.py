"""Sets of images: a file, a folder, parquet files, a Hub dataset or the built-in photos; and pairs drawn from them."""

from __future__ import annotations

import csv
import hashlib
import os
import random
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from hf_equiv.data.image_file import IMAGE_SUFFIXES, open_image
from hf_equiv.data.image_set import ImageSet

# Sets of image files: one, a folder, the built-in photos; with the SHA-256 of what they hold.
#
# The SHA-256 of every file is kept from when the set was opened, and an image is read from those bytes or not at all:
# the revision that goes into every row is that of the pixels that were analysed.


BUILTIN_PHOTOS = ("cat", "coffee", "rocket", "astronaut")


LABEL_FILE = "labels.csv"


def builtin_photos() -> ImageSet:
    """The four photos of the package."""
    folder = Path(__file__).parents[1] / "assets" / "photos"
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


DEFAULT_PAIRS = 10


def load_images(
    what: str | os.PathLike[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    most: int | None = None,
    streaming: bool = False,
) -> ImageSet:
    """Open a set of images by name.

    Args:
        what: an image file; a folder (searched recursively, sorted by relative path); a parquet file or a folder of
            them; a Hub dataset `id[:config][:split]` (by default configuration `default`, or the first; split
            `validation`, or `test`, or `train`, or the first); or `builtin`, the four photos of the package.
        limit: keep this many images, drawn with `seed`, in their order.
        seed: seed of that draw.
        image_column: column of a table that holds the images; by default the first of type Image.
        label_column: column of a table that holds the class; by default the first ClassLabel, else `label`.
        cache_dir: where downloads and converted parquet files are kept; by default the Hub's cache.
        local_files_only: never ask the Hub.
        most: how many images are needed of a Hub dataset that is streamed; by default `limit`.
        streaming: fetch only the first `most` images of a Hub dataset, in its own order. Done unasked above 5 GB of
            files, where the number is known.

    Returns:
        The set. Labels are class sub-folder names, or come from a `labels.csv` (columns file, label[, name]) beside
        the images, or from the dataset's label column.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no image, none in it, an unknown dataset, a column that is not there.

    Example:
        >>> photos = load_images("builtin")
        >>> photos.ids
        ('cat', 'coffee', 'rocket', 'astronaut')
    """
    what = os.fspath(what) if isinstance(what, os.PathLike) else what
    cache_dir = None if cache_dir is None else os.fspath(cache_dir)
    if not isinstance(what, str) or not what.strip():
        raise ValueError(f"images must be named by a file, a folder, a dataset or 'builtin'; got {what!r}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1; got {limit}.")
    path, most = Path(what).expanduser(), most or limit
    if streaming and (what == "builtin" or path.exists()):
        raise ValueError(f"`streaming` must come with a Hub dataset; {what!r} is here already. Leave it out.")
    if what == "builtin":
        images = builtin_photos()
    elif path.is_dir():
        images = _folder(path, image_column, label_column, cache_dir)
    elif path.is_file():
        if path.suffix.lower() == ".parquet":
            images = _parquet(path.name, [path], image_column, label_column, cache_dir)
        else:
            images = single_photo(path)
    elif any(sign in what for sign in "*?["):
        raise FileNotFoundError(
            f"{what!r} does not exist, and patterns are not expanded. Name a folder: it stands for all images in it."
        )
    elif what.endswith(("/", "\\")):
        raise FileNotFoundError(f"folder {what!r} does not exist. Check the path.")
    elif _looks_like_path(what):
        raise FileNotFoundError(
            f"{what!r} does not exist. Check the path (Hub datasets are named id[:config][:split])."
        )
    else:
        from hf_equiv.data import tables

        images = tables.load_hub_dataset(
            what,
            image_column,
            label_column,
            cache_dir,
            local_files_only=local_files_only,
            most=most,
            streaming=streaming,
        )
    if limit is not None and limit < len(images):
        images = images.select(sorted(random.Random(seed).sample(range(len(images)), limit)))
    return images


def draw_pairs(
    images: ImageSet, n: int | None, seed: int, differ: Callable[[int, int], bool] = lambda i, j: True
) -> list[tuple[int, int]]:
    """Draw `n` different (source, target) pairs of indices, the same for the same set, `n` and `seed`.

    Source and target are different images, of different classes where both have one. The first m of n pairs are the
    m pairs that a smaller draw gives.

    Args:
        images: the set to draw from, at least two images.
        n: how many pairs; None for 10, or all there are if they are fewer.
        seed: seed of the draw.
        differ: asked of a pair about to be drawn; it is left out if the answer is no (the same photo under two names).

    Returns:
        The pairs, in the order of the draw.

    Raises:
        ValueError: the set does not have that many pairs.

    Example:
        >>> photos = load_images("builtin")
        >>> [(photos.ids[i], photos.ids[j]) for i, j in draw_pairs(photos, 2, seed=0)]
        [('cat', 'rocket'), ('rocket', 'astronaut')]
    """
    size, labels = len(images), images.labels
    wanted = DEFAULT_PAIRS if n is None else n
    if wanted < 1:
        raise ValueError(f"`pairs` must be at least 1; got {n}.")
    if size < 2:
        raise ValueError(
            f"`data` must hold at least 2 images to draw pairs; {images.data_id!r} holds {size}. "
            "Name more images, or a source and a target."
        )

    def usable(i: int, j: int) -> bool:
        apart = i != j and (labels[i] is None or labels[j] is None or labels[i] != labels[j])
        return apart and (i, j) not in drawn

    rng = random.Random(seed)
    drawn: dict[tuple[int, int], None] = {}
    misses = 0
    while len(drawn) < wanted and misses < 20 * wanted + 1000:
        pair = (rng.randrange(size), rng.randrange(size))
        if usable(*pair) and differ(*pair):
            drawn[pair] = None
        else:
            misses += 1
    if len(drawn) < wanted:  # nearly all pairs, or nearly all of one class: list what is left
        left = [(i, j) for i in range(size) for j in range(size) if usable(i, j)]
        rng.shuffle(left)
        chosen = (pair for pair in left if differ(*pair))
        drawn.update(dict.fromkeys(islice(chosen, wanted - len(drawn))))
    if not drawn and len(set(labels)) == 1 and labels[0] is not None:
        if images.streamed:
            raise ValueError(
                f"`data` must hold images of at least two classes, since pairs are of different classes; the first "
                f"{size} images of the dataset, which are all that is fetched with `streaming`, are {labels[0]!r}: it "
                "is sorted by class. Leave `streaming` out, name a split in mixed order, raise `pairs` (4 images are "
                "fetched for each), or download it and name the folder."
            )
        raise ValueError(
            f"`data` must hold images of at least two classes, since pairs are of different classes; all of "
            f"{images.data_id!r} are {labels[0]!r}. Add others, or name a source and a target."
        )
    if not drawn or (n is not None and len(drawn) < n):
        raise ValueError(
            f"`pairs` must be at most {len(drawn)} for {images.data_id!r} ({size} images; source and target of "
            f"different classes and pixels); got {wanted}. Ask for fewer pairs or give more images."
        )
    return list(drawn)


def _looks_like_path(what: str) -> bool:
    repo = what.split(":")[0]
    known = Path(what).suffix.lower() in IMAGE_SUFFIXES | {".parquet", ".csv", ".zip", ".heic", ".svg", ".pdf"}
    return known or what.startswith(("/", "./", "../", "~")) or "\\" in what or repo.count("/") > 1


def _folder(path: Path, image_column: str | None, label_column: str | None, cache_dir: str | None) -> ImageSet:
    inside = sorted(p for p in path.rglob("*") if p.is_file())
    inside = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    made = {p.parent for p in inside if p.name == "run.json"} - {path}  # figures of our own
    inside = [p for p in inside if made.isdisjoint(p.parents)]
    files = [p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES]
    tables = [p for p in inside if p.suffix.lower() == ".parquet"]
    name = path.resolve().name or "root"
    if files:
        return photo_folder(path, files)
    if tables:
        return _parquet(name, tables, image_column, label_column, cache_dir)
    raise ValueError(f"folder {name!r} must hold images; found none ({', '.join(sorted(IMAGE_SUFFIXES))}).")


def _parquet(
    name: str, paths: list[Path], image_column: str | None, label_column: str | None, cache_dir: str | None
) -> ImageSet:
    from hf_equiv.data import tables

    revision = content_hash([p.name for p in paths], [file_digest(p) for p in paths], [None] * len(paths))
    dataset = tables.load_parquet(name, paths, revision, cache_dir)
    ids, labels, read, choices = tables.columns_as_images(dataset, name, image_column, label_column)
    return ImageSet(name, revision, ids, labels, read, tabular=True, choices=choices)
