"""The paper's claims beside the measurements: a verdict by a stated rule for each, and the findings in sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hf_equiv.formatting import short
from hf_equiv.report.numbers import MATCHED
from hf_equiv.report.records import BudgetNumbers, CheckpointNumbers
from hf_equiv.report.render import ALIKE_DB, ball, decibels, interval, sentences, span, tenth, three
from hf_equiv.report.statistics import Estimate, Share

FEW = 10
"""Below this many pairs or photos no claim is called supported without a caveat."""

ON_THE_WAY = 0.1
"""A budget is enough if the median PNG ends within this part of the distance of unrelated images."""

YES, PARTLY, NO, OPEN = "supported", "supported with a caveat", "not supported", "not measured"
UNDECIDED = "not decided"


@dataclass(frozen=True)
class Claim:
    """One claim of the paper beside the measurement.

    Attributes:
        claim: the claim in plain words.
        measured: the numbers.
        interval: interval of the number that decides.
        verdict: `YES`, `PARTLY`, `NO`, `OPEN` or `UNDECIDED`.
    """

    claim: str
    measured: str = "–"
    interval: str = "–"
    verdict: str = OPEN


class Reach(NamedTuple):
    """How far the linear model holds along one kind of direction, beside how far the matches lie (L2)."""

    linear: Estimate
    match: Estimate
    kind: str

    @property
    def falls_short(self) -> bool:
        """Whether the linear model ends before the matches: the two intervals do not overlap."""
        return self.linear.high is not None and self.match.low is not None and self.linear.high < self.match.low

    @property
    def goes_beyond(self) -> bool:
        """Whether the linear model holds beyond the matches: the two intervals do not overlap."""
        return self.linear.low is not None and self.match.high is not None and self.linear.low >= self.match.high


def near_budget(numbers: CheckpointNumbers) -> BudgetNumbers | None:
    """Return the smallest ball whose median PNG ends within a tenth of the distance of unrelated images of its data."""
    enough = [
        b for b in numbers.budgets
        if b.radius is not None and b.embedding_error_8bit and b.unrelated
        and b.embedding_error_8bit.value <= ON_THE_WAY * b.unrelated
    ]  # fmt: skip
    return min(enough, key=lambda b: (b.norm != "linf", b.radius), default=None)


def failed_budget(numbers: CheckpointNumbers) -> BudgetNumbers | None:
    """Return the smallest ball whose median PNG does not match."""
    failed = [
        b for b in numbers.budgets
        if b.radius is not None and b.embedding_error_8bit and b.unrelated
        and b.embedding_error_8bit.value > MATCHED * b.unrelated
    ]  # fmt: skip
    return min(failed, key=lambda b: b.radius or 0.0, default=None)


def look_alike(numbers: CheckpointNumbers) -> BudgetNumbers | None:
    """Return the smallest budget whose matches look like their sources and mostly embed nearer to their targets."""
    # Without one: the widest budget whose matches look like their sources.
    alike = [b for b in numbers.budgets if b.nearer and b.psnr_db and b.psnr_db.value >= ALIKE_DB]
    alike.sort(key=lambda b: (b.radius is None, b.norm != "linf", b.radius or 0.0))
    return next((b for b in alike if b.nearer and b.nearer.value > 0.5), alike[-1] if alike else None)


def most_alike(numbers: CheckpointNumbers) -> BudgetNumbers | None:
    """Return the budget whose matches look most like their sources by median PSNR, however low that is."""
    known = [b for b in numbers.budgets if b.nearer and b.psnr_db]
    return max(known, key=lambda b: b.psnr_db.value if b.psnr_db else 0.0, default=None)


def linear_reach(numbers: CheckpointNumbers) -> Reach | None:
    """Compare the reach of the linear model, along null directions if known, with the distance of the matches."""
    found, match = numbers.lipschitz, numbers.match
    if found is None or match is None or match.l2 is None:
        return None
    reaches = ((kind, found.kinds[kind].linearity) for kind in ("null", "random") if kind in found.kinds)
    return next((Reach(linear, match.l2, kind) for kind, linear in reaches if linear), None)


def claims(numbers: CheckpointNumbers) -> tuple[Claim, ...]:
    """Judge the paper's claims, in its order, by the runs of a checkpoint."""
    judges = (_matching, _structure, _linear, _null, _alike, _normal, _downstream)
    return tuple(judge(numbers) for judge in judges)


def _verdict(share: Share) -> str:
    """More than half: by the interval, or with a caveat where there is none or too few pairs."""
    if share.value <= 0.5:
        return NO
    return YES if share.n >= FEW and share.low is not None and share.low > 0.5 else PARTLY


def _matching(numbers: CheckpointNumbers) -> Claim:
    told = "Matching: from any photo, a small change gives an image with the embedding of any other photo."
    match = numbers.match
    if match is None or match.matched is None:
        return Claim(told)
    measured = (
        f"{match.matched.hits} of {match.matched.n} PNG matches lie within {100 * MATCHED:.0f} % of the distance of "
        f"unrelated images; median error {_short(match.embedding_error_8bit)}"
    )
    return Claim(told, measured, span(match.matched), _verdict(match.matched))


def _short(estimate: Estimate | None) -> str:
    return short(estimate.value if estimate else None)


def _structure(numbers: CheckpointNumbers) -> Claim:
    told = "Equivalence structure: images that look different share one embedding."
    match = numbers.match
    if match is None or match.psnr_match_target is None:
        return Claim(told)
    apart, likeness = match.psnr_match_target, match.ssim_match_target
    measured = f"match and target differ by PSNR {tenth(apart.value)} dB"
    measured += f", SSIM {likeness.value:.2f}" if likeness else ""
    measured += f", at PNG error {_short(match.embedding_error_8bit)}"
    verdict = _verdict(match.matched) if match.matched else OPEN
    return Claim(told, measured, interval(apart, tenth), NO if apart.value >= ALIKE_DB else verdict)


