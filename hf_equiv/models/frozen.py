"""Define what encoders of images and of text share: a float64 twin, float noise, and the laws of the last layers."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from hf_equiv.conditions import Function
from hf_equiv.geometry.zeros import LeftRelation
from hf_equiv.jacobian import require_forward_mode
from hf_equiv.models.structure import EmbeddingSet, find_embedding_set, left_relations


class FrozenEncoder:
    """f: inputs (B, *shape) → embeddings (B, D), of one checkpoint, frozen and in eval mode.

    Attributes:
        model_id: Hub id, local folder or name of a built-in checkpoint.
        readout: how the embedding is read from the outputs of the model.
        normalize: whether embeddings are scaled to unit L2 norm.
        dtype: floating-point type of weights and embeddings.
        device: device of the weights.
    """

    model_id: str
    readout: str
    normalize: bool
    dtype: torch.dtype
    device: torch.device

    def __init__(self, network: torch.nn.Module, attention: str, trial: Tensor) -> None:
        self._network, self._attention = network, attention
        self._trial = trial  # an input (1, *shape) on which the encoder is tried
        self._twin: Self | None = None
        self.admitted: dict[Any, Function] = {}  # by `conditions.admit`: an encoder is frozen, so it is tried once
        self._sets: dict[tuple[object, ...], EmbeddingSet | None] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Return the embedding of each input, (B, D)."""
        raise NotImplementedError

    def in_dtype(self, dtype: torch.dtype) -> Any:
        """Return the same function in another floating-point type, with weights of its own."""
        raise NotImplementedError

    def _check(self, images: Tensor) -> None:
        """Require inputs (B, *shape) that the encoder takes, on its device."""
        raise NotImplementedError

    def double(self) -> Self:
        """Return the same function in float64, made once and with exactly the same weights."""
        if self.dtype != torch.float64 and self._twin is None:
            self._twin = self.in_dtype(torch.float64)
        return self._twin or self

    def noise_floor(self, images: Tensor) -> Tensor:
        """Return ‖f(x) − f₆₄(x)‖ / ‖f₆₄(x)‖ of each input: embedding errors below this are meaningless.

        The cost is a forward pass of the encoder and one of its float64 twin. It is 0 for a float64 encoder.

        Args:
            images: inputs of the encoder, (B, *shape).

        Returns:
            (B,) float64 on the encoder's device, relative (1.0 = the norm of the embedding).
        """
        self._check(images)
        with torch.no_grad():
            pairs = [(self(image).double(), self.double()(image.double())) for image in images.to(self.dtype).split(1)]
        return torch.stack([(z - exact).norm() / exact.norm() for z, exact in pairs])

    def left_relations(self, image: Tensor) -> tuple[LeftRelation, ...]:
        """Return the left vectors u of J = ∂f/∂x with uᵀJ in closed form, from the last LayerNorm onwards.

        Args:
            image: one input of the encoder, (*shape).

        Returns:
            The relations, exact zeros first.
        """
        return left_relations(self, self._network, image)

    def least_errors(self, image: Tensor, z: Tensor) -> Tensor:
        """Return ‖y − z‖ / ‖z‖ of the nearest y that the last LayerNorm or a unit norm allows: no image comes nearer.

        Args:
            image: one input of the encoder, (*shape), of the shape of all.
            z: embeddings, (B, D).

        Returns:
            (B,) float64; 0 where nothing is known, as after other layers or in half precision.
        """
        key = self.readout, self.normalize, image.shape
        if key not in self._sets:
            self._sets[key] = find_embedding_set(self, self._network, image)
        found, z = self._sets[key], z.double()
        return z.new_zeros(len(z)) if found is None else found.distances(z) / z.norm(dim=1)

    def jvp_probe(self) -> bool:
        """Return True if `torch.func.jvp` works on this encoder and is finite; raise RuntimeError otherwise."""
        require_forward_mode(self, self._trial, f"'{self.model_id}' with {self._attention} attention")
        return True
