"""Draw figures of rows for runs, cards and reports, without touching the global state of matplotlib."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

from hf_equiv.data.image_file import decode_png, encode_png, stored_image
from hf_equiv.formatting import ball, cut, cut_name, form, many, short
from hf_equiv.geometry.invariance import BAND_EDGES
from hf_equiv.png_file import chunks

Rows = Sequence[Mapping[str, Any]]
Band = tuple[str, str, Sequence[float], Sequence[float]]  # a band of `strips`: name, colour, filled and hollow values
Tile = tuple[bytes, str, Sequence[str]]  # a tile of a sheet: a PNG file, a bold line above it and others below

MAX_IMAGES, MAX_VECTORS, MAX_PAIRS = 6, 6, 8  # most that a figure shows
GAINS = (1, 2, 5, 10, 20, 50, 100)  # factors for differences; the largest that keeps 99 % within 0.4 of grey is used
SHEET_FRAMES, GIF_FRAMES, GIF_SIDE, GIF_MS = 8, 60, 224, 90
INK, QUIET, RULE = "#1b1f24", "#667079", "#d7dce1"
LINES = ("#0072b2", "#d55e00", "#009e73", "#9a4f96", "#a16207", "#0e7490")  # the first ones are from Okabe & Ito 2008
KINDS = {
    "top": "#b42318", "row": "#c2670c", "gradient": "#7c3aad", "toward": "#2f7d4f", "match": "#0e7490",
    "random": "#1f5fa8", "null": "#667079",
}  # fmt: skip
"""Colour of each kind of direction, in the order of the figures."""

STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": QUIET, "axes.labelcolor": INK,
    "xtick.color": QUIET, "ytick.color": QUIET, "ytick.labelcolor": INK, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": RULE,
    "grid.linewidth": 0.6, "legend.fontsize": 9, "legend.edgecolor": "none",
    "figure.constrained_layout.w_pad": 0.08, "figure.constrained_layout.h_pad": 0.08,
}  # fmt: skip
OWN_STYLE = ["default", STYLE]  # without the user's matplotlibrc, so that `verify` can draw a figure again


@style.context(OWN_STYLE)
def spectrum_figures(
    rows: Rows, images: Mapping[str, Tensor], vectors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, bytes]:
    """Draw the figures of a run from pixels and right singular vectors of the first images."""
    rows = [row for row in rows if row["status"] != "error"]
    if not rows:
        return {}
    title = f"Singular values of ∂f/∂x, {cut(str(settings['model_id']), 60)}"
    note = f"readout {settings['readout']}, {settings['dtype']} · embedding length per pixel length, pixels in [0, 1]"
    found = {"spectra.png": png_of(spectra(rows[:MAX_IMAGES], title, note))}
    mapped = [row for row in rows if row["image_id"] in images and row["invariance_map"]][:MAX_IMAGES]
    found |= {"invariance.png": invariance_figure(mapped, images, settings)} if mapped else {}
    pairs = {name: (images[name], own) for name, own in vectors.items() if name in images}
    return found | ({"vectors.png": vectors_figure(rows, pairs, settings)} if pairs else {})


@style.context(OWN_STYLE)
def invariance_figure(rows: Rows, images: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bytes:
    """Draw each photo, the energy of its row space over it, and that of its bands and channels."""
    figure = Figure(figsize=(9.6, 0.9 + 2.3 * len(rows)), dpi=110, facecolor="white", layout="constrained")
    title = f"Where the null space lies, {cut(str(settings['model_id']), 50)}"
    figure.suptitle(title, x=0.01, ha="left", size=12, weight="bold", parse_math=False)
    note = "share of a small change that lies in the row space, over the mean share: 0 lies in the null space"
    figure.supxlabel(note, x=0.01, ha="left", size=8, color=QUIET, parse_math=False)
    names = [f"< 1/{round(1 / edge)}" for edge in BAND_EDGES[1:-1]] + ["≥ 1/4"]
    for places, row in zip(figure.subplots(len(rows), 4, squeeze=False), rows, strict=True):
        photo, heat, bands, channels = places
        pixels, values = images[row["image_id"]].permute(1, 2, 0).cpu().numpy(), np.array(row["invariance_map"])
        extent = (0, pixels.shape[1], pixels.shape[0], 0)
        photo.imshow(pixels, extent=extent)
        photo.set_title(cut_name(row["image_id"], 24), loc="left", size=8, weight="bold", parse_math=False)
        heat.imshow(pixels.mean(axis=2), cmap="gray", vmin=0, vmax=1, extent=extent)
        drawn = heat.imshow(values, cmap="inferno", norm=PowerNorm(0.5, vmin=0), alpha=0.7, extent=extent)
        figure.colorbar(drawn, ax=heat, shrink=0.8).ax.tick_params(labelsize=7)
        for axes in (photo, heat):
            axes.set(xticks=[], yticks=[])
        bands.bar(names, row["band_energy"], color=LINES[0])
        bands.set_xlabel("frequency (cycles per pixel)", size=8)
        channels.bar(["R", "G", "B"], row["channel_energy"], color=["#b42318", "#2f7d4f", "#1f5fa8"])
        channels.set_xlabel("channel", size=8)
        for axes in (bands, channels):
            axes.axhline(1.0, color=INK, lw=0.9, ls="--")
            axes.tick_params(labelsize=7)
    return png_of(figure)


@style.context(OWN_STYLE)
def lipschitz_figures(rows: Rows, settings: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw the secants of the first image and the constants of all; nothing when no secant is above zero."""
    rows = [row for row in rows if row["status"] != "error" and any((s or 0) > 0 for s in row["secants"])]
    if not rows:
        return {}
    title = f"Local directional Lipschitz constants, {cut(str(settings['model_id']), 50)}"
    images = many(len({row["image_id"] for row in rows}), "image")
    note = f"{images}, pixels in [0, 1] · hollow marks are ‖Jv‖ where no constant stands above the float noise"
    return {"secants.png": png_of(secants(rows, settings)), "constants.png": png_of(constants(rows, title, note))}


