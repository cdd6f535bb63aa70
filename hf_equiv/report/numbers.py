"""Compute the numbers of a report as frozen records, from rows and new measurements; None means no data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_equiv.report import geometry
from hf_equiv.report.collect import Checkpoint, Run
from hf_equiv.report.statistics import Estimate, Rows, Share, Spread, auc, column, estimate, fill, share
from hf_equiv.results import Status
from hf_equiv.runs.schema import Row

THRESHOLDS = (1e-2, 1e-3, 1e-4)
IDENTICAL_DB = 100.0  # PSNR of a match that equals its source; one grey level in one value of 150,528 gives 99.9 dB
MATCHED = 0.01  # a PNG counts as matched within this part of the median distance of unrelated images


@dataclass(frozen=True, eq=False)  # compared by identity, because `texts` caches by it
class CheckpointNumbers:
    """Every number that a report states about one checkpoint; None for a part without data."""

    title: str
    model_id: str
    revision: str
    readout: str
    normalize: bool
    dtype: str
    dim: int | None
    pixels: int | None
    runs: tuple[Row, ...]
    match: MatchNumbers | None
    budgets: tuple[BudgetNumbers, ...]
    heads: HeadNumbers | None
    survival: Mapping[str, SurvivalNumbers] | None
    defences: tuple[DefenceNumbers, ...]
    detector: DetectorNumbers | None
    transfer: tuple[TransferNumbers, ...]
    retrieval: RetrievalNumbers | None
    probe: ProbeNumbers | None
    spectrum: geometry.SpectrumNumbers | None
    lipschitz: geometry.LipschitzNumbers | None
    walk: geometry.WalkNumbers | None

    @property
    def survival_lines(self) -> list[tuple[str, Estimate, Estimate | None]]:
        """Name, match and control for the stored match, the rounded one, and each transform."""
        match, found = self.match, self.survival
        if match is None or found is None:
            return []
        lines = [
            ("as stored (8-bit PNG)", match.embedding_error_8bit, None),
            ("float, rounded to 8 bit", match.rounded_error, match.target_quantization_error),
            *((name, one.error, one.control) for name, one in found.items()),
        ]
        return [(name, error, control) for name, error, control in lines if error]

    def to_json(self) -> Row:
        """Return the numbers as plain data, as `--json` prints them."""
        return dict(json.loads(json.dumps(asdict(self), allow_nan=False)))


def checkpoint_numbers(
    checkpoint: Checkpoint, measured: Row | None, transfer: Sequence[Row], defended: Row | None = None
) -> CheckpointNumbers:
    """Compute every number of one checkpoint from what `measure` and `defences` return."""
    first = checkpoint.main
    settings, measured = checkpoint.runs[0].settings, measured or {}
    spectrum = geometry.spectrum_numbers(checkpoint.of("spectrum"))
    return CheckpointNumbers(
        title=checkpoint.title,
        revision=settings["model_revision"],
        **{key: settings[key] for key in ("model_id", "readout", "normalize", "dtype")},
        dim=measured.get("dim") or (spectrum.dim if spectrum else None),
        pixels=measured.get("pixels") or (spectrum.pixels if spectrum else None),
        runs=tuple(_run_line(run) for run in checkpoint.runs),
        match=_match(first, measured) if first else None,
        budgets=tuple(_budget(run, first, measured) for run in checkpoint.matches if first),
        heads=_heads(first) if first else None,
        survival=_survival(measured.get("pairs", ())) or None,
        defences=tuple(map(_defence, defended["defences"])) if defended else (),
        detector=_detector(defended["detector"]) if defended else None,
        transfer=tuple(_transfer(one) for one in transfer if one["pairs"]),
        retrieval=_retrieval(measured.get("retrieval")),
        probe=_probe(measured.get("probe")),
        spectrum=spectrum,
        lipschitz=geometry.lipschitz_numbers(checkpoint.of("lipschitz")),
        walk=geometry.walk_numbers(checkpoint.of("walk")),
    )


def _run_line(run: Run) -> Row:
    """Return a run as the report lists it, with the number of its pairs or images and the files left out."""
    return {
        "name": run.name,
        "analysis": run.analysis,
        "listed": run.listed,
        "there": run.there,
        "error_rows": len(run.rows) - len(run.good),
        "complete": not run.partial,
        "left_out": run.left_out,
        "changed_files": run.changed,
        **{key: run.settings[key] for key in ("data_id", "data_revision", "seed")},
    }


# --- matching ---


@dataclass(frozen=True)
class MatchRun:
    """Medians over the pairs of one match run, and its settings.

    `matched` is the share of PNG matches within 1 % of the distance of unrelated photos, `cut_short` the number of
    pairs whose evaluations ran out.
    """

    run: str
    listed: int
    rows: int
    pairs: int
    cut_short: int
    solver: str
    radius: float | None
    norm: str
    rtol: float
    max_evals: int
    of_texts: bool
    embedding_error: Estimate | None
    embedding_error_8bit: Estimate | None
    target_quantization_error: Estimate | None
    cosine_to_target: Estimate | None
    psnr_db: Estimate | None
    ssim: Estimate | None
    l2: Estimate | None
    num_evals: Estimate | None
    converged: Share | None
    matched: Share | None


@dataclass(frozen=True)
class MatchNumbers(MatchRun):
    """The run of most pairs; `within` is the share of pairs up to an error; fields from `distance` on are measured."""

    noise_floor: Estimate | None
    target_label_prob: Estimate | None
    within: Mapping[str, Mapping[str, Share | None]]
    photos: int
    distance: Estimate | None
    moved: Estimate | None
    random_moved: Estimate | None
    random_error: Estimate | None
    random_l2: Estimate | None
    rounded_error: Estimate | None
    psnr_match_target: Estimate | None
    ssim_match_target: Estimate | None
    measured_pairs: int
    unrelated: Spread | None


@dataclass(frozen=True)
class BudgetNumbers(MatchRun):
    """One match run with its limit on the change; `unrelated` is the median over unrelated photos of its data."""

    seed: int
    data_id: str
    data_revision: str
    unrelated: float | None
    cosine_to_source: Estimate | None
    nearer: Share | None
    flipped: Share | None


def _match(run: Run, measured: Row) -> MatchNumbers:
    pairs = measured.get("pairs", ())
    errors = {"float": column(run.good, "embedding_error"), "8bit": column(run.good, "embedding_error_8bit")}
    unrelated = _unrelated(run, measured)
    return _match_run(
        MatchNumbers, run, pairs, unrelated=unrelated, matched=_matched(run, unrelated), measured_pairs=len(pairs),
        within={kind: {f"{t:g}": _at_most(own, t) for t in THRESHOLDS} for kind, own in errors.items()},
        photos=len({row[key] for row in run.good for key in ("source_id", "target_id")}),
    )  # fmt: skip


def _budget(run: Run, first: Run, measured: Row) -> BudgetNumbers:
    same = all(run.settings[key] == first.settings[key] for key in ("data_id", "data_revision"))
    unrelated = (_unrelated(first, measured) if same else None) or _unrelated(run, {})
    return _match_run(
        BudgetNumbers, run, unrelated=unrelated.median if unrelated else None, matched=_matched(run, unrelated),
        flipped=_heads(run).flipped,
        nearer=share(_less(row["cosine_to_source"], row["cosine_to_target"]) for row in run.good),
    )  # fmt: skip


def _matched(run: Run, unrelated: Spread | None) -> Share | None:
    if unrelated is None or not unrelated.median:
        return None
    return _at_most(column(run.good, "embedding_error_8bit"), MATCHED * unrelated.median)


def _match_run(record: Any, run: Run, measured: Rows = (), **given: Any) -> Any:
    # A match that equals its source has no PSNR.
    psnr = (IDENTICAL_DB if row["psnr_db"] is None and row["l2"] == 0 else row["psnr_db"] for row in run.good)
    return fill(
        record, (*run.good, *measured), run.settings, run=run.name, listed=run.listed, rows=len(run.rows),
        pairs=len(run.good), psnr_db=estimate(psnr), of_texts="target_texts" in run.settings,
        cut_short=sum(row["status"] == Status.MAX_EVALS for row in run.rows),
        converged=share(row["status"] == Status.CONVERGED for row in run.rows), **given,
    )  # fmt: skip


def _at_most(values: Sequence[float | None], limit: float) -> Share | None:
    return share(None if value is None else value <= limit for value in values)


def _less(a: float | None, b: float | None) -> bool | None:
    return None if a is None or b is None else a < b


def _unrelated(run: Run, measured: Row) -> Spread | None:
    """Return the distances of unrelated photos: as measured, else from the run's own summary."""
    if measured.get("unrelated"):
        return fill(Spread, (), measured["unrelated"])
    stated = (run.record.get("summary") or {}).get("baseline")
    return fill(Spread, (), stated["distance"], n=stated["num_pairs"]) if stated else None


