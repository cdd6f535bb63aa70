"""Back to the level set: the corrector of a walk, by adjoint Broyden steps inside the box."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv.checks import check_dimension
from hf_equiv.jacobian import Jacobian
from hf_equiv.linearmodel import LinearModel

_MAX_TRIALS = 40
_MAX_REJECTED = 6
_PATIENCE = 10
_SHORTEST = 0.2  # share of a correction: below, it could not lower the drift enough
_STALE = 3.0  # times the cost of a full Jacobian, after which one is worth forming where a correction failed
_FAR = 10.0
_DECREASE = 0.9  # a correction must bring the drift below this share of what it was


@dataclass(frozen=True, slots=True)
class Place:
    """One encoded image.

    Attributes:
        jacobian: J at the image; its products use the graph of the one forward pass.
        residual: r = f(x) − z, (D,), float64.
        drift: ‖r‖ / ‖z‖.
    """

    jacobian: Jacobian
    residual: Tensor
    drift: float

    @property
    def image(self) -> Tensor:
        """x, (C, H, W)."""
        return self.jacobian.image


class Corrector:
    """Brings images near {x : f(x) = z} onto it: ‖f(x) − z‖/‖z‖ ≤ rtol, pixels in [0, 1].

    With r = f(x) − z, repeats: the pixels at 0 and 1 are held; the model A learns the row rᵀJ(x) by one VJP;
    x ← clip(x − A_Fᵀ(A_F A_Fᵀ)⁺ r) where that lowers ‖r‖; where not, A learns the row along its own error instead. One
    evaluation a trial. What A has learnt stays, so one full Jacobian serves a walk.

    Args:
        f: the encoder, (1, C, H, W) -> (1, D).
        z: the embedding to keep, (D,), float64.
        rtol: largest drift of a returned place. Half of it is aimed at, so that it holds in other float32 kernels too;
            where a correction below rtol brings nothing, it may be noise, and rtol is enough.

    Attributes:
        model: the linear model A, made by `refresh`.
        num_evals: evaluations spent, (forwards + 2·cotangents) / 3.
        num_jacobians: full Jacobians among them.
        bend: the residual of the last guess before it was corrected, (D,).
        trials: how many corrections the last guess took.
    """

    model: LinearModel

    def __init__(self, f: Callable[[Tensor], Tensor], z: Tensor, rtol: float) -> None:
        self.f, self.z, self.rtol = f, z, rtol
        self.scale = float(torch.linalg.vector_norm(z))
        self.num_evals = 0.0
        self.num_jacobians = 0
        self._refreshed = 0.0
        self.bend = torch.zeros_like(z)
        self.trials = 0

    def look(self, x: Tensor) -> Place:
        """Encode one image (C, H, W)."""
        jacobian = Jacobian(self.f, x)
        self.num_evals += 1 / 3
        check_dimension(self.z, jacobian.shape[0])
        residual = jacobian.output.double() - self.z
        return Place(jacobian, residual, float(torch.linalg.vector_norm(residual)) / self.scale)

    def refresh(self, at: Place) -> None:
        """Form the full Jacobian at a place."""
        self.model = LinearModel(at.jacobian)
        self.num_evals += 2 * len(self.z) / 3
        self.num_jacobians += 1
        self._refreshed = self.num_evals

    @property
    def stale(self) -> bool:
        """Whether more than three times the cost of a full Jacobian was spent since the last."""
        return self.num_evals - self._refreshed > _STALE * 2 * len(self.z) / 3

    def learn(self, at: Place, u: Tensor) -> None:
        """Make the row combination uᵀA that of the Jacobian at a place."""
        if self.model.learn(at.jacobian, u):
            self.num_evals += 2 / 3

    def pull_back(self, x: Tensor, u: Tensor) -> Tensor:
        """Jᵀu at an image (C, H, W); one evaluation."""
        jacobian = Jacobian(self.f, x)
        self.num_evals += 1.0
        return jacobian.rmv(u[None])[0]

    def correct(self, guess: Tensor, longest: float) -> Place | None:
        """Bring a guess (C, H, W) back to the level set by steps no longer than `longest`; None where that fails."""
        at = self.look(guess.clamp(0, 1))
        self.bend, self.trials = at.residual, 0
        unknown, rejected, share = at.residual, 0, 1.0
        while at.drift > 0.5 * self.rtol and self.trials < _MAX_TRIALS:
            if rejected >= (_MAX_REJECTED if at.drift > self.rtol else 1):  # below rtol it may be noise
                break
            self.trials += 1
            self.model.hold((at.image > 0) & (at.image < 1))
            self.learn(at, unknown)
            step = self.model.correction(at.residual)
            length = float(torch.linalg.vector_norm(step))
            there = self.look((at.image + step * min(share, longest / (length + 1e-300))).clamp(0, 1))
            if there.drift <= _DECREASE * at.drift:
                at, unknown, rejected, share = there, there.residual, 0, min(1.0, 2 * share)
                continue
            unknown = there.residual - at.residual - self.model.apply(there.image - at.image)
            if not bool(torch.isfinite(unknown).all()):
                unknown = at.residual
            rejected += 1
            share = max(_SHORTEST, share * (1.0 if rejected == 1 else 0.5))
        return at if at.drift <= self.rtol else None

    def newton(self, start: Place, most: int) -> Place:
        """At most so many Newton steps from a place at which the Jacobian was just formed.

        x ← clip(x + s), s the shortest step that the model says leaves half of rtol; before each, the model learns the
        row along the residual. Every step is taken, also one that raises the error: what it was wrong about is learnt
        next. Ends at rtol, far off (ten times the error of the start), or when ten steps brought nothing.

        Returns:
            The nearest place.
        """
        at = best = start
        since, self.trials = 0, 0
        while best.drift > self.rtol and since < _PATIENCE and self.trials < most:
            self.trials += 1
            self.model.hold((at.image > 0) & (at.image < 1))
            self.learn(at, at.residual)
            step = self.model.correction(at.residual, 0.5 * self.rtol * self.scale)
            at = self.look((at.image + step).clamp(0, 1))
            since = 0 if at.drift < 0.95 * best.drift else since + 1
            best = at if at.drift < best.drift else best
            if not at.drift < _FAR * start.drift:
                break
        return best
