"""Render a report: numbers as words, and Jinja2 templates as HTML, Markdown or plain text.

Everything that a template prints is escaped for its format; `Markup` from macros and filters is not escaped again.
"""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

from hf_equiv.formatting import ALIKE_DB, UNSEEN_DB, ball, many, printable, short, text_templates
from hf_equiv.report.numbers import MATCHED
from hf_equiv.report.statistics import LEVEL, RESAMPLES, SMALL, Estimate, Share


def number(estimate: Estimate | None, form: Callable[[float], str] = short, unit: str = "") -> str:
    """Write a median with interval and n: `1.2e-5 (96.9 % CI 9.1e-6 to 1.6e-5, n = 6)`."""
    return "–" if estimate is None else f"{form(estimate.value)}{unit} ({interval(estimate, form)})"


def interval(estimate: Estimate | None, form: Callable[[float], str] = short) -> str:
    """Write the interval and n alone, or the range of few values; for a share, Wilson's interval in percent."""
    if estimate is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"n = {estimate.n}, no interval"
    if isinstance(estimate, Share):
        return f"95 % CI {100 * estimate.low:.0f} % to {100 * estimate.high:.0f} %"
    low, high = form(estimate.low), form(estimate.high)
    if estimate.coverage < LEVEL:  # of 2 to 5 values, the least and the largest
        return f"{'equal values' if low == high else f'range {low} to {high}'}, n = {estimate.n}"
    return f"{100 * estimate.coverage:.3g} % CI {low} to {high}, n = {estimate.n}"


def brief(estimate: Estimate | None, form: Callable[[float], str] = short) -> str:
    """Write a median or a count with its interval in brackets, for wide tables whose caption names both."""
    if isinstance(estimate, Share):
        return count(estimate).replace("95 % CI ", "")
    if estimate is None or estimate.low is None or estimate.high is None:
        return "–" if estimate is None else form(estimate.value)
    return f"{form(estimate.value)} ({form(estimate.low)} to {form(estimate.high)})"


def count(share: Share | None) -> str:
    """Write a share as a count with Wilson's interval: `6 of 6 (95 % CI 61 % to 100 %)`."""
    if share is None:
        return "–"
    return f"{share.hits} of {share.n}" + ("" if share.low is None else f" ({interval(share)})")


def tally(count: int, total: int) -> str:
    """Write a count: `all 3`, `both`, `2 of 3`, `none of 3`."""
    if count == total == 2:
        return "both"
    word = {0: "none of", total: "all"}.get(count) if total > 1 else None
    return f"{word or f'{count} of'} {total}"


whole, tenth, thousandth = "{:,.0f}".format, "{:.1f}".format, "{:.3f}".format


def three(value: float) -> str:
    """Write three significant digits, in plain notation where that is short."""
    if 1e3 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return short(value) if abs(value) < 1e-3 or abs(value) >= 1e7 else f"{value:.3g}"


def to_html(page: Mapping[str, Any]) -> str:
    """Render a page as one HTML file that loads nothing from elsewhere."""
    return _environment("html").get_template("report.html.jinja").render(page).strip() + "\n"


def to_markdown(page: Mapping[str, Any], folder: str) -> str:
    """Render a page as Markdown whose pictures lie in `folder` beside it."""
    text = _environment("markdown").get_template("report.md.jinja").render(page, folder=folder)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def findings(**values: Any) -> Callable[..., str]:
    """Return a function that renders a finding by its name as plain text, empty where there is nothing to say."""
    template = _environment("text").get_template("report_findings.txt.jinja").make_module(values)
    return lambda name, *about: " ".join(str(getattr(template, name)(*about)).split())


_NUMBERS: dict[str, Callable[..., Any]] = {"whole": whole, "tenth": tenth, "thousandth": thousandth, "three": three}
_GLOBALS = {
    "ball": ball, "many": many, "zip": zip, "ALIKE_DB": ALIKE_DB, "UNSEEN_DB": UNSEEN_DB, "MATCHED": MATCHED,
    "SMALL": SMALL, "RESAMPLES": RESAMPLES,
}  # fmt: skip
_SPAN = r"[\d.e-]+(?: %)? to [\d.e-]+(?: %)?"
_WHOLE = re.compile(rf"\({_SPAN}\)|(?:\d[\d.]* % CI|range) {_SPAN}|\bn = \d+|\bε = [\d./]+|\b\d[\d.]*e-\d+\b|\b\d+ %")
_SIGNS = re.compile(r"([\\`*_<>\[\]|#~&]|:(?=//))")


@cache
def _environment(kind: str) -> Environment:
    """Return the templates of one format: `html`, `markdown` or `text`."""
    print_value = {"html": _html, "markdown": _markdown, "text": plain}[kind]
    environment = text_templates(
        autoescape=kind != "text", keep_trailing_newline=False, extensions=["jinja2.ext.do"],
        finalize=lambda value: value if isinstance(value, Markup) else print_value(value),
    )  # fmt: skip
    environment.globals |= _NUMBERS | _GLOBALS
    environment.filters |= _NUMBERS | {
        "number": number, "interval": interval, "brief": brief, "count": count, "tally": tally,
        "plain": plain, "shell": shlex.quote, "quoted": lambda text: escape(plain(text)),
        "flat": lambda text: Markup(" ".join(text.split())),
        "data": lambda png: Markup("data:image/png;base64," + base64.b64encode(png).decode("ascii")),
        "raw": Markup, "value": lambda estimate: estimate.value if estimate else None, "headings": _headings,
        "after": lambda text, start: str(text).removeprefix(start),
    }  # fmt: skip
    return environment


def plain(value: object) -> Any:
    """Return text from data on one line, without control characters; `–` for None."""
    if isinstance(value, Markup):
        return value
    return "–" if value is None else printable(value)


def _html(value: object) -> Markup:
    """Escape for HTML; an interval or a number with an exponent stays on one line."""
    return Markup(_WHOLE.sub(r'<span class="whole">\g<0></span>', str(escape(plain(value)))))


def _markdown(value: object) -> Markup:
    """Escape every sign that has a meaning in Markdown."""
    return Markup(_SIGNS.sub(r"\\\1", plain(value)))


def _headings(body: Markup) -> list[tuple[str, ...]]:
    """List (level, anchor, text) of the headings of a rendered page."""
    return [(level, name, Markup(text)) for level, name, text in re.findall(r'<h([23]) id="([^"]+)">(.*?)</h', body)]
