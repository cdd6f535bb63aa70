"""Compute the numbers of a report from the rows of runs and from new measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from hf_equiv.analyses import spectrum, walk
from hf_equiv.analyses.plan import RunRows
from hf_equiv.report.collect import Checkpoint, Run
from hf_equiv.report.records import (
    BudgetNumbers,
    CheckpointNumbers,
    DirectionNumbers,
    HeadNumbers,
    LipschitzNumbers,
    MatchNumbers,
    ProbeNumbers,
    RetrievalNumbers,
    RunLine,
    SpectrumNumbers,
    SurvivalNumbers,
    TransferNumbers,
    WalkNumbers,
)
from hf_equiv.report.statistics import Estimate, Share, Spread, estimate, share, spread
from hf_equiv.results import Status
from hf_equiv.runs.schema import Row, row_name

Rows = Sequence[Mapping[str, Any]]

THRESHOLDS = (1e-2, 1e-3, 1e-4)

IDENTICAL_DB = 100.0
"""PSNR assigned to a match that equals its source; one grey level in one value of 150,528 gives 99.9 dB."""

MATCHED = 0.01
"""A PNG counts as matched within this part of the median distance of unrelated images."""


def checkpoint_numbers(checkpoint: Checkpoint, measured: Row | None, transfer: Sequence[Row]) -> CheckpointNumbers:
    """Compute every number of one checkpoint, with the results of `measure_run` and `measure_transfer`."""
    first = checkpoint.matches[0] if checkpoint.matches else None
    geometry = _spectrum(checkpoint.of("spectrum"))
    size = (measured["dim"], measured["pixels"]) if measured else (None, None)
    if geometry:
        size = (size[0] or geometry.dim, size[1] or geometry.pixels)
    return CheckpointNumbers(
        **{key: getattr(checkpoint, key) for key in ("title", "model_id", "revision", "readout", "normalize", "dtype")},
        dim=size[0],
        pixels=size[1],
        runs=tuple(_run_line(run) for run in checkpoint.runs),
        match=_match(first, measured) if first else None,
        budgets=tuple(_budget(run, _apart(run, checkpoint.matches[0], measured)) for run in checkpoint.matches),
        heads=_heads(first) if first else None,
        survival=_survival(measured),
        transfer=tuple(_transfer(one) for one in transfer if one["pairs"]),
        retrieval=_retrieval(measured),
        probe=_probe(measured),
        spectrum=geometry,
        lipschitz=_lipschitz(checkpoint.of("lipschitz")),
        walk=_walk(checkpoint.of("walk")),
    )


def _run_line(run: Run) -> RunLine:
    return RunLine(
        run.name, run.analysis, run.listed, run.there, len(run.rows) - len(run.good), not run.partial, run.left_out,
        run.changed, **{key: run.settings[key] for key in ("data_id", "data_revision", "seed")},
    )  # fmt: skip


def _column(rows: Rows, key: str) -> list[Any]:
    return [row.get(key) for row in rows]


def _medians(rows: Rows, *keys: str) -> dict[str, Any]:
    return {key: estimate(_column(rows, key)) for key in keys}


def _match(run: Run, measured: Row | None) -> MatchNumbers:
    good, pairs = run.good, measured["pairs"] if measured else []
    errors = {"float": _column(good, "embedding_error"), "8bit": _column(good, "embedding_error_8bit")}
    unrelated, matched = _unrelated(run, measured), None
    if unrelated and unrelated.median:
        matched = _at_most(errors["8bit"], MATCHED * unrelated.median)
    settings = ("solver", "radius", "norm", "rtol", "max_evals", "refine")
    return MatchNumbers(
        run=run.name,
        listed=run.listed,
        rows=len(run.rows),
        pairs=len(good),
        **{key: run.settings[key] for key in settings},
        **_medians(
            good, "embedding_error", "embedding_error_8bit", "target_quantization_error", "noise_floor",
            "cosine_to_target", "ssim", "l2", "linf", "num_evals", "target_label_prob", "match_prob",
        ),
        psnr_db=_psnr(good),
        converged=_converged(run),
        within={kind: {f"{t:g}": _at_most(own, t) for t in THRESHOLDS} for kind, own in errors.items()},
        photos=len({row[key] for row in good for key in ("source_id", "target_id")}),
        **_medians(
            pairs, "distance", "moved", "random_moved", "random_error", "random_l2", "rounded_error",
            "psnr_match_target", "ssim_match_target",
        ),
        measured_pairs=len(pairs),
        unrelated=unrelated,
        matched=matched,
    )  # fmt: skip


def _at_most(errors: Sequence[float | None], limit: float) -> Share | None:
    return share(None if error is None else error <= limit for error in errors)


def _converged(run: Run) -> Share | None:
    return share(row["status"] == Status.CONVERGED for row in run.rows)


def _unrelated(run: Run, measured: Row | None) -> Spread | None:
    """Distances of unrelated photos: as measured, else as the run's own summary states them."""
    if measured and measured["unrelated"]:
        return _distribution(measured["unrelated"])
    stated = (run.record.get("summary") or {}).get("baseline")
    return Spread(**({"q05": None, "q95": None} | stated["distance"]), n=stated["num_pairs"]) if stated else None


