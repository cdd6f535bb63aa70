"""Define the result records of the solvers: every public verb returns one frozen record with one `Status` per image."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1  # version of the rows written to disk; it changes when a column changes its meaning


class Status(StrEnum):
    """The outcome of the work on one image. Rows store the value; `advice` gives its meaning and cure."""

    CONVERGED = "converged"
    STALLED = "stalled"
    REFINED = "refined"
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
        """State the meaning of the status and the next thing to try."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "The embedding error is at most `rtol`, even with the float noise of the encoder added.",
    Status.STALLED: "No further decrease was possible: the error is at the float noise of the encoder, which may be "
    "more than `rtol`, or the ball holds no better image. Widen `radius`, loosen `rtol`, or use float64.",
    Status.REFINED: "The 8-bit image is much nearer to the target than rounding would leave it, and no further step of "
    "1/255 helps: 8-bit images seldom reach a small `rtol`.",
    Status.MAX_EVALS: "The evaluations ran out. Raise `max_evals`, or loosen `rtol`.",
    Status.INFEASIBLE: "The feasible set around this source holds no image with this embedding. Widen `radius`.",
    Status.COMPLETED: "The analysis is complete.",
    Status.RESOLVED: "The value was read from a plateau of the secants, above the float noise.",
    Status.UNDETERMINED: "Float noise or curvature hides the value at every radius. Use float64, or radii between the "
    "noise and the bend.",
    Status.DRIFT_EXCEEDED: "The corrector could not bring the embedding back within `rtol`. Make `step` smaller, "
    "loosen `rtol`, or use float64.",
    Status.BOX_BLOCKED: "Every further step leaves the pixel range [0, 1]. Choose another heading, or start from an "
    "image with fewer pixels at 0 and 1.",
    Status.ERROR: "The image failed: it was unreadable or equal to its target, or the encoder returned NaN or raised "
    "an exception. The cause was printed, and run.json of a run keeps it under `errors`. Run the same command again "
    "to retry.",
}


@dataclass(frozen=True, slots=True)
class MatchResult:
    """Images whose embedding is (nearly) the target's, one entry per image of the batch.

    Attributes:
        images: best iterates, (B, C, H, W), pixels in [0, 1], inside the feasible set.
        errors: embedding errors ‖f(x) − z‖ / ‖z‖ of these images, (B,), float64.
        num_evals: evaluations spent on each image, (forwards + 2·cotangents + 2·tangents) / 3, (B,), float64.
        seconds: wall time of each image, (B,), float64; the images of a batch share the time of a step equally.
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
        """State the number of images, their statuses, errors and cost in one line."""
        size = "×".join(map(str, self.images.shape[1:]))
        ends = ", ".join(f"{n} {status}" for status, n in Counter(map(str, self.status)).items())
        errors = " to ".join(dict.fromkeys(f"{e:.1e}" for e in (self.errors.min(), self.errors.max())))
        cost = f"{self.num_evals.sum():.0f} evaluations"
        return f"MatchResult({len(self.status)} of {size}: {ends}; errors {errors}; {cost})"


@dataclass(frozen=True, slots=True)
class Progress:
    """State of a batch, passed to a `progress` hook after every batched evaluation.

    Attributes:
        images: best iterates so far, (B, C, H, W); a view, copy it before keeping it.
        errors: their embedding errors, (B,), float64.
        num_evals: evaluations spent so far on each image, (B,), float64.
        active: whether work on the image continues, (B,), bool.
    """

    images: Tensor
    errors: Tensor
    num_evals: Tensor
    active: Tensor


class ConvergenceError(RuntimeError):
    """Report that some images missed the tolerance; `.result` holds the partial result."""

    def __init__(self, message: str, result: MatchResult) -> None:
        super().__init__(message)
        self.result = result
