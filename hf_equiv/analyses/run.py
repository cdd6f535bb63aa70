"""`run_match`: make the rows of a match run, batch by batch; go on where an earlier run stopped."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hf_equiv.analyses import figures as plots
from hf_equiv.analyses import measures
from hf_equiv.analyses.lipschitz import _lipschitz, lipschitz_rows
from hf_equiv.analyses.match import make_rows
from hf_equiv.analyses.pairs import Subject
from hf_equiv.analyses.plan import AnalysisPlan, MatchPlan
from hf_equiv.analyses.spectrum import _spectrum, spectrum_rows
from hf_equiv.analyses.walk import _walk, walk_rows
from hf_equiv.data.image_file import decode_png, encode_png
from hf_equiv.formatting import one_line
from hf_equiv.geometry.levelset import TO_AN_IMAGE
from hf_equiv.precision import no_tf32
from hf_equiv.results import Status
from hf_equiv.runs import card, directory, processes, shards
from hf_equiv.runs.execute import Job, Observer, RunProgress, carry_out
from hf_equiv.runs.processes import PassSize, ran_out
from hf_equiv.runs.schema import MATCH, Layout, Row

BASELINE_PAIRS = 64
"""Pairs whose images make the baseline of unrelated images."""


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """A finished run.

    Attributes:
        out: its directory.
        rows: its rows, in the order of the pairs, without images.
        summary: as from `metrics.summarize`.
        errors: why rows are of status `error`, by pair id.
        refine_evals: evaluations of the 8-bit refinement, by pair id.
        main: whether this is the process that speaks for the run; of several, only one does.
    """

    out: Path
    rows: tuple[Row, ...]
    summary: Row
    errors: Mapping[str, str]
    refine_evals: Mapping[str, float]
    main: bool = True

    @property
    def converged(self) -> bool:
        """Whether every row has status `converged`."""
        return all(row["status"] == Status.CONVERGED for row in self.rows)


def run_match(
    plan: MatchPlan,
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: str = "missing",
    batch_size: int | None = None,
    observer: Observer | None = None,
) -> RunOutcome:
    """Carry out a plan: match, refine, save as PNG, read back, measure, write.

    Rows are on disk after each batch; on a full disk an OSError says so and they are kept. A run that was stopped, at
    whatever moment, is finished by the same call: rows that are there are kept, the others are made.

    Args:
        plan: from `make_plan`.
        out: run directory; by default `plan.default_out`.
        overwrite: `missing` makes what is not there, and tries rows of status `error` again; `always` replaces an
            earlier run; `never` refuses to touch one.
        batch_size: pairs matched at once, and the size of a shard; on a CPU it changes no number. Default 8, CUDA 32.
        observer: called with a `RunProgress` after every batched evaluation; what it raises ends the run.

    Returns:
        The rows as read back from disk, and the summary.

    Raises:
        ValueError: the directory holds another run, or is being written.
    """
    folder = Path(out or plan.default_out)
    encoder, sizes = plan.encoder, processes.PassSize(shard_size(plan.encoder.device, batch_size))

    def make(folder: Path, block: Sequence[Any], errors: dict[str, str], tell: Observer) -> None:
        rows, floats, costs = make_rows(plan, block, errors, tell, sizes)
        shards.write_shard(folder, block[0].index, rows, floats, costs, errors=errors)

    job = Job(
        MATCH, encoder.device, plan.settings, plan.pairs, sizes.images,
        prod(encoder.input_shape) * (3 + encoder.dtype.itemsize), make, lambda folder: _finish_match(plan, folder),
    )  # fmt: skip
    return _outcome(plan, folder, main=carry_out(job, folder, overwrite, observer or (lambda _: None)))


def shard_size(device: torch.device, batch_size: int | None) -> int:
    """Images worked on at once: as asked for, or 8 on a CPU and 32 elsewhere.

    Returns:
        The number.

    Raises:
        ValueError: it is below 1.
    """
    size = batch_size or (8 if device.type == "cpu" else 32)
    if size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {size}.")
    return size


def _finish_match(plan: MatchPlan, folder: Path) -> Row:
    """Write figure and card; returns the summary."""
    order = {pair.pair_id: pair.index for pair in plan.pairs}
    rows = sorted(shards.read_rows(folder), key=lambda row: order[row["pair_id"]])
    summary = summarize_run(plan.encoder, folder, rows, plan.config.rtol, [pair.pair_id for pair in plan.pairs])
    pictures = plots.pairs_figure(_first_pictures(folder, order, plots.MAX_PAIRS), summary["verdict"], plan.settings)
    figures = {} if pictures is None else {"pairs.png": pictures}
    for name, data in figures.items():
        shards.write_atomic(folder / "figures" / name, data)
    text = card.run_card(MATCH, plan.settings, summary, sorted(figures))
    shards.write_atomic(folder / "README.md", text.encode())
    return summary


def summarize_run(encoder: Any, folder: Path, rows: Sequence[Row], rtol: float, pair_ids: Sequence[str]) -> Row:
    """Summary of a run directory's rows, with the baseline from the stored images of its first pairs.

    Args:
        encoder: f.
        folder: run directory.
        rows: its rows.
        rtol: tolerance of the run.
        pair_ids: ids of all pairs, in order.

    Returns:
        As `metrics.summarize`, with the median evaluations of refining, which rows do not have.
    """
    wanted = set(pair_ids[:BASELINE_PAIRS])
    z: dict[str, tuple[Tensor, Tensor]] = {}
    dtype = torch.float64 if encoder.dtype == torch.float64 else torch.float32
    for row in shards.read_rows(folder, images=True, first=len(wanted)):
        if row["pair_id"] in wanted and row["status"] != Status.ERROR:
            two = torch.stack([decode_png(row["source"], dtype), decode_png(row["target"], dtype)])
            with torch.no_grad(), no_tf32():
                a, b = encoder(two.to(encoder.device)).cpu()
            z[row["pair_id"]] = (a, b)
    kept = [z[name] for name in pair_ids if name in z]
    baseline = None
    if kept:
        baseline = measures.random_pair_baseline(torch.stack([a for a, _ in kept]), torch.stack([b for _, b in kept]))
    summary = measures.summarize(rows, baseline, rtol)
    refining = [cost["refine"] for cost in shards.read_costs(folder).values()]
    summary["median"]["num_evals_refine"] = median(refining) if refining else None
    return summary


def _first_pictures(folder: Path, order: dict[str, int], limit: int) -> list[Row]:
    first = {name for name, index in order.items() if index < limit}
    rows = [
        r
        for r in shards.read_rows(folder, images=True, first=limit)
        if r["pair_id"] in first and r["match"] is not None
    ]
    return sorted(rows, key=lambda row: order[row["pair_id"]])


def _outcome(plan: MatchPlan, folder: Path, *, main: bool) -> RunOutcome:
    record = directory.read_record(folder)
    order = {pair.pair_id: pair.index for pair in plan.pairs}
    rows = sorted(shards.read_rows(folder), key=lambda row: order[row["pair_id"]])
    refine_evals = {name: cost["refine"] for name, cost in shards.read_costs(folder).items()}
    return RunOutcome(folder, tuple(rows), record["summary"], record.get("errors", {}), refine_evals, main)


# What the rows of a spectrum, lipschitz or walk run come to: counts, medians, and a verdict in words.


def summarize_analysis(analysis: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Row:
    """Summarise the rows of a run.

    Args:
        analysis: `spectrum`, `lipschitz` or `walk`.
        rows: finished rows, those of one image side by side.
        settings: of the run.

    Returns:
        Plain data, None for what does not exist; `verdict` says it in words.
    """
    summary = {
        "images": len({row["image_id"] for row in rows}),
        "rows": len(rows),
        "counts": dict(sorted(Counter(str(row["status"]) for row in rows).items())),
    }
    make = {"spectrum": _spectrum, "lipschitz": _lipschitz, "walk": _walk}[analysis]
    good = [row for row in rows if row["status"] != Status.ERROR]
    return summary | (make(good, settings) if good else {"verdict": "No image could be analysed."})


# `run_analysis`: make the rows of a spectrum, lipschitz or walk run, each image one shard.


PASS_SIZE = 32
"""Images, tangents or cotangents in one pass through the model."""


FAILED = {
    "spectrum": (Status.ERROR,),
    "lipschitz": (Status.ERROR,),
    "walk": (Status.ERROR, Status.DRIFT_EXCEEDED, Status.BOX_BLOCKED),
}
"""Statuses that are no success; `undetermined` is one: it is what null directions should give."""


@dataclass(frozen=True, slots=True)
class AnalysisOutcome:
    """A finished run.

    Attributes:
        analysis: `spectrum`, `lipschitz` or `walk`.
        out: its directory.
        rows: its rows, without images, in the order of the images.
        summary: as from `summarize_analysis`.
        errors: why rows are of status `error`, by image id.
        main: whether this is the process that speaks for the run; of several, only one does.
    """

    analysis: str
    out: Path
    rows: tuple[Row, ...]
    summary: Row
    errors: Mapping[str, str]
    main: bool = True

    @property
    def completed(self) -> bool:
        """Whether no row has a status that is a failure."""
        return not any(row["status"] in FAILED[self.analysis] for row in self.rows)


def run_analysis(
    plan: AnalysisPlan,
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: str = "missing",
    batch_size: int | None = None,
    observer: Observer | None = None,
) -> AnalysisOutcome:
    """Carry out a plan: analyse each image, write its rows, then summary, figures and card.

    Rows are on disk after each image. A run that was stopped, at whatever moment, is finished by the same call. An
    image that cannot be analysed gets one row of status `error`, and the others go on.

    Args:
        plan: from `make_analysis_plan`.
        out: run directory; by default `plan.default_out`.
        overwrite: `missing` makes what is not there, and tries rows of status `error` again; `always` replaces an
            earlier run; `never` refuses to touch one.
        batch_size: on a GPU, images, tangents or cotangents in one pass through the model; by default 32. On a CPU
            it is not heeded, so that it changes no number; there 8 derivatives go into a pass.
        observer: called with a `RunProgress`; what it raises ends the run.

    Returns:
        The rows as read back from disk, and the summary.

    Raises:
        ValueError: the directory holds another run, or is being written.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
    # on a CPU the last bits of a derivative depend on how many there are in a pass, and rows must not
    sizes = PassSize(PASS_SIZE if plan.encoder.device.type == "cpu" else batch_size or PASS_SIZE)
    folder, layout = Path(out or plan.default_out), plan.layout

    def make(folder: Path, block: Sequence[Any], errors: dict[str, str], tell: Observer) -> None:
        (subject,) = block

        def stage(name: str, step: int, steps: int) -> None:
            tell(RunProgress(name, pair_ids=(subject.image_id,), step=step, steps=steps))

        rows, floats, why = image_rows(
            plan, subject, sizes, stage, lambda text: tell(RunProgress("info", message=text))
        )
        if why is not None:
            errors[subject.image_id] = why
            tell(RunProgress("note", pair_ids=(subject.image_id,), message=f"{subject.image_id}: {why}"))
        shards.write_shard(folder, subject.index, rows, floats, {}, layout, errors)

    job = Job(
        layout, plan.encoder.device, plan.settings, plan.subjects, 1, plan.item_bytes, make,
        lambda folder: _finish(plan, folder),
    )  # fmt: skip
    main = carry_out(job, folder, overwrite, observer or (lambda _: None))
    record = directory.read_record(folder)
    rows = ordered_rows(folder, layout, plan.subjects)
    return AnalysisOutcome(layout.analysis, folder, tuple(rows), record["summary"], record.get("errors", {}), main)


