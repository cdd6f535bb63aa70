"""The encoders of `cases.py` are what they say: they are the yardstick of the numerics."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, SHAPE, images, linear, orthogonal, quadratic, rank_deficient, unreachable

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_jacobian_is_autograds(case):
    x = images(1, dtype=torch.float64)
    dense = torch.autograd.functional.jacobian(case.f, x).reshape(-1, x.numel())
    torch.testing.assert_close(case.f.jacobian(x[0]), dense, rtol=1e-12, atol=1e-12)


@every_case
def test_rank_and_singular_values(case):
    values = torch.linalg.svdvals(case.f.jacobian(images(1, dtype=torch.float64)[0]))
    assert int((values > 1e-12 * values[0]).sum()) == case.rank
    assert case.rank + case.nullity == images(1).numel()
    if case.singular_values is not None:
        torch.testing.assert_close(values, case.singular_values, rtol=1e-12, atol=1e-13)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_keeps_the_dtype_and_ignores_the_batch(case, dtype):
    x = images(5, dtype=dtype)
    together = case.f(x)
    assert together.dtype is dtype
    assert torch.equal(together, torch.cat([case.f(one) for one in x.split(1)]))


@pytest.mark.parametrize("f", [linear(), orthogonal()], ids=["linear", "orthogonal"])
def test_nearest_match_embeds_as_the_target_and_moves_in_the_row_space(f):
    x, z = images(3, dtype=torch.float64), f(images(3, seed=1, dtype=torch.float64))
    match = f.nearest_match(x, z)
    torch.testing.assert_close(f(match), z, rtol=1e-12, atol=1e-12)
    null = torch.linalg.svd(f.A).Vh[len(f.A) :]
    assert (null @ (match - x).flatten(1).T).abs().max() < 1e-12


def test_unreachable_is_as_far_as_it_says():
    x, z = unreachable(3, error=0.1, dtype=torch.float64)
    f = rank_deficient()
    best = f(f.nearest_match(x, z))
    torch.testing.assert_close((best - z).norm(dim=1) / z.norm(dim=1), torch.full((3,), 0.1, dtype=torch.float64))


def test_quadratic_has_its_second_derivative():
    f, x = quadratic(), images(1, dtype=torch.float64)
    v = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    second = (f(x + 0.1 * v) - 2 * f(x) + f(x - 0.1 * v)) / 0.1**2
    torch.testing.assert_close(second[0], f.second_derivative(v[0]), rtol=1e-9, atol=1e-9)
