"""Draw the figures of runs, one function for each verb, without touching the global state of matplotlib."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from hf_equiv.data.image_file import decode_png, encode_png
from hf_equiv.formatting import cut, cut_name, form, short

Rows = Sequence[Mapping[str, Any]]

MAX_IMAGES, MAX_VECTORS, MAX_PAIRS = 6, 6, 8
"""Images, singular vectors and pairs that are drawn."""

GAINS = (1, 2, 5, 10, 20, 50, 100)
"""Factors by which a difference may be enlarged."""

SHEET_FRAMES, GIF_FRAMES, GIF_SIDE, GIF_MS = 8, 60, 224, 90
INK, QUIET, RULE = "#1b1f24", "#667079", "#d7dce1"
LINES = ("#1f5fa8", "#c2410c", "#2f7d4f", "#7c3aad", "#a16207", "#0e7490")
KINDS = {
    "top": "#b42318", "row": "#c2670c", "gradient": "#7c3aad", "toward": "#2f7d4f", "match": "#0e7490",
    "random": "#1f5fa8", "null": "#667079",
}  # fmt: skip
"""Colour of each kind of direction, in the order of the figures."""

STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": QUIET, "axes.labelcolor": INK,
    "xtick.color": QUIET, "ytick.color": QUIET, "axes.linewidth": 0.8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True,
}  # fmt: skip


def spectrum_figures(
    rows: Rows, vectors: Mapping[str, tuple[Tensor, Tensor]], settings: Mapping[str, Any]
) -> dict[str, bytes]:
    """Draw the figures of a run; `vectors` holds pixels and right singular vectors of the first images."""
    rows = [row for row in rows if row["status"] != "error"]
    found = {"spectra.png": spectra_figure(rows, settings)} if rows else {}
    return found | ({"vectors.png": vectors_figure(rows, vectors, settings)} if rows and vectors else {})


def lipschitz_figures(rows: Rows, settings: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw all figures of a lipschitz run, as PNG bytes by file name; none when no secant is above zero."""
    rows = [row for row in rows if row["status"] != "error" and any((s or 0) > 0 for s in row["secants"])]
    figures = {"secants.png": secants_figure, "constants.png": constants_figure}
    return {name: draw(rows, settings) for name, draw in figures.items()} if rows else {}


def spectra_figure(rows: Rows, settings: Mapping[str, Any]) -> bytes:
    """Draw σ_i over i on a logarithmic axis: rank threshold, error bound, and the zeros by name."""
    shown, first = rows[:MAX_IMAGES], rows[0]
    count, bound = len(first["singular_values"]), _positive(first["error_bound"])
    sigmas = [_positive(row["singular_values"]) for row in shown]
    floor = min(float(np.nanmin(values)) for values in (*sigmas, bound)) / 4
    with rc_context(STYLE):
        figure, axes = panel(
            f"Singular values of ∂f/∂x, {cut(str(settings['model_id']), 60)}",
            f"readout {settings['readout']}, {settings['dtype']} · embedding length per pixel length, pixels in [0, 1]",
        )
        for row, sigma, color in zip(shown, sigmas, LINES, strict=False):
            axes.plot(np.arange(1, len(sigma) + 1), sigma, color=color, lw=1.4, label=cut_name(row["image_id"], 28))
        places, of = np.arange(1, count + 1), "" if len(shown) == 1 else f", of {cut_name(first['image_id'], 28)}"
        axes.fill_between(places, floor, bound, color="#eceff2", lw=0, zorder=0)
        kind = "" if first["rank"] is None else " (float noise below)"
        axes.plot(places, bound, color=QUIET, lw=0.9, ls=":", label=f"error bound{kind}{of}", zorder=1)
        if first["rank"] is not None:
            ranks = sorted({row["rank"] for row in shown if row["rank"] is not None})
            span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            label = f"rank threshold{of}; rank {span}"
            axes.axhline(first["rank_threshold"], color=INK, lw=0.9, ls="--", zorder=2, label=label)
        if first["singular_values"][-1] <= first["rank_threshold"]:  # with fewer values than D they are off the figure
            _name_zeros(axes, first, count, floor)
        axes.set(yscale="log", ylim=(floor, 2.5 * max(map(np.nanmax, sigmas))))
        axes.set(xlabel="index i", ylabel="singular value σᵢ")
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        _add_legend(axes)
        return png_of(figure)