@dataclass(frozen=True)
class HeadNumbers:
    """Labels by the checkpoint's head, or zero-shot, of pairs whose source and target have different labels."""

    labelled: int
    apart: int
    flipped: Share | None
    kept: Share | None
    target_label_prob: Estimate | None
    zero_shot: bool


def _heads(run: Run) -> HeadNumbers:
    rows = [row for row in run.good if row["same_top1"] is not None]
    apart = [row for row in rows if row["source_label"] != row["target_label"]]
    return fill(
        HeadNumbers, apart, {}, labelled=len(rows), apart=len(apart), zero_shot=bool(run.settings.get("labels")),
        flipped=share(row["same_top1"] for row in apart),
        kept=share(row["match_label"] == row["source_label"] for row in apart),
    )  # fmt: skip


@dataclass(frozen=True)
class SurvivalNumbers:
    """The match after one transform, and the target after the same transform (`control`).

    `taken` is the share that is still nearer to the target than to its source, of the matches that were before.
    """

    error: Estimate | None
    control: Estimate | None
    to_source: Estimate | None
    label: Share | None
    control_label: Share | None
    taken: Share | None


def _survival(pairs: Rows) -> dict[str, SurvivalNumbers]:
    found: dict[str, list[Row]] = {}
    for pair in pairs:
        before = _less(pair["error"], pair["moved"])
        for name, row in pair["survival"].items():
            taken = _less(row["error"], row["to_source"]) if before else None
            found.setdefault(name, []).append(row | {"taken": taken})
    shares = ("label", "control_label", "taken")
    return {
        name: fill(SurvivalNumbers, rows, {key: share(column(rows, key)) for key in shares})
        for name, rows in found.items()
    }


