"""A match made on the way: what walks from a match start with, and where the direction `match` leads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_equiv.matching import match_embedding
from hf_equiv.precision import no_tf32
from hf_equiv.results import Progress

MATCH_EVALS = 2000
"""Most evaluations of such a match."""


def match_target(
    encoder: Any, source: Tensor, target: Tensor, rtol: float, tell: Callable[[str, int, int], None]
) -> tuple[Tensor, float, float]:
    """Match an image with the embedding of another.

    Args:
        encoder: f.
        source: image to start from, (3, H, W).
        target: image whose embedding is wanted, (3, H, W).
        rtol: embedding error ‖f(x)−f(t)‖/‖f(t)‖ to reach.
        tell: told of progress.

    Returns:
        The match (3, H, W), its evaluations, its seconds.

    Raises:
        RuntimeError: it did not reach `rtol`.
    """
    with torch.no_grad(), no_tf32():
        z = encoder(target[None])

    def hook(progress: Progress) -> None:
        tell("match", min(int(progress.num_evals.max()), MATCH_EVALS - 1), MATCH_EVALS)

    found = match_embedding(
        encoder, source[None], z, rtol=rtol, max_evals=MATCH_EVALS, raise_on_failure=False, progress=hook
    )
    if not found.converged:
        raise RuntimeError(
            f"no match of the target: embedding error {float(found.errors[0]):.2g} after {MATCH_EVALS} evaluations; "
            f"{rtol:g} is wanted. Choose another image or target, or, for a walk, loosen `rtol`."
        )
    return found.images[0], float(found.num_evals[0]), float(found.seconds[0])
