"""Numbers of a report in words: with interval and n, as counts, as budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hf_equiv.metrics import short

Row = Mapping[str, Any]
ON_THE_WAY = 0.1
"""A budget counts as enough if the median PNG ends within this part of that distance."""


ALIKE_DB = 30.0
"""PSNR from which a match is said to look like its source: what has changed is seen on a close look only."""


def number(estimate: Row | None, form: Callable[[float], str] = short, unit: str = "") -> str:
    """A median with interval and n: `1.2e-5 (95 % CI 9.1e-6 to 1.6e-5, n = 6)`."""
    if estimate is None:
        return "–"
    return f"{form(estimate['value'])}{unit} ({interval(estimate, form)})"


def interval(estimate: Row | None, form: Callable[[float], str] = short) -> str:
    """The interval and n alone."""
    if estimate is None:
        return "–"
    if estimate["low"] is None:
        return f"n = {estimate['n']}, no interval"
    return f"95 % CI {form(estimate['low'])} to {form(estimate['high'])}, n = {estimate['n']}"


def brief(estimate: Row | None, form: Callable[[float], str] = short) -> str:
    """A median with the interval in brackets, for wide tables whose caption says what it is."""
    if estimate is None or estimate["low"] is None:
        return "–" if estimate is None else form(estimate["value"])
    return f"{form(estimate['value'])} ({form(estimate['low'])} to {form(estimate['high'])})"


def brief_count(share: Row | None) -> str:
    """A count with the interval in brackets, likewise."""
    return count(share).replace("95 % CI ", "")


def count(share: Row | None) -> str:
    """A share as a count with Wilson's interval: `6 of 6 (95 % CI 61 % to 100 %)`."""
    if share is None:
        return "–"
    told = f"{share['hits']} of {share['n']}"
    return told if share["low"] is None else f"{told} ({span(share)})"


def span(share: Row | None) -> str:
    """Wilson's interval in percent."""
    if share is None:
        return "–"
    if share["low"] is None:
        return f"n = {share['n']}, no interval"
    return f"95 % CI {share['low']:.0%} to {share['high']:.0%}".replace("%", " %").replace("95  %", "95 %")


def tenth(value: float) -> str:
    """One decimal."""
    return f"{value:.1f}"


def three(value: float) -> str:
    """Three significant digits, in plain notation where that is short."""
    if 1e3 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return short(value) if abs(value) < 1e-3 or abs(value) >= 1e7 else f"{value:.3g}"


def decibels(psnr: float) -> str:
    """One decimal, or as many as tell it from `ALIKE_DB`."""
    return next(text for n in range(1, 18) if float(text := f"{psnr:.{n}f}") != ALIKE_DB or psnr == ALIKE_DB)


def thousandth(value: float) -> str:
    """Three decimals."""
    return f"{value:.3f}"


def ball(radius: float | None, norm: str) -> str:
    """A budget in words: `no ball`, `ε = 8/255`, `L2 ε = 2`."""
    if radius is None:
        return "no ball"
    return f"ε = {radius * 255:.3g}/255" if norm == "linf" else f"L2 ε = {radius:.3g}"


def near_budget(numbers: Row) -> Row | None:
    """The smallest ball whose median PNG match ends within a tenth of the distance of unrelated images of its data."""
    enough = [
        b for b in numbers["budgets"]
        if b["radius"] is not None and b["embedding_error_8bit"] and b["unrelated"]
        and b["embedding_error_8bit"]["value"] <= ON_THE_WAY * b["unrelated"]
    ]  # fmt: skip
    return min(enough, key=lambda b: (b["norm"] != "linf", b["radius"]), default=None)


def look_alike(numbers: Row) -> Row | None:
    """The smallest budget whose matches look like their sources (PSNR) and mostly embed nearer to their targets.

    Args:
        numbers: of a checkpoint.

    Returns:
        Where none does, the widest of those whose matches look like their sources; None if no run has such matches.
    """
    alike = [b for b in numbers["budgets"] if b["nearer"] and b["psnr_db"] and b["psnr_db"]["value"] >= ALIKE_DB]
    alike.sort(key=lambda b: (b["radius"] is None, b["norm"] != "linf", b["radius"] or 0.0))
    return next((b for b in alike if b["nearer"]["value"] > 0.5), alike[-1] if alike else None)


def most_alike(numbers: Row) -> Row | None:
    """The budget whose matches look most like their sources (median PSNR), whether or not that is much."""
    known = [b for b in numbers["budgets"] if b["nearer"] and b["psnr_db"]]
    return max(known, key=lambda b: float(b["psnr_db"]["value"]), default=None)


def linear_reach(numbers: Row) -> tuple[Row, Row, str] | None:
    """How far the first-order model holds, how far the matches lie, and along which kind of direction."""
    found, match = numbers["lipschitz"], numbers["match"]
    if not found or not match or not match["l2"]:
        return None
    for kind in ("null", "random"):
        own = found["kinds"].get(kind)
        if own and own["linearity"]:
            return own["linearity"], match["l2"], kind
    return None


def falls_short(reach: Row, far: Row) -> bool:
    """Whether the linear model ends before the matches, beyond what the intervals leave open."""
    return bool(None not in (reach["high"], far["low"]) and reach["high"] < far["low"])
