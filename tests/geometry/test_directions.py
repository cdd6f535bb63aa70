"""Directions of every kind against closed forms; each bad request is a clear error."""

from __future__ import annotations

import pytest
import torch
from cases import EIGHT, SHAPE, SIGMA, images, linear, quadratic, smooth_mlp

from hf_equiv.geometry.directions import make_directions


def flat(directions):
    return directions.vectors.flatten(2)


@pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)
def test_each_kind_is_what_its_name_says(case):
    x, t, m = (images(2, seed=s, dtype=torch.float64) for s in (2, 3, 4))
    d = make_directions(case.f, x, random=3, top=2, row=case.rank, null=4, gradient=True, toward=t, match=m)
    assert d.kinds == ("random",) * 3 + ("top",) * 2 + ("row",) * case.rank + ("null",) * 4 + (
        "gradient",
        "toward",
        "match",
    )
    assert len(d) == len(d.indices) == d.vectors.shape[1]
    assert d.vectors.dtype == torch.float64
    torch.testing.assert_close(flat(d).norm(dim=2), torch.ones(2, len(d), dtype=torch.float64))
    for b in range(2):
        J = case.f.jacobian(x[b])
        sigma = torch.linalg.svdvals(J)
        kind = {k: flat(d)[b][[i for i, name in enumerate(d.kinds) if name == k]] for k in d.kinds}
        torch.testing.assert_close((kind["top"] @ J.T).norm(dim=1), sigma[:2])
        torch.testing.assert_close((kind["row"] @ J.T).norm(dim=1), sigma[: case.rank])
        assert float((kind["null"] @ J.T).norm(dim=1).max()) <= 1e-13 * float(sigma[0])
        cosine = torch.nn.functional.cosine_similarity
        gradient = J.T @ (case.f(t[b : b + 1]) - case.f(x[b : b + 1]))[0]
        assert float(cosine(kind["gradient"][0], gradient, dim=0)) == pytest.approx(1)
        assert float(cosine(kind["toward"][0], (t[b] - x[b]).flatten(), dim=0)) == pytest.approx(1)
        assert float(cosine(kind["match"][0], (m[b] - x[b]).flatten(), dim=0)) == pytest.approx(1)


def test_row_directions_are_spread_over_the_row_space():
    d = make_directions(linear(), images(1, dtype=torch.float64), row=3)
    assert d.indices == (0, 6, 11) or d.indices == (0, 5, 11)
    torch.testing.assert_close((flat(d)[0] @ linear().A.T).norm(dim=1), SIGMA[list(d.indices)])


def test_gradient_without_an_image_is_that_of_the_squared_norm():
    x = images(1, dtype=torch.float64).requires_grad_(True)
    (gradient,) = torch.autograd.grad(0.5 * smooth_mlp()(x).square().sum(), x)
    d = make_directions(smooth_mlp(), x, gradient=True)
    torch.testing.assert_close(d.vectors[0, 0], (gradient / gradient.norm())[0])


def test_float32_images_give_float32_directions_that_are_null():
    x = images(1)
    d = make_directions(quadratic(), x, null=5)
    assert d.vectors.dtype == torch.float32
    assert float((flat(d)[0].double() @ quadratic().jacobian(x[0]).T).norm(dim=1).max()) < 1e-5


def test_the_same_seed_gives_the_same_directions():
    x = images(2)
    one, two = (
        make_directions(linear(), x, random=2, null=2, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    other = make_directions(linear(), x, random=2, null=2, generator=torch.Generator().manual_seed(6))
    assert torch.equal(one.vectors, two.vectors)
    assert not torch.equal(one.vectors, other.vectors)
    assert not torch.equal(one.vectors[0], one.vectors[1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "must be asked for a direction"),
        ({"top": 13}, ValueError, "`top` must be at most the rank 12"),
        ({"row": 13}, ValueError, "`row` must be at most the rank 12"),
        ({"random": -1}, ValueError, "`random` must be at least 0"),
        ({"null": 1.5}, TypeError, "`null` must be a whole number"),
        ({"toward": images(1)}, ValueError, "must not be zero"),
        ({"toward": torch.zeros(3, *SHAPE)}, ValueError, "`toward` must have the shape of `images`"),
        ({"match": torch.zeros(1, 3, 4, 4)}, ValueError, "`match` must have the shape of `images`"),
        ({"toward": images(1) + 2}, ValueError, r"`toward` must lie in \[0, 1\]"),
    ],
)
def test_bad_requests(options, error, message):
    with pytest.raises(error, match=message):
        make_directions(linear(), images(1), **options)


def test_no_null_space_and_no_row_space():
    with pytest.raises(ValueError, match="`null` must be 0"):
        make_directions(lambda x: x.flatten(1), torch.full((1, 1, 2, 2), 0.5), null=1)
    with pytest.raises(ValueError, match="at most the rank 0"):
        make_directions(lambda x: x.flatten(1)[:, :2] * 0 + 1, torch.full((1, 1, 2, 2), 0.5), top=1)


class Half:
    """A bfloat16 encoder, with or without a float64 twin."""

    dtype = torch.bfloat16

    def __call__(self, x):
        return smooth_mlp()(x.bfloat16())


class HalfWithTwin(Half):
    def double(self):
        return smooth_mlp()


def test_half_precision_takes_the_directions_of_its_twin():
    x = images(1)
    d = make_directions(HalfWithTwin(), x, top=2, null=2)
    exact = make_directions(smooth_mlp(), x.double(), top=2, null=2)
    torch.testing.assert_close(d.vectors.double().abs(), exact.vectors.abs(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="must be float32 or float64"):
        make_directions(Half(), x, null=1)
