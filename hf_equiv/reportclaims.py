"""The paper's claims beside what was measured, each with a verdict by a stated rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_equiv.metrics import short
from hf_equiv.reportnumbers import MATCHED
from hf_equiv.reportwords import (
    ALIKE_DB,
    ball,
    decibels,
    falls_short,
    interval,
    linear_reach,
    look_alike,
    most_alike,
    span,
    tenth,
    three,
)

Row = Mapping[str, Any]
FEW = 10
"""Below this many pairs no claim is called supported without a caveat."""

YES, PARTLY, NO, OPEN = "supported", "supported with a caveat", "not supported", "not measured"
UNDECIDED = "not decided"

RULES = (
    f"Matching is supported if more than half of the PNG matches lie within {MATCHED:.0%} of the distance of unrelated "
    "images (lower end of the interval).",
    f"Look-alikes are supported if, at the smallest budget where that is so, more than half of the PNG matches are "
    f"nearer to their target than to their own source (by cosine; lower end of the interval), at a median PSNR of "
    f"{ALIKE_DB:.0f} dB or more. If no run has matches of that PSNR, the claim is not decided.",
    "Locally linear sets are not supported if the first-order model fails (10 %), along null directions, before the "
    "distance of a match, and the two intervals do not overlap; supported if it holds beyond, likewise.",
    "The null space is supported if more than half of the pixel directions are null.",
    "The normal space is supported if the median constant along the top directions is ten times the median along "
    "random ones, and none along null directions stands above the float noise.",
    "Downstream is supported if more than half of the matches get the target's class (lower end of the interval).",
    f"With fewer than {FEW} pairs, or photos, supported becomes supported with a caveat.",
)


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of the paper beside what was measured.

    Attributes:
        claim: in plain words.
        measured: the numbers.
        interval: of the number that decides.
        verdict: one of the five.
    """

    claim: str
    measured: str
    interval: str
    verdict: str


def claims(numbers: Row) -> tuple[Claim, ...]:
    """The paper's claims, in its order, with what a checkpoint's runs say of each."""
    return (
        _claim_matching(numbers),
        _claim_structure(numbers),
        _claim_linear(numbers),
        _claim_null(numbers),
        _claim_alike(numbers),
        _claim_normal(numbers),
        _claim_downstream(numbers),
    )


def _verdict(share: Row) -> str:
    """More than half: by the interval, or by the count alone where there is none."""
    if share["value"] <= 0.5:
        return NO
    return YES if share["n"] >= FEW and share["low"] is not None and share["low"] > 0.5 else PARTLY


def _claim_matching(numbers: Row) -> Claim:
    told = "Matching: from any photo, a small change gives an image with the embedding of any other photo."
    match = numbers["match"]
    if match is None or match["matched"] is None:
        return Claim(told, "–", "–", OPEN)
    measured = (
        f"{match['matched']['hits']} of {match['matched']['n']} PNG matches lie within {MATCHED:.0%} of the distance "
        f"of unrelated images; median error {short(match['embedding_error_8bit']['value'])}"
    )
    return Claim(told, measured, span(match["matched"]), _verdict(match["matched"]))


def _claim_structure(numbers: Row) -> Claim:
    told = "Equivalence structure: images that look different share one embedding."
    match = numbers["match"]
    if match is None or match["psnr_match_target"] is None:
        return Claim(told, "–", "–", OPEN)
    apart, likeness = match["psnr_match_target"], match["ssim_match_target"]
    measured = f"match and target differ by PSNR {tenth(apart['value'])} dB"
    measured += f", SSIM {likeness['value']:.2f}" if likeness else ""
    measured += f", at PNG error {short(match['embedding_error_8bit']['value'])}"
    verdict = _verdict(match["matched"]) if match["matched"] else OPEN
    if apart["value"] >= ALIKE_DB:
        verdict = NO
    return Claim(told, measured, interval(apart, tenth), verdict)