def image_rows(
    plan: AnalysisPlan, subject: Subject, sizes: PassSize, stage: Callable[[str, int, int], None],
    inform: Callable[[str], None],
) -> tuple[list[Row], dict[str, Tensor], str | None]:  # fmt: skip
    """All columns of the rows of one image, its float images, and the message where it could not be analysed."""
    encoder, layout = plan.encoder, plan.layout
    dtype = torch.float64 if encoder.dtype == torch.float64 else torch.float32
    png: bytes | None = None
    image = target = None
    rows: list[Row] = [{"status": str(Status.ERROR)}]
    floats: dict[str, Tensor] = {}
    why: str | None = None
    try:
        source, other = plan.pixels(subject)
        png = encode_png(source)  # what is analysed is what is stored
        image = decode_png(png, dtype).to(encoder.device)
        target = None if other is None else decode_png(encode_png(other), dtype).to(encoder.device)
    except (ValueError, OSError) as error:
        why = one_line(error)
    while image is not None:
        tried = sizes.images
        try:
            rows, floats = _analyse(plan, subject, image, target, tried, stage)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # NaN, no JVP, a heading that leads nowhere
            why, full = one_line(error), ran_out(error)
        else:
            failed = Status.ERROR in {row["status"] for row in rows} and not floats
            why = Status.ERROR.advice if failed and layout.analysis == "spectrum" else None
            break
        if not full or tried == 1 or layout.analysis == "walk":  # whose passes hold one image anyway
            break
        inform(sizes.halve(tried))
    common = dict.fromkeys(layout.features) | {layout.images[0]: png, "image_id": subject.image_id}
    common |= {"image_class": subject.image_class} | plan.provenance
    common |= {"heading": plan.settings["heading"]} if "heading" in layout.features else {}
    common |= {key: subject.target_id for key in ("target_id", "toward_id") if key in layout.features}
    return [common | row for row in rows], floats, why


