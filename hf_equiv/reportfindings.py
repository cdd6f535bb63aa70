"""The findings of a report in sentences: the summary, and what contradicts the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_equiv.metrics import short
from hf_equiv.reportnumbers import MATCHED
from hf_equiv.reportwords import (
    ALIKE_DB,
    ball,
    count,
    decibels,
    falls_short,
    linear_reach,
    look_alike,
    most_alike,
    near_budget,
    number,
    tenth,
    three,
)

Row = Mapping[str, Any]


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
