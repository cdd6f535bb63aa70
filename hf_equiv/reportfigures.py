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
from matplotlib.ticker import FuncFormatter

from hf_equiv.geometryplots import INK, QUIET, RULE, STYLE, png_of
from hf_equiv.reportstats import ecdf

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
