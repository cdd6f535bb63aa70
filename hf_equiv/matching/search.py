"""Record the search for one match: its error, cost, trace and status; and collect the records of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_equiv.checks import is_image
from hf_equiv.conditions import Function
from hf_equiv.jacobian import stacked
from hf_equiv.results import MatchResult, Progress, Status

ProgressHook = Callable[[Progress], None]

_FAINT = 0.01  # noise of f at a grey image, over rtol, above which it is measured at the match too
_LOUDER = 2.0  # times that noise: only more at the match replaces it
_WINDOW, _PROGRESS = 150, 0.9  # evaluations over which the error should fall below this share
_RESTARTS = 3  # of an image whose error does not


@dataclass(eq=False)
class Search:
    """The search for one match: the error of its best image so far, cost and status; the image once it has ended."""

    best: Tensor  # in the shape of an image
    error: float = math.inf
    least: float = 0.0  # error below which no image can come, if that is above the tolerance
    noise: float | None = None  # of f near the best image, relative; None until an error is small enough
    thirds: int = 0  # of the evaluations, an exact count
    seconds: float = 0.0
    status: Status | None = None
    trace: list[tuple[float, float]] = field(default_factory=list)
    finite: bool = True  # whether the last evaluation was
    close: float = math.inf  # error at which Newton steps may be tried (again)
    restarts: int = 0
    mark: tuple[float, float] = 0.0, math.inf  # evaluations and error at the last clear progress

    @property
    def num_evals(self) -> float:
        """Evaluations so far, a multiple of 1/3."""
        return self.thirds / 3

    def noise_of(self, f: Function) -> float:
        """Return the relative noise of f, as far as it is known near the best image."""
        return f.noise if self.noise is None else self.noise

    def offer(self, error: float) -> None:
        """Note the error of an image if it is the best so far."""
        if error < self.error:
            self.error = error
            self.trace.append((self.num_evals, error))
            if error < _PROGRESS * self.mark[1]:
                self.mark = self.num_evals, error

    @property
    def is_stuck(self) -> bool:
        """Whether the error has hardly fallen over many evaluations."""
        return self.num_evals - self.mark[0] >= _WINDOW

    def restart(self) -> bool:
        """Count a restart and return True, or end the search as stalled if there were enough."""
        if self.restarts == _RESTARTS:
            self.status = Status.STALLED
            return False
        self.mark = self.num_evals + _WINDOW, self.error  # the way back to this error takes as long again
        self.restarts, self.close = self.restarts + 1, 0.9 * self.error
        return True

    def earlier(self, evals: float) -> float | None:
        """Return the error that the search had a number of evaluations ago, if it had any."""
        return next((error for count, error in reversed(self.trace) if count <= self.num_evals - evals), None)


def reached(f: Function, run: Search, image: Tensor, rtol: float) -> Status | None:
    """Return the status if the error reached rtol with its noise on top, as nearly as noise allows, or never can."""
    if 0 < run.least and run.error < math.inf:
        return Status.INFEASIBLE
    noise = run.noise_of(f)
    if run.error + noise <= rtol and run.noise is None and noise > _FAINT * rtol:
        near = f.noise_near(image)
        run.noise = noise = near if near > _LOUDER * noise else noise
    if run.error + noise <= rtol:
        return Status.CONVERGED
    return Status.STALLED if run.error <= rtol < 1.5 * noise else None


def snapshot(images: Tensor, runs: Sequence[Search]) -> Progress:
    """Return the state of all images for a progress hook."""
    return Progress(
        images,
        stacked([run.error for run in runs]),
        stacked([run.num_evals for run in runs]),
        torch.tensor([run.status is None for run in runs], device="cpu"),
    )


def collect(runs: Sequence[Search], source: Tensor | None, target: Tensor) -> MatchResult:
    """Return the record of finished searches, with copies of the source, and of the target if it is an image."""
    end = snapshot(torch.stack([run.best for run in runs]), runs)
    return MatchResult(
        end.images,
        end.errors,
        end.num_evals,
        stacked([run.seconds for run in runs]),
        tuple(run.status or Status.ERROR for run in runs),
        tuple(tuple(run.trace) for run in runs),
        None if source is None else source.detach().clone(),
        target.detach().clone() if is_image(target, end.images) else None,
    )