def _analyse(
    plan: AnalysisPlan, subject: Subject, image: Tensor, target: Tensor | None, batch: int,
    stage: Callable[[str, int, int], None],
) -> tuple[list[Row], dict[str, Tensor]]:  # fmt: skip
    name = subject.image_id
    if plan.config.analysis == "spectrum":
        stage("jacobian", 0, 1)
        return spectrum_rows(plan.config, plan.encoder, name, image, batch)
    if plan.config.analysis == "lipschitz":
        return lipschitz_rows(plan.encoder, image, target, plan.settings, name, batch, stage)
    return walk_rows(plan.encoder, image, target, plan.settings, name, stage)


def ordered_rows(folder: Path, layout: Layout, subjects: Sequence[Subject], *, images: bool = False) -> list[Row]:
    """All rows of a run, in the order of the images; those of one image as they were made."""
    order = {subject.image_id: subject.index for subject in subjects}
    return sorted(shards.read_rows(folder, images=images, layout=layout), key=lambda row: order[row["image_id"]])


def _finish(plan: AnalysisPlan, folder: Path) -> Row:
    """Write figures and card; returns the summary."""
    layout = plan.layout
    rows = ordered_rows(folder, layout, plan.subjects)
    summary = summarize_analysis(layout.analysis, rows, plan.settings)
    figures: dict[str, bytes] = {}
    if layout.analysis == "walk":
        figures = plots.walk_figures(rows, *_frames(folder, plan), plan.settings)
    else:
        first = _first_images(folder, plan)
        figures = plots.analysis_figures(layout.analysis, rows, first, plan.settings)
    for name, data in figures.items():
        shards.write_atomic(folder / "figures" / name, data)
    text = card.run_card(layout, plan.settings, summary, sorted(figures))
    shards.write_atomic(folder / "README.md", text.encode())
    return summary


