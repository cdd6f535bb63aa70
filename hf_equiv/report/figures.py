"""Draw the figures of a report: figures of runs, and comparisons with controls and between runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hf_equiv.analyses import figures
from hf_equiv.analyses.figures import INK, KINDS, LINES, QUIET, STYLE, Band, by_kind, panel
from hf_equiv.formatting import ball, short
from hf_equiv.report.collect import Checkpoint
from hf_equiv.report.geometry import all_rows
from hf_equiv.report.numbers import BudgetNumbers, CheckpointNumbers, SmoothingNumbers
from hf_equiv.report.statistics import Estimate, column
from hf_equiv.runs.schema import Row

BLUE, ORANGE, GREEN, PURPLE, *_ = LINES
_FLOOR = 1e-8  # an error of exactly 0 is drawn here
_WIDTH = 5.2  # inches: its text is legible on a phone, where a figure is 370 pixels wide
_STYLE = {**STYLE, "font.size": 11.5, "legend.fontsize": 10.5}


@rc_context(_STYLE)
def draw_figures(checkpoint: Checkpoint, numbers: CheckpointNumbers, measured: Row | None) -> dict[str, bytes]:
    """Draw all figures of one checkpoint that have something to show, as PNG bytes by name (`errors`, `budget-l2`)."""
    made = {
        "errors": _errors(checkpoint, measured),
        "nearness": _nearness(checkpoint),
        **{f"budget-{norm}": _budget(numbers.budgets, norm) for norm in sorted({b.norm for b in numbers.budgets})},
        "survival": _survival(numbers),
        "detector": _detector(numbers),
        **{f"smoothing-{k}": _smoothing(one.smoothing) for k, one in enumerate(numbers.defences) if one.smoothing},
        "spectrum": _spectrum(checkpoint),
        "constants": _constants(checkpoint),
        "proportion": _proportion(checkpoint, numbers),
        "walks": _walks(checkpoint),
    }
    return {name: figures.png_of(_fit(figure)) for name, figure in made.items() if figure}


def _fit(figure: Figure) -> Figure:
    """Set the width of a figure, and move its legends below the axes."""
    shown: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
        if legend := axes.get_legend():
            legend.remove()
    columns = 2 if max(map(len, shown), default=0) < 26 else 1
    figure.set_size_inches(_WIDTH, figure.get_figheight() + 0.22 * math.ceil(len(shown) / columns))
    if shown:
        figure.legend(shown.values(), shown, loc="outside lower left", ncols=columns)
    return figure


def _errors(checkpoint: Checkpoint, measured: Row | None) -> Figure | None:
    """Draw the share of pairs at most as far as each distance: two curves of the match, three controls."""
    run, measured = checkpoint.main, measured or {}
    if run is None:
        return None
    curves = {
        "float match": [row["embedding_error"] for row in run.good],
        "8-bit PNG match": [row["embedding_error_8bit"] for row in run.good],
        "control: half-level noise": [row["target_quantization_error"] for row in run.good],
        "control: random step": [pair["random_error"] for pair in measured.get("pairs", ())],
        "control: unrelated photos": (measured.get("unrelated") or {"curve": ()})["curve"],
    }
    known = {name: own for name, values in curves.items() if (own := [v for v in values if v is not None])}
    if not known:
        return None
    looks = ((BLUE, "-", 2.2), (ORANGE, "-", 2.2), (GREEN, "--", 1.5), (PURPLE, "-.", 1.5), (INK, ":", 1.8))
    figure, axes = panel()
    for (name, values), (color, line, width) in zip(known.items(), looks, strict=False):
        axes.ecdf(np.maximum(values, _FLOOR), color=color, ls=line, lw=width, label=name)
    axes.axvline(run.settings["rtol"], color=QUIET, lw=0.9, label=f"rtol {short(run.settings['rtol'])}")
    axes.set(xscale="log", ylim=(0, 1), ylabel="share of pairs")
    axes.set_xlabel("relative embedding distance")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid()
    return figure


def _budget(budgets: Sequence[BudgetNumbers], norm: str) -> Figure | None:
    """Draw error against the radius of the ball, float image and PNG, with intervals; the run without a ball last."""
    rows = [b for b in budgets if b.embedding_error_8bit and (b.radius is None or b.norm == norm)]
    if len({b.radius for b in rows}) < 2:
        return None
    rows = sorted(rows, key=lambda b: (b.radius is None, b.radius or 0.0))
    places = {r: float(k) for k, r in enumerate(dict.fromkeys(b.radius for b in rows))}
    one = len({(b.data_id, b.data_revision) for b in rows}) == 1  # no curve through runs of different photos
    figure, axes = panel()
    for key, color, mark, told, shift in (
        ("embedding_error", BLUE, "o", "float image", -0.05),
        ("embedding_error_8bit", ORANGE, "s", "8-bit PNG, read back", 0.05),
    ):
        own = {places[b.radius] + shift: getattr(b, key) for b in rows if getattr(b, key)}
        middle, spans = _spans(own.values())
        line = "-" if one else "none"
        axes.errorbar(list(own), middle, yerr=spans, ls=line, color=color, marker=mark, capsize=3, label=told)
    levels = sorted({(places[b.radius], b.unrelated) for b in rows if b.unrelated})
    for k, (place, level) in enumerate(levels):
        told = "" if k else "unrelated images of the same data"
        axes.plot((place - 0.5, place + 0.5), [level] * 2, color=INK, lw=1.4, ls=":", label=told)
    names = [ball(radius, norm).removeprefix("L2 ").removeprefix("ε = ") for radius in places]
    unit = "largest change of a pixel value allowed" if norm == "linf" else "L2 distance allowed, pixels in [0, 1]"
    axes.set_xticks(list(places.values()), names)
    axes.set(yscale="log", xlim=(-0.4, len(places) - 0.6), xlabel=f"budget ε: {unit}", ylabel="embedding error, median")
    axes.grid(axis="y")
    return figure


def _spans(estimates: Iterable[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    """Return medians, and how far their intervals reach below and above them; 0 is drawn at the floor."""
    ends = [[e.value, e.value if e.low is None else e.low, e.value if e.high is None else e.high] for e in estimates]
    middle, low, high = np.maximum(np.reshape(ends, (-1, 3)), _FLOOR).T
    return middle, np.maximum([middle - low, high - middle], 0)


def _nearness(checkpoint: Checkpoint) -> Figure | None:
    """Draw PSNR and SSIM of each match to its source, a mark for each budget."""
    known: dict[str, list[Row]] = {}
    for run in checkpoint.matches:
        if rows := [row for row in run.good if None not in (row["psnr_db"], row["ssim"])]:
            known.setdefault(ball(run.settings["radius"], run.settings["norm"]), []).extend(rows)
    if not known:
        return None
    figure, axes = panel()
    for (label, rows), color, mark in zip(known.items(), LINES, "os^Dv*", strict=False):
        points = column(rows, "psnr_db"), column(rows, "ssim")
        axes.scatter(*points, s=34, marker=mark, color=color, alpha=0.85, label=label, zorder=3, clip_on=False)
    axes.set(xlabel="PSNR to the source [dB]", ylabel="SSIM to the source")
    axes.set_ylim(top=1)
    axes.grid()
    return figure


def _survival(numbers: CheckpointNumbers) -> Figure | None:
    """Draw the distance from the target after each transform, of the match and of the target itself."""
    rows = numbers.survival_lines
    if not rows:
        return None
    figure, axes = panel(height=1.6 + 0.4 * len(rows))
    own = {k - 0.12: error for k, (_, error, _) in enumerate(rows)}
    control = {k + 0.12: other for k, (_, _, other) in enumerate(rows) if other}
    for lines, color, mark, label in (
        (own, ORANGE, "s", "the match, changed"), (control, BLUE, "o", "control: the target, changed"),
    ):  # fmt: skip
        middle, spans = _spans(lines.values())
        axes.errorbar(middle, list(lines), xerr=spans, ls="none", color=color, marker=mark, capsize=3, label=label)
    if numbers.match and numbers.match.unrelated:
        axes.axvline(numbers.match.unrelated.median, color=INK, lw=1.4, ls=":", label="unrelated images")
    axes.set(xscale="log", xlabel="distance from the target, median")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.grid(axis="x")
    return figure


def _detector(numbers: CheckpointNumbers) -> Figure | None:
    """Draw the ROC curves of the detector, for stored matches and for those made through the noise."""
    found = numbers.detector
    if found is None or not found.static.auc:
        return None
    figure, axes = panel()
    for one, color, line, told in (
        (found.static, BLUE, "-", "stored matches"), (found.adaptive, ORANGE, "--", "matches made for the detector"),
    ):  # fmt: skip
        axes.step(*zip(*one.curve, strict=True), where="post", color=color, ls=line, lw=2.2, label=told)
    axes.plot((0, 1), (0, 1), color=INK, lw=1.2, ls=":", label="by chance")
    axes.set(xlabel="share of photos flagged by mistake", ylabel="share of matches flagged")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    axes.grid()
    return figure


def _smoothing(found: SmoothingNumbers) -> Figure:
    """Draw the certified and the attained cosine against the radius."""
    figure, axes = panel()
    for values, color, look, told in (
        (found.certified, BLUE, "o-", "certified: no change gets below"),
        (found.attained, ORANGE, "s--", "attained by an attack"),
    ):
        axes.plot(found.radii, [one.value if one else math.nan for one in values], look, color=color, label=told)
    axes.set(xlabel="L2 length of the change, pixels in [0, 1]", ylabel="cosine with the photo, median")
    axes.set_ylim(top=1.02)
    axes.grid()
    return figure


def _spectrum(checkpoint: Checkpoint) -> Figure | None:
    rows = all_rows(checkpoint.of("spectrum"))
    return figures.spectra(rows) if rows else None


def _constants(checkpoint: Checkpoint) -> Figure | None:
    rows = all_rows(checkpoint.of("lipschitz"))
    return figures.constants(rows) if any(row["value"] or row["jvp"] for row in rows) else None


def _proportion(checkpoint: Checkpoint, numbers: CheckpointNumbers) -> Figure | None:
    """Draw lengths in pixel space on one axis: reach of the linear model, matches, and ends of walks."""
    lengths = {
        f"linear: {figures.label_of(kind, 28)}": (KINDS.get(kind, INK), [row["linearity_radius"] for row in rows])
        for kind, rows in by_kind(all_rows(checkpoint.of("lipschitz"))).items()
    }
    if not any(any(values) for _, values in lengths.values()):
        return None
    lengths["matches"] = INK, [row["l2"] for row in checkpoint.main.good] if checkpoint.main else []
    lengths["ends of walks"] = INK, [walk["l2"] for walk in numbers.walk.walks] if numbers.walk else []
    bands: list[Band] = [
        (name, color, known, ()) for name, (color, values) in lengths.items() if (known := [v for v in values if v])
    ]
    if len(bands) < 2:
        return None
    return figures.strips(bands, "L2 distance from the image, pixels in [0, 1]")[0]


def _walks(checkpoint: Checkpoint) -> Figure | None:
    paths: dict[str, list[Row]] = {}
    for run in checkpoint.of("walk"):
        for row in run.good:
            paths.setdefault(f"{row['image_id']} ({row['heading']})", []).append(row)
    paths = {name: rows for name, rows in paths.items() if len(rows) > 1}
    if not any(row["drift"] for rows in paths.values() for row in rows):
        return None
    return figures.walks(paths, max(run.settings["rtol"] for run in checkpoint.of("walk")))
