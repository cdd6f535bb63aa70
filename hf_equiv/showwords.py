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
    rounded = math.floor(share * 10**digits) / 10**digits  # never more alike than measured
    return f"{rounded:.{digits}f} %"


def percent(probability: float, digits: int = 0) -> str:
    """Say a probability in percent; one that is neither 0 nor 1 is never said to be.

    Returns:
        Such as `42 %` or `over 99 %`.

    Example:
        >>> from hf_equiv.showwords import percent
        >>> percent(0.423), percent(0.9998), percent(0.0003, 1)
        ('42 %', 'over 99 %', 'under 0.1 %')
    """
    least = 10.0**-digits
    share = 100 * probability
    if share < 100 and float(f"{share:.{digits}f}") >= 100:
        return f"over {100 - least:.{digits}f} %"
    if share > 0 and float(f"{share:.{digits}f}") == 0:
        return f"under {least:.{digits}f} %"
    return f"{share:.{digits}f} %"


def levels(linf: float | None) -> str:
    """Say how far a pixel was changed at most, in grey levels of 255."""
    return "an unknown number of" if linf is None else f"at most {round(255 * linf)}"


def headline(row: Row, apart_db: float | None) -> str:
    """The finding of a match in one or two sentences.

    Args:
        row: of a match, or the measures of one.
        apart_db: PSNR of the match to the target; None if they are the same picture.

    Returns:
        Plain text.
    """
    error = row["embedding_error_8bit"]
    if error is None:
        return "This image could not be measured."
    eye = "your eye can" if apart_db is not None and apart_db < _EYE else "neither can you, at a glance"
    if error <= 1e-3:
        same = f"to it they are {alike(error)} the same"
        return f"The model cannot tell the match from the target: {same}. {eye[0].upper()}{eye[1:]}."
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
