"""Judge exposure and the paper's claims by stated rules, and state the findings in sentences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from hf_equiv.formatting import ALIKE_DB, VISIBILITY, many, visibility
from hf_equiv.report.numbers import MATCHED, BudgetNumbers, CheckpointNumbers
from hf_equiv.report.render import findings, interval, tenth, three
from hf_equiv.report.statistics import SMALL, Estimate, Share
from hf_equiv.runs.schema import Row

ON_THE_WAY = 0.1  # a budget is enough if the median PNG error is at most this part of the distance of unrelated images
YES, PARTLY, NO, OPEN = "supported", "supported with a caveat", "not supported", "not measured"
UNDECIDED, NO_FEW = "not decided", "not supported with a caveat"
EXPOSED, IN_PART, NOT_FOUND, UNCLEAR = "Exposed", "Partly exposed", "Not exposed in this test", "Undecided"
HARMFUL = ("matching", "structure", "alike", "downstream")  # claims that are bad for the owner of the encoder
_TONES = {
    EXPOSED: "bad", IN_PART: "partly", NOT_FOUND: "good", YES: "bad", PARTLY: "partly", NO: "good", NO_FEW: "good",
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """One claim of the paper with the measured numbers, the interval of the deciding number, and the verdict."""

    claim: str
    measured: str = "–"
    interval: str = "–"
    verdict: str = OPEN
    tone: str = "open"  # `good`, `partly` or `bad` for the owner of the encoder


class Exposure(NamedTuple):
    """Whether photos can be made to pass for others: the verdict and the run behind it, None without a match."""

    verdict: str = "Not measured"
    tone: str = "open"
    budget: BudgetNumbers | None = None
    exact: bool = False  # whether it counts photos with the embedding of another, and not those that only came nearer
    seen: str = ""  # how visible the change is, in a word of `VISIBILITY`


class Reach(NamedTuple):
    """How far the linear model holds along one kind of direction, and how far the matches lie (L2)."""

    linear: Estimate
    match: Estimate
    kind: str


def _seen(budget: BudgetNumbers) -> str:
    """Say how visible a change is by the interval of the median PSNR, or by the PSNR of a single pair."""
    psnr = budget.psnr_db
    if psnr is None:
        return ""
    return visibility(*(psnr.value if end is None else end for end in (psnr.low, psnr.high)))


def _unseen(budget: BudgetNumbers) -> int:
    return ("", *VISIBILITY).index(_seen(budget))


def _hits(budget: BudgetNumbers) -> int:
    return sum(share.hits for share in (budget.matched, budget.nearer) if share)


EXPOSURE: tuple[tuple[str, bool, Callable[[BudgetNumbers], bool], Callable[[BudgetNumbers], int]], ...] = (
    (EXPOSED, True, lambda b: b.matched is not None and b.matched.most > 0, _unseen),
    (EXPOSED, False, lambda b: b.nearer is not None and b.nearer.most > 0, _unseen),
    (IN_PART, True, lambda b: b.matched is not None and b.matched.hits > 0, _hits),
    (IN_PART, False, lambda b: b.nearer is not None and b.nearer.hits > 0, _hits),
    (UNCLEAR, False, lambda b: b.cut_short > 0 or b.pairs < SMALL, _hits),
    (NOT_FOUND, False, lambda b: True, _hits),
)
"""Verdict, whether it counts photos with the embedding of another, the test of a run, and the run to prefer.

The first verdict that a run passes holds. Of several runs the largest decides, of equal ones the first.
"""


@lru_cache(8)
def exposure(numbers: CheckpointNumbers) -> Exposure:
    """Judge the exposure by the runs of most pairs."""
    for verdict, exact, holds, preferred in EXPOSURE:
        if found := [budget for budget in _compared(numbers) if holds(budget)]:
            budget = max(found, key=preferred)
            return Exposure(verdict, _TONES.get(verdict, "open"), budget, exact, _seen(budget))
    return Exposure()


def _compared(numbers: CheckpointNumbers) -> list[BudgetNumbers]:
    """List the runs with as many pairs as the page's own. Ignore smaller runs; they may have other photos."""
    return [b for b in numbers.budgets if numbers.match and b.rows >= numbers.match.rows]


