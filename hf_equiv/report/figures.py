"""Figures of a report: small enough to be read on a phone, in colours that are told apart without hue.

Nothing here touches matplotlib's global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hf_equiv.analyses.figures import INK, KINDS, QUIET, RULE, STYLE, png_of
from hf_equiv.report.statistics import ecdf

Row = Mapping[str, Any]


BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#9a4f96"  # Okabe & Ito 2008, the last one darkened


FIGURE_STYLE = STYLE | {"font.size": 10, "legend.fontsize": 9, "legend.frameon": False}


FIGURE_SIZE = (6.2, 3.9)


_FLOOR = 1e-8  # an error of exactly 0 is drawn here


def errors_figure(curves: Mapping[str, Sequence[float | None]], rtol: float) -> bytes | None:
    """Draw the distribution of each kind of error: the share of pairs that are at most as far.

    Args:
        curves: values by name; the first two are the match's own, the others are controls.
        rtol: that the matches were asked to reach.

    Returns:
        PNG bytes; None without a value.
    """
    drawn = {name: ecdf(values) for name, values in curves.items() if any(v is not None for v in values)}
    if not drawn:
        return None
    looks = ((BLUE, "-", 2.2), (ORANGE, "-", 2.2), (GREEN, "--", 1.5), (PURPLE, "-.", 1.5), (INK, ":", 1.8))
    with rc_context(FIGURE_STYLE):
        figure, axes = panel((6.2, 4.3), bottom=0.33)
        for (name, (x, y)), (color, line, width) in zip(drawn.items(), looks, strict=False):
            x = np.maximum(x, _FLOOR)
            axes.step([x[0], *x], [0, *y], where="post", color=color, ls=line, lw=width, label=name)
        axes.axvline(rtol, color=QUIET, lw=0.9)
        axes.text(rtol, 1.03, f"rtol {rtol:g}", color=QUIET, fontsize=9, ha="center", transform=_above(axes))
        axes.set_xscale("log")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("relative embedding distance (1 = length of the embedding)")
        axes.set_ylabel("share of pairs")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
        axes.grid(color=RULE, lw=0.6)
        axes.legend(loc="upper left", bbox_to_anchor=(-0.06, -0.22), ncols=2, columnspacing=1.2)
        return png_of(figure)


def budget_figure(budgets: Sequence[Row], norm: str) -> bytes | None:
    """Draw error against the radius of the ball, float image and PNG, with intervals; the run without a ball last.

    Args:
        budgets: of `checkpoint_numbers`.
        norm: of the ball; others are left out.

    Returns:
        PNG bytes; None for fewer than two radii.
    """
    rows = [b for b in budgets if b["embedding_error_8bit"] and (b["radius"] is None or b["norm"] == norm)]
    if len({b["radius"] for b in rows}) < 2:
        return None
    scale = 255 if norm == "linf" else 1
    rows = sorted(rows, key=lambda b: (b["radius"] is None, b["radius"] or 0.0))
    places = {r: float(k) for k, r in enumerate(dict.fromkeys(b["radius"] for b in rows))}
    one = len({(b["data_id"], b["data_revision"]) for b in rows}) == 1  # no curve through runs of different photos
    with rc_context(FIGURE_STYLE):
        figure, axes = panel(FIGURE_SIZE, bottom=0.16)
        for key, color, mark, told, shift in (
            ("embedding_error", BLUE, "o", "float image", -0.05),
            ("embedding_error_8bit", ORANGE, "s", "8-bit PNG, read back", 0.05),
        ):
            own = [b for b in rows if b[key]]
            x = [places[b["radius"]] + shift for b in own]
            _bars(axes, x, [b[key] for b in own], color, mark, told, line=one)
        apart = sorted({(places[b["radius"]], b["unrelated"]) for b in rows if b["unrelated"]})
        if len({level for _, level in apart}) == 1:
            axes.axhline(apart[0][1], color=INK, lw=1.4, ls=":", label="unrelated images")
        else:
            told = "unrelated images of the same data"
            for place, level in apart:
                axes.plot((place - 0.4, place + 0.4), (level, level), color=INK, lw=1.4, ls=":", label=told)
                told = ""
        axes.set_yscale("log")
        axes.set_xticks(list(places.values()), [_ball(r, scale) for r in places])
        axes.set_xlim(-0.4, len(places) - 0.6)
        unit = "largest change of a pixel value allowed" if norm == "linf" else "L2 distance allowed, pixels in [0, 1]"
        axes.set_xlabel(f"budget ε: {unit}")
        axes.set_ylabel("embedding error, median")
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.legend(loc="best")
        return png_of(figure)


def _ball(radius: float | None, scale: int) -> str:
    if radius is None:
        return "no ball"
    return f"{radius * scale:.3g}/255" if scale != 1 else f"{radius:.3g}"


def nearness_figure(runs: Sequence[tuple[str, Sequence[Row]]]) -> bytes | None:
    """Draw PSNR and SSIM of each match to its source, a mark for each budget.

    Args:
        runs: (name of the budget, its rows).

    Returns:
        PNG bytes; None where no match has both.
    """
    kept = [(name, [r for r in rows if r["psnr_db"] is not None and r["ssim"] is not None]) for name, rows in runs]
    kept = [(name, rows) for name, rows in kept if rows]
    if not kept:
        return None
    looks = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (INK, "v"), (QUIET, "P"))
    with rc_context(FIGURE_STYLE):
        figure, axes = panel(FIGURE_SIZE, bottom=0.17)
        for (name, rows), (color, mark) in zip(kept, looks, strict=False):
            axes.scatter(
                [r["psnr_db"] for r in rows], [r["ssim"] for r in rows], s=34, marker=mark, facecolor=color,
                edgecolor="white", linewidth=0.6, alpha=0.85, label=name, zorder=3,
            )  # fmt: skip
        axes.set_xlabel("PSNR to the source [dB]")
        axes.set_ylabel("SSIM to the source")
        axes.grid(color=RULE, lw=0.6)
        axes.set_ylim(top=1.02)
        axes.legend(loc="lower right")
        return png_of(figure)


def survival_figure(rows: Sequence[tuple[str, Row, Row | None]], unrelated: float | None) -> bytes | None:
    """Draw what each transform leaves of the matches, and of the targets themselves.

    Args:
        rows: (name, estimate of the match, estimate of the target or None), first above.
        unrelated: median distance of unrelated images.

    Returns:
        PNG bytes; None without rows.
    """
    if not rows:
        return None
    with rc_context(FIGURE_STYLE):
        height = 1.2 + 0.4 * len(rows)
        figure, axes = panel((6.2, height), left=0.33, bottom=0.62 / height, top=1 - 0.45 / height)
        y = np.arange(len(rows))[::-1]
        _bars(axes, [k + 0.12 for k in y], [row[1] for row in rows], ORANGE, "s", "the match, changed", flat=True)
        control = [(k, row[2]) for k, row in zip(y, rows, strict=True) if row[2]]
        if control:
            places = [k - 0.12 for k, _ in control]
            _bars(axes, places, [e for _, e in control], BLUE, "o", "control: the target, changed", flat=True)
        if unrelated:
            axes.axvline(unrelated, color=INK, lw=1.4, ls=":", label="unrelated images")
        axes.set_xscale("log")
        axes.set_yticks(y, [row[0] for row in rows])
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("distance from the target's embedding, median")
        axes.grid(axis="x", color=RULE, lw=0.6)
        figure.legend(loc="upper left", ncols=3, bbox_to_anchor=(0.0, 1.0), columnspacing=1.0, handletextpad=0.4)
        return png_of(figure)


def panel(
    size: tuple[float, float], *, left: float = 0.15, right: float = 0.96, bottom: float = 0.17, top: float = 0.92
) -> tuple[Figure, Axes]:
    """A figure of this size in inches with one pair of axes, whose edges are given in parts of it."""
    figure = Figure(figsize=size, dpi=140, facecolor="white")
    return figure, figure.add_axes((left, bottom, right - left, top - bottom))


def _bars(
    axes: Axes, places: Sequence[float], estimates: Sequence[Row], color: str, mark: str, told: str, *,
    line: bool = False, flat: bool = False,
) -> None:  # fmt: skip
    """Medians with their intervals, upright or flat; a median of exactly 0 stands at the floor."""
    middle = np.maximum([e["value"] for e in estimates], _FLOOR)
    low = np.maximum([e["value"] if e["low"] is None else e["low"] for e in estimates], _FLOOR)
    high = np.maximum([e["value"] if e["high"] is None else e["high"] for e in estimates], _FLOOR)
    spans = np.stack([np.maximum(middle - low, 0), np.maximum(high - middle, 0)])
    look: dict[str, Any] = {"color": color, "marker": mark, "ms": 5.5, "capsize": 3, "label": told, "elinewidth": 1.3}
    look["ls"] = "-" if line else "none"
    if flat:
        axes.errorbar(middle, places, xerr=spans, **look)
    else:
        axes.errorbar(places, middle, yerr=spans, **look)


def _above(axes: Axes) -> Any:
    return axes.get_xaxis_transform()


# Figures of a report on geometry: singular values, constants, lengths, walks; drawn as those of `reportfigures`.


def spectrum_figure(rows: Sequence[Row]) -> bytes | None:
    """Draw the singular values of every image, and the range of the rank threshold.

    Args:
        rows: spectrum rows.

    Returns:
        PNG bytes; None without rows.
    """
    if not rows:
        return None
    with rc_context(FIGURE_STYLE):
        figure, axes = panel(FIGURE_SIZE, bottom=0.17)
        alpha = max(0.15, min(0.9, 6 / len(rows)))
        low = np.inf
        for k, row in enumerate(rows):
            sigma = np.array([np.nan if not v or v <= 0 else v for v in row["singular_values"]])
            low = min(low, float(np.nanmin(sigma)))
            many = f"{len(rows)} image{'s' if len(rows) > 1 else ''}"
            axes.plot(np.arange(1, len(sigma) + 1), sigma, color=BLUE, lw=1.3, alpha=alpha, label="" if k else many)
        marks = [row["rank_threshold"] for row in rows]
        axes.axhspan(min(marks), max(marks), color=ORANGE, alpha=0.25, lw=0)
        axes.axhline(max(marks), color=ORANGE, lw=1.2, ls="--", label="rank threshold: float noise below")
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(low, min(marks)) / 3)
        axes.set_xlabel("index i")
        axes.set_ylabel("singular value σᵢ")
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.legend(loc="best")
        return png_of(figure)


def constants_figure(kinds: Mapping[str, Sequence[Row]]) -> bytes | None:
    """Draw the local constants of each kind of direction; hollow where only ‖Jv‖ is known.

    Args:
        kinds: lipschitz rows by kind.

    Returns:
        PNG bytes; None without a number.
    """
    order = [k for k in KINDS if k in kinds] + sorted(set(kinds) - set(KINDS))
    if not any(row["value"] or row["jvp"] for rows in kinds.values() for row in rows):
        return None
    generator = np.random.default_rng(0)
    with rc_context(FIGURE_STYLE):
        height = 1.1 + 0.5 * len(order)
        figure, axes = panel((6.2, height), left=0.15, bottom=0.62 / height, top=1 - 0.15 / height, right=0.83)
        for y, kind in enumerate(order[::-1]):
            rows, color = kinds[kind], KINDS.get(kind, INK)
            known = np.array([row["value"] for row in rows if row["value"]])
            other = np.array([row["jvp"] for row in rows if not row["value"] and row["jvp"] and row["jvp"] > 0])
            for values, face in ((known, color), (other, "none")):
                jitter = y + 0.5 * (generator.random(len(values)) - 0.5) * min(1, len(values) / 8)
                axes.scatter(values, jitter, s=18, facecolor=face, edgecolor=color, linewidth=0.8, alpha=0.7)
            if len(known):
                axes.plot([np.median(known)] * 2, (y - 0.33, y + 0.33), color=INK, lw=1.8)
            told = f"{len(known)} of {len(rows)}"
            axes.text(1.02, y, told, transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=QUIET)
        axes.set_xscale("log")
        axes.set_ylim(-0.6, len(order) - 0.4)
        axes.set_yticks(range(len(order)), order[::-1])
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.set_xlabel("local constant (embedding length per pixel length)")
        axes.grid(axis="x", color=RULE, lw=0.6)
        return png_of(figure)


def proportion_figure(bands: Sequence[tuple[str, str, Sequence[float]]]) -> bytes | None:
    """Draw lengths in pixel space on one axis: how far the linear model holds, and how far the matches lie.

    Args:
        bands: (name, kind of direction or "", values); first above.

    Returns:
        PNG bytes; None for fewer than two bands.
    """
    bands = [band for band in bands if band[2]]
    if len(bands) < 2:
        return None
    generator = np.random.default_rng(0)
    with rc_context(FIGURE_STYLE):
        height = 1.1 + 0.42 * len(bands)
        figure, axes = panel((6.2, height), left=0.33, bottom=0.62 / height, top=1 - 0.12 / height)
        for y, (_, kind, values) in zip(range(len(bands))[::-1], bands, strict=True):
            color = KINDS.get(kind, INK)
            jitter = y + 0.4 * (generator.random(len(values)) - 0.5) * min(1, len(values) / 8)
            axes.scatter(values, jitter, s=18, color=color, alpha=0.6, linewidth=0)
            axes.plot([np.median(values)] * 2, (y - 0.33, y + 0.33), color=color, lw=2)
        axes.set_xscale("log")
        axes.set_ylim(-0.6, len(bands) - 0.4)
        axes.set_yticks(range(len(bands))[::-1], [name for name, _, _ in bands])
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.set_xlabel("L2 distance from the image, pixels in [0, 1]")
        axes.grid(axis="x", color=RULE, lw=0.6)
        return png_of(figure)


def walks_figure(paths: Mapping[str, Sequence[Row]], rtol: float) -> bytes | None:
    """Draw distance reached and drift of walks over the length of the path.

    Args:
        paths: rows of each walk, by name.
        rtol: largest drift that was asked for.

    Returns:
        PNG bytes; None without a step.
    """
    paths = {name: rows for name, rows in paths.items() if len(rows) > 1}
    if not any(row["drift"] for rows in paths.values() for row in rows):
        return None
    lines = (BLUE, ORANGE, GREEN, PURPLE, INK, QUIET)
    with rc_context(FIGURE_STYLE):
        figure, axes = panel((6.2, 4.4), bottom=0.56, top=0.93)
        below = figure.add_axes((0.15, 0.13, 0.81, 0.37), sharex=axes)
        for k, (name, rows) in enumerate(paths.items()):
            color, length = lines[k % len(lines)], [row["arc_length"] for row in rows]
            axes.plot(length, [row["l2"] for row in rows], color=color, lw=1.5)
            drift = [row["drift"] or np.nan for row in rows]
            below.plot(length, drift, color=color, lw=1.2, label=name if k < len(lines) else "")
        axes.set_ylabel("L2 from origin")
        axes.set_ylim(bottom=0)
        axes.tick_params(labelbottom=False)
        below.set_yscale("log")
        below.set_ylabel("drift")
        below.set_xlabel("length of the path (L2, pixels in [0, 1])")
        below.axhline(rtol, color=INK, lw=0.9, ls="--", label=f"rtol {rtol:g}")
        seen = [d for rows in paths.values() for row in rows if (d := row["drift"])]
        below.set_ylim(10 ** np.floor(np.log10(min(seen) / 1.5)), 10 ** np.ceil(np.log10(max([*seen, rtol]) * 1.5)))
        for one in (axes, below):
            one.grid(color=RULE, lw=0.6)
        below.legend(loc="lower right", ncols=2, fontsize=8)
        return png_of(figure)
