"""Render the words and pictures for visitors by the macros of views.html.jinja, which return HTML."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from hf_equiv.analyses.figures import difference_png
from hf_equiv.analyses.measures import psnr_db
from hf_equiv.data.image_file import decode_png, stored_image
from hf_equiv.formatting import ALIKE_DB, UNSEEN_DB, cut, first_name, short, visibility

TITLE = "Looks like one thing, seen as another"
_HERE = Path(__file__).parent
_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|[ '-]){0,39}")
_VOWEL = re.compile(r"(?!uni|eu|one|use)[aeiou]|hour|heir|honest", re.IGNORECASE)
_PLURAL = re.compile(r".*[^siu]s", re.IGNORECASE)


def alike(error: float) -> str:
    """Write how similar two embeddings are, from ‖f(x)−z‖/‖z‖: 100 % less the error, rounded down."""
    share = max(0.0, 100.0 * (1.0 - error))
    digits = max(0, -math.floor(math.log10(100.0 * error))) if error > 0 else 6
    return f"{math.floor(share * 10**digits) / 10**digits:.{digits}f} %"


def percent(probability: float, digits: int = 0) -> str:
    """Write a probability in percent, `0 %` and `100 %` only if it is exactly 0 or 1."""
    least, share = 10.0**-digits, 100 * probability
    if share < 100 and round(share, digits) >= 100:
        return f"over {100 - least:.{digits}f} %"
    if share > 0 and round(share, digits) == 0:
        return f"under {least:.{digits}f} %"
    return f"{share:.{digits}f} %"


def with_article(label: Any) -> str:
    """Write the first synonym of a label with its article, `an espresso`; plurals have none."""
    name = first_name(label)
    return name if _PLURAL.fullmatch(name) else f"{'an' if _VOWEL.match(name) else 'a'} {name}"


def noun(row: Mapping[str, Any], who: str) -> str:
    """Return a word for the source or target of a row: its class if that is one, else the model's label, else none."""
    names = (first_name(row.get(f"{who}_{kind}") or "") for kind in ("class", "label"))
    return next((name for name in names if _WORD.fullmatch(name)), "")


def name(row: Mapping[str, Any], who: str) -> str:
    """Return the noun for the source or target of a row, or else the name of its file."""
    return noun(row, who) or cut(PurePosixPath(row[f"{who}_id"]).stem, 40)


def script(name: str) -> str:
    """Read a script or style sheet of the app."""
    return (_HERE / name).read_text(encoding="utf-8")


def _share(ratio: float) -> str:
    return f"{100 * ratio:,.0f} %" if ratio >= 10 else f"{100 * ratio:.3g} %"


def _whole(ratio: float) -> str:
    return "under 1 %" if 0 < ratio < 0.01 else f"{100 * ratio:,.0f} %"


def _unbroken(form: Callable[..., str]) -> Callable[..., str]:
    """Return a filter that keeps a number and its percent sign on one line."""
    return lambda *given: form(*given).replace(" %", "\N{NO-BREAK SPACE}%")


def _data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def frame(png: bytes) -> bytes:
    """Return a PNG file as a smaller WebP file, for looking at it in a film and not for measuring it."""
    buffer = io.BytesIO()
    stored_image(png).save(buffer, "WEBP", quality=85, method=2)
    return buffer.getvalue()


def share_picture(row: Mapping[str, Any], headline: str = "") -> bytes:
    """Draw a match with a headline as a PNG of 1200 × 630 pixels, the size of link previews."""
    error = row["embedding_error_8bit"]
    note = "made with hf_equiv" if error is None else f"{alike(error)} the same to the AI model · made with hf_equiv"
    canvas = Image.new("RGB", (1200, 630), "#f5f7f9")
    draw = ImageDraw.Draw(canvas)
    text = headline or cut(str(html.headline(row)), 40)
    draw.text((48, 68), text, "#16202b", _fitting(draw, text, 1104, (60, 44, 32, 24, 18)), anchor="lm")
    draw.text((48, 588), note, "#4b5a69", _font(22))
    for left, who, role in (
        (48, "source", "The photo"),
        (426, "match", "The lookalike"),
        (804, "target", "The other photo"),
    ):
        canvas.paste(stored_image(row[who]).resize((348, 348), Image.Resampling.BICUBIC), (left, 130))
        draw.text((left, 494), role, "#4b5a69", _font(26))
        label, verb = row[f"{who}_label"], html.sees(row.get(f"{who}_prob"))
        told = "" if label is None else f"AI {verb} {with_article(label)}"
        font = _fitting(draw, told, 348, (30, 26, 22, 18, 12))
        draw.text((left, 532), told, "#1f5fbf" if who == "source" else "#b4460f", font)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int, sizes: tuple[int, ...]) -> ImageFont.FreeTypeFont:
    """Return the bold font of the first size at which a text is at most this wide, else of the last size."""
    fonts = [_font(size, "bold") for size in sizes]
    return next((font for font in fonts if draw.textlength(text, font) <= width), fonts[-1])


@lru_cache
def _font(size: int, weight: str = "normal") -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont(f"DejaVu Sans:weight={weight}"), size)


_environment = Environment(
    loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
_environment.filters |= {
    "a": with_article, "alike": _unbroken(alike), "first_name": first_name, "frame": frame, "name": name, "noun": noun,
    "percent": _unbroken(percent), "pixels": decode_png, "share": _share, "short": short, "uri": _data_uri,
    "visibility": visibility, "whole": _unbroken(_whole),
}  # fmt: skip
_environment.globals |= {
    "difference": difference_png, "psnr": psnr_db, "page_script": Markup(script("page.js")), "title": TITLE,
    "style": Markup(script("style.css")), "ALIKE_DB": ALIKE_DB, "UNSEEN_DB": UNSEEN_DB,
}  # fmt: skip
html: Any = _environment.get_template("views.html.jinja").module
making: Any = _environment.get_template("make.html.jinja").module
