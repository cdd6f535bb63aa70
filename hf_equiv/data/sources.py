"""Open images by name (a file, a folder, a table, a Hub dataset, the built-in photos) and draw pairs from them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NoReturn

from hf_equiv.data.folders import read_folder
from hf_equiv.data.image_file import IMAGE_SUFFIXES, open_image
from hf_equiv.data.image_set import ImageSet, content_hash, file_digest
from hf_equiv.formatting import some, utf8
from hf_equiv.limits import MAX_BYTES

_PHOTOS = Path(__file__).parents[1] / "assets" / "photos"
BUILTIN_PHOTOS = {name: _PHOTOS / f"{name}.jpg" for name in ("cat", "coffee", "rocket", "astronaut")}
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
        what: an image file; a folder (searched recursively); a parquet file or a folder of them; a Hub dataset
            `id[:config][:split]` (by default `default` or the first; `validation`, `test`, `train` or the first); or
            `builtin`, the four photos of the package.
        limit: keep this many images, drawn with `seed`, in their order.
        seed: seed of that draw.
        image_column: column of a table that holds the images; by default the first of type Image.
        label_column: column of a table that holds the class; by default the first ClassLabel, else `label`.
        cache_dir: folder for downloads and converted parquet files; by default the Hub's cache.
        local_files_only: whether to use cached files only.
        most: number of images to fetch of a Hub dataset that is streamed; by default `limit`.
        streaming: fetch only the first `most` images of a Hub dataset; default above 5 GB of files, if `most` is known.

    Returns:
        The set. Labels come from `labels.csv` (columns file, label[, name]), `metadata.csv` or `.jsonl` (columns
        file_name and label), class folders or the label column; `choices` says how, and which files are left out.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no image, no such dataset, or no such column.

    Example:
        >>> load_images("builtin").ids
        ('cat', 'coffee', 'rocket', 'astronaut')
    """
    from hf_equiv.data import tables  # takes a second

    what = os.fspath(what) if isinstance(what, os.PathLike) else what
    cache_dir = None if cache_dir is None else os.fspath(cache_dir)
    if not isinstance(what, str) or not what.strip():
        raise ValueError(f"images must be named by a file, a folder, a dataset or 'builtin'; got {what!r}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1; got {limit}.")
    columns = (image_column, label_column)

    def open_tables(name: str, paths: Sequence[Path], folder: Path) -> ImageSet:
        return tables.table_images(*tables.load_parquet(name, paths, cache_dir), utf8(name), *columns, names_in=folder)

    images = _local(what, open_tables)
    if images is None:
        images = tables.load_hub_dataset(
            what, *columns, cache_dir, local_files_only=local_files_only, most=most or limit, streaming=streaming
        )
    elif streaming:
        raise ValueError(f"`streaming` must come with a Hub dataset; {what!r} is here already. Leave it out.")
    if limit is not None and limit < len(images):
        images = images.select(sorted(random.Random(seed).sample(range(len(images)), limit)))
    return images


def _local(what: str, open_tables: Callable[[str, Sequence[Path], Path], ImageSet]) -> ImageSet | None:
    """Open images on this machine, or return None for the name of a Hub dataset."""
    if what == "builtin":
        names = list(BUILTIN_PHOTOS)
        return _image_files(what, list(BUILTIN_PHOTOS.values()), names, names)
    path = Path(what).expanduser()
    if path.is_dir():
        return _folder(path, open_tables)
    if path.is_file():
        return open_tables(path.name, [path], path.parent) if path.suffix.lower() == ".parquet" else _single_photo(path)
    if any(sign in what for sign in "*?["):
        told = f"{what!r} does not exist, and patterns are not expanded"
        raise FileNotFoundError(f"{told}. Name a folder: it stands for all images in it.")
    suffixes = IMAGE_SUFFIXES | {".parquet", ".csv", ".zip", ".heic", ".svg", ".pdf"}
    is_path = what.startswith(("/", "./", "../", "~")) or what.endswith("/") or "\\" in what
    if is_path or path.suffix.lower() in suffixes or what.split(":")[0].count("/") > 1:
        hint = "Hub datasets are named id[:config][:split]"
        raise FileNotFoundError(f"{what!r} does not exist. Check the path ({hint}).")
    return None


