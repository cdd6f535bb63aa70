"""Figures of walks: contact sheet, drift over the path, and an animation."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from hf_equiv.geometryplots import INK, LINES, QUIET, RULE, STYLE, Rows, cut, cut_name, panel, picture, png_of, write
from hf_equiv.imagefile import decode_png
from hf_equiv.metrics import short

MAX_WALKS = 6
"""Walks drawn one by one."""

_FRAMES = 8  # of a contact sheet
_GIF_FRAMES, _GIF_SIDE, _GIF_MS = 60, 224, 90


def walk_figures(
    rows: Rows, frames: Mapping[str, Sequence[bytes]], ends: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, bytes]:
    """Draw all figures of a walk run.

    Args:
        rows: its rows.
        frames: PNG frames of the first walks, by image id.
        ends: the image that each leads to, (3, H, W); empty where they lead to none.
        settings: of the run.

    Returns:
        PNG and GIF bytes by file name; empty when there is no walk.
    """
    rows = [row for row in rows if row["status"] != "error"]
    paths = {name: [row for row in rows if row["image_id"] == name] for name in frames}
    paths = {name: path for name, path in paths.items() if path}
    if not paths:
        return {}
    sheet = contact_sheet(paths, frames, ends, settings)
    drift = drift_figure(paths, settings)
    return {"walk.gif": animation(frames[next(iter(paths))]), "frames.png": sheet, "drift.png": drift}


def contact_sheet(
    paths: Mapping[str, Rows],
    frames: Mapping[str, Sequence[bytes]],
    ends: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> bytes:
    """Show frames of each walk, evenly spread, with distance and label, and what it leads to."""
    columns = min(_FRAMES, max(len(path) for path in paths.values()))
    side, gap, words, left, top = 1.3, 0.08, 0.56, 0.2, 0.88
    across = columns * (side + gap) + (side + 2 * gap if ends else 0)
    width, height = max(2 * left + across, 6.5), top + len(paths) * (side + words)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
        title = f"Walks of images with one embedding, {cut(str(settings['model_id']), 44)}"
        write(figure, left, 0.12, title, 12, weight="bold")
        drift = short(max(row["drift"] for path in paths.values() for row in path))
        whose = "of the first" if settings["solver"] is None else "of the target"
        told = f"heading {settings['heading']} · every frame has the embedding {whose}, to ‖f(x) − z‖/‖z‖ ≤ {drift}"
        rounded = [d for path in paths.values() for row in path if (d := row["drift_8bit"]) is not None]
        told += f" ({short(max(rounded))} rounded to 8 bit)" if rounded else ""
        told += f" · L2 from the {'start' if settings['solver'] is None else 'source'}"
        write(figure, left, 0.44, told, 8, QUIET)
        for r, (name, path) in enumerate(paths.items()):
            for c, k in enumerate(np.unique(np.linspace(0, len(path) - 1, columns).round().astype(int)).tolist()):
                x, y = left + c * (side + gap), top + r * (side + words)
                picture(figure, x, y, side, decode_png(frames[name][k]).numpy())
                row = path[k]
                start = cut_name(name, 17) if settings["solver"] is None else f"match of {cut_name(name, 8)}"
                head = start if c == 0 else f"step {row['step']}   L2 {row['l2']:.2g}"
                write(figure, x, y + side + 0.05, head, 7.5, INK, "bold" if c == 0 else "normal")
                if row["label"] is not None:
                    seen = f"{cut(row['label'].split(',')[0], 14)} {row['prob']:.0%}"
                    write(figure, x, y + side + 0.21, seen, 7.2, QUIET)
            if name in ends:
                x, y = left + columns * (side + gap) + gap, top + r * (side + words)
                picture(figure, x, y, side, ends[name].cpu().float().numpy(), INK)
                whose = "source" if settings["heading"] == "nearest" else "target"
                write(figure, x, y + side + 0.05, f"the {whose}", 7.5, INK, "bold")
                write(figure, x, y + side + 0.21, f"still {path[-1]['remaining']:.2g} away", 7.2, QUIET)
        return png_of(figure)


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
            drift = np.array([row["drift"] for row in path])
            axes.plot(length, np.where(drift > 0, drift, np.nan), color=color, lw=1.2, label=cut_name(name, 16))
            rounded = np.array([np.nan if row["drift_8bit"] is None else row["drift_8bit"] for row in path])
            axes.plot(length, np.where(rounded > 0, rounded, np.nan), color=color, lw=1, ls=":")
            below.plot(length, [row["l2"] for row in path], color=color, lw=1.2)
        axes.axhline(settings["rtol"], color=INK, lw=0.9, ls="--", label=f"rtol {settings['rtol']:g}")
        axes.set_yscale("log")
        axes.set_ylabel("drift")
        axes.tick_params(labelbottom=False)
        below.set_ylabel("L2 from origin")
        below.set_xlabel("arc length of the path (L2, pixels in [0, 1])")
        below.set_ylim(0, 1.05 * max(row["l2"] for path in paths.values() for row in path) or 1.0)
        for one in (axes, below):
            one.grid(color=RULE, lw=0.5)
            one.margins(x=0.01)
        axes.legend(loc="best", frameon=False, fontsize=8, ncols=len(paths) + 1)
        return png_of(figure)


def animation(frames: Sequence[bytes]) -> bytes:
    """One walk there and back as an animated GIF, small images enlarged by a whole factor."""
    places = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _GIF_FRAMES)).round().astype(int)).tolist()
    pictures = []
    for k in places:
        image = Image.open(io.BytesIO(frames[k])).convert("RGB")
        factor = max(1, _GIF_SIDE // max(image.size))
        pictures.append(image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST))
    ring = [*pictures, *pictures[-2:0:-1]]
    pause = [600, *[_GIF_MS] * (len(pictures) - 2), 600, *[_GIF_MS] * (len(ring) - len(pictures))][: len(ring)]
    buffer = io.BytesIO()
    ring[0].save(buffer, "GIF", save_all=True, append_images=ring[1:], duration=pause, loop=0)
    return buffer.getvalue()
