"""Show, draw and save the results of matches, for notebooks and scripts."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from PIL import Image

from hf_equiv.analyses.figures import INK, LINES, MAX_PAIRS, OWN_STYLE, RULE, Tile, difference_png, sheet
from hf_equiv.data.image_file import encode_png
from hf_equiv.formatting import finite, first_name, short
from hf_equiv.results import MatchResult


def show(match: MatchResult) -> None:
    """Display the picture of a result below the cell of a notebook, in a viewer, or without a screen as a file."""
    data = picture(match)
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    if "ipykernel" in sys.modules:
        import_module("IPython.display").display(image)
    elif sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & {*os.environ}:
        image.show()
    else:
        path = Path(tempfile.mkdtemp()) / "picture.png"
        path.write_bytes(data)
        sys.stdout.write(f"{path}\n")


def save(match: MatchResult, folder: Path) -> Path:
    """Write images, numbers and picture of a result, and return the folder."""
    data = picture(match)
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    floats = [None] * len(match.status) if match.float_errors is None else [*map(finite, match.float_errors)]
    for k in range(len(match.status)):
        number = f"-{k + 1}" if len(match.status) > 1 else ""
        for kind, png in _images(match, k).items():
            (folder / f"{kind}{number}.png").write_bytes(png)
        levels = match.images[k].double() * 255
        exact = bool((levels - levels.round()).abs().max() < 1e-3)
        entry = {
            "file": f"match{number}.png",
            "status": str(match.status[k]),
            "embedding_error": floats[k] if exact else finite(match.errors[k]),  # of the float image, as in rows
            "embedding_error_8bit": finite(match.errors[k]) if exact else None,
            "psnr_db": None if match.psnr_db is None else finite(match.psnr_db[k]),
            "num_evals": finite(match.num_evals[k]),
            "seconds": finite(match.seconds[k]),
        }
        if match.labels is not None:
            entry |= dict(zip(("source_label", "match_label", "target_label"), match.labels[k], strict=True))
        entries.append(entry)
    (folder / "match.json").write_text(json.dumps(entries, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "picture.png").write_bytes(data)
    return folder


def _images(match: MatchResult, k: int) -> dict[str, bytes]:
    """Return match, source and target of one image as PNG files, as far as the result knows them."""
    known = {"match": match.images, "source": match.source, "target": match.target}
    return {kind: encode_png(images[k % len(images)]) for kind, images in known.items() if images is not None}


@style.context(OWN_STYLE)
def picture(match: MatchResult) -> bytes:
    """Draw the first images beside source, difference and target, as far as the result knows them, as a PNG file."""
    if match.images.ndim != 4:
        raise ValueError(
            f"the result must hold images (B, C, H, W) to be drawn or saved; got {tuple(match.images.shape)}. Use "
            "`result.images`, `result.errors` and `result.plot()`."
        )
    lines = []
    for k in range(min(len(match.status), MAX_PAIRS)):
        found, distances = _images(match, k), match.psnr_db
        seen = [f"seen as {first_name(name, 26)}" for name in match.labels[k]] if match.labels else [""] * 3
        error = [seen[1], f"error {short(finite(match.errors[k]))}", str(match.status[k])]
        line: list[Tile] = [(found["match"], "match", [told for told in error if told])]
        if distances is not None:  # the source is known
            gap, gain = difference_png(found["source"], found["match"])
            line.insert(0, (found["source"], "source", [seen[0]]))
            line.append((gap, f"(match − source) × {gain}", [f"PSNR {float(distances[k]):.1f} dB"]))
        if "target" in found:
            line.append((found["target"], "target", [seen[2]]))
        lines.append(line)
    note = "error is ‖f(x) − z‖ / ‖z‖, with z the embedding of the target"
    return sheet("Images that look like a source and embed as a target", note, lines, side=2.35)


def plot(match: MatchResult, axes: Any = None) -> Axes:
    """Draw the best embedding error so far of each image over its evaluations, on a logarithmic axis."""
    with style.context(OWN_STYLE):
        if axes is None:
            axes = import_module("matplotlib.pyplot").subplots(figsize=(6.5, 3.6), layout="constrained")[1]
        for k, trace in enumerate(match.traces):
            counts, errors = zip(*trace, strict=True) if trace else ((), ())
            axes.plot(counts, errors, color=LINES[k % len(LINES)], lw=1.4, marker="o", ms=2.4)
        axes.set(yscale="log", xlabel="evaluations", ylabel="embedding error ‖f(x) − z‖ / ‖z‖")
        axes.xaxis.label.set_color(INK)
        axes.grid(axis="y", color=RULE)
    return axes
