import pytest
import torch

from hf_equiv.geometry import headings
from hf_equiv.geometry.headings import MAX_PRODUCTS
from hf_equiv.passes import alone


def newton_step(product, gradient, radius, accuracy):
    def hessian(v):
        yield from ()  # no pass of f
        return product(v)

    return alone(headings.newton_step(hessian, gradient, radius, accuracy))


def quadratic(values, seed=0):
    g = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=g))
    return Q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ Q.T, torch.randn(
        len(values), dtype=torch.float64, generator=g
    )


def test_inside_the_ball_it_solves_the_linear_system():
    H, g = quadratic([1.0, 3.0, 7.0, 20.0, 50.0])
    found = newton_step(lambda v: H @ v, g, 100.0, 1e-9)
    assert torch.allclose(found.step, torch.linalg.solve(H, g), rtol=1e-7)
    assert not found.bound
    assert found.gain(1.0) == pytest.approx(0.5 * float(g @ found.step), rel=1e-7)


@pytest.mark.parametrize("values", [[1.0, 3.0, 7.0, 20.0], [-2.0, 1.0, 5.0, 9.0], [0.0, 0.0, 0.0, 0.0], [-1.0, -4.0]])
def test_it_stays_in_the_ball_and_gains_at_least_what_the_gradient_would(values):
    H, g = quadratic(values, seed=1)
    radius = 0.05
    found = newton_step(lambda v: H @ v, g, radius, 1e-9)
    assert found.bound
    assert float(found.step.norm()) == pytest.approx(radius, rel=1e-9)
    gain = float(g @ found.step - 0.5 * found.step @ H @ found.step)
    assert found.gain(1.0) == pytest.approx(gain, rel=1e-9)
    steepest = g / g.norm() * radius
    assert gain >= float(g @ steepest - 0.5 * steepest @ H @ steepest) - 1e-12


def test_shorter_steps_gain_what_the_model_says():
    H, g = quadratic([1.0, 2.0, 30.0], seed=2)
    found = newton_step(lambda v: H @ v, g, 10.0, 0.1)
    part = 0.3 * found.step
    assert found.gain(0.3) == pytest.approx(float(g @ part - 0.5 * part @ H @ part), rel=1e-9)


def test_accuracy_and_products_are_limited():
    H, g = quadratic([float(k) for k in range(1, 200)], seed=3)
    calls = []

    def product(v):
        calls.append(0)
        return H @ v

    found = newton_step(product, g, 1e6, 0.1)
    assert float((g - H @ found.step).norm()) <= 0.1 * float(g.norm())
    assert len(calls) < MAX_PRODUCTS
    calls.clear()
    newton_step(product, g, 1e6, 1e-15)
    assert len(calls) == MAX_PRODUCTS
