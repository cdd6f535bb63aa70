"""Match in stages: cheaper forms of the encoder lead near the target, and the encoder itself finishes.

A draft is the encoder in half precision, which is fast on a GPU but noisy, or compiled by `torch.compile`. The last
stage is the encoder as it is, so every stated error is its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_equiv.conditions import as_function
from hf_equiv.matching.lbfgs import LBFGS
from hf_equiv.matching.match import each_match, match_embedding
from hf_equiv.matching.search import ProgressHook, Search
from hf_equiv.matching.solvers import Solver
from hf_equiv.precision import Encoding
from hf_equiv.results import MatchResult

HALF = {"bfloat16": (torch.bfloat16, 1e-1), "float16": (torch.float16, 1e-2)}
"""Dtypes of drafts, and the embedding error at which their rounding begins to mislead the solver."""


@dataclass(frozen=True)
class Draft:
    """A cheaper form of the encoder."""

    f: Encoding  # pixels (B, 3, H, W) to embeddings (B, D), differentiable
    rtol: float  # embedding error at which its stage ends; 0 for the `rtol` of the match
    share: float  # largest share of the allowed evaluations that it may spend, in (0, 1]


def match_in_stages(
    encoder: Encoding, drafts: Sequence[Draft], source: Tensor, target: Tensor, solver: Solver, *,
    rtol: float, max_evals: int, progress: ProgressHook, start: MatchResult | None = None, **ball: Any
) -> Iterator[dict[int, Search]]:  # fmt: skip
    """Match with each draft in turn from the end of the last one, then with the encoder, as `each_match` does."""
    # L-BFGS skips its start after the first stage, and only the last stage takes Newton steps. Costs add up.
    found = start

    def own(*, newton: bool) -> Solver:
        if not isinstance(solver, LBFGS):
            return solver
        return replace(solver, newton=solver.newton and newton, warmup=0 if found is not None else solver.warmup)

    for draft in drafts:
        most = min(int(draft.share * max_evals), max_evals - 1)  # the encoder needs one evaluation at least
        if most >= 1:
            found = match_embedding(
                as_function(draft.f), source, target, own(newton=False), rtol=max(rtol, draft.rtol), max_evals=most,
                raise_on_failure=False, start=found, progress=progress, **ball
            )  # fmt: skip
    goal = {"rtol": rtol, "max_evals": max_evals, **ball}
    return each_match(encoder, source, target, own(newton=True), start=found, progress=progress, **goal)
