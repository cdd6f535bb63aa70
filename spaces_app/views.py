"""Render the words and pictures for visitors by the macros of views.html.jinja, which return HTML."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_equiv.analyses.figures import difference_png, thumbnail
from hf_equiv.analyses.measures import psnr_db
from hf_equiv.data.image_file import decode_png
from hf_equiv.formatting import short


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


def _share(ratio: float) -> str:
    return f"{100 * ratio:,.0f} %" if ratio >= 10 else f"{100 * ratio:.3g} %"


def _first_name(label: Any) -> str:
    return str(label).split(",")[0]


def _data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


_environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
_environment.filters |= {
    "alike": alike, "first_name": _first_name, "percent": percent, "pixels": decode_png, "share": _share,
    "short": short, "thumbnail": thumbnail, "uri": _data_uri,
}  # fmt: skip
_environment.globals |= {"difference": difference_png, "psnr": psnr_db}
html: Any = _environment.get_template("views.html.jinja").module
making: Any = _environment.get_template("make.html.jinja").module
