"""The paper's claims beside what was measured, each with a verdict by a stated rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_equiv.formatting import short
from hf_equiv.report.numbers import MATCHED
from hf_equiv.report.render import (
    ALIKE_DB,
    ball,
    count,
    decibels,
    falls_short,
    interval,
    linear_reach,
    look_alike,
    most_alike,
    near_budget,
    number,
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


# The findings of a report in sentences: the summary, and what contradicts the paper.


def summary(numbers: Row) -> tuple[str, ...]:
    """Five sentences: matching, nearness, heads, survival, geometry."""
    return (
        _say_matching(numbers),
        _say_near(numbers),
        _say_heads(numbers),
        _say_survival(numbers),
        _say_geometry(numbers),
    )


def _say_matching(numbers: Row) -> str:
    match = numbers["match"]
    if match is None:
        return "Whether images can be made to share an embedding was not measured."
    text = f"{count(match['converged'])} pairs of photos were matched to embedding error {short(match['rtol'])} or "
    text += "better by the float image"
    png = match["embedding_error_8bit"]
    text += f"; saved as 8-bit PNG and read back, the median error is {number(png)}" if png else ""
    if match["unrelated"]:
        text += f", where unrelated photos are {short(match['unrelated']['median'])} apart"
    return text + "."


def _say_near(numbers: Row) -> str:
    match = numbers["match"]
    if match is None or match["psnr_db"] is None:
        return "How near such an image is to its source was not measured."
    where = f"Within {ball(match['radius'], match['norm'])}" if match["radius"] else "With no limit on the change"
    text = f"{where} a match has a PSNR of {number(match['psnr_db'], tenth, ' dB')} to its source"
    near, alike = near_budget(numbers), look_alike(numbers)
    if near is not None:
        text += (
            f"; the smallest budget tried at which the median PNG gets nine tenths of the way is "
            f"{ball(near['radius'], near['norm'])} (error {short(near['embedding_error_8bit']['value'])})"
        )
    if alike is not None:
        text += (
            f"; of the matches that look like their source "
            f"({ball(alike['radius'], alike['norm'])}, PSNR {tenth(alike['psnr_db']['value'])} dB), "
            f"{count(alike['nearer'])} embed nearer to the target than to that source"
        )
    elif (best := most_alike(numbers)) is not None:
        text += (
            f"; no run has matches that look like their source ({ALIKE_DB:.0f} dB): the nearest have "
            f"{decibels(best['psnr_db']['value'])} dB ({ball(best['radius'], best['norm'])})"
        )
    return text + "."


def _say_heads(numbers: Row) -> str:
    heads, probe = numbers["heads"], numbers["probe"]
    parts = []
    if heads and heads["flipped"]:
        what = "zero-shot classes" if heads["zero_shot"] else "classification head"
        parts.append(
            f"the checkpoint's own {what} give{'' if heads['zero_shot'] else 's'} "
            f"{count(heads['flipped'])} matches the label of their target"
        )
    if probe and probe["flipped"]:
        parts.append(f"a nearest-neighbour classifier on the embeddings does so for {count(probe['flipped'])}")
    if not parts:
        return "What classifiers make of the matches was not measured."
    text = ", and ".join(parts)
    apart = (heads or {}).get("apart")
    told = " (counted where source and target have different labels)" if apart or probe else ""
    return f"{text[0].upper()}{text[1:]}{told}."


def _say_survival(numbers: Row) -> str:
    found = numbers["survival"]
    transfer = numbers["transfer"]
    text = ""
    if found and found.get("JPEG 75", {}).get("error"):
        jpeg = found["JPEG 75"]
        text = f"After JPEG at quality 75 the median match is {number(jpeg['error'])} from the target's embedding, "
        text += f"and the target itself is {number(jpeg['control'])} from it after the same"
        text += f"; {count(jpeg['label'])} still get the target's label" if jpeg["label"] else ""
    for one in transfer[:1]:
        told = f"in {one['model']} the matches are {number(one['error'])} from the target, their sources "
        told += number(one["distance"])
        text = f"{text}; {told}" if text else told[0].upper() + told[1:]
    return text + "." if text else "Whether a match survives JPEG, resizing or another model was not measured."


def _say_geometry(numbers: Row) -> str:
    found, spectrum = linear_reach(numbers), numbers["spectrum"]
    text = ""
    if spectrum and spectrum["nullity"] is not None:
        text = (
            f"To first order {spectrum['nullity']:,} of {spectrum['pixels']:,} pixel directions leave the embedding "
            "where it is"
        )
    if found is not None:
        reach, far, kind = found
        told = f"the first-order model holds only up to L2 {number(reach, three)} along {kind} directions, while "
        told += f"matches lie at L2 {number(far, three)}"
        told += ": sets of equal embedding are curved on that scale, not flat" if falls_short(reach, far) else ""
        text = f"{text}, but {told}" if text else told[0].upper() + told[1:]
    return text + "." if text else "The geometry of the sets of equal embedding was not measured."


def disagreements(numbers: Row) -> tuple[str, ...]:
    """Where the measurements do not agree with the paper, or with how it reads."""
    return tuple(
        text
        for text in (
            _not_linear(numbers),
            _not_random(numbers),
            _not_noise(numbers),
            _not_zeros(numbers),
            _not_saved(numbers),
            _not_small(numbers),
            _not_elsewhere(numbers),
        )
        if text
    )


def _not_linear(numbers: Row) -> str:
    found = linear_reach(numbers)
    general = (
        "The paper speaks of locally linear sets. A transformer with GELU, softmax and LayerNorm is smooth and curved "
        "everywhere: it has no exactly linear region, only distances up to which a linear model is good enough."
    )
    if found is None:
        return ""
    reach, far, kind = found
    where = f"Here that distance (10 % error, along {kind} directions) is L2 {number(reach, three)}"
    if reach["value"] < far["value"]:
        text = f"{general} {where}; the median match lies at L2 {number(far, three)}, beyond it."
        if kind == "null":
            strict = reach["value"] * (numbers["match"]["rtol"] / 0.1) ** 0.5
            text += (
                " That is for an error of a tenth of the embedding; if the error grows with the square of the "
                "distance, "
                f"as it does near the photo, a straight line keeps the embedding to {short(numbers['match']['rtol'])} "
                f"only up to about L2 {three(strict)}."
            )
        return text
    return f"{general} {where}, which is beyond the matches (L2 {number(far, three)})."


def _not_random(numbers: Row) -> str:
    kinds = numbers["lipschitz"]["kinds"] if numbers["lipschitz"] else {}
    top, random = (kinds.get(kind, {}).get("value") for kind in ("top", "random"))
    if not top or not random:
        return ""
    return (
        f"A constant along random directions ({number(random, three)}) is not the Lipschitz constant of the encoder: "
        f"along the top singular directions it is {number(top, three)}, {three(top['value'] / random['value'])} times "
        "as large."
    )


def _not_noise(numbers: Row) -> str:
    null = numbers["lipschitz"]["kinds"].get("null") if numbers["lipschitz"] else None
    if not null:
        return ""
    return (
        f"Along null directions {null['resolved']} of {null['count']} constants stand above the float noise. A secant "
        "over a very short step, the usual way to estimate one, reads round-off divided by the step there, not "
        "geometry."
    )


def _not_zeros(numbers: Row) -> str:
    found = numbers["spectrum"]
    zeros = {**found["structural_zeros"], **found["near_structural"]} if found else {}
    if not zeros:
        return ""
    told = ", ".join(f"{cause} (measured {short(zero['measured'])})" for cause, zero in zeros.items())
    return (
        f"Some zeros of the Jacobian come from the architecture and say nothing about what was learned: {told}. They "
        "are counted by name, apart from the null space that every map to fewer dimensions has."
    )


def _not_saved(numbers: Row) -> str:
    match = numbers["match"]
    if not match or not match["rounded_error"] or not match["embedding_error"] or not match["refine"]:
        return ""
    rounded, exact = match["rounded_error"], match["embedding_error_8bit"]
    if rounded["value"] < 3 * exact["value"]:
        return ""
    return (
        "A match exists in floating point and is lost in part when it is saved: rounded to 8 bit it is "
        f"{number(rounded)} from its target, {three(rounded['value'] / max(exact['value'], 1e-12))} times as far as "
        f"the PNG of this report ({short(exact['value'])}), which was searched for on the 8-bit grid."
    )


def _not_small(numbers: Row) -> str:
    failed = [
        b for b in numbers["budgets"]
        if b["radius"] is not None and b["embedding_error_8bit"] and b["unrelated"]
        and b["embedding_error_8bit"]["value"] > MATCHED * b["unrelated"]
    ]  # fmt: skip
    if not failed:
        return ""
    worst = min(failed, key=lambda b: b["radius"])
    return (
        f"Not every budget allows a match: at {ball(worst['radius'], worst['norm'])} the median PNG error is "
        f"{number(worst['embedding_error_8bit'])}, with {short(worst['unrelated'])} between unrelated photos"
        f" (at most {worst['max_evals']} evaluations; more may go further)."
    )


def _not_elsewhere(numbers: Row) -> str:
    texts = []
    for one in numbers["transfer"]:
        error, before = one["error"], one["distance"]
        if error and before and error["value"] > 0.5 * before["value"]:
            texts.append(
                f"Sharing an embedding in one checkpoint does not mean sharing it in another: in {one['model']} the "
                "matches are "
                f"{number(error)} from their targets, and their sources {number(before)}."
            )
    return " ".join(texts)
