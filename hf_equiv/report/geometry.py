"""Summarise the geometry for a report: spectrum, local constants and walks, as frozen records from rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from hf_equiv.analyses import spectrum, walk
from hf_equiv.analyses.figures import by_kind
from hf_equiv.analyses.plan import RunRows
from hf_equiv.report.collect import Run
from hf_equiv.report.statistics import Estimate, Rows, Share, Spread, column, estimate, fill, share, spread
from hf_equiv.runs.schema import Row, row_name


def all_rows(runs: Sequence[Run]) -> list[Row]:
    """Return the good rows of several runs of one verb; a row that several runs hold counts once, merged."""
    once: dict[tuple[Any, ...], Row] = {}
    for run in runs:
        for row in run.good:
            name = row_name(run.analysis, dict(row))
            mark = (run.settings.get("heading"), name, row["data_revision"], row["seed"], row["dtype"])
            known = once.setdefault(mark, dict(row))
            known |= {key: value for key, value in row.items() if known.get(key) is None}
    return list(once.values())


@dataclass(frozen=True)
class SpectrumNumbers:
    """Singular values of the Jacobian; rank and nullity are None where only the largest values were computed."""

    images: int
    full: int
    sigma_max: Estimate | None
    effective_rank: Estimate | None
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


def spectrum_numbers(runs: Sequence[Run]) -> SpectrumNumbers | None:
    """Summarise the spectra of several runs; None without rows."""
    rows = all_rows(runs)
    if not rows:
        return None
    full = [row for row in rows if row["rank"] is not None]
    smallest = [min((v for v in row["singular_values"] if v is not None and v > row["rank_threshold"]), default=None)
                for row in full]  # fmt: skip
    zeros = spectrum.summarize(None, {}, RunRows(rows))
    return fill(
        SpectrumNumbers, rows, {key: zeros[key] for key in ("structural_zeros", "near_structural")},
        images=len(rows),
        full=len(full),
        ranks=tuple(sorted({row["rank"] for row in full})),
        dtype=rows[0]["dtype"],
        dim=len(full[0]["singular_values"]) if full else None,
        nullity=int(median(row["nullity"] for row in full)) if full else None,
        pixels=full[0]["nullity"] + full[0]["rank"] if full else None,
        smallest_above=estimate(smallest),
    )  # fmt: skip


@dataclass(frozen=True)
class DirectionNumbers:
    """Local constants and reach of the linear model along one kind of direction."""

    count: int
    resolved: int
    value: Estimate | None
    spread: Spread | None
    jvp: Spread | None
    linearity: Estimate | None
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


def lipschitz_numbers(runs: Sequence[Run]) -> LipschitzNumbers | None:
    """Summarise the local constants of several runs by kind of direction; None without rows."""
    rows = all_rows(runs)
    if not rows:
        return None
    radius, norm, balls = _regional(runs)
    return LipschitzNumbers(
        images=len({(row["image_id"], row["data_revision"]) for row in rows}),
        kinds={kind: _direction(own) for kind, own in by_kind(rows).items()},
        regional=spread(column(balls, "regional_lower_bound")),
        regional_at_center=spread(column(balls, "regional_at_center")),
        radius=radius,
        norm=norm,
    )


def _direction(rows: Rows) -> DirectionNumbers:
    values = column(rows, "value")
    return DirectionNumbers(
        count=len(rows),
        resolved=sum(value is not None for value in values),
        value=estimate(values),
        spread=spread(values),
        jvp=spread(column(rows, "jvp")),
        linearity=estimate(column(rows, "linearity_radius")),
        at_limit=sum(bool(row["linearity_at_limit"]) for row in rows),
    )


def _regional(runs: Sequence[Run]) -> tuple[float | None, str | None, list[Row]]:
    """Return radius, norm and rows of the balls of one radius: the radius with most photos, then the largest."""
    balls: dict[tuple[float, str], dict[tuple[str, str], Row]] = {}
    for run in runs:
        if run.settings["regional"]:
            own = balls.setdefault((run.settings["regional"], run.settings["norm"] or "l2"), {})
            own |= {(row["image_id"], row["data_revision"]): row for row in run.good}
    none: tuple[Any, Any] = ((None, None), {})
    (radius, norm), rows = max(balls.items(), key=lambda one: (len(one[1]), one[0]), default=none)
    return radius, norm, list(rows.values())


@dataclass(frozen=True)
class WalkNumbers:
    """Walks through images of one embedding: the median distance reached, and each walk as its run sums it up."""

    l2: Estimate | None
    largest_drift: float
    walks: tuple[Row, ...]
    one_label: Share | None


def walk_numbers(runs: Sequence[Run]) -> WalkNumbers | None:
    """Summarise the walks of several runs; None without rows."""
    walks: list[Row] = []
    for run in runs:
        if run.good:
            made = walk.summarize(None, run.settings, RunRows(run.good))["walks"]
            walks += [walk | {"heading": run.settings["heading"], "run": run.name} for walk in made]
    if not walks:
        return None
    return fill(
        WalkNumbers, walks, {}, walks=tuple(walks), largest_drift=max(walk["largest_drift"] for walk in walks),
        one_label=share(len(walk["labels"]) == 1 for walk in walks if walk["labels"]),
    )  # fmt: skip
