"""All numbers of a report, from rows and from what was measured anew: each with its interval and its n."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from hf_equiv.analyses.run import summarize_analysis
from hf_equiv.report.collect import Checkpoint, Run
from hf_equiv.report.measure import collect
from hf_equiv.report.statistics import estimate, share, spread
from hf_equiv.results import Status
from hf_equiv.runs.schema import row_name

Row = dict[str, Any]


Rows = Sequence[Mapping[str, Any]]


_OF_ROWS = (
    "embedding_error", "embedding_error_8bit", "target_quantization_error", "noise_floor", "cosine_to_target",
    "psnr_db", "ssim", "l2", "linf", "num_evals", "target_label_prob", "match_prob",
)  # fmt: skip


_OF_PAIRS = ("distance", "moved", "random_moved", "random_error", "random_l2", "rounded_error", "psnr_match_target",
             "ssim_match_target")  # fmt: skip


THRESHOLDS = (1e-2, 1e-3, 1e-4)


IDENTICAL_DB = 100.0
"""PSNR that a match which is its source counts as; one grey level in one value of 150,528 gives 99.9 dB."""


MATCHED = 0.01
"""A PNG counts as matched within this part of the median distance of unrelated images."""


def checkpoint_numbers(checkpoint: Checkpoint, measured: Row | None, transfer: Sequence[Row]) -> Row:
    """Every number that a report states of one checkpoint.

    Args:
        checkpoint: its runs.
        measured: as from `measure_run`, of its first match run; None if it could not be measured.
        transfer: as from `measure_transfer`, one for each other model.

    Returns:
        Plain data; estimates as {"value", "low", "high", "n"}; None for a part without data.
    """
    matches = checkpoint.matches
    found: Row = {
        "title": checkpoint.title,
        "model_id": checkpoint.model_id,
        "revision": checkpoint.revision,
        "readout": checkpoint.readout,
        "normalize": checkpoint.normalize,
        "dtype": checkpoint.dtype,
        "dim": measured["dim"] if measured else None,
        "pixels": measured["pixels"] if measured else None,
        "runs": [_run_line(run) for run in checkpoint.runs],
        "match": _match(matches[0], measured) if matches else None,
        "budgets": [_budget(run, _apart(run, matches[0], measured)) for run in matches],
        "heads": _heads(matches[0]) if matches else None,
        "survival": _survival(measured),
        "transfer": [_transfer(one) for one in transfer if one["pairs"]],
        "retrieval": _retrieval(measured),
        "probe": _probe(measured),
        "spectrum": _spectrum(checkpoint.of("spectrum")),
        "lipschitz": _lipschitz(checkpoint.of("lipschitz")),
        "walk": _walk(checkpoint.of("walk")),
    }
    if found["spectrum"]:
        found["dim"] = found["dim"] or found["spectrum"]["dim"]
        found["pixels"] = found["pixels"] or found["spectrum"]["pixels"]
    return found


def _run_line(run: Run) -> Row:
    s = run.settings
    return {
        "name": run.name,
        "analysis": run.analysis,
        "listed": run.listed,
        "there": run.there,
        "error_rows": len(run.rows) - len(run.good),
        "complete": not run.partial,
        "left_out": run.left_out,
        "changed_files": list(run.changed),
        "data_id": s["data_id"],
        "data_revision": s["data_revision"],
        "seed": s["seed"],
    }


def _match(run: Run, measured: Row | None) -> Row:
    s, good = run.settings, run.good
    found: Row = {"run": run.name, "listed": run.listed, "rows": len(run.rows), "pairs": len(good)}
    found |= {key: s[key] for key in ("solver", "radius", "norm", "rtol", "max_evals", "refine")}
    found |= {key: estimate(collect(good, key)) for key in _OF_ROWS} | {"psnr_db": _psnr(good)}
    found["converged"] = share([row["status"] == Status.CONVERGED for row in run.rows])
    found["within"] = {
        kind: {f"{t:g}": share([None if row[key] is None else row[key] <= t for row in good]) for t in THRESHOLDS}
        for kind, key in (("float", "embedding_error"), ("8bit", "embedding_error_8bit"))
    }
    photos = {row[key] for row in good for key in ("source_id", "target_id")}
    found["photos"] = len(photos)
    pairs = measured["pairs"] if measured else []
    found |= {key: estimate(collect(pairs, key)) for key in _OF_PAIRS}
    found["measured_pairs"] = len(pairs)
    found["unrelated"] = _unrelated(run, measured)
    found["matched"] = None
    if found["unrelated"] and found["unrelated"]["median"]:
        near = MATCHED * found["unrelated"]["median"]
        errors = collect(good, "embedding_error_8bit")
        found["matched"] = share([None if error is None else error <= near for error in errors])
    return found


def _unrelated(run: Run, measured: Row | None) -> Row | None:
    """Distances of unrelated photos: as measured, else as the run's own summary has them."""
    if measured and measured["unrelated"]:
        return {key: value for key, value in measured["unrelated"].items() if key != "curve"}
    stated = (run.record.get("summary") or {}).get("baseline")
    return None if not stated else {**stated["distance"], "n": stated["num_pairs"], "q05": None, "q95": None}