def _name_zeros(axes: Axes, row: Mapping[str, Any], count: int, floor: float) -> None:
    """Mark the zeros of one image at the right end of its spectrum, and name them in the legend."""
    for marker, zero in zip("osD^v", (*row["structural_zeros"], *row["near_structural"]), strict=False):
        many = f" × {zero['count']}" if zero["count"] > 1 else ""
        size = "no closed form" if zero["predicted"] is None else f"predicted {zero['predicted']:.1e}"
        size = "exactly 0" if zero["predicted"] == 0 else size
        label = f"{zero['cause']}{many}: {size}, measured {zero['measured']:.1e}"
        axes.plot([count], [max(zero["measured"], floor)], marker, mfc="none", mec="#b42318", ls="", label=label)
        count -= zero["count"]


def vectors_figure(rows: Rows, pictures: Mapping[str, tuple[Any, Any]], settings: Mapping[str, Any]) -> bytes:
    """Draw the first right singular vectors of each image as images: the pixel patterns that move f the most."""
    values = {row["image_id"]: row["singular_values"] for row in rows}
    count = min(MAX_VECTORS, *(len(vectors) for _, vectors in pictures.values()))
    lines = []
    for name, (image, vectors) in list(pictures.items())[:MAX_IMAGES]:
        line = [Tile(np.asarray(image), cut_name(name, 18))]
        for i in range(count):
            v = np.asarray(vectors[i], dtype=np.float64)
            reach = float(np.quantile(np.abs(v), 0.995)) or 1.0
            line.append(Tile(0.5 + v / (2 * reach), f"v{i + 1}   σ = {values[name][i]:.3g}"))
        lines.append(line)
    told = "pixel patterns that move the embedding the most; grey is 0, scaled to the 99.5 % quantile of each"
    return sheet(f"Right singular vectors, {cut(str(settings['model_id']), 44)}", [told], lines, side=1.55)


def secants_figure(rows: Rows, settings: Mapping[str, Any]) -> bytes:
    """Draw the secants of one image over the radius: noise on the left, curvature on the right, the plateau between."""
    name = rows[0]["image_id"]
    rows = [row for row in rows if row["image_id"] == name]
    radii = np.array(rows[0]["radii"])
    floor = np.nanmedian([_positive(row["noise_floor"]) for row in rows], axis=0)
    every = np.array([_positive(row["secants"]) for row in rows])
    bottom = min(float(np.nanmin(every)), float(np.nanmin(floor))) / 3
    with rc_context(STYLE):
        figure, axes = panel(
            f"Secants along directions at {cut_name(name, 40)}, {cut(str(settings['model_id']), 44)}",
            "‖f(x + hv) − f(x − hv)‖ / 2h: median and range of each kind; thick on the plateau that gives the value",
        )
        axes.fill_between(radii, bottom, floor, color="#eceff2", lw=0, zorder=0)
        axes.plot(radii, floor, color=QUIET, lw=1, ls=":", zorder=1, label="below: float noise")
        for kind in _present(rows):
            ladder, color = every[[row["direction"] == kind for row in rows]], KINDS.get(kind, INK)
            middle = np.nanmedian(ladder, axis=0)
            axes.fill_between(
                radii, np.nanmin(ladder, axis=0), np.nanmax(ladder, axis=0), color=color, alpha=0.13, lw=0
            )
            plateaus = [row["plateau"] for row in rows if row["direction"] == kind and row["plateau"]]
            label = kind if plateaus else f"{kind}: no plateau"
            axes.plot(radii, middle, color=color, lw=1.1, marker="o", ms=2.4, zorder=3, label=label)
            if plateaus:
                on = (radii >= median(p[0] for p in plateaus)) & (radii <= median(p[1] for p in plateaus))
                axes.plot(radii[on], middle[on], color=color, lw=4.5, alpha=0.5, solid_capstyle="round", zorder=2)
        axes.set(xscale="log", yscale="log", xlim=(radii[0], radii[-1]), ylim=(bottom, 2 * float(np.nanmax(every))))
        axes.set(xlabel="radius h (L2, pixels in [0, 1])", ylabel="secant (embedding per pixel length)")
        axes.grid(color=RULE, lw=0.5)
        _add_legend(axes)
        return png_of(figure)


