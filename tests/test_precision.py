"""The noise of an encoder against noise that was put there, and against rounding measured directly."""

from __future__ import annotations

import pytest
import torch
from cases import EIGHT, images, smooth_mlp

from hf_equiv.geometry.secants import ecnoise, secant_noise
from hf_equiv.jacobian import Jacobian
from hf_equiv.precision import float64_twin, in_float64, resolved_step

RADII = torch.logspace(-4, 0, 17, dtype=torch.float64)


class WithTwin:
    """A float32 encoder that knows its float64 twin."""

    def __init__(self, inner, dtype=torch.float32):
        self.inner, self.dtype = inner, dtype

    def __call__(self, pixels):
        return self.inner(pixels.to(self.dtype))

    def double(self):
        return self if self.dtype == torch.float64 else WithTwin(self.inner, torch.float64)


def rounding(f, x, h, count=20):
    """Root mean square of the rounding part of secants at h, over random directions."""
    v = torch.randn(count, *x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    v /= v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    ends = [x.double() + h * v, x.double() - h * v]
    rounded = f(ends[0].to(x.dtype)).double() - f(ends[1].to(x.dtype)).double()
    return float((rounded - (f(ends[0]) - f(ends[1]))).norm(dim=1).square().mean().sqrt() / (2 * h))


@pytest.mark.parametrize("sigma", [1e-12, 1e-6, 1e-3])
def test_ecnoise_finds_the_noise_put_on_a_smooth_function(sigma):
    generator = torch.Generator().manual_seed(0)
    t = 1e-4 * torch.arange(9, dtype=torch.float64)[:, None]
    smooth = torch.sin(t + torch.arange(50, dtype=torch.float64))
    noisy = smooth + sigma * torch.randn(9, 50, generator=generator, dtype=torch.float64)
    assert float(ecnoise(noisy)[0]) == pytest.approx(sigma * 50**0.5, rel=0.25)


def test_ecnoise_of_a_constant_is_zero():
    assert float(ecnoise(torch.ones(9, 4, dtype=torch.float64))[0]) == 0


@pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)
@pytest.mark.parametrize("twin", [False, True])
def test_floor_is_the_rounding_that_happens(case, twin):
    x = images(1, seed=2)[0]
    floor, method, _ = secant_noise(WithTwin(case.f) if twin else case.f, x, RADII)
    assert method == ("twin" if twin else "ecnoise")
    for j in (0, 4, 8, 12):
        assert float(floor[j]) == pytest.approx(rounding(case.f, x, float(RADII[j])), rel=0.6)


def test_float64_has_a_floor_of_its_own():
    x = images(1, dtype=torch.float64)[0]
    floor, method, _ = secant_noise(smooth_mlp(), x, RADII)
    assert method == "ecnoise"
    assert bool((1e-17 < floor * RADII).all())
    assert bool((floor * RADII < 1e-14).all())


