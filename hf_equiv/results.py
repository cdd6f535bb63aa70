"""Define the result records of the solvers: every public verb returns one frozen record with one `Status` per image."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    Status.STALLED: "The error hardly fell any more, without a ball not from other starts either: it is at the float "
    "noise of the encoder, which may be more than `rtol`, or few images near the source are better. More evaluations "
    "help little. Widen `radius`, loosen `rtol`, use float64, or choose another source or solver.",
    Status.REFINED: "The 8-bit image is much nearer to the target than rounding would leave it, and no further step of "
    "1/255 helps: 8-bit images seldom reach a small `rtol`.",
    Status.MAX_EVALS: "The evaluations ran out before the error, with the float noise added, was at most `rtol`. Raise "
    "`max_evals`, or loosen `rtol`.",
    Status.INFEASIBLE: "No image can be a match: by the last layers of the encoder none has this embedding, or, in "
    "`refine_8bit`, the ball holds no 8-bit image. Pass an unscaled embedding of the same encoder and readout, or "
    "loosen `rtol` to above the error that `Encoder.least_errors` states; for 8-bit images widen `radius`.",
    Status.COMPLETED: "The analysis is complete.",
    Status.RESOLVED: "The value was read from a plateau of the secants, above the float noise.",
    Status.UNDETERMINED: "Float noise or curvature hides the value at every radius. Use float64, or radii between the "
    "noise and the bend.",
    Status.DRIFT_EXCEEDED: "The corrector could not bring the embedding back within `rtol`. Make `step` smaller, "
    "loosen `rtol`, or use float64.",
    Status.BOX_BLOCKED: "Every further step leaves the box, by default pixels in [0, 1]. Choose another heading, or "
    "start from an image with fewer values at its bounds.",
    Status.ERROR: "The image failed: it was unreadable, equal to its target or too large for the memory, or the "
    "encoder returned NaN or raised an exception. The cause was printed, and run.json of a run keeps it under "
    "`errors`. Run the same command again to retry.",
}


@dataclass(frozen=True, slots=True)
class MatchResult:
    """Images whose embedding is (nearly) the target's, one entry per image of the batch.

    Attributes:
        images: best iterates, (B, *shape), inside the feasible set.
        errors: embedding errors ‖f(x) − z‖ / ‖z‖ of these images, (B,), float64.
        num_evals: evaluations spent on each image, (forwards + 2·cotangents + 2·tangents) / 3, (B,), float64.
        seconds: wall time of each image, (B,), float64; the images of a batch share the time of a step equally.
        status: one `Status` per image.
        traces: per image the (num_evals, error) pairs at which the best error improved, in order.
        source: images that these should look like, (B, *shape), if they are known.
        target: images whose embeddings these should have, (B or 1, *shape), if they were given as images.
        labels: per image the classes of source, match and target, if an encoder has named them.
        float_errors: embedding errors of the float images that these 8-bit images come from, (B,), float64, if known.
    """

    images: Tensor
    errors: Tensor
    num_evals: Tensor
    seconds: Tensor
    status: tuple[Status, ...]
    traces: tuple[tuple[tuple[float, float], ...], ...]
    source: Tensor | None = None
    target: Tensor | None = None
    labels: tuple[tuple[str, str, str], ...] | None = None
    float_errors: Tensor | None = None

    @property
    def converged(self) -> bool:
        """Whether every image of the batch reached its tolerance."""
        return all(s is Status.CONVERGED for s in self.status)

    @property
    def psnr_db(self) -> Tensor | None:
        """PSNR of each image to its source, −10 log₁₀ mean (x − source)², (B,), float64; infinite for equal images."""
        if self.source is None:
            return None
        return -10 * (self.images.double() - self.source.double()).square().flatten(1).mean(dim=1).log10()

    def show(self) -> None:
        """Show each image beside source, difference and target: in a notebook, a viewer, or a file that is named."""
        _figures().show(self)

    def plot(self, axes: Any = None) -> Any:
        """Draw the embedding error over the evaluations.

        Args:
            axes: axes of matplotlib to draw on; None for new ones.

        Returns:
            The axes.
        """
        return _figures().plot(self, axes)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the images as PNG files, with the numbers as `match.json` and the picture of `show` as `picture.png`.

        Args:
            folder: where to; it is made if it does not exist, and files of these names are replaced.

        Returns:
            The folder.
        """
        return Path(_figures().save(self, Path(folder)))

    def __repr__(self) -> str:
        """State the number of images, their statuses, errors, distance and cost in one line."""
        size = "×".join(map(str, self.images.shape[1:]))
        ends = ", ".join(f"{n} {status}" for status, n in Counter(map(str, self.status)).items())
        told = [f"{len(self.status)} of {size}: {ends}"]
        told += [f"{source!r} seen as {match!r}" for source, match, _ in (self.labels or ())[:1]]
        told.append(f"errors {_span(self.errors, '.1e')}")
        if self.images.ndim == 4 and (distances := self.psnr_db) is not None:
            told.append(f"PSNR {_span(distances, '.1f')} dB")
        return f"MatchResult({'; '.join(told)}; {self.num_evals.sum():.0f} evaluations)"


def _span(values: Tensor, spec: str) -> str:
    return " to ".join(dict.fromkeys(f"{value:{spec}}" for value in (values.min(), values.max())))


def _figures() -> Any:
    """Import the pictures of results, which need Pillow and matplotlib, when one is asked for."""
    return import_module("hf_equiv.interactive.figures")


@dataclass(frozen=True, slots=True)
class Progress:
    """State of a batch, passed to a `progress` hook after every batched evaluation.

    Attributes:
        images: best iterates so far, (B, *shape); a view, copy it before keeping it.
        errors: their embedding errors, (B,), float64.
        num_evals: evaluations spent so far on each image, (B,), float64.
        active: whether work on the image continues, (B,), bool.
    """

    images: Tensor
    errors: Tensor
    num_evals: Tensor
    active: Tensor

    def __repr__(self) -> str:
        """State the images in work, errors and cost in one line."""
        left = f"{int(self.active.sum())} of {len(self.active)} in work"
        return f"Progress({left}; errors {_span(self.errors, '.1e')}; {self.num_evals.sum():.0f} evaluations)"


class ConvergenceError(RuntimeError):
    """Report that some images missed the tolerance; `.result` holds the partial result."""

    def __init__(self, message: str, result: MatchResult) -> None:
        super().__init__(message)
        self.result = result
