"""Ranks, neighbours and votes in a database of embeddings, on databases of known answer."""

import pytest
import torch
from fakes import Known, TinyEncoder, pixels_of_photo

from hf_equiv.report import numbers, search


def test_ranks_in_a_known_database():
    database = torch.eye(4, dtype=torch.float64)
    query = torch.tensor([0.1, 0.9, 0.5, 0.0])
    assert [search.rank_of(query, database, k) for k in range(4)] == [3, 1, 2, 4]
    assert search.nearest(query, database, 2) == [1, 2]
    assert search.nearest(query, database, 3, without=[1]) == [2, 0, 3]


def test_a_match_finds_what_its_target_finds():
    generator = torch.Generator().manual_seed(0)
    database = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    for source, target in ((3, 17), (17, 3)):
        found = search.retrieve(database[target] * 1.5, source, target, database, 10)
        assert found["rank"] == 1
        assert found["overlap"] == 1.0
        assert found["source_overlap"] < 1.0
        near = search.similarities(database[source], database)
        near[source] = -2
        assert found["source_rank"] == 1 + int((near > near[target]).sum())


def test_votes_and_ties():
    angle = torch.tensor([0.0, 0.1, 0.2, 1.4, 1.5, 1.6])
    database = torch.stack([angle.cos(), angle.sin()], dim=1)
    classes = ["a", "a", "a", "b", "b", "b"]
    assert search.vote(torch.tensor([1.0, 0.1]), database, classes, 3) == "a"
    assert search.vote(torch.tensor([0.1, 1.0]), database, classes, 3) == "b"
    assert search.vote(torch.tensor([1.0, 0.1]), database, classes, 3, without=[0, 1, 2]) == "b"
    assert search.vote(torch.tensor([1.0, 1.2]), database, ["a", "b"] * 3, 2, without=[0, 1, 4, 5]) == "b"


def red_and_blue() -> search.Gallery:
    """Eight photos, embedded as how red and how blue they are; the odd ones are red."""
    gallery = search.Gallery(Known(lambda x: torch.stack([x[0].mean(), x[2].mean()])))
    for k in range(8):
        colour = torch.zeros(3, 4, 4)
        colour[0 if k % 2 else 2] = 0.5 + k / 20
        gallery.add(colour, "red" if k % 2 else "blue")
    return gallery


def test_probe_follows_the_embedding():
    gallery = red_and_blue()
    red, blue = 1, 2
    found = search.probe([(red, blue, gallery.vectors[blue]), (red, blue, gallery.vectors[red])], gallery)
    assert found["hits"] == found["photos"] == 8
    assert found["k"] == 5
    assert [pair["match"] for pair in found["pairs"]] == ["blue", "red"]
    assert [(pair["source"], pair["target"]) for pair in found["pairs"]] == [("red", "blue")] * 2


def test_probe_needs_two_classes_of_two():
    gallery = search.Gallery(TinyEncoder())
    for k in range(4):
        gallery.add(pixels_of_photo(k), str(k))
    assert search.probe([], gallery) is None
    assert gallery.add(pixels_of_photo(0)) == 0
    assert len(gallery.vectors) == 4


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_an_embedding_without_a_direction_has_no_rank(bad):
    """It is not the best of all: NaN compares as neither more nor less, which is no first place."""
    generator = torch.Generator().manual_seed(0)
    database = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    lost = torch.full((6,), bad, dtype=torch.float64)
    assert search.rank_of(lost, database, 3) is None
    assert search.nearest(lost, database, 3) == []
    assert search.vote(lost, database, ["a", "b"] * 6, 3) is None
    found = search.retrieve(lost, 2, 3, database, 4)
    assert (found["rank"], found["overlap"]) == (None, None)
    assert found["source_rank"] is not None
    broken = database.clone()
    broken[3] = lost
    found = search.retrieve(database[3], 2, 3, broken, 4)  # the target's own
    assert (found["rank"], found["source_rank"], found["overlap"]) == (None, None, None)
    broken = database.clone()
    broken[5] = lost  # a photo that has nothing to do with it is nobody's neighbour, and before nobody
    for query in (database[2], database[3]):
        assert 5 not in search.nearest(query, broken, 11)
        assert len(search.nearest(query, broken, 12)) == 11
    assert search.rank_of(database[3], broken, 3) == 1
    pairs = [{"rank": 1, "source_rank": 2, "overlap": 1.0, "source_overlap": 0.0}] * 2
    pairs += [{"rank": None, "source_rank": 3, "overlap": None, "source_overlap": 0.0}]
    told = numbers._retrieval({"photos": 9, "k": 2, "chance": 0.1, "pairs": pairs})
    assert (told.first.hits, told.first.n) == (2, 2)
    assert (told.rank.n, told.source_rank.n) == (2, 3)


def test_a_match_without_a_direction_gets_no_class():
    gallery = red_and_blue()
    lost = torch.zeros(2, dtype=torch.float64)
    found = search.probe([(1, 2, lost), (1, 2, gallery.vectors[2])], gallery)
    assert [pair["match"] for pair in found["pairs"]] == [None, "blue"]
    told = numbers._probe(found)
    assert (told.flipped.hits, told.flipped.n, told.kept.hits) == (1, 1, 0)
