"""Matches in words and pictures for visitors; the HTML is in views.html.jinja."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_equiv.analyses.figures import difference_png, thumbnail
from hf_equiv.analyses.measures import psnr_db
from hf_equiv.data.image_file import decode_png

Row = Mapping[str, Any]

_EYE = 28.0  # dB of PSNR above which most viewers see no difference at a glance; below 20 dB everybody does
_NUMBERS = (
    ("embedding error", "embedding_error_8bit", "{:.1e}", "‖f(x)−z‖/‖z‖ of the PNG; 0 for the target itself"),
    ("PSNR to source", "psnr_db", "{:.1f} dB", "of the PNG; a change above 35 dB is hardly visible"),
    ("float noise", "noise_floor", "{:.1e}", "error of float32 arithmetic in this embedding"),
    ("half a grey level", "target_quantization_error", "{:.1e}", "of noise on the target moves it this far"),
    ("evaluations", "num_evals", "{:.0f}", "forward and backward passes of the float match"),
)


def alike(error: float) -> str:
    """Say how alike two embeddings are, from ‖f(x)−z‖/‖z‖: 100 % less the error, rounded down."""
    share = max(0.0, 100.0 * (1.0 - error))
    digits = max(0, -math.floor(math.log10(100.0 * error))) if error > 0 else 6
    return f"{math.floor(share * 10**digits) / 10**digits:.{digits}f} %"


def percent(probability: float, digits: int = 0) -> str:
    """Say a probability in percent, `0 %` and `100 %` only where it is exactly 0 or 1."""
    least, share = 10.0**-digits, 100 * probability
    if share < 100 and round(share, digits) >= 100:
        return f"over {100 - least:.{digits}f} %"
    if share > 0 and round(share, digits) == 0:
        return f"under {least:.{digits}f} %"
    return f"{share:.{digits}f} %"


def first_name(label: Any) -> str:
    """Return the first of the names of a class."""
    return str(label).split(",")[0]


def photo_name(row: Row, who: str) -> str:
    """Return the class of the source or target, else the name of its file."""
    name = row[f"{who}_id"].rpartition("/")[2]
    return first_name(row[f"{who}_class"] or name.rpartition(".")[0] or name)


def headline(row: Row) -> str:
    """State the result of a match in one or two sentences; `row` holds the pictures and the measures."""
    error = row["embedding_error_8bit"]
    if error is None:
        return "This image could not be measured."
    if error <= 1e-3:
        apart = psnr_db(decode_png(row["match"]), decode_png(row["target"]))
        eye = "Your eye can." if apart is not None and apart < _EYE else "Neither can you, at a glance."
        return f"The model cannot tell the match from the target: to it they are {alike(error)} the same. {eye}"
    if error <= 0.1:
        return f"To the model the match is nearly the target: {alike(error)} the same. It could still tell them apart."
    return f"This did not work: to the model the match is only {alike(error)} the target."


def look(row: Row) -> str:
    """Say how much the match differs from its source."""
    psnr = row["psnr_db"]
    if psnr is None:
        return "The picture is the source itself, pixel for pixel."
    degrees = ((35, "hardly visible"), (_EYE, "visible on a close look"), (20, "visible"))
    seen = next((words for least, words in degrees if psnr >= least), "strong")
    far = round(255 * row["linf"])
    return f"The change to the source is {seen}: at most {far} of 255 grey levels, PSNR {psnr:.1f} dB."


def heads(row: Row) -> str:
    """Say how the classifier names the three images; empty without a classifier."""
    if row["match_label"] is None:
        return ""
    source, match, target = (f"“{first_name(row[f'{who}_label'])}”" for who in ("source", "match", "target"))
    if match != target:
        return f"The classifier takes the match for {match}, the source for {source} and the target for {target}."
    if source != match:
        return f"The classifier takes the source for {source}, and the match for {match}, like the target."
    return f"The classifier takes all three for {match}."


def match_view(row: Row, *, link: str = "") -> str:
    """Show a finished match with its classes and numbers; `row` holds the pictures as PNG files and the measures."""
    change, factor = difference_png(row["source"], row["match"])
    numbers = [
        (name, "–" if row[key] is None else form.format(row[key]), note)
        for name, key, form, note in _NUMBERS
        if key in row  # a stopped match has no number of evaluations
    ]
    return html.match(row, change, factor, headline(row), look(row), heads(row), numbers, link)


def _data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


_environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
_environment.filters |= {
    "uri": _data_uri, "thumbnail": thumbnail, "percent": percent, "first_name": first_name, "photo": photo_name,
}  # fmt: skip
html: Any = _environment.get_template("views.html.jinja").module
"""The macros of the template, which return HTML."""
