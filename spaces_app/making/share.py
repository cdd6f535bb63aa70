"""Draw the picture by which visitors share a match: three photos, what the AI model sees in them, and the numbers."""

from __future__ import annotations

import io
from functools import lru_cache

import views
from making.outcome import Made
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from hf_equiv.data.image_file import stored_image
from hf_equiv.formatting import cut

SIZE = (1200, 630)  # of link previews
_INK, _SOFT, _GROUND, _ONE, _TWO = "#16202b", "#4b5a69", "#f5f7f9", "#1f5fbf", "#b4460f"


def share_picture(made: Made) -> bytes:
    """Draw a match as a PNG file of 1200 × 630 pixels."""
    row, canvas = made.row, Image.new("RGB", SIZE, _GROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((48, 36), cut(str(views.making.headline(row)), 66), _INK, _font(30, "bold"))
    columns = (("source", "First photo"), ("match", "Lookalike"), ("target", "Second photo"))
    for left, (who, role) in zip(range(48, 1200, 378), columns, strict=False):
        canvas.paste(stored_image(row[who]).resize((348, 348), Image.Resampling.BICUBIC), (left, 98))
        draw.text((left, 458), role, _SOFT, _font(24))
        if row[f"{who}_label"] is not None:
            name = cut(row[f"{who}_label"].split(",")[0], 20)
            draw.text((left, 492), name, _ONE if who == "source" else _TWO, _font(32, "bold"))
    draw.text((48, 574), str(views.making.caption(made)), _SOFT, _font(22))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


@lru_cache
def _font(size: int, weight: str = "normal") -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont(f"DejaVu Sans:weight={weight}"), size)