def _claim_linear(numbers: Row) -> Claim:
    told = "Locally linear sets: those images form large, locally linear sets."
    found = linear_reach(numbers)
    if found is None:
        return Claim(told, "–", "–", OPEN)
    reach, far, kind = found
    measured = (
        f"along {kind} directions the first-order model holds to 10 % up to L2 {three(reach['value'])} (median); the "
        f"matches lie at L2 {three(far['value'])}"
    )
    if falls_short(reach, far):
        verdict = NO
    else:
        enough = min(far["n"], numbers["lipschitz"]["images"]) >= FEW
        sure = reach["low"] is not None and far["high"] is not None and reach["low"] >= far["high"]
        verdict = YES if enough and sure else PARTLY
    return Claim(told, measured, interval(reach, three), verdict)


def _claim_null(numbers: Row) -> Claim:
    told = "Null space: almost all pixel directions leave the embedding where it is, to first order."
    found = numbers["spectrum"]
    if not found or not found["ranks"]:
        missing = "the spectrum has no rank; run hf-equiv spectrum without --k to add it" if found else "–"
        return Claim(told, missing, "–", OPEN)
    if found["nullity"] <= found["pixels"] / 2:
        verdict = NO
    else:
        verdict = YES if found["full"] >= FEW else PARTLY
    ranks = " to ".join(str(r) for r in dict.fromkeys((found["ranks"][0], found["ranks"][-1])))
    measured = f"rank {ranks} of {found['dim']}; {found['nullity']:,} of {found['pixels']:,} directions are null"
    return Claim(
        told,
        measured,
        f"the same at all {found['full']} photos"
        if len(found["ranks"]) == 1 and found["full"] > 1
        else f"{found['full']} photo{'s' if found['full'] > 1 else ''}",
        verdict,
    )


def _claim_alike(numbers: Row) -> Claim:
    told = "Look-alikes: images that look the same have very different embeddings."
    enough = look_alike(numbers)
    near = enough or most_alike(numbers)
    if near is None:
        return Claim(told, "–", "–", OPEN)
    short_of = "" if enough else f", short of the {ALIKE_DB:.0f} dB of the rule"
    measured = (
        f"{ball(near['radius'], near['norm'])}, PSNR {decibels(near['psnr_db']['value'])} dB to the source{short_of}: "
        f"{near['nearer']['hits']} of {near['nearer']['n']} embeddings are nearer to another photo than to their own "
        f"source (cosine {near['cosine_to_target']['value']:.2f} and {near['cosine_to_source']['value']:.2f}, medians)"
    )
    return Claim(told, measured, span(near["nearer"]), _verdict(near["nearer"]) if enough else UNDECIDED)


def _claim_normal(numbers: Row) -> Claim:
    told = "Normal space and Lipschitz constants: steps along a few directions move the embedding, others do not."
    found = numbers["lipschitz"]
    kinds = found["kinds"] if found else {}
    if "top" not in kinds or "random" not in kinds or not kinds["top"]["value"] or not kinds["random"]["value"]:
        return Claim(told, "–", "–", OPEN)
    top, random = kinds["top"]["value"], kinds["random"]["value"]
    ratio = top["value"] / random["value"]
    measured = f"median constant {three(top['value'])} along top directions, {three(random['value'])} along random ones"
    null = kinds.get("null")
    if null:
        measured += f"; above the float noise along null ones: {null['resolved']} of {null['count']}"
    good = ratio >= 10 and (null is None or not null["resolved"])
    enough = min(found["images"], top["n"], random["n"]) >= FEW
    verdict = NO if ratio < 2 else (YES if good and enough else PARTLY)
    return Claim(told, measured, interval(top, three), verdict)


def _claim_downstream(numbers: Row) -> Claim:
    told = "Downstream: whatever shares an embedding is classified alike by every head on top."
    heads, probe = numbers["heads"], numbers["probe"]
    parts, shares = [], []
    if heads and heads["flipped"]:
        parts.append(f"head: {heads['flipped']['hits']} of {heads['flipped']['n']} matches get the target's class")
        shares.append(heads["flipped"])
    if probe and probe["flipped"]:
        parts.append(f"kNN: {probe['flipped']['hits']} of {probe['flipped']['n']}")
        shares.append(probe["flipped"])
    if not shares:
        return Claim(told, "–", "–", OPEN)
    order = (NO, PARTLY, YES)
    verdict = min((_verdict(one) for one in shares), key=order.index)
    return Claim(told, "; ".join(parts), "; ".join(span(one) for one in shares), verdict)
