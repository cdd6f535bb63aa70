"""The findings of a report in words: numbers with intervals, the summary, the claims, and what contradicts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_equiv.metrics import short
from hf_equiv.reportnumbers import MATCHED

Row = Mapping[str, Any]
FEW = 10
"""Below this many pairs no claim is called supported without a caveat."""

ON_THE_WAY = 0.1
"""A budget counts as enough if the median PNG ends within this part of that distance."""

ALIKE_DB = 30.0
"""PSNR from which two photos are called hard to tell apart."""

YES, PARTLY, NO, OPEN = "supported", "supported with a caveat", "not supported", "not measured"

RULES = (
    f"Matching is supported if more than half of the PNG matches lie within {MATCHED:.0%} of the distance of unrelated "
    "images (lower end of the interval).",
    f"Look-alikes are supported if, at some budget, the median PNG match ends within {ON_THE_WAY:.0%} of that distance "
    f"and has a PSNR of {ALIKE_DB:.0f} dB or more to its source.",
    "Locally linear sets are not supported if the first-order model fails, along null directions, at less than a tenth "
    "of the distance of a match (upper end of the interval).",
    "The normal space is supported if the median constant along the top directions is ten times the median along "
    "random ones, and none along null directions stands above the float noise.",
    "Downstream is supported if more than half of the matches get the target's class (lower end of the interval).",
    f"With fewer than {FEW} pairs, or photos, supported becomes supported with a caveat.",
)


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
    return short(value) if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.3g}"


def thousandth(value: float) -> str:
    """Three decimals."""
    return f"{value:.3f}"


def ball(radius: float | None, norm: str) -> str:
    """A budget in words: `no ball`, `ε = 8/255`, `L2 ε = 2`."""
    if radius is None:
        return "no ball"
    return f"ε = {radius * 255:.3g}/255" if norm == "linf" else f"L2 ε = {radius:.3g}"


def near_budget(numbers: Row) -> Row | None:
    """The smallest ball at which the median PNG match ends within a tenth of the distance of unrelated images."""
    match = numbers["match"]
    apart = match["unrelated"]["median"] if match and match["unrelated"] else None
    if apart is None:
        return None
    enough = [
        b for b in numbers["budgets"]
        if b["radius"] is not None and b["embedding_error_8bit"]
        and b["embedding_error_8bit"]["value"] <= ON_THE_WAY * apart
    ]  # fmt: skip
    return min(enough, key=lambda b: (b["norm"] != "linf", b["radius"]), default=None)


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of the paper beside what was measured.

    Attributes:
        claim: in plain words.
        measured: the numbers.
        interval: of the number that decides.
        verdict: one of the four.
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
    top = reach["value"] if reach["high"] is None else reach["high"]
    if top < 0.1 * far["value"]:
        verdict = NO
    else:
        verdict = PARTLY if reach["value"] < far["value"] or far["n"] < FEW else YES
    return Claim(told, measured, interval(reach, three), verdict)


def _claim_null(numbers: Row) -> Claim:
    told = "Null space: almost all pixel directions leave the embedding where it is, to first order."
    found = numbers["spectrum"]
    if not found or not found["ranks"]:
        return Claim(told, "–", "–", OPEN)
    ranks = " to ".join(str(r) for r in dict.fromkeys((found["ranks"][0], found["ranks"][-1])))
    measured = f"rank {ranks} of {found['dim']}; {found['nullity']:,} of {found['pixels']:,} directions are null"
    return Claim(told, measured, f"the same at all {found['full']} photos" if len(found["ranks"]) == 1
                 else f"{found['full']} photos", YES)  # fmt: skip


def _claim_alike(numbers: Row) -> Claim:
    told = "Look-alikes: images that look the same have very different embeddings."
    match = numbers["match"]
    if match is None:
        return Claim(told, "–", "–", OPEN)
    near = near_budget(numbers)
    if near is None and match["matched"] and match["radius"] is None and match["matched"]["value"] > 0.5:
        near = numbers["budgets"][0]
    if near is None or near["psnr_db"] is None:
        limited = [b for b in numbers["budgets"] if b["radius"] is not None]
        if not limited:
            return Claim(told, "no budget was tried", "–", OPEN)
        wide = max(limited, key=lambda b: b["radius"])
        error = wide["embedding_error_8bit"]
        measured = f"at {ball(wide['radius'], wide['norm'])} the median PNG error is {short(error and error['value'])}"
        return Claim(told, measured, interval(error), NO)
    clear = near["psnr_db"]
    measured = (
        f"{ball(near['radius'], near['norm'])}: PSNR {tenth(clear['value'])} dB to the source, PNG error "
        f"{short(near['embedding_error_8bit']['value'])} to another photo's embedding"
    )
    if clear["value"] < ALIKE_DB:
        verdict = NO if clear["value"] < ALIKE_DB - 5 else PARTLY
    else:
        verdict = YES if clear["n"] >= FEW else PARTLY
    return Claim(told, measured, interval(clear, tenth), verdict)


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
    verdict = NO if ratio < 2 else (YES if good and found["images"] >= FEW else PARTLY)
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


def summary(numbers: Row) -> tuple[str, ...]:
    """Five sentences: matching, nearness, heads, survival, geometry."""
    return (_say_matching(numbers), _say_near(numbers), _say_heads(numbers), _say_survival(numbers),
            _say_geometry(numbers))  # fmt: skip


def _say_matching(numbers: Row) -> str:
    match = numbers["match"]
    if match is None:
        return "Whether images can be made to share an embedding was not measured."
    text = f"Of {match['rows']} pairs of photos, {count(match['converged'])} were matched to embedding error "
    text += f"{short(match['rtol'])} or better by the float image"
    png = match["embedding_error_8bit"]
    text += f"; saved as 8-bit PNG and read back, the median error is {number(png)}" if png else ""
    if match["unrelated"]:
        text += f", where unrelated photos are {short(match['unrelated']['median'])} apart"
    return text + "."


def _say_near(numbers: Row) -> str:
    match = numbers["match"]
    if match is None or match["psnr_db"] is None:
        return "How near such an image is to its source was not measured."
    near = near_budget(numbers)
    if near is not None and near["psnr_db"]:
        return (
            f"The smallest budget tried that is enough is {ball(near['radius'], near['norm'])}: there the median PNG "
            f"error is {number(near['embedding_error_8bit'])} and the image has a PSNR of "
            f"{number(near['psnr_db'], tenth, ' dB')} to its source."
        )
    limits = [b for b in numbers["budgets"] if b["radius"] is not None]
    where = f"Within {ball(match['radius'], match['norm'])}" if match["radius"] else "With no limit on the change"
    text = f"{where}, a match has a PSNR of {number(match['psnr_db'], tenth, ' dB')} to its source"
    return text + ("; no smaller budget that was tried is enough." if limits and not match["radius"] else ".")


def _say_heads(numbers: Row) -> str:
    heads, probe = numbers["heads"], numbers["probe"]
    parts = []
    if heads and heads["flipped"]:
        what = "zero-shot classes" if heads["zero_shot"] else "classification head"
        parts.append(f"the checkpoint's own {what} give{'' if heads['zero_shot'] else 's'} "
                     f"{count(heads['flipped'])} matches the label of their target")  # fmt: skip
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
        told += f"matches lie at L2 {three(far['value'])}, {three(far['value'] / reach['value'])} times as far: sets "
        told += "of equal embedding are curved on that scale, not flat"
        text = f"{text}, but {told}" if text else told[0].upper() + told[1:]
    return text + "." if text else "The geometry of the sets of equal embedding was not measured."


def disagreements(numbers: Row) -> tuple[str, ...]:
    """Where the measurements do not agree with the paper, or with how it reads."""
    return tuple(text for text in (
        _not_linear(numbers), _not_random(numbers), _not_noise(numbers), _not_zeros(numbers), _not_saved(numbers),
        _not_small(numbers), _not_elsewhere(numbers),
    ) if text)  # fmt: skip


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
        return f"{general} {where}; a match lies at L2 {number(far, three)}, beyond it."
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
        "over a very short step, the usual way to estimate one, reads round-off divided by the step there, not geometry."
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
    match = numbers["match"]
    apart = match["unrelated"]["median"] if match and match["unrelated"] else None
    limited = [b for b in numbers["budgets"] if b["radius"] is not None and b["embedding_error_8bit"]]
    if apart is None:
        return ""
    failed = [b for b in limited if b["embedding_error_8bit"]["value"] > MATCHED * apart]
    if not failed:
        return ""
    worst = min(failed, key=lambda b: b["radius"])
    return (
        f"Not every budget allows a match: at {ball(worst['radius'], worst['norm'])} the median PNG error is "
        f"{number(worst['embedding_error_8bit'])}, with {short(apart)} between unrelated photos"
        f" (at most {worst['max_evals']} evaluations; more may go further)."
    )


def _not_elsewhere(numbers: Row) -> str:
    texts = []
    for one in numbers["transfer"]:
        error, before = one["error"], one["distance"]
        if error and before and error["value"] > 0.5 * before["value"]:
            texts.append(
                f"Sharing an embedding is a property of one checkpoint: in {one['model']} the matches are "
                f"{number(error)} from their targets, and their sources {number(before)}."
            )
    return " ".join(texts)


def names(items: Sequence[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