def constants_figure(rows: Rows, settings: Mapping[str, Any]) -> bytes:
    """Draw the constants of each kind of direction as points with a box; hollow points are ‖Jv‖ without a value."""
    images, generator = len({row["image_id"] for row in rows}), np.random.default_rng(0)
    with rc_context(STYLE):
        figure, axes = panel(
            f"Local directional Lipschitz constants, {cut(str(settings['model_id']), 50)}",
            f"{images} image{'s' if images > 1 else ''}; filled: read from secants; hollow: no value (undetermined), "
            "the ‖Jv‖ of autograd is shown",
        )
        names = []
        for y, kind in enumerate(_present(rows)[::-1]):
            own, color = [row for row in rows if row["direction"] == kind], KINDS.get(kind, INK)
            values = np.array([row["value"] for row in own if row["value"] is not None])
            others = _positive([row["jvp"] for row in own if row["value"] is None])
            names.append(f"{kind}\n{len(values)} of {len(own)}")
            for some, face in ((values, color), (others, "none")):
                spread = y + 0.28 * (generator.random(len(some)) - 0.5) * min(1.0, len(some) / 8)
                axes.scatter(some, spread, s=13, facecolor=face, edgecolor=color, linewidth=0.7, alpha=0.55, zorder=3)
            if len(values) >= 4:
                quarter, middle, upper = np.quantile(values, (0.25, 0.5, 0.75))
                axes.fill_between((quarter, upper), y - 0.3, y + 0.3, color=color, alpha=0.14, lw=0, zorder=1)
                axes.plot((middle, middle), (y - 0.3, y + 0.3), color=color, lw=2, zorder=4)
        tops = [row["jvp"] for row in rows if row["direction"] == "top" and row["index"] == 0]
        if tops:
            axes.axvline(max(tops), color=INK, lw=0.9, ls="--", zorder=0, label=f"largest σ₁ = {max(tops):.3g}")
        axes.set(xscale="log", ylim=(-0.6, len(names) - 0.3), yticks=range(len(names)), yticklabels=names)
        axes.set_xlabel("constant (embedding length per pixel length, pixels in [0, 1])")
        axes.grid(axis="x", color=RULE, lw=0.5)
        _add_legend(axes)
        return png_of(figure)


def _present(rows: Rows) -> list[str]:
    there = {row["direction"] for row in rows}
    return [*(kind for kind in KINDS if kind in there), *sorted(there - set(KINDS))]


def panel(title: str, told: str) -> tuple[Figure, Axes]:
    """Return a figure with a title, a line of explanation and one set of axes."""
    figure = Figure(figsize=(8.6, 4.9), dpi=120, facecolor="white")
    figure.text(0.02, 0.97, title, size=12, weight="bold", va="top")
    figure.text(0.02, 0.91, told, size=8, color=QUIET, va="top")
    return figure, figure.add_axes((0.1, 0.115, 0.87, 0.725))


@dataclass(frozen=True)
class Tile:
    """A picture (3, H, W) of a sheet, with a bold line and others below it."""

    pixels: np.ndarray
    head: str
    below: Sequence[str] = ()
    edge: str = RULE


def sheet(title: str, told: Sequence[str], lines: Sequence[Sequence[Tile]], side: float) -> bytes:
    """Draw lines of pictures, each `side` inches wide, under a title and sentences."""
    columns, small = max(map(len, lines)), 7 + 0.5 * side
    below = 0.35 + 0.155 * max(len(tile.below) for line in lines for tile in line)
    wide = columns * 1.07 * side
    width = max(6.5, 0.4 + wide)
    told = [part for sentence in told for part in textwrap.wrap(sentence, int(14 * width))]
    top = 0.6 + 0.16 * len(told)
    height = top + len(lines) * (side + below)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
        figure.text(0.2 / width, 1 - 0.12 / height, title, size=12, weight="bold", va="top")
        figure.text(0.2 / width, 1 - 0.44 / height, "\n".join(told), size=8, color=QUIET, va="top")
        grid = figure.subplots(len(lines), columns, squeeze=False)
        figure.subplots_adjust(0.2 / width, below / height, (0.2 + wide) / width, 1 - top / height, 0.07, below / side)
        for places, line in zip(grid, lines, strict=True):
            for axes in places[len(line) :]:
                axes.set_axis_off()
            for axes, tile in zip(places, line, strict=False):
                smooth = "nearest" if tile.pixels.shape[1] < 128 else "antialiased"
                axes.imshow(np.clip(tile.pixels, 0, 1).transpose(1, 2, 0), interpolation=smooth)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set(visible=True, color=tile.edge, linewidth=0.8)
                for text, down, size, weight in (
                    (tile.head, 0.05, small, "bold"), ("\n".join(tile.below), 0.22, small - 0.5, "normal")
                ):  # fmt: skip
                    axes.text(0, -down / side, text, size=size, weight=weight, va="top", transform=axes.transAxes)
        return png_of(figure)