def _linear(numbers: CheckpointNumbers) -> Claim:
    told = "Locally linear sets: those images form large, locally linear sets."
    reach = linear_reach(numbers)
    if reach is None or numbers.lipschitz is None:
        return Claim(told)
    measured = (
        f"along {reach.kind} directions the first-order model holds to 10 % up to L2 {three(reach.linear.value)} "
        f"(median); the matches lie at L2 {three(reach.match.value)}"
    )
    enough = min(reach.match.n, numbers.lipschitz.images) >= FEW
    verdict = NO if reach.falls_short else (YES if enough and reach.goes_beyond else PARTLY)
    return Claim(told, measured, interval(reach.linear, three), verdict)


def _null(numbers: CheckpointNumbers) -> Claim:
    told = "Null space: almost all pixel directions leave the embedding where it is, to first order."
    found = numbers.spectrum
    if found is None:
        return Claim(told)
    if found.nullity is None or found.pixels is None:
        return Claim(told, "the spectrum has no rank; run hf-equiv spectrum without --k to add it")
    measured = f"rank {found.rank_range} of {found.dim}; {found.nullity:,} of {found.pixels:,} directions are null"
    photos = f"{found.full} photo{'s' if found.full > 1 else ''}"
    if len(found.ranks) == 1 and found.full > 1:
        photos = f"the same at all {photos}"
    verdict = YES if found.full >= FEW else PARTLY
    return Claim(told, measured, photos, verdict if found.nullity > found.pixels / 2 else NO)


def _alike(numbers: CheckpointNumbers) -> Claim:
    told = "Look-alikes: images that look the same have very different embeddings."
    enough = look_alike(numbers)
    near = enough or most_alike(numbers)
    if near is None or near.nearer is None or near.psnr_db is None:
        return Claim(told)
    short_of = "" if enough else f", short of the {ALIKE_DB:.0f} dB of the rule"
    cosines = [f"{one.value:.2f}" if one else "–" for one in (near.cosine_to_target, near.cosine_to_source)]
    measured = (
        f"{ball(near.radius, near.norm)}, PSNR {decibels(near.psnr_db.value)} dB to the source{short_of}: "
        f"{near.nearer.hits} of {near.nearer.n} embeddings are nearer to another photo than to their own source "
        f"(median cosine {cosines[0]} and {cosines[1]})"
    )
    return Claim(told, measured, span(near.nearer), _verdict(near.nearer) if enough else UNDECIDED)


def _normal(numbers: CheckpointNumbers) -> Claim:
    told = "Normal space and Lipschitz constants: steps along a few directions move the embedding, others do not."
    found = numbers.lipschitz
    top, random, null = ((found.kinds.get(kind) if found else None) for kind in ("top", "random", "null"))
    if not (found and top and random and top.value and random.value):
        return Claim(told)
    ratio = top.value.value / random.value.value
    measured = (
        f"median constant {three(top.value.value)} along top directions, {three(random.value.value)} along random"
    )
    measured += f"; above the float noise along null: {null.resolved} of {null.count}" if null else ""
    good = ratio >= 10 and (null is None or not null.resolved)
    enough = min(found.images, top.value.n, random.value.n) >= FEW
    verdict = NO if ratio < 2 else (YES if good and enough else PARTLY)
    return Claim(told, measured, interval(top.value, three), verdict)


def _downstream(numbers: CheckpointNumbers) -> Claim:
    told = "Downstream: images that share an embedding are classified alike by every head on top."
    shares: list[Share] = []
    parts = []
    for found, name, rest in ((numbers.heads, "head", " matches get the target's class"), (numbers.probe, "kNN", "")):
        if found and found.flipped:
            parts.append(f"{name}: {found.flipped.hits} of {found.flipped.n}{rest}")
            shares.append(found.flipped)
    if not shares:
        return Claim(told)
    verdict = min((_verdict(one) for one in shares), key=(NO, PARTLY, YES).index)
    return Claim(told, "; ".join(parts), "; ".join(span(one) for one in shares), verdict)


def summary(numbers: CheckpointNumbers) -> tuple[str, ...]:
    """Answer in five sentences: matching, nearness, heads, survival, geometry."""
    return _say(numbers, "matching", "nearness", "heads", "survival", "geometry")


def disagreements(numbers: CheckpointNumbers) -> tuple[str, ...]:
    """Say where the measurements do not agree with the paper, or with how it reads."""
    return _say(
        numbers, "not_linear", "not_random", "not_noise", "not_zeros", "not_saved", "not_small", "not_elsewhere"
    )


def consequences(numbers: CheckpointNumbers) -> tuple[str, ...]:
    """Say what the measurements mean for a user of the checkpoint."""
    return _say(numbers, "trust", "retrain", "recompress", "second_model", "own_photos")


def limits(numbers: CheckpointNumbers) -> tuple[str, ...]:
    """Say what the measurements leave open."""
    return _say(numbers, "few_pairs", "shared_photos", "first_pairs", "not_found", "scaled")


def _say(numbers: CheckpointNumbers, *names: str) -> tuple[str, ...]:
    return sentences(
        names, n=numbers, near=near_budget(numbers), failed=failed_budget(numbers), alike=look_alike(numbers),
        best=most_alike(numbers), reach=linear_reach(numbers), matched=_matching(numbers).verdict, ALIKE_DB=ALIKE_DB,
    )  # fmt: skip
