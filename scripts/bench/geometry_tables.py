"""The rows of `geometry.py` as Markdown tables: medians over images."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from geometry_peers import TOP

Rows = list[dict[str, Any]]


def tables(report: dict[str, Any]) -> str:
    """All sections that were run, and what was run, where and with which versions."""
    parts = []
    if report["top"]:
        parts.append(f"**Largest {report['settings']['k']} singular values**\n\n{top_table(report['top'])}")
    if report["local"]:
        parts.append(f"**Local Lipschitz constants**\n\n{local_table(report['local'])}")
    if report["regional"]:
        parts.append(f"**Lipschitz constants within L2 distance 1**\n\n{regional_table(report['regional'])}")
    if report["walk"]:
        parts.append(f"**Walks of {report['settings']['num_steps']} steps**\n\n{walk_table(report['walk'])}")
    return "\n\n".join([*parts, caption(report)])


def top_table(rows: Rows) -> str:
    """Errors, bounds and costs of the largest singular values."""
    head = ["method", "values", "error / σ₁, median / worst", "stated bound / σ₁, held", "passes", "evaluations"]
    head += ["seconds", "× J alone"]
    bare = middle(row["seconds"] for row in rows if row["method"].startswith("bare"))
    lines = []
    for name, same in grouped(rows, "method"):
        count, error, bound = same[0]["count"], middle(row["error"] for row in same), same[0]["bound"]
        seconds = middle(row["seconds"] for row in same)
        held = f"{sum(bool(row['held']) for row in same)} of {len(same)}"
        lines.append(
            [
                TOP[name].title,
                number(count, "d"),
                "–" if error is None else f"{error:.1e} / {max(row['error'] for row in same):.1e}",
                "–" if bound is None else f"{middle(row['bound'] for row in same):.1e}, {held}",
                number(middle(row["passes"] for row in same), ".0f"),
                number(middle(row["num_evals"] for row in same), ".0f"),
                number(seconds, ".2f"),
                "–" if bare is None or seconds is None else f"{seconds / bare:.2f}",
            ]
        )
    return markdown(head, lines)


def local_table(rows: Rows) -> str:
    """What each method states of the constants at the image, beside the truth."""
    head = ["method", "numbers given", "stated, median (largest)", "true, median (largest)"]
    head += ["largest error / σ₁", "evaluations", "seconds"]
    lines = []
    for name, same in grouped(rows, "method"):
        pairs = [(s, t, row["sigma_max"]) for row in same for s, t in zip(row["stated"], row["true"], strict=True)]
        stated = [s for s, _, _ in pairs if s is not None]
        true = [t for _, t, _ in pairs]
        off = [abs(s - t) / sigma for s, t, sigma in pairs if s is not None]
        lines.append(
            [
                name,
                f"{len(stated)} of {len(pairs)}",
                f"{middle(stated):.4g} ({max(stated):.4g})" if stated else "–",
                f"{middle(true):.4g} ({max(true):.4g})",
                f"{max(off):.1e}" if off else "–",
                number(middle(row["num_evals"] for row in same), ".0f"),
                number(middle(row["seconds"] for row in same), ".2f"),
            ]
        )
    return markdown(head, lines)


def regional_table(rows: Rows) -> str:
    """Bounds and estimates of the constants of the ball."""
    head = ["constant of the", "method", "value", "/ that at the image", "/ lower bound (least)", "too small"]
    head += ["radius of the margin [px, L2]", "evaluations", "seconds"]
    lines = []
    for (of, name), same in grouped(rows, "of", "method"):
        given = [row for row in same if row["value"] is not None]
        shares = [row["value"] / row["lower_bound"] for row in given]
        is_bound = "lower bound" in name
        note = "" if len(given) == len(same) else f" ({len(given)} of {len(same)})"
        if saturated := sum(row["saturated"] for row in same):
            note += f" (at most, {saturated} of {len(same)})"
        lines.append(
            [
                of,
                name,
                number(middle(row["value"] for row in given), ".3g") + note,
                number(middle(row["value"] / row["at_center"] for row in given), ".2f"),
                "1" if is_bound else f"{middle(shares):.2f} ({min(shares):.2f})" if shares else "–",
                "–" if is_bound else f"{sum(share < 1 for share in shares)} of {len(given)}",
                number(middle(row["radius"] for row in given), ".2g"),
                number(middle(row["num_evals"] for row in same), ".0f"),
                number(middle(row["seconds"] for row in same), ".2f"),
            ]
        )
    worst = max(abs(row["checked"] - 1) for row in rows if row["checked"] is not None)
    return f"{markdown(head, lines)}\n\nThe lower bounds, in float64 where they were found: equal within {worst:.0e}."


def walk_table(rows: Rows) -> str:
    """How far the walks got, at which drift and cost."""
    head = ["method", "largest drift", "L2 reached", "arc length", "steps", "Jacobians", "evaluations", "seconds"]
    head += ["ended"]
    lines = []
    for name, same in grouped(rows, "method"):
        columns = [middle(row[key] for row in same) for key in ("l2", "arc_length", "points", "jacobians", "num_evals")]
        cells = [number(value, spec) for value, spec in zip(columns, (".3g", ".3g", ".0f", ".0f", ".0f"), strict=True)]
        seconds = number(middle(row["seconds"] for row in same), ".1f")
        ended = ", ".join(dict.fromkeys(row["status"] for row in same))
        lines.append([name, f"{max(row['drift'] for row in same):.1e}", *cells, seconds, ended])
    ours, theirs = (middle(row["l2"] for row in same) for _, same in grouped(rows, "method"))
    return f"{markdown(head, lines)}\n\nL2 reached, ratio: {ours / theirs:.1f}."


def caption(report: dict[str, Any]) -> str:
    """What was run, where and with which versions: the lines under the tables."""
    settings = report["settings"]
    count = len({row["image_id"] for key in ("top", "local", "walk") for row in report[key]})
    walks = len({row["image_id"] for row in report["walk"]})
    lines = [
        f"{report['model']} ({report['readout']}), {count} image{'s' if count > 1 else ''} of {report['data']}"
        + (f" ({walks} for the walk)" if walks and walks < count else "")
        + f", seed {settings['seed']}; one image at a time.",
        f"Machine: {report['machine']}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".",
    ]
    if report["skipped"]:
        lines.append("Skipped: " + "; ".join(f"{name} ({why})" for name, why in report["skipped"].items()) + ".")
    return "  \n".join(lines)


def grouped(rows: Rows, *keys: str) -> list[tuple[Any, Rows]]:
    """Rows by what they have under the keys, in order of appearance."""
    groups: dict[Any, Rows] = {}
    for row in rows:
        groups.setdefault(row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys), []).append(row)
    return list(groups.items())


def middle(values: Iterable[float | None]) -> float | None:
    """The median of the numbers among the values; None where there are none."""
    numbers = [value for value in values if value is not None]
    return statistics.median(numbers) if numbers else None


def number(value: float | None, spec: str) -> str:
    """A number, or a dash."""
    return "–" if value is None else format(value, spec)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, all but the first column to the right."""
    rule = "| --- " + "| ---: " * (len(head) - 1) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])
