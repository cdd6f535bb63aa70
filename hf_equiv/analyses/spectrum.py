"""Spectrum rows: one image, its singular values, and why some are zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_equiv.analyses.config import AnalysisConfig
from hf_equiv.analyses.measures import _median
from hf_equiv.formatting import finite, short
from hf_equiv.geometry.spectrum import SpectrumResult, jacobian_spectrum
from hf_equiv.geometry.zeros import Zero
from hf_equiv.runs.schema import Row

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


def _spectrum(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Row:
    keys = ("sigma_max", "rank", "nullity", "effective_rank", "participation", "num_evals", "seconds")
    middle = {key: _median(row[key] for row in rows) for key in keys}
    zeros = {
        kind: {
            cause: {
                "images": len(found),
                "count": max(z["count"] for z in found),
                "predicted": _median(z["predicted"] for z in found),
                "measured": _median(z["measured"] for z in found),
            }
            for cause, found in _by_cause(rows, kind).items()
        }
        for kind in ("structural_zeros", "near_structural")
    }
    return {"median": middle, **zeros, "verdict": _spectrum_verdict(rows, middle, zeros)}


def _by_cause(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        for zero in row[kind]:
            found.setdefault(zero["cause"], []).append(zero)
    return found


def _spectrum_verdict(rows: Sequence[Mapping[str, Any]], middle: Row, zeros: Row) -> str:
    where = f"At {rows[0]['image_id']}" if len(rows) == 1 else f"At {len(rows)} images (medians)"
    text = f"{where} the embedding moves by at most {middle['sigma_max']:.4g} per unit of pixels (L2)"
    if middle["rank"] is None:
        return text + f"; the {len(rows[0]['singular_values'])} largest singular values were computed."
    rank, total = int(middle["rank"]), len(rows[0]["singular_values"])
    many = f"{rank} of {total}" if total >= rank else str(rank)
    text += (
        f". {many} singular values are above the rank threshold, so that {int(middle['nullity']):,} of "
        f"{int(middle['nullity']) + rank:,} pixel directions leave it, to first order."
    )
    exact = [f"{c} ({z['count']})" for c, z in zeros["structural_zeros"].items()]
    near = [f"{c} (predicted {short(z['predicted'])})" for c, z in zeros["near_structural"].items()]
    text += f" Zeros: {', '.join(exact)}." if exact else ""
    return text + (f" Nearly zero: {', '.join(near)}." if near else "")
