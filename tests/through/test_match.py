"""The search for matches that survive transformations."""

import pytest
import torch
from fakes import TinyEncoder, pixels_of_photo

from hf_equiv import Encoder, load_images, match_embedding
from hf_equiv.analyses.measures import measure_match
from hf_equiv.through.match import SHARE, match_through
from hf_equiv.through.transformations import read_transformations


def search(encoder, sources, targets, *names, seeds=range(9), **more):
    source, target = torch.stack(sources), torch.stack(targets)
    generators = [torch.Generator().manual_seed(seed) for seed, _ in zip(seeds, sources, strict=False)]
    given = {"radius": None, "norm": "linf", "max_evals": 80} | more
    return match_through(encoder, source, encoder(target), read_transformations(names), generators, **given)


def test_survives_jpeg_where_a_plain_match_does_not():
    encoder = Encoder.from_pretrained("builtin-64")
    source, target = encoder.preprocess([item.image for item in load_images("builtin").select([0, 1])]).split(1)
    plain = match_embedding(encoder, source, target, rtol=0.02).images[0]
    found = search(encoder, [source[0]], [target[0]], "jpeg:75", max_evals=200)
    (before,), (after,) = (
        measure_match(encoder, source[0], x, target[0], seed=0, pair_id="a", through=["jpeg:75"])["through"]
        for x in (plain, found.images[0])
    )
    assert after["error"] < 0.6 * before["error"]
    assert found.psnr_db > 20


@pytest.mark.parametrize("ball", [{}, {"radius": 16 / 255}, {"radius": 1.0, "norm": "l2"}])
def test_result_is_in_the_ball_nearer_and_the_same_alone(ball):
    encoder, photos = TinyEncoder(), [pixels_of_photo(k) for k in range(4)]
    told = []
    both = search(encoder, photos[:2], photos[2:], "jpeg:60-95", "noise:2/255", progress=told.append, **ball)
    alone = search(encoder, photos[1:2], photos[3:], "jpeg:60-95", "noise:2/255", seeds=[1], **ball)
    assert torch.equal(both.images[1], alone.images[0])
    assert both.num_evals.tolist() == [3 * int(SHARE * 80 / 3)] * 2
    assert [p.num_evals[0] for p in told] == [*range(3, int(both.num_evals[0]) + 1, 3)]
    assert (both.errors < 0.8 * told[0].errors).all()
    assert both.images.min() >= 0
    assert both.images.max() <= 1
    gap = (both.images - torch.stack(photos[:2])).flatten(1)
    distance = gap.norm(dim=1) if "norm" in ball else gap.abs().amax(dim=1)
    assert (distance <= ball.get("radius", 1.0) + 1e-6).all()


def test_too_few_evaluations_leave_the_source():
    photos = [pixels_of_photo(k) for k in range(2)]
    found = search(TinyEncoder(), photos[:1], photos[1:], "jpeg:75", max_evals=2)
    assert torch.equal(found.images[0], photos[0])
    assert found.num_evals.tolist() == [0.0]


def test_an_encoder_that_fails_moves_nothing():
    tiny = TinyEncoder()
    photos = [pixels_of_photo(k) for k in range(2)]

    def broken(x):
        return tiny(x) * torch.where(x.flatten(1)[:, :1] == photos[0].flatten()[0], torch.nan, 1.0)

    found = match_through(
        broken, photos[0][None], tiny(photos[1][None]), read_transformations(["blur:1"]), [torch.Generator()],
        radius=None, norm="linf", max_evals=8,
    )  # fmt: skip
    assert found.images.isfinite().all()