def _add_legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", frameon=False, fontsize=8)


def png_of(figure: Figure) -> bytes:
    """Return the figure as PNG bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _positive(values: Sequence[float | None]) -> np.ndarray:
    """Return numbers for a logarithmic axis: NaN for those that are absent or not above 0."""
    numbers = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    return np.where(numbers > 0, numbers, np.nan)


def pairs_figure(rows: Rows, title: str, settings: Mapping[str, Any]) -> bytes | None:
    """Draw source, match, their difference and target of up to eight rows, with the numbers; None for no row."""
    lines = []
    for row in [row for row in rows if row["match"] is not None][:MAX_PAIRS]:
        source, match, target = (decode_png(row[name]).numpy() for name in ("source", "match", "target"))
        shown, gain = difference(source, match)
        heads = ("source", "match", f"(match − source) × {gain}", "target")
        tiles = zip((source, match, shown, target), heads, _captions(row), strict=True)
        lines.append([Tile(pixels, head, below) for pixels, head, below in tiles])
    heading = f"Matches of {cut(str(settings['model_id']), 60)}"
    return sheet(heading, [title, _budget(settings)], lines, side=2.35) if lines else None


def difference(source: np.ndarray, match: np.ndarray) -> tuple[np.ndarray, int]:
    """Return match − source on middle grey, and its gain: the largest of `GAINS` that keeps 99 % below 0.4."""
    gap = match - source
    reach = float(np.quantile(np.abs(gap), 0.99)) or 1 / 255
    gain = max((g for g in GAINS if g * reach <= 0.4), default=1)
    return np.clip(0.5 + gain * gap, 0.0, 1.0), gain


def difference_png(source: bytes, match: bytes) -> tuple[bytes, int]:
    """Return the difference of two PNG files as a PNG file, and the factor by which it is enlarged."""
    shown, factor = difference(*(decode_png(png, torch.float64).numpy() for png in (source, match)))
    return encode_png(torch.from_numpy(shown)), factor


def thumbnail(png: bytes, size: int = 112) -> bytes:
    """Return a small picture of a PNG file as a JPEG file: to choose by, not to measure."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    kind = Image.Resampling.NEAREST if image.width < size else Image.Resampling.LANCZOS
    buffer = io.BytesIO()
    image.resize((size, size), kind).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _captions(row: Mapping[str, Any]) -> tuple[list[str], ...]:
    def seen(whose: str, size: int = 26) -> str:
        name = row[f"{whose}_label"]
        return f"seen as {cut(name.split(',')[0], size)}" if name else ""

    size = "identical to the source" if row["psnr_db"] is None else f"PSNR {row['psnr_db']:.1f} dB"
    size += "" if row["ssim"] is None else f"   SSIM {row['ssim']:.3f}"
    error = f"error {short(row['embedding_error'])}   as PNG {short(row['embedding_error_8bit'])}"
    levels = None if row["linf"] is None else round(255 * row["linf"])
    share = f" {form(row['match_prob'], '.0%')}" if row["match_label"] else ""
    return (
        [cut(row["source_id"], 34), seen("source")],
        [error, seen("match", 22) + share],
        [size, f"max {form(levels, 'd')}/255   L2 {form(row['l2'], '.2f')}"],
        [cut(row["target_id"], 34), seen("target")],
    )


def _budget(settings: Mapping[str, Any]) -> str:
    radius, ball = settings["radius"], "pixel box only"
    if radius is not None:
        ball = f"L2 ≤ {radius:.3g}" if settings["norm"] == "l2" else f"linf ≤ {radius * 255:.3g}/255"
    return f"readout {settings['readout']} · {ball} · error is ‖f(x) − z‖ / ‖z‖, of the float image and of the PNG"


def walk_figures(
    rows: Rows, frames: Mapping[str, Sequence[bytes]], ends: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, bytes]:
    """Draw the figures of a run by file name, from PNG frames of the first walks and the images that they lead to."""
    paths = {name: [row for row in rows if row["image_id"] == name] for name in frames}
    if not paths:
        return {}
    return {
        "walk.gif": animation(frames[next(iter(paths))]),
        "frames.png": contact_sheet(paths, frames, ends, settings),
        "drift.png": drift_figure(paths, settings),
    }


