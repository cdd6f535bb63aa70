"""Correct images back to a level set {x : f(x) = z} by adjoint Broyden steps inside the box.

A `LinearModel` A ≈ J starts as the full Jacobian of one point and learns one row combination of J for each VJP, so one
Jacobian serves a whole walk. A `Corrector` takes the shortest step that A says removes the residual.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv.checks import UNIT, check_dimension
from hf_equiv.conditions import as_function
from hf_equiv.matching.linear_model import LinearModel
from hf_equiv.passes import Sight, Work, look
from hf_equiv.precision import Encoding

_MAX_TRIALS = 40
_MAX_REJECTED = 6
_SHORTEST = 0.2  # least share of a correction to try: less cannot lower the drift enough
_STALE = 3.0  # evaluations since the last full Jacobian, over its cost, that justify another after a failure
_DECREASE = 0.9  # an accepted correction brings the drift below this share


@dataclass(frozen=True, slots=True)
class Place:
    """An encoded image."""

    sight: Sight  # f and J at the image
    residual: Tensor  # r = f(x) − z, (D,), float64
    drift: float  # ‖r‖ / ‖z‖

    @property
    def image(self) -> Tensor:
        """x, (*shape)."""
        return self.sight.image


class Corrector:
    """Bring images near {x : f(x) = z} onto it: ‖f(x) − z‖/‖z‖ ≤ rtol, inside the box.

    With r = f(x) − z, repeat: hold the values at the bounds; let A learn the row rᵀJ(x) by one VJP; set x ← clip(x −
    A_Fᵀ(A_F A_Fᵀ)⁺ r) if that lowers ‖r‖; otherwise let A learn the row along its own error. A trial costs one
    evaluation; after a failed trial a third more, for another forward pass of x. The corrector aims at half of `rtol`,
    because other float32 kernels give other drifts. Its methods are computations of `passes`.
    """

    model: LinearModel

    def __init__(self, f: Encoding, z: Tensor, rtol: float, bounds: tuple[float, float] = UNIT) -> None:
        self.f, self.z, self.rtol, self.bounds = as_function(f), z, rtol, bounds
        self.scale = float(torch.linalg.vector_norm(z))
        self.num_evals = 0.0
        self.num_jacobians = 0
        self._refreshed = 0.0
        self.bend = torch.zeros_like(z)
        self.trials = 0

    def look(self, x: Tensor) -> Work[Place]:
        """Encode one image (*shape)."""
        sight = yield from look(self.f, x)
        self.num_evals += sight.num_evals
        check_dimension(self.z, sight.shape[0])
        residual = sight.output.double() - self.z
        return Place(sight, residual, float(torch.linalg.vector_norm(residual)) / self.scale)

    def refresh(self, at: Place) -> Work[None]:
        """Form the full Jacobian at a place."""
        vars(self).pop("model", None)  # so that no walk holds two Jacobians
        self.model = LinearModel((yield from self._counted(at, at.sight.as_matrix())), at.image.shape)
        self.num_jacobians += 1
        self._refreshed = self.num_evals

    def pull(self, at: Place, u: Tensor) -> Work[Tensor]:
        """Return Jᵀu at a place, (*shape)."""
        return (yield from self._counted(at, at.sight.rmv(u[None])))[0]

    def _counted(self, at: Place, work: Work[Tensor]) -> Work[Tensor]:
        before = at.sight.num_evals
        found = yield from work
        self.num_evals += at.sight.num_evals - before
        return found

    @property
    def stale(self) -> bool:
        """Whether the evaluations since the last full Jacobian exceed three times its cost."""
        return self.num_evals - self._refreshed > _STALE * 2 * len(self.z) / 3

    def learn(self, at: Place, u: Tensor) -> Work[None]:
        """Set the row combination uᵀA to uᵀJ of the Jacobian at a place, unless u is zero."""
        length = torch.linalg.vector_norm(u)
        if bool(length > 0):
            u = (u / length).to(self.model.A).double()  # rounded as A stores it
            self.model.learn(u, (yield from self.pull(at, u)))

    def correct(self, guess: Tensor, longest: float) -> Work[Place | None]:
        """Bring a guess (*shape) back to the level set by steps no longer than `longest`; return None on failure."""
        low, high = self.bounds
        at = yield from self.look(guess.clamp(low, high))
        self.bend, self.trials = at.residual, 0
        unknown, rejected, share = at.residual, 0, 1.0
        while at.drift > 0.5 * self.rtol and self.trials < _MAX_TRIALS:
            if rejected >= (_MAX_REJECTED if at.drift > self.rtol else 1):  # below rtol the rest may be noise
                break
            self.trials += 1
            self.model.hold((at.image > low) & (at.image < high))
            yield from self.learn(at, unknown)
            step = self.model.correction(at.residual)
            length = float(torch.linalg.vector_norm(step))
            step = step * min(share, longest / (length + 1e-300))
            there = yield from self.look((at.image + step).clamp(low, high))
            if there.drift <= _DECREASE * at.drift:
                at, unknown, rejected, share = there, there.residual, 0, min(1.0, 2 * share)
                continue
            unknown = there.residual - at.residual - self.model.apply(there.image - at.image)
            if not bool(torch.isfinite(unknown).all()):
                unknown = at.residual
            rejected += 1
            share = max(_SHORTEST, share * (1.0 if rejected == 1 else 0.5))
        return at if at.drift <= self.rtol else None
