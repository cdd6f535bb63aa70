"""Draw the figures of a report: small enough for a phone, in colours that differ in brightness too.

Nothing here touches matplotlib's global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hf_equiv.analyses.figures import INK, KINDS, QUIET, RULE, STYLE, png_of
from hf_equiv.formatting import short
from hf_equiv.report.collect import Checkpoint
from hf_equiv.report.geometry import all_rows
from hf_equiv.report.numbers import BudgetNumbers, CheckpointNumbers
from hf_equiv.report.render import ball, number, tenth, three
from hf_equiv.report.statistics import Estimate
from hf_equiv.runs.schema import Row

BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#9a4f96"  # Okabe & Ito 2008, the last one darkened
FIGURE_STYLE = STYLE | {"font.size": 10, "legend.fontsize": 9, "legend.frameon": False}
_FLOOR = 1e-8  # an error of exactly 0 is drawn here


@dataclass(frozen=True)
class Picture:
    """A figure or image as a PNG file; `alt` describes it to readers who cannot see it."""

    name: str
    png: bytes = field(repr=False)
    alt: str


def draw_figures(
    checkpoint: Checkpoint, numbers: CheckpointNumbers, measured: Row | None, prefix: str
) -> dict[str, Picture | None]:
    """Draw all figures of one checkpoint, by name (`errors`, `budget-linf`, …); None where there is nothing to draw."""
    budgets = sorted({b.norm for b in numbers.budgets})
    with rc_context(FIGURE_STYLE):
        made = {
            "errors": _errors(checkpoint, measured),
            "nearness": _nearness(checkpoint, numbers),
            **{f"budget-{norm}": _budget(numbers.budgets, norm) for norm in budgets},
            "survival": _survival(numbers),
            "spectrum": _spectrum(checkpoint, numbers),
            "constants": _constants(checkpoint, numbers),
            "proportion": _proportion(checkpoint, numbers),
            "walks": _walks(checkpoint, numbers),
        }
        return {
            what: Picture(f"{prefix}-{what}.png", png_of(one[0]), one[1]) if one else None for what, one in made.items()
        }


Drawn = tuple[Figure, str] | None  # and alternative text


def _errors(checkpoint: Checkpoint, measured: Row | None) -> Drawn:
    """Draw the share of pairs at most as far as each distance: two curves of the match, three controls."""
    if not checkpoint.matches:
        return None
    run = checkpoint.matches[0]
    unrelated = measured["unrelated"]["curve"] if measured and measured["unrelated"] else []
    curves = {
        "float match": [row["embedding_error"] for row in run.good],
        "8-bit PNG match": [row["embedding_error_8bit"] for row in run.good],
        "control: half-level noise": [row["target_quantization_error"] for row in run.good],
        "control: random step": [pair["random_error"] for pair in measured["pairs"]] if measured else [],
        "control: unrelated photos": unrelated,
    }
    known = {name: np.array([v for v in values if v is not None]) for name, values in curves.items()}
    known = {name: values for name, values in known.items() if len(values)}
    if not known:
        return None
    looks = ((BLUE, "-", 2.2), (ORANGE, "-", 2.2), (GREEN, "--", 1.5), (PURPLE, "-.", 1.5), (INK, ":", 1.8))
    figure, axes = _panel(4.3, bottom=1.42)
    for (name, values), (color, line, width) in zip(known.items(), looks, strict=False):
        axes.ecdf(np.maximum(values, _FLOOR), color=color, ls=line, lw=width, label=name)
    rtol = run.settings["rtol"]
    axes.axvline(rtol, color=QUIET, lw=0.9)
    place = axes.get_xaxis_transform()
    axes.text(rtol, 1.03, f"rtol {rtol:g}", color=QUIET, fontsize=9, ha="center", transform=place)
    axes.set_xscale("log")
    axes.set(
        ylim=(0, 1.02), ylabel="share of pairs", xlabel="relative embedding distance (1 = length of the embedding)"
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
    axes.grid(color=RULE, lw=0.6)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.06, -0.22), ncols=2, columnspacing=1.2)
    return figure, f"Distribution of embedding errors; medians: {_medians(known)}."


def _medians(values: Mapping[str, Sequence[float] | np.ndarray]) -> str:
    return "; ".join(f"{name} {short(float(np.median(own)))}" for name, own in values.items())


def _budget(budgets: Sequence[BudgetNumbers], norm: str) -> Drawn:
    """Draw error against the radius of the ball, float image and PNG, with intervals; the run without a ball last."""
    rows = [b for b in budgets if b.embedding_error_8bit and (b.radius is None or b.norm == norm)]
    if len({b.radius for b in rows}) < 2:
        return None
    rows = sorted(rows, key=lambda b: (b.radius is None, b.radius or 0.0))
    places = {r: float(k) for k, r in enumerate(dict.fromkeys(b.radius for b in rows))}
    one = len({(b.data_id, b.data_revision) for b in rows}) == 1  # no curve through runs of different photos
    figure, axes = _panel(3.9)
    for key, color, mark, told, shift in (
        ("embedding_error", BLUE, "o", "float image", -0.05),
        ("embedding_error_8bit", ORANGE, "s", "8-bit PNG, read back", 0.05),
    ):
        own = {places[b.radius] + shift: getattr(b, key) for b in rows if getattr(b, key)}
        _bars(axes, list(own), list(own.values()), color, mark, told, line=one)
    apart = sorted({(places[b.radius], b.unrelated) for b in rows if b.unrelated})
    for k, (place, level) in enumerate(apart):
        told = "" if k else "unrelated images of the same data"
        axes.plot((place - 0.5, place + 0.5), [level] * 2, color=INK, lw=1.4, ls=":", label=told)
    names = [ball(radius, norm).removeprefix("L2 ").removeprefix("ε = ") for radius in places]
    unit = "largest change of a pixel value allowed" if norm == "linf" else "L2 distance allowed, pixels in [0, 1]"
    axes.set_yscale("log")
    axes.set_xticks(list(places.values()), names)
    axes.set(xlim=(-0.4, len(places) - 0.6), xlabel=f"budget ε: {unit}", ylabel="embedding error, median")
    axes.grid(axis="y", color=RULE, lw=0.6)
    axes.legend(loc="best")
    told = "; ".join(f"{ball(b.radius, b.norm)}: {_value(b.embedding_error_8bit)}" for b in budgets)
    return figure, f"Median PNG error by budget: {told}."


def _value(estimate: Estimate | None) -> str:
    return short(estimate.value if estimate else None)


def _nearness(checkpoint: Checkpoint, numbers: CheckpointNumbers) -> Drawn:
    """Draw PSNR and SSIM of each match to its source, a mark for each budget."""
    looks = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (INK, "v"), (QUIET, "P"))
    kept = []
    for run in checkpoint.matches:
        rows = [row for row in run.good if row["psnr_db"] is not None and row["ssim"] is not None]
        kept += [(run, rows)] if rows else []
    if not kept or numbers.match is None:
        return None
    figure, axes = _panel(3.9)
    for (run, rows), (color, mark) in zip(kept, looks, strict=False):
        axes.scatter(
            [r["psnr_db"] for r in rows], [r["ssim"] for r in rows], s=34, marker=mark, facecolor=color, alpha=0.85,
            edgecolor="white", linewidth=0.6, label=ball(run.settings["radius"], run.settings["norm"]), zorder=3,
        )  # fmt: skip
    axes.set(xlabel="PSNR to the source [dB]", ylabel="SSIM to the source")
    axes.grid(color=RULE, lw=0.6)
    axes.set_ylim(top=1.02)
    axes.legend(loc="lower right")
    median = number(numbers.match.psnr_db, tenth, " dB")
    return figure, f"PSNR and SSIM of each match to its source; median PSNR {median} in the first run."


def survival_lines(numbers: CheckpointNumbers) -> list[tuple[str, Estimate, Estimate | None]]:
    """Return (name, match, control) for the stored match, the rounded one, and each transform."""
    match, found = numbers.match, numbers.survival
    if match is None or found is None:
        return []
    lines = [
        ("as stored (8-bit PNG)", match.embedding_error_8bit, None),
        ("float, rounded to 8 bit", match.rounded_error, match.target_quantization_error),
        *((name, one.error, one.control) for name, one in found.items()),
    ]
    return [(name, error, control) for name, error, control in lines if error]


def _survival(numbers: CheckpointNumbers) -> Drawn:
    """Draw the distance from the target after each transform, of the match and of the target itself."""
    rows = survival_lines(numbers)
    if not rows:
        return None
    figure, axes = _list_panel([name for name, _, _ in rows], 0.4, left=0.33, top=0.45)
    y = np.arange(len(rows))[::-1]
    _bars(axes, list(y + 0.12), [error for _, error, _ in rows], ORANGE, "s", "the match, changed", flat=True)
    control = {float(k) - 0.12: other for k, (_, _, other) in zip(y, rows, strict=True) if other}
    if control:
        _bars(axes, list(control), list(control.values()), BLUE, "o", "control: the target, changed", flat=True)
    if numbers.match and numbers.match.unrelated:
        axes.axvline(numbers.match.unrelated.median, color=INK, lw=1.4, ls=":", label="unrelated images")
    axes.set_xlabel("distance from the target's embedding, median")
    figure.legend(loc="upper left", ncols=3, bbox_to_anchor=(0.0, 1.0), columnspacing=1.0, handletextpad=0.4)
    told = "; ".join(f"{name}: {_value(error)}, control {_value(control)}" for name, error, control in rows)
    return figure, f"Distance from the target after handling: {told}."


def _spectrum(checkpoint: Checkpoint, numbers: CheckpointNumbers) -> Drawn:
    """Draw the singular values of every image, and the range of the rank threshold."""
    rows, found = all_rows(checkpoint.of("spectrum")), numbers.spectrum
    if not rows or found is None:
        return None
    figure, axes = _panel(3.9)
    curves = [np.array([np.nan if not v or v <= 0 else v for v in row["singular_values"]]) for row in rows]
    for k, sigma in enumerate(curves):
        label = "" if k else f"{len(rows)} image{'s' if len(rows) > 1 else ''}"
        alpha = max(0.15, min(0.9, 6 / len(rows)))
        axes.plot(np.arange(1, len(sigma) + 1), sigma, color=BLUE, lw=1.3, alpha=alpha, label=label)
    marks = [row["rank_threshold"] for row in rows]
    axes.axhspan(min(marks), max(marks), color=ORANGE, alpha=0.25, lw=0)
    axes.axhline(max(marks), color=ORANGE, lw=1.2, ls="--", label="rank threshold: float noise below")
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(*marks, *(float(np.nanmin(sigma)) for sigma in curves)) / 3)
    axes.set(xlabel="index i", ylabel="singular value σᵢ")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.grid(axis="y", color=RULE, lw=0.6)
    axes.legend(loc="best")
    rank = f", rank {found.rank_range}" if found.ranks else ""
    return figure, f"Singular values of the Jacobian, largest {_value(found.sigma_max)}{rank}."


def _constants(checkpoint: Checkpoint, numbers: CheckpointNumbers) -> Drawn:
    """Draw the local constants of each kind of direction; hollow where only ‖Jv‖ is known."""
    kinds: dict[str, list[Row]] = {}
    for row in all_rows(checkpoint.of("lipschitz")):
        kinds.setdefault(row["direction"], []).append(row)
    order = [k for k in KINDS if k in kinds] + sorted(set(kinds) - set(KINDS))
    if numbers.lipschitz is None or not any(row["value"] or row["jvp"] for rows in kinds.values() for row in rows):
        return None
    generator = np.random.default_rng(0)
    figure, axes = _list_panel(order, 0.5, right=0.83)
    for y, kind in enumerate(order[::-1]):
        known = [row["value"] for row in kinds[kind] if row["value"]]
        other = [row["jvp"] for row in kinds[kind] if not row["value"] and row["jvp"] and row["jvp"] > 0]
        color = KINDS.get(kind, INK)
        for values, face in ((known, color), (other, "none")):
            _scatter(axes, y, values, generator, facecolor=face, edgecolor=color, linewidth=0.8, alpha=0.7)
        if known:
            axes.plot([np.median(known)] * 2, (y - 0.33, y + 0.33), color=INK, lw=1.8)
        told = f"{len(known)} of {len(kinds[kind])}"
        axes.text(1.02, y, told, transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=QUIET)
    axes.set_xlabel("local constant (embedding length per pixel length)")
    told = "; ".join(f"{kind} {_value(one.value)}" for kind, one in numbers.lipschitz.kinds.items())
    return figure, f"Local constants by kind of direction; medians: {told}."


def _proportion(checkpoint: Checkpoint, numbers: CheckpointNumbers) -> Drawn:
    """Draw lengths in pixel space on one axis: reach of the linear model, matches, and ends of walks."""
    found = numbers.lipschitz
    kinds = [kind for kind, one in found.kinds.items() if one.linearity] if found else []
    rows = all_rows(checkpoint.of("lipschitz"))
    bands = [
        (f"linear: {kind}", kind, [r["linearity_radius"] for r in rows if r["direction"] == kind]) for kind in kinds
    ]
    if bands and checkpoint.matches:
        bands.append(("matches", "", [row["l2"] for row in checkpoint.matches[0].good]))
    if bands and numbers.walk:
        bands.append(("ends of walks", "", [walk["l2"] for walk in numbers.walk.walks]))
    bands = [(name, kind, [v for v in values if v]) for name, kind, values in bands]
    bands = [band for band in bands if band[2]]
    if len(bands) < 2:
        return None
    generator = np.random.default_rng(0)
    figure, axes = _list_panel([name for name, _, _ in bands], 0.42, left=0.33)
    for y, (_, kind, values) in zip(range(len(bands))[::-1], bands, strict=True):
        color = KINDS.get(kind, INK)
        _scatter(axes, y, values, generator, color=color, alpha=0.6, linewidth=0)
        axes.plot([np.median(values)] * 2, (y - 0.33, y + 0.33), color=color, lw=2)
    axes.set_xlabel("L2 distance from the image, pixels in [0, 1]")
    return figure, f"Lengths in pixel space, medians: {_medians({name: values for name, _, values in bands})}."


def _walks(checkpoint: Checkpoint, numbers: CheckpointNumbers) -> Drawn:
    """Draw distance reached and drift of walks over the length of the path."""
    paths: dict[str, list[Row]] = {}
    for run in checkpoint.of("walk"):
        for row in run.good:
            paths.setdefault(f"{row['image_id']} ({row['heading']})", []).append(row)
    paths = {name: rows for name, rows in paths.items() if len(rows) > 1}
    drifts = [row["drift"] for rows in paths.values() for row in rows if row["drift"]]
    if not drifts or numbers.walk is None:
        return None
    rtol = max(run.settings["rtol"] for run in checkpoint.of("walk"))
    lines = (BLUE, ORANGE, GREEN, PURPLE, INK, QUIET)
    figure, axes = _panel(4.4, bottom=2.46)
    below = figure.add_axes((0.15, 0.13, 0.81, 0.37), sharex=axes)
    for k, (name, rows) in enumerate(paths.items()):
        color, length = lines[k % len(lines)], [row["arc_length"] for row in rows]
        axes.plot(length, [row["l2"] for row in rows], color=color, lw=1.5)
        drift, label = [row["drift"] or np.nan for row in rows], name.replace("$", r"\$") if k < len(lines) else ""
        below.plot(length, drift, color=color, lw=1.2, label=label)
    axes.set_ylabel("L2 from origin")
    axes.set_ylim(bottom=0)
    axes.tick_params(labelbottom=False)
    below.set_yscale("log")
    below.set(ylabel="drift", xlabel="length of the path (L2, pixels in [0, 1])")
    below.axhline(rtol, color=INK, lw=0.9, ls="--", label=f"rtol {rtol:g}")
    ends = np.log10([min(drifts) / 1.5, max(*drifts, rtol) * 1.5])
    below.set_ylim(10 ** np.floor(ends[0]), 10 ** np.ceil(ends[1]))
    for one in (axes, below):
        one.grid(color=RULE, lw=0.6)
    below.legend(loc="lower right", ncols=2, fontsize=8)
    told = f"Walks end at L2 {number(numbers.walk.l2, three)} from their origin"
    return figure, f"{told}, with drift at most {short(numbers.walk.largest_drift)}."


def _panel(
    height: float, *, left: float = 0.15, right: float = 0.96, bottom: float = 0.66, top: float = 0.31
) -> tuple[Figure, Axes]:
    """Make a figure 6.2 inches wide; left and right edges are parts of it, lower and upper margins are inches."""
    figure = Figure(figsize=(6.2, height), dpi=140, facecolor="white")
    return figure, figure.add_axes((left, bottom / height, right - left, 1 - (bottom + top) / height))


def _list_panel(
    names: Sequence[str], line: float, *, left: float = 0.15, right: float = 0.96, top: float = 0.15
) -> tuple[Figure, Axes]:
    """Make a figure with a line for each name, the first above, and a logarithmic axis below."""
    figure, axes = _panel(1.1 + line * len(names), left=left, right=right, bottom=0.62, top=top)
    axes.set_xscale("log")
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_yticks(range(len(names))[::-1], [name.replace("$", r"\$") for name in names])
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.grid(axis="x", color=RULE, lw=0.6)
    return figure, axes


def _scatter(axes: Axes, y: float, values: Sequence[float], generator: np.random.Generator, **look: Any) -> None:
    """Draw values on one line, spread a little in height so that they do not hide each other."""
    jitter = y + 0.45 * (generator.random(len(values)) - 0.5) * min(1, len(values) / 8)
    axes.scatter(values, jitter, s=18, **look)


def _bars(
    axes: Axes, places: Sequence[float], estimates: Sequence[Estimate], color: str, mark: str, told: str, *,
    line: bool = False, flat: bool = False,
) -> None:  # fmt: skip
    """Draw medians with their intervals, upright or flat; a median of exactly 0 is drawn at the floor."""
    middle, low, high = (
        np.maximum([e.value if getattr(e, end) is None else getattr(e, end) for e in estimates], _FLOOR)
        for end in ("value", "low", "high")
    )
    spans = np.maximum(np.stack([middle - low, high - middle]), 0)
    look: dict[str, Any] = {"color": color, "marker": mark, "ms": 5.5, "capsize": 3, "label": told, "elinewidth": 1.3}
    if flat:
        axes.errorbar(middle, places, xerr=spans, ls="none", **look)
    else:
        axes.errorbar(places, middle, yerr=spans, ls="-" if line else "none", **look)