def undone(numbers: CheckpointNumbers) -> dict[str, int]:
    """Return for each transform 1 if it undoes most matches, -1 if most survive it, and 0 if that is undecided."""
    return {name: -one.taken.most for name, one in (numbers.survival or {}).items() if one.taken}


def near_budget(numbers: CheckpointNumbers) -> BudgetNumbers | None:
    """Return the smallest ball with a median PNG error within a tenth of the distance of its unrelated images."""
    enough = [b for b, error in _errors(numbers) if error <= ON_THE_WAY]
    return min(enough, key=lambda b: (b.norm != "linf", b.radius), default=None)


def failed_budget(numbers: CheckpointNumbers) -> BudgetNumbers | None:
    """Return the smallest ball whose median PNG does not match and is worse than that of a run without a ball."""
    own = _compared(numbers)
    free = [b.embedding_error_8bit.value for b in own if b.radius is None and b.embedding_error_8bit]
    balls = [b for b, error in _errors(numbers) if error > MATCHED]
    failed = [b for b in balls if b.embedding_error_8bit and b.embedding_error_8bit.value > min(free, default=0.0)]
    return min(failed, key=lambda b: b.radius or 0.0, default=None)


def _errors(numbers: CheckpointNumbers) -> list[tuple[BudgetNumbers, float]]:
    """List each ball with its median PNG error, as a part of the distance of unrelated images."""
    return [
        (b, b.embedding_error_8bit.value / b.unrelated)
        for b in _compared(numbers)
        if b.radius is not None and b.embedding_error_8bit and b.unrelated
    ]


def look_alike(numbers: CheckpointNumbers) -> BudgetNumbers | None:
    """Return the smallest budget whose matches look like their sources and mostly embed nearer to their targets."""
    # If there is none, return the widest budget whose matches look like their sources.
    alike = [b for b in _compared(numbers) if b.nearer and b.psnr_db and b.psnr_db.value >= ALIKE_DB]
    alike.sort(key=lambda b: (b.radius is None, b.norm != "linf", b.radius or 0.0))
    return next((b for b in alike if b.nearer and b.nearer.value > 0.5), alike[-1] if alike else None)


def most_alike(numbers: CheckpointNumbers) -> BudgetNumbers | None:
    """Return the budget whose matches look most like their sources by median PSNR, however low that is."""
    known = [b for b in _compared(numbers) if b.nearer and b.psnr_db]
    return max(known, key=lambda b: b.psnr_db.value if b.psnr_db else 0.0, default=None)


def linear_reach(numbers: CheckpointNumbers) -> Reach | None:
    """Compare the reach of the linear model, along null directions if known, with the distance of the matches."""
    found, match = numbers.lipschitz, numbers.match
    if found is None or match is None or match.l2 is None:
        return None
    reaches = ((kind, found.kinds[kind].linearity) for kind in ("null", "random") if kind in found.kinds)
    return next((Reach(linear, match.l2, kind) for kind, linear in reaches if linear), None)


# --- the rules: interval and verdict of each claim, None if it was not measured ---

Judged = tuple[str, str] | None


def _against(n: int) -> str:
    """Return the verdict on a claim that fails for n pairs or photos, with a caveat if there are few."""
    return NO if n >= SMALL else NO_FEW


def _supported(n: int) -> str:
    return YES if n >= SMALL else PARTLY


def _verdict(share: Share) -> str:
    """Judge whether a share exceeds one half, with a caveat if there are few pairs."""
    side = share.side_of(0.5)
    return UNDECIDED if side == 0 else _supported(share.n) if side > 0 else _against(share.n)


def _matching(numbers: CheckpointNumbers) -> Judged:
    matched = numbers.match.matched if numbers.match else None
    return (interval(matched), _verdict(matched)) if matched else None


def _structure(numbers: CheckpointNumbers) -> Judged:
    match = numbers.match
    if match is None or match.psnr_match_target is None:
        return None
    verdict, apart = _verdict(match.matched) if match.matched else OPEN, match.psnr_match_target
    if side := apart.side_of(ALIKE_DB):
        return interval(apart, tenth), verdict if side < 0 else _against(apart.n)
    return interval(apart, tenth), UNDECIDED