def _apart(run: Run, first: Run, measured: Row | None) -> float | None:
    """Median distance of unrelated photos of a run's own data: as measured for the first run, else as it states."""
    same = all(run.settings[key] == first.settings[key] for key in ("data_id", "data_revision"))
    found = (_unrelated(first, measured) if same else None) or _unrelated(run, None)
    return found["median"] if found else None


def _budget(run: Run, unrelated: float | None) -> Row:
    s, good = run.settings, run.good
    keys = (
        "embedding_error", "embedding_error_8bit", "target_quantization_error", "psnr_db", "ssim", "l2",
        "cosine_to_target", "cosine_to_source",
    )  # fmt: skip
    found: Row = {"run": run.name, "pairs": len(good), "rows": len(run.rows), "listed": run.listed}
    keep = ("radius", "norm", "solver", "max_evals", "rtol", "seed", "data_id", "data_revision")
    found |= {key: s[key] for key in keep} | {"unrelated": unrelated}
    found |= {key: estimate(collect(good, key)) for key in keys} | {"psnr_db": _psnr(good)}
    found["converged"] = share([row["status"] == Status.CONVERGED for row in run.rows])
    found["nearer"] = share([_less(row["cosine_to_source"], row["cosine_to_target"]) for row in good])
    return found | {"flipped": _heads(run)["flipped"]}


def _psnr(rows: Sequence[Mapping[str, Any]]) -> Row | None:
    """Median PSNR to the source; a match that is its source counts as `IDENTICAL_DB`, above any that is not."""
    values = [IDENTICAL_DB if row["psnr_db"] is None and row["l2"] == 0 else row["psnr_db"] for row in rows]
    return estimate(values)


def _heads(run: Run) -> Row:
    rows = [row for row in run.good if row["same_top1"] is not None]
    changed = [row for row in rows if row["source_label"] != row["target_label"]]
    return {
        "labelled": len(rows),
        "apart": len(changed),
        "flipped": share([bool(row["same_top1"]) for row in changed]),
        "kept": share([row["match_label"] == row["source_label"] for row in changed]),
        "target_label_prob": estimate(collect(changed, "target_label_prob")),
        "zero_shot": bool(run.settings.get("labels")),
    }


def _survival(measured: Row | None) -> Row | None:
    pairs = measured["pairs"] if measured else []
    names = list(dict.fromkeys(name for pair in pairs for name in pair["survival"]))
    found = {}
    for name in names:
        own = [pair["survival"][name] for pair in pairs if name in pair["survival"]]
        found[name] = {key: estimate(collect(own, key)) for key in ("error", "control", "to_source")}
        found[name] |= {key: share(collect(own, key)) for key in ("label", "control_label")}
    return found or None


def _transfer(one: Row) -> Row:
    pairs = one["pairs"]
    keys = ("error", "distance", "moved", "cosine_to_target", "cosine_to_source", "cosine_source_target")
    found: Row = {key: one[key] for key in ("model", "revision", "readout", "same_size")}
    found |= {key: estimate(collect(pairs, key)) for key in keys}
    found["nearer"] = share([_less(pair["error"], pair["distance"]) for pair in pairs])
    named = [pair["labels"] for pair in pairs if pair["labels"] and pair["labels"][0] != pair["labels"][2]]
    found["flipped"] = share([match == target for _, match, target in named])
    found["kept"] = share([match == source for source, match, _ in named])
    found["unrelated"] = one["unrelated"] and {k: v for k, v in one["unrelated"].items() if k != "curve"}
    return found


def _less(a: float | None, b: float | None) -> bool | None:
    return None if a is None or b is None else a < b


def _retrieval(measured: Row | None) -> Row | None:
    stored = measured["retrieval"] if measured else None
    if not stored:
        return None
    pairs = stored["pairs"]
    found: Row = {key: stored[key] for key in ("photos", "k", "chance")}
    for name, key in (("first", "rank"), ("source_first", "source_rank")):
        found[name] = share([None if rank is None else rank == 1 for rank in collect(pairs, key)])
    found["unranked"] = sum(pair["rank"] is None for pair in pairs)
    found |= {key: estimate(collect(pairs, key)) for key in ("rank", "source_rank")}
    return found | {key: estimate(collect(pairs, key), "mean") for key in ("overlap", "source_overlap")}


