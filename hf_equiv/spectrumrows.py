"""Spectrum rows: one image, its singular values, and why some are zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_equiv.analysisconfig import AnalysisConfig
from hf_equiv.metrics import finite
from hf_equiv.shards import Row
from hf_equiv.spectrum import SpectrumResult, jacobian_spectrum
from hf_equiv.zeros import Zero

KEPT_VECTORS = 8
"""Singular vectors kept with `vectors` where no `k` is given."""


def measure_spectrum(encoder: Any, image: Tensor, *, k: int | None, vectors: bool, batch: int) -> SpectrumResult:
    """The spectrum at one image (3, H, W), as a run states it."""
    return jacobian_spectrum(encoder, image[None], k=k, vectors=vectors, batch=batch)


def spectrum_rows(
    config: AnalysisConfig, encoder: Any, image_id: str, image: Tensor, batch: int
) -> tuple[list[Row], dict[str, Tensor]]:
    """The row of one image, without image and provenance columns.

    Args:
        config: of the run.
        encoder: f.
        image_id: its id.
        image: (3, H, W), on the encoder's device.
        batch: cotangents per pass.

    Returns:
        The row, and its singular vectors if they are kept, `ID/right` (K, 3, H, W) and `ID/left` (D, K).
    """
    result = measure_spectrum(encoder, image, k=config.k, vectors=config.vectors, batch=batch)
    floats: dict[str, Tensor] = {}
    if result.right is not None and result.left is not None:
        kept = config.k or min(KEPT_VECTORS, result.right.shape[1])
        # a copy: the rest of a full set is large
        floats = {f"{image_id}/right": result.right[0, :kept].clone(), f"{image_id}/left": result.left[0, :, :kept]}
    return [row_of(result)], floats


def row_of(result: SpectrumResult) -> Row:
    """The columns that a spectrum of one image gives; None for what does not exist."""
    whole = result.rank is not None and int(result.rank[0]) >= 0
    return {
        "singular_values": [finite(s) for s in result.singular_values[0].tolist()],
        "rank": int(result.rank[0]) if result.rank is not None and whole else None,
        "nullity": int(result.nullity[0]) if result.nullity is not None and whole else None,
        "structural_zeros": _zeros(result.structural_zeros[0]),
        "near_structural": _zeros(result.near_structural[0]),
        "effective_rank": _first(result.effective_rank),
        "sigma_max": finite(result.sigma_max[0]),
        "rank_threshold": finite(result.rank_threshold[0]),
        "method": result.method[0],
        "error_bound": [finite(e) for e in result.error_bound[0].tolist()],
        "status": str(result.status[0]),
        "participation": _first(result.participation),
        "patch_nullity": result.patch_nullity,
        "noise_method": result.noise_method[0],
        "num_evals": float(result.num_evals[0]),
        "seconds": float(result.seconds[0]),
    }


def _first(values: Tensor | None) -> float | None:
    return None if values is None else finite(values[0])


def _zeros(zeros: Sequence[Zero]) -> list[Row]:
    return [
        {"cause": z.cause, "count": z.count, "predicted": finite(z.predicted), "measured": finite(z.measured)}
        for z in zeros
    ]
