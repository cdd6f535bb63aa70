"""Small charts as SVG text: they take the colours of the page they stand in, and load nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 16, 46
_TICKS = 6


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one colour.

    Attributes:
        name: in the legend; empty for none.
        points: (x, y) in order; those that are not finite, or not positive on a log axis, are left out.
        style: a class of the page's style sheet, `one` to `four`, `quiet` or `limit`.
        line: whether points are joined.
        dots: whether each is drawn as a dot; hollow ones are `hollow`.
        hollow: whether dots are rings.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "one"
    line: bool = True
    dots: bool = False
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis.

    Attributes:
        label: what it shows, with its unit.
        log: whether it is logarithmic.
        low: least value; None for that of the points.
        high: largest value; None for that of the points.
        names: labels in place of numbers, at 0, 1, 2, …
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    names: Sequence[str] = ()


def chart(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    mark: tuple[float, float] | None = None,
    width: int = WIDTH,
) -> str:
    """Draw points and lines over two axes.

    Args:
        title: what it shows; read out by screen readers.
        series: what to draw, the first lowest.
        x: the axis below.
        y: the axis on the left.
        mark: a point (x, y) to stand out.
        width: of the drawing, in units of its text; a narrow one is for narrow places.

    Returns:
        An `<svg>` element without any reference to elsewhere. Its classes: `axis`, `grid`, `tick`, `mark` and the
        styles of the series.

    Example:
        >>> from hf_equiv.svgcharts import Axis, Series, chart
        >>> drawn = chart("Error", [Series("", [(0, 1.0), (10, 1e-3)])], Axis("evaluations"), Axis("error", log=True))
        >>> drawn.startswith("<svg"), "Error" in drawn
        (True, True)
    """
    shown = [(s, [p for p in s.points if _fits(p[0], x) and _fits(p[1], y)]) for s in series]
    points = [p for _, inside in shown for p in inside] + ([mark] if mark else [])
    across = _Scale(x, [p[0] for p in points], _LEFT, width - _RIGHT)
    up = _Scale(y, [p[1] for p in points], HEIGHT - _BOTTOM, _TOP)
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}" '
        'xmlns="http://www.w3.org/2000/svg">',
        *(_across_tick(across.at(v), text) for v, text in across.ticks()),
        *(_up_tick(up.at(v), text, width) for v, text in up.ticks()),
        f'<text class="axis" x="{(width + _LEFT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x.label)}</text>",
        f'<text class="axis" x="14" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 14 {middle:.0f})">'
        f"{escape(y.label)}</text>",
    ]
    for s, inside in shown:
        places = [(across.at(a), up.at(b)) for a, b in inside]
        if s.line and len(places) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(f'<polyline class="line {s.style}" points="{path}"/>')
        if s.dots:
            kind = "ring" if s.hollow else "dot"
            parts += [f'<circle class="{kind} {s.style}" cx="{a:.1f}" cy="{b:.1f}" r="3.2"/>' for a, b in places]
    if mark is not None and _fits(mark[0], x) and _fits(mark[1], y):
        parts.append(f'<circle class="mark" cx="{across.at(mark[0]):.1f}" cy="{up.at(mark[1]):.1f}" r="6"/>')
    legend = "".join(_legend(s) for s in series if s.name)
    return "".join([*parts, "</svg>", f'<div class="legend">{legend}</div>' if legend else ""])


class _Scale:
    """Values of an axis to places between two ends."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis, self.start, self.end = axis, start, end
        seen = [*values, *(v for v in (axis.low, axis.high) if v is not None)] or [1.0]
        low = min(seen) if axis.low is None else axis.low
        high = max(seen) if axis.high is None else axis.high
        if axis.names:
            low, high = -0.5, len(axis.names) - 0.5
        self.low, self.high = (math.log10(low), math.log10(high)) if axis.log else (low, high)
        if not self.high > self.low:
            self.low, self.high = self.low - 0.5, self.high + 0.5
        if not axis.names:
            room = 0.04 * (self.high - self.low)
            self.low -= room if axis.low is None else 0.0
            self.high += room if axis.high is None else 0.0

    def at(self, value: float) -> float:
        value = math.log10(value) if self.axis.log else value
        share = min(1.02, max(-0.02, (value - self.low) / (self.high - self.low)))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        if self.axis.names:
            return [(float(i), name) for i, name in enumerate(self.axis.names)]
        if self.axis.log and self.high - self.low > 1.2:
            every = max(1, math.ceil((self.high - self.low) / _TICKS))
            powers = range(math.ceil(self.low), math.floor(self.high) + 1, every)
            plain = all(-2 <= k <= 3 for k in powers)
            return [(10.0**k, f"{10.0**k:g}" if plain else _power(k)) for k in powers]
        low, high = (10**self.low, 10**self.high) if self.axis.log else (self.low, self.high)
        step = _round_step((high - low) / (_TICKS - 1))
        first = math.ceil(low / step - 1e-9)
        return [(k * step, f"{k * step:.6g}") for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _fits(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and not (axis.log and value <= 0)


def _round_step(step: float) -> float:
    """The next larger of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(k * power for k in (1, 2, 5, 10) if k * power >= step * (1 - 1e-9))


def _power(k: int) -> str:
    digits = str(k).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "1" if k == 0 else f"10{digits}"


def _across_tick(place: float, text: str) -> str:
    bottom = HEIGHT - _BOTTOM
    return (
        f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        f'<text class="tick" x="{place:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(text)}</text>'
    )


def _up_tick(place: float, text: str, width: int) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 7}" y="{place + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _legend(s: Series) -> str:
    kind = "ring" if s.dots and s.hollow else "dot" if s.dots and not s.line else "line"
    return f'<span class="key"><span class="swatch {kind} {s.style}"></span>{escape(s.name)}</span>'