@style.context(OWN_STYLE)
def walk_figures(
    rows: Rows, frames: Mapping[str, Sequence[bytes]], ends: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, bytes]:
    """Draw the figures of a run by file name, from PNG frames of the first walks and the images that they lead to."""
    paths = {name: [row for row in rows if row["image_id"] == name] for name in frames}
    if not paths:
        return {}
    title = f"Distance and drift along walks, {cut(str(settings['model_id']), 50)}"
    note = f"heading {settings['heading']} · drift ‖f(x) − z‖/‖z‖: solid of the float frames, dotted of the PNG frames"
    found = {"drift.png": png_of(walks(paths, settings["rtol"], title, note))}
    if any(None in pictures for pictures in frames.values()):  # photos are withheld
        return found
    first = animation(frames[next(iter(paths))])
    return {"walk.gif": first, "frames.png": contact_sheet(paths, frames, ends, settings), **found}


def spectra(rows: Rows, title: str = "", note: str = "") -> Figure:
    """Draw σ_i over i on a logarithmic axis, with rank threshold, error bound and named zeros of the first image."""
    first, curves = rows[0], [_positive(row["singular_values"]) for row in rows]
    bound, threshold = _positive(first["error_bound"]), first["rank_threshold"]
    floor = min(float(np.nanmin(values)) for values in (*curves, bound)) / 4
    figure, axes = panel(title, note)
    alpha = max(0.2, min(1.0, MAX_IMAGES / len(rows)))
    for k, (row, sigma) in enumerate(zip(rows, curves, strict=True)):
        name = label_of(row["image_id"], 28) if k < len(LINES) else None
        color = LINES[k % len(LINES)]
        axes.plot(np.arange(1, len(sigma) + 1), sigma, color=color, lw=1.4, alpha=alpha, label=name)
    at = f"at {label_of(first['image_id'], 28)}"
    axes.fill_between(np.arange(1, len(bound) + 1), floor, bound, color="#eceff2", lw=0, zorder=0)
    axes.plot(np.arange(1, len(bound) + 1), bound, color=QUIET, lw=0.9, ls=":", label=f"error bound {at}")
    if ranks := sorted({row["rank"] for row in rows if row["rank"] is not None}):
        span = " to ".join(dict.fromkeys((str(ranks[0]), str(ranks[-1]))))
        axes.axhline(threshold, color=INK, lw=0.9, ls="--", label=f"rank threshold {at}; rank {span}")
    place, zeros = len(curves[0]), [*first["structural_zeros"], *first["near_structural"]]
    if (first["singular_values"][-1] or 0.0) > threshold:  # with fewer values than D the zeros are off the figure
        zeros = []
    for marker, zero in zip(cycle("osD^v"), zeros, strict=False):
        predicted = form(zero["predicted"], ".2g")
        cause = label_of(zero["cause"], 60)
        label = f"{zero['count']} × {cause}: predicted {predicted}, measured {zero['measured']:.2g}"
        axes.plot([place], [max(zero["measured"], floor)], marker, mfc="none", mec=KINDS["top"], ls="", label=label)
        place -= zero["count"]
    axes.set(yscale="log", ylim=(floor, 2.5 * max(map(np.nanmax, curves))))
    axes.set(xlabel="index i", ylabel="singular value σᵢ")
    axes.grid(axis="y")
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=1 if len(zeros) > 3 else 2, borderpad=0.0)
    return figure


