"""Find photos by the cosine of their embeddings: a database, ranks in it, neighbours, and a classifier by votes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_equiv.runs.schema import Row

NEIGHBOURS = 5  # neighbours that vote in the kNN probe


@dataclass
class Gallery:
    """Embeddings of distinct photos, with known classes; the digest of its pixels identifies a photo."""

    embed: Callable[[Tensor], Tensor]
    vectors: list[Tensor] = field(default_factory=list)
    classes: list[str | None] = field(default_factory=list)
    places: dict[bytes, int] = field(default_factory=dict)

    def add(self, pixels: Tensor, label: str | None = None) -> int:
        """Add a photo (3, H, W) unless the same pixels are there already; return its place."""
        key = hashlib.sha256((pixels.double() * 255).round().to(torch.uint8).cpu().numpy().tobytes()).digest()
        if key not in self.places:
            self.places[key] = len(self.vectors)
            self.vectors.append(self.embed(pixels[None])[0].detach().double().cpu())
            self.classes.append(label)
        elif self.classes[self.places[key]] is None:
            self.classes[self.places[key]] = label
        return self.places[key]


def similarities(query: Tensor, database: Tensor) -> Tensor:
    """Return the cosine of a query (D,) with each of (M, D), float64; −∞ where an embedding is zero or not finite."""
    query, database = query.double(), database.double()
    near = (database @ query) / (database.norm(dim=1) * query.norm())
    return torch.where(near.isfinite(), near, -torch.inf)


def rank_of(query: Tensor, database: Tensor, wanted: int) -> int | None:
    """Return 1 + the number of photos (M, D) nearer to a query (D,) than the wanted one; None without a cosine."""
    near = similarities(query, database)
    return 1 + int((near > near[wanted]).sum()) if near[wanted] > -torch.inf else None


def nearest(query: Tensor, database: Tensor, k: int, without: Sequence[int] = ()) -> list[int]:
    """Return the indices of the k photos nearest to a query, leaving some out; ties go to the lower index."""
    near = similarities(query, database)
    near[list(without)] = -torch.inf
    order = near.argsort(descending=True, stable=True)
    return [i for i in order.tolist() if near[i] > -torch.inf][:k]


def retrieve(z_match: Tensor, source: int, target: int, database: Tensor, k: int) -> Row:
    """Query a database (M, D) with a match, and with its source (left out of the database) as the control."""
    # `overlap` is the share of the target's k neighbours, without source and target, that are also the match's.
    own, match_near, source_near = (
        set(nearest(query, database, k, (source, target))) for query in (database[target], z_match, database[source])
    )
    others = torch.arange(len(database)) != source
    return {
        "rank": rank_of(z_match, database, target),
        "source_rank": rank_of(database[source], database[others], int(others[:target].sum())),
        "overlap": len(own & match_near) / len(own) if own and match_near else None,
        "source_overlap": len(own & source_near) / len(own) if own and source_near else None,
    }


def vote(query: Tensor, database: Tensor, classes: Sequence[str], k: int, without: Sequence[int] = ()) -> str | None:
    """Return the class of a query by its k nearest neighbours, ties by the sum of cosines; None if there are none."""
    near = similarities(query, database)
    tally: dict[str, tuple[int, float]] = {}
    for i in nearest(query, database, k, without):
        count, total = tally.get(classes[i], (0, 0.0))
        tally[classes[i]] = count + 1, total + float(near[i])
    return max(sorted(tally), key=lambda name: tally[name], default=None)


def probe(pairs: Sequence[tuple[int, int, Tensor]], gallery: Gallery) -> Row | None:
    """Classify photos and pairs by the nearest labelled photos; None unless two classes have two photos or more."""
    # A photo does not vote on itself, nor do the two photos of a pair.
    voters = [i for i, name in enumerate(gallery.classes) if name is not None]
    names = [str(gallery.classes[i]) for i in voters]
    if sum(names.count(name) > 1 for name in set(names)) < 2:
        return None
    matrix = torch.stack(gallery.vectors)
    database, place = matrix[voters], {i: n for n, i in enumerate(voters)}
    k = min(NEIGHBOURS, len(voters) - 2)
    hits = sum(vote(database[n], database, names, k, [n]) == names[n] for n in range(len(voters)))
    seen = []
    for source, target, z_match in pairs:
        without = [place[i] for i in (source, target) if i in place]
        three = {"source": matrix[source], "match": z_match, "target": matrix[target]}
        seen.append({name: vote(z, database, names, k, without) for name, z in three.items()})
    return {"photos": len(voters), "classes": len(set(names)), "k": k, "hits": hits, "pairs": seen}