def _image_files(
    data_id: str, files: Sequence[Path], ids: Sequence[str], labels: Sequence[str | None], revision: str | None = None
) -> ImageSet:
    digests = [file_digest(file, MAX_BYTES) for file in files]
    ids, labels = [utf8(name) for name in ids], [None if label is None else utf8(label) for label in labels]
    revision = revision or content_hash(ids, digests, labels)
    return ImageSet(
        utf8(data_id), revision, tuple(ids), tuple(labels), lambda i: open_image(files[i], ids[i], sha256=digests[i])
    )


def _single_photo(path: Path) -> ImageSet:
    if path.suffix.lower() not in IMAGE_SUFFIXES:  # a table, text or archive must not count as one image
        try:
            open_image(path)
        except ValueError as error:
            raise ValueError(f"{error} A table of images must be a .parquet file.") from None
    return _image_files(path.name, [path], [path.name], [None], "sha256:" + file_digest(path))


def _folder(path: Path, open_tables: Callable[[str, Sequence[Path], Path], ImageSet]) -> ImageSet:
    """Open the image files of a folder, sorted by their path inside it, or else its parquet files."""
    name, inside = path.resolve().name or "root", read_folder(path)
    if inside.photos:
        images = _image_files(name, list(inside.photos.values()), list(inside.photos), inside.labels)
    elif inside.tables:
        images = open_tables(name, inside.tables, path)
        if len(inside.tables) > 1:
            told = f"taking {len(inside.tables)} tables together: {some((table.name for table in inside.tables), 4)}"
            images = replace(images, choices=(told, *images.choices))
    else:
        told = f"folder {name!r} must hold images; found none ({', '.join(sorted(IMAGE_SUFFIXES))})"
        raise ValueError("; ".join([told, *inside.choices]) + ".")
    return replace(images, choices=images.choices + inside.choices)


def draw_pairs(
    images: ImageSet, n: int | None, seed: int, differ: Callable[[int, int], bool] = lambda i, j: True
) -> list[tuple[int, int]]:
    """Draw `n` different (source, target) pairs of indices, the same for the same set, `n` and `seed`.

    Source and target are different images, with different classes if both have one. A smaller draw of m pairs gives
    the first m of the n pairs.

    Args:
        images: the set to draw from, at least two images.
        n: number of pairs; None for 10, or all there are if they are fewer.
        seed: seed of the draw.
        differ: returns whether a pair may be drawn; it refuses the same photo under two names.

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
        told = f"`data` must hold at least 2 images to draw pairs; {images.data_id!r} holds {size}"
        raise ValueError(f"{told}. Name more images, or a source and a target.")

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
    if len(drawn) < wanted:  # nearly all pairs, or nearly all of one class: list the rest
        left = [(i, j) for i in range(size) for j in range(size) if usable(i, j)]
        rng.shuffle(left)
        chosen = (pair for pair in left if differ(*pair))
        drawn.update(dict.fromkeys(islice(chosen, wanted - len(drawn))))
    if not drawn or (n is not None and len(drawn) < n):
        _refuse_pairs(images, len(drawn), wanted)
    return list(drawn)


def _refuse_pairs(images: ImageSet, drawn: int, wanted: int) -> NoReturn:
    if not drawn and len(set(images.labels)) == 1 and images.labels[0] is not None:
        told = f"all of {images.data_id!r} are {images.labels[0]!r}. Add others, or name a source and a target."
        if images.streamed:
            told = (
                f"the first {len(images)} images of the dataset, which are all that `streaming` fetches, are "
                f"{images.labels[0]!r}: it is sorted by class. Leave `streaming` out, name a split in mixed order, "
                "raise `pairs` (4 images are fetched for each), or download it and name the folder."
            )
        raise ValueError(f"`data` must hold images of two classes, since pairs are of different classes; {told}")
    raise ValueError(
        f"`pairs` must be at most {drawn} for {images.data_id!r} ({len(images)} images; source and target of "
        f"different classes and pixels); got {wanted}. Ask for fewer pairs or give more images."
    )