def secants(rows: Rows, settings: Mapping[str, Any]) -> Figure:
    """Draw the secants of one image over the radius: noise on the left, curvature on the right, the plateau between."""
    name = rows[0]["image_id"]
    rows = [row for row in rows if row["image_id"] == name]
    radii = np.array(rows[0]["radii"])
    floor = np.nanmedian([_positive(row["noise_floor"]) for row in rows], axis=0)
    every = np.array([_positive(row["secants"]) for row in rows])
    bottom = min(float(np.nanmin(every)), float(np.nanmin(floor))) / 3
    figure, axes = panel(
        f"Secants at {cut_name(name, 30)}, {cut(str(settings['model_id']), 30)}",
        "‖f(x + hv) − f(x − hv)‖ / 2h: median and range of each kind; thick on the plateau that gives the value",
    )
    axes.fill_between(radii, bottom, floor, color="#eceff2", lw=0, zorder=0)
    axes.plot(radii, floor, color=QUIET, lw=1, ls=":", zorder=1, label="below: float noise")
    for kind, own in by_kind(rows).items():
        ladder, color = np.array([_positive(row["secants"]) for row in own]), KINDS.get(kind, INK)
        middle = np.nanmedian(ladder, axis=0)
        axes.fill_between(radii, np.nanmin(ladder, axis=0), np.nanmax(ladder, axis=0), color=color, alpha=0.13, lw=0)
        plateaus = [row["plateau"] for row in own if row["plateau"]]
        label = label_of(kind, 28) + ("" if plateaus else ": no plateau")
        axes.plot(radii, middle, color=color, lw=1.1, marker="o", ms=2.4, zorder=3, label=label)
        if plateaus:
            low, high = np.median(plateaus, axis=0)
            on = (radii >= low) & (radii <= high)
            axes.plot(radii[on], middle[on], color=color, lw=4.5, alpha=0.5, solid_capstyle="round", zorder=2)
    axes.set(xscale="log", yscale="log", xlim=(radii[0], radii[-1]), ylim=(bottom, 2 * float(np.nanmax(every))))
    axes.set(xlabel="radius h (L2, pixels in [0, 1])", ylabel="secant (embedding per pixel length)")
    axes.grid()
    axes.legend(fontsize=8)
    return figure


def constants(rows: Rows, title: str = "", note: str = "") -> Figure:
    """Draw the constants of each kind of direction; hollow points are ‖Jv‖ where there is no constant."""
    bands = []
    for kind, own in by_kind(rows).items():
        values = [row["value"] for row in own if row["value"]]
        others = [row["jvp"] for row in own if not row["value"] and (row["jvp"] or 0) > 0]
        bands.append((f"{label_of(kind, 28)}\n{len(values)} of {len(own)}", KINDS.get(kind, INK), values, others))
    figure, axes = strips(bands, "local constant (embedding length per pixel length)", title, note)
    if tops := [row["jvp"] for row in rows if row["direction"] == "top" and row["index"] == 0 and row["jvp"]]:
        axes.axvline(max(tops), color=INK, lw=0.9, ls="--", zorder=0, label=f"largest σ₁ = {max(tops):.3g}")
        axes.legend(fontsize=8)
    return figure


def by_kind(rows: Rows) -> dict[str, Rows]:
    """Group lipschitz rows by kind of direction, in the order of the figures."""
    kinds = dict.fromkeys((*KINDS, *sorted({row["direction"] for row in rows})))
    found = {kind: [row for row in rows if row["direction"] == kind] for kind in kinds}
    return {kind: own for kind, own in found.items() if own}


