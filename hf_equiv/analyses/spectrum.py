"""Measure a spectrum: the singular values of the Jacobian at each image, and the causes of zeros among them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hf_equiv.analyses.config import ImageConfig
from hf_equiv.analyses.measures import Rows, count_images, medians_of, verdict
from hf_equiv.analyses.plan import Loaded, Made, Plan, RunRows, Tell
from hf_equiv.checks import check_count
from hf_equiv.data.image_file import decode_png
from hf_equiv.formatting import finite
from hf_equiv.geometry.spectrum import SpectrumResult, jacobian_spectrum
from hf_equiv.geometry.zeros import Zero
from hf_equiv.jacobian import Jacobian
from hf_equiv.results import Status
from hf_equiv.runs import shards
from hf_equiv.runs.schema import Row

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

SUCCEEDED, BATCH = (Status.COMPLETED,), "both"
SHOWN = 6  # images whose singular vectors a figure shows
KEPT_VECTORS = 8  # singular vectors kept with `vectors` where no `k` is given

_ZEROS = ("structural_zeros", "near_structural")
_ENERGY = ("invariance_map", "band_energy", "channel_energy")
_BATCH = 32  # cotangents per pass
_EARLIER = "error_bound within a factor of 50 and rank_threshold (by the rule of earlier versions)"
# Largest residual of stored singular vectors over σ₁ (measured: 1.2e-6, 9e-4), and distance from orthonormal (1e-8).
_RESIDUAL, _TILT = {"full": 1e-5, "golub_kahan": 0.02}, 1e-6


@dataclass(frozen=True)
class SpectrumConfig(ImageConfig):
    """Options of `spectrum`.

    Attributes:
        k: number of singular values; None for all.
        vectors: keep the singular vectors of the first `k`, or 8.
    """

    analysis: ClassVar[str] = "spectrum"
    wants_target: ClassVar[str] = "the verb lipschitz or walk"

    k: int | None = None
    vectors: bool = False

    def check(self) -> None:
        """Refuse options that no run can have, before a checkpoint is loaded."""
        super().check()
        if self.k is not None:
            check_count(self.k, "k")

    def settings(self, encoder: Encoder) -> Row:
        """Return the settings of this verb; refuse those that do not fit the encoder."""
        if self.k is not None and self.k > encoder.embedding_dim:
            raise ValueError(f"`k` must be at most the embedding size {encoder.embedding_dim}; got {self.k}.")
        return {"k": self.k, "vectors": self.vectors}

    def item_bytes(self, encoder: Encoder, settings: Row) -> int:
        """Return the bytes of the image and of the vectors that are kept."""
        size = math.prod(encoder.input_shape)
        return size + size * encoder.dtype.itemsize * (self.k or KEPT_VECTORS) * self.vectors


CONFIG = SpectrumConfig


def make_rows(plan: Plan, part: Sequence[Loaded], batch: int, tell: Tell) -> Iterator[tuple[Loaded, Made]]:
    """Make the row of each image, and its singular vectors if they are kept: `ID/right` (K, 3, H, W), `ID/left`."""
    tell("jacobian", 0, 1)
    k, vectors, images = plan.settings["k"], plan.settings["vectors"], torch.stack([one.image for one in part])
    result = jacobian_spectrum(plan.encoder, images, k=k, vectors=vectors, batch=batch, progress=False)
    for b, one in enumerate(part):
        floats: dict[str, Tensor] = {}
        if result.right is not None and result.left is not None:
            kept = k or min(KEPT_VECTORS, result.right.shape[1])
            floats = {"right": result.right[b, :kept].clone(), "left": result.left[b, :, :kept].clone()}
        yield one, Made([row_of(result, b)], {f"{one.item.name}/{key}": value for key, value in floats.items()})


def row_of(result: SpectrumResult, b: int = 0) -> Row:
    """Return the columns that the spectrum of an image gives; None where there is no value."""
    whole = result.rank is not None and int(result.rank[b]) >= 0
    row: Row = {
        "singular_values": [finite(s) for s in result.singular_values[b].tolist()],
        "rank": int(result.rank[b]) if result.rank is not None and whole else None,
        "nullity": int(result.nullity[b]) if result.nullity is not None and whole else None,
        "structural_zeros": _zeros(result.structural_zeros[b]),
        "near_structural": _zeros(result.near_structural[b]),
        "effective_rank": None if result.effective_rank is None else finite(result.effective_rank[b]),
        "sigma_max": finite(result.sigma_max[b]),
        "rank_threshold": finite(result.rank_threshold[b]),
        "method": result.method[b],
        "error_bound": [finite(e) for e in result.error_bound[b].tolist()],
        "status": str(result.status[b]),
        "participation": None if result.participation is None else finite(result.participation[b]),
        "patch_nullity": result.patch_nullity,
        "noise_method": result.noise_method[b],
        "num_evals": float(result.num_evals[b]),
        "seconds": float(result.seconds[b]),
        **dict.fromkeys(_ENERGY),
    }
    if row["rank"] is not None and row["rank"] <= len(row["singular_values"]) and result.invariance_map is not None:
        row |= {name: getattr(result, name)[b].tolist() for name in _ENERGY}
    return row


def _zeros(zeros: Sequence[Zero]) -> list[Row]:
    return [
        {"cause": z.cause, "count": z.count, "predicted": finite(z.predicted), "measured": finite(z.measured)}
        for z in zeros
    ]


def summarize(encoder: Any, settings: Mapping[str, Any], made: RunRows) -> Row:
    """Sum up the spectra of a run."""
    summary, rows = count_images(made)
    if not rows:
        return summary
    keys = ("sigma_max", "rank", "nullity", "effective_rank", "participation", "num_evals", "seconds")
    middle, zeros = medians_of(rows, keys), {kind: _by_cause(rows, kind) for kind in _ZEROS}
    return summary | {"median": middle, **zeros, "verdict": verdict("spectrum", rows=rows, median=middle, **zeros)}


def _by_cause(rows: Rows, kind: str) -> Row:
    found: dict[str, list[Row]] = {}
    for row in rows:
        for zero in row[kind]:
            found.setdefault(zero["cause"], []).append(zero)
    return {
        cause: {"images": len(own), "count": max(zero["count"] for zero in own)}
        | medians_of(own, ("predicted", "measured"))
        for cause, own in found.items()
    }


def draw_figures(settings: Row, summary: Row, made: RunRows) -> dict[str, bytes]:
    """Draw the spectra and, if they are kept, the singular vectors of the first images."""
    from hf_equiv.analyses import figures

    images = {row["image_id"]: decode_png(row["image"]) for row in made.shown if row["image"] is not None}
    floats = shards.read_first_floats(made.folder, SHOWN, "right") if settings["vectors"] and made.folder else {}
    vectors = {name.removesuffix("/right"): own for name, own in floats.items()}
    return figures.spectrum_figures(made.rows, images, vectors, settings)


def follow(settings: Row, rows: Sequence[Row]) -> list[Row]:
    """Return the status of rows with numbers, and the largest of the stated singular values."""
    return [
        {"status": str(Status.COMPLETED if row["sigma_max"] is not None else Status.ERROR)}
        | {"sigma_max": max((s for s in row["singular_values"] or [] if s is not None), default=None)}
        for row in rows
    ]


def remake(encoder: Any, settings: Row, rows: Sequence[Row], floats: dict[str, Tensor]) -> list[Row]:
    """Recompute a spectrum row; counts and sums over all singular values use the stated values."""
    (row,) = rows
    rtol = _earlier_rtol(row, encoder.dtype)
    result = jacobian_spectrum(
        encoder, row["image"][None], k=settings["k"], rank_rtol=rtol, batch=_BATCH, progress=False
    )
    made = row_of(result) | {"left_open": () if rtol is None else (_EARLIER,)}
    made |= dict.fromkeys(_ENERGY) if not any(row.get(key) for key in _ENERGY) else {}  # a row of an earlier version
    sigma = [s or 0.0 for s in row["singular_values"] or []]
    values, whole = torch.tensor(sigma, dtype=torch.float64), made["rank"] is not None and settings["k"] is None
    if whole and len(sigma) == len(made["singular_values"]) and sigma[0] > 0:
        rank = sum(s > (row["rank_threshold"] or 0.0) for s in sigma)  # a σ near the threshold may be on either side
        made |= {
            "rank": rank,
            "nullity": made["nullity"] + made["rank"] - rank,
            "effective_rank": finite(torch.special.entr(values / values.sum()).sum().exp()),
            "participation": finite(values.square().sum().square() / values.pow(4).sum()),
        }
    faults = []
    if settings["vectors"]:
        pair = (floats.pop(f"{row['image_id']}/{side}") for side in ("left", "right"))
        kept = settings["k"] or min(KEPT_VECTORS, len(sigma))
        faults = _vector_faults(Jacobian(encoder, row["image"], batch=_BATCH), values[:kept], made, *pair)
    return [made | {key: row[key] for key in ("num_evals", "seconds")} | {"faults": faults}]


def _vector_faults(J: Jacobian, sigma: Tensor, made: Row, left: Tensor, right: Tensor) -> list[tuple[str, str, str]]:
    """Describe the faults of singular vectors U (D, K) and V (K, C, H, W): J V = U Σ, Jᵀ U = V Σ, orthonormal both."""
    count, rows = len(sigma), right.flatten(1).double()
    if left.shape != (J.shape[0], count) or len(right) != count or not bool(left.isfinite().all()):
        return [("left", f"a matrix of shape ({J.shape[0]}, {count})", f"its shape is {tuple(left.shape)}")]
    values, largest, found = sigma.to(left), made["sigma_max"] or 1.0, []
    above = values > 1e-3 * largest  # smaller ones have no right vector above the float noise
    sides = {
        "left": (J.rmv(left.T.to(J.image)).flatten(1).double() - values[:, None] * rows, left.T @ left),
        "right": (J.mv(right).double() - values[:, None] * left.T, rows @ rows.T),
    }
    for side, (rest, gram) in sides.items():
        off = float(rest.norm(dim=1).max()) / largest
        tilt = float((gram - torch.eye(count).to(gram))[above][:, above].abs().max()) if bool(above.any()) else 0.0
        if not (off <= _RESIDUAL[made["method"]] and tilt <= _TILT):
            told = f"they differ by {off:.2g} σ₁ from J and by {tilt:.2g} from an orthonormal set"
            found.append((side, "the singular vectors of the stated values", told))
    return found


def _earlier_rtol(row: Row, dtype: torch.dtype) -> float | None:
    """Return the threshold of the rank over σ₁ if a row has it by the rule of earlier versions, else None."""
    # It was 1000 eps σ₁, or twice the last bound; bounds were averages then, and up to 50 times smaller.
    threshold, top = row["rank_threshold"], row["sigma_max"]
    if not threshold or not top:
        return None
    rules = (1000 * torch.finfo(dtype).eps * top, 2 * ((row["error_bound"] or [0.0])[-1] or 0.0))
    known = any(math.isclose(threshold, one, rel_tol=1e-9) for one in rules)
    return threshold / top if known and threshold < top else None


def tolerances(made: Row, settings: Row) -> Row:
    """Return the tolerances of recomputed spectrum columns: singular values may differ by their error bounds."""
    bounds = [bound or 0.0 for bound in made["error_bound"]]
    sigma = [s or 0.0 for s in made["singular_values"]]
    top = max(sigma, default=0.0)
    share, least = 1e-9 if settings["k"] is None else 1e-3, 0.02 if made["left_open"] else 0.2
    zeros = {
        kind: [
            {"measured": 2 * max(bounds) + 1e-7 * top, "predicted": 1e-2 * (zero["predicted"] or 0.0) + 1e-12}
            for zero in made[kind]
        ]
        for kind in _ZEROS
    }
    # A right singular vector turns by up to bound/σ, and its energy is one of R in the sum.
    counted = [(bound, s) for bound, s in zip(bounds, sigma, strict=True) if 2 * s > (made["rank_threshold"] or 0.0)]
    off = 4 * sum(min(1.0, bound / s) for bound, s in counted) / max(1, len(counted)) + 1e-6
    energy = {key: off * float(torch.tensor(made[key]).max()) for key in _ENERGY if made[key] is not None}
    return (zeros | energy) | {
        "singular_values": [2 * bound + 1e-7 * top for bound in bounds],
        "error_bound": [(least * bound, 3 * bound + 1e-12 * top) for bound in bounds],
        "rank_threshold": 0.5 * (made["rank_threshold"] or 0.0),
        "effective_rank": share * (made["effective_rank"] or 0.0),
        "participation": share * (made["participation"] or 0.0),
    }
