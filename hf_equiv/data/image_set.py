"""Define a set of images under one name, decoded one by one, and read images that are given in other forms."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from hf_equiv.data.image_file import open_array, open_image, to_rgb
from hf_equiv.formatting import many, some


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

    def __repr__(self) -> str:
        """State the name, the number of images and the first ids in one line."""
        return f"ImageSet({self.data_id!r}: {many(len(self), 'image')}, {some(self.ids, 4)})"


def read_images(given: Any) -> Iterator[Image.Image]:
    """Yield one or several images as upright 8-bit RGB: paths, PIL images, arrays, tensors, or those of `load_images`.

    Arrays are (H, W), (H, W, C) or (B, H, W, C), tensors (C, H, W) or (B, C, H, W) with C of 1 or 3. Integers are
    levels from 0 to 255, floating-point values lie in [0, 1] and are rounded to the nearest level.
    """
    if isinstance(given, np.ndarray | Tensor):
        several: Any = given if given.ndim == 4 else [given]
    elif isinstance(given, ImageSet) or (isinstance(given, Sequence) and not isinstance(given, str)):
        several = given
    else:
        several = [given]
    for place, one in enumerate(several):
        yield _read_image(one, f"images[{place}]")


def _read_image(one: Any, name: str) -> Image.Image:
    if isinstance(one, ImageItem):
        return one.image
    if isinstance(one, Image.Image):
        return one if one.mode == "RGB" and not one.has_transparency_data else to_rgb(one, name)
    if isinstance(one, str | os.PathLike):
        return open_image(Path(one).expanduser())
    if isinstance(one, Tensor):
        if one.ndim != 3 or one.shape[0] not in (1, 3):
            raise ValueError(f"`{name}` must be a tensor (3, H, W); got {tuple(one.shape)}. Put the channels first.")
        one = one.detach().cpu().movedim(0, -1)
        one = (one.double() if one.is_floating_point() else one).numpy()
    if not isinstance(one, np.ndarray):
        raise TypeError(
            f"`{name}` must be a path, a PIL image, an array (H, W, 3), a tensor (3, H, W) or an image of "
            f"`load_images`; got {type(one).__name__}."
        )
    if one.dtype.kind == "f":
        if not (one.size and np.isfinite(one).all() and one.min() >= 0 and one.max() <= 1):
            raise ValueError(f"`{name}` must lie in [0, 1], or hold integers from 0 to 255. Scale it first.")
        one = np.rint(one.astype(np.float64) * 255).astype(np.uint8)
    return open_array(one, name)


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
