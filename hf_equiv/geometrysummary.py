"""What the rows of a spectrum, lipschitz or walk run come to: counts, medians, and a verdict in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from hf_equiv.levelset import STOP, TO_AN_IMAGE
from hf_equiv.metrics import short
from hf_equiv.results import Status

Row = dict[str, Any]


def summarize_analysis(analysis: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Row:
    """Summarise the rows of a run.

    Args:
        analysis: `spectrum`, `lipschitz` or `walk`.
        rows: finished rows, those of one image side by side.
        settings: of the run.

    Returns:
        Plain data, None for what does not exist; `verdict` says it in words.
    """
    summary = {
        "images": len({row["image_id"] for row in rows}),
        "rows": len(rows),
        "counts": dict(sorted(Counter(str(row["status"]) for row in rows).items())),
    }
    make = {"spectrum": _spectrum, "lipschitz": _lipschitz, "walk": _walk}[analysis]
    good = [row for row in rows if row["status"] != Status.ERROR]
    return summary | (make(good, settings) if good else {"verdict": "No image could be analysed."})


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


def _lipschitz(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Row:
    kinds: Row = {}
    for kind in dict.fromkeys(row["direction"] for row in rows):
        own = [row for row in rows if row["direction"] == kind]
        values = [row["value"] for row in own if row["value"] is not None]
        kinds[kind] = {
            "count": len(own),
            "resolved": len(values),
            "quantiles": _quantiles(values),
            "largest_jvp": max((row["jvp"] for row in own if row["jvp"] is not None), default=None),
            "linearity_radius": _median(row["linearity_radius"] for row in own),
        }
    firsts = {row["image_id"]: row for row in rows}.values()
    region = {
        key: max((row[key] for row in firsts if row[key] is not None), default=None)
        for key in ("regional_lower_bound", "regional_at_center", "regional_clever")
    }
    return {"kinds": kinds, "regional": region, "verdict": _lipschitz_verdict(kinds, region, settings)}


def _lipschitz_verdict(kinds: Row, region: Row, settings: Mapping[str, Any]) -> str:
    told = [f"{kind} {q['quantiles'][2]:.3g}" for kind, q in kinds.items() if q["quantiles"]]
    text = "Median local constants by kind of direction: " + ", ".join(told) + "." if told else ""
    if "null" in kinds:
        null = kinds["null"]
        numbers = f"{null['resolved']} of {null['count']}" if null["resolved"] else f"none of {null['count']}"
        text += f" A constant above the float noise along null directions: {numbers}."
    found = region["regional_lower_bound"]
    if found is not None:
        norm = {"linf": "L∞ ", "l2": "L2 "}.get(settings.get("norm") or "", "")
        ball = f"{norm}ball" + (f" of radius {settings['regional']:g}" if settings.get("regional") else "")
        text += f" The largest constant found in the {ball} is {found:.4g} ({region['regional_at_center']:.4g} at the "
        text += "image itself): a lower bound."
        clever = region["regional_clever"]
        if clever is not None:
            text += f" The extreme-value estimate (CLEVER) is {clever:.4g}"
            text += ", less than what is attained." if clever < found else "."
    return text.strip() or "No direction has a constant above the float noise."


def _walk(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Row:
    walks: list[Row] = []
    for name in dict.fromkeys(row["image_id"] for row in rows):
        path = [row for row in rows if row["image_id"] == name]
        labels = list(dict.fromkeys(row["label"] for row in path if row["label"] is not None))
        walks.append(
            {
                "image_id": name,
                "status": path[0]["status"],
                "steps": path[-1]["step"],
                "start_l2": path[0]["l2"],
                "l2": path[-1]["l2"],
                "arc_length": path[-1]["arc_length"],
                "psnr_db": path[-1]["psnr_db"],
                "largest_drift": max(row["drift"] for row in path),
                "largest_drift_8bit": max((d for row in path if (d := row["drift_8bit"]) is not None), default=None),
                "remaining": path[-1]["remaining"],
                "stationarity": path[-1]["stationarity"],
                "labels": labels,
                "num_evals": path[0]["num_evals"],
            }
        )
    return {"walks": walks, "verdict": _walk_verdict(walks, settings)}


def _walk_verdict(walks: Sequence[Row], settings: Mapping[str, Any]) -> str:
    heading = settings["heading"]
    drift = short(max(walk["largest_drift"] for walk in walks))
    rounded = [walk["largest_drift_8bit"] for walk in walks if walk["largest_drift_8bit"] is not None]
    kept = f"with drift at most {drift} at every point" + (
        f" ({short(max(rounded))} for the frames rounded to 8 bit)." if rounded else "."
    )
    if len(walks) > 1:
        done = sum(walk["status"] == Status.COMPLETED for walk in walks)
        ends = f"{median(w['l2'] for w in walks):.3g}"
        return f"{done} of {len(walks)} walks ({heading}) were completed; they end at L2 {ends} (median), {kept}"
    walk = walks[0]
    name, steps = walk["image_id"], walk["steps"]
    if settings["solver"] is not None:
        way = f"from a match of the target ({heading}): L2 {walk['start_l2']:.3g} from {name} before, "
        way += f"{walk['l2']:.3g} after"
    else:
        way = f"from {name} ({heading}): L2 {walk['l2']:.3g} from it"
    text = f"{steps} steps {way}, along a path of {walk['arc_length']:.3g}, {kept}"
    if steps == 0:
        text = f"No step was made from {name} ({heading})."
    if heading in ("toward", "connect") and walk["remaining"] is not None:
        reached = walk["remaining"] < 1e-3
        text += " The target itself was reached." if reached else f" The target is still {walk['remaining']:.3g} away."
    if heading in TO_AN_IMAGE and walk["stationarity"] is not None and (walk["remaining"] or 0.0) >= 1e-3:
        text += " " + _rest(walk, settings)
    if walk["labels"]:
        seen = " then ".join(name.split(",")[0] for name in walk["labels"])
        text += f" The head sees {seen} all the way." if len(walk["labels"]) == 1 else f" The head sees {seen}."
    return text


def _rest(walk: Row, settings: Mapping[str, Any]) -> str:
    """Why a walk to an image ended, and how much of the way on still leads along the level set."""
    left = walk["stationarity"]
    told = f"at most {left:.0%} of the way on leads along the level set"
    if left <= settings.get("stop", STOP):
        return f"It is as near as was asked: {told}."
    if walk["steps"] == settings["num_steps"]:
        return f"All steps that were asked are made; {told}."
    if walk["status"] == Status.COMPLETED:
        return f"No nearer point was found; {told}."
    return f"A nearer point could not be brought back to the level set; {told}."


def _median(values: Iterable[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return median(there) if there else None


def _quantiles(values: Sequence[float]) -> list[float] | None:
    """0, 25, 50, 75 and 100 %."""
    if not values:
        return None
    if len(values) == 1:
        return [values[0]] * 5
    return [min(values), *quantiles(values, n=4, method="inclusive"), max(values)]