def test_noise_that_f_makes_itself_is_seen():
    generator = torch.Generator().manual_seed(0)

    def f(x):
        return smooth_mlp()(x) + 1e-3 * torch.randn(len(x), 12, generator=generator, dtype=x.dtype)

    floor, _, _ = secant_noise(f, images(1, dtype=torch.float64)[0], RADII)
    assert float(floor[0] * RADII[0]) == pytest.approx(1e-3 * (12 / 2) ** 0.5, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_encoder_has_the_rounding_of_its_output(dtype):
    floor, _, _ = secant_noise(lambda x: x.new_ones(len(x), 4), images(1, dtype=dtype)[0], RADII)
    torch.testing.assert_close(floor * RADII, torch.full_like(RADII, 2 * torch.finfo(dtype).eps / 4))


def test_passes_are_counted():
    calls = []

    def f(x):
        calls.append(len(x))
        return smooth_mlp()(x)

    _, _, passes = secant_noise(f, images(1)[0], RADII)
    assert passes == sum(calls) == 55
    twin = WithTwin(f)
    calls.clear()
    _, method, passes = secant_noise(twin, images(1)[0], RADII)
    assert method == "twin"
    assert passes == sum(calls)


def test_a_module_is_never_converted():
    module = torch.nn.Linear(4, 2)
    assert float64_twin(module) is None
    assert module.weight.dtype == torch.float32
    assert float64_twin(WithTwin(smooth_mlp(), torch.float64)) is None
    assert float64_twin(WithTwin(smooth_mlp())).dtype == torch.float64


def test_the_same_floor_every_time():
    x = images(1)[0]
    assert torch.equal(secant_noise(smooth_mlp(), x, RADII)[0], secant_noise(smooth_mlp(), x, RADII)[0])


@pytest.mark.parametrize(("method", "message"), [("twin", "without a float64 twin"), ("guess", "must be one of")])
def test_bad_methods(method, message):
    with pytest.raises(ValueError, match=message):
        secant_noise(smooth_mlp(), images(1)[0], RADII, method=method)


class Hidden(torch.autograd.Function):
    """A product in float32 that neither its input nor its output shows."""

    @staticmethod
    def forward(ctx, pixels, weight):
        ctx.save_for_backward(weight)
        return (pixels.float() @ weight.float().T).double()

    @staticmethod
    def backward(ctx, grad):
        return (grad.float() @ ctx.saved_tensors[0].float()).double(), None


def autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (x.float().flatten(1) @ smooth_mlp().W1.float().T).double()


SINGLE_WEIGHT = torch.ones(1)
SINGLE, HALF, BRAIN = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16))
INSIDE = {
    "float64": (smooth_mlp(), 2.3e-16),
    "input": (lambda x: smooth_mlp()(x.float()).double(), SINGLE),
    "half": (lambda x: smooth_mlp()(x.half().double()), HALF),
    "output": (lambda x: smooth_mlp()(x).float().double(), SINGLE),
    "softmax": (lambda x: torch.softmax(x.flatten(1), dim=1, dtype=torch.float32).double(), SINGLE),
    "sum": (lambda x: smooth_mlp()(x) + 1e-3 * smooth_mlp()(x.float()).double(), SINGLE),
    "autocast": (autocast, BRAIN),
    "hidden": (lambda x: Hidden.apply(x.flatten(1), smooth_mlp().W1), SINGLE),
    "type of a weight": (lambda x: smooth_mlp()(x.to(SINGLE_WEIGHT.dtype)).double(), SINGLE),
    "weights": (lambda x: x.flatten(1) @ smooth_mlp().W1.float().double().T, 2.3e-16),
    "constant": (lambda x: x.flatten(1)[:, :4] * 0 + 1, 2.3e-16),
    "kink": (lambda x: torch.relu(x.flatten(1)[:, :4] - x[:, :1, 0, 0]), 2.3e-16),
}


def working_eps(f, image):
    """The spacing of the coarsest numbers in which f computes, by their types, or else by its steps."""
    eps = Jacobian(f, image).eps
    step, _ = resolved_step(f, image, eps)
    return eps if step == 512 * eps else step / 16


@pytest.mark.parametrize("name", INSIDE)
def test_precision_is_what_the_function_computes_in(name):
    f, spacing = INSIDE[name]
    assert spacing / 10 <= working_eps(f, images(1, dtype=torch.float64)[0]) <= 10 * spacing


@pytest.mark.parametrize("name", [name for name in INSIDE if name not in ("hidden", "weights")])
def test_in_float64_leaves_nothing_narrow(name):
    """The two differ by the rounding of the function, and the second has no coarser step than float64."""
    f, spacing = INSIDE[name]
    x = images(1, dtype=torch.float64)
    wide = in_float64(f)
    assert float((wide(x) - f(x)).norm()) <= 4 * spacing * float(f(x).norm())
    assert working_eps(wide, x[0]) < 1e-15
