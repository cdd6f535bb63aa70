"""The linear model of f against dense float64 algebra: learnt rows, held pixels, corrections, projections."""

from __future__ import annotations

import pytest
import torch
from cases import DIM, EIGHT, SHAPE, images, smooth_mlp

from hf_equiv.geometry.corrector import Corrector
from hf_equiv.jacobian import Jacobian, jacobian_cost
from hf_equiv.matching.linear_model import LinearModel
from hf_equiv.passes import alone

every_case = pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)


def linear_model(J: Jacobian) -> LinearModel:
    return LinearModel(J.as_matrix(), J.image.shape)


def learn(model: LinearModel, J: Jacobian, u: torch.Tensor) -> None:
    u = (u / u.norm()).to(model.A).double()
    model.learn(u, J.rmv(u[None])[0])


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_free(seed: int = 1) -> torch.Tensor:
    return gaussian(*SHAPE, seed=seed) > -0.3


@every_case
def test_projection_and_correction_are_those_of_the_dense_matrix(case):
    x = images(1, seed=2, dtype=torch.float64)[0]
    model, v, r = linear_model(Jacobian(case.f, x)), gaussian(*SHAPE), gaussian(DIM, seed=3)
    free = some_free()
    model.hold(some_free(seed=9))  # columns leave and come back
    model.hold(free)
    A = case.f.jacobian(x) * free.flatten()
    inverse = torch.linalg.pinv(A, rtol=1e-7)
    expected = (v * free).flatten() - inverse @ (A @ v.flatten())
    torch.testing.assert_close(model.project_null(v).flatten(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.correction(r).flatten(), -inverse @ r, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.multipliers(v), inverse.T @ (v * free).flatten(), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.apply(v), case.f.jacobian(x) @ v.flatten(), rtol=0, atol=1e-12)
    assert float((A @ model.project_null(v).flatten()).norm()) <= 1e-13 * float(A.norm() * v.norm())


@pytest.mark.parametrize(("dtype", "followed"), [(torch.float32, False), (torch.float64, True)])
def test_noise_along_the_smallest_singular_values_is_not_followed(dtype, followed):
    left, right = torch.linalg.qr(gaussian(3, 3))[0], torch.linalg.qr(gaussian(192, 3, seed=1))[0]
    A = left @ torch.diag(torch.tensor([1.0, 0.1, 5e-5], dtype=torch.float64)) @ right.T
    model = linear_model(Jacobian(lambda x: x.flatten(1) @ A.T.to(x), images(1, seed=2, dtype=dtype)[0]))
    step = model.correction(left @ torch.full((3,), 1e-6, dtype=torch.float64))
    assert float(step.norm()) == pytest.approx(0.02 if followed else 1e-5, rel=0.01)


def test_a_learnt_row_is_true_and_the_others_stay():
    f, (x, y) = smooth_mlp(), images(2, seed=4, dtype=torch.float64)
    model, u = linear_model(Jacobian(f, x)), gaussian(DIM)
    before = model.A.clone()
    model.hold(some_free())
    learn(model, Jacobian(f, y), u)
    torch.testing.assert_close(u @ model.A, u @ f.jacobian(y), rtol=0, atol=1e-13)
    other = gaussian(DIM, seed=5)
    other = other - (other @ u) / (u @ u) * u
    torch.testing.assert_close(other @ model.A, other @ before, rtol=0, atol=1e-13)


def test_after_a_row_for_every_dimension_the_model_is_the_jacobian():
    f, (x, y) = smooth_mlp(), images(2, seed=4, dtype=torch.float64)
    model = linear_model(Jacobian(f, x))
    model.hold(some_free())
    for u in torch.linalg.qr(gaussian(DIM, DIM)).Q:
        learn(model, Jacobian(f, y), u)
    torch.testing.assert_close(model.A, f.jacobian(y), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 2e-7)])
def test_the_gram_matrix_follows_every_change(dtype, rtol):
    f, points = smooth_mlp(), images(40, seed=6, dtype=dtype)
    model = linear_model(Jacobian(f, points[0]))
    for i, x in enumerate(points):
        model.hold(some_free(seed=i))
        learn(model, Jacobian(f, x), gaussian(DIM, seed=100 + i))
    A = (model.A * model.free.flatten()).double()
    assert float((model.G - A @ A.T).norm()) <= rtol * float(model.G.norm())


@pytest.mark.parametrize("known", [False, True])
def test_an_update_adds_its_product(known):
    model = linear_model(Jacobian(smooth_mlp(), images(1, dtype=torch.float64)[0]))
    u, v = gaussian(DIM), gaussian(*SHAPE)
    A = model.A + torch.outer(u, v.flatten())
    model.hold(some_free())
    model.update(u, v, model.apply(v) if known else None)
    torch.testing.assert_close(model.A, A, rtol=0, atol=1e-13)
    torch.testing.assert_close(model.G, (A * model.free.flatten()) @ A.T, rtol=1e-12, atol=1e-12)


def test_a_zero_direction_teaches_nothing():
    f, x = smooth_mlp(), images(1, dtype=torch.float64)[0]
    corrector = Corrector(f, f(x[None])[0], 1e-12)

    def work():
        at = yield from corrector.look(x)
        yield from corrector.refresh(at)
        before = corrector.model.A.clone()
        yield from corrector.learn(at, torch.zeros(DIM, dtype=torch.float64))
        return before

    assert torch.equal(alone(work()), corrector.model.A)
    assert corrector.num_evals == pytest.approx(jacobian_cost(DIM))