def _probe(measured: Row | None) -> Row | None:
    stored = measured["probe"] if measured else None
    if not stored:
        return None
    apart = [pair for pair in stored["pairs"] if None not in pair.values() and pair["source"] != pair["target"]]
    found: Row = {key: stored[key] for key in ("photos", "classes", "k")}
    return found | {
        "accuracy": share([True] * stored["hits"] + [False] * (stored["photos"] - stored["hits"])),
        "pairs": len(stored["pairs"]),
        "apart": len(apart),
        "flipped": share([pair["match"] == pair["target"] for pair in apart]),
        "kept": share([pair["match"] == pair["source"] for pair in apart]),
    }


def all_rows(runs: Sequence[Run]) -> list[Mapping[str, Any]]:
    """The good rows of several runs of one verb; a row that several runs have counts once, with all that they know."""
    once: dict[tuple[Any, ...], Row] = {}
    for run in runs:
        for row in run.good:
            name = row_name(run.analysis, dict(row))
            mark = (run.settings.get("heading"), name, row["data_revision"], row["seed"], row["dtype"])
            known = once.setdefault(mark, dict(row))
            known |= {key: value for key, value in row.items() if known.get(key) is None}
    return list(once.values())


def _spectrum(runs: Sequence[Run]) -> Row | None:
    rows = all_rows(runs)
    if not rows:
        return None
    full = [row for row in rows if row["rank"] is not None]
    made = summarize_analysis("spectrum", rows, {})
    found: Row = {"images": len(rows), "full": len(full)}
    found |= {key: estimate(collect(rows, key)) for key in ("sigma_max", "effective_rank", "participation")}
    found |= {key: made[key] for key in ("structural_zeros", "near_structural")}
    found["ranks"] = sorted({row["rank"] for row in full})
    found["dtype"] = rows[0]["dtype"]
    found["dim"] = len(full[0]["singular_values"]) if full else None
    found["nullity"] = int(median(row["nullity"] for row in full)) if full else None
    found["pixels"] = full[0]["nullity"] + full[0]["rank"] if full else None
    threshold = estimate([row["rank_threshold"] for row in rows])
    smallest = [min((v for v in row["singular_values"] if v is not None and v > row["rank_threshold"]), default=None)
                for row in full]  # fmt: skip
    return found | {"rank_threshold": threshold, "smallest_above": estimate(smallest)}


def _lipschitz(runs: Sequence[Run]) -> Row | None:
    rows = all_rows(runs)
    if not rows:
        return None
    kinds: Row = {}
    for kind in dict.fromkeys(row["direction"] for row in rows):
        own = [row for row in rows if row["direction"] == kind]
        values = collect(own, "value")
        kinds[kind] = {
            "count": len(own),
            "resolved": sum(value is not None for value in values),
            "value": estimate(values),
            "spread": spread(values),
            "jvp": spread(collect(own, "jvp")),
            "linearity": estimate(collect(own, "linearity_radius")),
            "linearity_spread": spread(collect(own, "linearity_radius")),
            "at_limit": sum(bool(row["linearity_at_limit"]) for row in own),
        }
    images = {(row["image_id"], row["data_revision"]) for row in rows}
    return {"images": len(images), "kinds": kinds} | _regional(runs)


def _regional(runs: Sequence[Run]) -> Row:
    """Constants found in balls of one radius: of several the one with most photos, then the largest."""
    balls: dict[tuple[float, str], dict[tuple[str, str], Mapping[str, Any]]] = {}
    for run in runs:
        if run.settings["regional"]:
            own = balls.setdefault((run.settings["regional"], run.settings["norm"] or "l2"), {})
            own |= {(row["image_id"], row["data_revision"]): row for row in run.good}
    (radius, norm), rows = max(balls.items(), key=lambda one: (len(one[1]), one[0]), default=((None, None), {}))
    return {
        "regional": spread(collect(list(rows.values()), "regional_lower_bound")),
        "regional_at_center": spread(collect(list(rows.values()), "regional_at_center")),
        "radius": radius,
        "norm": norm,
    }


def _walk(runs: Sequence[Run]) -> Row | None:
    walks: list[Row] = []
    for run in runs:
        if run.good:
            made = summarize_analysis("walk", run.good, run.settings)["walks"]
            walks += [walk | {"heading": run.settings["heading"], "run": run.name} for walk in made]
    if not walks:
        return None
    measure: Callable[[str], Row | None] = lambda key: estimate([walk[key] for walk in walks])  # noqa: E731
    found: Row = {key: measure(key) for key in ("l2", "arc_length", "psnr_db")}
    found["largest_drift"] = max(walk["largest_drift"] for walk in walks)
    seen = [walk["labels"] for walk in walks if walk["labels"]]
    return found | {"walks": walks, "one_label": share([len(labels) == 1 for labels in seen])}
