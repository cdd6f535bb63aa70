"""Zeros with a name: a LayerNorm of our own in closed form, every supported family, and products that transpose."""

from __future__ import annotations

import pytest
import torch
from cases import images
from tiny_models import FAMILIES, save

from hf_equiv.geometry.spectrum import jacobian_spectrum
from hf_equiv.jacobian import Jacobian
from hf_equiv.models.encoder import Encoder
from hf_equiv.models.structure import find_last_norm, left_relations


class Normed(torch.nn.Module):
    """z = T(LayerNorm(tokens(x))): two tokens of width 16, random affine part, large ε."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kind = kind
        self.tokens = torch.nn.Linear(192, 32)
        self.norm = torch.nn.LayerNorm(16, eps=1e-6)
        self.head = torch.nn.Linear(16, 20)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        self.norm.weight.data = 1 + 0.3 * self.norm.weight.data
        self.to(dtype).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(torch.tanh(0.1 * self.tokens(x.flatten(1))).view(-1, 2, 16))
        if self.kind == "residual":
            return y[:, 0] + x.flatten(1)[:, :16]
        if self.kind == "mean":
            return y.mean(dim=1)
        if self.kind == "tokens":
            return y.flatten(1)
        z = y[:, 0]
        if self.kind == "relu":
            return torch.relu(z)
        if self.kind == "head":
            return torch.tanh(0.1 * self.head(z))
        return z / z.norm(dim=1, keepdim=True) if self.kind == "unit" else z

    def left_relations(self, image):
        norm = find_last_norm(self, self, image)
        return () if norm is None else left_relations(self, norm, image)


EXPECTED = {
    "first": ({"LayerNorm centring": 1}, True),
    "mean": ({"LayerNorm centring": 1}, False),
    "head": ({"head wider than its input": 4, "LayerNorm centring": 1}, True),
    "residual": ({}, False),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", EXPECTED)
def test_named_alike_in_both_precisions(kind, dtype):
    x = images(1, dtype=dtype)
    result = jacobian_spectrum(Normed(kind, dtype), x)
    causes, near = EXPECTED[kind]
    assert {zero.cause: zero.count for zero in result.structural_zeros[0]} == causes
    assert [zero.cause for zero in result.near_structural[0]] == ["LayerNorm epsilon"] * near
    exact = torch.linalg.svdvals(Jacobian(Normed(kind), x.double()[0]).as_matrix())
    for zero in result.structural_zeros[0]:
        assert zero.predicted == 0.0
        assert zero.measured <= float(result.rank_threshold)
        gram = zero.left.T @ zero.left
        torch.testing.assert_close(gram, torch.eye(zero.count, dtype=torch.float64), rtol=0, atol=1e-12)
    for zero in result.near_structural[0]:
        true = float(exact[len(exact) - sum(causes.values()) - 1])
        assert zero.predicted == pytest.approx(true, rel=1e-3)
    if dtype == torch.float64:
        assert int(result.rank) == len(exact) - sum(causes.values())
    else:
        hidden = sum(zero.count for zero in result.near_structural[0] if zero.measured <= float(result.rank_threshold))
        assert int(result.rank) == len(exact) - sum(causes.values()) - hidden


def test_left_vectors_in_closed_form():
    model = Normed("first")
    result = jacobian_spectrum(model, images(1, dtype=torch.float64))
    centring = 1 / model.norm.weight
    u = result.structural_zeros[0][0].left[:, 0]
    assert abs(float(u @ (centring / centring.norm()))) == pytest.approx(1.0, abs=1e-12)


def test_unit_norm_and_no_relation():
    x = images(1, dtype=torch.float64)
    unit = jacobian_spectrum(Normed("unit"), x)
    assert [(zero.cause, zero.count) for zero in unit.structural_zeros[0]] == [("unit norm", 1)]
    (joint,) = unit.near_structural[0]
    assert joint.cause == "LayerNorm centring, epsilon and unit norm"
    assert joint.predicted == pytest.approx(float(unit.singular_values[0, -2]), rel=1e-3)
    assert Normed("tokens").left_relations(x[0]) == ()


def test_a_tail_that_loses_rank_is_no_wider_head():
    """What a ReLU switches off is lost at this image, and no fact of the architecture."""
    x = images(1, dtype=torch.float64)
    with torch.no_grad():
        off = int((Normed("relu")(x) == 0).sum())
    result = jacobian_spectrum(Normed("relu"), x)
    assert off > 0
    assert int(result.rank) <= 16 - off
    assert "head wider than its input" not in {zero.cause for zero in result.structural_zeros[0]}
    assert sum(zero.count for zero in result.structural_zeros[0]) == 16 - int(result.rank)


def test_without_an_encoder_zeros_stay_unexplained():
    model = Normed("first")
    (zero,) = jacobian_spectrum(lambda x: model(x), images(1, dtype=torch.float64)).structural_zeros[0]
    assert (zero.cause, zero.count, zero.predicted) == ("unexplained", 1, None)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, tmp_path):
    """⟨Jv, u⟩ = ⟨v, Jᵀu⟩ = ⟨JVP, u⟩, and no zero is left unexplained where a LayerNorm ends the readout."""
    encoder = Encoder.from_pretrained(save(name, tmp_path / name), dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(encoder.input_shape, generator=generator, dtype=torch.float64)
    J = Jacobian(encoder, x, batch=3)
    u = torch.randn(4, J.shape[0], generator=generator, dtype=torch.float64)
    v = torch.randn(4, *x.shape, generator=generator, dtype=torch.float64)
    forward, backward = J.mv(v), J.rmv(u)
    torch.testing.assert_close(forward @ u.T, (backward.flatten(1) @ v.flatten(1).T).T, rtol=1e-10, atol=1e-11)
    jvp = torch.func.jvp(encoder, (x[None],), (v[:1],))[1]
    torch.testing.assert_close(forward[:1], jvp, rtol=1e-10, atol=1e-11)
    result = jacobian_spectrum(encoder, x[None])
    for zero in result.structural_zeros[0]:
        assert zero.cause != "unexplained", (zero.count, zero.measured, float(result.sigma_max))
    for zero in result.near_structural[0]:
        assert zero.predicted == pytest.approx(zero.measured, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["vit", "clip_vision_projection", "convnext"])
def test_no_zero_of_a_normalised_embedding_is_unexplained(name, dtype, tmp_path):
    """z itself is a left null vector, also where no LayerNorm ends the readout."""
    encoder = Encoder.from_pretrained(save(name, tmp_path / name), dtype=dtype, device="cpu", normalize=True)
    x = torch.rand(encoder.input_shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = jacobian_spectrum(encoder, x[None])
    causes = [zero.cause for zero in result.structural_zeros[0]]
    assert "unit norm" in causes
    assert "unexplained" not in causes
    near = sum(zero.measured <= float(result.rank_threshold) for zero in result.near_structural[0])
    assert int(result.rank) == encoder.embedding_dim - len(causes) - near
