"""The pairs and images of a run: drawn or listed, each read once; named ones that are unusable are refused together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_equiv.data.image_set import ImageSet
from hf_equiv.data.sources import draw_pairs

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

_SAME = "source and target must be different images; {!r} and {!r} are the same pixels for the model. Choose another."


@dataclass(frozen=True, slots=True)
class Pair:
    """One row to make: place in the list, ids and classes, and where the two images are in their sets."""

    index: int
    pair_id: str
    source: int
    target: int
    source_id: str
    target_id: str
    source_class: str | None
    target_class: str | None
    pixels: str | None = None
    """SHA-256 over the two images as the encoder sees them; None if one could not be read when the run was planned."""
    unusable: tuple[tuple[str, str], ...] = ()
    """Id and reason of each of its images that could not be read then."""

    def record(self) -> dict[str, Any]:
        """The part of the pair that is written into rows."""
        keys = ("pair_id", "source_id", "target_id", "source_class", "target_class")
        return {key: getattr(self, key) for key in keys}

    def entry(self) -> dict[str, Any]:
        """The part that is written into `run.json`."""
        return self.record() | {"pixels": self.pixels}


@dataclass(frozen=True, slots=True)
class Subject:
    """One image to analyse: place in the list, id and class, and the image it is set against, where there is one."""

    index: int
    image_id: str
    image_class: str | None
    target: int | None = None
    target_id: str | None = None
    pixels: str | None = None
    """SHA-256 over the image, and the other one, as the encoder sees them; None if one could not be read."""
    unusable: tuple[tuple[str, str], ...] = ()
    """Id and reason of each of its images that could not be read."""

    def record(self) -> dict[str, Any]:
        """Ids and class."""
        return {"image_id": self.image_id, "image_class": self.image_class, "target_id": self.target_id}

    def entry(self) -> dict[str, Any]:
        """The part that is written into `run.json`."""
        return self.record() | {"pixels": self.pixels}


def settle_subjects(
    encoder: Encoder, images: ImageSet, targets: ImageSet | None, *, drawn: bool = False
) -> tuple[Subject, ...]:
    """List the images of a set, each with its target; all of them are read once.

    Args:
        encoder: whose pixels count.
        images: the set.
        targets: one for all, as many as images, or the same set: then each image has the next one, the last the first.
        drawn: whether the images are of a data set, of which some may be unusable: they cost their own rows only.

    Returns:
        The images in order.

    Raises:
        ValueError: named images that cannot be used, or all of a data set; an image equal to its target, or counts that
            do not fit.
    """
    bad: dict[str, dict[str, None]] = {}

    def digest(source: ImageSet, index: int) -> bytes | None:
        try:
            return hashlib.sha256(_pixels(encoder, source, index).numpy().tobytes()).digest()
        except (ValueError, OSError) as error:
            bad.setdefault(str(error), {})[source.ids[index]] = None
            return None

    own = [digest(images, i) for i in range(len(images))]
    if targets is None:
        places: list[int | None] = [None] * len(images)
    elif targets is images:
        places = [(i + 1) % len(images) for i in range(len(images))]
    else:
        places = [j for _, j in _given_pairs(images, targets)]
    others = own if targets is images or targets is None else [digest(targets, j) for j in range(len(targets))]
    if bad and (not drawn or not any(own) or (others is not own and not all(others))):
        raise ValueError(_unusable(bad, drawn=drawn))
    subjects = []
    for i, j in enumerate(places):
        named = None if targets is None or j is None else targets.ids[j]
        if j is not None and own[i] is not None and own[i] == others[j]:
            raise ValueError(_SAME.format(images.ids[i], named))
        pixels = _joint(own[i]) if j is None else _joint(own[i], others[j])
        unusable = _reasons(bad, images.ids[i], *([] if named is None else [named]))
        subjects.append(Subject(i, images.ids[i], images.labels[i], j, named, pixels, unusable))
    return tuple(subjects)


def unusable_images(items: Sequence[Pair] | Sequence[Subject]) -> dict[str, str]:
    """Images of a run that could not be read when it was planned: the reason by id. Each costs its own rows."""
    return {image: why for item in items for image, why in item.unusable}


def read_subject(encoder: Encoder, images: ImageSet, index: int) -> Tensor:
    """An image as the encoder sees it, (3, H, W) on the k/255 grid, on the CPU; one that cannot be read raises."""
    return _pixels(encoder, images, index)


def image_generator(seed: int, image_id: str) -> torch.Generator:
    """Random numbers that depend on the seed of the run and on the image alone."""
    digest = hashlib.sha256(f"{seed}:{image_id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def settle_pairs(
    encoder: Encoder, sources: ImageSet, targets: ImageSet, *, drawn: bool, n: int | None, seed: int
) -> tuple[Pair, ...]:
    """Draw pairs from a set, or put named sources and targets together; each image of them is read once.

    Two photos of equal pixels are never drawn as a pair. A drawn photo that cannot be used costs its own rows only:
    they get status `error`.

    Args:
        encoder: whose pixels count.
        sources: images to start from.
        targets: images whose embedding is wanted; the same set if the pairs are drawn.
        drawn: whether pairs are drawn; otherwise there is one target, or the i-th source goes to the i-th target.
        n: how many pairs to draw; None for 10, or all there are.
        seed: seed of the draw.

    Returns:
        The pairs, named.

    Raises:
        ValueError: named images that cannot be used, or drawn ones if none can (all of them, each reason once), a named
            source equal to its target, or counts that do not fit.
    """
    digests: dict[tuple[bool, int], bytes | None] = {}
    bad: dict[str, dict[str, None]] = {}

    def digest(images: ImageSet, index: int) -> bytes | None:
        key = (images is sources, index)
        if key not in digests:
            digests[key] = None
            try:
                digests[key] = hashlib.sha256(_pixels(encoder, images, index).numpy().tobytes()).digest()
            except (ValueError, OSError) as error:
                bad.setdefault(str(error), {})[images.ids[index]] = None
        return digests[key]

    def differ(i: int, j: int) -> bool:
        source, target = digest(sources, i), digest(targets, j)
        return source is None or source != target

    indices = draw_pairs(sources, n, seed, differ) if drawn else _given_pairs(sources, targets)
    same = [(i, j) for i, j in indices if not differ(i, j)]
    if bad and (not drawn or not any(digests.values())):
        raise ValueError(_unusable(bad, drawn=drawn))
    if same:
        raise ValueError(_SAME.format(sources.ids[same[0][0]], targets.ids[same[0][1]]))
    pixels = [_joint(digest(sources, i), digest(targets, j)) for i, j in indices]
    unusable = [_reasons(bad, sources.ids[i], targets.ids[j]) for i, j in indices]
    return _name_pairs(sources, targets, indices, pixels, unusable)


def read_pair(encoder: Encoder, sources: ImageSet, targets: ImageSet, pair: Pair) -> tuple[Tensor, Tensor]:
    """Source and target as the encoder sees them, each (3, H, W) on the k/255 grid, on the CPU.

    Returns:
        The two images.

    Raises:
        ValueError: an image cannot be read, or the two are the same.
    """
    source, target = _pixels(encoder, sources, pair.source), _pixels(encoder, targets, pair.target)
    if torch.equal(source, target):
        raise ValueError(_SAME.format(pair.source_id, pair.target_id))
    return source, target


def _given_pairs(sources: ImageSet, targets: ImageSet) -> list[tuple[int, int]]:
    if len(targets) == 1:
        return [(i, 0) for i in range(len(sources))]
    if len(sources) == len(targets):
        return [(i, i) for i in range(len(sources))]
    raise ValueError(
        f"`target` must be one image, or as many as sources; got {len(sources)} source(s) and {len(targets)} targets. "
        "Use --data W --pairs N to draw pairs."
    )


def _joint(*digests: bytes | None) -> str | None:
    """One digest of all, if there are all."""
    whole = b"".join(one for one in digests if one is not None)
    return None if None in digests else hashlib.sha256(whole).hexdigest()


def _reasons(bad: Mapping[str, Mapping[str, None]], *names: str) -> tuple[tuple[str, str], ...]:
    """Which of these images cannot be used, and why."""
    return tuple((name, why) for name in names for why, ids in bad.items() if name in ids)


def _name_pairs(
    sources: ImageSet,
    targets: ImageSet,
    indices: Sequence[tuple[int, int]],
    pixels: Sequence[str | None],
    unusable: Sequence[tuple[tuple[str, str], ...]],
) -> tuple[Pair, ...]:
    pairs, used = [], set()
    for index, (i, j) in enumerate(indices):
        name = f"{sources.ids[i]}->{targets.ids[j]}"
        if name in used:
            name += f"#{index}"
        used.add(name)
        ids, labels = (sources.ids[i], targets.ids[j]), (sources.labels[i], targets.labels[j])
        pairs.append(Pair(index, name, i, j, *ids, *labels, pixels[index], unusable[index]))
    return tuple(pairs)


def _unusable(bad: Mapping[str, Mapping[str, None]], *, drawn: bool) -> str:
    """One line for each reason, with the images it is about where the reason does not name them."""
    lines = []
    for why, names in bad.items():
        ids = list(names)
        told = f"{', '.join(map(repr, ids[:3]))}{' …' if ids[3:] else ''}"
        lines.append(why if repr(ids[0]) in why else f"{why} (image{'s' if ids[1:] else ''} {told})")
    cure = "Remove them from the set, or draw others with another `seed`." if drawn else "Name others."
    if len(lines) == 1:
        return lines[0]
    return "\n- ".join([f"{sum(map(len, bad.values()))} images cannot be used. {cure}", *lines])


def _pixels(encoder: Encoder, images: ImageSet, index: int) -> Tensor:
    image = images[index].image
    try:
        return encoder.preprocess([image])[0].detach().cpu()
    except MemoryError:
        raise ValueError(f"image {images.ids[index]!r} does not fit into memory. Shrink it.") from None
