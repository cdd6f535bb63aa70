"""Figures from rows. Nothing here touches matplotlib's global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from hf_equiv.imagefile import decode_png
from hf_equiv.metrics import short

MAX_PAIRS = 8
"""Pairs shown in `figures/pairs.png`."""

GAINS = (1, 2, 5, 10, 20, 50, 100)
_INK, _QUIET, _RULE = "#1b1f24", "#667079", "#d7dce1"


def pairs_figure(rows: Sequence[Mapping[str, Any]], title: str, settings: Mapping[str, Any]) -> bytes | None:
    """Draw source, match, their difference and target of up to eight rows, with the numbers, as PNG bytes.

    The difference is match − source, multiplied by a factor that is printed (the largest of 1, 2, 5, 10, … that keeps
    99 % of its values below 0.4), on middle grey.

    Args:
        rows: with the three images as PNG bytes.
        title: sentence above the figure.
        settings: of the run: model and budget go into the subtitle.

    Returns:
        None when there is no row to draw.
    """
    rows = [row for row in rows if row["match"] is not None][:MAX_PAIRS]
    if not rows:
        return None
    side, gap, words, left, top = 2.35, 0.16, 0.78, 0.22, 1.18
    width = 2 * left + 4 * side + 3 * gap
    height = top + len(rows) * (side + words) + 0.1
    with rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
        canvas = FigureCanvasAgg(figure)

        def write(x: float, y: float, text: str, size: float = 8.5, color: str = _INK, weight: str = "normal") -> None:
            figure.text(x / width, 1 - y / height, text, size=size, color=color, weight=weight, va="top")

        write(left, 0.14, f"Matches of {_cut(str(settings['model_id']), 60)}", 13, weight="bold")
        write(left, 0.45, _wrap(title, 148), 8.2, _INK)
        write(left, 0.82, _budget(settings), 7.6, _QUIET)
        for k, row in enumerate(rows):
            y = top + k * (side + words)
            images = [decode_png(row[name]).permute(1, 2, 0).numpy() for name in ("source", "match", "target")]
            gap_image, gain = difference(images[0], images[1])
            panels = (images[0], images[1], gap_image, images[2])
            heads = ("source", "match", f"(match − source) × {gain}", "target")
            for c, (panel, head, lines) in enumerate(zip(panels, heads, _captions(row), strict=True)):
                x = left + c * (side + gap)
                axes = figure.add_axes((x / width, 1 - (y + side) / height, side / width, side / height))
                axes.imshow(panel, interpolation="nearest" if panel.shape[0] < 128 else "antialiased")
                axes.set_xticks([])
                axes.set_yticks([])
                for spine in axes.spines.values():
                    spine.set(color=_RULE, linewidth=0.8)
                write(x, y + side + 0.06, head, 8.5, weight="bold")
                for n, line in enumerate(lines):
                    write(x, y + side + 0.25 + 0.155 * n, line, 7.8, _INK if c == 1 and n == 0 else _QUIET)
        buffer = io.BytesIO()
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def difference(source: np.ndarray, match: np.ndarray) -> tuple[np.ndarray, int]:
    """The difference match − source on middle grey, and the factor by which it is enlarged."""
    gap = match - source
    reach = float(np.quantile(np.abs(gap), 0.99)) or 1 / 255
    gain = max((g for g in GAINS if g * reach <= 0.4), default=1)
    return np.clip(0.5 + gain * gap, 0.0, 1.0), gain


def difference_png(source: bytes, match: bytes) -> tuple[bytes, int]:
    """The same of two PNG files, as a PNG file."""
    a, b = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.float64) / 255 for png in (source, match))
    shown, factor = difference(a, b)
    buffer = io.BytesIO()
    Image.fromarray((shown * 255).round().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue(), factor


def thumbnail(png: bytes, size: int = 112) -> bytes:
    """A small picture of a PNG file, as a JPEG file: to choose by, not to measure."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    kind = Image.Resampling.NEAREST if image.width < size else Image.Resampling.LANCZOS
    buffer = io.BytesIO()
    image.resize((size, size), kind).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _captions(row: Mapping[str, Any]) -> tuple[list[str], list[str], list[str], list[str]]:
    error, png = short(row["embedding_error"]), short(row["embedding_error_8bit"])
    size = "identical to the source" if row["psnr_db"] is None else f"PSNR {row['psnr_db']:.1f} dB"
    if row["ssim"] is not None:
        size += f"   SSIM {row['ssim']:.3f}"
    reach = f"max {_form(row['linf'], '.3f', 255)}/255   L2 {_form(row['l2'], '.2f')}"
    match = f"seen as {_label(row['match_label'], 22)} {_form(row['match_prob'], '.0%')}"
    return (
        [_cut(row["source_id"], 34), f"seen as {_label(row['source_label'])}" if row["source_label"] else ""],
        [f"error {error}   as PNG {png}", match if row["match_label"] else ""],
        [size, reach],
        [
            _cut(row["target_id"], 34),
            f"seen as {_label(row['target_label'])}" if row["target_label"] else "",
        ],
    )


def _label(name: str | None, size: int = 26) -> str:
    return _cut((name or "").split(",")[0], size)


def _form(value: float | None, form: str, scale: float = 1.0) -> str:
    if value is None:
        return "–"
    return format(round(value * scale), "d") if scale != 1.0 else format(value, form)


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "…"


def _wrap(text: str, size: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, size)[:2])


def _budget(settings: Mapping[str, Any]) -> str:
    radius = settings["radius"]
    ball = "pixel box only" if radius is None else f"{settings['norm']} ≤ {radius * 255:.3g}/255"
    if radius is not None and settings["norm"] == "l2":
        ball = f"L2 ≤ {radius:.3g}"
    return f"readout {settings['readout']} · {ball} · error is ‖f(x) − z‖ / ‖z‖, of the float image and of the PNG"