@dataclass(frozen=True)
class Outcome:
    """Matches behind a defence: `taken` is the share nearer to the target than to the source, by cosine.

    `label` is the share with the target's label, of pairs whose photos have different labels there.
    """

    cosine_to_target: Estimate | None
    cosine_to_source: Estimate | None
    psnr_db: Estimate | None
    taken: Share | None
    label: Share | None


@dataclass(frozen=True)
class SmoothingNumbers:
    """Least cosine of a smoothed embedding with that of an image within a radius: certified, and attained by attack."""

    radii: tuple[float, ...]
    certified: tuple[Estimate | None, ...]
    attained: tuple[Estimate | None, ...]


@dataclass(frozen=True)
class DefenceNumbers:
    """A defence: stored matches (`static`), matches made for it (`adaptive`), and what photos lose.

    `apart` is the cosine of source and target, `kept` the share of photos that keep their label, `accuracy` that of a
    nearest-neighbour classifier, and `plain_accuracy` the same without the defence.
    """

    name: str
    static: Outcome
    adaptive: Outcome
    apart: Estimate | None
    kept: Share | None
    accuracy: Share | None
    plain_accuracy: Share | None
    smoothing: SmoothingNumbers | None


def _defence(stored: Row) -> DefenceNumbers:
    accuracy, smooth = stored["accuracy"] or {"photos": 0, "plain": 0, "behind": 0}, stored["smoothing"]
    return DefenceNumbers(
        name=stored["name"], static=_outcome(stored["static"]), adaptive=_outcome(stored["adaptive"]),
        apart=estimate(stored["apart"]), kept=share(stored["kept"] or ()),
        accuracy=share(k < accuracy["behind"] for k in range(accuracy["photos"])),
        plain_accuracy=share(k < accuracy["plain"] for k in range(accuracy["photos"])),
        smoothing=SmoothingNumbers(
            tuple(smooth["radii"]),
            *(tuple(map(estimate, zip(*smooth[key], strict=True))) for key in ("certified", "attained")),
        ) if smooth else None,
    )  # fmt: skip


