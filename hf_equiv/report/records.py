"""The numbers of a report as frozen records: each estimate with its interval and n, None where there is no data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf_equiv.report.statistics import Estimate, Share, Spread
from hf_equiv.runs.schema import Row


@dataclass(frozen=True)
class RunLine:
    """One run as the report lists it: how many of its pairs or images there are, and which files are left out."""

    name: str
    analysis: str
    listed: int
    there: int
    error_rows: int
    complete: bool
    left_out: int
    changed_files: tuple[str, ...]
    data_id: str
    data_revision: str
    seed: int


@dataclass(frozen=True)
class MatchNumbers:
    """The first match run: medians over pairs, from its rows and, from `distance` on, from new measurements.

    Distances are relative to the length of the second embedding. `within` holds, for the float image and the PNG, the
    share of pairs at or below each error.
    """

    run: str
    listed: int
    rows: int
    pairs: int
    solver: str
    radius: float | None
    norm: str
    rtol: float
    max_evals: int
    refine: bool
    embedding_error: Estimate | None
    embedding_error_8bit: Estimate | None
    target_quantization_error: Estimate | None
    noise_floor: Estimate | None
    cosine_to_target: Estimate | None
    psnr_db: Estimate | None
    ssim: Estimate | None
    l2: Estimate | None
    linf: Estimate | None
    num_evals: Estimate | None
    target_label_prob: Estimate | None
    match_prob: Estimate | None
    converged: Share | None
    within: Mapping[str, Mapping[str, Share | None]]
    photos: int
    distance: Estimate | None
    moved: Estimate | None
    random_moved: Estimate | None
    random_error: Estimate | None
    random_l2: Estimate | None
    rounded_error: Estimate | None
    psnr_match_target: Estimate | None
    ssim_match_target: Estimate | None
    measured_pairs: int
    unrelated: Spread | None
    matched: Share | None


@dataclass(frozen=True)
class BudgetNumbers:
    """One match run with its limit on the change; `unrelated` is the median over unrelated photos of its data."""

    run: str
    pairs: int
    rows: int
    listed: int
    radius: float | None
    norm: str
    solver: str
    max_evals: int
    rtol: float
    seed: int
    data_id: str
    data_revision: str
    unrelated: float | None
    embedding_error: Estimate | None
    embedding_error_8bit: Estimate | None
    target_quantization_error: Estimate | None
    psnr_db: Estimate | None
    ssim: Estimate | None
    l2: Estimate | None
    cosine_to_target: Estimate | None
    cosine_to_source: Estimate | None
    converged: Share | None
    nearer: Share | None
    flipped: Share | None


@dataclass(frozen=True)
class HeadNumbers:
    """Labels by the checkpoint's head, or zero-shot, of pairs whose source and target have different labels."""

    labelled: int
    apart: int
    flipped: Share | None
    kept: Share | None
    target_label_prob: Estimate | None
    zero_shot: bool


@dataclass(frozen=True)
class SurvivalNumbers:
    """The match after one transform, and the target after the same (`control`)."""

    error: Estimate | None
    control: Estimate | None
    to_source: Estimate | None
    label: Share | None
    control_label: Share | None


@dataclass(frozen=True)
class TransferNumbers:
    """The matches seen by another model."""

    model: str
    revision: str
    readout: str
    same_size: bool
    error: Estimate | None
    distance: Estimate | None
    moved: Estimate | None
    cosine_to_target: Estimate | None
    cosine_to_source: Estimate | None
    cosine_source_target: Estimate | None
    nearer: Share | None
    flipped: Share | None
    kept: Share | None
    unrelated: Spread | None


@dataclass(frozen=True)
class RetrievalNumbers:
    """An image search with the match, and with the source as the control (`source_`)."""

    photos: int
    k: int
    chance: float
    first: Share | None
    source_first: Share | None
    unranked: int
    rank: Estimate | None
    source_rank: Estimate | None
    overlap: Estimate | None
    source_overlap: Estimate | None


@dataclass(frozen=True)
class ProbeNumbers:
    """A nearest-neighbour classifier on the embeddings; `flipped` and `kept` are of the pairs it tells apart."""

    photos: int
    classes: int
    k: int
    accuracy: Share | None
    pairs: int
    apart: int
    flipped: Share | None
    kept: Share | None


@dataclass(frozen=True)
class SpectrumNumbers:
    """Singular values of the Jacobian; rank and nullity are None where only the largest values were computed."""

    images: int
    full: int
    sigma_max: Estimate | None
    effective_rank: Estimate | None
    participation: Estimate | None
    structural_zeros: Mapping[str, Any]
    near_structural: Mapping[str, Any]
    ranks: tuple[int, ...]
    dtype: str
    dim: int | None
    nullity: int | None
    pixels: int | None
    rank_threshold: Estimate | None
    smallest_above: Estimate | None

    @property
    def rank_range(self) -> str:
        """The ranks in words: `190`, `190 to 191`, or nothing."""
        return " to ".join(dict.fromkeys(str(rank) for rank in (*self.ranks[:1], *self.ranks[-1:])))


@dataclass(frozen=True)
class DirectionNumbers:
    """Local constants and reach of the linear model along one kind of direction."""

    count: int
    resolved: int
    value: Estimate | None
    spread: Spread | None
    jvp: Spread | None
    linearity: Estimate | None
    linearity_spread: Spread | None
    at_limit: int


@dataclass(frozen=True)
class LipschitzNumbers:
    """Local constants by kind of direction, and the largest ones found inside balls of one radius."""

    images: int
    kinds: Mapping[str, DirectionNumbers]
    regional: Spread | None
    regional_at_center: Spread | None
    radius: float | None
    norm: str | None


@dataclass(frozen=True)
class WalkNumbers:
    """Walks through images of one embedding: medians over walks, and each walk as its run sums it up."""

    l2: Estimate | None
    arc_length: Estimate | None
    psnr_db: Estimate | None
    largest_drift: float
    walks: tuple[Row, ...]
    one_label: Share | None


@dataclass(frozen=True)
class CheckpointNumbers:
    """Every number that a report states of one checkpoint; None for a part without data."""

    title: str
    model_id: str
    revision: str
    readout: str
    normalize: bool
    dtype: str
    dim: int | None
    pixels: int | None
    runs: tuple[RunLine, ...]
    match: MatchNumbers | None
    budgets: tuple[BudgetNumbers, ...]
    heads: HeadNumbers | None
    survival: Mapping[str, SurvivalNumbers] | None
    transfer: tuple[TransferNumbers, ...]
    retrieval: RetrievalNumbers | None
    probe: ProbeNumbers | None
    spectrum: SpectrumNumbers | None
    lipschitz: LipschitzNumbers | None
    walk: WalkNumbers | None

    def to_json(self) -> Row:
        """Return the numbers as plain data, as `--json` prints them."""
        return dict(json.loads(json.dumps(asdict(self), allow_nan=False)))
