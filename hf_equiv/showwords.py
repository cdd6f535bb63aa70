"""Rows in plain words, for readers who have never heard of an embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]

_EYE = 28.0
"""PSNR [dB] above which most viewers see no difference at a glance; below 20 anyone sees one."""


def alike(error: float | None) -> str:
    """Say how alike two embeddings are, from ‖f(x)−z‖/‖z‖: `99.999 %`, with no more nines than there are.

    Returns:
        100 % less the error, rounded down.

    Example:
        >>> alike(4.2e-5), alike(0.87), alike(None)
        ('99.995 %', '13 %', 'an unknown share')
    """
    if error is None or not math.isfinite(error):
        return "an unknown share"
    share = 100.0 * (1.0 - error)
    if share <= 0:
        return "0 %"
    digits = max(0, -math.floor(math.log10(100.0 * error))) if error > 0 else 6
    if digits == 0:
        return f"{share:.0f} %"
    rounded = math.floor(share * 10**digits) / 10**digits  # never more alike than measured
    return f"{rounded:.{digits}f} %"


def levels(linf: float | None) -> str:
    """Say how far a pixel was changed at most, in grey levels of 255."""
    return "an unknown number of" if linf is None else f"at most {round(255 * linf)}"


def headline(row: Row) -> str:
    """The finding of a match in one or two sentences.

    Args:
        row: of a match, or the measures of one.

    Returns:
        Plain text.
    """
    error = row["embedding_error_8bit"]
    if error is None:
        return "This image could not be measured."
    if error <= 1e-3:
        return f"The model cannot tell the match from the target: to it they are {alike(error)} the same. Your eye can."
    if error <= 0.1:
        return f"To the model the match is nearly the target: {alike(error)} the same. It could still tell them apart."
    return f"This did not work: to the model the match is only {alike(error)} the target."


def look(row: Row) -> str:
    """How the match looks beside its source, in words."""
    psnr, far = row["psnr_db"], levels(row["linf"])
    if psnr is None:
        return "The picture is the source itself, pixel for pixel."
    seen = (
        "hardly visible"
        if psnr >= 35
        else "visible on a close look"
        if psnr >= _EYE
        else "visible"
        if psnr >= 20
        else "strong"
    )
    return f"The change to the source is {seen}: {far} of 255 grey levels, PSNR {psnr:.1f} dB."


def heads(row: Row) -> str:
    """What the classifier says of the three images, in one sentence; empty without one."""
    if row["match_label"] is None:
        return ""
    before, after, aim = row["source_label"], row["match_label"], row["target_label"]
    if after == aim and before != aim:
        return f"The classifier takes the source for {_a(before)}, and the match for {_a(after)}, like the target."
    if after == aim:
        return f"The classifier takes all three for {_a(after)}."
    return f"The classifier takes the match for {_a(after)}, the source for {_a(before)} and the target for {_a(aim)}."


def _a(name: str) -> str:
    return f"“{name.split(',')[0]}”"