def _linear(numbers: CheckpointNumbers) -> Judged:
    reach = linear_reach(numbers)
    if reach is None or numbers.lipschitz is None:
        return None
    n = min(reach.match.n, numbers.lipschitz.images)
    verdict = _supported(n) if reach.match.is_below(reach.linear) else UNDECIDED
    verdict = _against(n) if reach.linear.is_below(reach.match) else verdict
    return interval(reach.linear, three), verdict


def _null(numbers: CheckpointNumbers) -> Judged:
    found = numbers.spectrum
    if found is None:
        return None
    if found.nullity is None or found.pixels is None:
        return "–", OPEN
    photos = many(found.full, "photo")
    if len(found.ranks) == 1 and found.full > 1:
        photos = f"the same at all {photos}"
    return photos, _supported(found.full) if found.nullity > found.pixels / 2 else _against(found.full)


def _alike(numbers: CheckpointNumbers) -> Judged:
    enough = look_alike(numbers)
    near = enough or most_alike(numbers)
    if near is None or near.nearer is None:
        return None
    return interval(near.nearer), _verdict(near.nearer) if enough else UNDECIDED


def _normal(numbers: CheckpointNumbers) -> Judged:
    found = numbers.lipschitz
    top, random, null = ((found.kinds.get(kind) if found else None) for kind in ("top", "random", "null"))
    if not (found and top and random and top.value and random.value):
        return None
    ratio = top.value.value / random.value.value
    good = ratio >= 10 and (null is None or not null.resolved)
    n = min(found.images, top.value.n, random.value.n)
    verdict = _against(n) if ratio < 2 else _supported(n) if good else PARTLY
    return interval(top.value, three), verdict if random.value.is_below(top.value) else UNDECIDED


def _downstream(numbers: CheckpointNumbers) -> Judged:
    shares = [found.flipped for found in (numbers.heads, numbers.probe) if found and found.flipped]
    if not shares:
        return None
    verdict = min((_verdict(one) for one in shares), key=(NO, NO_FEW, UNDECIDED, PARTLY, YES).index)
    return "; ".join(interval(one) for one in shares), verdict


RULES: dict[str, Callable[[CheckpointNumbers], Judged]] = {
    "matching": _matching, "structure": _structure, "linear": _linear, "null": _null, "alike": _alike,
    "normal": _normal, "downstream": _downstream,
}  # fmt: skip
"""The rule of each claim, in the paper's order."""


def claims(numbers: CheckpointNumbers) -> tuple[Claim, ...]:
    """Judge the paper's claims, in its order, by the runs of a checkpoint."""
    text, found = texts(numbers), list[Claim]()
    for name, rule in RULES.items():
        told, judged = text(f"claim_{name}"), rule(numbers)
        tone = _TONES.get(judged[1], "open") if judged and name in HARMFUL else "open"
        found.append(Claim(told, text(f"measured_{name}"), *judged, tone) if judged else Claim(told))
    return tuple(found)


FINDINGS = {
    "summary": ("answer", "exposed", "how", "helps"),
    "against": ("not_linear", "not_random", "not_noise", "not_small"),
    "consequences": ("trust", "nearness", "retrain", "own_photos"),
    "limits": ("first_pairs", "scaled"),
}
"""Names of the template's texts: answer, disagreements with the paper, consequences for a user, open questions."""


def say(part: str, numbers: CheckpointNumbers) -> tuple[str, ...]:
    """Write one part of `FINDINGS`, a text for each finding."""
    return tuple(text for text in map(texts(numbers), FINDINGS[part]) if text)


def answer(numbers: CheckpointNumbers) -> Row:
    """Return the verdict on the exposure, the run behind it, and the sentences of the first screen."""
    found, sentences = exposure(numbers), map(texts(numbers), FINDINGS["summary"])
    run = found.budget.run if found.budget else None
    told = zip(("sentence", *FINDINGS["summary"][1:]), sentences, strict=True)
    return {"verdict": found.verdict, "tone": found.tone, "run": run, **dict(told)}


@lru_cache(8)
def texts(numbers: CheckpointNumbers) -> Callable[..., str]:
    """Return a function that writes a text of the template by its name."""
    return findings(
        n=numbers, e=exposure(numbers), undone=undone(numbers), near=near_budget(numbers),
        failed=failed_budget(numbers), alike=look_alike(numbers), best=most_alike(numbers),
        reach=linear_reach(numbers),
    )  # fmt: skip
