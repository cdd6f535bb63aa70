"""Sets of images: a file, a folder, parquet files, a Hub dataset or the built-in photos; and pairs drawn from them."""

from __future__ import annotations

import csv
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from hf_equiv.imagefile import IMAGE_SUFFIXES, open_image

BUILTIN_PHOTOS = ("cat", "coffee", "rocket", "astronaut")
LABEL_FILE = "labels.csv"
DEFAULT_PAIRS = 10


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One image of a set: its id (never an absolute path), upright RGB pixels, and its class where there is one."""

    id: str
    image: Image.Image
    label: str | None


@dataclass(frozen=True)
class ImageSet:
    """Images that are decoded one by one, when asked for.

    Attributes:
        data_id: what the set is called: a file or folder name, `id:config:split` of the Hub, or `builtin`.
        data_revision: the commit of the Hub dataset, or "sha256:…" over names, labels and contents of local files.
        ids: one id per image.
        labels: the class name of each image, None where there is none.
        read: decodes image `i` (used by indexing).
        tabular: whether the images come from a column of a table (parquet, Hub dataset).
    """

    data_id: str
    data_revision: str
    ids: tuple[str, ...]
    labels: tuple[str | None, ...]
    read: Callable[[int], Image.Image]
    tabular: bool = False

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)

    def __getitem__(self, index: int) -> ImageItem:
        """Decode one image; a bad one raises a ValueError that names it."""
        index = range(len(self.ids))[index]
        return ImageItem(self.ids[index], self.read(index), self.labels[index])

    def __iter__(self) -> Iterator[ImageItem]:
        """Decode all images in order, one at a time."""
        return (self[i] for i in range(len(self)))

    def select(self, indices: Sequence[int]) -> ImageSet:
        """Return the images at `indices` as a set of the same name and revision."""
        chosen = tuple(range(len(self))[i] for i in indices)
        return ImageSet(
            self.data_id,
            self.data_revision,
            tuple(self.ids[i] for i in chosen),
            tuple(self.labels[i] for i in chosen),
            lambda i: self.read(chosen[i]),
            self.tabular,
        )


def load_images(
    what: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    most: int | None = None,
    streaming: bool = False,
) -> ImageSet:
    """Open a set of images by name.

    Args:
        what: an image file; a folder (searched recursively, sorted by relative path); a parquet file or a folder of
            them; a Hub dataset `id[:config][:split]`; or `builtin`, the four photos of the package.
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
    if not isinstance(what, str) or not what.strip():
        raise ValueError(f"images must be named by a file, a folder, a dataset or 'builtin'; got {what!r}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1; got {limit}.")
    path, most = Path(what).expanduser(), most or limit
    if streaming and (what == "builtin" or path.exists()):
        raise ValueError(f"`streaming` must come with a Hub dataset; {what!r} is here already. Leave it out.")
    if what == "builtin":
        images = _builtin()
    elif path.is_dir():
        images = _folder(path, image_column, label_column, cache_dir)
    elif path.is_file():
        if path.suffix.lower() == ".parquet":
            images = _parquet(path.name, [path], image_column, label_column, cache_dir)
        else:
            images = _single(path)
    elif any(sign in what for sign in "*?["):
        raise FileNotFoundError(
            f"{what!r} does not exist, and patterns are not expanded. Name a folder: it stands for all images in it."
        )
    elif _looks_like_path(what):
        raise FileNotFoundError(
            f"{what!r} does not exist. Check the path (Hub datasets are named id[:config][:split])."
        )
    else:
        from hf_equiv import hubdata

        images = ImageSet(
            *hubdata.load_hub_dataset(
                what,
                image_column,
                label_column,
                cache_dir,
                local_files_only=local_files_only,
                most=most,
                streaming=streaming,
            ),
            tabular=True,
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


def _builtin() -> ImageSet:
    folder = Path(__file__).parent / "assets" / "photos"
    paths = [folder / f"{name}.jpg" for name in BUILTIN_PHOTOS]
    return ImageSet(
        "builtin",
        _content_hash(list(zip(BUILTIN_PHOTOS, paths, BUILTIN_PHOTOS, strict=True))),
        BUILTIN_PHOTOS,
        BUILTIN_PHOTOS,
        lambda i: open_image(paths[i]),
    )


def _single(path: Path) -> ImageSet:
    if path.suffix.lower() not in IMAGE_SUFFIXES:  # a table, a text, an archive: say so before it counts as one image
        try:
            open_image(path)
        except ValueError as error:
            raise ValueError(f"{error} A table of images must be a .parquet file.") from None
    return ImageSet(path.name, "sha256:" + _sha256(path), (path.name,), (None,), lambda _: open_image(path))


def _folder(path: Path, image_column: str | None, label_column: str | None, cache_dir: str | None) -> ImageSet:
    name = path.resolve().name or "root"
    inside = sorted(p for p in path.rglob("*") if p.is_file())
    inside = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    files = [p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES]
    tables = [p for p in inside if p.suffix.lower() == ".parquet"]
    if not files and tables:
        return _parquet(name, tables, image_column, label_column, cache_dir)
    if not files:
        raise ValueError(f"folder {name!r} must hold images; found none ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    ids = [p.relative_to(path).as_posix() for p in files]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    ids, files = [ids[i] for i in order], [files[i] for i in order]
    listed = _read_labels(path / LABEL_FILE)
    labels: list[str | None] = []
    for key, file in zip(ids, files, strict=True):
        folder_class = file.parent.name if file.parent != path else None
        labels.append(listed.get(key, listed.get(file.name, folder_class)))
    revision = _content_hash(list(zip(ids, files, labels, strict=True)))
    return ImageSet(name, revision, tuple(ids), tuple(labels), lambda i: open_image(files[i], ids[i]))


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


def _parquet(
    name: str, paths: list[Path], image_column: str | None, label_column: str | None, cache_dir: str | None
) -> ImageSet:
    from hf_equiv import hubdata

    revision = _content_hash([(p.name, p, None) for p in paths])
    dataset = hubdata.load_parquet(name, [str(p) for p in paths], cache_dir)
    ids, labels, read = hubdata.columns_as_images(dataset, name, image_column, label_column)
    return ImageSet(name, revision, ids, labels, read, tabular=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _content_hash(entries: list[tuple[str, Path, str | None]]) -> str:
    whole = hashlib.sha256()
    for key, path, label in entries:
        whole.update(f"{key}\0{label}\0{_sha256(path)}\n".encode())
    return "sha256:" + whole.hexdigest()
