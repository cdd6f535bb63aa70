"""Draw small charts as SVG in the colours of the page.

gradio's plots were tried: LinePlot has no logarithmic axis and gives every chart the same name for screen readers; Plot
sends a matplotlib figure as a bitmap that stays white on a dark page and takes 0.2 to 0.5 s to draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import views
from matplotlib.ticker import LogLocator, MaxNLocator

WIDTH, NARROW = 640, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 16, 254  # the right margin, and the coordinates of the other sides


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y) in one style; a chart leaves out points that its axes do not hold, and series without others."""

    points: Sequence[tuple[float, float | None]]
    name: str = ""  # name in the legend
    style: str = "one"  # class of the style sheet: `one` to `four`, `quiet` or `limit`
    draw: str = "line"  # or `dots`, `rings`, `line dots`


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis; without given ends it spans the points, and its numbers may have names."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    names: Sequence[str] = ()  # names of the values 0, 1, 2, …

    def holds(self, value: float | None) -> bool:
        """Return whether the axis can show a value."""
        return value is not None and math.isfinite(value) and not (self.log and value <= 0)


def chart(
    title: str, series: Sequence[Series], x: Axis, y: Axis, *, mark: tuple[float, float] | None = None, note: str = "",
    width: int = WIDTH,
) -> str:  # fmt: skip
    """Draw series over two axes, with a note below; screen readers read `title`, and `mark` is a highlighted point."""
    shown = [(s, [(a, b) for a, b in s.points if x.holds(a) and y.holds(b)]) for s in series]
    points = [point for _, own in shown for point in own] + ([mark] if mark else [])
    across = _Scale(x, [a for a, _ in points], _LEFT, width - _RIGHT)
    up = _Scale(y, [b for _, b in points], _BOTTOM, _TOP)
    placed = [(s, [(across.at(a), up.at(b)) for a, b in own]) for s, own in shown if own]
    return views.html.chart(title, across, up, placed, mark, note)


class _Scale:
    """Maps the values of an axis to places between two ends of the drawing."""

    def __init__(self, axis: Axis, values: Sequence[float], start: int, end: int) -> None:
        self.axis, self.start, self.end = axis, start, end
        seen = [*values, *(v for v in (axis.low, axis.high) if v is not None)] or [1.0]
        ends = [min(seen) if axis.low is None else axis.low, max(seen) if axis.high is None else axis.high]
        self.low, self.high = map(math.log10, ends) if axis.log else ends
        if not self.high > self.low:
            self.low, self.high = self.low - 0.5, self.high + 0.5
        room = 0.04 * (self.high - self.low)
        self.low -= room if axis.low is None else 0.0
        self.high += room if axis.high is None else 0.0

    def at(self, value: float) -> float:
        value = math.log10(value) if self.axis.log else value
        share = min(1.02, max(-0.02, (value - self.low) / (self.high - self.low)))
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        if self.axis.names:
            return list(enumerate(self.axis.names))
        decades = self.axis.log and self.high - self.low > 1.2
        low, high = (10**self.low, 10**self.high) if self.axis.log else (self.low, self.high)
        locator = LogLocator(numticks=6) if decades else MaxNLocator(5, steps=[1, 2, 5, 10])
        slack = 1e-9 * (high - low)
        values = [float(v) for v in locator.tick_values(low, high) if low - slack <= v <= high + slack]
        long = decades and not all(0.005 < v < 5000 for v in values)
        return [(v, _power(v) if long else f"{v:.6g}") for v in values]


def _power(value: float) -> str:
    power = round(math.log10(value))
    return f"10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}" if power else "1"