def _first_images(folder: Path, plan: AnalysisPlan) -> Row:
    """Pixels and, where they are kept, right singular vectors of the first images, by id."""
    first = {subject.image_id for subject in plan.subjects[: plots.MAX_IMAGES]}
    pictures: Row = {}
    for row in shards.read_rows(folder, images=True, layout=plan.layout, first=len(first)):
        if row["image_id"] in first and row["image_id"] not in pictures and row["image"] is not None:
            pictures[row["image_id"]] = (decode_png(row["image"]), None)
    for path in shards.shard_files(folder, plan.layout) if plan.config.vectors else ():
        if shards.shard_index(path) < len(first):
            floats = shards.read_floats(folder / "float" / f"{path.stem}.safetensors")[0]
            known = {name: floats.get(f"{name}/right") for name in pictures}
            pictures |= {name: (pictures[name][0], right) for name, right in known.items() if right is not None}
    return pictures


def _frames(folder: Path, plan: AnalysisPlan) -> tuple[dict[str, list[bytes]], dict[str, Tensor]]:
    """PNG frames of the first walks, and the images (3, H, W) that they lead to, by image id."""
    first = {subject.image_id: subject for subject in plan.subjects[: plots.MAX_WALKS]}
    steps: dict[str, list[tuple[int, bytes]]] = {name: [] for name in first}
    for row in shards.read_rows(folder, images=True, layout=plan.layout, first=len(first)):
        if row["image_id"] in first and row["step"] is not None:
            steps[row["image_id"]].append((row["step"], row["frame"]))
    frames = {name: [frame for _, frame in sorted(found)] for name, found in steps.items() if found}
    ends: dict[str, Tensor] = {}
    for name in frames if plan.config.heading in TO_AN_IMAGE else ():
        image, target = plan.pixels(first[name])
        end = image if plan.config.heading == "nearest" else target
        ends |= {} if end is None else {name: end}
    return frames, ends
