"""`run_analysis`: make the rows of a spectrum, lipschitz or walk run, each image one shard."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_equiv import card, geometryplots, rundir, shards, walkplots
from hf_equiv.geometryplan import AnalysisPlan
from hf_equiv.geometrysummary import summarize_analysis
from hf_equiv.imagefile import decode_png, encode_png
from hf_equiv.levelset import TO_AN_IMAGE
from hf_equiv.lipschitzrows import lipschitz_rows
from hf_equiv.matchrows import Observer, RunProgress, one_line
from hf_equiv.memory import PassSize, ran_out
from hf_equiv.pairs import Subject
from hf_equiv.results import Status
from hf_equiv.shards import Layout, Row
from hf_equiv.spectrumrows import spectrum_rows
from hf_equiv.walkrows import walk_rows
from hf_equiv.work import Job, carry_out

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
    record = rundir.read_record(folder)
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
        figures = walkplots.walk_figures(rows, *_frames(folder, plan), plan.settings)
    else:
        first = _first_images(folder, plan)
        figures = geometryplots.analysis_figures(layout.analysis, rows, first, plan.settings)
    for name, data in figures.items():
        shards.write_atomic(folder / "figures" / name, data)
    text = card.analysis_card(layout, plan.settings, summary, sorted(figures))
    shards.write_atomic(folder / "README.md", text.encode())
    return summary


def _first_images(folder: Path, plan: AnalysisPlan) -> Row:
    """Pixels and, where they are kept, right singular vectors of the first images, by id."""
    first = {subject.image_id for subject in plan.subjects[: geometryplots.MAX_IMAGES]}
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
    first = {subject.image_id: subject for subject in plan.subjects[: walkplots.MAX_WALKS]}
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