def _distribution(stored: Row | None) -> Spread | None:
    return Spread(**{key: value for key, value in stored.items() if key != "curve"}) if stored else None


def _apart(run: Run, first: Run, measured: Row | None) -> float | None:
    """Median distance of unrelated photos of a run's own data: as measured for the first run, else as it states."""
    same = all(run.settings[key] == first.settings[key] for key in ("data_id", "data_revision"))
    found = (_unrelated(first, measured) if same else None) or _unrelated(run, None)
    return found.median if found else None


def _budget(run: Run, unrelated: float | None) -> BudgetNumbers:
    settings = ("radius", "norm", "solver", "max_evals", "rtol", "seed", "data_id", "data_revision")
    return BudgetNumbers(
        run=run.name,
        pairs=len(run.good),
        rows=len(run.rows),
        listed=run.listed,
        **{key: run.settings[key] for key in settings},
        unrelated=unrelated,
        **_medians(
            run.good, "embedding_error", "embedding_error_8bit", "target_quantization_error", "ssim", "l2",
            "cosine_to_target", "cosine_to_source",
        ),
        psnr_db=_psnr(run.good),
        converged=_converged(run),
        nearer=share(_less(row["cosine_to_source"], row["cosine_to_target"]) for row in run.good),
        flipped=_heads(run).flipped,
    )  # fmt: skip


def _psnr(rows: Rows) -> Estimate | None:
    """Median PSNR to the source; a match that equals its source counts as `IDENTICAL_DB`."""
    return estimate(IDENTICAL_DB if row["psnr_db"] is None and row["l2"] == 0 else row["psnr_db"] for row in rows)


def _heads(run: Run) -> HeadNumbers:
    rows = [row for row in run.good if row["same_top1"] is not None]
    apart = [row for row in rows if row["source_label"] != row["target_label"]]
    return HeadNumbers(
        labelled=len(rows),
        apart=len(apart),
        flipped=share(row["same_top1"] for row in apart),
        kept=share(row["match_label"] == row["source_label"] for row in apart),
        target_label_prob=estimate(_column(apart, "target_label_prob")),
        zero_shot=bool(run.settings.get("labels")),
    )


def _survival(measured: Row | None) -> dict[str, SurvivalNumbers] | None:
    found: dict[str, list[Row]] = {}
    for pair in measured["pairs"] if measured else []:
        for name, row in pair["survival"].items():
            found.setdefault(name, []).append(row)
    return {
        name: SurvivalNumbers(
            **_medians(rows, "error", "control", "to_source"),
            label=share(_column(rows, "label")),
            control_label=share(_column(rows, "control_label")),
        )
        for name, rows in found.items()
    } or None


def _transfer(one: Row) -> TransferNumbers:
    pairs = one["pairs"]
    named = [pair["labels"] for pair in pairs if pair["labels"] and pair["labels"][0] != pair["labels"][2]]
    keys = ("error", "distance", "moved", "cosine_to_target", "cosine_to_source", "cosine_source_target")
    return TransferNumbers(
        **{key: one[key] for key in ("model", "revision", "readout", "same_size")},
        **_medians(pairs, *keys),
        nearer=share(_less(pair["error"], pair["distance"]) for pair in pairs),
        flipped=share(match == target for _, match, target in named),
        kept=share(match == source for source, match, _ in named),
        unrelated=_distribution(one["unrelated"]),
    )


def _less(a: float | None, b: float | None) -> bool | None:
    return None if a is None or b is None else a < b


