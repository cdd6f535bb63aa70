"""Result records: what a solver found, never how it is shown.

Every public verb returns one frozen record, batch first, with one `Status` per image.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
"""Version of the row schema written to disk; it changes when a column changes its meaning."""


class Status(StrEnum):
    """How the work on one image ended. The value goes into the row; `advice` is what to do about it."""

    CONVERGED = "converged"
    STALLED = "stalled"
    MAX_EVALS = "max_evals"
    INFEASIBLE = "infeasible"
    COMPLETED = "completed"
    RESOLVED = "resolved"
    UNDETERMINED = "undetermined"
    DRIFT_EXCEEDED = "drift_exceeded"
    BOX_BLOCKED = "box_blocked"
    ERROR = "error"

    @property
    def advice(self) -> str:
        """What the status means and what to try next, in one sentence."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "The embedding error reached `rtol`.",
    Status.STALLED: "No further decrease was possible: the error is at the float noise of the encoder, or the ball "
    "holds no better image. Widen `radius`, loosen `rtol`, or use float64.",
    Status.MAX_EVALS: "The evaluations ran out. Raise `max_evals`, or loosen `rtol`.",
    Status.INFEASIBLE: "The feasible set around this source holds no image with this embedding. Widen `radius`.",
    Status.COMPLETED: "The analysis was carried out in full.",
    Status.RESOLVED: "The value was read from a plateau of the secants, above the float noise.",
    Status.UNDETERMINED: "Float noise or curvature hides the value at every radius. Use float64, or radii between the "
    "noise and the bend.",
    Status.DRIFT_EXCEEDED: "The corrector could not bring the embedding back within `rtol`. Make `step` smaller, "
    "loosen `rtol`, or use float64.",
    Status.BOX_BLOCKED: "Every way on leaves the pixel range [0, 1]. Choose another heading, or start from an image "
    "with fewer pixels at 0 and 1.",
    Status.ERROR: "The image could not be worked on: it was unreadable or equal to its target, or the encoder "
    "returned NaN or raised. The cause was printed, and a run keeps it in run.json under `errors`; the same "
    "command tries again.",
}


@dataclass(frozen=True, slots=True)
class MatchResult:
    """Images whose embedding is (nearly) the target's, one entry per image of the batch.

    Attributes:
        images: best iterates, (B, C, H, W), pixels in [0, 1], inside the feasible set.
        errors: ‖f(x) − z‖ / ‖z‖ of those iterates, (B,), float64.
        num_evals: cost spent on each image, (B,), float64: (forwards + 2·cotangents + 2·tangents) / 3.
        seconds: wall time attributed to each image, (B,), float64; a batched step is shared equally among its images.
        status: one `Status` per image.
        traces: per image the (num_evals, error) pairs at which the best error improved, in order.
    """

    images: Tensor
    errors: Tensor
    num_evals: Tensor
    seconds: Tensor
    status: tuple[Status, ...]
    traces: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def converged(self) -> bool:
        """Whether every image of the batch reached its tolerance."""
        return all(s is Status.CONVERGED for s in self.status)

    def __repr__(self) -> str:
        """Say in one line how many images there are, how they ended, at which errors and cost."""
        size = "×".join(map(str, self.images.shape[1:]))
        ends = ", ".join(f"{n} {status}" for status, n in Counter(map(str, self.status)).items())
        errors = " to ".join(dict.fromkeys(f"{e:.1e}" for e in (self.errors.min(), self.errors.max())))
        cost = f"{self.num_evals.sum():.0f} evaluations"
        return f"MatchResult({len(self.status)} of {size}: {ends}; errors {errors}; {cost})"


@dataclass(frozen=True, slots=True)
class Progress:
    """What a `progress` hook receives after every batched evaluation.

    Attributes:
        images: best iterates so far, (B, C, H, W); a view, copy it before keeping it.
        errors: their embedding errors, (B,), float64.
        num_evals: evaluations spent so far on each image, (B,), float64.
        active: whether the image is still being worked on, (B,), bool.
    """

    images: Tensor
    errors: Tensor
    num_evals: Tensor
    active: Tensor


class ConvergenceError(RuntimeError):
    """Some images did not reach the tolerance; the partial result is kept in `.result`."""

    def __init__(self, message: str, result: MatchResult) -> None:
        super().__init__(message)
        self.result = result
