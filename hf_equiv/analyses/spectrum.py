"""Measure a spectrum: the singular values of the Jacobian at each image, and the causes of zeros among them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hf_equiv.analyses.config import ImageConfig
from hf_equiv.analyses.measures import Rows, by_image, median_of
from hf_equiv.analyses.pairs import Item
from hf_equiv.analyses.plan import Loaded, Made, Plan, RunRows, Stage, Verb, one_by_one
from hf_equiv.checks import check_count
from hf_equiv.data.image_file import decode_png
from hf_equiv.formatting import finite, short
from hf_equiv.geometry.spectrum import SpectrumResult, jacobian_spectrum
from hf_equiv.geometry.zeros import Zero
from hf_equiv.jacobian import Jacobian
from hf_equiv.results import Status
from hf_equiv.runs import shards
from hf_equiv.runs.schema import Row

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

KEPT_VECTORS = 8
"""Singular vectors kept with `vectors` where no `k` is given."""

SHOWN = 6
"""Images whose singular vectors are drawn."""


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

    def check_encoder(self, encoder: Encoder) -> None:
        """Refuse options that do not fit the encoder."""
        if self.k is not None and self.k > encoder.embedding_dim:
            raise ValueError(f"`k` must be at most the embedding size {encoder.embedding_dim}; got {self.k}.")

    def own_settings(self, encoder: Encoder, items: Sequence[Item]) -> Row:
        """Return the settings of this verb."""
        return self.listed(items) | {"k": self.k, "vectors": self.vectors}

    def item_bytes(self, encoder: Encoder, settings: Row) -> int:
        """Return the bytes of the image and of the vectors that are kept."""
        size = math.prod(encoder.input_shape)
        return size + size * encoder.dtype.itemsize * (self.k or KEPT_VECTORS) * self.vectors


def image_row(plan: Plan, one: Loaded, batch: int, tell: Stage) -> Made:
    """Make the row of one image, and its singular vectors if they are kept: `ID/right` (K, 3, H, W), `ID/left`."""
    tell("jacobian", 0, 1)
    k, vectors = plan.settings["k"], plan.settings["vectors"]
    result = measure_spectrum(plan.encoder, one.image, k=k, vectors=vectors, batch=batch)
    floats: dict[str, Tensor] = {}
    if result.right is not None and result.left is not None:
        kept = k or min(KEPT_VECTORS, result.right.shape[1])
        floats = {"right": result.right[0, :kept].clone(), "left": result.left[0, :, :kept]}  # without the others
    return Made([row_of(result)], {f"{one.item.name}/{key}": value for key, value in floats.items()})


def measure_spectrum(encoder: Any, image: Tensor, *, k: int | None, vectors: bool, batch: int) -> SpectrumResult:
    """Return the spectrum at one image (3, H, W), as a run states it."""
    return jacobian_spectrum(encoder, image[None], k=k, vectors=vectors, batch=batch)


def row_of(result: SpectrumResult) -> Row:
    """Return the columns that a spectrum of one image gives; None where there is no value."""
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


def _summarize(rows: Rows, settings: Mapping[str, Any]) -> Row:
    keys = ("sigma_max", "rank", "nullity", "effective_rank", "participation", "num_evals", "seconds")
    middle = {key: median_of(row[key] for row in rows) for key in keys}
    zeros = {
        kind: {
            cause: {
                "images": len(found),
                "count": max(z["count"] for z in found),
                "predicted": median_of(z["predicted"] for z in found),
                "measured": median_of(z["measured"] for z in found),
            }
            for cause, found in _by_cause(rows, kind).items()
        }
        for kind in ("structural_zeros", "near_structural")
    }
    return {"median": middle, **zeros, "verdict": _verdict(rows, middle, zeros)}


def _by_cause(rows: Rows, kind: str) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        for zero in row[kind]:
            found.setdefault(zero["cause"], []).append(zero)
    return found


def _verdict(rows: Rows, middle: Row, zeros: Row) -> str:
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


def draw_figures(plan: Plan, summary: Row, made: RunRows) -> dict[str, bytes]:
    """Draw the spectra and, if they are kept, the singular vectors of the first images."""
    from hf_equiv.analyses import figures

    images = {row["image_id"]: decode_png(row["image"]) for row in made.shown if row["image"] is not None}
    floats: dict[str, Tensor] = {}
    if plan.settings["vectors"] and made.folder is not None:
        for path in sorted((made.folder / "float").glob("part-*.safetensors")):
            floats |= shards.read_floats(path)[0] if shards.shard_index(path) < SHOWN else {}
    vectors = {name: (x, floats[f"{name}/right"]) for name, x in images.items() if f"{name}/right" in floats}
    return figures.spectrum_figures(made.rows, vectors, plan.settings)


VERB = Verb(
    config=SpectrumConfig,
    make_rows=one_by_one(image_row),
    summarize=by_image(_summarize),
    figures=draw_figures,
    succeeded=(Status.COMPLETED,),
    batch="derivatives",
    shown=SHOWN,
)


# How `verify` makes rows of spectra again, and compares them (see `verify.rows.VERBS`).


_BATCH = 32  # cotangents per pass


def follow(settings: Row, rows: Sequence[Row]) -> list[Row]:
    """Return the status of rows with numbers, and the largest of the stated singular values."""
    return [
        {"status": str(Status.COMPLETED if row["sigma_max"] is not None else Status.ERROR)}
        | {"sigma_max": max((s for s in row["singular_values"] or [] if s is not None), default=None)}
        for row in rows
    ]


def remake(encoder: Any, settings: Row, rows: Sequence[Row], floats: Mapping[str, Tensor]) -> list[Row]:
    """Make a spectrum row again; what is counted or summed over all singular values, from the stated ones."""
    (row,) = rows
    made = row_of(measure_spectrum(encoder, row["image"], k=settings["k"], vectors=False, batch=_BATCH))
    sigma = [s or 0.0 for s in row["singular_values"] or []]
    values, whole = torch.tensor(sigma, dtype=torch.float64), made["rank"] is not None and settings["k"] is None
    if whole and len(sigma) == len(made["singular_values"]) and sigma[0] > 0:
        rank = sum(s > (row["rank_threshold"] or 0.0) for s in sigma)  # one near the threshold may be on either side
        made |= {
            "rank": rank,
            "nullity": made["nullity"] + made["rank"] - rank,
            "effective_rank": finite(torch.special.entr(values / values.sum()).sum().exp()),
            "participation": finite(values.square().sum().square() / values.pow(4).sum()),
        }
    faults = []
    if settings["vectors"]:
        right = floats[f"{row['image_id']}/right"]
        lengths = Jacobian(encoder, row["image"], batch=_BATCH).mv(right).double().norm(dim=1).tolist()
        off = max(abs(s - length) for s, length in zip([*sigma, *[0.0] * len(lengths)], lengths, strict=False))
        if not off <= 1e-3 * max(lengths):
            faults = [("right", "the vectors of the stated singular values", f"‖Jv‖ differs by {off:.3g}")]
    return [made | {key: row[key] for key in ("image_id", "num_evals", "seconds")} | {"faults": faults}]


def tolerances(made: Row, settings: Row) -> Row:
    """Say how far columns of a spectrum row may be from those made again: singular values by their error bounds."""
    bounds = [bound or 0.0 for bound in made["error_bound"]]
    top = max((s or 0.0 for s in made["singular_values"]), default=0.0)
    share = 1e-9 if settings["k"] is None else 1e-3
    zeros = {
        kind: [
            {"measured": 2 * max(bounds) + 1e-7 * top, "predicted": 1e-2 * (zero["predicted"] or 0.0) + 1e-12}
            for zero in made[kind]
        ]
        for kind in ("structural_zeros", "near_structural")
    }
    return zeros | {
        "singular_values": [2 * bound + 1e-7 * top for bound in bounds],
        "error_bound": [(0.2 * bound, 3 * bound + 1e-12 * top) for bound in bounds],
        "rank_threshold": 0.5 * (made["rank_threshold"] or 0.0),
        "effective_rank": share * (made["effective_rank"] or 0.0),
        "participation": share * (made["participation"] or 0.0),
    }
