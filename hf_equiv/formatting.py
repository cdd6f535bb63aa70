"""Format numbers, names and errors as short text for tables, cards and the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment
    from torch import Tensor

JOINED = " + "
"""Stands between the names, revisions and readouts of several models in a record and in a command."""

# 30 dB is a root mean square change of 8 of 255 levels, 36 dB one of 4, as much as JPEG 85 makes to a photo of 224 px.
ALIKE_DB, UNSEEN_DB = 30.0, 36.0
VISIBILITY = ("visible", "visible on a close look", "invisible at a glance")
"""Words for a change of a picture: below `ALIKE_DB` of PSNR, between, and from `UNSEEN_DB` on."""


def visibility(psnr: float, most: float | None = None) -> str:
    """Say how visible a change is, by its PSNR [dB] or by an interval of it up to `most`."""
    return VISIBILITY[2 if psnr >= UNSEEN_DB else (psnr if most is None else most) >= ALIKE_DB]


def printable(value: object) -> str:
    """Return text from data on one line: control, invisible and unassigned characters become spaces.

    A terminal obeys control characters, and marks of direction reorder the text around them.
    """
    return "".join(sign if sign.isprintable() else " " for sign in str(value))


def utf8(name: str) -> str:
    """Return the name of a file as text that any file can hold; bytes that are no UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def form(value: float | None, spec: str) -> str:
    """Format a number; None becomes a dash."""
    return "–" if value is None else format(value, spec)


def cut(text: str, size: int) -> str:
    """Shorten text to `size` characters, all of them printable."""
    text = printable(text)
    return text if len(text) <= size else text[: size - 1] + "…"


def cut_name(name: str, size: int) -> str:
    """Shorten an image id to its last `size` characters, all printable: ids of one folder differ at the end."""
    name = printable(name)
    return name if len(name) <= size else "…" + name[1 - size :]


def first_name(label: str | None, size: int = 60) -> str:
    """Return the first synonym of a class name, or a dash without one."""
    return cut((label or "–").split(",")[0], size)


def some(names: Iterable[str], count: int) -> str:
    """Return the first names on one line."""
    shown = [cut(name, 60) for name in names]
    return ", ".join(shown[:count] + (["…"] if len(shown) > count else []))


def many(count: int, noun: str) -> str:
    """Return a count with its noun: `1 pair`, `12 pairs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def finite(value: Tensor | float | None) -> float | None:
    """Return a Python float, or None for NaN and infinity, which JSON does not have."""
    number = None if value is None else float(value)
    return number if number is not None and math.isfinite(number) else None


def short(value: float | None) -> str:
    """Format an error in a few characters: 1.2e-5."""
    if value is None:
        return "–"
    return f"{value:.2f}" if 0.1 <= value < 100 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def duration(seconds: float | None) -> str:
    """Format a time for people: 12 ms, 9.4 s, 38 s, 4 min 10 s, 25 min, 4 h 50 min, 3 d 2 h."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 59.5:
        return f"{1000 * seconds:.2g} ms" if 0 < seconds < 0.0995 else f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    days, left = divmod(hours, 24)
    if days > 1:
        return f"{days} d {left} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def ball(radius: float | None, norm: str | None) -> str:
    """Format a limit on the change: `no limit`, `ε = 8/255`, `L2 ε = 2`."""
    if radius is None:
        return "no limit"
    return f"ε = {radius * 255:.3g}/255" if norm == "linf" else f"L2 ε = {fraction(radius, '.3g')}"


def fraction(value: float, spec: str = "") -> str:
    """Format a radius as k/255, such as 8/255, if that is equal and shorter, or else by `spec`."""
    text = f"{value * 255:.0f}/255"
    return text if read_fraction(text) == value and len(text) < len(str(value)) else format(value, spec)


def read_fraction(text: str) -> float:
    """Read a number or a fraction such as 8/255, or raise a ValueError."""
    over, _, under = text.partition("/")
    try:
        return float(over) / float(under or 1)
    except ZeroDivisionError:
        raise ValueError(f"{text!r} is no number") from None


def text_templates(**options: Any) -> Environment:
    """Open the text templates of the package, with filters for numbers and names; a missing value is an error."""
    import jinja2  # not for `--help`

    # Values are made printable, so that data neither begins a line nor moves the cursor. Macros return `Markup`.
    usual: dict[str, Any] = {
        "autoescape": True,
        "finalize": lambda value: value if isinstance(value, Markup) else Markup(printable(value)),
        "keep_trailing_newline": True,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_equiv"), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        **usual | options,
    )  # fmt: skip
    environment.filters |= {"ball": ball, "cut": cut, "cut_name": cut_name, "duration": duration, "form": form}
    environment.filters |= {"first_name": first_name, "short": short}
    return environment


_FOLDERS = re.compile(r"(?<![\w:/.])(?:/[^\s'\"`:,;()/]+)+/(?=[^\s'\"])")


def excerpt(error: object, size: int = 160) -> str:
    """Return the message of an error on one line, cut between two words after at most `size` characters."""
    text = printable(" ".join(str(error).split()))
    return text if len(text) <= size else text[:size].rsplit(" ", 1)[0] + " …"


def one_line(error: Exception) -> str:
    """Return an error message on one line, without this machine's folder names, for the record of a run."""
    return printable(_FOLDERS.sub("…/", " ".join(str(error).split()))) or type(error).__name__