def walks(paths: Mapping[str, Rows], rtol: float, title: str = "", note: str = "") -> Figure:
    """Draw the distance reached, and the drift of the frames and of their PNG, over the length of each path."""
    figure, (axes, below) = panel(title, note, parts=2)
    for k, (name, path) in enumerate(paths.items()):
        color, length = LINES[k % len(LINES)], [row["arc_length"] for row in path]
        axes.plot(length, [row["l2"] for row in path], color=color, lw=1.4)
        label = label_of(name, 24) if k < len(LINES) else None
        below.plot(length, _positive([row["drift"] for row in path]), color=color, lw=1.2, label=label)
        below.plot(length, _positive([row["drift_8bit"] for row in path]), color=color, lw=1, ls=":")
    below.axhline(rtol, color=INK, lw=0.9, ls="--", label=f"rtol {short(rtol)}")
    axes.set(ylabel="L2 from origin", ylim=(0, None))
    below.set(yscale="log", ylabel="drift", xlabel="length of the path (L2, pixels in [0, 1])")
    for one in (axes, below):
        one.grid()
    below.legend(ncols=2, fontsize=8)
    return figure


def panel(title: str = "", note: str = "", height: float = 4.6, parts: int = 1) -> tuple[Figure, Any]:
    """Return a figure with a title and a note below, and its axes: one, or several with a common x axis."""
    figure = Figure(figsize=(6.6, height), dpi=140, facecolor="white", layout="constrained")
    _write_heading(figure, title, note)
    return figure, figure.subplots(parts, sharex=True)


def _write_heading(figure: Figure, title: str, note: str) -> None:
    width, height = figure.get_size_inches()
    if title:
        told = textwrap.fill(title, int(9 * width))
        text = figure.suptitle(told, x=0.01, ha="left", size=12, weight="bold", parse_math=False)
        text.set_y(1 - 0.12 / height)  # where the margins are fixed; a layout moves it
    if note:
        figure.supxlabel(textwrap.fill(note, int(16 * width)), x=0.01, ha="left", size=8, color=QUIET, parse_math=False)


def strips(bands: Sequence[Band], told: str, title: str = "", note: str = "") -> tuple[Figure, Axes]:
    """Draw a line of points for each band, the first above, with median and quartiles of the filled ones."""
    generator = np.random.default_rng(0)
    figure, axes = panel(title, note, height=1.2 + 0.5 * len(bands))
    for y, (_, color, filled, hollow) in enumerate(bands[::-1]):
        for values, face in ((filled, color), (hollow, "none")):  # spread in height, so that none hides another
            spread = y + 0.5 * (generator.random(len(values)) - 0.5) * min(1.0, len(values) / 8)
            axes.scatter(values, spread, s=14, facecolor=face, edgecolor=color, linewidth=0.7, alpha=0.6, zorder=3)
        if len(filled):
            quarter, middle, upper = np.quantile(filled, (0.25, 0.5, 0.75))
            axes.fill_between((quarter, upper), y - 0.33, y + 0.33, color=color, alpha=0.14, lw=0, zorder=1)
            axes.plot((middle, middle), (y - 0.33, y + 0.33), color=color, lw=2, zorder=4)
    axes.set(xscale="log", ylim=(-0.6, len(bands) - 0.4), xlabel=told)
    axes.set_yticks(range(len(bands))[::-1], [name for name, *_ in bands])
    axes.grid(axis="x")
    return figure, axes


def sheet(title: str, note: str, lines: Sequence[Sequence[Tile]], side: float) -> bytes:
    """Draw lines of pictures, each `side` inches wide, under a title."""
    columns, below = max(map(len, lines)), max(len(tile[2]) for line in lines for tile in line)
    # Fixed margins in inches: matplotlib needs a third of a second to find its own for many pictures.
    width, gap = max(6.5, 0.2 + 1.07 * side * columns), 0.32 + 0.14 * below
    top, bottom = 0.6 + 0.2 * (len(title) // (9 * width)), 0.34 + 0.14 * (below + len(note) // (16 * width) + 1)
    height = top + len(lines) * (side + gap) - gap + bottom
    margins = {"left": 0.1 / width, "right": 1 - 0.1 / width, "bottom": bottom / height, "top": 1 - top / height}
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    _write_heading(figure, title, note)
    grid = figure.subplots(
        len(lines), columns, squeeze=False, gridspec_kw=margins | {"hspace": gap / side, "wspace": 0.05}
    )
    for places, line in zip(grid, lines, strict=True):
        for axes in places[len(line) :]:
            axes.set_axis_off()
        for axes, (png, head, told) in zip(places, line, strict=False):
            picture = stored_image(png)
            axes.imshow(picture, interpolation="nearest" if picture.height < 128 else "antialiased")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color=RULE)
            axes.set_title(head, loc="left", size=8, weight="bold", parse_math=False)
            axes.set_xlabel("\n".join(told), loc="left", size=7.5, parse_math=False)
    return png_of(figure)


