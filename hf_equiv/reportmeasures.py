"""What a report measures anew with the encoder: controls, survival, transfer, retrieval, and a kNN probe.

Errors are relative, ‖f(a) − f(b)‖ / ‖f(b)‖, in float64 of float32 embeddings; similarity is the cosine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_equiv.metrics import cosine, finite, psnr_db, relative_error, ssim
from hf_equiv.precision import no_tf32
from hf_equiv.survival import TRANSFORMS, round_8bit

Row = dict[str, Any]
Embed = Callable[[Tensor], Tensor]

RANDOM_DRAWS = 4
NEIGHBOURS = 5
"""Neighbours that vote in the kNN probe."""


@dataclass
class Gallery:
    """Embeddings of distinct photos, by the digest of their pixels, with a class where one is known."""

    ids: list[str] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    classes: list[str | None] = field(default_factory=list)
    places: dict[bytes, int] = field(default_factory=dict)

    def add(self, name: str, pixels: Tensor, embed: Embed, label: str | None = None) -> int:
        """Put in a photo (3, H, W) unless the same pixels are there already; returns its place."""
        key = hashlib.sha256((pixels.double() * 255).round().to(torch.uint8).cpu().numpy().tobytes()).digest()
        if key not in self.places:
            self.places[key] = len(self.ids)
            self.ids.append(name)
            self.vectors.append(embed(pixels[None])[0].detach().double().cpu())
            self.classes.append(label)
        elif self.classes[self.places[key]] is None:
            self.classes[self.places[key]] = label
        return self.places[key]

    @property
    def matrix(self) -> Tensor:
        """All embeddings, (M, D), float64."""
        return torch.stack(self.vectors)


@torch.no_grad()
@no_tf32()
def measure_pair(
    encoder: Any, source: Tensor, match: Tensor, target: Tensor, *, seed: int, pair_id: str,
    float_match: Tensor | None = None, labels: Sequence[str] | None = None, survival: bool = True,
) -> tuple[Row, Tensor]:  # fmt: skip
    """Set one match against its controls.

    `moved` is how far the embedding has gone from the source's, `random_moved` the same for random steps of the same
    L2 length (median of 4, rounded to 8 bit), `random_error` what is then left to the target. `survival` holds for
    each transform T the error of T(match) (`error`), that of T(target) (`control`), the distance of T(match) from the
    source (`to_source`), and whether the head gives T(match) and T(target) the target's label.

    Cost: about 22 forwards of one image, 38 with a head.

    Args:
        encoder: f.
        source: (3, H, W), pixels k/255.
        match: likewise, as read back from its PNG.
        target: likewise.
        seed: of the run.
        pair_id: id of the row; the random steps depend on the two alone.
        float_match: the match before it went to 8 bit, where it is kept.
        labels: class names for zero-shot classification.
        survival: whether to try the transforms.

    Returns:
        Plain numbers, None for what does not exist; and the embedding of the match, (D,).
    """
    source, match, target = (x.to(encoder.device) for x in (source, match, target))
    z_source, z_match, z_target = encoder(torch.stack([source, match, target]))
    step = (match.double() - source.double()).norm()
    draws = [_random_step(source, step, f"{seed}:{pair_id}:{k}") for k in range(RANDOM_DRAWS)]
    z_random = [encoder(x[None])[0] for x in draws]
    row: Row = {
        "pair_id": pair_id,
        "error": relative_error(z_match, z_target),
        "distance": relative_error(z_source, z_target),
        "moved": relative_error(z_match, z_source),
        "random_moved": _middle([relative_error(z, z_source) for z in z_random]),
        "random_error": _middle([relative_error(z, z_target) for z in z_random]),
        "random_l2": _middle([finite((x.double() - source.double()).norm()) for x in draws]),
        "psnr_match_target": psnr_db(match, target),
        "ssim_match_target": ssim(match, target),
        "rounded_error": None,
        "survival": {},
    }
    if float_match is not None:
        rounded = round_8bit(float_match.to(match))
        row["rounded_error"] = relative_error(encoder(rounded[None])[0], z_target)
    if survival:
        wanted = classes_of(encoder, target[None], labels)
        for name, change in TRANSFORMS.items():
            two = torch.stack([change(x.cpu()) for x in (match, target)]).to(match)
            a, b = encoder(two)
            seen = classes_of(encoder, two, labels)
            row["survival"][name] = {
                "error": relative_error(a, z_target),
                "control": relative_error(b, z_target),
                "to_source": relative_error(a, z_source),
                "label": None if seen is None or wanted is None else seen[0] == wanted[0],
                "control_label": None if seen is None or wanted is None else seen[1] == wanted[0],
            }
    return row, z_match.detach().double().cpu()


@torch.no_grad()
@no_tf32()
def classes_of(encoder: Any, pixels: Tensor, labels: Sequence[str] | None = None) -> list[int] | None:
    """Top-1 class of each image (B, 3, H, W), by the head or zero-shot; None for an encoder with neither."""
    if labels:
        return [int(k) for k in encoder.classify(pixels, list(labels)).argmax(dim=1)]
    return [int(k) for k in encoder.classify(pixels).argmax(dim=1)] if encoder.has_head else None


@torch.no_grad()
@no_tf32()
def transfer_pair(other: Any, images: Sequence[Tensor]) -> tuple[Row, Tensor, Tensor]:
    """Ask another encoder g whether it, too, gives match and target one embedding.

    Args:
        other: g.
        images: source, match, target as g is to see them, each (3, H, W).

    Returns:
        `error` ‖g(match) − g(target)‖ / ‖g(target)‖ and `distance`, the same of the source; `moved` ‖g(match) −
        g(source)‖ / ‖g(source)‖; cosines; the labels that g gives; and g of source and target, (D,).
    """
    three = torch.stack(list(images)).to(other.device)
    z_source, z_match, z_target = other(three)
    seen = classes_of(other, three)
    names = None if seen is None else [other.label_names[k] for k in seen]
    row = {
        "error": relative_error(z_match, z_target),
        "distance": relative_error(z_source, z_target),
        "moved": relative_error(z_match, z_source),
        "cosine_to_target": cosine(z_match, z_target),
        "cosine_to_source": cosine(z_match, z_source),
        "cosine_source_target": cosine(z_source, z_target),
        "labels": names,
    }
    return row, z_source.detach().double().cpu(), z_target.detach().double().cpu()


def rank_of(query: Tensor, database: Tensor, wanted: int) -> int:
    """Place of one photo among a database, by cosine similarity to a query: 1 for the nearest.

    Args:
        query: (D,).
        database: (M, D).
        wanted: index of the photo.

    Returns:
        1 + the number of photos that are strictly nearer.
    """
    near = similarities(query, database)
    return 1 + int((near > near[wanted]).sum())


def similarities(query: Tensor, database: Tensor) -> Tensor:
    """Cosine similarity of a query (D,) to each of (M, D), float64."""
    query, database = query.double(), database.double()
    return (database @ query) / (database.norm(dim=1) * query.norm())


def nearest(query: Tensor, database: Tensor, k: int, without: Sequence[int] = ()) -> list[int]:
    """Indices of the k photos most similar to a query, nearest first, leaving some out; ties go to the lower index."""
    near = similarities(query, database)
    near[list(without)] = -torch.inf
    order = torch.sort(near, descending=True, stable=True).indices.tolist()
    return [i for i in order if i not in set(without)][:k]


def retrieve(z_match: Tensor, source: int, target: int, database: Tensor, k: int) -> Row:
    """Query a database with a match, and with its source as the control.

    Args:
        z_match: embedding of the match, (D,).
        source: place of the source in the database.
        target: place of the target.
        database: (M, D).
        k: neighbours that are compared; source and target themselves are left out of them.

    Returns:
        `rank` of the target for the match and `source_rank` for the source (the source itself left out of the
        database), and the share of the target's k neighbours that are also the match's (`overlap`) and the source's
        (`source_overlap`).
    """
    without = (source, target)
    own = set(nearest(database[target], database, k, without))
    there = {
        "overlap": set(nearest(z_match, database, k, without)),
        "source_overlap": set(nearest(database[source], database, k, without)),
    }
    others = torch.arange(len(database)) != source
    place = int(others[:target].sum())
    row: Row = {
        "rank": rank_of(z_match, database, target),
        "source_rank": rank_of(database[source], database[others], place),
    }
    return row | {name: len(own & found) / len(own) if own else None for name, found in there.items()}


def vote(query: Tensor, database: Tensor, classes: Sequence[str], k: int, without: Sequence[int] = ()) -> str:
    """Class of a query by its k nearest neighbours; a tie goes to the class whose votes are nearer in sum.

    Args:
        query: (D,).
        database: (M, D).
        classes: of the database, M names.
        k: neighbours that vote.
        without: places that do not vote.

    Returns:
        The class.
    """
    near = similarities(query, database)
    tally: dict[str, tuple[int, float]] = {}
    for i in nearest(query, database, k, without):
        count, total = tally.get(classes[i], (0, 0.0))
        tally[classes[i]] = count + 1, total + float(near[i])
    return max(sorted(tally), key=lambda name: tally[name])


def probe(pairs: Sequence[tuple[int, int, Tensor]], gallery: Gallery) -> Row | None:
    """A kNN classifier on the embeddings of labelled photos: what it makes of sources, matches and targets.

    The two photos of a pair do not vote on it.

    Args:
        pairs: place of the source, place of the target, embedding of the match (D,).
        gallery: the photos; those without a class do not vote.

    Returns:
        `photos`, `classes`, `k`, `accuracy` of leave-one-out on the photos, and for each pair what it gives `source`,
        `match` and `target`; None unless two classes have two photos or more.
    """
    voters = [i for i, name in enumerate(gallery.classes) if name is not None]
    names = [str(gallery.classes[i]) for i in voters]
    if sum(names.count(name) > 1 for name in set(names)) < 2:
        return None
    matrix = gallery.matrix
    database, place = matrix[voters], {i: n for n, i in enumerate(voters)}
    k = min(NEIGHBOURS, len(voters) - 2)
    hits = sum(vote(database[n], database, names, k, [n]) == names[n] for n in range(len(voters)))
    seen = []
    for source, target, z_match in pairs:
        without = [place[i] for i in (source, target) if i in place]
        three = {"source": matrix[source], "match": z_match, "target": matrix[target]}
        seen.append({name: vote(z, database, names, k, without) for name, z in three.items()})
    return {
        "photos": len(voters), "classes": len(set(names)), "k": k, "hits": hits, "accuracy": hits / len(voters),
        "pairs": seen,
    }  # fmt: skip


def pair_distances(sources: Tensor, targets: Tensor) -> list[float]:
    """‖f(a) − f(b)‖ / ‖f(b)‖ of source i and target j of different pairs; of its own for a single pair.

    Photos that embed alike to 1e-4 count as one photo and are left out.

    Args:
        sources: (B, D).
        targets: (B, D).

    Returns:
        The distances.
    """
    apart = ~torch.eye(len(sources), dtype=torch.bool) if len(sources) > 1 else torch.ones(1, 1, dtype=torch.bool)
    distance = torch.cdist(sources, targets, compute_mode="donot_use_mm_for_euclid_dist") / targets.norm(dim=1)
    return [float(d) for d in distance[apart & (distance > 1e-4)]]


def _random_step(source: Tensor, length: Tensor, name: str) -> Tensor:
    """The source, a step of this L2 length in a random direction away, inside the box and on k/255."""
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    v = torch.randn(source.shape, generator=generator, dtype=torch.float64)
    # clipping and rounding shorten or lengthen the step: a few corrections bring it to the length asked for
    scale, moved = float(length) / float(v.norm()), source.double().cpu()
    for _ in range(6):
        moved = round_8bit(source.double().cpu() + scale * v)
        reached = float((moved - source.double().cpu()).norm())
        if not reached or abs(reached / max(float(length), 1e-12) - 1) < 0.01:
            break
        scale *= float(length) / reached
    return moved.to(source)


def _middle(values: Sequence[float | None]) -> float | None:
    known = sorted(v for v in values if v is not None)
    return (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2 if known else None


def collect(rows: Sequence[Mapping[str, Any]], *keys: str) -> list[float | None]:
    """The values under nested keys, one per row."""
    values: list[Any] = list(rows)
    for key in keys:
        values = [None if value is None else value.get(key) for value in values]
    return values
