"""Sets that hold all embeddings: their distances against brute force, and targets that images have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_equiv.matching.match import match_embedding
from hf_equiv.models.encoder import Encoder
from hf_equiv.results import ConvergenceError, Status

WIDTH, TOKENS = 16, 3
WEIGHTS = torch.tensor([0.7, -0.4, 0.5], dtype=torch.float64)


class Normed(torch.nn.Module):
    """z = T(LayerNorm(tokens(x))), with a random affine part and a T of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kind = kind
        self.tokens = torch.nn.Linear(192, TOKENS * WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, 24 if kind == "wide" else 5)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator)
        self.norm.weight.data = 1 + 0.3 * self.norm.weight.data
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm(torch.tanh(0.1 * self.tokens(x.flatten(1))).view(-1, TOKENS, WIDTH)))

    def after(self, y: Tensor) -> Tensor:
        if self.kind == "mean":
            return y.mean(dim=1)
        if self.kind == "weighted":
            return WEIGHTS.to(y) @ y
        if self.kind == "tokens":
            return y.flatten(1)
        z = y[:, 1]
        if self.kind == "bent":
            return torch.tanh(0.01 * z)
        if self.kind == "unit":
            return z / z.norm(dim=1, keepdim=True)
        return z if self.kind == "one" else self.head(z)


def encoder_of(module: torch.nn.Module, dtype: torch.dtype = torch.float64) -> Encoder:
    return Encoder.wrap(module, size=8, mean=0.4, std=0.3, dtype=dtype, device="cpu")


def pixels(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def nearest(module: Normed, z: Tensor) -> Tensor:
    """The least distance of T(γu + β) from each z over centred u with ‖u‖² ≤ d, by projected gradient steps."""
    u = torch.randn(len(z), TOKENS, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    least, ahead, momentum = torch.full((len(z),), torch.inf, dtype=torch.float64), u, 1.0
    for _ in range(2000):
        ahead = ahead.requires_grad_()
        distance2 = (module.after(module.norm.weight * ahead + module.norm.bias) - z).square().sum(dim=1)
        (slope,) = torch.autograd.grad(distance2.sum(), ahead)
        moved = ahead.detach() - 2e-3 * slope
        moved = moved - moved.mean(dim=2, keepdim=True)
        moved = moved * (WIDTH**0.5 / moved.norm(dim=2, keepdim=True)).clamp_max(1.0)
        after = 0.5 * (1 + (1 + 4 * momentum**2) ** 0.5)  # Nesterov's steps
        u, ahead, momentum = moved, moved + (momentum - 1) / after * (moved - u), after
        least = torch.minimum(least, distance2.detach().sqrt())
    return least


@pytest.mark.parametrize("kind", ["one", "mean", "weighted", "head", "wide"])
def test_least_errors_are_those_of_a_search(kind):
    module = Normed(kind)
    f, x = encoder_of(module), pixels(3)
    with torch.no_grad():
        own = f(x)
    draw = torch.randn(own.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    z = torch.cat([1.5 * own, -own, 3 * draw])
    stated = f.least_errors(x[0], z) * z.norm(dim=1)
    assert bool((stated > 0.01).any())
    torch.testing.assert_close(stated, nearest(module, z), rtol=1e-4, atol=1e-4)
    u = torch.randn(2000, TOKENS, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    reached = module.after(module.norm(u)).detach()
    assert float(f.least_errors(x[0], reached).max()) < 1e-14
    assert bool((torch.cdist(z, reached).amin(dim=1) >= stated).all())


def test_the_nearest_embedding_of_unit_length():
    f, x = encoder_of(Normed("unit")), pixels(1)
    with torch.no_grad():
        z = torch.cat([f(x) * scale for scale in (1, 0.5, 2)])
    wanted = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(f.least_errors(x[0], z), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["bent", "tokens"])
def test_nothing_is_known_behind_other_layers(kind):
    f, x = encoder_of(Normed(kind)), pixels(2)
    with torch.no_grad():
        assert f.least_errors(x[0], 3 * f(x)).tolist() == [0.0, 0.0]


def test_half_precision_proves_nothing():
    f, x = encoder_of(Normed("one"), torch.bfloat16), pixels(1)
    with torch.no_grad():
        assert float(f.least_errors(x[0], 3 * f(x))) == 0.0


def test_a_match_ends_at_once_where_the_layers_exclude_the_target():
    f = Encoder.from_pretrained("builtin-64", device="cpu")
    x = torch.rand(3, *f.input_shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        here, z = f(x), f(x.flip(0).flip(3))
    z[1] *= 1.5
    options = {"max_evals": 5, "raise_on_failure": False}
    found = match_embedding(f, x, z, **options)
    others = match_embedding(f, x[::2], z[::2], **options)
    assert found.status == (Status.MAX_EVALS, Status.INFEASIBLE, Status.MAX_EVALS)
    assert found.num_evals.tolist() == [5, 1, 5]
    assert torch.equal(found.images[1], x[1])
    assert float(found.errors[1]) == pytest.approx(float((here[1] - z[1]).norm() / z[1].norm()), rel=1e-5)
    assert torch.equal(found.images[::2], others.images)
    assert torch.equal(found.errors[::2], others.errors)
    least = float(f.least_errors(x[0], z[1:2]))
    with pytest.raises(ConvergenceError, match=rf"least possible error is {least:.3g} for image 1\."):
        match_embedding(f, x, z, max_evals=5)
    assert match_embedding(f, x[1:2], z[1:2], **options | {"rtol": 1.1 * least}).status == (Status.MAX_EVALS,)
    with pytest.raises(ValueError, match="must have the encoder's dimension 192; got 7"):
        match_embedding(f, x, z[:, :7])