def _retrieval(measured: Row | None) -> RetrievalNumbers | None:
    stored = measured["retrieval"] if measured else None
    if not stored:
        return None
    ranks, source_ranks = (_column(stored["pairs"], key) for key in ("rank", "source_rank"))
    return RetrievalNumbers(
        **{key: stored[key] for key in ("photos", "k", "chance")},
        first=share(None if rank is None else rank == 1 for rank in ranks),
        source_first=share(None if rank is None else rank == 1 for rank in source_ranks),
        unranked=ranks.count(None),
        rank=estimate(ranks),
        source_rank=estimate(source_ranks),
        overlap=estimate(_column(stored["pairs"], "overlap"), "mean"),
        source_overlap=estimate(_column(stored["pairs"], "source_overlap"), "mean"),
    )


def _probe(measured: Row | None) -> ProbeNumbers | None:
    stored = measured["probe"] if measured else None
    if not stored:
        return None
    apart = [pair for pair in stored["pairs"] if None not in pair.values() and pair["source"] != pair["target"]]
    return ProbeNumbers(
        **{key: stored[key] for key in ("photos", "classes", "k")},
        accuracy=share([True] * stored["hits"] + [False] * (stored["photos"] - stored["hits"])),
        pairs=len(stored["pairs"]),
        apart=len(apart),
        flipped=share(pair["match"] == pair["target"] for pair in apart),
        kept=share(pair["match"] == pair["source"] for pair in apart),
    )


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


def _spectrum(runs: Sequence[Run]) -> SpectrumNumbers | None:
    rows = all_rows(runs)
    if not rows:
        return None
    full = [row for row in rows if row["rank"] is not None]
    summary = spectrum.summarize(None, {}, RunRows(rows))
    smallest = [min((v for v in row["singular_values"] if v is not None and v > row["rank_threshold"]), default=None)
                for row in full]  # fmt: skip
    return SpectrumNumbers(
        images=len(rows),
        full=len(full),
        **_medians(rows, "sigma_max", "effective_rank", "participation", "rank_threshold"),
        structural_zeros=summary["structural_zeros"],
        near_structural=summary["near_structural"],
        ranks=tuple(sorted({row["rank"] for row in full})),
        dtype=rows[0]["dtype"],
        dim=len(full[0]["singular_values"]) if full else None,
        nullity=int(median(row["nullity"] for row in full)) if full else None,
        pixels=full[0]["nullity"] + full[0]["rank"] if full else None,
        smallest_above=estimate(smallest),
    )


def _lipschitz(runs: Sequence[Run]) -> LipschitzNumbers | None:
    rows = all_rows(runs)
    if not rows:
        return None
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["direction"], []).append(row)
    radius, norm, balls = _regional(runs)
    return LipschitzNumbers(
        images=len({(row["image_id"], row["data_revision"]) for row in rows}),
        kinds={kind: _direction(own) for kind, own in kinds.items()},
        regional=spread(_column(balls, "regional_lower_bound")),
        regional_at_center=spread(_column(balls, "regional_at_center")),
        radius=radius,
        norm=norm,
    )


def _direction(rows: Rows) -> DirectionNumbers:
    values, reach = _column(rows, "value"), _column(rows, "linearity_radius")
    return DirectionNumbers(
        count=len(rows),
        resolved=sum(value is not None for value in values),
        value=estimate(values),
        spread=spread(values),
        jvp=spread(_column(rows, "jvp")),
        linearity=estimate(reach),
        linearity_spread=spread(reach),
        at_limit=sum(bool(row["linearity_at_limit"]) for row in rows),
    )


def _regional(runs: Sequence[Run]) -> tuple[float | None, str | None, list[Row]]:
    """Radius, norm and rows of the balls of one radius: the one with most photos, then the largest."""
    balls: dict[tuple[float, str], dict[tuple[str, str], Row]] = {}
    for run in runs:
        if run.settings["regional"]:
            own = balls.setdefault((run.settings["regional"], run.settings["norm"] or "l2"), {})
            own |= {(row["image_id"], row["data_revision"]): row for row in run.good}
    if not balls:
        return None, None, []
    (radius, norm), rows = max(balls.items(), key=lambda one: (len(one[1]), one[0]))
    return radius, norm, list(rows.values())


def _walk(runs: Sequence[Run]) -> WalkNumbers | None:
    walks: list[Row] = []
    for run in runs:
        if run.good:
            made = walk.summarize(None, run.settings, RunRows(run.good))["walks"]
            walks += [walk | {"heading": run.settings["heading"], "run": run.name} for walk in made]
    if not walks:
        return None
    return WalkNumbers(
        **_medians(walks, "l2", "arc_length", "psnr_db"),
        largest_drift=max(walk["largest_drift"] for walk in walks),
        walks=tuple(walks),
        one_label=share(len(walk["labels"]) == 1 for walk in walks if walk["labels"]),
    )