def contact_sheet(
    paths: Mapping[str, Rows], frames: Mapping[str, Sequence[bytes]], ends: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> bytes:  # fmt: skip
    """Show frames of each walk, evenly spread, with distance and label, and the image that it leads to."""
    every, matched = [row for path in paths.values() for row in path], settings["solver"] is not None
    columns = min(SHEET_FRAMES, max(map(len, paths.values())))
    lines = []
    for name, path in paths.items():
        line = []
        for k in np.unique(np.linspace(0, len(path) - 1, columns).round().astype(int)).tolist():
            row = path[k]
            head = f"step {row['step']}   L2 {row['l2']:.2g}"
            if k == 0:
                head = f"match of {cut_name(name, 8)}" if matched else cut_name(name, 17)
            seen = [] if row["label"] is None else [f"{cut(row['label'].split(',')[0], 14)} {row['prob']:.0%}"]
            line.append(Tile(decode_png(frames[name][k]).numpy(), head, seen))
        if name in ends:
            whose = "source" if settings["heading"] == "nearest" else "target"
            left = f"still {path[-1]['remaining']:.2g} away"
            line.append(Tile(ends[name].cpu().float().numpy(), f"the {whose}", [left], INK))
        lines.append(line)
    rounded = [row["drift_8bit"] for row in every if row["drift_8bit"] is not None]
    told = (
        f"heading {settings['heading']} · every frame has the embedding of the {'target' if matched else 'first'}, to "
        f"‖f(x) − z‖/‖z‖ ≤ {short(max(row['drift'] for row in every))}"
        f"{f' ({short(max(rounded))} rounded to 8 bit)' if rounded else ''} · L2 from the "
        f"{'source' if matched else 'start'}"
    )
    title = f"Walks of images with one embedding, {cut(str(settings['model_id']), 44)}"
    return sheet(title, [told], lines, side=1.3)


def drift_figure(paths: Mapping[str, Rows], settings: Mapping[str, Any]) -> bytes:
    """Draw drift of the frames and of their PNG, and the distance reached, over the length of the path."""
    with rc_context(STYLE):
        figure, axes = panel(
            f"Drift and distance along walks, {cut(str(settings['model_id']), 50)}",
            f"heading {settings['heading']} · solid: float frames, ‖f(x) − z‖/‖z‖; dotted: the same of the PNG frames",
        )
        axes.set_position((0.095, 0.42, 0.875, 0.43))
        below = figure.add_axes((0.095, 0.115, 0.875, 0.255), sharex=axes)
        for (name, path), color in zip(paths.items(), LINES, strict=False):
            length = [row["arc_length"] for row in path]
            drift, rounded = (_positive([row[key] for row in path]) for key in ("drift", "drift_8bit"))
            axes.plot(length, drift, color=color, lw=1.2, label=cut_name(name, 16))
            axes.plot(length, rounded, color=color, lw=1, ls=":")
            below.plot(length, [row["l2"] for row in path], color=color, lw=1.2)
        axes.axhline(settings["rtol"], color=INK, lw=0.9, ls="--", label=f"rtol {settings['rtol']:g}")
        axes.set(yscale="log", ylabel="drift")
        axes.tick_params(labelbottom=False)
        high = 1.05 * max(row["l2"] for path in paths.values() for row in path) or 1.0
        below.set(xlabel="arc length of the path (L2, pixels in [0, 1])", ylabel="L2 from origin", ylim=(0, high))
        for one in (axes, below):
            one.grid(color=RULE, lw=0.5)
            one.margins(x=0.01)
        _add_legend(axes)
        return png_of(figure)


def animation(frames: Sequence[bytes]) -> bytes:
    """Show one walk there and back as an animated GIF, small images enlarged by a whole factor."""
    places = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), GIF_FRAMES)).round().astype(int)).tolist()
    pictures = []
    for k in places:
        image = Image.open(io.BytesIO(frames[k])).convert("RGB")
        factor = max(1, GIF_SIDE // max(image.size))
        pictures.append(image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST))
    ring = [*pictures, *pictures[-2:0:-1]]
    pause = [600, *[GIF_MS] * (len(pictures) - 2), 600, *[GIF_MS] * (len(ring) - len(pictures))][: len(ring)]
    buffer = io.BytesIO()
    ring[0].save(buffer, "GIF", save_all=True, append_images=ring[1:], duration=pause, loop=0)
    return buffer.getvalue()
