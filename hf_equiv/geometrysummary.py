"""What the rows of a spectrum, lipschitz or walk run come to: counts, medians, and a verdict in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from hf_equiv.levelset import TO_AN_IMAGE
from hf_equiv.metrics import short
from hf_equiv.results import Status

Row = dict[str, Any]

_LITTLE = 0.1  # share of the distance to the image below which a walk is near its end
_REST = {  # by whether the walk was completed, and whether little is left
    (True, True): "{left:.1%} of the way on leads along the level set: it is near its end.",
    (True, False): "{left:.0%} of the way on still leads along the level set: more steps, or a smaller --stop, come "
    "nearer.",
    (False, True): "{left:.1%} of the way on leads along the level set, and no nearer point of it was found.",
    (False, False): "{left:.0%} of the way on still leads along the level set, but no nearer point could be brought "
    "back to it.",
}


def summarize_analysis(analysis: str, rows: Sequence[Mapping[str, Any]]) -> Row:
    """Summarise the rows of a run.

    Args:
        analysis: `spectrum`, `lipschitz` or `walk`.
        rows: finished rows, those of one image side by side.

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
    return summary | (make(good) if good else {"verdict": "No image could be analysed."})


def _spectrum(rows: Sequence[Mapping[str, Any]]) -> Row:
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


def _lipschitz(rows: Sequence[Mapping[str, Any]]) -> Row:
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
    return {"kinds": kinds, "regional": region, "verdict": _lipschitz_verdict(kinds, region)}


def _lipschitz_verdict(kinds: Row, region: Row) -> str:
    told = [f"{kind} {q['quantiles'][2]:.3g}" for kind, q in kinds.items() if q["quantiles"]]
    text = "Median local constants by kind of direction: " + ", ".join(told) + "." if told else ""
    if "null" in kinds:
        null = kinds["null"]
        numbers = f"{null['resolved']} of {null['count']}" if null["resolved"] else f"none of {null['count']}"
        text += f" A constant above the float noise along null directions: {numbers}."
    found = region["regional_lower_bound"]
    if found is not None:
        text += f" The largest constant found in the ball is {found:.4g} ({region['regional_at_center']:.4g} at the "
        text += "image itself): a lower bound."
        if region["regional_clever"] is not None:
            text += f" The extreme-value estimate (CLEVER) is {region['regional_clever']:.4g}."
    return text.strip() or "No direction has a constant above the float noise."


def _walk(rows: Sequence[Mapping[str, Any]]) -> Row:
    walks: list[Row] = []
    for name in dict.fromkeys(row["image_id"] for row in rows):
        path = [row for row in rows if row["image_id"] == name]
        labels = list(dict.fromkeys(row["label"] for row in path if row["label"] is not None))
        walks.append(
            {
                "image_id": name,
                "status": path[0]["status"],
                "steps": path[-1]["step"],
                "l2": path[-1]["l2"],
                "arc_length": path[-1]["arc_length"],
                "psnr_db": path[-1]["psnr_db"],
                "largest_drift": max(row["drift"] for row in path),
                "remaining": path[-1]["remaining"],
                "stationarity": path[-1]["stationarity"],
                "labels": labels,
                "num_evals": path[0]["num_evals"],
            }
        )
    return {"walks": walks, "verdict": _walk_verdict(walks, rows[0]["heading"])}


def _walk_verdict(walks: Sequence[Row], heading: str) -> str:
    drift = max(walk["largest_drift"] for walk in walks)
    if len(walks) > 1:
        done = sum(walk["status"] == Status.COMPLETED for walk in walks)
        return (
            f"{done} of {len(walks)} walks ({heading}) were completed; they end at L2 "
            f"{median(w['l2'] for w in walks):.3g} from their origin (median), with drift at most {short(drift)} at "
            "every point."
        )
    walk = walks[0]
    if walk["steps"] == 0:
        return f"No step was made from {walk['image_id']} ({heading})."
    text = (
        f"{walk['steps']} steps from {walk['image_id']} ({heading}): L2 {walk['l2']:.3g} from the origin along a path "
        f"of {walk['arc_length']:.3g}, with drift at most {short(drift)} at every point."
    )
    if walk["remaining"] is not None and heading in ("toward", "connect"):
        reached = walk["remaining"] < 1e-3
        text += " The target itself was reached." if reached else f" The target is still {walk['remaining']:.3g} away."
    left = walk["stationarity"]
    if left is not None and heading in TO_AN_IMAGE and (walk["remaining"] or 0.0) >= 1e-3:
        text += f" {_REST[walk['status'] == Status.COMPLETED, left <= _LITTLE].format(left=left)}"
    if walk["labels"]:
        seen = " then ".join(name.split(",")[0] for name in walk["labels"])
        text += f" The head sees {seen} all the way." if len(walk["labels"]) == 1 else f" The head sees {seen}."
    return text


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