def _outcome(pairs: Rows) -> Outcome:
    return fill(Outcome, pairs, {key: share(column(pairs, key)) for key in ("taken", "label")})


@dataclass(frozen=True)
class Detection:
    """Matches of one kind told from photos: `found` is the share that moves more than every photo."""

    auc: Estimate | None
    found: Share | None
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class DetectorNumbers:
    """A detector of matches by how far the embedding moves under noise of one level."""

    photos: int
    static: Detection
    adaptive: Detection


def _detector(stored: Row) -> DetectorNumbers:
    photos = [value for value in stored["photos"] if value is not None]
    return DetectorNumbers(len(photos), *(_detection(stored[kind], photos) for kind in ("static", "adaptive")))


def _detection(matches: Sequence[float | None], photos: Sequence[float]) -> Detection:
    known = [value for value in matches if value is not None]
    cuts = sorted({*known, *photos}, reverse=True) if known and photos else []
    curve = [(0.0, 0.0), *(tuple(sum(v >= cut for v in own) / len(own) for own in (photos, known)) for cut in cuts)]
    above = share(value > max(photos) for value in known) if photos else None
    return Detection(auc(known, photos), above, tuple((x, y) for x, y in curve))


@dataclass(frozen=True)
class TransferNumbers:
    """The matches seen by another model; `taken` is the share nearer to the target than to the source, by cosine."""

    model: str
    revision: str
    readout: str
    same_size: bool
    error: Estimate | None
    distance: Estimate | None
    moved: Estimate | None
    cosine_to_target: Estimate | None
    cosine_to_source: Estimate | None
    cosine_source_target: Estimate | None
    nearer: Share | None
    taken: Share | None
    flipped: Share | None
    kept: Share | None
    unrelated: Spread | None


def _transfer(one: Row) -> TransferNumbers:
    named = [pair["labels"] for pair in one["pairs"] if pair["labels"] and pair["labels"][0] != pair["labels"][2]]
    return fill(
        TransferNumbers, one["pairs"], one, unrelated=fill(Spread, (), one["unrelated"]) if one["unrelated"] else None,
        nearer=share(_less(pair["error"], pair["distance"]) for pair in one["pairs"]),
        taken=share(_less(pair["cosine_to_source"], pair["cosine_to_target"]) for pair in one["pairs"]),
        flipped=share(match == target for _, match, target in named),
        kept=share(match == source for source, match, _ in named),
    )  # fmt: skip


@dataclass(frozen=True)
class RetrievalNumbers:
    """An image search with the match, and with the source as the control (`source_`)."""

    photos: int
    k: int
    chance: float
    first: Share | None
    source_first: Share | None
    rank: Estimate | None
    source_rank: Estimate | None
    overlap: Estimate | None
    source_overlap: Estimate | None


def _retrieval(stored: Row | None) -> RetrievalNumbers | None:
    if not stored:
        return None
    first, source_first = (_at_most(column(stored["pairs"], key), 1) for key in ("rank", "source_rank"))
    return fill(RetrievalNumbers, stored["pairs"], stored, first=first, source_first=source_first)


@dataclass(frozen=True)
class ProbeNumbers:
    """A nearest-neighbour classifier on the embeddings; `flipped` and `kept` cover the pairs that it separates."""

    photos: int
    classes: int
    k: int
    accuracy: Share | None
    pairs: int
    apart: int
    flipped: Share | None
    kept: Share | None


def _probe(stored: Row | None) -> ProbeNumbers | None:
    if not stored:
        return None
    apart = [pair for pair in stored["pairs"] if None not in pair.values() and pair["source"] != pair["target"]]
    return fill(
        ProbeNumbers, (), stored, pairs=len(stored["pairs"]), apart=len(apart),
        accuracy=share(k < stored["hits"] for k in range(stored["photos"])),
        flipped=share(pair["match"] == pair["target"] for pair in apart),
        kept=share(pair["match"] == pair["source"] for pair in apart),
    )  # fmt: skip
