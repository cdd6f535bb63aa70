"""A match in stages: a cheaper form of the encoder leads near the target, the encoder itself goes to the end.

A draft is the encoder in half precision, which is fast on a GPU and too noisy to end with, or compiled by
`torch.compile`. Whatever it claims, the last stage starts from its image with the encoder as it is, so every error that
is stated is the encoder's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_equiv.matching.lbfgs import LBFGS
from hf_equiv.matching.match import ProgressHook, match_embedding
from hf_equiv.matching.solvers import Solver
from hf_equiv.results import MatchResult

HALF = {"bfloat16": (torch.bfloat16, 1e-1), "float16": (torch.float16, 1e-2)}
"""Types of a draft, and the embedding error at which its rounding begins to mislead the solver."""


@dataclass(frozen=True)
class Draft:
    """A cheaper form of the encoder.

    Attributes:
        f: pixels (B, 3, H, W) to embeddings (B, D), differentiable.
        rtol: embedding error down to which it leads; 0 for as far as is asked.
        share: of the evaluations allowed, in (0, 1].
    """

    f: Callable[[Tensor], Tensor]
    rtol: float
    share: float


def match_in_stages(
    encoder: Callable[[Tensor], Tensor], drafts: Sequence[Draft], source: Tensor, target: Tensor, solver: Solver, *,
    rtol: float, max_evals: int, progress: ProgressHook, **ball: Any,
) -> MatchResult:  # fmt: skip
    """Match with each draft in turn, each from where the last one ended, and with the encoder to the end.

    Args:
        encoder: f.
        drafts: from `drafts_of`; none for a plain match.
        source: as in `match_embedding`.
        target: embeddings (B, D).
        solver: of every stage; after the first, L-BFGS leaves its start out.
        rtol: embedding error at which an image is done.
        max_evals: evaluations per image, of all stages together.
        progress: called after every batched evaluation.
        **ball: radius and norm.

    Returns:
        The result of the last stage; evaluations and seconds are of all.
    """
    found: MatchResult | None = None

    def go_on(f: Callable[[Tensor], Tensor], rtol: float, most: int, *, newton: bool) -> MatchResult:
        own = solver
        if isinstance(solver, LBFGS):
            own = replace(solver, newton=solver.newton and newton, warmup=0 if found is not None else solver.warmup)
        return match_embedding(
            f, source, target, own, rtol=rtol, max_evals=most, raise_on_failure=False, start=found, progress=progress,
            **ball,
        )  # fmt: skip

    for draft in drafts:
        most = min(int(draft.share * max_evals), max_evals - 1)  # the encoder must look at the image once at least
        if most >= 1:
            found = go_on(draft.f, max(rtol, draft.rtol), most, newton=False)
    return go_on(encoder, rtol, max_evals, newton=True)
