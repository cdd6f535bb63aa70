"""Figures of a report on geometry: singular values, constants, lengths, walks; drawn as those of `reportfigures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.ticker import MaxNLocator

from hf_equiv.geometryplots import INK, KINDS, QUIET, RULE, png_of
from hf_equiv.reportfigures import BLUE, FIGURE_SIZE, FIGURE_STYLE, GREEN, ORANGE, PURPLE, Row, panel


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