def png_of(figure: Figure) -> bytes:
    """Return the figure as PNG bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names of files may hold any sign
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def same_picture(stated: bytes, made: bytes) -> bool:
    """Return whether a figure is the one drawn again: the same bytes, or a PNG file of nearly the same pixels."""
    # Other processors and compressors round differently; no pixel may differ by more than an eighth of full scale.
    if stated == made:
        return True
    try:
        if _beside_pixels(stated) != _beside_pixels(made):
            return False
        pixels = [
            np.asarray(Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGBA"), int) for data in (stated, made)
        ]
    except (OSError, SyntaxError, ValueError):
        return False
    return pixels[0].shape == pixels[1].shape and int(np.abs(pixels[0] - pixels[1]).max()) <= 32


def _beside_pixels(data: bytes) -> list[bytes]:
    """Return the chunks of a PNG file without those of pixels but the kind of the first, and all that follows IEND."""
    return list(dict.fromkeys(kind if kind == b"IDAT" else bytes(chunk) for kind, chunk in chunks(data)))


def label_of(name: str, size: int) -> str:
    """Return a name from data for a legend or axis, which read text between dollar signs as a formula."""
    return cut_name(name, size).replace("$", r"\$")


def _positive(values: Sequence[float | None]) -> np.ndarray:
    """Return numbers for a logarithmic axis: NaN if one is absent or not above 0."""
    return np.array([v if v and v > 0 else np.nan for v in values], dtype=np.float64)


def vectors_figure(rows: Rows, pictures: Mapping[str, tuple[Any, Any]], settings: Mapping[str, Any]) -> bytes:
    """Draw the first right singular vectors of each image as images: the pixel patterns that move f the most."""
    values = {row["image_id"]: row["singular_values"] for row in rows}
    count = min(MAX_VECTORS, *(len(vectors) for _, vectors in pictures.values()))
    lines = []
    for name, (image, vectors) in list(pictures.items())[:MAX_IMAGES]:
        line: list[Tile] = [(encode_png(image), cut_name(name, 18), ())]
        for i, v in enumerate(vectors[:count]):
            reach = float(v.double().abs().quantile(0.995)) or 1.0
            line.append((encode_png(0.5 + v / (2 * reach)), f"v{i + 1}   σ = {values[name][i]:.3g}", ()))
        lines.append(line)
    note = "pixel patterns that move the embedding the most; grey is 0, scaled to the 99.5 % quantile of each"
    return sheet(f"Right singular vectors, {cut(str(settings['model_id']), 44)}", note, lines, side=1.55)


@style.context(OWN_STYLE)
def pairs_figure(rows: Rows, verdict: str, settings: Mapping[str, Any]) -> bytes | None:
    """Draw source, match, their difference and target of up to eight rows, with the numbers; None for no row."""
    lines = []
    for row in [row for row in rows if row["match"] is not None][:MAX_PAIRS]:
        difference, gain = difference_png(row["source"], row["match"])
        pictures = (row["source"], row["match"], difference, row["target"])
        heads = ("source", "match", f"(match − source) × {gain}", "target")
        columns = list(zip(pictures, heads, _captions(row), strict=True))
        lines.append(columns if row["target"] is not None else columns[:3])
    heading = f"Matches of {cut(str(settings['model_id']), 60)}"
    limit = ball(settings["radius"], settings["norm"])
    note = (
        f"{verdict} Readout {settings['readout']}, {limit}; error is ‖f(x) − z‖ / ‖z‖, of the float image and the PNG."
    )
    return sheet(heading, note, lines, side=2.35) if lines else None


def difference_png(source: bytes, match: bytes) -> tuple[bytes, int]:
    """Return match − source of two PNG files on middle grey as a PNG file, and the factor by which it is enlarged."""
    gap = decode_png(match, torch.float64) - decode_png(source, torch.float64)
    reach = float(gap.abs().quantile(0.99)) or 1 / 255
    gain = max((g for g in GAINS if g * reach <= 0.4), default=1)
    return encode_png(0.5 + gain * gap), gain


def thumbnail(png: bytes, size: int = 112) -> bytes:
    """Return a small JPEG picture of a PNG file, for choosing an image and not for measuring it."""
    image = stored_image(png)
    kind = Image.Resampling.NEAREST if image.width < size else Image.Resampling.LANCZOS
    buffer = io.BytesIO()
    image.resize((size, size), kind).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _captions(row: Mapping[str, Any]) -> tuple[list[str], ...]:
    def seen(whose: str, size: int = 26) -> str:
        name = row[f"{whose}_label"]
        return f"seen as {cut(name.split(',')[0], size)}" if name else ""

    text = row.get("target_text")
    size = "identical to the source" if row["psnr_db"] is None else f"PSNR {row['psnr_db']:.1f} dB"
    size += "" if row["ssim"] is None else f"   SSIM {row['ssim']:.3f}"
    error = f"error {short(row['embedding_error'])}   as PNG {short(row['embedding_error_8bit'])}"
    levels = None if row["linf"] is None else round(255 * row["linf"])
    share = f" {form(row['match_prob'], '.0%')}" if row["match_label"] else ""
    return (
        [cut(row["source_id"], 34), seen("source")],
        [error, f"like “{cut(text, 34)}”" if text else seen("match", 22) + share],
        [size, f"max {form(levels, 'd')}/255   L2 {form(row['l2'], '.2f')}"],
        [cut(row["target_id"], 34), seen("target")],
    )


def contact_sheet(
    paths: Mapping[str, Rows], frames: Mapping[str, Sequence[bytes]], ends: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> bytes:  # fmt: skip
    """Show frames of each walk, evenly spread, with distance and label, and the image that it leads to."""
    every, matched = [row for path in paths.values() for row in path], settings["solver"] is not None
    columns, lines = min(SHEET_FRAMES, max(map(len, paths.values()))), []
    for name, path in paths.items():
        line = []
        for k in _evenly(len(path), columns):
            row = path[k]
            head = f"step {row['step']}   L2 {row['l2']:.2g}"
            if k == 0:
                head = f"match of {cut_name(name, 8)}" if matched else cut_name(name, 17)
            seen = [] if row["label"] is None else [f"{cut(row['label'].split(',')[0], 14)} {row['prob']:.0%}"]
            line.append((frames[name][k], head, seen))
        if name in ends:
            whose = "source" if settings["heading"] == "nearest" else "target"
            left = f"still {path[-1]['remaining']:.2g} away"
            line.append((encode_png(ends[name]), f"the {whose}", [left]))
        lines.append(line)
    rounded = [row["drift_8bit"] for row in every if row["drift_8bit"] is not None]
    note = (
        f"heading {settings['heading']} · every frame has the embedding of the {'target' if matched else 'first'}, to "
        f"‖f(x) − z‖/‖z‖ ≤ {short(max(row['drift'] for row in every))}"
        f"{f' ({short(max(rounded))} rounded to 8 bit)' if rounded else ''} · L2 from the "
        f"{'source' if matched else 'start'}"
    )
    title = f"Walks of images with one embedding, {cut(str(settings['model_id']), 44)}"
    return sheet(title, note, lines, side=1.3)


def animation(frames: Sequence[bytes], kind: str = "GIF") -> bytes:
    """Show one walk there and back as an animated GIF or WEBP, small images enlarged by a whole factor."""
    images = [stored_image(frames[k]) for k in _evenly(len(frames), GIF_FRAMES)]
    factor = max(1, GIF_SIDE // max(images[0].size))
    pictures = [ImageOps.scale(image, factor, Image.Resampling.NEAREST) for image in images]
    ring, buffer = [*pictures, *pictures[-2:0:-1]], io.BytesIO()
    pause = [GIF_MS] * len(ring)
    pause[0] = pause[len(pictures) - 1] = 600
    ring[0].save(buffer, kind, save_all=True, append_images=ring[1:], duration=pause, loop=0)
    return buffer.getvalue()


def _evenly(count: int, most: int) -> list[int]:
    """Return at most `most` indices below `count`, evenly spread, with both ends."""
    return list(dict.fromkeys(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))
