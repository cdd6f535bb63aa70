"""Draw or list the pairs and images of a run, read each once, and refuse all bad ones that were named together."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_equiv.data.image_set import ImageSet
from hf_equiv.data.sources import DEFAULT_PAIRS, draw_pairs
from hf_equiv.data.text_set import TextSet
from hf_equiv.formatting import many, some

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

KEPT_BYTES = 256_000_000  # pixels (8 bit) that stay in memory from planning to the run; other images are read twice


@dataclass(frozen=True, slots=True)
class Item:
    """One pair or image to work on."""

    index: int  # place in the run's list
    name: str  # the `pair_id` or `image_id` that its rows state
    columns: Mapping[str, str | None]  # the ids and classes that its rows state
    source: int  # place of the image in its set
    target: int | None  # place of the target in its set, if there is one
    pixels: str | None  # SHA-256 over the images as the encoder sees them; None if one could not be read at planning
    unusable: tuple[tuple[str, str], ...] = ()  # (id, reason) of each of its images that could not be read then

    def entry(self) -> dict[str, Any]:
        """Return its entry in `run.json`."""
        return dict(self.columns) | {"pixels": self.pixels}


class Reader:
    """Read images as the encoder sees them, each once as long as they fit into `KEPT_BYTES`."""

    def __init__(self, encoder: Encoder) -> None:
        self.bad: dict[str, dict[str, None]] = {}
        """Ids of the images that could not be read, by reason."""
        self._encoder = encoder
        self._levels: dict[tuple[int, int], Tensor] = {}
        self._digests: dict[tuple[int, int], bytes | None] = {}
        self._room = KEPT_BYTES

    def pixels(self, images: ImageSet, index: int) -> Tensor:
        """Return an image of a set, (3, H, W) on the k/255 grid, on the CPU; one that cannot be read raises."""
        levels = self._levels.get((id(images), index))
        if levels is not None:
            return levels.float() / 255
        image = images[index].image
        try:
            pixels: Tensor = self._encoder.preprocess([image])[0].detach().cpu()
        except MemoryError:
            raise ValueError(f"image {images.ids[index]!r} does not fit into memory. Shrink it.") from None
        if pixels.numel() <= self._room:  # the plan keeps its sets alive, so their `id` stays unique
            self._levels[id(images), index] = (pixels * 255).round().to(torch.uint8)
            self._room -= pixels.numel()
        return pixels

    def check_texts(self, texts: TextSet) -> None:
        """Embed the texts of a set, which refuses those that the encoder cannot take."""
        self._encoder.embed_texts(texts.texts)

    def digest(self, images: ImageSet | TextSet, index: int) -> bytes | None:
        """Return the SHA-256 of an image or a text; None, with the reason in `bad`, if it cannot be read."""
        if isinstance(images, TextSet):
            return digest_of_text(images.texts[index])
        key = (id(images), index)
        if key not in self._digests:
            self._digests[key] = None
            try:
                self._digests[key] = _digest(self.pixels(images, index))
            except (ValueError, OSError) as error:
                self.bad.setdefault(str(error), {})[images.ids[index]] = None
        return self._digests[key]


def name_pairs(
    reader: Reader, sources: ImageSet, targets: ImageSet | TextSet, *, drawn: bool, n: int | None, seed: int
) -> tuple[Item, ...]:
    """Draw `n` pairs of images of different pixels, or of images and texts, or put sources and targets together."""

    def differ(i: int, j: int) -> bool:
        source = reader.digest(sources, i)
        return source is None or source != reader.digest(targets, j)

    if not drawn:
        places = _given_pairs(sources, targets)
    elif isinstance(targets, TextSet):
        places = draw_texts(sources, targets, n, seed)
    else:
        places = draw_pairs(sources, n, seed, differ)
    columns: dict[str, dict[str, str | None]] = {}
    for index, (i, j) in enumerate(places):
        name = f"{sources.ids[i]}->{targets.ids[j]}"
        name += f"#{index}" if name in columns else ""
        ids = {"pair_id": name, "source_id": sources.ids[i], "target_id": targets.ids[j]}
        columns[name] = {**ids, "source_class": sources.labels[i], "target_class": targets.labels[j]}
        columns[name] |= {"target_text": targets.texts[j]} if isinstance(targets, TextSet) else {}
    return _settle(reader, sources, targets, places, columns, drawn=drawn)


def name_images(reader: Reader, images: ImageSet, targets: ImageSet | None, *, drawn: bool = False) -> tuple[Item, ...]:
    """List the images of a set with their targets: one for all, as many as images, or the next one of the same set."""
    count = len(images)
    if targets is None:
        places: Sequence[tuple[int, int | None]] = [(i, None) for i in range(count)]
    elif targets is images:
        places = [(i, (i + 1) % count) for i in range(count)]
    else:
        places = _given_pairs(images, targets)
    columns = {}
    for i, j in places:
        target = None if j is None or targets is None else targets.ids[j]
        columns[images.ids[i]] = {"image_id": images.ids[i], "image_class": images.labels[i], "target_id": target}
    return _settle(reader, images, targets, places, columns, drawn=drawn)


def draw_texts(images: ImageSet, texts: TextSet, n: int | None, seed: int) -> list[tuple[int, int]]:
    """Draw `n` different pairs of an image and a text, by default 10 or as many as there are."""
    there = len(images) * len(texts)
    wanted = min(DEFAULT_PAIRS, there) if n is None else n
    if wanted > there:
        told = f"{many(len(images), 'image')} and {many(len(texts), 'text')}"
        raise ValueError(f"`pairs` must be at most {there} for {told}; got {n}. Ask for fewer.")
    return [divmod(place, len(texts)) for place in random.Random(seed).sample(range(there), wanted)]


def _settle(
    reader: Reader, images: ImageSet, targets: ImageSet | TextSet | None, places: Sequence[tuple[int, int | None]],
    columns: Mapping[str, dict[str, str | None]], *, drawn: bool,
) -> tuple[Item, ...]:  # fmt: skip
    """Read every image and make the items; refuse bad images that were named, or all images of a set or pairs."""
    own = [reader.digest(images, i) for i, _ in places]
    others = [] if targets is None else [reader.digest(targets, j) for _, j in places if j is not None]
    beside = targets is not images  # the user named targets outside the data set
    usable = any(own) or (not beside and any(others))
    if reader.bad and (not drawn or not usable or (beside and None in others)):
        raise ValueError(_unusable(reader.bad, drawn=drawn))
    items, equal = [], list[str]()
    for index, ((i, j), (name, facts)) in enumerate(zip(places, columns.items(), strict=True)):
        ids, digests = [images.ids[i]], [own[index]]
        if targets is not None and j is not None:
            ids.append(targets.ids[j])
            digests.append(others[index])
        whole = None if None in digests else _digest_of_all(filter(None, digests))
        reasons = [(image, why) for image in ids for why, found in reader.bad.items() if image in found]
        if whole is not None and len(ids) == 2 and digests[0] == digests[1]:
            equal.append(say_equal(*ids))
            reasons.append((ids[0], equal[-1]))
        items.append(Item(index, name, facts, i, j, whole, tuple(reasons)))
    if equal and len(equal) == len(items):
        raise ValueError(equal[0])
    return tuple(items)


def digest_of(images: Iterable[Tensor], text: str | None = None) -> str:
    """Return the SHA-256 over the images of an item, each (3, H, W) on the k/255 grid, and its text."""
    return _digest_of_all([*map(_digest, images), *([] if text is None else [digest_of_text(text)])])


def digest_of_text(text: str) -> bytes:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).digest()


def _digest(pixels: Tensor) -> bytes:
    levels = (pixels.detach().cpu().double() * 255).round().float() / 255
    return hashlib.sha256(levels.contiguous().numpy().tobytes()).digest()


def _digest_of_all(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def say_equal(source_id: str, target_id: str) -> str:
    """Return the error of a source and a target with equal pixels."""
    told = f"{source_id!r} and {target_id!r} are the same pixels for the model"
    return f"source and target must be different images; {told}. Choose another."


def image_generator(seed: int, image_id: str) -> torch.Generator:
    """Return random numbers that depend on the seed of the run and on the id of the image or pair alone."""
    digest = hashlib.sha256(f"{seed}:{image_id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _given_pairs(sources: ImageSet, targets: ImageSet | TextSet) -> list[tuple[int, int]]:
    if len(targets) == 1:
        return [(i, 0) for i in range(len(sources))]
    if len(sources) == len(targets):
        return [(i, i) for i in range(len(sources))]
    raise ValueError(
        f"`target` must be one image or text, or as many as sources; got {many(len(sources), 'source')} and "
        f"{len(targets)} targets. "
        "Use --data W --pairs N to draw pairs."
    )


def _unusable(bad: Mapping[str, Mapping[str, None]], *, drawn: bool) -> str:
    """Return each reason on one line; a reason that does not name its images is followed by them."""
    lines = []
    for why, names in bad.items():
        ids = list(map(repr, names))
        lines.append(why if ids[0] in why else f"{why} (image{'s' if ids[1:] else ''} {some(ids, 3)})")
    cure = "Remove them from the set, or draw others with another `seed`." if drawn else "Name others."
    if len(lines) == 1:
        return lines[0]
    return "\n- ".join([f"{sum(map(len, bad.values()))} images cannot be used. {cure}", *lines])
